"""intake: watcher children → ledger rows. One watcher process for each inbox; a share that hangs stops only its own.

Owns: which inboxes are watched and which are down, and the requests to open a source. What is made of a report is `acceptance`'s.

Every watcher is asked every few seconds whether its share answers. One that does not say so hangs in the kernel: no new work is begun
there, soon the inbox is down, and later that process is killed, in case another one would get an answer. Its word ends all that. The
daemon itself never touches an inbox.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from loguru import logger

from whisperd.child import Child, Life
from whisperd.config import InboxSettings, Settings
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.errors import printable
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Sighting
from whisperd.wire import (
    AskShare,
    Frame,
    InboxDown,
    OpenSource,
    Profiles,
    Scanned,
    ScanNow,
    ShareAnswered,
    Sightings,
    SourceLost,
    SourceOpened,
    WatcherOut,
    WatcherReady,
    WatchInbox,
)

ASK_S = 5.0
"""So long after an answer a watcher is asked again."""
DOUBT_S = 5.0
"""While an answer takes longer than that nothing is begun in that inbox."""
SILENT_S = 10.0
"""A watcher that answers nothing for so long hangs on its share: the inbox is down."""
KILL_S = 120.0
"""And for so long: it is killed. (Not sooner: where the share does answer after all it goes on, and knows what it knew.)"""

Opened = Callable[[int, int], None]  # job, descriptor
Lost = Callable[[int, str, str], None]  # job, reason, what


class Question(NamedTuple):
    """A watcher was asked for a descriptor."""

    opened: Opened
    lost: Lost


@dataclass
class Pulse:
    """Whether a watcher answers, in seconds of one monotonic clock (pure)."""

    asked_at: float | None = None  # and not answered since
    answered_at: float = float("-inf")

    def waited_s(self, now: float) -> float:
        return 0.0 if self.asked_at is None else now - self.asked_at

    def wants_asking(self, now: float) -> bool:
        return self.asked_at is None and now - self.answered_at >= ASK_S

    def heard(self, now: float) -> None:
        """It said something else: who speaks does not hang, though he may be busy."""
        if self.asked_at is not None:
            self.asked_at = now

    def answered(self, now: float) -> None:
        self.asked_at, self.answered_at = None, now


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
    absent: str = ""  # why its watcher cannot list it
    silent: str = ""  # that its watcher does not answer
    pulse: Pulse = field(default_factory=Pulse)
    opening: dict[int, Question] = field(default_factory=dict)  # by job

    @property
    def down(self) -> str:
        """Why nothing of it can be read; "" when it is up."""
        return self.silent or self.absent


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
            place=hello.path,
        )
        return Inbox(number=number, settings=inbox, hello=hello, keeper=keeper)

    def tick(self, now: float) -> None:
        for inbox in self.inboxes.values():
            self._judge_silence(inbox, now)  # before another watcher takes its place, which knows nothing of what this one was asked
            inbox.keeper.tick(now)

    def _judge_silence(self, inbox: Inbox, now: float) -> None:
        """Nothing that a watcher is asked takes long, in the middle of a scan either; one that does not answer is stuck on its share."""
        if inbox.keeper.child is None:
            inbox.pulse = Pulse()
            self._lose_all(inbox, "unanswered", f"the watcher of {inbox.settings.path} ended")
            return
        if inbox.pulse.wants_asking(now):
            inbox.pulse.asked_at = now
            inbox.keeper.send(AskShare())
        waited_s, what = inbox.pulse.waited_s(now), f"the share of {printable(inbox.settings.path)} does not answer"
        if waited_s > SILENT_S:
            self._judge(
                inbox, absent=inbox.absent, silent=what, hint="look whether its server answers; what waits there goes on when it does"
            )
            self._lose_all(inbox, "down", what)
        if waited_s > KILL_S and inbox.keeper.child.life is not Life.KILLING:
            inbox.keeper.kill(what)

    def _lose_all(self, inbox: Inbox, reason: str, what: str) -> None:
        for job in list(inbox.opening):
            self._lost(inbox, job, reason, what)

    def usable(self) -> set[int]:
        """Inboxes whose watchers can open files."""
        now = time.monotonic()
        return {
            number
            for number, inbox in self.inboxes.items()
            if inbox.keeper.usable and not inbox.down and inbox.pulse.waited_s(now) <= DOUBT_S
        }

    def open(self, inbox: int, job: int, sighting: Sighting, opened: Opened, lost: Lost) -> None:
        """Ask for a source's descriptor; `opened` or `lost` answers, once."""
        if inbox not in self.inboxes:
            lost(job, "down", "its inbox is not configured any more")
            return
        self.inboxes[inbox].opening[job] = Question(opened, lost)
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
        inbox.pulse.heard(time.monotonic())
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
                self._judge(inbox, absent=what, silent="", hint=hint)
            case ShareAnswered():
                self._answers(inbox)
                return  # this is no news
            case SourceOpened(job=job) if frame.descriptors:
                self._opened(inbox, job, frame.descriptors[0])
                return  # whoever asked has it now, and nothing else follows
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

    def _answers(self, inbox: Inbox) -> None:
        inbox.pulse.answered(time.monotonic())
        if inbox.silent and inbox.scanned:  # one that was never listed in this life comes up with its first scan
            self._judge(inbox, absent=inbox.absent, silent="")
            self._on_news()

    def _scanned(self, inbox: Inbox, scan: Scanned) -> None:
        if not inbox.scanned:
            self._ledger.inbox_up(inbox.number, time.time())
        inbox.scanned = True
        inbox.unsettled, inbox.network = scan.unsettled, scan.network
        self._judge(inbox, absent="", silent="")

    def _judge(self, inbox: Inbox, *, absent: str, silent: str, hint: str = "") -> None:
        """Take down why the inbox is down, or that it is not, and say so when that is new."""
        before, inbox.absent, inbox.silent = inbox.down, absent, silent
        if inbox.down == before:
            return
        log = logger.bind(inbox=inbox.settings.path)
        if inbox.down:
            self._ledger.inbox_down(inbox.number, inbox.down, time.time())
            log.bind(event="inbox_down").warning(f"inbox is down: {inbox.down}" + (f"; {hint}" if hint else ""))
        else:
            self._ledger.inbox_up(inbox.number, time.time())
            log.info(f"inbox {inbox.settings.path} is back")
            self._on_report.back(inbox)


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
