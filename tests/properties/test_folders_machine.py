"""What a watcher relies on when it does not list a directory again, against real directories and any history of them.

A real `Watch` with a real ledger goes over a real tree, while files and folders come, change, move and go: between its walks, and in the
middle of them. Its clock is a model, and so is the coarseness of the times that directories show it (the kernel's own, one second, FAT's
two); only as much real time passes as the kernel's clock needs for one step. After each quiet spell the ledger must hold what a scan of
everything finds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions, Sighting
from whisperd.watcher import scan, watch
from whisperd.watcher.folders import COARSE_S, Contents, Folders, Stamp
from whisperd.watcher.names import SKIP_MARKER
from whisperd.wire import Profiles, Scanned, Sightings, WatchInbox

INCLUDE, IGNORE = ("*.mp3",), ("draft*",)
QUIET_S = 0.5
ROUNDS_MAX = 12
LIVE = ("seen", "ready")

FOLDERS = ("a/c", "b", "../out/f")
NAMES = ("one.mp3", "two.mp3", "one.mp3", "two.mp3", "three.mp3", "notes.txt", "draft.mp3", ".whisperd.toml", "one.mp3.whisperd.toml")

which = st.integers(0, 23)  # of what is there
name = st.sampled_from(NAMES)
folder_name = st.sampled_from(("a", "b", "c", "d"))
flag = st.booleans()
content = st.sampled_from((b"sound", b"SOUND", b"noise", b"longer sound"))
pause_s = st.sampled_from((0.1, 0.1, 0.5, 0.5, 1.0, 2.0, COARSE_S))


class Clock:
    """The watcher's time, and what time directories seem to show: in steps of `grain_s` of that clock (0.0: as the kernel says)."""

    def __init__(self, probe: Path) -> None:
        self.now = 1000.0
        self.grain_s = 0.0
        self._probe = probe
        self._steps_ns = [self._kernel_ns()]
        self._moments = [self.now]

    def monotonic(self) -> float:
        return self.now

    def advance(self, passing_s: float) -> None:
        """Let that time pass, and at least one step of the kernel's clock: whatever is changed from now on has another time."""
        before = self._steps_ns[-1]
        while (shown := self._kernel_ns()) <= before:
            time.sleep(0.0005)
        self.now += passing_s
        self._steps_ns.append(shown)
        self._moments.append(self.now)

    def stamp(self, found: os.stat_result) -> Stamp:
        return Stamp(found.st_ino, self._shown_ns(found.st_mtime_ns), self._shown_ns(found.st_ctime_ns))

    def _shown_ns(self, kernel_ns: int) -> int:
        if self.grain_s == 0.0 or kernel_ns < self._steps_ns[0]:
            return kernel_ns
        moment = self._moments[bisect_right(self._steps_ns, kernel_ns) - 1]
        return round(moment - moment % self.grain_s) * 1_000_000_000

    def _kernel_ns(self) -> int:
        self._probe.write_bytes(b"")
        return self._probe.stat().st_ctime_ns


class CountedFolders(Folders):
    """Says how many directories were listed."""

    listings = 0

    def listed(self, path: bytes, before: Stamp, after: Stamp, contents: Contents, now: float) -> None:
        CountedFolders.listings += 1
        super().listed(path, before, after, contents, now)


class Ears:
    """Hints that name the directories of what was done, as inotify would; or none at all."""

    def __init__(self) -> None:
        self.polling, self.uneasy = True, False
        self.heard: set[bytes] = set()

    def take(self) -> set[bytes]:
        heard, self.heard = self.heard, set()
        return heard

    def keep(self, identity: object, *, native: bool) -> None:
        """Nothing dies here."""

    def count(self, directories: int, now: float) -> None:
        """Nothing is overlooked here."""

    def stop(self) -> None:
        """Nothing runs here."""


class Daemon:
    """The other end of the wire: it keeps what it is told in a ledger, as the dispatcher does."""

    def __init__(self, root: bytes, ledger: Ledger) -> None:
        self._root = root
        self._ledger = ledger
        self.inbox = ledger.register_inbox(root, root + b".out", 1.0)
        self.figures: Scanned | None = None
        self.profiles: dict[bytes, str | None] = {}
        self.vanished: set[bytes] = set()
        self.wants_scan = False
        self._contents: dict[int, bytes] = {}

    def wait(self, timeout_s: float | None) -> list[Any]:
        return []

    def send_all(self, message: object) -> None:
        match message:
            case Profiles(files=files, whole=whole):
                self.profiles = ({} if whole else self.profiles) | {file.path: file.text for file in files}
            case Sightings():
                with self._ledger.transaction():
                    self._store(message)
            case Scanned():
                self.figures = message

    def _store(self, news: Sightings) -> None:
        ledger = self._ledger
        ledger.see_all(self.inbox, news.seen, 1.0)
        for renamed in news.renamed:
            ledger.rename(self.inbox, renamed.before, renamed.sighting, 1.0)
        for sighting, job in zip(news.settled, ledger.see_all(self.inbox, news.settled, 1.0), strict=True):
            if ledger.job(job)["state"] == "seen":
                ledger.settle(job, sighting, JobOptions(), 1.0)
                self._contents[job] = self._read(sighting.path)
        self.vanished |= set(news.vanished)
        for path in news.vanished:
            live = ledger.live_job(self.inbox, path)
            if live is not None and live["state"] in LIVE:
                ledger.vanish(live["id"], 1.0)
        for sighting in news.doubted:
            self._verify(sighting)

    def _verify(self, sighting: Sighting) -> None:
        row = self._ledger.latest_job(self.inbox, sighting.path)
        if row is None or row["state"] in LIVE:
            return
        if self._contents[row["id"]] == self._read(sighting.path):
            self._ledger.recognise(row["id"], sighting, 1.0)
        else:
            self._ledger.see_anew(self.inbox, sighting, 1.0)
            self.wants_scan = True

    def _read(self, path: bytes) -> bytes:
        with suppress(OSError), open(self._root + b"/" + path, "rb") as file:
            return file.read()
        return b""

    def row(self, path: bytes) -> Any:
        return self._ledger.latest_job(self.inbox, path)

    def state(self, path: bytes) -> str:
        row = self.row(path)
        return "" if row is None else str(row["state"])

    def live_paths(self) -> set[bytes]:
        return {row["path"] for row in self._ledger.jobs() if row["state"] in LIVE}

    def finish(self, path: bytes) -> None:
        """As if it were done: from then on only another content is news."""
        row = self.row(path)
        if row is not None and row["state"] == "ready":
            self._ledger.cancel(row["id"], 1.0)


class Inbox(RuleBasedStateMachine):
    """A watcher, its inbox and what people do in it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = pytest.MonkeyPatch()
        self.during: list[Callable[[], None]] = []  # to be done in the middle of the next walk
        self.skipping = 0
        self.created = 0

    @initialize(grain_s=st.sampled_from((0.0, 1.0, 2.0, 2.0)), hears=st.sampled_from((False, False, True)), memory=flag, rests=flag)
    def begin(self, grain_s: float, hears: bool, memory: bool, rests: bool) -> None:
        shared_memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.home = Path(tempfile.mkdtemp(prefix="whisperd-folders-", dir=shared_memory if memory else None))
        self.state = tempfile.mkdtemp(prefix="whisperd-folders-", dir=shared_memory)
        self.root = self.home / "inbox"
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True)
            (self.root / folder / "one.mp3").write_bytes(b"sound")
        self.clock = Clock(self.home / "probe")
        self.clock.grain_s = grain_s
        clock = SimpleNamespace(monotonic=self.clock.monotonic, process_time=lambda: 0.0)
        for module in (watch, scan):
            self.patches.setattr(module, "time", clock)
        self.patches.setattr(scan, "_stamp", self.clock.stamp)
        self.patches.setattr(scan, "BREATHE_EVERY", 1)
        self.patches.setattr(watch, "Folders", CountedFolders)
        self.ledger = Ledger(self.state, epoch="test")
        self.daemon = Daemon(os.fsencode(self.root), self.ledger)
        self.hears = hears
        self.ears = Ears()
        self.unheard: set[bytes] = set()  # written in place, which no directory tells of
        self.old_ns: dict[str, int] = {}
        self.watch: Any = watch.Watch(self.daemon, self._order())  # type: ignore[arg-type]
        self.watch._hints, self.watch._breathe = self.ears, self._breathe
        if rests:
            self.quiet(everything=False)

    def _order(self) -> WatchInbox:
        return WatchInbox(
            inbox=self.daemon.inbox,
            path=os.fsencode(self.root),
            ledger=self.state,
            exclude=(),
            include=INCLUDE,
            ignore=IGNORE,
            recursive=True,
            events="polling",
            quiet_s=QUIET_S,
            rescan_s=1e9,
            poll_s=1.0,
        )

    def teardown(self) -> None:
        if not hasattr(self, "watch"):
            return
        try:
            self.quiet(everything=False)
            self.quiet(everything=True)
        finally:
            self.watch._rows.close()
            self.ledger.close()
            for folder, _, _ in os.walk(self.home):
                os.chmod(folder, 0o755)
            shutil.rmtree(self.home)
            shutil.rmtree(self.state)
            self.patches.undo()

    # --- what people do ---

    def _do(self, deed: Callable[[], object], *touched: str) -> None:
        """A deed that fails, since what it is about is not there or in the way, is none."""

        def done() -> None:
            with suppress(OSError, shutil.Error):
                deed()
                if self.hears:
                    self.ears.heard |= {os.fsencode(folder) for folder in touched if not folder.startswith("..")}

        if self.skipping:
            self.during.append(done)
            self.skipping -= 1
        else:
            done()

    def _in_place(self, path: Path) -> None:
        """Remember whom nothing tells of this; of files that are waited for, the watcher knows by itself."""
        inode = path.stat().st_ino
        for other in self.root.rglob("*.mp3"):
            if other.stat(follow_symlinks=False).st_ino == inode and not (self.hears and other == path):
                relative = os.fsencode(other.relative_to(self.root))
                if self.daemon.state(relative) not in ("", "seen", "gone"):
                    self.unheard.add(relative)

    def _pick(self, which: int, found: list[str]) -> str:
        """One of these; without any, a place where nothing can be done."""
        return found[which % len(found)] if found else "nowhere/at all"

    def _file(self, which: int, *, out: bool = False) -> tuple[str, str]:
        """A file that is there, as folder and name."""
        found = [self._relative(path) for path in (self.home if out else self.root).rglob("*") if path.is_file()]
        return os.path.split(self._pick(which, sorted(path for path in found if path != "../probe")))

    def _folder(self, which: int, *, out: bool = False) -> str:
        """A folder that is there; the inbox itself is one."""
        found = [self._relative(path) for path in (self.home if out else self.root).rglob("*") if path.is_dir() and path != self.root]
        return self._pick(which, sorted({*found, ""} - {"..", "../out"}))

    def _relative(self, path: Path) -> str:
        relative = os.path.relpath(path, self.root)
        return "" if relative == "." else relative

    @rule(folder=which, name=name, content=content)
    def create(self, folder: int, name: str, content: bytes) -> None:
        where = self._folder(folder, out=True)
        self._do(lambda: (self.root / where / name).write_bytes(content) if not (self.root / where / name).exists() else None, where)

    @rule(file=which, content=content, append=st.booleans())
    def write(self, file: int, content: bytes, append: bool) -> None:
        folder, name = self._file(file)

        def deed() -> None:
            path = self.root / folder / name
            self._in_place(path)
            with path.open("ab" if append else "r+b") as opened:
                opened.write(content)

        self._do(deed, folder)

    @rule(file=which, letter=st.sampled_from((b"x", b"y")))
    def replace_in_place(self, file: int, letter: bytes) -> None:
        """With the same size and the mtime that it had."""
        folder, name = self._file(file)

        def deed() -> None:
            path = self.root / folder / name
            self._in_place(path)
            found = path.stat()
            path.write_bytes(letter * found.st_size)
            os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))

        self._do(deed, folder)

    @rule(file=which, to_folder=which, to_name=name)
    def rename(self, file: int, to_folder: int, to_name: str) -> None:
        """Within a folder, to another, over another file, out of the inbox or into it."""
        (folder, name), target = self._file(file, out=True), self._folder(to_folder, out=True)
        self._do(lambda: os.rename(self.root / folder / name, self.root / target / to_name), folder, target)

    @rule(file=which, over=which)
    def rename_over(self, file: int, over: int) -> None:
        (folder, name), (target, other) = self._file(file, out=True), self._file(over)
        self._do(lambda: os.rename(self.root / folder / name, self.root / target / other), folder, target)

    @rule(file=which, to_folder=which, to_name=name)
    def link(self, file: int, to_folder: int, to_name: str) -> None:
        (folder, name), target = self._file(file, out=True), self._folder(to_folder)
        self._do(lambda: os.link(self.root / folder / name, self.root / target / to_name), target)

    @rule(file=which)
    def delete(self, file: int) -> None:
        folder, name = self._file(file)
        self._do(lambda: os.unlink(self.root / folder / name), folder)

    @rule(folder=which, name=folder_name)
    def make_folder(self, folder: int, name: str) -> None:
        where = self._folder(folder, out=True)
        self._do((self.root / where / name).mkdir, where)

    @rule(folder=which)
    def remove_folder(self, folder: int) -> None:
        where = self._folder(folder)
        if where:
            self._do((self.root / where).rmdir, os.path.dirname(where))

    @rule(folder=which, to_folder=which, name=folder_name)
    def move_folder(self, folder: int, to_folder: int, name: str) -> None:
        """With all that is in it: in, out, or elsewhere, and over one that is empty."""
        where, target = self._folder(folder, out=True), self._folder(to_folder, out=True)
        if where:
            self._do(lambda: os.rename(self.root / where, self.root / target / name), os.path.dirname(where), target)

    @rule(folder=which, other=which)
    def exchange_folders(self, folder: int, other: int) -> None:
        """Two folders take each other's names."""
        one, two, aside = self._folder(folder), self._folder(other, out=True), self.home / "aside"

        def deed() -> None:
            os.rename(self.root / one, aside)
            try:
                os.rename(self.root / two, self.root / one)
            except OSError:
                os.rename(aside, self.root / one)
                raise
            os.rename(aside, self.root / two)

        if one and two and one != two and not one.startswith(two + "/") and not two.startswith(one + "/"):
            self._do(deed, os.path.dirname(one), os.path.dirname(two))

    @rule(folder=which)
    def remove_tree(self, folder: int) -> None:
        where = self._folder(folder)
        if where:
            self._do(lambda: shutil.rmtree(self.root / where), where, os.path.dirname(where))

    @rule(folder=which, mode=st.sampled_from((0o755, 0o700, 0)))
    def change_mode(self, folder: int, mode: int) -> None:
        """Mode 0 closes it to anybody but root."""
        where = self._folder(folder)
        if where:
            self._do(lambda: (self.root / where).chmod(mode))

    @rule(folder=which)
    def mark(self, folder: int) -> None:
        """Have a folder left alone."""
        where = self._folder(folder)
        self._do((self.root / where / os.fsdecode(SKIP_MARKER)).touch, where)

    @rule(folder=which)
    def unmark(self, folder: int) -> None:
        """Have a folder that is left alone no longer left alone."""
        where = self._pick(folder, sorted(self._relative(path.parent) for path in self.root.rglob(os.fsdecode(SKIP_MARKER))))
        self._do((self.root / where / os.fsdecode(SKIP_MARKER)).unlink, where)

    @rule(folder=which, back_ns=st.sampled_from((None, None, 10**18)))
    def turn_back(self, folder: int, back_ns: int | None) -> None:
        """Give a folder a time that it had, or an old one."""
        where = self._folder(folder)

        def deed() -> None:
            before_ns = self.old_ns.setdefault(where, (self.root / where).stat().st_mtime_ns)
            at_ns = before_ns if back_ns is None else back_ns
            os.utime(self.root / where, ns=(at_ns, at_ns))

        self._do(deed)

    @rule(file=which)
    def finish(self, file: int) -> None:
        self.daemon.finish(os.fsencode(os.path.join(*self._file(file))))

    @rule(folder=which, pauses_s=st.lists(pause_s, min_size=1, max_size=3))
    def take_away_and_bring_back(self, folder: int, pauses_s: list[float]) -> None:
        """A folder with all that is in it, with walks between."""
        where, aside = self._folder(folder), "../out/lent"
        if where:
            self._do(lambda: os.rename(self.root / where, self.root / aside), os.path.dirname(where))
            for passing_s in pauses_s:
                self.walk(pause_s=passing_s, everything=False)
            self._do(lambda: os.rename(self.root / aside, self.root / where), os.path.dirname(where))

    @rule(folder=which, pauses_s=st.lists(pause_s, min_size=3, max_size=8))
    def put_one_after_the_other(self, folder: int, pauses_s: list[float]) -> None:
        """Files into one folder, and a walk after each."""
        where = self._folder(folder)
        for passing_s in pauses_s:
            self.created += 1
            self._do((self.root / where / f"{self.created}.mp3").touch, where)
            self.walk(pause_s=passing_s, everything=False)

    @rule(deeds=st.integers(1, 3))
    def wait_for_the_walk(self, deeds: int) -> None:
        """What people do next happens in the middle of a walk."""
        self.skipping = deeds

    # --- what the watcher does ---

    def _breathe(self) -> None:
        if self.during:
            self.during.pop(0)()

    @rule(pause_s=pause_s, everything=st.sampled_from((False, False, False, True)))
    def walk(self, pause_s: float, everything: bool) -> None:
        self.skipping = 0
        self.clock.advance(pause_s)
        self._round(everything=everything)

    def _round(self, *, everything: bool) -> None:
        self.watch._owed = everything or self.daemon.wants_scan or self.watch._owed
        self.daemon.wants_scan = False
        if self.watch._owed:  # what is written during this walk is for the next one
            self.unheard = set()
        undisturbed, self.daemon.vanished = not self.during, set()
        self.watch._round()
        if undisturbed and self.daemon.vanished:
            assert not self.daemon.vanished & self._scan().sightings.keys(), "what is there was said to be gone"
        for deed in self.during:  # the walk was too short for these
            deed()
        self.during = []

    @rule(everything=st.booleans())
    def quiet(self, everything: bool) -> None:
        """Nobody does anything for some seconds: what the watcher knows then is what is there."""
        self.skipping = 0
        self.clock.advance(COARSE_S)
        self._round(everything=everything)
        for _ in range(ROUNDS_MAX):
            self.clock.advance(QUIET_S + 1.0)
            self._round(everything=False)
        assert self.daemon.figures is not None
        assert self.daemon.figures.unsettled == 0
        self._compare(everything=everything)
        self.clock.advance(COARSE_S)
        before = CountedFolders.listings
        self._round(everything=False)
        assert CountedFolders.listings == before, "directories that did not change were listed again"
        self.old_ns = {self._relative(path): path.stat().st_mtime_ns for path in self.root.rglob("*") if path.is_dir()}

    def _scan(self) -> scan.ScanResult:
        return scan.scan(os.fsencode(self.root), (), INCLUDE, IGNORE, recursive=True)

    def _compare(self, *, everything: bool) -> None:
        daemon, there = self.daemon, self._scan()
        assert daemon.figures is not None
        assert (daemon.figures.files, daemon.figures.left_out) == (there.files, there.left_out)
        for path, sighting in there.sightings.items():
            row = daemon.row(path)
            assert row is not None and row["state"] not in ("seen", "gone"), f"{path!r} was missed: {row and row['state']}"
            if path not in self.unheard:
                assert (row["size"], row["mtime_ns"]) == (sighting.size, sighting.mtime_ns), f"{path!r} is another file by now"
            if everything and row["state"] == "cancelled":
                assert (row["inode"], row["ctime_ns"]) == (sighting.inode, sighting.ctime_ns), f"nobody asked whether {path!r} is another"
        for path in daemon.live_paths() - there.sightings.keys():
            left = there.left_alone(path) and daemon.state(path) == "ready"
            assert left or not there.knows_absent(path), f"{path!r} is gone, and nobody said so"
        for path in there.profiles:
            assert daemon.profiles.get(path) == (self.root / os.fsdecode(path)).read_text(), f"{path!r} says something else by now"
        for path in daemon.profiles.keys() - there.profiles.keys():
            assert daemon.profiles[path] is None or not there.knows_absent(path)

    @invariant()
    def no_directory_is_taken_for_a_liar(self) -> None:
        if hasattr(self, "watch"):
            assert not self.watch._folders.lying
            assert all(folder.contradicted is None for folder in self.watch._folders._known.values())


Inbox.TestCase.settings = settings(
    max_examples=int(os.environ.get("EXAMPLES", "40")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestInbox = Inbox.TestCase
