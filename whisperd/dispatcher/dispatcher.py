"""dispatcher: the reconciling loop. Events wake it; it compares what is wanted with what is, and takes one step.

Owns: who is claimed and sent to whom; the plan is `planning`'s, what becomes of a job then is `work`'s. Fails loudly: an exception here
stops the daemon, since the ledger is the truth and systemd starts us again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from typing import Any

from loguru import logger

from whisperd.child import Life
from whisperd.config import Settings
from whisperd.dispatcher import queueing, resume, retry
from whisperd.dispatcher.acceptance import Acceptance
from whisperd.dispatcher.delivery import Delivery
from whisperd.dispatcher.engines import Engine, Task
from whisperd.dispatcher.gauge import Gauge
from whisperd.dispatcher.notices import Notices
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.planning import Planning
from whisperd.dispatcher.pool import Pool, Recycling
from whisperd.dispatcher.staging import DIRECTORY
from whisperd.dispatcher.work import Work
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, LeaseLost, Ledger
from whisperd.ledger.store import sighting_of
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import BatchDone, Frame

OUTBOX_REFUSALS_MAX = 3
CHOICE = 64  # of each kind of waiting jobs, besides those that are read ahead
LOOK_S = 1.0  # while nobody has room, the queue is read only to see who waits


class Dispatcher:
    """All children and all running jobs of one daemon."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ledger: Ledger,
        settings: Settings,
        *,
        engine_module: str = "whisperd.engine",
        examiner_module: str = "whisperd.engine.examiner",
    ) -> None:
        self._loop = loop
        self._ledger = ledger
        self._settings = settings
        self._wake_pending = False
        self._decide_now = False
        self._data_version = 0
        self._turns = queueing.Turns()
        self._looked_at = 0.0  # monotonic: when the queue was last read
        self.stopping = False
        self.steps = 0  # the loop's own progress, for the watchdog
        os.makedirs(os.path.join(ledger.state_dir, DIRECTORY), exist_ok=True)
        nursery = Nursery(loop, on_end=self.wake)
        self.nursery = nursery
        self.gauge = Gauge(nursery, ledger, on_change=self._cards_changed)
        self.pool = Pool(
            nursery,
            ledger.state_dir,
            on_frame=self._engine_said,
            on_death=self._engine_died,
            module=engine_module,
        )
        self.planning = Planning(ledger, self.gauge, self.pool, settings)
        self.notices = Notices(nursery, ledger, on_news=self.wake)
        self.delivery = Delivery(nursery, ledger, on_news=self.wake)
        self.acceptance = Acceptance(
            nursery,
            ledger,
            settings,
            model_of=self._model_of,
            revision_of=self.pool.revision_of,
            on_faults=self.delivery.complaints.want,
            on_news=self.wake,
            examiner_module=examiner_module,
        )
        self.intake = self.acceptance.intake
        self.work = Work(loop, ledger, self.pool, self.intake, settings.dispatcher, memory=self.planning.memory, on_news=self.wake)

    # --- life ---

    def start(self) -> None:
        """Take up the work where the ledger says it was left."""
        for job in self._ledger.interrupt_other_epochs(time.time()):
            logger.bind(job=job, event="interrupted").info(f"job {job} was running when the daemon ended; it goes on")
        self.apply(self._settings)

    def apply(self, settings: Settings) -> None:
        """Settings may change while running: inboxes come and go, engines are replaced when their model changed."""
        self._settings = settings
        self.work.settings = settings.dispatcher
        self.planning.settings = settings
        self.pool.unload_idle_s = settings.engine.unload_idle_s
        self.pool.recycling = Recycling(
            rss_growth_max_mib=settings.engine.rss_growth_max_mib,
            jobs=settings.dispatcher.recycle_jobs,
            age_s=settings.dispatcher.recycle_s,
        )
        self.acceptance.apply(settings)
        self.delivery.apply(settings)
        self.notices.apply(settings)
        self.wake()

    def stop(self) -> None:
        """Ask every child to end at its next boundary; `stopped` tells when."""
        self.stopping = True
        now = time.monotonic()
        for engine in list(self.pool.engines.values()):
            self.pool.drain(engine, now)
        self.planning.store_learned(time.time())
        self.acceptance.stop()
        self.gauge.stop()
        self.wake()

    def stop_delivery(self) -> None:
        """Last: what was finished meanwhile has been handed out."""
        self.delivery.stop()
        self.notices.stop()

    def kill_engines(self, why: str) -> None:
        for engine in list(self.pool.engines.values()):
            self.pool.kill(engine, why, time.monotonic())

    def kill_all(self, why: str) -> None:
        for child in list(self.nursery.children.values()):
            child.kill(time.monotonic(), why)

    # --- the loop ---

    def wake(self) -> None:
        """Something happened: step soon, once."""
        if not self._wake_pending:
            self._wake_pending = True
            self._loop.call_soon(self._step)

    def _cards_changed(self) -> None:
        self._decide_now = True
        self.wake()

    def _step(self) -> None:
        self._wake_pending = False
        self.steps += 1
        now = time.monotonic()
        self.delivery.tick(now)
        self.notices.tick(now)
        self.pool.enforce_kills(now)
        self.work.store_progress(now)
        if self.stopping:
            return
        self.gauge.tick(now)
        self.acceptance.tick(now)
        self._follow_operator()
        if self._decide_now or self.planning.advice is None or self.pool.events:  # a card was lost, memory ran out: not at the next look
            self._decide_now = False
            self.planning.decide(time.time())
        self.pool.step(self.planning.shares(), now, no_room=self.planning.no_room)
        self._stop_stalled(now)
        self._hand_out(now)

    def optimise(self) -> None:
        """Look at the cards and the queue, and let the plan follow; called by the scheduler every 2 s."""
        if not self.stopping:
            self.planning.decide(time.time())
            self.wake()

    def _follow_operator(self) -> None:
        """The command line writes to the ledger as well: drop the work on jobs that are not ours any more."""
        version = self._ledger.data_version()
        if version == self._data_version:
            return
        self._data_version = version
        now = time.monotonic()
        for engine, job in self.pool.tasks():
            row = self._ledger.job(job)
            if row["state"] != "running" or row["lease_child"] != engine.child.name:
                self.pool.drop(engine, job, now)

    def _stop_stalled(self, now: float) -> None:
        stall_s = self._settings.dispatcher.stall_s
        for engine in self.pool.working():
            if now - engine.moved_at > stall_s and engine.child.life is not Life.KILLING:
                engine.stalled = True
                self.pool.kill(engine, f"no progress for {stall_s:g} s", now)

    def _hand_out(self, now: float) -> None:
        seats = self._seats()
        if not any(seat.free > 0 and not seat.suspect for seat in seats) and now - self._looked_at < LOOK_S:
            return
        self._looked_at, wall = now, time.time()
        waiting = self._ledger.ready(wall, CHOICE + self._settings.intake.ahead)
        ready = [self._with_model(row) for row in waiting if self.pool.of_job(row["id"]) is None]  # one cancelled may be
        usable = self.intake.usable()
        ready = [row for row in ready if row["spooled"] or row["inbox_id"] in usable]
        self.acceptance.take_ahead(queueing.in_order(ready, wall, in_hand=self._in_hand(), turns=self._turns))
        ready = [row for row in ready if row["sha256"] is not None]
        models = {seat.model for seat in seats}
        quarantined = {model for model in models if queueing.wants_quarantine(ready, seats, model=model)}
        if quarantined != self.planning.quarantined:
            self.planning.quarantined = quarantined
            self.wake()
        if self.no_room():
            return
        stranded = self.planning.strand(ready)
        self._hand_out_among([row for row in ready if row["id"] not in stranded], now, wall, fallback=False)
        if stranded:
            self._hand_out_among([row for row in ready if row["id"] in stranded], now, wall, fallback=True)

    def no_room(self) -> str:
        """Why nothing new is begun, when the disk of the ledger is nearly full; "" else."""
        free_mib, least_mib = self.acceptance.spool.free_mib(), self._settings.intake.free_min_mib
        if free_mib >= least_mib:
            return ""
        return f"the disk of {self._settings.state_dir} has only {free_mib} MiB left ({least_mib} MiB are kept free); files wait for room"

    def _in_hand(self) -> Counter[int]:
        """How many jobs of each inbox are running."""
        return Counter(task.inbox for engine in self.pool.engines.values() for task in engine.tasks.values())

    def _seats(self) -> list[queueing.Seat]:
        return self.pool.seats({card: memory.free_mib for card, memory in self.planning.memory().items()})

    def _hand_out_among(self, ready: list[queueing.Row], now: float, wall: float, *, fallback: bool) -> None:
        """Claim while there is a place. `fallback`: the CPU's places beside the GPUs', which are for such jobs only.

        Of two with the same content and the same question one waits, and is published from the other's transcript.
        """
        if not ready:
            return
        in_hand = self._in_hand()
        making = {(row["sha256"], row["asked"]) for row in self._ledger.running()}
        ready = [row for row in ready if (row["sha256"], row["asked"]) not in making]
        while True:
            seats = [seat for seat in self._seats() if self.planning.is_fallback(self.pool.engines[seat.engine].card) == fallback]
            next_one = queueing.hand_out(ready, seats, wall, in_hand=in_hand, turns=self._turns)
            if next_one is None:
                return
            row, seat = next_one
            ready = [other for other in ready if (other["sha256"], other["asked"]) != (row["sha256"], row["asked"])]
            if self.acceptance.reuse(dict(row)):  # while it waited, its twin got done
                continue
            if self._claim(self.pool.engines[seat.engine], row, now, wall):
                self._turns.take(row, wall)
                in_hand[row["inbox_id"]] += 1

    def _with_model(self, row: dict[str, Any]) -> queueing.Row:
        """The row with the model that it runs with."""
        return {**row, "model": self._model_of(row)}

    def _model_of(self, row: queueing.Row) -> str:
        model = self._ledger.options(row).model
        return (self.planning.choice.model if self.planning.choice else "") if model == "auto" else model

    def _claim(self, engine: Engine, row: queueing.Row, now: float, wall: float) -> bool:
        """Whether it could be claimed: the operator may have been faster, and it is not ready any more."""
        job = row["id"]
        try:
            self._ledger.claim(job, engine.child.name, wall, lease_s=self.work.lease_s)
        except IllegalMove:
            return False
        alone = queueing.suspect(row)
        self.pool.assign(engine, job, Task(inbox=row["inbox_id"], suspect=alone, long=queueing.is_long(row)), now)
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event="claimed", child=engine.child.name).info(
            f"job {job} started on {engine.child.name}, attempt {row['attempts'] + 1}{', alone' if alone else ''}: {printable(row['path'])}"
        )
        copy = self.acceptance.spool.open(job) if row["spooled"] else None
        if copy is not None:
            self._source_opened(job, copy)
        else:
            self.intake.open(row["inbox_id"], job, sighting_of(row), self._source_opened, self._source_lost)
        return True

    # --- the source ---

    def _source_opened(self, job: int, descriptor: int) -> None:
        engine = self.pool.of_job(job)
        if engine is None or engine.ready is None or engine.tasks[job].sent or engine.child.life is not Life.BUSY:
            os.close(descriptor)
            return
        row = self._ledger.job(job)
        options = self._ledger.options(row)
        made_by = resume.fingerprint(engine.ready, options, row)
        try:
            dropped = self._ledger.drop_foreign_checkpoints(job, engine.child.name, made_by, time.time())
        except (LeaseLost, IllegalMove) as error:  # cancelled or replaced meanwhile
            logger.bind(job=job).info(f"job {job}: {error}")
            os.close(descriptor)
            self.pool.release(engine, job, time.monotonic())
            self.wake()
            return
        if dropped:
            logger.bind(job=job, event="checkpoints_dropped").info(
                f"job {job} begins anew: its {dropped} finished windows were made with another model, precision, options or version"
            )
        work = resume.transcribe(job, options, self._ledger.windows(job), self._ledger.front_end(job))
        self.pool.give(engine, work, descriptor, time.monotonic(), made_by=made_by)

    def _source_lost(self, job: int, reason: str, what: str) -> None:
        engine = self.pool.of_job(job)
        if engine is None or engine.tasks[job].sent:
            return
        try:
            self._not_started(job, engine.child.name, reason, what)
        except (LeaseLost, IllegalMove) as error:  # cancelled or replaced meanwhile
            logger.bind(job=job).info(f"job {job}: {error}")
        self.pool.release(engine, job, time.monotonic())

    def _not_started(self, job: int, child: str, reason: str, what: str) -> None:
        """What a source that cannot be opened means for its job. Raises LeaseLost, IllegalMove."""
        now = time.time()
        match reason:
            case "gone" | "changed":
                self._ledger.vanish(job, now, note=what)
                self.intake.scan_now(self._ledger.job(job)["inbox_id"])
            case "unanswered":  # its watcher died, and another is on its way: the job is claimed again when that one is ready
                self._ledger.interrupt(job, child, what, now)
            case _:
                failure = Failure(kind=FailureKind.WAITING, code=f"source_{reason}", what=what)
                self._ledger.wait(job, child, failure, now, not_before=now + retry.WAITING_PAUSE_S)
        logger.bind(job=job, event=reason).info(f"job {job} not started: {what}")

    # --- the engine ---

    def _engine_died(self, engine: Engine, how: str) -> None:
        self.work.engine_died(engine, how, stopping=self.stopping)
        self._looked_at = 0.0  # who waits may have become a suspect: look before the next engine takes him

    def _engine_said(self, engine: Engine, frame: Frame[Any]) -> None:
        for descriptor in frame.descriptors:  # engines send none; what parsed hostile media may try
            os.close(descriptor)
        if isinstance(frame.message, BatchDone) and engine.ready is not None:
            self.gauge.learn_peak(engine.card, engine.ready, frame.message)
        self.work.engine_said(engine, frame.message)

    # --- draining (`run --once`) ---

    def drained(self) -> bool:
        """Whether every inbox was looked through and every file in it has its transcript or its error file.

        What is only `seen` is the watchers' to say: a row of a share that is not mounted any more stays seen, and nobody waits for it.
        """
        work = self._ledger.open_work()
        idle = self.intake.settled() and self.acceptance.idle() and self.delivery.idle() and self.notices.idle(time.time())
        return idle and not (work["ready"] or work["running"] or work["unpublished"])

    def hopeless(self) -> str:
        """Why a one-time run can never be drained without somebody's help; "" while it can."""
        if self.pool.blocked is not None and self._ledger.open_work()["ready"]:
            return f"{self.pool.blocked.what} ({self.pool.blocked.hint})"
        if stands_still := next(iter(self.acceptance.down()), "") or self.no_room():
            return stands_still
        stuck = self.delivery.stuck(OUTBOX_REFUSALS_MAX)
        if stuck:
            return stuck[0]
        waiting = self._ledger.only_waiting_work_left()
        if waiting and not self.pool.working() and self.intake.settled():
            return waiting
        return ""
