"""What the watcher decides without a disk or a clock: names, settling, vanishing, the timetable."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from whisperd.vocabulary import Sighting
from whisperd.watcher.names import Names
from whisperd.watcher.pace import GAP_MIN_S, GAP_PER_SCAN, Pace
from whisperd.watcher.scan import ScanResult
from whisperd.watcher.settle import REPEAT_S, Known, Report, Settler

DEV = 7
QUIET_S = 10.0


def a_file(path: bytes = b"a.mp3", *, size: int = 100, mtime_ns: int = 1, ctime_ns: int = 1, inode: int = 1, dev: int = DEV) -> Sighting:
    return Sighting(path=path, dev=dev, inode=inode, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)


def a_scan(*files: Sighting, complete: bool = True, hidden: tuple[bytes, ...] = (), dev: int = DEV, empty: bool = False) -> ScanResult:
    return ScanResult(
        sightings={file.path: file for file in files}, complete=complete, hidden=dict.fromkeys(hidden, "denied"), dev=dev, empty=empty
    )


def a_row(file: Sighting, state: str) -> Known:
    return Known(file.dev, file.size, file.mtime_ns, state)


def look(settler: Settler, scan: ScanResult, now: float, known: dict[bytes, Known] | None = None, *, written: bool = False) -> Report:
    return settler.observe(scan, known or {}, now, 0.0, lambda _: written)


# --- settling ---


def test_a_new_file_is_seen_once_and_settled_once_after_the_quiet_period() -> None:
    """Each change travels once; `unsettled` counts the file only while it is waited for."""
    settler, scan = Settler(QUIET_S), a_scan(a_file())
    first = look(settler, scan, 0)
    assert (first.seen, first.settled, first.unsettled) == ([a_file()], [], 1)
    assert settler.next_look() == QUIET_S
    between = look(settler, scan, 9.99)
    assert (between.seen, between.settled, between.unsettled) == ([], [], 1)
    last = look(settler, scan, 10)
    assert (last.seen, last.settled, last.unsettled) == ([], [a_file()], 0)
    assert look(settler, scan, 10.5).settled == []


@pytest.mark.parametrize("change", [{"size": 101}, {"mtime_ns": 2}, {"ctime_ns": 2}, {"inode": 2}])
def test_any_change_begins_the_quiet_period_anew(change: dict[str, int]) -> None:
    """Size, mtime, ctime and inode all have to stand still; the change itself is told."""
    settler, changed = Settler(QUIET_S), structs.replace(a_file(), **change)
    look(settler, a_scan(a_file()), 0)
    assert look(settler, a_scan(changed), 9).seen == [changed]
    assert look(settler, a_scan(changed), 18.9).settled == []
    assert look(settler, a_scan(changed), 19).settled == [changed]


def test_the_quiet_period_lies_between_two_looks_however_long_the_scan_took() -> None:
    """A file may have been looked at as late as the end of the first scan and as early as the start of the second."""
    settler, scan = Settler(QUIET_S), a_scan(a_file())
    settler.observe(scan, {}, 0, 30, lambda _: False)
    assert look(settler, scan, 39.9).settled == []
    assert look(settler, scan, 40).settled == [a_file()]


def test_a_file_that_somebody_writes_to_waits_and_is_not_asked_about_before_it_is_quiet() -> None:
    """The lease test opens files, so it is kept for those whose quiet period is over."""
    asked: list[bytes] = []

    def written(sighting: Sighting) -> bool:
        asked.append(sighting.path)
        return len(asked) < 3

    settler, scan = Settler(QUIET_S), a_scan(a_file())
    for now in (0, 5):
        settler.observe(scan, {}, now, 0, written)
    assert asked == []
    results = [settler.observe(scan, {}, now, 0, written) for now in (10, 20, 30)]
    assert [(len(report.settled), report.unsettled) for report in results] == [(0, 1), (0, 1), (1, 0)]


def test_an_empty_file_and_one_from_the_future_settle_as_any_other() -> None:
    """They become jobs, which fail with a plain reason where the operator can read it."""
    settler, scan = Settler(QUIET_S), a_scan(a_file(b"empty.wav", size=0), a_file(b"later.wav", mtime_ns=2**62))
    look(settler, scan, 0)
    assert {file.path for file in look(settler, scan, 10).settled} == {b"empty.wav", b"later.wav"}


# --- against the ledger ---


@pytest.mark.parametrize("state", ["ready", "running", "transcribed", "done", "failed", "cancelled"])
def test_what_the_ledger_has_beyond_seen_is_no_news(state: str) -> None:
    """The same content again is not new work; a remount (another inode, another device) is no news either."""
    settler, known = Settler(QUIET_S), {b"a.mp3": a_row(a_file(), state)}
    for now in (0, 10, 20):
        report = look(settler, a_scan(a_file(inode=9, dev=8), dev=8), now, known)
        assert (report.seen, report.settled, report.vanished, report.unsettled) == ([], [], [], 0)


@pytest.mark.parametrize("state", ["seen", "ready", "running", "done", "failed", "cancelled", "gone"])
def test_new_content_under_an_old_name_is_new_work(state: str) -> None:
    """Whatever became of the old content."""
    settler, known = Settler(QUIET_S), {b"a.mp3": a_row(a_file(size=1), state)}
    assert look(settler, a_scan(a_file()), 0, known).seen == [a_file()]
    assert look(settler, a_scan(a_file()), 10, known).settled == [a_file()]


def test_a_file_that_comes_back_after_it_was_gone_is_new_work() -> None:
    """A job that is gone does not describe what lies there now, even if it is the same."""
    settler, known = Settler(QUIET_S), {b"a.mp3": a_row(a_file(), "gone")}
    assert look(settler, a_scan(a_file()), 0, known).seen == [a_file()]


def test_after_a_restart_a_seen_file_is_not_told_again_but_its_quiet_period_begins_anew() -> None:
    """Nothing is known of what happened while nobody watched."""
    settler, known = Settler(QUIET_S), {b"a.mp3": a_row(a_file(), "seen")}
    first = look(settler, a_scan(a_file()), 0, known)
    assert (first.seen, first.settled, first.unsettled) == ([], [], 1)
    assert look(settler, a_scan(a_file()), 10, known).settled == [a_file()]


def test_what_the_ledger_does_not_show_in_time_is_told_again() -> None:
    """A settled file that is still `seen` is settled again, ever more rarely; one whose job has gone meanwhile begins anew."""
    settler, scan, known = Settler(QUIET_S), a_scan(a_file()), {b"a.mp3": a_row(a_file(), "seen")}
    look(settler, scan, 0, known)
    look(settler, scan, 10, known)
    assert settler.next_look() == 10 + REPEAT_S
    assert look(settler, scan, 10 + REPEAT_S, known).settled == [a_file()]
    assert settler.next_look() == 10 + 3 * REPEAT_S
    gone = look(settler, scan, 10 + 3 * REPEAT_S, {b"a.mp3": a_row(a_file(), "gone")})
    assert (gone.seen, gone.settled, gone.unsettled) == ([a_file()], [], 1)


def test_a_watcher_at_rest_wants_nothing() -> None:
    """Once the ledger shows everything, no scan is due but the regular one."""
    settler, scan = Settler(QUIET_S), a_scan(a_file())
    look(settler, scan, 0)
    look(settler, scan, 10)
    look(settler, scan, 11, {b"a.mp3": a_row(a_file(), "ready")})
    assert settler.next_look() is None


# --- vanishing ---


@pytest.mark.parametrize(
    ("state", "vanishes"),
    [("seen", True), ("ready", True), ("running", False), ("transcribed", False), ("done", False), ("failed", False), ("gone", False)],
)
def test_only_jobs_that_still_wait_for_their_source_vanish(state: str, vanishes: bool) -> None:
    """A running job has its file open; a finished one does not need it."""
    report = look(Settler(QUIET_S), a_scan(a_file(b"other.mp3")), 0, {b"a.mp3": a_row(a_file(), state)})
    assert report.vanished == ([b"a.mp3"] if vanishes else [])


def test_a_file_that_is_waited_for_vanishes_before_the_ledger_shows_it() -> None:
    """And is told once, until the ledger had its time to follow."""
    settler = Settler(QUIET_S)
    look(settler, a_scan(a_file()), 0)
    gone = look(settler, a_scan(), 1)
    assert (gone.vanished, gone.unsettled) == ([b"a.mp3"], 0)
    assert look(settler, a_scan(), 2, {b"a.mp3": a_row(a_file(), "seen")}).vanished == []
    assert look(settler, a_scan(), 1 + REPEAT_S, {b"a.mp3": a_row(a_file(), "seen")}).vanished == [b"a.mp3"]


def test_what_lies_in_a_directory_that_cannot_be_entered_has_not_vanished() -> None:
    """The rest of the inbox can still vanish."""
    known = {path: a_row(a_file(path), "ready") for path in (b"locked/a.mp3", b"locked.mp3")}
    report = look(Settler(QUIET_S), a_scan(hidden=(b"locked",)), 0, known)
    assert report.vanished == [b"locked.mp3"]


def test_nothing_vanishes_from_another_device_unless_a_known_file_vouches_for_it() -> None:
    """Another filesystem where the inbox was is no proof; a file of the old device that is still there is."""
    known = {b"a.mp3": a_row(a_file(), "ready"), b"b.mp3": a_row(a_file(b"b.mp3"), "done")}
    assert look(Settler(QUIET_S), a_scan(a_file(b"c.mp3", dev=8), dev=8), 0, known).vanished == []
    assert look(Settler(QUIET_S), a_scan(a_file(b"b.mp3", dev=8), dev=8), 0, known).vanished == [b"a.mp3"]


def test_a_bare_mount_point_is_told_from_an_empty_inbox() -> None:
    """Empty and on another device than what is still needed, or than what was there a moment ago."""
    needed, done = {b"a.mp3": a_row(a_file(), "ready")}, {b"a.mp3": a_row(a_file(), "done")}
    bare = a_scan(dev=8, empty=True)
    assert Settler(QUIET_S).looks_unmounted(bare, needed)
    assert not Settler(QUIET_S).looks_unmounted(bare, done)
    assert not Settler(QUIET_S).looks_unmounted(a_scan(empty=True), needed)
    assert not Settler(QUIET_S).looks_unmounted(a_scan(a_file(b"c.mp3", dev=8), dev=8), needed)
    settler = Settler(QUIET_S)
    look(settler, a_scan(a_file()), 0, done)
    assert settler.looks_unmounted(bare, done)


# --- for every history ---

PATHS = (b"a", b"d/b")
contents = st.builds(
    lambda size, inode, ctime_ns: {"size": size, "inode": inode, "ctime_ns": ctime_ns}, *[st.integers(min_value=0, max_value=1)] * 3
)
rounds = st.lists(
    st.tuples(
        st.floats(min_value=0, max_value=2 * QUIET_S),  # pause before the scan
        st.floats(min_value=0, max_value=2),  # how long it takes
        st.fixed_dictionaries({}, optional=dict.fromkeys(PATHS, contents)),
        st.booleans(),  # complete
        st.booleans(),  # somebody writes
    ),
    max_size=20,
)


@settings(max_examples=200, deadline=None)
@given(rounds)
def test_for_every_history(history: list[tuple[float, float, dict[bytes, dict[str, int]], bool, bool]]) -> None:
    """Settled: unchanged in every scan since one that ended a quiet period ago, and not written. Vanished: missed by a complete scan."""
    settler, now = Settler(QUIET_S), 0.0
    unchanged_since: dict[bytes, tuple[Sighting, float]] = {}
    for pause_s, took_s, files, complete, written in history:
        now += pause_s
        scan = a_scan(*(structs.replace(a_file(path), **content) for path, content in files.items()), complete=complete)
        report = settler.observe(scan, {}, now, took_s, lambda _, written=written: written)  # type: ignore[misc]
        for sighting in report.settled:
            before, since = unchanged_since[sighting.path]
            assert before == sighting
            assert now >= since + QUIET_S
            assert not written
        assert not report.vanished or complete
        assert not set(report.vanished) & scan.sightings.keys()
        assert not {file.path for file in report.seen} & {file.path for file in report.settled}
        for path, sighting in scan.sightings.items():
            if unchanged_since.get(path, (None,))[0] != sighting:
                unchanged_since[path] = (sighting, now + took_s)
        for path in report.vanished:
            unchanged_since.pop(path, None)
        now += took_s


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        b"talk.mp3.part",
        b"TALK.MP3.PARTIAL",
        b"talk.tmp",
        b"talk.mp3.crdownload",
        b"talk.download",
        b"talk.mp3.filepart",
        b".hidden.mp3",
        b".talk.mp3.a8Xk2Q",
        b".syncthing.talk.mp3.tmp",
        b"~syncthing~talk.mp3.tmp",
        b"~$talk.mp3",
        b"@eaDir",
        b"#recycle",
        b".DS_Store",
        b"thumbs.DB",
        b"talk.mp3.error.txt",
        b"._talk.mp3",
        b"draft \xff.mp3",
        b"DRAFT\n.mp3",
        "Entwu\u0308rfe".encode(),
    ],
)
def test_names_that_say_not_yet_or_never(name: bytes) -> None:
    """Built in, or an operator's pattern; case, line breaks, bad UTF-8 and the two spellings of an umlaut make no difference."""
    assert Names(["*.mp3"], ["draft*", "Entwürfe"]).ignored(name)


@pytest.mark.parametrize("name", [b"talk.mp3", b"-rf.MP3", b"part.mp3", b"~talk.mp3", b"a\nb.mp3", b"\xff\xfe.mp3", b"tmp", b"partial"])
def test_other_names_are_not_ignored(name: bytes) -> None:
    """Only the names on the list are."""
    assert not Names(["*.mp3"], []).ignored(name)


def test_include_patterns_decide_what_a_recording_is() -> None:
    """Without patterns every file is one."""
    names = Names(["*.mp3", "*.wav"], [])
    assert [names.is_recording(name) for name in (b"a.mp3", b"A.WAV", b"a.mp3.txt", b"mp3", b"\xff.mp3")] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert Names([], []).is_recording(b"anything")


@given(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_every_name_has_an_answer(name: bytes) -> None:
    """Names are bytes; none of them may stop the watcher. A name that is not finished is never a recording under its final suffix."""
    names = Names(["*.mp3"], ["x*"])
    names.is_recording(name)
    assert names.ignored(name + b".part")
    assert names.ignored(b"." + name)


# --- the timetable ---


def paced(*, took_s: float = 0.01, polling: bool = False) -> Pace:
    pace = Pace(rescan_s=300, poll_s=10, polling=polling)
    pace.begins(100)
    pace.ended(100 + took_s)
    return pace


def test_the_first_scan_and_one_that_is_asked_for_are_due_at_once() -> None:
    """A hint or a request that comes during a scan is not answered by that scan."""
    pace = Pace(rescan_s=300, poll_s=10)
    assert pace.next_scan(None) == 0
    pace.begins(100)
    pace.asked()
    pace.ended(101)
    assert pace.next_scan(None) == 0


def test_the_timetable() -> None:
    """Regular scans by the kind of hints, earlier ones for hints and waiting files, never more than the inbox bears."""
    assert paced().next_scan(None) == 400
    assert paced(polling=True).next_scan(None) == 110
    assert paced().next_scan(150) == 150
    hinted = paced()
    hinted.hinted(200)
    hinted.hinted(201)
    assert 200 < hinted.next_scan(None) < 200.2
    assert paced().next_scan(99) == 100.01 + GAP_MIN_S
    assert paced(took_s=20, polling=True).next_scan(99) == 120 + GAP_PER_SCAN * 20
    down = paced()
    down.down = True
    assert down.next_scan(99) == 110.01
