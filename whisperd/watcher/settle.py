"""settle: which files are whole (pure: no clock, no disk).

Owns: the memory of one watcher: which files are waited for and since when, and what was told to the daemon. A file is settled when two
looks at least `quiet_s` apart see it the same (size, mtime, ctime, inode) and nobody writes to it. What the ledger already knows is not
told again. A file is gone only if a complete scan of the same inbox proves it: an unmounted share deletes nothing; it is renamed if
another path has its inode, size and time instead. At most `WAITS_MAX` files are waited for at a time: others have their turn later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from math import inf

from whisperd.vocabulary import Sighting, State
from whisperd.watcher.known import FINISHED, SOURCE_NEEDED, Held, Known, KnownPaths, KnownRow
from whisperd.watcher.scan import ScanResult
from whisperd.watcher.source import Entry
from whisperd.wire import Renamed

REPEAT_S = 5.0  # what the ledger does not show by then is told again, and then more and more rarely: the daemon may have much to do
REPEAT_MAX_S = 60.0
WRITER_S = 1.0  # how often, at most, a quiet file is tried again that a writer has open
WAITS_MAX = 50_000
DOUBTS_MAX = 10_000  # files that are told as doubted and not answered by the ledger yet
RENAMES_MAX = 50_000  # of one scan

ReadAgain = Callable[[], Iterable[KnownRow]]
Twins = Callable[[Sighting], Iterable[tuple[bytes, int, str]]]
"""Path, device and state of the jobs that have the inode, size and mtime of a sighting."""


@dataclass(slots=True)
class Wait:
    """One file that is waited for. `told` once it was reported as settled and the ledger has yet to show it, for `pause_s` so far."""

    sighting: Sighting
    since: float
    look_at: float
    met: int  # the last scan that saw it
    told: bool = False
    pause_s: float = REPEAT_S

    def tell(self, now: float) -> None:
        self.told = True
        self.look_at = now + self.pause_s
        self.pause_s = min(2 * self.pause_s, REPEAT_MAX_S)


@dataclass
class Report:
    """What changed with one scan. `unsettled` counts files that are still waited for."""

    seen: list[Sighting] = field(default_factory=list)
    settled: list[Sighting] = field(default_factory=list)
    vanished: list[bytes] = field(default_factory=list)
    renamed: list[Renamed] = field(default_factory=list)
    doubted: list[Sighting] = field(default_factory=list)
    unsettled: int = 0

    @property
    def most(self) -> int:
        """How many there are of the most frequent kind."""
        return max(len(self.seen), len(self.settled), len(self.vanished), len(self.renamed), len(self.doubted))


class Settler:
    """Turns scans into changes: `begin`, `observe` for each batch, `finish`. Time is passed in: seconds of one monotonic clock."""

    def __init__(self, quiet_s: float, writers: Callable[[Sighting], bool]) -> None:
        """`writers` is asked about a file only when its quiet period is over."""
        self.report = Report()
        self.steady_inodes = True  # whether a file keeps its inode number as long as it is the same
        self._quiet_s = quiet_s
        self._writers = writers
        self._waits: dict[bytes, Wait] = {}
        self._told_gone: dict[bytes, float] = {}
        self._doubted: dict[bytes, Sighting] = {}
        self._newcomers: dict[bytes, Sighting] = {}  # of this scan: perhaps renamed
        self._turned_away = 0  # files that wait for room among those that are waited for
        self._dev: int | None = None  # of the last scan that found anything at all
        self._scan = 0
        self._everything = True
        self._next_look: float | None = None

    # --- between scans ---

    @property
    def has_room(self) -> bool:
        """Whether files that were turned away may come now: everything has to be listed for that."""
        return self._turned_away > 0 and len(self._waits) <= WAITS_MAX // 2

    def waits_for(self, path: bytes) -> bool:
        return path in self._waits

    def next_look(self) -> float | None:
        """When a scan can next bring news by itself: a quiet period ends, or an answer of the ledger is overdue."""
        return self._next_look

    def due(self, now: float) -> list[bytes]:
        """Files to be looked at by a scan that begins now, changed or not."""
        return [path for path, wait in self._waits.items() if wait.look_at <= now]

    def ledger_moved(self, known: KnownPaths) -> None:
        """Let go of what the ledger shows by now."""
        told = [path for path, wait in self._waits.items() if wait.told]
        for path, row in zip(told, known.lookup(told), strict=True):
            if row is not None and row.state != State.SEEN and row.describes(self._waits[path].sighting):
                del self._waits[path]
        for path, row in zip(list(self._doubted), known.lookup(list(self._doubted)), strict=True):
            if row is None or not self._is_doubtful(self._doubted[path], row):
                del self._doubted[path]

    # --- one scan ---

    def begin(self, *, everything: bool) -> None:
        """A scan begins."""
        self.report = Report()
        self._scan += 1
        self._newcomers = {}
        self._everything = everything
        if everything:
            self._turned_away = 0

    def looks_unmounted(self, scan: ScanResult, known: KnownPaths) -> bool:
        """Whether this is the bare mount point: nothing in it, and on another device than the files that we still need were."""
        if not scan.empty:
            return False
        before = {self._dev} if self._dev is not None else known.needed_devices()
        return bool(before) and scan.dev not in before

    def observe(self, entries: Sequence[Entry], dev: int, known: KnownPaths, began: float, over: float) -> None:
        """Take in a batch of files, each looked at somewhen between `began` and `over`."""
        resting = self._waits.keys() & {entry[0] for entry in entries} if self._waits else set()
        for held in known.hold(entries, dev, steady_inodes=self.steady_inodes):
            resting.discard(held.sighting.path)
            self._told_gone.pop(held.sighting.path, None)
            self._look_at(held, began, over)
        for path in resting:  # the ledger has the very content, and no question about it
            del self._waits[path]

    def finish(self, scan: ScanResult, known: KnownPaths, now: float, read_again: ReadAgain, twins: Twins) -> Report:
        """The scan, begun at `now`, is over: tell what it proves to be gone or renamed, and what is waited for."""
        absent = self._absent(scan, known, read_again)
        renamed = set(self._rename(absent, scan.dev, twins))
        known.forget(list(renamed))
        for path in renamed:
            self._waits.pop(path, None)
        self._miss({path: state for path, state in absent.items() if path not in renamed}, scan, now)
        self.report.unsettled = self._turned_away + sum(not wait.told for wait in self._waits.values())
        if not scan.empty:
            self._dev = scan.dev
        looks = [wait.look_at for wait in self._waits.values()] + [at + REPEAT_S for at in self._told_gone.values()]
        self._next_look = now if self.has_room else min(looks, default=None)
        return self.report

    # --- files that are there ---

    def _look_at(self, held: Held, began: float, over: float) -> None:
        sighting, row = held.sighting, held.known
        recorded = row if row is not None and row.describes(sighting) else None
        if recorded is not None and recorded.state != State.SEEN:
            self._waits.pop(sighting.path, None)
            self._doubt(sighting, recorded)
            return
        wait = self._waits.get(sighting.path)
        if wait is None or not self._is_same(wait.sighting, sighting):
            self._begin(sighting, over)
            if wait is not None or recorded is None:
                # Where the path had a job, that one may be the newer: whoever asks for the newest job of the path would find the wrong one.
                self._tell_seen(held, renamed_perhaps=wait is None and row is None)
            return
        wait.met = self._scan
        if wait.told:
            self._remind(wait, row, began, over)
        elif began >= wait.since + self._quiet_s:
            self._end(wait, began)

    def _is_same(self, before: Sighting, now: Sighting) -> bool:
        changed = (before.size, before.mtime_ns, before.ctime_ns, before.dev) != (now.size, now.mtime_ns, now.ctime_ns, now.dev)
        return not changed and (before.inode == now.inode or not self.steady_inodes)

    def _begin(self, sighting: Sighting, over: float, pause_s: float = REPEAT_S) -> None:
        if sighting.path in self._waits or len(self._waits) < WAITS_MAX:
            self._waits[sighting.path] = Wait(sighting, over, over + self._quiet_s, self._scan, pause_s=pause_s)
        elif self._everything or not self._turned_away:  # a scan of a part counts none twice
            self._turned_away += 1

    def _tell_seen(self, held: Held, *, renamed_perhaps: bool) -> None:
        if renamed_perhaps and held.twin and len(self._newcomers) < RENAMES_MAX:
            self._newcomers[held.sighting.path] = held.sighting
        else:
            self.report.seen.append(held.sighting)

    def _end(self, wait: Wait, now: float) -> None:
        """The quiet period is over."""
        if self._writers(wait.sighting):
            wait.look_at = now + max(WRITER_S, self._quiet_s)
            return
        wait.tell(now)
        self.report.settled.append(wait.sighting)

    def _remind(self, wait: Wait, row: Known | None, now: float, over: float) -> None:
        """The daemon was told that this file is settled, and the ledger does not show it."""
        if now < wait.look_at:
            return
        if row is not None and row.state == State.SEEN:
            wait.tell(now)
            self.report.settled.append(wait.sighting)
        else:  # the job has gone again, or was forgotten: the file is new work
            self._begin(wait.sighting, over, wait.pause_s)
            self.report.seen.append(wait.sighting)

    # --- files whose content may be another ---

    def _is_doubtful(self, sighting: Sighting, row: Known) -> bool:
        """Whether a finished job's file was touched without a change of size or time. A remount changes inodes, and is no news."""
        touched = row.ctime_ns != sighting.ctime_ns or (self.steady_inodes and row.inode != sighting.inode)
        return row.state in FINISHED and row.describes(sighting) and row.dev == sighting.dev and touched

    def _doubt(self, sighting: Sighting, row: Known) -> None:
        told = self._doubted.get(sighting.path)
        if not self._is_doubtful(sighting, row) or (told is not None and self._is_same(told, sighting)):
            return
        if told is not None or len(self._doubted) < DOUBTS_MAX:
            self._doubted[sighting.path] = sighting
            self.report.doubted.append(sighting)

    # --- files that are not there ---

    def _absent(self, scan: ScanResult, known: KnownPaths, read_again: ReadAgain) -> dict[bytes, str]:
        """What this scan proves to be gone: paths, with the states of their jobs. Of files that never became one: seen."""
        if not scan.complete:
            return {}
        devices = known.devices(scan.dev)
        waits = {path: str(State.SEEN) for path, wait in self._waits.items() if wait.met != self._scan and wait.sighting.dev in devices}
        jobs = {path: row.state for path, row in known.absent(devices, scan.unlisted, read_again)}
        return {path: state for path, state in (jobs | waits).items() if scan.knows_absent(path)}

    def _rename(self, absent: dict[bytes, str], dev: int, twins: Twins) -> list[bytes]:
        """Find out which files that are new are old ones under another name; the names they had."""
        before: dict[bytes, None] = {}
        for sighting in self._newcomers.values():
            found = next((path for path, *_ in self._candidates(sighting, absent, dev, twins) if path not in before), None)
            if found is None:
                self.report.seen.append(sighting)
            else:
                before[found] = None
                self.report.renamed.append(Renamed(before=found, sighting=sighting))
        self._newcomers = {}
        return list(before)

    def _candidates(self, sighting: Sighting, absent: dict[bytes, str], dev: int, twins: Twins) -> Iterable[tuple[bytes, int, str]]:
        if not absent:
            return ()
        return (twin for twin in twins(sighting) if twin[1] == dev and twin[2] in SOURCE_NEEDED and twin[0] in absent)

    def _miss(self, absent: dict[bytes, str], scan: ScanResult, now: float) -> None:
        """Tell what has vanished: jobs that still wait to be read, and files that never became one. A skip marker leaves what is ready."""
        gone = {path for path, state in absent.items() if state == State.SEEN or (state == State.READY and not scan.left_alone(path))}
        for path in [path for path, wait in self._waits.items() if wait.met != self._scan]:
            if path in gone:
                del self._waits[path]
            elif self._waits[path].look_at <= now:  # nowhere to be seen, which proves nothing: no hurry
                self._waits[path].look_at = now + max(WRITER_S, self._quiet_s)
        told = self._told_gone
        self.report.vanished = sorted(path for path in gone if now >= told.get(path, -inf) + REPEAT_S)
        self._told_gone = {path: told[path] for path in gone & told.keys()} | dict.fromkeys(self.report.vanished, now)
