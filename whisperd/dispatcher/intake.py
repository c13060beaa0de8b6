"""intake: watcher children → ledger rows. One watcher process for each inbox; a share that hangs stops only its own.

Owns: which inboxes are watched and which are down, and the requests to open a source. What is made of a report is `acceptance`'s.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from loguru import logger

from whisperd.child import Child
from whisperd.config import InboxSettings, Settings
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.errors import printable
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Sighting
from whisperd.wire import (
    Frame,
    InboxDown,
    OpenSource,
    Profiles,
    Scanned,
    ScanNow,
    Sightings,
    SourceLost,
    SourceOpened,
    WatcherOut,
    WatcherReady,
    WatchInbox,
)

ANSWER_S = 60.0
"""A watcher that does not open a file within this time hangs on its share."""

Opened = Callable[[int, int], None]  # job, descriptor
Lost = Callable[[int, str, str], None]  # job, reason, what


class Question(NamedTuple):
    """A watcher was asked for a descriptor."""

    at: float  # monotonic
    opened: Opened
    lost: Lost


@dataclass
class Inbox:
    """One inbox and its watcher."""

    number: int
    settings: InboxSettings
    hello: WatchInbox
    keeper: Keeper
    scanned: bool = False
    unsettled: int = 0
    network: bool = False
    down: str = ""
    opening: dict[int, Question] = field(default_factory=dict)  # by job


class Reports(Protocol):
    """Who hears what watchers found."""

    def sightings(self, inbox: Inbox, report: Sightings) -> None: ...
    def profiles_found(self, inbox: Inbox, found: Profiles) -> None: ...
    def back(self, inbox: Inbox) -> None: ...


class Intake:
    """All inboxes."""

    def __init__(self, nursery: Nursery, ledger: Ledger, *, on_report: Reports, on_news: Callable[[], None]) -> None:
        self._nursery = nursery
        self._ledger = ledger
        self._on_report = on_report
        self._on_news = on_news
        self.inboxes: dict[int, Inbox] = {}

    def apply(self, settings: Settings) -> None:
        """Watch exactly the configured inboxes; watchers whose settings did not change go on undisturbed."""
        now = time.time()
        wanted: dict[int, InboxSettings] = {}
        for inbox in settings.inbox:
            number = self._ledger.register_inbox(os.fsencode(inbox.path), os.fsencode(inbox.outbox_path), now)
            wanted[number] = inbox
        self._ledger.retire_inboxes(list(wanted))
        hellos = {number: watch_order(number, inbox, settings) for number, inbox in wanted.items()}
        for number in list(self.inboxes):
            if hellos.get(number) != self.inboxes[number].hello:
                self.inboxes.pop(number).keeper.stop()
        for number, inbox in wanted.items():
            if number in self.inboxes:
                self.inboxes[number].settings = inbox
            else:
                self.inboxes[number] = self._begin(number, inbox, hellos[number])

    def _begin(self, number: int, inbox: InboxSettings, hello: WatchInbox) -> Inbox:
        keeper = Keeper(
            self._nursery,
            name=f"watcher-{number}",
            module="whisperd.watcher",
            receives=WatcherOut,
            hello=hello,
            on_frame=lambda child, frame: self._frame(number, child, frame),
        )
        return Inbox(number=number, settings=inbox, hello=hello, keeper=keeper)

    def tick(self, now: float) -> None:
        for inbox in self.inboxes.values():
            self._judge_silence(inbox, now)  # before another watcher takes its place, which knows nothing of what this one was asked
            inbox.keeper.tick(now)

    def _judge_silence(self, inbox: Inbox, now: float) -> None:
        """Opening a file takes no time; a watcher that cannot is stuck on its share."""
        if inbox.keeper.child is None:
            for job in list(inbox.opening):
                self._lost(inbox, job, "unanswered", f"the watcher of {inbox.settings.path} ended")
        elif inbox.opening and now - min(question.at for question in inbox.opening.values()) > ANSWER_S:
            inbox.keeper.kill(f"the share of {inbox.settings.path} does not answer")
            for job in list(inbox.opening):
                self._lost(inbox, job, "down", f"the share of {inbox.settings.path} does not answer")

    def usable(self) -> set[int]:
        """Inboxes whose watchers can open files."""
        return {number for number, inbox in self.inboxes.items() if inbox.keeper.usable and not inbox.down}

    def open(self, inbox: int, job: int, sighting: Sighting, opened: Opened, lost: Lost) -> None:
        """Ask for a source's descriptor; `opened` or `lost` answers, once."""
        if inbox not in self.inboxes:
            lost(job, "down", "its inbox is not configured any more")
            return
        self.inboxes[inbox].opening[job] = Question(time.monotonic(), opened, lost)
        self.inboxes[inbox].keeper.send(OpenSource(job=job, sighting=sighting))

    def scan_now(self, inbox: int) -> None:
        if inbox in self.inboxes:
            self.inboxes[inbox].keeper.send(ScanNow())

    def scan_all(self) -> None:
        for number in self.inboxes:
            self.scan_now(number)

    def settled(self) -> bool:
        """Whether every inbox was listed since the start and nothing in it is waited for."""
        return all(inbox.scanned and inbox.unsettled == 0 for inbox in self.inboxes.values())

    def stop(self) -> None:
        for inbox in self.inboxes.values():
            inbox.keeper.stop()

    # --- what watchers say ---

    def _frame(self, number: int, child: Child[Any], frame: Frame[Any]) -> None:
        inbox = self.inboxes.get(number)
        if inbox is None or inbox.keeper.child is not child:
            for descriptor in frame.descriptors:
                os.close(descriptor)
            return
        match frame.message:
            case WatcherReady(events=events):
                child.ready(time.monotonic())
                logger.bind(inbox=inbox.settings.path).info(f"watching {printable(inbox.settings.path)} ({events} events)")
            case Profiles() as found:
                self._on_report.profiles_found(inbox, found)
            case Sightings() as report:
                self._on_report.sightings(inbox, report)
            case Scanned() as scan:
                self._scanned(inbox, scan)
            case InboxDown(what=what, hint=hint):
                self._down(inbox, what, hint)
            case SourceOpened(job=job) if frame.descriptors:
                self._opened(inbox, job, frame.descriptors[0])
            case SourceLost(job=job, reason=reason, what=what):
                self._lost(inbox, job, reason, what)
        self._on_news()

    def _opened(self, inbox: Inbox, job: int, descriptor: int) -> None:
        question = inbox.opening.pop(job, None)
        if question is None:
            os.close(descriptor)
        else:
            question.opened(job, descriptor)

    def _lost(self, inbox: Inbox, job: int, reason: str, what: str) -> None:
        question = inbox.opening.pop(job, None)
        if question is not None:
            question.lost(job, reason, what)

    def _scanned(self, inbox: Inbox, scan: Scanned) -> None:
        if inbox.down or not inbox.scanned:
            self._ledger.inbox_up(inbox.number, time.time())
            if inbox.down:
                logger.bind(inbox=inbox.settings.path).info(f"inbox {inbox.settings.path} is back")
                self._on_report.back(inbox)
        inbox.scanned, inbox.down = True, ""
        inbox.unsettled, inbox.network = scan.unsettled, scan.network

    def _down(self, inbox: Inbox, what: str, hint: str) -> None:
        inbox.down = what
        self._ledger.inbox_down(inbox.number, what, time.time())
        logger.bind(inbox=inbox.settings.path, event="inbox_down").warning(f"inbox is down: {what}; {hint}")


def watch_order(number: int, inbox: InboxSettings, settings: Settings) -> WatchInbox:
    return WatchInbox(
        inbox=number,
        path=os.fsencode(inbox.path),
        ledger=settings.state_dir,
        exclude=tuple(sorted({os.fsencode(path) for other in settings.inbox for path in (other.outbox_path, other.archive_path)})),
        include=inbox.include or settings.watcher.include,
        ignore=(*settings.watcher.ignore, *inbox.ignore),
        recursive=inbox.recursive,
        events=inbox.events,
        quiet_s=settings.watcher.quiet_s,
        rescan_s=settings.watcher.rescan_s,
        poll_s=settings.watcher.poll_s,
    )


def sighting_of(row: Mapping[str, Any]) -> Sighting:
    """A job's file as it settled."""
    return Sighting(**{name: row[name] for name in ("path", "dev", "inode", "size", "mtime_ns", "ctime_ns")})
