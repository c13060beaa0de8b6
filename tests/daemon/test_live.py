"""A daemon that runs on while files come, change and go, and while its own processes are killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from installation import Daemon, Installation, assert_ledger_and_disk_agree
from recordings import SENTENCES, Studio, nearest, samples_of, write_wav

from whisperd.ledger.queries import Queries, Row

NewPlace = Callable[[str], Installation]

ENGINE, WATCHER, OUTBOX, PROBE = "whisperd.engine", "whisperd.watcher", "whisperd.outbox", "whisperd.dispatcher.probe"
STOP_S = 20.0  # the sum of all graces at a stop is below that
AT_ONCE_S = 25.0  # of the patience of the daemon with a child that does not answer, which is a minute or two
LONG = SENTENCES[:13]
STEP_BY_STEP = {"batch": 1}  # a window at a time; an engine has slots for twice the windows of a batch: two files
SAME_EVERY_TIME = {"window_s": 5.0, "temperatures": [0.0]}  # many windows; the temperature ladder samples, and samples differ


@pytest.fixture(scope="module")
def long_talk(studio: Studio) -> Path:
    """Most of a minute of speech: about a dozen windows of at most five seconds."""
    return studio.long(LONG)


@pytest.fixture(scope="module")
def calm(long_talk: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bytes, bytes]:
    """What an undisturbed run makes of the long talk."""
    place = Installation(tmp_path_factory.mktemp("calm") / "home")
    place.write_config(transcription=SAME_EVERY_TIME)
    place.drop(long_talk, "long.wav")
    assert place.run_once().code == 0
    assert len(place.transcript(b"long")["segments"]) >= 10
    return place.published()


@pytest.fixture
def long_place(place: Installation) -> Installation:
    """Smaller batches than an undisturbed run has: the text does not depend on them."""
    place.write_config(engine={"batch": 2}, transcription=SAME_EVERY_TIME)
    return place


def windows_kept(path: bytes, more_than: int) -> Callable[[Queries], int]:
    """The file is being worked on, and more than so many of its windows are kept; then how many."""

    def condition(ledger: Queries) -> int:
        for row in ledger.running():
            if row["path"] == path and (kept := len(ledger.windows(row["id"]))) > more_than:
                return kept
        return 0

    return condition


def settled(*paths: bytes) -> Callable[[Queries], bool]:
    """Files are known and wait, or are in an engine's hands."""

    def condition(ledger: Queries) -> bool:
        return {row["path"] for row in ledger.jobs() if row["state"] in ("ready", "running")} >= set(paths)

    return condition


def waits(path: bytes) -> Callable[[Queries], bool]:
    """The file is settled and no engine has it."""
    return lambda ledger: path in {row["path"] for row in ledger.jobs(state="ready")}


def said_in(place: Installation, base: bytes) -> str:
    """Which of the sentences a transcript holds."""
    return nearest(place.transcript(base)["text"], SENTENCES)


def replace(place: Installation, source: Path, name: str) -> None:
    """Put another file in the place of one, at once."""
    aside = place.drop(source, name + ".part")
    os.rename(place.inbox / os.fsdecode(aside), place.inbox / name)
    place.dropped[os.fsencode(name)] = place.dropped.pop(aside)


def verbs(place: Installation, row: Row) -> list[str]:
    with place.ledger() as ledger:
        return [event["verb"] for event in ledger.events(row["id"])]


# --- files come, change and go -------------------------------------------------------------------------------------------------


def test_files_are_taken_as_they_come_and_taken_anew_when_they_change(place: Installation, studio: Studio) -> None:
    """A file dropped while the daemon runs is transcribed; one moved over it is a new version, whose transcripts replace the old
    ones under the same names; the same content touched again is no new work."""
    with place.daemon() as daemon:
        place.drop(studio.say(SENTENCES[0]), "talk.wav")
        first = daemon.wait_ended("talk.wav")
        assert said_in(place, b"talk") == SENTENCES[0]
        names = set(place.published())

        replace(place, studio.say(SENTENCES[1]), "talk.wav")
        daemon.wait_ended("talk.wav", after=first["id"])
        assert said_in(place, b"talk") == SENTENCES[1]
        assert set(place.published()) == names
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_a_file_deleted_while_it_waits_is_gone_and_nothing_else_is_hurt(place: Installation, studio: Studio, long_talk: Path) -> None:
    """The engine has its hands full; of the files that wait one is deleted: that job is gone, without an attempt, a transcript or an
    error file."""
    place.write_config(engine=STEP_BY_STEP)
    with place.daemon() as daemon:
        place.drop(long_talk, "long.wav")
        daemon.wait_until(windows_kept(b"long.wav", 0), "the engine is busy")
        engine = daemon.child(ENGINE)
        os.kill(engine, signal.SIGSTOP)
        place.drop(studio.say(SENTENCES[2]), "kept.wav")
        daemon.wait_until(settled(b"kept.wav"), "another file")
        place.drop(studio.say(SENTENCES[2]), "deleted.wav")
        daemon.wait_until(waits(b"deleted.wav"), "the third waits")
        os.unlink(place.inbox / "deleted.wav")
        del place.dropped[b"deleted.wav"]
        gone = daemon.wait_ended("deleted.wav", "gone")
        os.kill(engine, signal.SIGCONT)
        daemon.wait_ended("kept.wav")
        daemon.wait_ended("long.wav")
        assert daemon.stop() == 0
    assert gone["attempts"] == 0
    assert not [path for path in place.published() if path.startswith(b"deleted")]
    assert_ledger_and_disk_agree(place)


@pytest.mark.parametrize("how", ["moved over", "written over"])
def test_a_file_changed_while_it_is_read(how: str, place: Installation, studio: Studio, long_talk: Path) -> None:
    """What is published in the end is the transcript of the new content alone, whichever way it came over the old."""
    place.write_config(engine=STEP_BY_STEP, transcription=SAME_EVERY_TIME)
    with place.daemon() as daemon:
        place.drop(long_talk, "talk.wav")
        daemon.wait_until(windows_kept(b"talk.wav", 0), "the first version is being read")
        engine = daemon.child(ENGINE)
        os.kill(engine, signal.SIGSTOP)
        new = studio.say(SENTENCES[3])
        if how == "moved over":
            replace(place, new, "talk.wav")
        else:
            (place.inbox / "talk.wav").write_bytes(new.read_bytes())
            place.dropped[b"talk.wav"] = place.dropped[b"talk.wav"]._replace(
                mtime_ns=(place.inbox / "talk.wav").stat().st_mtime_ns, sha256=_sha256(new)
            )
        os.kill(engine, signal.SIGCONT)
        daemon.wait_until(
            lambda ledger: [row for row in ledger.jobs(state="done") if row["size"] == new.stat().st_size], "the new content is transcribed"
        )
        assert daemon.stop() == 0
    assert said_in(place, b"talk") == SENTENCES[3]
    assert len(place.transcript(b"talk")["segments"]) < 5
    assert_ledger_and_disk_agree(place)


def _sha256(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_of_the_user_is_never_overwritten(place: Installation, studio: Studio) -> None:
    """Where the user has a file of that name the transcript takes another; a transcript that the user has edited stays as it is
    when a new version of the recording comes."""
    place.outbox.mkdir()
    own = place.outbox / "talk.txt"
    own.write_text("my own notes\n")
    with place.daemon() as daemon:
        place.drop(studio.say(SENTENCES[4]), "talk.wav")
        first = daemon.wait_ended("talk.wav")
        assert said_in(place, b"talk.wav") == SENTENCES[4]
        edited = place.outbox / "talk.wav.srt"
        edited.write_text("corrected by hand\n")
        replace(place, studio.say(SENTENCES[5]), "talk.wav")
        daemon.wait_ended("talk.wav", after=first["id"])
        assert daemon.stop() == 0
    assert own.read_text() == "my own notes\n"
    assert edited.read_text() == "corrected by hand\n"
    new = [base.removesuffix(b".json") for base in place.published() if base.endswith(b".json")]
    assert SENTENCES[5] in {said_in(place, base) for base in new}


# --- the service manager -------------------------------------------------------------------------------------------------------


def test_reload_adds_an_inbox_and_refuses_what_is_bad(place: Installation, studio: Studio) -> None:
    """SIGHUP with a bad file leaves everything as it was and says so; with a good one the new inbox is watched, while the old goes on."""
    second = place.home / "second"
    second.mkdir()
    with place.daemon() as daemon:
        good = place.config.read_text()
        place.config.write_text(good + "\n[engine\n")
        daemon.signal(signal.SIGHUP)
        daemon.wait_notified("READY=1")
        assert "the settings stay as they were" in daemon.log()

        place.config.write_text(good + f'\n[[inbox]]\npath = "{second}/in"\n')
        (second / "in").mkdir()
        (second / "in" / "new.wav").write_bytes(studio.say(SENTENCES[6]).read_bytes())
        daemon.signal(signal.SIGHUP)
        daemon.wait_notified("READY=1")
        place.drop(studio.say(SENTENCES[7]), "old.wav")
        daemon.wait_ended("new.wav")
        daemon.wait_ended("old.wav")
        assert daemon.stop() == 0
    assert (second / "outbox" / "new.txt").is_file()
    assert set(place.published()) == {b"old." + name.encode() for name in ("txt", "srt", "vtt", "tsv", "json")}


def test_stop_in_the_middle_and_go_on_later(long_place: Installation, long_talk: Path, calm: dict[bytes, bytes]) -> None:
    """SIGTERM while a long file is worked on: the daemon ends soon, with status 0 and no child left; the next one goes on where
    the windows end, no attempt is counted for the interruption, and the transcript is that of an undisturbed run, byte for byte."""
    with long_place.daemon() as daemon:
        long_place.drop(long_talk, "long.wav")
        kept = daemon.wait_until(windows_kept(b"long.wav", 2), "some windows are kept")
        children = [pid for module in (ENGINE, WATCHER, OUTBOX, PROBE) for pid in daemon.children(module)]
        assert len(children) == 4
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < STOP_S
        assert not [pid for pid in children if os.path.exists(f"/proc/{pid}")]
        assert "STOPPING=1" in daemon.log() or "stopping" in daemon.log()
    job = long_place.job(b"long.wav")
    assert (job["state"], job["attempts"]) == ("ready", 0)
    with long_place.ledger() as ledger:
        assert len(ledger.windows(job["id"])) >= kept
    assert long_place.run_once().code == 0
    assert long_place.job(b"long.wav")["attempts"] == 1
    assert long_place.published() == calm
    assert_ledger_and_disk_agree(long_place)


def test_kill_the_daemon_and_go_on_later(long_place: Installation, long_talk: Path, calm: dict[bytes, bytes]) -> None:
    """SIGKILL to the daemon: its children die with it; the next one goes on, and the transcript is that of an undisturbed run."""
    with long_place.daemon() as daemon:
        long_place.drop(long_talk, "long.wav")
        daemon.wait_until(windows_kept(b"long.wav", 2), "some windows are kept")
        children = [os.pidfd_open(pid) for module in (ENGINE, WATCHER, OUTBOX, PROBE) for pid in daemon.children(module)]
        daemon.signal(signal.SIGKILL)
        daemon.process.wait()
        for pidfd in children:
            _await_end(pidfd)
    assert long_place.run_once().code == 0
    assert long_place.job(b"long.wav")["attempts"] == 1
    assert long_place.published() == calm
    assert_ledger_and_disk_agree(long_place)


def test_another_precision_begins_anew(
    long_place: Installation, another_place: NewPlace, long_talk: Path, calm: dict[bytes, bytes]
) -> None:
    """Stopped in the middle, and the precision of the model changed: windows of the old one are not mixed with the new one's. The
    transcript is that of an undisturbed run with the new precision."""
    other = another_place("undisturbed")
    other.write_config(engine={"compute_type": "float32"}, transcription=SAME_EVERY_TIME)
    other.drop(long_talk, "long.wav")
    assert other.run_once().code == 0
    with long_place.daemon() as daemon:
        long_place.drop(long_talk, "long.wav")
        daemon.wait_until(windows_kept(b"long.wav", 2), "some windows are kept")
        assert daemon.stop() == 0
    long_place.write_config(engine={"compute_type": "float32"})
    done = long_place.run_once()
    assert done.code == 0
    assert "begins anew" in done.err
    assert long_place.published() == other.published() != calm
    assert_ledger_and_disk_agree(long_place)


def _await_end(pidfd: int) -> None:
    import select

    readable, _, _ = select.select([pidfd], [], [], 30)
    os.close(pidfd)
    assert readable, "a child outlived the daemon"


# --- children die --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV], ids=lambda number: number.name)
def test_an_engine_killed_in_the_middle(
    number: signal.Signals, long_place: Installation, long_talk: Path, calm: dict[bytes, bytes]
) -> None:
    """The job goes on from its windows on another engine, and its transcript is that of an undisturbed run. Somebody's SIGKILL gives
    the attempt back; a crash counts."""
    with long_place.daemon() as daemon:
        long_place.drop(long_talk, "long.wav")
        daemon.wait_until(windows_kept(b"long.wav", 2), "some windows are kept")
        os.kill(daemon.child(ENGINE), number)
        row = daemon.wait_ended("long.wav")
        assert daemon.stop() == 0
    attempts, verb = {signal.SIGKILL: (1, "interrupt"), signal.SIGSEGV: (2, "release")}[number]
    assert row["attempts"] == attempts
    assert verbs(long_place, row) == ["see", "settle", "claim", verb, "claim", "finish", "publish"]
    assert long_place.published() == calm
    assert_ledger_and_disk_agree(long_place)


def test_a_file_that_crashes_every_engine_is_set_aside(long_place: Installation, studio: Studio, long_talk: Path, tmp_path: Path) -> None:
    """Three engines die of SIGSEGV over one file: it is failed after exactly three attempts, its error file names the signal and
    the place in the recording; the files that were in hand with it, or waited behind it, are transcribed."""
    with long_place.daemon() as daemon:
        long_place.drop(write_wav(tmp_path / "long.wav", samples_of(long_talk) * 20), "poison.wav")  # not done before its third death
        kept = 0
        for attempt in (1, 2, 3):
            kept = daemon.wait_until(windows_kept(b"poison.wav", kept), f"attempt {attempt} has made progress")
            engine = daemon.child(ENGINE)
            if attempt == 1:
                os.kill(engine, signal.SIGSTOP)
                for number in (1, 2):
                    long_place.drop(studio.say(SENTENCES[number]), f"{number}.wav")
                daemon.wait_until(settled(b"1.wav", b"2.wav"), "there are others")
            os.kill(engine, signal.SIGSEGV)
            os.kill(engine, signal.SIGCONT)
        row = daemon.wait_ended("poison.wav", "failed")
        for number in (1, 2):
            assert daemon.wait_ended(f"{number}.wav")["attempts"] <= 2
            assert said_in(long_place, b"%d" % number) == SENTENCES[number]
        assert daemon.stop() == 0
    assert (row["attempts"], row["failure_code"], row["failure_kind"]) == (3, "worker_died", "transient")
    assert verbs(long_place, row).count("claim") == 3
    text = long_place.error_file(b"poison.wav")
    assert "killed by SIGSEGV" in text and " s" in text and "3 attempts were made" in text
    assert_ledger_and_disk_agree(long_place)


@pytest.mark.parametrize("module", [WATCHER, OUTBOX, PROBE])
def test_a_helper_that_dies_is_replaced(module: str, place: Installation, studio: Studio) -> None:
    """Watcher, outbox writer or probe killed: another takes its place, the death is in the log, and work goes on."""
    with place.daemon() as daemon:
        place.drop(studio.say(SENTENCES[0]), "before.wav")
        daemon.wait_ended("before.wav")
        before = daemon.child(module)
        os.kill(before, signal.SIGKILL)
        daemon.wait_until(lambda _: daemon.children(module) not in ([], [before]), "another has taken its place")
        place.drop(studio.say(SENTENCES[1]), "after.wav")
        daemon.wait_ended("after.wav")
        assert "killed by SIGKILL" in daemon.log()
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_an_outbox_writer_that_dies_with_work_in_its_hands(place: Installation, studio: Studio) -> None:
    """Three transcripts are with the writer when it is killed: the next writer gets them at once, and nothing is lost or twice."""
    with place.daemon() as daemon:
        writer = daemon.child(OUTBOX)
        os.kill(writer, signal.SIGSTOP)
        for number in range(3):
            place.drop(studio.say(SENTENCES[number]), f"{number}.wav")
        daemon.wait_until(lambda ledger: ledger.counts()["transcribed"] == 3, "three wait to be published")
        os.kill(writer, signal.SIGKILL)
        for number in range(3):
            daemon.wait_ended(f"{number}.wav", timeout_s=AT_ONCE_S)
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_a_watcher_that_dies_with_a_request_in_its_hands(place: Installation, studio: Studio, long_talk: Path) -> None:
    """The watcher is asked for a file and killed before it answers: the next one is asked at once, and no attempt is counted."""
    place.write_config(engine=STEP_BY_STEP)
    with place.daemon() as daemon:
        place.drop(long_talk, "long.wav")
        daemon.wait_until(windows_kept(b"long.wav", 0), "the engine is busy")
        engine = daemon.child(ENGINE)
        os.kill(engine, signal.SIGSTOP)
        place.drop(studio.say(SENTENCES[1]), "beside.wav")
        daemon.wait_until(settled(b"beside.wav"), "its hands are full")
        place.drop(studio.say(SENTENCES[0]), "next.wav")
        daemon.wait_until(lambda ledger: [row for row in ledger.jobs(state="ready") if row["sha256"]], "another waits, its content read")
        watcher = daemon.child(WATCHER)
        os.kill(watcher, signal.SIGSTOP)
        os.kill(engine, signal.SIGCONT)
        daemon.wait_until(lambda ledger: [row for row in ledger.running() if row["path"] == b"next.wav"], "it is claimed")
        os.kill(watcher, signal.SIGKILL)
        row = daemon.wait_ended("next.wav", timeout_s=AT_ONCE_S)
        assert row["attempts"] == 1
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_everything_dies_at_once(long_place: Installation, studio: Studio, long_talk: Path) -> None:
    """All children killed together in the middle of the work: the daemon lives, and finishes it."""
    place = long_place
    with place.daemon() as daemon:
        place.drop(long_talk, "long.wav")
        place.drop(studio.say(SENTENCES[0]), "short.wav")
        daemon.wait_until(windows_kept(b"long.wav", 0), "the engine is busy")
        _kill_all(daemon)
        daemon.wait_ended("long.wav")
        daemon.wait_ended("short.wav")
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def _kill_all(daemon: Daemon) -> None:
    for module in (ENGINE, WATCHER, OUTBOX, PROBE):
        for pid in daemon.children(module):
            os.kill(pid, signal.SIGKILL)
