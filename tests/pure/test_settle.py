"""What the watcher decides without a disk or a clock: names, settling, vanishing, renaming, doubting."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from whisperd.vocabulary import Sighting
from whisperd.watcher import known, settle
from whisperd.watcher.known import KnownPaths, KnownRow
from whisperd.watcher.names import Names
from whisperd.watcher.scan import ScanResult
from whisperd.watcher.settle import REPEAT_S, Report, Settler
from whisperd.wire import Renamed

DEV = 7
QUIET_S = 10.0


def a_file(path: bytes = b"a.mp3", *, size: int = 100, mtime_ns: int = 1, ctime_ns: int = 1, inode: int = 1, dev: int = DEV) -> Sighting:
    return Sighting(path=path, dev=dev, inode=inode, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)


class Scan(NamedTuple):
    """What one scan finds."""

    files: tuple[Sighting, ...]
    result: ScanResult


def a_scan(*files: Sighting, complete: bool = True, hidden: tuple[bytes, ...] = (), dev: int = DEV, empty: bool = False) -> Scan:
    return Scan(files, ScanResult(complete=complete, hidden=dict.fromkeys(hidden, "denied"), dev=dev, empty=empty))


def a_row(file: Sighting, state: str) -> KnownRow:
    return file.path, file.dev, file.inode, file.size, file.mtime_ns, file.ctime_ns, state


def a_settler(writers: Callable[[Sighting], bool] = lambda _: False) -> Settler:
    return Settler(QUIET_S, writers)


def look(settler: Settler, scan: Scan, now: float, *known: KnownRow, took_s: float = 0.0, everything: bool = True) -> Report:
    """One scan, begun at `now`, against a ledger with these rows."""
    table, dev = KnownPaths(known), scan.result.dev
    settler.ledger_moved(table)
    settler.begin(everything=everything)
    table.begin()
    settler.observe(
        [(file.path, file.inode, file.size, file.mtime_ns, file.ctime_ns) for file in scan.files], dev, table, now, now + took_s
    )

    def twins(sighting: Sighting) -> list[tuple[bytes, int, str]]:
        return [(row[0], row[1], row[6]) for row in known if row[2:5] == (sighting.inode, sighting.size, sighting.mtime_ns)]

    return settler.finish(scan.result, table, now, lambda: known, twins)


# --- settling ---


def test_a_new_file_is_seen_once_and_settled_once_after_the_quiet_period() -> None:
    """Each change travels once; `unsettled` counts the file only while it is waited for."""
    settler, scan = a_settler(), a_scan(a_file())
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
    settler, changed = a_settler(), structs.replace(a_file(), **change)
    look(settler, a_scan(a_file()), 0)
    assert look(settler, a_scan(changed), 9).seen == [changed]
    assert look(settler, a_scan(changed), 18.9).settled == []
    assert look(settler, a_scan(changed), 19).settled == [changed]


def test_the_quiet_period_lies_between_two_looks_however_long_the_scan_took() -> None:
    """A file may have been looked at as late as the end of the first scan and as early as the start of the second."""
    settler, scan = a_settler(), a_scan(a_file())
    look(settler, scan, 0, took_s=30)
    assert look(settler, scan, 39.9).settled == []
    assert look(settler, scan, 40).settled == [a_file()]


def test_a_file_that_somebody_writes_to_waits_and_is_not_asked_about_before_it_is_quiet() -> None:
    """The lease test opens files, so it is kept for those whose quiet period is over."""
    asked: list[bytes] = []

    def written(sighting: Sighting) -> bool:
        asked.append(sighting.path)
        return len(asked) < 3

    settler, scan = a_settler(written), a_scan(a_file())
    for now in (0, 5):
        look(settler, scan, now)
    assert asked == []
    results = [look(settler, scan, now) for now in (10, 20, 30)]
    assert [(len(report.settled), report.unsettled) for report in results] == [(0, 1), (0, 1), (1, 0)]


def test_an_empty_file_and_one_from_the_future_settle_as_any_other() -> None:
    """They become jobs, which fail with a plain reason where the operator can read it."""
    settler, scan = a_settler(), a_scan(a_file(b"empty.wav", size=0), a_file(b"later.wav", mtime_ns=2**62))
    look(settler, scan, 0)
    assert {file.path for file in look(settler, scan, 10).settled} == {b"empty.wav", b"later.wav"}


# --- against the ledger ---


@pytest.mark.parametrize("state", ["ready", "running", "transcribed", "done", "failed", "cancelled"])
def test_what_the_ledger_has_beyond_seen_is_no_news(state: str) -> None:
    """The same content again is not new work; a remount (another inode, another device) is no news either."""
    settler, known = a_settler(), a_row(a_file(), state)
    for now in (0, 10, 20):
        report = look(settler, a_scan(a_file(inode=9, dev=8), dev=8), now, known)
        assert (report.seen, report.settled, report.vanished, report.unsettled) == ([], [], [], 0)


@pytest.mark.parametrize("state", ["seen", "ready", "running", "done", "failed", "cancelled", "gone"])
def test_new_content_under_an_old_name_is_new_work(state: str) -> None:
    """Whatever became of the old content."""
    settler, known = a_settler(), a_row(a_file(size=1), state)
    assert look(settler, a_scan(a_file()), 0, known).seen == [a_file()]
    assert look(settler, a_scan(a_file()), 10, known).settled == [a_file()]


def test_a_file_that_comes_back_after_it_was_gone_is_new_work() -> None:
    """A job that is gone does not describe what lies there now, even if it is the same."""
    settler, known = a_settler(), a_row(a_file(), "gone")
    assert look(settler, a_scan(a_file()), 0, known).seen == [a_file()]


def test_after_a_restart_a_seen_file_is_not_told_again_but_its_quiet_period_begins_anew() -> None:
    """Nothing is known of what happened while nobody watched."""
    settler, known = a_settler(), a_row(a_file(), "seen")
    first = look(settler, a_scan(a_file()), 0, known)
    assert (first.seen, first.settled, first.unsettled) == ([], [], 1)
    assert look(settler, a_scan(a_file()), 10, known).settled == [a_file()]


def test_what_the_ledger_does_not_show_in_time_is_told_again() -> None:
    """A settled file that is still `seen` is settled again, ever more rarely; one whose job has gone meanwhile begins anew."""
    settler, scan, known = a_settler(), a_scan(a_file()), a_row(a_file(), "seen")
    look(settler, scan, 0, known)
    look(settler, scan, 10, known)
    assert settler.next_look() == 10 + REPEAT_S
    assert look(settler, scan, 10 + REPEAT_S, known).settled == [a_file()]
    assert settler.next_look() == 10 + 3 * REPEAT_S
    gone = look(settler, scan, 10 + 3 * REPEAT_S, a_row(a_file(), "gone"))
    assert (gone.seen, gone.settled, gone.unsettled) == ([a_file()], [], 1)


def test_a_watcher_at_rest_wants_nothing() -> None:
    """Once the ledger shows everything, no scan is due but the regular one."""
    settler, scan = a_settler(), a_scan(a_file())
    look(settler, scan, 0)
    look(settler, scan, 10)
    look(settler, scan, 11, a_row(a_file(), "ready"))
    assert settler.next_look() is None


# --- vanishing ---


@pytest.mark.parametrize(
    ("state", "vanishes"),
    [("seen", True), ("ready", True), ("running", False), ("transcribed", False), ("done", False), ("failed", False), ("gone", False)],
)
def test_only_jobs_that_still_wait_for_their_source_vanish(state: str, vanishes: bool) -> None:
    """A running job has its file open; a finished one does not need it."""
    report = look(a_settler(), a_scan(a_file(b"other.mp3", inode=2)), 0, a_row(a_file(), state))
    assert report.vanished == ([b"a.mp3"] if vanishes else [])


def test_a_file_that_is_waited_for_vanishes_before_the_ledger_shows_it() -> None:
    """And is told once, until the ledger had its time to follow."""
    settler = a_settler()
    look(settler, a_scan(a_file()), 0)
    gone = look(settler, a_scan(), 1)
    assert (gone.vanished, gone.unsettled) == ([b"a.mp3"], 0)
    assert look(settler, a_scan(), 2, a_row(a_file(), "seen")).vanished == []
    assert look(settler, a_scan(), 1 + REPEAT_S, a_row(a_file(), "seen")).vanished == [b"a.mp3"]


def test_what_lies_in_a_directory_that_cannot_be_entered_has_not_vanished() -> None:
    """The rest of the inbox can still vanish."""
    known = [a_row(a_file(path), "ready") for path in (b"locked/a.mp3", b"locked.mp3")]
    report = look(a_settler(), a_scan(hidden=(b"locked",)), 0, *known)
    assert report.vanished == [b"locked.mp3"]


def test_nothing_vanishes_from_another_device_unless_a_known_file_vouches_for_it() -> None:
    """Another filesystem where the inbox was is no proof; a file of the old device that is still there is."""
    known = [a_row(a_file(), "ready"), a_row(a_file(b"b.mp3"), "done")]
    assert look(a_settler(), a_scan(a_file(b"c.mp3", dev=8), dev=8), 0, *known).vanished == []
    assert look(a_settler(), a_scan(a_file(b"b.mp3", dev=8), dev=8), 0, *known).vanished == [b"a.mp3"]


def test_a_bare_mount_point_is_told_from_an_empty_inbox() -> None:
    """Empty and on another device than what is still needed, or than what was there a moment ago."""
    needed, done = a_row(a_file(), "ready"), a_row(a_file(), "done")
    bare = a_scan(dev=8, empty=True)
    assert a_settler().looks_unmounted(bare.result, KnownPaths([needed]))
    assert not a_settler().looks_unmounted(bare.result, KnownPaths([done]))
    assert not a_settler().looks_unmounted(a_scan(empty=True).result, KnownPaths([needed]))
    assert not a_settler().looks_unmounted(a_scan(a_file(b"c.mp3", dev=8), dev=8).result, KnownPaths([needed]))
    settler = a_settler()
    look(settler, a_scan(a_file()), 0, done)
    assert settler.looks_unmounted(bare.result, KnownPaths([done]))


def test_a_skip_marker_takes_back_what_was_only_seen() -> None:
    """What is ready stays, though it is not looked at any more; what is waited for is forgotten."""
    settler, scan = a_settler(), a_scan()
    look(settler, a_scan(a_file(b"d/new.mp3", inode=4)), 0)
    scan.result.marked.add(b"d")
    rows = [a_row(a_file(b"d/seen.mp3"), "seen"), a_row(a_file(b"d/ready.mp3"), "ready"), a_row(a_file(b"dd.mp3"), "ready")]
    assert look(settler, scan, 1, *rows).vanished == [b"d/new.mp3", b"d/seen.mp3", b"dd.mp3"]


def test_a_directory_that_was_not_listed_proves_nothing() -> None:
    """Its files are neither gone nor forgotten; those of a directory that was listed are gone."""
    settler, scan = a_settler(), a_scan()
    look(settler, a_scan(a_file(b"old/new.mp3", inode=4)), 0)
    scan.result.unlisted.add(b"old")
    rows = [a_row(a_file(b"old/a.mp3"), "ready"), a_row(a_file(b"b.mp3"), "ready")]
    report = look(settler, scan, 1, *rows, everything=False)
    assert (report.vanished, report.unsettled) == ([b"b.mp3"], 1)
    assert look(settler, a_scan(a_file(b"old/new.mp3", inode=4)), 10).settled == [a_file(b"old/new.mp3", inode=4)]


# --- renamed ---


@pytest.mark.parametrize("state", ["seen", "ready", "running"])
def test_a_file_under_another_name_is_renamed(state: str) -> None:
    """Its job goes on under the new name, told once; nothing has vanished, and it settles as any other (its change time is new)."""
    settler, row, moved = a_settler(), a_row(a_file(), state), a_file(b"d/b.mp3", ctime_ns=9)
    report = look(settler, a_scan(moved), 0, row)
    assert report.renamed == [Renamed(before=b"a.mp3", sighting=moved)]
    assert (report.seen, report.vanished) == ([], [])
    report = look(settler, a_scan(moved), 1, a_row(moved, state))
    assert (report.renamed, report.seen, report.vanished) == ([], [], [])


def test_what_only_resembles_a_rename_is_a_new_file() -> None:
    """The old name is still there (a hard link), the scan is not complete, the job is over, another time, size or device."""
    row, moved = a_row(a_file(), "ready"), a_file(b"b.mp3")
    cases = [
        (a_scan(a_file(), moved), row),
        (a_scan(moved, complete=False), row),
        (a_scan(moved, hidden=(b"a.mp3",)), row),
        (a_scan(moved), a_row(a_file(), "done")),
        (a_scan(moved), a_row(a_file(size=1), "ready")),
        (a_scan(moved), a_row(a_file(mtime_ns=5), "ready")),
        (a_scan(a_file(b"b.mp3", dev=8), dev=8), row),
    ]
    for scan, other in cases:
        report = look(a_settler(), scan, 0, other)
        assert (report.renamed, [file.path for file in report.seen]) == ([], [b"b.mp3"])


def test_one_job_is_renamed_once() -> None:
    """Two new names of one inode: one of them is the old file, the other is new work."""
    report = look(a_settler(), a_scan(a_file(b"b.mp3"), a_file(b"c.mp3")), 0, a_row(a_file(), "ready"))
    assert ([one.sighting.path for one in report.renamed], [file.path for file in report.seen]) == ([b"b.mp3"], [b"c.mp3"])


# --- doubted ---


@pytest.mark.parametrize("state", ["transcribed", "done", "failed", "cancelled"])
@pytest.mark.parametrize("touched", [a_file(ctime_ns=9), a_file(inode=9)])
def test_a_finished_file_that_was_touched_is_doubted_once(state: str, touched: Sighting) -> None:
    """Size and time are the same, so only its content can tell. The ledger's answer ends the doubt; another touch begins a new one."""
    settler = a_settler()
    assert look(settler, a_scan(touched), 0, a_row(a_file(), state)).doubted == [touched]
    assert look(settler, a_scan(touched), 1, a_row(a_file(), state)).doubted == []
    again = structs.replace(touched, ctime_ns=10)
    assert look(settler, a_scan(again), 2, a_row(a_file(), state)).doubted == [again]
    assert look(settler, a_scan(again), 3, a_row(again, state)).doubted == []
    assert look(settler, a_scan(touched), 4, a_row(again, state)).doubted == [touched]


def test_a_remount_and_a_filesystem_without_lasting_inodes_raise_no_doubt() -> None:
    """Another device explains everything; some network filesystems number their files anew whenever they like."""
    assert look(a_settler(), a_scan(a_file(inode=9, ctime_ns=9, dev=8), dev=8), 0, a_row(a_file(), "done")).doubted == []
    settler = a_settler()
    settler.steady_inodes = False
    assert look(settler, a_scan(a_file(inode=9)), 0, a_row(a_file(), "done")).doubted == []
    assert look(settler, a_scan(a_file(ctime_ns=9)), 1, a_row(a_file(), "done")).doubted != []
    look(settler, a_scan(a_file(b"b.mp3")), 2)
    assert look(settler, a_scan(a_file(b"b.mp3", inode=7)), 12).settled == [a_file(b"b.mp3")]


# --- very many ---


def test_files_beyond_those_that_are_waited_for_have_their_turn_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """All are told as seen at once; each settles after a quiet period of its own, and all count as unsettled until then."""
    monkeypatch.setattr(settle, "WAITS_MAX", 2)
    settler, files = a_settler(), [a_file(b"%d.mp3" % number, inode=number) for number in range(3)]
    seen = [a_row(file, "seen") for file in files]
    report = look(settler, a_scan(*files), 0)
    assert (report.seen, report.unsettled, settler.has_room) == (files, 3, False)
    first = look(settler, a_scan(*files), 10, *seen)
    assert (len(first.settled), first.unsettled) == (2, 1)
    rows = [a_row(file, "ready" if file in first.settled else "seen") for file in files]
    look(settler, a_scan(), 11, *rows, everything=False)
    assert settler.has_room
    assert settler.next_look() == 11
    assert look(settler, a_scan(*files), 12, *rows).settled == []
    last = look(settler, a_scan(*files), 22, *rows)
    assert {file.path for file in first.settled + last.settled} == {file.path for file in files}
    assert last.unsettled == 0


def test_known_paths_follow_the_ledger() -> None:
    """Rows change in place, new ones join (and are not missed by a walk that began without them), forgotten ones leave."""
    table = KnownPaths(a_row(a_file(b"%d.mp3" % number, inode=number), "ready") for number in range(100))
    table.begin()
    table.update([a_row(a_file(b"5.mp3"), "done"), a_row(a_file(b"new.mp3"), "ready")])
    assert len(table) == 101
    five, new, none = table.lookup([b"5.mp3", b"new.mp3", b"none.mp3"])
    assert (five and five.state, new and new.size, none) == ("done", 100, None)
    table.forget([b"7.mp3", b"none.mp3"])
    missed = table.absent({DEV}, set(), lambda: ())
    assert {path for path, _ in missed} == {b"%d.mp3" % number for number in range(100)} - {b"5.mp3", b"7.mp3"}
    assert table.absent({8}, set(), lambda: ()) == []
    assert table.absent({DEV}, {b""}, lambda: ()) == []


def test_paths_that_are_not_at_hand_are_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only so many are kept."""
    monkeypatch.setattr(known, "PATHS_MAX", 1)
    rows = [a_row(a_file(path), "ready") for path in (b"a.mp3", b"b.mp3", b"c.mp3")]
    table = KnownPaths(rows)
    table.begin()
    assert {path for path, _ in table.absent({DEV}, set(), lambda: rows)} == {b"a.mp3", b"b.mp3", b"c.mp3"}


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
    writing = False
    settler, now = a_settler(lambda _: writing), 0.0
    unchanged_since: dict[bytes, tuple[Sighting, float]] = {}
    for pause_s, took_s, files, complete, written in history:
        now, writing = now + pause_s, written
        scan = a_scan(*(structs.replace(a_file(path), **content) for path, content in files.items()), complete=complete)
        report = look(settler, scan, now, took_s=took_s)
        for sighting in report.settled:
            before, since = unchanged_since[sighting.path]
            assert before == sighting
            assert now >= since + QUIET_S
            assert not written
        assert not report.vanished or complete
        assert not set(report.vanished) & files.keys()
        assert not {file.path for file in report.seen} & {file.path for file in report.settled}
        for sighting in scan.files:
            if unchanged_since.get(sighting.path, (None,))[0] != sighting:
                unchanged_since[sighting.path] = (sighting, now + took_s)
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


@pytest.mark.parametrize(
    ("pattern", "matching", "others"),
    [
        ("old/*", [b"old/a.mp3", b"OLD/b"], [b"old/x/a.mp3", b"old", b"very/old/a.mp3", b"older/a"]),
        ("old/**", [b"old/a.mp3", b"old/x/a.mp3"], [b"very/old/a.mp3", b"old"]),
        ("**/raw", [b"raw", b"a/raw", b"a/b/raw"], [b"draw", b"raw/a"]),
        ("/a/?.mp3", [b"a/b.mp3"], [b"a/bb.mp3", b"b/a/b.mp3", b"a//.mp3"]),
        ("a/[!x].[mw]*", [b"a/b.wav", b"a/b.mp3"], [b"a/x.mp3", b"a/b.ogg", b"a//.mp3"]),
        ("a/**/z", [b"a/z", b"a/b/z", b"a/b/c/z"], [b"a/bz", b"az"]),
        ("Entw\u00fcrfe/[a", ["Entwu\u0308rfe/[A".encode()], [b"a"]),
        ("a/b\n", [b"a/B\n"], [b"a/b"]),
    ],
)
def test_ignore_patterns_with_a_slash_are_about_whole_paths(pattern: str, matching: list[bytes], others: list[bytes]) -> None:
    """One star stays within a directory, two do not; everything else is as in patterns of names."""
    names = Names([], [pattern])
    assert [path for path in matching + others if names.ignored_path(path)] == matching
    assert not names.ignored(b"a")


@given(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_every_name_has_an_answer(name: bytes) -> None:
    """Names are bytes; none of them may stop the watcher. A name that is not finished is never a recording under its final suffix."""
    names = Names(["*.mp3"], ["x*"])
    names.is_recording(name)
    assert names.ignored(name + b".part")
    assert names.ignored(b"." + name)
