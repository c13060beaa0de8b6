"""examination: what a settled file is, before it costs an engine anything (docs/decisions/0012).

Owns: one examiner child for each inbox, and three lists of each: settled files whose container is looked at (`examine`), jobs whose
content is read ahead of their turn (`take`), finished ones that may have become another recording (`verify`). A share that hangs stops
only its own inbox; an examiner that dies blames nobody: its file goes on unexamined.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from loguru import logger

from whisperd.child import Child
from whisperd.config import Settings
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.errors import printable
from whisperd.vocabulary import Failure, Media, Sighting
from whisperd.wire import (
    Drop,
    Examine,
    Examined,
    ExamineFailed,
    ExaminerOut,
    ExaminerReady,
    Frame,
    ServeInbox,
    Take,
    TakeFailed,
    Taken,
    Taking,
)

EXAMINED_AT_ONCE = 4
TAKEN_AT_ONCE = 2
WAITING_MAX = 50_000
"""Settled files in one inbox's list at most; the watcher tells of the others again."""
ANSWER_S = 60.0
"""An examiner that is silent for so long with work in hand hangs on its share."""

Deed = Literal["examine", "take", "verify"]


class Errand(NamedTuple):
    """One file, and what is asked of it."""

    deed: Deed
    job: int
    sighting: Sighting
    spool: bool = False


class Findings(Protocol):
    """What examinations end in. `media` is None where nothing could be found out; that is nobody's fault."""

    def examined(self, inbox: int, errand: Errand, media: Media | None) -> None: ...
    def refused(self, inbox: int, errand: Errand, failure: Failure) -> None: ...
    def taken(self, inbox: int, errand: Errand, sha256: str, spooled: bool) -> None: ...
    def lost(self, inbox: int, errand: Errand, reason: str, what: str) -> None: ...


Open = Callable[[int, int, Sighting, Callable[[int, int], None], Callable[[int, str, str], None]], None]
"""`Intake.open`: inbox, job, sighting, what to call with the descriptor, what to call when there is none."""


@dataclass
class Desk:
    """The examiner of one inbox, and what it has to do."""

    number: int
    name: str
    hello: ServeInbox
    keeper: Keeper
    waiting: dict[int, Errand] = field(default_factory=dict)  # by job, as they came
    sent: dict[int, Errand] = field(default_factory=dict)  # the watcher is asked for its descriptor, or the examiner has it
    in_hand: set[int] = field(default_factory=set)  # of these, those that the examiner has
    heard_at: float = 0.0  # monotonic
    down: str = ""

    def count(self, *deeds: Deed) -> int:
        return sum(errand.deed in deeds for errand in self.sent.values())


class Examination:
    """All examiners."""

    def __init__(
        self, nursery: Nursery, spool: str, findings: Findings, *, open_source: Open, on_news: Callable[[], None], module: str
    ) -> None:
        self._nursery = nursery
        self._module = module
        self._spool = spool
        self._findings = findings
        self._open_source = open_source
        self._on_news = on_news
        self._free_min_mib = 0
        self.desks: dict[int, Desk] = {}

    def apply(self, settings: Settings, inboxes: dict[int, str]) -> None:
        """Have an examiner for exactly these inboxes (by number, with their paths)."""
        self._free_min_mib = settings.intake.free_min_mib
        engine = settings.engine
        hello = ServeInbox(
            spool=self._spool, duration_max_s=engine.duration_max_s, channels_max=engine.channels_max, rate_max_hz=engine.rate_max_hz
        )
        for number in list(self.desks):
            if number not in inboxes or self.desks[number].hello != hello:
                self.desks.pop(number).keeper.stop()
        for number, path in inboxes.items():
            if number not in self.desks:
                self.desks[number] = Desk(number=number, name=path, hello=hello, keeper=self._keeper(number, path, hello))

    def _keeper(self, number: int, path: str, hello: ServeInbox) -> Keeper:
        return Keeper(
            self._nursery,
            name=f"examiner-{number}",
            module=self._module,
            receives=ExaminerOut,
            hello=hello,
            on_frame=lambda child, frame: self._frame(number, child, frame),
            place=os.fsencode(path),
        )

    def tick(self, now: float, usable: set[int]) -> None:
        """Send out what may go. `usable`: inboxes whose watchers can open files."""
        for desk in self.desks.values():
            self._judge_silence(desk, now)
            if desk.waiting or desk.sent or desk.keeper.child is not None:  # an inbox without work needs no examiner yet
                desk.keeper.tick(now)
            if desk.keeper.usable and desk.number in usable:
                self._send_out(desk)

    def ask(self, inbox: int, errand: Errand) -> bool:
        """Put an errand on its inbox's list; False when it is there already, or the list is full."""
        desk = self.desks.get(inbox)
        if desk is None or errand.job in desk.waiting or errand.job in desk.sent or len(desk.waiting) >= WAITING_MAX:
            return False
        desk.waiting[errand.job] = errand
        return True

    def busy_with(self, inbox: int, job: int) -> bool:
        desk = self.desks.get(inbox)
        return desk is not None and (job in desk.waiting or job in desk.sent)

    def drop(self, job: int) -> None:
        """This job is not wanted any more."""
        for desk in self.desks.values():
            desk.waiting.pop(job, None)
            if job in desk.in_hand:
                desk.keeper.send(Drop(job=job))
            elif job in desk.sent:
                del desk.sent[job]  # its descriptor is closed when it comes

    def idle(self) -> bool:
        return not any(desk.waiting or desk.sent for desk in self.desks.values())

    def stop(self) -> None:
        for desk in self.desks.values():
            desk.keeper.stop()

    # --- sending ---

    def _send_out(self, desk: Desk) -> None:
        """The oldest first, a few of each kind at once."""
        room = {"examine": EXAMINED_AT_ONCE - desk.count("examine"), "take": TAKEN_AT_ONCE - desk.count("take", "verify")}
        for errand in list(desk.waiting.values()):
            kind = "examine" if errand.deed == "examine" else "take"
            if room[kind] > 0:
                room[kind] -= 1
                self._send(desk, desk.waiting.pop(errand.job))
            if not any(count > 0 for count in room.values()):
                return

    def _send(self, desk: Desk, errand: Errand) -> None:
        desk.sent[errand.job] = errand

        def opened(job: int, descriptor: int) -> None:
            if desk.sent.get(job) is not errand:
                os.close(descriptor)
                return
            if not desk.keeper.usable:
                os.close(descriptor)
                del desk.sent[job]
                return
            desk.in_hand.add(job)
            desk.heard_at = time.monotonic()
            order = Examine(job=job) if errand.deed == "examine" else self._order(errand)
            desk.keeper.send(order, (descriptor,))

        def lost(job: int, reason: str, what: str) -> None:
            if desk.sent.pop(job, None) is errand:
                self._findings.lost(desk.number, errand, reason, what)

        self._open_source(desk.number, errand.job, errand.sighting, opened, lost)

    def _order(self, errand: Errand) -> Take:
        return Take(job=errand.job, spool=errand.spool, free_min_mib=self._free_min_mib)

    # --- what examiners say ---

    def _frame(self, number: int, child: Child[Any], frame: Frame[Any]) -> None:
        for descriptor in frame.descriptors:  # examiners send none; what parsed hostile media may try
            os.close(descriptor)
        desk = self.desks.get(number)
        if desk is None or desk.keeper.child is not child:
            return
        desk.heard_at, desk.down = time.monotonic(), ""
        match frame.message:
            case ExaminerReady():
                child.ready(time.monotonic())
            case Taking():
                pass
            case message:
                self._answered(desk, message)
        self._on_news()

    def _answered(self, desk: Desk, message: Any) -> None:
        errand = desk.sent.pop(message.job, None)
        desk.in_hand.discard(message.job)
        if errand is None:
            return
        match message:
            case Examined(media=media):
                self._findings.examined(desk.number, errand, media)
            case Taken(sha256=sha256, spooled=spooled):
                self._findings.taken(desk.number, errand, sha256, spooled)
            case ExamineFailed(failure=failure) | TakeFailed(failure=failure):
                self._findings.refused(desk.number, errand, failure)

    def _judge_silence(self, desk: Desk, now: float) -> None:
        if desk.keeper.child is None:
            desk.down = ""  # whether the share answers is the watcher's to say
        if desk.keeper.child is None and desk.in_hand:  # it died: of one of these, but which?
            died, desk.in_hand = sorted(desk.in_hand), set()
            for job in died:
                self._died_with(desk, desk.sent.pop(job))
        elif desk.in_hand and now - desk.heard_at > ANSWER_S:
            desk.down = f"the share of {desk.name} does not answer"
            desk.keeper.kill(desk.down)

    def _died_with(self, desk: Desk, errand: Errand) -> None:
        """What killed it may be any of those in its hands: containers are left to the engines, contents are read again."""
        logger.bind(job=errand.job).warning(
            f"the examiner of {desk.name} ended with job {errand.job} in hand: {printable(errand.sighting.path)}"
        )
        if errand.deed == "examine":
            self._findings.examined(desk.number, errand, None)
        else:
            self._findings.lost(desk.number, errand, "unanswered", f"the examiner of {desk.name} ended")
