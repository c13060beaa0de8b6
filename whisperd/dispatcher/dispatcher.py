"""dispatcher: the reconciling loop. Events wake it; it compares what is wanted with what is, and takes one step.

Owns: claim → run → checkpoint → finish → publish, by the verbs of the ledger. Fails loudly: an exception here stops the daemon,
since the ledger is the truth and systemd starts us again.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

from loguru import logger

from whisperd.child import Life, blames_the_work, kernel_memory_kills
from whisperd.config import Settings
from whisperd.dispatcher import optimiser, queueing, retry
from whisperd.dispatcher.delivery import Delivery
from whisperd.dispatcher.gauge import Gauge
from whisperd.dispatcher.intake import Intake
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.pool import Engine, Pool
from whisperd.dispatcher.staging import DIRECTORY, StagingFailed, stage
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, LeaseLost, Ledger
from whisperd.vocabulary import Failure, FailureKind, Plan, Sighting, Summary, assemble
from whisperd.wire import Abandoned, Finished, Frame, JobFailed, LoadModel, Progress, Transcribe, WindowDone

PROGRESS_STORE_S = 2.0
OUTBOX_REFUSALS_MAX = 3


class Dispatcher:
    """All children and all running jobs of one daemon."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ledger: Ledger, settings: Settings) -> None:
        self._loop = loop
        self._ledger = ledger
        self._settings = settings
        self._random = random.Random()
        self._wake_pending = False
        self._data_version = 0
        self._memory_kills = kernel_memory_kills()
        self._stored_progress: dict[int, float] = {}
        self.stopping = False
        self.steps = 0  # the loop's own progress, for the watchdog
        self.plan: Plan | None = None
        self.choice: optimiser.Choice | None = None
        os.makedirs(os.path.join(ledger.state_dir, DIRECTORY), exist_ok=True)
        nursery = Nursery(loop, on_end=self.wake)
        self.nursery = nursery
        self.gauge = Gauge(nursery, ledger, on_change=self.wake)
        self.pool = Pool(nursery, on_frame=self._engine_said, on_death=self._engine_died)
        self.intake = Intake(nursery, ledger, on_opened=self._source_opened, on_lost=self._source_lost, on_news=self.wake)
        self.delivery = Delivery(nursery, ledger, on_news=self.wake)

    # --- life ---

    def start(self) -> None:
        """Take up the work where the ledger says it was left."""
        for job in self._ledger.interrupt_other_epochs(time.time()):
            logger.bind(job=job, event="interrupted").info(f"job {job} was running when the daemon ended; it goes on")
        self.apply(self._settings)

    def apply(self, settings: Settings) -> None:
        """Settings may change while running: inboxes come and go, engines are replaced when their model changed."""
        self._settings = settings
        self.intake.apply(settings)
        self.delivery.apply(settings)
        self.wake()

    def stop(self) -> None:
        """Ask every child to end at its next boundary; `stopped` tells when."""
        self.stopping = True
        now = time.monotonic()
        for engine in list(self.pool.engines.values()):
            self.pool.drain(engine, now)
        self.intake.stop()
        self.gauge.stop()
        self.wake()

    def stop_delivery(self) -> None:
        """Last: what was finished meanwhile has been handed out."""
        self.delivery.stop()

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

    def _step(self) -> None:
        self._wake_pending = False
        self.steps += 1
        now = time.monotonic()
        self.delivery.tick(now)
        self.pool.enforce_kills(now)
        if self.stopping:
            return
        self.gauge.tick(now)
        self.intake.tick(now)
        self._follow_operator()
        self._make_plan(now)
        self.pool.step(self.plan.workers if self.plan else 0, now)
        self._stop_stalled(now)
        self._hand_out(now)

    def _make_plan(self, now: float) -> None:
        if not self.gauge.readings:
            return
        settings = self._settings
        plan = optimiser.decide(workers=settings.dispatcher.workers, readings=self.gauge.readings)
        if plan != self.plan:
            self.plan = plan
            self._ledger.record_plan(plan, time.time())
            logger.bind(event="plan").info(f"plan: {plan.workers} worker{'s' if plan.workers != 1 else ''} ({plan.reason})")
        hardware = optimiser.hardware_of(self.gauge.readings, cores=_cores(), memory_mib=_memory_mib())
        choice = optimiser.choose(settings.engine.model, settings.engine.device, settings.engine.compute_type, hardware)
        if choice != self.choice:
            self.choice = choice
            logger.bind(event="model").info(f"model: {choice.reason}")
        self.pool.load(self._load_request(choice, plan), now)

    def _load_request(self, choice: optimiser.Choice, plan: Plan) -> LoadModel:
        engine = self._settings.engine
        return LoadModel(
            model=choice.model,
            device=choice.device,
            compute_type=choice.compute_type,
            cpu_threads=engine.cpu_threads or max(1, _cores() // plan.workers),
            cache_dir=self._settings.cache_dir,
            offline=engine.offline,
            duration_max_s=engine.duration_max_s,
            channels_max=engine.channels_max,
            rate_max_hz=engine.rate_max_hz,
        )

    def _follow_operator(self) -> None:
        """The command line writes to the ledger as well: drop the work on jobs that are not ours any more."""
        version = self._ledger.data_version()
        if version == self._data_version:
            return
        self._data_version = version
        for engine in self.pool.working():
            row = self._ledger.job(engine.job or 0)
            if row["state"] != "running" or row["lease_child"] != engine.child.name:
                self._drop(engine)

    def _drop(self, engine: Engine) -> None:
        if engine.sent:
            self.pool.abandon(engine)
        else:
            self.pool.release(engine, time.monotonic())

    def _stop_stalled(self, now: float) -> None:
        stall_s = self._settings.dispatcher.stall_s
        for engine in self.pool.working():
            if now - engine.moved_at > stall_s and engine.child.life is not Life.KILLING:
                self.pool.kill(engine, f"no progress for {stall_s:g} s", now)

    def _hand_out(self, now: float) -> None:
        idle = self.pool.idle()
        if not idle:
            return
        wall = time.time()
        ready = self._ledger.ready(wall)
        inboxes = self.intake.usable()
        for engine in idle:
            row = queueing.next_job(ready, wall, inboxes=inboxes)
            if row is None:
                return
            ready.remove(row)
            self._claim(engine, row, now, wall)

    def _claim(self, engine: Engine, row: dict[str, Any], now: float, wall: float) -> None:
        job = row["id"]
        try:
            self._ledger.claim(job, engine.child.name, wall, lease_s=self._lease_s)
        except IllegalMove:  # the operator was faster: it is not ready any more
            return
        self.pool.assign(engine, job, now)
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event="claimed", child=engine.child.name).info(
            f"job {job} started on {engine.child.name}, attempt {row['attempts'] + 1}: {printable(row['path'])}"
        )
        sighting = Sighting(**{name: row[name] for name in ("path", "dev", "inode", "size", "mtime_ns", "ctime_ns")})
        self.intake.open(row["inbox_id"], job, sighting)

    @property
    def _lease_s(self) -> float:
        return self._settings.dispatcher.stall_s

    # --- the source ---

    def _source_opened(self, job: int, descriptor: int) -> None:
        engine = self.pool.of_job(job)
        if engine is None or engine.sent or engine.child.life is not Life.BUSY:
            os.close(descriptor)
            return
        row = self._ledger.job(job)
        windows = self._ledger.windows(job)
        last = windows[-1] if windows else None
        engine.sent = True
        self.pool.send(
            engine,
            Transcribe(
                job=job,
                options=self._ledger.options(row),
                windows_done=len(windows),
                position_s=last.end_s if last else 0.0,
                language=last.language if last else "",
                language_probability=last.language_probability if last else 0.0,
            ),
            (descriptor,),
        )

    def _source_lost(self, job: int, reason: str, what: str) -> None:
        engine = self.pool.of_job(job)
        if engine is None or engine.sent:
            return
        try:
            self._not_started(job, engine.child.name, reason, what)
        except (LeaseLost, IllegalMove) as error:  # cancelled or replaced meanwhile
            logger.bind(job=job).info(f"job {job}: {error}")
        self.pool.release(engine, time.monotonic())

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

    def _engine_said(self, engine: Engine, frame: Frame[Any]) -> None:
        for descriptor in frame.descriptors:  # engines send none; what parsed hostile media may try
            os.close(descriptor)
        message = frame.message
        if getattr(message, "job", engine.job) == engine.job and engine.job is not None:
            engine.moved_at = time.monotonic()
            try:
                self._store(engine, engine.job, message)
            except (LeaseLost, IllegalMove) as error:  # cancelled or replaced meanwhile: its work is not wanted
                logger.bind(job=engine.job).info(f"job {engine.job}: {error}; its work is dropped")
                self._forget(engine, message)
        self.wake()

    def _forget(self, engine: Engine, message: object) -> None:
        if isinstance(message, Finished | JobFailed | Abandoned):
            self.pool.release(engine, time.monotonic())
        else:
            self.pool.abandon(engine)

    def _store(self, engine: Engine, job: int, message: object) -> None:
        now, child = time.time(), engine.child.name
        match message:
            case Progress(position_s=position_s, duration_s=duration_s):
                if now - self._stored_progress.get(job, 0.0) >= PROGRESS_STORE_S:
                    self._stored_progress[job] = now
                    self._ledger.progress(job, child, position_s, duration_s, now, lease_s=self._lease_s)
            case WindowDone(window=window, duration_s=duration_s):
                self._ledger.checkpoint(job, child, window, now, lease_s=self._lease_s, duration_s=duration_s)
            case Finished(summary=summary):
                self._finish(engine, job, summary)
            case JobFailed(failure=failure):
                self._job_failed(engine, job, failure)
            case Abandoned():
                self._interrupted(engine, job, "it was stopped at a boundary")

    def _finish(self, engine: Engine, job: int, summary: Summary) -> None:
        row = self._ledger.job(job)
        windows = self._ledger.windows(job)
        if [window.index for window in windows] != list(range(summary.windows)):
            failure = Failure(kind=FailureKind.TRANSIENT, code="windows_missing", what="the engine did not report every window")
            self._job_failed(engine, job, failure)
            return
        transcript = assemble(
            source=printable(os.path.basename(row["path"])),
            size=row["size"],
            mtime_ns=row["mtime_ns"],
            windows=windows,
            options=self._ledger.options(row),
            summary=summary,
        )
        now = time.time()
        name = f"{job}.json"
        try:
            stage(self._ledger.state_dir, name, transcript)
        except StagingFailed as error:
            self._job_failed(engine, job, Failure(kind=FailureKind.WAITING, code=error.code, what=error.what, hint=error.hint))
            return
        process_s = round(now - row["started_at"], 3)
        with self._ledger.transaction():
            self._ledger.finish(
                job,
                engine.child.name,
                now,
                transcript=name,
                sha256=summary.source_sha256,
                duration_s=summary.duration_s,
                language=transcript.language,
                process_s=process_s,
            )
            self._ledger.record_throughput(job, workers=len(self.pool.working()), audio_s=summary.duration_s, wall_s=process_s, now=now)
        self._stored_progress.pop(job, None)
        self.pool.release(engine, time.monotonic())
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event="transcribed").info(
            f"job {job} transcribed: {summary.duration_s:.1f} s of audio in {process_s:.1f} s, {len(transcript.segments)} segments"
        )

    def _job_failed(self, engine: Engine, job: int, failure: Failure, *, tail: str = "", at_once: bool = False) -> None:
        """Decide what a failure means, store it, free the slot."""
        now, child = time.time(), engine.child.name
        row = self._ledger.job(job)
        log = logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), child=child)
        settings = self._settings.dispatcher
        self._stored_progress.pop(job, None)
        if failure.code == "changed_while_read":
            self._ledger.vanish(job, now, note=failure.what)
            self.intake.scan_now(row["inbox_id"])
            log.bind(event="changed").info(f"job {job}: {failure.what}")
        else:
            backoff = retry.Backoff(**settings.backoff.model_dump())
            verdict = retry.after_failure(
                failure,
                attempts=row["attempts"],
                attempts_max=settings.attempts_max,
                now=now,
                backoff=backoff,
                chance=self._random.random(),
                at_once=at_once,
            )
            match verdict:
                case retry.Fail():
                    self._ledger.fail(job, child, failure, now, tail=tail)
                    log.bind(event="failed").error(f"job {job} failed: {failure.what}")
                case retry.Retry(not_before=not_before):
                    self._ledger.release(job, child, failure, now, not_before=not_before, tail=tail)
                    log.bind(event="retry").warning(
                        f"job {job} attempt {row['attempts']} of {settings.attempts_max} failed: {failure.what}; "
                        f"again in {not_before - now:.0f} s"
                    )
                    self._loop.call_later(max(0.0, not_before - now) + 0.01, self.wake)
                case retry.Wait(not_before=not_before):
                    self._ledger.wait(job, child, failure, now, not_before=not_before)
                    log.bind(event="waits").warning(f"job {job} waits: {failure.what}; {failure.hint}")
        self.pool.release(engine, time.monotonic())

    def _interrupted(self, engine: Engine, job: int, why: str) -> None:
        """Not the file's fault: ready again at once, the attempt given back."""
        self._ledger.interrupt(job, engine.child.name, why, time.time())
        logger.bind(job=job, event="interrupted", child=engine.child.name).info(f"job {job} interrupted: {why}")
        self.pool.release(engine, time.monotonic())

    def _engine_died(self, engine: Engine, how: str) -> None:
        job, child = engine.job, engine.child
        memory_kills = kernel_memory_kills()
        ran_out = memory_kills > self._memory_kills
        self._memory_kills = memory_kills
        if job is not None:
            engine.job = None
            try:
                self._blame_or_not(engine, job, how, ran_out=ran_out)
            except (LeaseLost, IllegalMove) as error:  # cancelled meanwhile
                logger.bind(job=job).info(f"job {job}: {error}")
        if not self.stopping and engine.model:
            logger.bind(child=child.name).log(
                "INFO" if child.process.returncode == 0 else "WARNING", f"{child.name} (pid {child.pid}) {how}"
            )
        self.wake()

    def _blame_or_not(self, engine: Engine, job: int, how: str, *, ran_out: bool) -> None:
        row = self._ledger.job(job)
        code = engine.child.process.returncode
        stopped_by_us = self.stopping or engine.child.life is Life.DRAINING or code == 0
        killed_for_stall = bool(engine.child.killed_by_us) and not self.stopping
        blamed = not stopped_by_us and blames_the_work(code, memory_ran_out=ran_out, killed_by_us=killed_for_stall)
        if not engine.sent or (not blamed and row["interruptions"] < retry.INTERRUPTIONS_MAX):
            self._interrupted(engine, job, f"{engine.child.name} {how}")
            return
        at = f" at {row['position_s']:.0f} s" if row["position_s"] else " at its beginning"
        memory = ", the machine ran out of memory" if ran_out else ""
        failure = Failure(
            kind=FailureKind.TRANSIENT,
            code="worker_died",
            what=f"the worker {how}{memory} while it worked on this file{at}",
            hint="if only this file does it, the recording crashes the decoder: convert it to another format and drop it again",
        )
        self._job_failed(engine, job, failure, tail="\n".join(engine.child.last_lines), at_once=True)

    # --- draining (`run --once`) ---

    def drained(self) -> bool:
        """Whether every inbox was looked through and every file in it has its transcript or its error file.

        What is only `seen` is the watchers' to say: a row of a share that is not mounted any more stays seen, and nobody waits for it.
        """
        work = self._ledger.open_work()
        return self.intake.settled() and self.delivery.idle() and not (work["ready"] or work["running"] or work["unpublished"])

    def hopeless(self) -> str:
        """Why a one-time run can never be drained without somebody's help; "" while it can."""
        if self.pool.blocked is not None and self._ledger.open_work()["ready"]:
            return f"{self.pool.blocked.what} ({self.pool.blocked.hint})"
        for inbox in self.intake.inboxes.values():
            if inbox.down:
                return inbox.down
        stuck = self.delivery.stuck(OUTBOX_REFUSALS_MAX)
        if stuck:
            return stuck[0]
        waiting = self._ledger.only_waiting_work_left()
        if waiting and not self.pool.working() and self.intake.settled():
            return waiting
        return ""


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _memory_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20
