"""watch: the loop of one watcher process.

Owns: the order of things. It sleeps until the wire, a hint or the timetable wakes it, scans, holds the scan against the ledger, and tells
the daemon what changed: files that are new while the scan goes on, the rest when it is over and the profiles were told. Whatever cannot be
listed is told once as `InboxDown` and tried again; the loop itself ends only with the wire.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections import defaultdict
from collections.abc import Iterable
from itertools import islice

from loguru import logger

from whisperd.errors import WhisperdError, printable
from whisperd.ledger.connection import filesystem_type, is_network
from whisperd.vocabulary import Sighting
from whisperd.watcher.folders import Folders
from whisperd.watcher.hints import Hints, Identity
from whisperd.watcher.names import Names
from whisperd.watcher.pace import Pace
from whisperd.watcher.profiles import ProfileFiles
from whisperd.watcher.rows import Rows
from whisperd.watcher.scan import BATCH, InboxAbsent, Rules, ScanResult, Walk, absent
from whisperd.watcher.settle import Report, Settler
from whisperd.watcher.source import CannotOpen, Entry, open_source
from whisperd.watcher.writers import still_written
from whisperd.wire import (
    AskShare,
    Channel,
    Frame,
    InboxDown,
    OpenSource,
    Scanned,
    ScanNow,
    ShareAnswered,
    Sightings,
    SourceLost,
    SourceOpened,
    Stop,
    WatcherIn,
    WatcherReady,
    WatchInbox,
    WireClosed,
    name_only,
)

BREATHE_S = 0.02  # of a long scan, until the wire is served again
PROFILES_LOOKED_AT = 1000  # by each scan; of more, only those in directories that changed


class StopAsked(WhisperdError):
    """The daemon asked this process to end."""

    code = "stop_asked"


class Watch:
    """One inbox, watched."""

    def __init__(self, channel: Channel[WatcherIn], order: WatchInbox) -> None:
        self._channel = channel
        self._order = order
        self._rows = Rows(order.ledger, order.inbox)
        self._rules = Rules.of(order.path, order.exclude, Names(order.include, order.ignore), order.recursive)
        self._folders = Folders()
        self._profiles = ProfileFiles(order.path)
        self._settler = Settler(order.quiet_s, self._still_written)
        self._pace = Pace(order.rescan_s, order.poll_s)
        self._woken = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._hints = Hints(order.path, recursive=order.recursive, wake=self._wake)
        self._identity: Identity | None = None
        self._network = False
        self._glance_at = 0.0
        self._down_for = ""
        self._owed = True  # somebody waits for the figures of the next scan, changed or not
        self._said: tuple[int, int, int] | None = None
        self._said_at = 0.0
        self._complained: set[bytes] = set()
        self._breathed_at = 0.0
        self._doubted: set[bytes] | None = None  # directories to be listed by the next scan; None: all
        self._complete = False
        self._everything = True
        self._told_early = False
        self._lap = 0.0

    def run(self, frames: Iterable[Frame[WatcherIn]]) -> None:
        """Watch until the daemon says stop, or is gone. `frames` came together with the order."""
        try:
            self._meet_inbox()
        except InboxAbsent:  # the first scan will say so
            pass
        try:
            self._channel.send_all(WatcherReady(events="polling" if self._hints.polling else "native"))
            self._serve(frames)
            while True:
                self._rest()
                if time.monotonic() >= self._pace.next_scan(self._settler.next_look()):
                    self._round()
        except (StopAsked, WireClosed):
            return
        finally:
            self._hints.stop()
            self._rows.close()

    # --- waiting ---

    def _wake(self) -> None:
        """Called by watchdog's threads."""
        try:
            os.eventfd_write(self._woken, 1)
        except BlockingIOError:  # woken 2**64 times already
            pass

    def _rest(self) -> None:
        """Sleep until something is due, and take in what woke us."""
        due = min(self._pace.next_scan(self._settler.next_look()), self._glance_at)
        listening: list[Channel[WatcherIn] | int] = [self._channel]
        if not self._pace.has_hint:  # one is enough: a flood of events must not keep the loop turning
            listening.append(self._woken)
        readable, _, _ = select.select(listening, [], [], max(0.0, due - time.monotonic()))
        if self._woken in readable:
            self._pace.hinted(time.monotonic())
        if self._channel in readable:
            self._serve(self._channel.receive())
        if time.monotonic() >= self._glance_at:
            self._glance()

    def _forget_wakes(self) -> None:
        """What woke us before a scan is answered by that scan."""
        try:
            os.eventfd_read(self._woken)
        except BlockingIOError:  # nothing did
            pass

    def _breathe(self) -> None:
        """Serve the wire in the middle of a long scan."""
        if time.monotonic() >= self._breathed_at + BREATHE_S:
            self._serve(self._channel.wait(0))
            self._breathed_at = time.monotonic()

    def _glance(self) -> None:
        """No event tells that the inbox was unmounted, mounted over or moved away, or that a directory is not watched; one stat does, or
        a second count."""
        self._glance_at = time.monotonic() + self._order.poll_s
        exchanged = self._identity is not None and self._identity != _identity(self._order.path)
        if exchanged or self._hints.uneasy:
            self._pace.hinted(time.monotonic())

    # --- the wire ---

    def _serve(self, frames: Iterable[Frame[WatcherIn]]) -> None:
        for frame in frames:
            for descriptor in frame.descriptors:  # none belongs here
                os.close(descriptor)
            match frame.message:
                case AskShare():
                    self._ask_share()
                case OpenSource(job=job, sighting=sighting):
                    self._open(job, sighting)
                case ScanNow():
                    self._owed = True
                    self._pace.asked()
                case Stop():
                    raise StopAsked("asked to stop")
                case WatchInbox():
                    logger.error("cannot watch another inbox: one process watches one")

    def _ask_share(self) -> None:
        """Come back with an answer, or hang with the share: how full it is can be known from no cache."""
        with contextlib.suppress(OSError):  # absent, or broken: the next scan will say it better
            os.statvfs(self._order.path)
        self._channel.send_all(ShareAnswered())

    def _open(self, job: int, sighting: Sighting) -> None:
        try:
            descriptor = name_only(open_source(self._order.path, sighting))
        except CannotOpen as error:
            self._channel.send_all(SourceLost(job=job, reason=error.reason, what=str(error)))
            self._doubt({sighting.path.rpartition(b"/")[0]})
            self._pace.hinted(time.monotonic())
        else:
            self._channel.send_all(SourceOpened(job=job), (descriptor,))

    # --- one round ---

    def _round(self) -> None:
        """Scan once and tell what changed, or tell that it cannot be done."""
        began, busy_s = time.monotonic(), time.process_time()
        self._forget_wakes()
        owed = self._owed
        try:
            self._begin(began)
            scan = self._scan(began)
        except InboxAbsent as error:
            self._go_down(error)
            self._pace.ended(time.monotonic())
            return
        self._down_for = ""
        self._complete = scan.complete
        took_s = time.monotonic() - began
        self._doubt(self._rows.follow())
        self._settler.ledger_moved(self._rows.known)
        report = self._settler.finish(scan, self._rows.known, began, self._rows.all, self._rows.twins)
        self._hints.count(scan.directories, time.monotonic())
        self._pace.polling, self._pace.down = self._hints.polling, False
        news = self._tell(scan, report, took_s, owed=owed)
        self._pace.ended(time.monotonic(), busy_s=time.process_time() - busy_s, news=news)

    def _begin(self, now: float) -> None:
        """Decide how much is listed, and know which directory and which rows it is held against. Raises InboxAbsent."""
        everything = self._owed or not self._complete or self._settler.has_room or self._pace.wants_everything(now)
        self._owed = False
        self._pace.begins(now, everything=everything)
        self._meet_inbox()
        heard = self._hints.take()
        self._doubt(self._rows.catch_up(now))
        self._settler.ledger_moved(self._rows.known)
        everything = everything or heard is None or self._doubted is None
        self._folders.begin(everything=everything, doubted=(self._doubted or set()) | (heard or set()))
        self._doubted = set()
        self._everything = everything
        self._rows.known.begin()
        self._settler.begin(everything=everything)

    def _meet_inbox(self) -> None:
        """Know which directory the inbox is now, and have hints from that one. Raises InboxAbsent."""
        try:
            found = os.stat(self._order.path)
        except OSError as error:
            self._identity = None
            self._hints.stop()
            raise absent(self._order.path, error) from error
        if self._identity != (found.st_dev, found.st_ino):
            self._identity = (found.st_dev, found.st_ino)
            self._network = is_network(filesystem_type(self._order.path))
            self._settler.steady_inodes = not self._network
            self._folders = Folders()
        native = self._order.events == "native" or (self._order.events == "auto" and not self._network)
        self._hints.keep(self._identity, native=native)

    def _doubt(self, folders: set[bytes] | None) -> None:
        """Have these directories (None: all) listed by the next scan, changed or not."""
        self._doubted = None if folders is None or self._doubted is None else self._doubted | folders

    def _scan(self, began: float) -> ScanResult:
        """Walk over the inbox, and tell what is new as it comes. Raises InboxAbsent."""
        self._lap = began
        singles = {} if self._everything else self._singles(began)
        scan = Walk(self._rules, self._take_in, breathe=self._breathe, folders=self._folders, singles=singles).over(self._order.path)
        if self._settler.looks_unmounted(scan, self._rows.known):
            raise InboxAbsent(
                f"cannot trust the inbox {printable(self._order.path)}: it is empty and on another device than before",
                hint="is the share mounted?",
            )
        return scan

    def _singles(self, now: float) -> dict[bytes, list[bytes]]:
        """Files to look at in directories that are not listed: those that are waited for, and profiles."""
        singles: dict[bytes, list[bytes]] = defaultdict(list)
        for path in (*self._settler.due(now), *islice(self._profiles.paths, PROFILES_LOOKED_AT)):
            folder, _, name = path.rpartition(b"/")
            singles[folder].append(name)
        return singles

    def _take_in(self, entries: list[Entry], dev: int) -> None:
        """A batch of recordings from the walk."""
        over = time.monotonic()
        self._settler.observe(entries, dev, self._rows.known, self._lap, over)
        self._lap = over
        seen = self._settler.report.seen
        if len(seen) >= BATCH:
            self._told_early = True
            self._channel.send_all(Sightings(seen=tuple(seen)))
            seen.clear()

    def _still_written(self, sighting: Sighting) -> bool:
        self._breathe()
        return still_written(self._order.path, sighting, leases=not self._network)

    # --- telling ---

    def _go_down(self, error: InboxAbsent) -> None:
        self._owed = True  # the next scan that succeeds says that the inbox is up
        self._pace.down = True
        if self._down_for != error.what:
            self._down_for = error.what
            self._channel.send_all(InboxDown(what=error.what, hint=error.hint))

    def _tell(self, scan: ScanResult, report: Report, took_s: float, *, owed: bool) -> bool:
        """Changes first, then the scan's own figures: who waits for `unsettled == 0` has everything by then. True: there was news."""
        self._complain({**scan.hidden, **scan.skipped})
        for profiles in self._profiles.news(scan):
            self._channel.send_all(profiles)
        for start in range(0, report.most, BATCH):
            self._channel.send_all(_part(report, slice(start, start + BATCH)))
        figures = (scan.files, report.unsettled, scan.left_out)
        news, self._told_early = bool(report.most) or self._told_early, False
        now = time.monotonic()
        if owed or news or figures != self._said or now >= self._said_at + self._order.rescan_s:
            self._said, self._said_at = figures, now
            files, unsettled, left_out = figures
            self._channel.send_all(
                Scanned(files=files, unsettled=unsettled, left_out=left_out, took_s=round(took_s, 6), network=self._network)
            )
        return news

    def _complain(self, reasons: dict[bytes, str]) -> None:
        for path in reasons.keys() - self._complained:
            logger.warning("left out {} of the inbox {}: {}", printable(path), printable(self._order.path), reasons[path])
        self._complained = set(reasons)


def _part(report: Report, part: slice) -> Sightings:
    return Sightings(
        seen=tuple(report.seen[part]),
        settled=tuple(report.settled[part]),
        vanished=tuple(report.vanished[part]),
        renamed=tuple(report.renamed[part]),
        doubted=tuple(report.doubted[part]),
    )


def _identity(path: bytes) -> Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
