"""The watcher as a process: real wire, real inotify, real ledger. The test plays the daemon; it waits for frames, not for time."""

from __future__ import annotations

import errno
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from whisperd.child import Child
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions, Sighting
from whisperd.watcher import folders, profiles
from whisperd.watcher.folders import Folders
from whisperd.watcher.hints import Hints
from whisperd.watcher.names import Names
from whisperd.watcher.scan import BATCH, InboxAbsent, Rules, ScanResult, Walk, scan
from whisperd.watcher.source import Entry, entry_of
from whisperd.wire import (
    InboxDown,
    OpenSource,
    ProfileFile,
    Profiles,
    Renamed,
    Scanned,
    ScanNow,
    Sightings,
    SourceLost,
    SourceOpened,
    WatcherOut,
    WatcherReady,
    WatchInbox,
)

QUIET_S = 0.15
PATIENCE_S = 20.0


class Daemon:
    """As much of the daemon as a watcher needs: it keeps what it is told in a ledger."""

    def __init__(self, home: Path) -> None:
        self.inbox = home / "inbox"
        self.inbox.mkdir()
        self.outbox = self.inbox / "outbox"
        self.outbox.mkdir()
        self.state = home / "state"
        self.state.mkdir()
        self.ledger = Ledger(str(self.state), epoch="test")
        self.number = self.ledger.register_inbox(os.fsencode(self.inbox), os.fsencode(self.outbox), 1.0)
        self.frames: list[WatcherOut] = []
        self.descriptors: list[int] = []
        self.child: Child[WatcherOut] | None = None
        self.forgetful = False  # told everything, and keeps nothing

    def watch(self, *, events: str = "auto", quiet_s: float = QUIET_S, rescan_s: float = 60.0, poll_s: float = 0.2) -> None:
        self.frames = []
        self.child = Child(name="watcher", module="whisperd.watcher", receives=WatcherOut, now=time.monotonic())
        self.child.send(
            WatchInbox(
                inbox=self.number,
                path=os.fsencode(self.inbox),
                ledger=str(self.state),
                exclude=(os.fsencode(self.outbox),),
                include=("*.mp3", "*.wav"),
                ignore=("draft*",),
                recursive=True,
                events=events,
                quiet_s=quiet_s,
                rescan_s=rescan_s,
                poll_s=poll_s,
            )
        )

    def stop(self) -> str:
        """Stop the watcher and say how it ended; a traceback or an error of its own fails the test."""
        if self.child is None:
            return ""
        child, self.child = self.child, None
        child.drain(time.monotonic())
        ending = child.gone(time.monotonic())
        assert not [line for line in child.last_lines if "Traceback" in line or line.startswith("ERROR")], list(child.last_lines)
        return ending

    def take_in(self, timeout_s: float) -> None:
        assert self.child is not None
        for frame in self.child.channel.wait(timeout_s):
            self.frames.append(frame.message)
            self.descriptors += frame.descriptors
            if isinstance(frame.message, Sightings) and not self.forgetful:
                with self.ledger.transaction():
                    self._store(frame.message)

    def _store(self, news: Sightings) -> None:
        self.ledger.see_all(self.number, news.seen, 1.0)
        for renamed in news.renamed:
            self.ledger.rename(self.number, renamed.before, renamed.sighting, 1.0)
        for sighting in news.settled:
            job = self.ledger.see(self.number, sighting, 1.0)
            if self.ledger.job(job)["state"] == "seen":
                self.ledger.settle(job, sighting, JobOptions(), 1.0)
        for path in news.vanished:
            live = self.ledger.live_job(self.number, path)
            if live is not None and live["state"] != "running":
                self.ledger.vanish(live["id"], 1.0)

    def finish(self, path: bytes) -> None:
        """Have the job of a ready file done: transcribed and published."""
        live = self.ledger.live_job(self.number, path)
        assert live is not None
        job = live["id"]
        self.ledger.claim(job, "anna", 2.0, lease_s=60)
        result = {"transcript": f"{job}.json", "language": "en", "duration_s": 1.0, "process_s": 1.0, "sha256": "ab", "quality": "good"}
        self.ledger.finish(job, "anna", 3.0, **result)
        self.ledger.publish(job, os.fsencode(self.outbox), [(path + b".txt", "txt", "ab")], 4.0)

    def states(self) -> dict[bytes, list[str]]:
        """Of all jobs of each path, oldest first."""
        found: dict[bytes, list[str]] = {}
        for row in sorted(self.ledger.jobs(), key=lambda row: row["id"]):
            found.setdefault(row["path"], []).append(row["state"])
        return found

    def says(self, words: str) -> None:
        """Wait until its log has these words."""
        assert self.child is not None
        said = self.child.read_stderr()
        while not any(words in line for line in said):
            assert select.select([self.child.stderr_fileno()], [], [], PATIENCE_S)[0], f"it says nothing of {words}, only {said}"
            said += self.child.read_stderr()

    def until(self, done: Callable[[], object]) -> None:
        """Take in frames until it is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not done():
            left = deadline - time.monotonic()
            assert left > 0, f"still not so; heard {self.frames}, it said {self.child and self.child.read_stderr()}"
            self.take_in(left)

    def scanned(self) -> Scanned:
        """Ask for a scan and wait until it is over."""
        assert self.child is not None
        before = self.count(Scanned)
        self.child.send(ScanNow())
        self.until(lambda: self.count(Scanned) > before)
        return [frame for frame in self.frames if isinstance(frame, Scanned)][-1]

    def count(self, kind: type) -> int:
        return sum(isinstance(frame, kind) for frame in self.frames)

    def profiles(self) -> list[ProfileFile]:
        return [file for frame in self.frames if isinstance(frame, Profiles) for file in frame.files]

    def renamed(self) -> list[Renamed]:
        return [item for frame in self.frames if isinstance(frame, Sightings) for item in frame.renamed]

    def told(self, what: str) -> list[Sighting]:
        return [item for frame in self.frames if isinstance(frame, Sightings) for item in getattr(frame, what)]

    def names(self, what: str) -> list[bytes]:
        return [sighting.path for sighting in self.told(what)]

    def vanished(self) -> list[bytes]:
        return [path for frame in self.frames if isinstance(frame, Sightings) for path in frame.vanished]

    def settled(self, *names: bytes) -> None:
        """Wait until exactly these have settled."""
        self.until(lambda: set(self.names("settled")) >= set(names))
        assert sorted(self.names("settled")) == sorted(names)

    def open(self, sighting: Sighting) -> SourceOpened | SourceLost:
        assert self.child is not None
        before = self.count(SourceOpened) + self.count(SourceLost)
        self.child.send(OpenSource(job=5, sighting=sighting))
        self.until(lambda: self.count(SourceOpened) + self.count(SourceLost) > before)
        return [frame for frame in self.frames if isinstance(frame, SourceOpened | SourceLost)][-1]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    try:
        daemon.stop()
    finally:
        for descriptor in daemon.descriptors:
            os.close(descriptor)
        daemon.ledger.close()


# --- settling ---


def test_a_dropped_file_is_seen_then_settled_and_told_once(daemon: Daemon) -> None:
    """By inotify alone: the next regular scan is a minute away. The figures that say "nothing waits" come after the news."""
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    assert daemon.frames[0] == WatcherReady(events="native")
    (daemon.inbox / "talk.mp3").write_bytes(b"sound")
    daemon.settled(b"talk.mp3")
    daemon.until(lambda: isinstance(daemon.frames[-1], Scanned))
    last = daemon.frames[-1]
    assert isinstance(last, Scanned)
    assert (last.files, last.unsettled, last.left_out) == (1, 0, 0)
    assert set(daemon.names("seen")) == {b"talk.mp3"}
    assert daemon.told("settled")[0].size == 5
    before = list(daemon.frames)
    assert daemon.scanned().files == 1
    assert [frame for frame in daemon.frames[len(before) :] if not isinstance(frame, Scanned)] == []


def test_a_file_that_keeps_growing_settles_when_it_stops(daemon: Daemon) -> None:
    """Each part begins the quiet period anew, also when the file is closed between the parts."""
    daemon.watch(quiet_s=0.6)
    path = daemon.inbox / "talk.mp3"
    for part in range(1, 5):
        with path.open("ab") as file:
            file.write(b"sound")
        daemon.until(lambda size=5 * part: size in [sighting.size for sighting in daemon.told("seen")])  # type: ignore[misc]
    daemon.settled(b"talk.mp3")
    assert daemon.told("settled")[0].size == 20


def test_a_file_held_open_for_writing_does_not_settle(daemon: Daemon) -> None:
    """However long it is quiet: a recorder may pause. It settles when its writer is gone."""
    daemon.watch()
    with (daemon.inbox / "talk.mp3").open("wb") as file:
        file.write(b"sound")
        file.flush()
        daemon.until(lambda: daemon.names("seen"))
        quiet_until = time.monotonic() + 3 * QUIET_S
        while time.monotonic() < quiet_until:
            assert daemon.scanned().unsettled == 1
        assert daemon.told("settled") == []
    daemon.settled(b"talk.mp3")


def test_a_name_that_says_not_yet_is_waited_for(daemon: Daemon) -> None:
    """A browser's download appears when it gets its final name."""
    (daemon.inbox / "talk.mp3.part").write_bytes(b"sound")
    daemon.watch()
    assert daemon.scanned().files == 0
    (daemon.inbox / "talk.mp3.part").rename(daemon.inbox / "talk.mp3")
    daemon.settled(b"talk.mp3")
    assert daemon.scanned().left_out == 0


# --- what counts ---


def test_nested_directories_and_a_populated_one_that_is_moved_in(daemon: Daemon, tmp_path: Path) -> None:
    """However deep, and though no event tells of what was in there before; what is added there later is heard, too."""
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    (daemon.inbox / "a/b/c").mkdir(parents=True)
    (daemon.inbox / "a/b/c/deep.mp3").write_bytes(b"1")
    (tmp_path / "album/one").mkdir(parents=True)
    (tmp_path / "album/one/first.wav").write_bytes(b"2")
    (tmp_path / "album").rename(daemon.inbox / "album")
    daemon.settled(b"a/b/c/deep.mp3", b"album/one/first.wav")
    (daemon.inbox / "album/one/second.wav").write_bytes(b"3")
    daemon.settled(b"a/b/c/deep.mp3", b"album/one/first.wav", b"album/one/second.wav")


def test_only_recordings_count(daemon: Daemon, tmp_path: Path) -> None:
    """No symbolic link (to a file or a directory), no pipe, no hidden directory, no outbox, no ignored name; other files are counted."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.mp3").write_bytes(b"1")
    (daemon.inbox / "link.mp3").symlink_to(outside / "secret.mp3")
    (daemon.inbox / "folder").symlink_to(outside)
    (daemon.inbox / ".stversions").mkdir()
    for name in (".stversions/old.mp3", "outbox/own.mp3", "draft.mp3", "notes.txt", "talk.mp3"):
        (daemon.inbox / name).write_bytes(b"1")
    os.mkfifo(daemon.inbox / "pipe.mp3")
    daemon.watch()
    daemon.settled(b"talk.mp3")
    last = daemon.scanned()
    assert (last.files, last.left_out) == (1, 1)


def test_names_are_bytes(daemon: Daemon) -> None:
    """Line breaks, invalid UTF-8, the longest name there is, a leading dash."""
    names = [b"two\nlines.mp3", b"not \xff utf-8 \xc3.mp3", b"x" * 251 + b".mp3", b"-rf.mp3", b" .mp3", "schön.MP3".encode()]
    root = os.fsencode(daemon.inbox)
    for name in names:
        Path(os.fsdecode(root + b"/" + name)).write_bytes(b"1")
    daemon.watch()
    daemon.settled(*names)
    assert isinstance(daemon.open(daemon.told("settled")[0]), SourceOpened)


def test_many_files_travel_in_frames_of_bounded_size(daemon: Daemon) -> None:
    """Each once."""
    files = BATCH + 500
    for number in range(files):
        (daemon.inbox / f"{number}.mp3").touch()
    daemon.watch()
    daemon.until(lambda: len(daemon.told("settled")) >= files)
    assert len(set(daemon.names("settled"))) == len(daemon.names("settled")) == len(daemon.names("seen")) == files
    told = [frame for frame in daemon.frames if isinstance(frame, Sightings)]
    assert max(len(frame.seen) for frame in told) == max(len(frame.settled) for frame in told) == BATCH


# --- against the ledger ---


def test_a_restart_forgets_nothing_and_repeats_nothing(daemon: Daemon) -> None:
    """What is beyond `seen` is not told again; what was seen and not settled settles without being news."""
    (daemon.inbox / "done.mp3").write_bytes(b"1")
    daemon.watch()
    daemon.settled(b"done.mp3")
    assert daemon.stop() == "ended normally"
    (daemon.inbox / "late.mp3").write_bytes(b"2")
    daemon.watch(quiet_s=60)
    daemon.until(lambda: daemon.names("seen"))
    assert daemon.stop() == "ended normally"
    daemon.watch()
    daemon.settled(b"late.mp3")
    assert daemon.names("seen") == []
    assert [row["state"] for row in daemon.ledger.jobs()] == ["ready", "ready"]


def test_replaced_and_deleted_files_are_told(daemon: Daemon) -> None:
    """New content under an old name is new work; a file that is deleted has vanished, once."""
    path = daemon.inbox / "talk.mp3"
    path.write_bytes(b"first")
    daemon.watch()
    daemon.settled(b"talk.mp3")
    (daemon.inbox / "new.tmp").write_bytes(b"second")
    (daemon.inbox / "new.tmp").rename(path)
    daemon.until(lambda: [sighting.size for sighting in daemon.told("settled")] == [5, 6])
    assert [row["state"] for row in daemon.ledger.jobs()] == ["gone", "ready"]
    path.unlink()
    daemon.until(daemon.vanished)
    assert daemon.scanned().files == 0
    assert daemon.vanished() == [b"talk.mp3"]
    assert [row["state"] for row in daemon.ledger.jobs()] == ["gone", "gone"]


def test_a_renamed_file_keeps_its_job(daemon: Daemon) -> None:
    """By its inode, size and time, whether it waits to settle or for its turn; a hard link is a file of its own."""
    (daemon.inbox / "ready.mp3").write_bytes(b"1")
    daemon.watch()
    daemon.settled(b"ready.mp3")
    (daemon.inbox / "album").mkdir()
    (daemon.inbox / "ready.mp3").rename(daemon.inbox / "album/one.mp3")
    daemon.until(daemon.renamed)
    assert [(item.before, item.sighting.path) for item in daemon.renamed()] == [(b"ready.mp3", b"album/one.mp3")]
    os.link(daemon.inbox / "album/one.mp3", daemon.inbox / "link.mp3")
    daemon.until(lambda: b"link.mp3" in daemon.names("settled"))
    assert daemon.scanned().unsettled == 0
    assert (len(daemon.renamed()), daemon.vanished()) == (1, [])
    assert sorted((row["path"], row["state"]) for row in daemon.ledger.jobs()) == [(b"album/one.mp3", "ready"), (b"link.mp3", "ready")]


def test_a_file_renamed_over_a_newer_one_is_the_one_that_counts(daemon: Daemon) -> None:
    """Its name has a job of its own, the newer of the two, which would be asked what is known of that name: it is new work, once."""
    (daemon.inbox / "old.mp3").write_bytes(b"1")
    daemon.watch()
    daemon.settled(b"old.mp3")
    (daemon.inbox / "new.mp3").write_bytes(b"second")
    daemon.settled(b"old.mp3", b"new.mp3")
    (daemon.inbox / "old.mp3").rename(daemon.inbox / "new.mp3")
    daemon.until(lambda: [sighting.size for sighting in daemon.told("settled")] == [1, 6, 1])
    assert daemon.scanned().unsettled == 0
    assert daemon.states() == {b"old.mp3": ["gone"], b"new.mp3": ["gone", "ready"]}
    daemon.finish(b"new.mp3")
    heard = len(daemon.frames)
    assert daemon.scanned().unsettled == daemon.scanned().unsettled == 0
    assert not [frame for frame in daemon.frames[heard:] if isinstance(frame, Sightings)], "what is done is told again"


def test_a_file_replaced_in_place_is_found_though_it_keeps_its_size_and_time(daemon: Daemon) -> None:
    """One that waits begins a new quiet period; one that was finished is doubted, once, until the ledger knows its new state."""
    first, second = daemon.inbox / "waits.mp3", daemon.inbox / "over.mp3"
    second.write_bytes(b"sound")
    daemon.watch()
    daemon.settled(b"over.mp3")
    daemon.ledger.cancel(next(daemon_jobs(daemon, b"over.mp3")), 1.0)
    with first.open("wb") as writer:
        writer.write(b"sound")
        writer.flush()
        daemon.until(lambda: b"waits.mp3" in daemon.names("seen"))
        for path in (first, second):
            times = path.stat()
            with path.open("r+b") as file:
                file.write(b"SOUND")
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        daemon.until(lambda: [file.ctime_ns for file in daemon.told("doubted")] == [second.stat().st_ctime_ns])
        daemon.until(lambda: first.stat().st_ctime_ns in [file.ctime_ns for file in daemon.told("seen")])
    daemon.until(lambda: b"waits.mp3" in daemon.names("settled"))
    assert daemon.told("settled")[-1].ctime_ns == first.stat().st_ctime_ns
    daemon.ledger.recognise(next(daemon_jobs(daemon, b"over.mp3")), daemon.told("doubted")[0], 2.0)
    daemon.scanned()
    assert daemon.scanned().unsettled == 0
    assert daemon.names("doubted") == [b"over.mp3"]
    os.link(second, daemon.inbox / "notes.txt")
    daemon.scanned()
    assert daemon.names("doubted") == [b"over.mp3", b"over.mp3"]


def daemon_jobs(daemon: Daemon, path: bytes) -> Iterator[int]:
    return (row["id"] for row in daemon.ledger.jobs() if row["path"] == path)


# --- profiles and markers ---


def test_profiles_are_told_when_they_change_and_ahead_of_what_settles(daemon: Daemon, tmp_path: Path) -> None:
    """Of any folder and beside any file; never a recording. A link is none, and what cannot be read says why."""
    (tmp_path / "outside.toml").write_text("model = 'x'")
    (daemon.inbox / "folder").mkdir()
    (daemon.inbox / ".whisperd.toml").write_text("language = 'de'")
    (daemon.inbox / "folder/.whisperd.toml").write_bytes(b"\xff")
    (daemon.inbox / "talk.mp3.whisperd.toml").write_bytes(b"#" * (profiles.BYTES_MAX + 1))
    (daemon.inbox / "link.mp3.whisperd.toml").symlink_to(tmp_path / "outside.toml")
    (daemon.inbox / "talk.mp3").write_bytes(b"1")
    daemon.watch()
    daemon.settled(b"talk.mp3")
    first = [frame for frame in daemon.frames if isinstance(frame, Profiles)]
    assert [frame.whole for frame in first] == [True]
    found = {file.path: file for file in daemon.profiles()}
    assert found.keys() == {b".whisperd.toml", b"folder/.whisperd.toml", b"talk.mp3.whisperd.toml"}
    assert found[b".whisperd.toml"] == ProfileFile(path=b".whisperd.toml", text="language = 'de'")
    assert "UTF-8" in found[b"folder/.whisperd.toml"].fault
    assert "64 KiB" in found[b"talk.mp3.whisperd.toml"].fault
    (tmp_path / "new.toml").write_text("language = 'fr'")
    (tmp_path / "new.toml").rename(daemon.inbox / "folder/.whisperd.toml")
    (daemon.inbox / ".whisperd.toml").unlink()
    changed = [ProfileFile(path=b".whisperd.toml"), ProfileFile(path=b"folder/.whisperd.toml", text="language = 'fr'")]
    daemon.until(lambda: len(daemon.profiles()) >= 5)
    assert sorted(daemon.profiles()[3:], key=lambda file: file.path) == changed
    (tmp_path / "new.toml").write_text("task = 'translate'")
    (tmp_path / "new.toml").rename(daemon.inbox / "folder/late.mp3.whisperd.toml")
    (daemon.inbox / "folder/late.mp3").write_bytes(b"1")
    daemon.until(lambda: b"folder/late.mp3" in daemon.names("settled"))
    told = [frame for frame in daemon.frames if isinstance(frame, Profiles) or (isinstance(frame, Sightings) and frame.settled)]
    assert isinstance(told[-1], Sightings), "the profile came ahead of the file that settled"
    assert daemon.profiles()[5:] == [ProfileFile(path=b"folder/late.mp3.whisperd.toml", text="task = 'translate'")]
    assert daemon.scanned().left_out == 0


def test_a_daemon_hears_that_there_are_no_profiles(daemon: Daemon) -> None:
    """It may remember some of an earlier life."""
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    assert [frame for frame in daemon.frames if isinstance(frame, Profiles)] == [Profiles(files=(), whole=True)]


def test_a_folder_with_a_skip_marker_is_left_alone(daemon: Daemon) -> None:
    """With all below it. When the marker comes later, what was only seen is forgotten and what is ready stays; without it all is back."""
    (daemon.inbox / "away/deep").mkdir(parents=True)
    (daemon.inbox / "away/deep/ready.mp3").write_bytes(b"1")
    daemon.watch(quiet_s=0.5)
    daemon.settled(b"away/deep/ready.mp3")
    with (daemon.inbox / "away/seen.mp3").open("wb"):
        daemon.until(lambda: b"away/seen.mp3" in daemon.names("seen"))
        (daemon.inbox / "away/.whisperd-skip").touch()
        daemon.until(daemon.vanished)
        (daemon.inbox / "away/deep/more.mp3").write_bytes(b"2")
        assert (daemon.scanned().files, daemon.scanned().unsettled) == (0, 0)
    assert daemon.vanished() == [b"away/seen.mp3"]
    assert {row["path"]: row["state"] for row in daemon.ledger.jobs()} == {b"away/deep/ready.mp3": "ready", b"away/seen.mp3": "gone"}
    (daemon.inbox / "away/.whisperd-skip").unlink()
    daemon.settled(b"away/deep/ready.mp3", b"away/deep/more.mp3", b"away/seen.mp3")


# --- absent and exchanged ---


def test_an_inbox_that_is_away_is_down_and_comes_back_by_itself(daemon: Daemon, tmp_path: Path) -> None:
    """Its files have not vanished; it is told once, with what to do; hints work again afterwards."""
    (daemon.inbox / "talk.mp3").write_bytes(b"1")
    daemon.watch()
    daemon.settled(b"talk.mp3")
    daemon.inbox.rename(tmp_path / "away")
    daemon.until(lambda: daemon.count(InboxDown))
    lost = daemon.open(daemon.told("settled")[0])
    assert isinstance(lost, SourceLost)
    assert lost.reason == "down"
    scans = daemon.count(Scanned)
    (tmp_path / "away").rename(daemon.inbox)
    daemon.until(lambda: daemon.count(Scanned) > scans)
    assert daemon.vanished() == []
    downs = [frame for frame in daemon.frames if isinstance(frame, InboxDown)]
    assert len(downs) == 1
    assert "No such file" in downs[0].what
    assert downs[0].hint
    (daemon.inbox / "more.mp3").write_bytes(b"2")
    daemon.settled(b"talk.mp3", b"more.mp3")


def test_a_mount_that_empties_and_returns_is_no_news(daemon: Daemon, tmp_path: Path) -> None:
    """The bare mount point is another, empty device: the inbox is down. When the share is back nothing is queued again or lost."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one device here")
    with tempfile.TemporaryDirectory(dir=shared_memory) as share:
        (Path(share) / "talk.mp3").write_bytes(b"1")
        (Path(share) / "more.mp3").write_bytes(b"2")
        daemon.outbox.rmdir()
        daemon.inbox.rmdir()
        daemon.inbox.symlink_to(share)
        daemon.watch()
        daemon.settled(b"talk.mp3", b"more.mp3")
        heard = len(daemon.frames)
        (tmp_path / "bare").mkdir()
        _point(daemon.inbox, tmp_path / "bare")
        daemon.until(lambda: daemon.count(InboxDown))
        scans = daemon.count(Scanned)
        _point(daemon.inbox, Path(share))
        daemon.until(lambda: daemon.count(Scanned) > scans)
        daemon.scanned()
        assert [frame for frame in daemon.frames[heard:] if not isinstance(frame, InboxDown | Scanned)] == []
        (Path(share) / "third.mp3").write_bytes(b"3")
        daemon.settled(b"talk.mp3", b"more.mp3", b"third.mp3")


@pytest.mark.parametrize("goes", ["root", "emptied", "mounted", "renumbered"])
def test_what_is_done_is_not_queued_again_when_its_share_goes_and_returns(daemon: Daemon, tmp_path: Path, goes: str) -> None:
    """The inbox vanishes, is a bare directory on another device, is truly unmounted, comes back with other numbers for its device and its
    files (a share mounted anew): nothing that is done or waits is told again or declared gone; what is new afterwards is taken."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is only one device here")
    if goes == "mounted" and os.geteuid() != 0:
        pytest.skip("only root may mount")
    daemon.outbox.rmdir()
    with tempfile.TemporaryDirectory(dir=shared_memory) as share:
        (Path(share) / "folder").mkdir()
        names = ("done.mp3", "folder/done.mp3", "ready.mp3")
        for name in names:
            (Path(share) / name).write_bytes(name.encode())
        gone, back = _ways_of_the_share(daemon.inbox, Path(share), tmp_path, goes)
        back()
        try:
            daemon.watch(rescan_s=3600)
            daemon.settled(*map(str.encode, names))
            for name in names[:2]:
                daemon.finish(name.encode())
            before, heard = daemon.states(), len(daemon.frames)
            gone()
            daemon.until(lambda: daemon.count(InboxDown))
            scans = daemon.count(Scanned)
            back()
            daemon.until(lambda: daemon.count(Scanned) > scans)
            assert daemon.scanned().files == daemon.scanned().files == len(names)
            assert [frame for frame in daemon.frames[heard:] if not isinstance(frame, InboxDown | Scanned)] == []
            assert daemon.states() == before
            (daemon.inbox / "folder/new.mp3").write_bytes(b"new")
            daemon.settled(*map(str.encode, names), b"folder/new.mp3")
            daemon.stop()
        finally:
            gone()


def _ways_of_the_share(inbox: Path, share: Path, aside: Path, goes: str) -> tuple[Callable[[], object], Callable[[], object]]:
    """How the share leaves the inbox, and how it comes there."""
    bare, copy = aside / "bare", aside / "copy"
    bare.mkdir()
    if goes == "mounted":
        return (
            lambda: subprocess.run(["umount", "--lazy", str(inbox)], check=True),
            lambda: subprocess.run(["mount", "--bind", str(share), str(inbox)], check=True),
        )
    inbox.rmdir()
    if goes == "root":
        return inbox.unlink, lambda: inbox.symlink_to(share)
    if goes == "emptied":
        return lambda: _point(inbox, bare), lambda: _point(inbox, share)
    shown = iter((share, copy))  # the copy has the same sizes and times, and nothing else

    def back() -> None:
        target = next(shown)
        if target == copy:
            shutil.copytree(share, copy)
        _point(inbox, target)

    return lambda: _point(inbox, bare), back


def _point(link: Path, target: Path) -> None:
    """Let the link point elsewhere, in one step."""
    link.with_name("other link").symlink_to(target)
    link.with_name("other link").rename(link)


def test_an_inbox_that_is_absent_at_the_start_is_waited_for(daemon: Daemon) -> None:
    """The process does not end over it."""
    daemon.outbox.rmdir()
    daemon.inbox.rmdir()
    daemon.watch()
    daemon.until(lambda: daemon.count(InboxDown))
    assert daemon.count(Scanned) == 0
    daemon.inbox.mkdir()
    daemon.until(lambda: daemon.count(Scanned))
    (daemon.inbox / "talk.mp3").write_bytes(b"1")
    daemon.settled(b"talk.mp3")


def test_a_directory_that_takes_the_inbox_s_place_is_watched(daemon: Daemon, tmp_path: Path) -> None:
    """inotify would stay with the old one, which is not the inbox any more."""
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    daemon.inbox.rename(tmp_path / "old")
    fresh.rename(daemon.inbox)
    (daemon.inbox / "first.mp3").write_bytes(b"1")
    daemon.settled(b"first.mp3")
    (daemon.inbox / "second.mp3").write_bytes(b"2")
    daemon.settled(b"first.mp3", b"second.mp3")


def test_lost_events_are_made_up_for(daemon: Daemon) -> None:
    """A reader that stalls while the kernel's queue overflows: what came meanwhile is found, and its directory is watched from then on."""
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if queue > 50_000:
        pytest.skip("the kernel's queue is too long to fill it here")
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    assert daemon.child is not None
    os.kill(daemon.child.pid, signal.SIGSTOP)
    os.waitpid(daemon.child.pid, os.WUNTRACED)
    try:
        for _ in range(queue // 2 + 1000):  # created, deleted
            os.mknod(daemon.inbox / "flood")
            os.unlink(daemon.inbox / "flood")
        (daemon.inbox / "folder").mkdir()
        (daemon.inbox / "folder/first.mp3").write_bytes(b"1")
    finally:
        os.kill(daemon.child.pid, signal.SIGCONT)
    daemon.settled(b"folder/first.mp3")
    daemon.says("overflow")
    (daemon.inbox / "folder/second.mp3").write_bytes(b"2")
    daemon.settled(b"folder/first.mp3", b"folder/second.mp3")


def test_a_flood_under_a_stalled_reader_is_found_within_seconds(daemon: Daemon, in_memory: Path) -> None:
    """20,000 files are created while the watcher stands still, more than the kernel keeps events for (and it says that it lost some): none
    is missed ten seconds after."""
    files = max(20_000, int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) + 1000)
    if files > 50_000:
        pytest.skip("the kernel's queue is too long to fill it here")
    daemon.forgetful = True
    daemon.outbox.rmdir()
    daemon.inbox.rmdir()
    daemon.inbox.symlink_to(in_memory)
    (in_memory / "flood").mkdir()  # watched when they come: in a new folder they make no events
    daemon.watch(quiet_s=60)
    daemon.until(lambda: daemon.count(Scanned))
    assert daemon.child is not None
    os.kill(daemon.child.pid, signal.SIGSTOP)
    os.waitpid(daemon.child.pid, os.WUNTRACED)
    try:
        for number in range(files):
            os.mknod(in_memory / f"{'flood' if number % 2 else '.'}/{number}.mp3")
    finally:
        os.kill(daemon.child.pid, signal.SIGCONT)
    began = time.monotonic()
    daemon.until(lambda: len(daemon.told("seen")) >= files)
    assert time.monotonic() - began <= 10
    assert len(set(daemon.names("seen"))) == len(daemon.names("seen")) == files
    daemon.says("overflow")


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """A directory on a filesystem that never waits for a disk, where there is one."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as place:
        yield Path(place)


@pytest.mark.parametrize("watches", [0, 3])
def test_where_the_kernel_gives_no_more_watches_the_inbox_is_polled(daemon: Daemon, watches: int) -> None:
    """And it says so, with what to raise: from the start where not even the inbox can be watched, or when a folder of it cannot. In a user
    namespace of its own, whose limit it is."""
    limit = "/proc/sys/user/max_inotify_watches"
    python = f"exec {sys.executable} -m whisperd.watcher"
    if subprocess.run(["unshare", "-Ur", "sh", "-c", f"echo 3 > {limit}"], capture_output=True, check=False).returncode != 0:
        pytest.skip("no user namespaces here")
    for name in "abcdefgh":
        (daemon.inbox / name).mkdir()
    launcher = daemon.state / "python"
    launcher.write_text(f"#!/bin/sh\nexec unshare -Ur sh -c 'echo {watches} > {limit}; {python}'\n")
    launcher.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", str(launcher))
        daemon.watch(rescan_s=3600)
    daemon.until(lambda: daemon.count(Scanned))
    assert daemon.frames[0] == WatcherReady(events="native" if watches else "polling")
    daemon.says("cannot hear of all changes")
    (daemon.inbox / "h/talk.mp3").write_bytes(b"1")
    daemon.settled(b"h/talk.mp3")


def test_a_file_that_changes_in_a_directory_at_rest_is_noticed(daemon: Daemon) -> None:
    """The directory itself does not change then, and is not listed by itself any more: the event names it."""
    path = daemon.inbox / "folder/talk.mp3"
    path.parent.mkdir()
    path.write_bytes(b"1")
    daemon.watch(rescan_s=3600)
    daemon.settled(b"folder/talk.mp3")
    _let_rest(daemon)
    path.write_bytes(b"other")
    daemon.until(lambda: [sighting.size for sighting in daemon.told("settled")] == [1, 5])


def test_a_polled_file_that_keeps_growing_does_not_settle(daemon: Daemon) -> None:
    """Its directory is not listed any more, but it is looked at until it stands still."""
    daemon.watch(events="polling", rescan_s=3600, quiet_s=0.3)
    path = daemon.inbox / "talk.mp3"
    path.write_bytes(b"1")
    with path.open("ab", buffering=0) as file:
        deadline = time.monotonic() + folders.COARSE_S + 1
        while time.monotonic() < deadline:
            file.write(b"1")
            daemon.take_in(0.05)
        assert daemon.told("settled") == []
    daemon.settled(b"talk.mp3")
    assert daemon.told("settled")[0].size == path.stat().st_size


def _let_rest(daemon: Daemon) -> None:
    """Until the watcher is sure of its directories."""
    since = time.monotonic()
    while time.monotonic() < since + folders.COARSE_S:
        daemon.take_in(0.1)
    daemon.scanned()


def test_polling_needs_no_events(daemon: Daemon) -> None:
    """As on a share, where there are none."""
    daemon.watch(events="polling")
    daemon.until(lambda: daemon.count(Scanned))
    assert daemon.frames[0] == WatcherReady(events="polling")
    (daemon.inbox / "talk.mp3").write_bytes(b"1")
    daemon.settled(b"talk.mp3")
    (daemon.inbox / "talk.mp3").unlink()
    daemon.until(daemon.vanished)


# --- opening ---


def test_a_settled_file_is_opened_and_nothing_else(daemon: Daemon, tmp_path: Path) -> None:
    """The descriptor reads the file that settled. Refused by name: a changed file, a link in its place or on the way, a deleted one."""
    (daemon.inbox / "folder").mkdir()
    (daemon.inbox / "folder/talk.mp3").write_bytes(b"sound")
    (daemon.inbox / "other.mp3").write_bytes(b"sound")
    daemon.watch()
    daemon.settled(b"folder/talk.mp3", b"other.mp3")
    nested, plain = sorted(daemon.told("settled"), key=lambda sighting: sighting.path)
    assert isinstance(daemon.open(nested), SourceOpened)
    assert Path(f"/proc/self/fd/{daemon.descriptors[0]}").read_bytes() == b"sound"

    def refused(sighting: Sighting) -> str:
        answer = daemon.open(sighting)
        assert isinstance(answer, SourceLost)
        return answer.reason

    times = os.stat(daemon.inbox / "folder/talk.mp3")
    (daemon.inbox / "folder").rename(tmp_path / "outside")
    (daemon.inbox / "folder").symlink_to(tmp_path / "outside")
    assert os.stat(daemon.inbox / "folder/talk.mp3") == times
    assert refused(nested) == "gone"
    (daemon.inbox / "other.mp3").write_bytes(b"another sound")
    assert refused(plain) == "changed"
    (daemon.inbox / "other.mp3").unlink()
    (daemon.inbox / "other.mp3").symlink_to(tmp_path / "outside/talk.mp3")
    assert refused(plain) == "gone"
    (daemon.inbox / "other.mp3").unlink()
    assert refused(plain) == "gone"


# --- the end ---


def test_a_watcher_ends_with_its_daemon(daemon: Daemon) -> None:
    """The wire closes: it ends in order, without a word."""
    daemon.watch()
    daemon.until(lambda: daemon.count(Scanned))
    child, daemon.child = daemon.child, None
    assert child is not None
    child.channel._socket.shutdown(2)
    assert child.gone(time.monotonic()) == "ended normally"
    assert list(child.last_lines) == []


# --- parts, without a process ---


def test_a_scan_tells_an_absent_inbox_from_an_empty_one(tmp_path: Path) -> None:
    """Absent is an error with a hint; empty is a result that says so."""
    with pytest.raises(InboxAbsent, match="cannot list the inbox") as caught:
        scan(os.fsencode(tmp_path / "none"), (), (), (), recursive=True)
    assert caught.value.hint
    assert scan(os.fsencode(tmp_path), (), (), (), recursive=True).empty


def test_a_scan_goes_as_deep_as_asked_and_no_deeper_than_is_sane(tmp_path: Path) -> None:
    """Not recursive: the inbox itself. Recursive: a hundred levels, and what is left out is named."""
    deep = tmp_path
    for _ in range(105):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "lost.mp3").touch()
    (tmp_path / "d/found.mp3").touch()
    (tmp_path / "top.mp3").touch()
    root = os.fsencode(tmp_path)
    assert set(scan(root, (), (), (), recursive=False).sightings) == {b"top.mp3"}
    found = scan(root, (), (), (), recursive=True)
    assert set(found.sightings) == {b"top.mp3", b"d/found.mp3"}
    assert len(found.skipped) == 1


@pytest.mark.parametrize(("code", "complete"), [(errno.EACCES, True), (errno.EIO, False), (errno.ESTALE, False), (errno.ELOOP, True)])
def test_a_directory_that_cannot_be_read_is_no_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, complete: bool
) -> None:
    """Forbidden: nothing is known of what lies in it. Any other error: nothing is known of what is missing. A link is not entered."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "talk.mp3").touch()
    real = os.open

    def failing(path: bytes, flags: int, *, dir_fd: int | None = None) -> int:
        if path == b"bad":
            raise OSError(code, os.strerror(code))
        return real(path, flags, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", failing)
    found = scan(os.fsencode(tmp_path), (), (), (), recursive=True)
    assert set(found.sightings) == {b"talk.mp3"}
    assert found.complete == complete
    assert found.knows_absent(b"bad/talk.mp3") == (code == errno.ELOOP)
    assert found.knows_absent(b"badly.mp3") == complete


def entries(result: list[Entry]) -> set[bytes]:
    return {entry[0] for entry in result}


def test_a_walk_lists_again_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other directories it knows how much is in them, and looks only at the files that it is told to; everything when it is told so."""
    monkeypatch.setattr(folders, "COARSE_S", 0.0)
    for name in ("a/b/one.mp3", "a/two.mp3", "c/three.mp3", "top.mp3", "top.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    known, listed = Folders(), list[str]()
    real = os.scandir

    def listing(folder: int) -> object:
        listed.append(os.path.relpath(os.readlink(f"/proc/self/fd/{folder}"), tmp_path))
        return real(folder)

    def walk(*, everything: bool = False, singles: dict[bytes, list[bytes]] | None = None) -> tuple[set[bytes], ScanResult]:
        listed.clear()
        known.begin(everything=everything)
        found: list[Entry] = []
        rules = Rules.of(os.fsencode(tmp_path), (), Names(["*.mp3"], ()), recursive=True)
        result = Walk(rules, lambda batch, _: found.extend(batch), folders=known, singles=singles).over(os.fsencode(tmp_path))
        assert (result.files, result.left_out, result.directories, result.empty) == (4 + (tmp_path / "c/new.mp3").exists(), 1, 4, False)
        return entries(found), result

    monkeypatch.setattr(os, "scandir", listing)
    walk()
    walk()
    found, result = walk()
    assert (found, listed, result.unlisted) == (set(), [], {b"", b"a", b"a/b", b"c"})
    assert not result.knows_absent(b"a/gone.mp3")
    assert walk(singles={b"a": [b"two.mp3", b"none.mp3"], b"": [b"top.mp3"]})[0] == {b"a/two.mp3", b"top.mp3"}
    assert listed == []
    walk()
    assert listed == ["a"], "it was told of a file there that is not"
    walk()
    (tmp_path / "c/new.mp3").touch()
    found, result = walk()
    assert (found, listed) == ({b"c/new.mp3", b"c/three.mp3"}, ["c"])
    assert result.knows_absent(b"c/gone.mp3")
    walk(everything=True)
    assert sorted(listed) == [".", "a", "a/b", "c"]


def test_a_walk_leaves_out_paths_and_archives(tmp_path: Path) -> None:
    """By the operator's patterns of whole paths, and by directories that he names."""
    for name in ("raw/one.mp3", "raw/cut/two.mp3", "cut/raw/three.mp3", "archive/four.mp3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    root = os.fsencode(tmp_path)
    assert set(scan(root, (root + b"/archive",), (), ("raw/*.mp3",), recursive=True).sightings) == {
        b"raw/cut/two.mp3",
        b"cut/raw/three.mp3",
    }
    assert set(scan(root, (), (), ("**/raw", "archive/"), recursive=True).sightings) == set()


def test_identities_fit_into_the_ledger() -> None:
    """An inode of 64 bits, a time beyond the year 2262: SQLite has 63 and a sign."""
    found = os.stat_result((0o100644, 2**64 - 1, 1, 1, 0, 0, 5, 0, 0, 0), {"st_mtime_ns": 2**70, "st_ctime_ns": -(2**70)})
    assert entry_of(b"a", found) == (b"a", -1, 5, 2**63 - 1, -(2**63 - 1))


def test_hints_are_rebuilt_when_they_lost_something(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer watches than directories, twice: built anew. Still fewer: the loop polls besides."""
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    woken = threading.Event()
    hints = Hints(os.fsencode(tmp_path), recursive=True, wake=woken.set)
    found = tmp_path.stat()
    identity = (found.st_dev, found.st_ino)
    try:
        hints.keep(identity, native=True)
        first = hints._observer
        assert not hints.polling
        for now in (0, 10):
            hints.count(1, now)
        assert not woken.is_set()
        for now in (20, 30):
            hints.count(2, now)
        assert woken.is_set()
        hints.keep(identity, native=True)
        assert hints._observer is not first
        for now in (40, 50):
            hints.count(2, now)
        assert hints.polling
        hints.count(1, 60)
        assert not hints.polling
        hints.keep(identity, native=False)
        assert hints.polling
    finally:
        hints.stop()
