"""watch: the loop of one watcher process.

Owns: the order of things. It sleeps until the wire, a hint or the timetable wakes it, scans, holds the scan against the ledger, and tells
the daemon what changed. Whatever cannot be listed is told once as `InboxDown` and tried again; the loop itself ends only with the wire.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable

from loguru import logger

from whisperd.errors import WhisperdError, printable
from whisperd.ledger.connection import filesystem_type, is_network
from whisperd.ledger.queries import Queries
from whisperd.vocabulary import Sighting
from whisperd.watcher.hints import Hints, Identity
from whisperd.watcher.pace import Pace
from whisperd.watcher.scan import InboxAbsent, ScanResult, absent, scan
from whisperd.watcher.settle import Known, Report, Settler
from whisperd.watcher.source import CannotOpen, open_source
from whisperd.watcher.writers import still_written
from whisperd.wire import (
    Channel,
    Frame,
    InboxDown,
    OpenSource,
    Scanned,
    ScanNow,
    Sightings,
    SourceLost,
    SourceOpened,
    Stop,
    WatcherIn,
    WatcherReady,
    WatchInbox,
    WireClosed,
)

BATCH = 250  # of each kind in one frame


class StopAsked(WhisperdError):
    """The daemon asked this process to end."""

    code = "stop_asked"


class Watch:
    """One inbox, watched."""

    def __init__(self, channel: Channel[WatcherIn], order: WatchInbox) -> None:
        self._channel = channel
        self._order = order
        self._ledger = Queries.open(order.ledger)
        self._ledger_version = -1
        self._known: dict[bytes, Known] = {}
        self._settler = Settler(order.quiet_s)
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
            self._ledger.close()

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
        self._serve(self._channel.wait(0))

    def _glance(self) -> None:
        """No event tells that the inbox was unmounted, mounted over or moved away; one stat does."""
        self._glance_at = time.monotonic() + self._order.poll_s
        if self._identity is not None and self._identity != _identity(self._order.path):
            self._pace.hinted(time.monotonic())

    # --- the wire ---

    def _serve(self, frames: Iterable[Frame[WatcherIn]]) -> None:
        for frame in frames:
            for descriptor in frame.descriptors:  # none belongs here
                os.close(descriptor)
            match frame.message:
                case OpenSource(job=job, sighting=sighting):
                    self._open(job, sighting)
                case ScanNow():
                    self._owed = True
                    self._pace.asked()
                case Stop():
                    raise StopAsked("asked to stop")
                case WatchInbox():
                    logger.error("cannot watch another inbox: one process watches one")

    def _open(self, job: int, sighting: Sighting) -> None:
        try:
            descriptor = open_source(self._order.path, sighting)
        except CannotOpen as error:
            self._channel.send_all(SourceLost(job=job, reason=error.reason, what=str(error)))
            self._pace.hinted(time.monotonic())
        else:
            self._channel.send_all(SourceOpened(job=job), (descriptor,))

    # --- one round ---

    def _round(self) -> None:
        """Scan once and tell what changed, or tell that it cannot be done."""
        began = time.monotonic()
        self._forget_wakes()
        self._pace.begins(began)
        owed, self._owed = self._owed, False
        try:
            self._meet_inbox()
            found = self._scan()
        except InboxAbsent as error:
            self._go_down(error)
            self._pace.ended(time.monotonic())
            return
        self._down_for = ""
        took_s = time.monotonic() - began
        report = self._settler.observe(found, self._known, began, took_s, self._still_written)
        self._hints.count(found.directories, time.monotonic())
        self._pace.polling, self._pace.down = self._hints.polling, False
        self._pace.ended(time.monotonic())
        self._tell(found, report, took_s, owed=owed)

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
        native = self._order.events == "native" or (self._order.events == "auto" and not self._network)
        self._hints.keep(self._identity, native=native)

    def _scan(self) -> ScanResult:
        """One scan, and the ledger as it stands after it. Raises InboxAbsent."""
        order = self._order
        found = scan(order.path, order.exclude, order.include, order.ignore, order.recursive, breathe=self._breathe)
        self._read_ledger()
        if self._settler.looks_unmounted(found, self._known):
            raise InboxAbsent(
                f"cannot trust the inbox {printable(order.path)}: it is empty and on another device than before",
                hint="is the share mounted?",
            )
        return found

    def _read_ledger(self) -> None:
        version = self._ledger.data_version()
        if version != self._ledger_version:
            self._known = {bytes(row["path"]): Known.of(row) for row in self._ledger.latest_per_path(self._order.inbox)}
            self._ledger_version = version

    def _still_written(self, sighting: Sighting) -> bool:
        return still_written(self._order.path, sighting, leases=not self._network)

    # --- telling ---

    def _go_down(self, error: InboxAbsent) -> None:
        self._owed = True  # the next scan that succeeds says that the inbox is up
        self._pace.down = True
        if self._down_for != error.what:
            self._down_for = error.what
            self._channel.send_all(InboxDown(what=error.what, hint=error.hint))

    def _tell(self, found: ScanResult, report: Report, took_s: float, *, owed: bool) -> None:
        """Changes first, then the scan's own figures: who waits for `unsettled == 0` has everything by then."""
        self._complain({**found.hidden, **found.skipped})
        for start in range(0, max(len(report.seen), len(report.settled), len(report.vanished)), BATCH):
            part = slice(start, start + BATCH)
            self._channel.send_all(
                Sightings(seen=tuple(report.seen[part]), settled=tuple(report.settled[part]), vanished=tuple(report.vanished[part]))
            )
        figures = (len(found.sightings), report.unsettled, found.left_out)
        news = bool(report.seen or report.settled or report.vanished) or figures != self._said
        now = time.monotonic()
        if owed or news or now >= self._said_at + self._order.rescan_s:
            self._said, self._said_at = figures, now
            files, unsettled, left_out = figures
            self._channel.send_all(Scanned(files=files, unsettled=unsettled, left_out=left_out, took_s=round(took_s, 6)))

    def _complain(self, reasons: dict[bytes, str]) -> None:
        for path in reasons.keys() - self._complained:
            logger.warning("left out {} of the inbox {}: {}", printable(path), printable(self._order.path), reasons[path])
        self._complained = set(reasons)


def _identity(path: bytes) -> Identity | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
