"""settle: which files are whole (pure: no clock, no disk).

Owns: the memory of one watcher: which files are waited for and since when, and what was told to the daemon. A file is settled when a
scan sees it exactly as a scan at least `quiet_s` earlier did (size, mtime, ctime, inode) and nobody writes to it. What the ledger
already knows is not told again. A file is gone only if a complete scan of the same inbox proves it: an unmounted share deletes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, NamedTuple

from whisperd.vocabulary import Sighting, State
from whisperd.watcher.scan import ScanResult

REPEAT_S = 5.0  # what the ledger does not show by then is told again, and then more and more rarely: the daemon may have much to do
REPEAT_MAX_S = 300.0
WRITER_S = 1.0  # how often, at most, a quiet file is tried again that a writer has open

SOURCE_NEEDED = (State.SEEN, State.READY, State.RUNNING)


class Known(NamedTuple):
    """What the ledger says of the newest job of a path."""

    dev: int
    size: int
    mtime_ns: int
    state: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Known:
        return cls(row["dev"], row["size"], row["mtime_ns"], row["state"])

    def describes(self, sighting: Sighting) -> bool:
        """Whether this is about the content that was sighted. A job whose source had gone describes nothing."""
        return self.state != State.GONE and (self.size, self.mtime_ns) == (sighting.size, sighting.mtime_ns)


@dataclass
class Wait:
    """One file that is waited for. `told` once it was reported as settled and the ledger has yet to show it, for `pause_s` so far."""

    sighting: Sighting
    since: float
    look_at: float
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
    unsettled: int = 0


class _Round(NamedTuple):
    """One scan being held against the ledger."""

    now: float  # when the scan began
    over: float  # when it was over: the latest moment at which a file can have been looked at
    writers: Callable[[Sighting], bool]
    report: Report


class Settler:
    """Turns scans into changes. Time is passed in: seconds of one monotonic clock."""

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._waits: dict[bytes, Wait] = {}
        self._told_gone: dict[bytes, float] = {}
        self._dev: int | None = None  # of the last scan that found anything at all

    def looks_unmounted(self, scan: ScanResult, known: Mapping[bytes, Known]) -> bool:
        """Whether this is the bare mount point: nothing in it, and on another device than the files that we still need were."""
        if not scan.empty:
            return False
        before = {self._dev} if self._dev is not None else {row.dev for row in known.values() if row.state in SOURCE_NEEDED}
        return bool(before) and scan.dev not in before

    def observe(
        self,
        scan: ScanResult,
        known: Mapping[bytes, Known],
        now: float,
        took_s: float,
        writers: Callable[[Sighting], bool],
    ) -> Report:
        """Hold one scan, begun at `now`, against the ledger. `writers` is asked about a file only when its quiet period is over."""
        this = _Round(now, now + took_s, writers, Report())
        for path, sighting in scan.sightings.items():
            self._told_gone.pop(path, None)
            self._look_at(this, path, sighting, known.get(path))
        self._miss(this, scan, known)
        this.report.unsettled = sum(not wait.told for wait in self._waits.values())
        if not scan.empty:
            self._dev = scan.dev
        return this.report

    def next_look(self) -> float | None:
        """When a scan can next bring news by itself: a quiet period ends, or an answer of the ledger is overdue."""
        times = [wait.look_at for wait in self._waits.values()]
        times += [at + REPEAT_S for at in self._told_gone.values()]
        return min(times, default=None)

    # --- files that are there ---

    def _look_at(self, this: _Round, path: bytes, sighting: Sighting, row: Known | None) -> None:
        recorded = row if row is not None and row.describes(sighting) else None
        if recorded is not None and recorded.state != State.SEEN:
            self._waits.pop(path, None)
            return
        wait = self._waits.get(path)
        if wait is None or wait.sighting != sighting:
            self._begin(this, path, sighting)
            if wait is not None or recorded is None:
                this.report.seen.append(sighting)
        elif wait.told:
            self._remind(this, wait, recorded)
        elif this.now >= wait.since + self._quiet_s:
            self._end(this, wait)

    def _begin(self, this: _Round, path: bytes, sighting: Sighting, pause_s: float = REPEAT_S) -> None:
        self._waits[path] = Wait(sighting, this.over, this.over + self._quiet_s, pause_s=pause_s)

    def _end(self, this: _Round, wait: Wait) -> None:
        """The quiet period is over."""
        if this.writers(wait.sighting):
            wait.look_at = this.now + max(WRITER_S, self._quiet_s)
            return
        wait.tell(this.now)
        this.report.settled.append(wait.sighting)

    def _remind(self, this: _Round, wait: Wait, recorded: Known | None) -> None:
        """The daemon was told that this file is settled, and the ledger does not show it."""
        if this.now < wait.look_at:
            return
        if recorded is not None:
            wait.tell(this.now)
            this.report.settled.append(wait.sighting)
        else:  # the job has gone again, or was forgotten: the file is new work
            self._begin(this, wait.sighting.path, wait.sighting, wait.pause_s)
            this.report.seen.append(wait.sighting)

    # --- files that are not there ---

    def _miss(self, this: _Round, scan: ScanResult, known: Mapping[bytes, Known]) -> None:
        """Tell what this scan proves to be gone: jobs that still wait to be read, and files that never became one."""
        needed = (path for path, row in known.items() if row.state in (State.SEEN, State.READY))
        absent = {path for path in {*self._waits, *needed} if scan.knows_absent(path)}
        if absent:
            same = _devices_of_this_inbox(scan, known)
            absent = {path for path in absent if self._dev_of(path, known) in same}
        for path in self._waits.keys() - scan.sightings.keys():
            if path in absent:
                del self._waits[path]
            else:  # nowhere to be seen, which proves nothing: no hurry
                self._waits[path].look_at = this.now + max(WRITER_S, self._quiet_s)
        told = self._told_gone
        vanished = sorted(path for path in absent if this.now >= told.get(path, -inf) + REPEAT_S)
        this.report.vanished = vanished
        self._told_gone = {path: told[path] for path in absent & told.keys()} | dict.fromkeys(vanished, this.now)

    def _dev_of(self, path: bytes, known: Mapping[bytes, Known]) -> int:
        """The device on which a file was seen last."""
        wait = self._waits.get(path)
        return wait.sighting.dev if wait is not None else known[path].dev


def _devices_of_this_inbox(scan: ScanResult, known: Mapping[bytes, Known]) -> set[int]:
    """Device numbers under which this very inbox was scanned. They change with a remount; a file that is still here vouches for them."""
    vouched = {row.dev for path, row in known.items() if path in scan.sightings and row.describes(scan.sightings[path])}
    return vouched | {scan.dev}
