"""work: what becomes of the jobs in engines' hands, from the first window to the transcript or the failure.

Owns: checkpoints, leases, staged transcripts, what a failure means for the next attempt and whom a death blames. Fails loudly, as the
loop that calls it does.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Mapping

import msgspec
from loguru import logger

from whisperd.child import blames_the_work, kernel_memory_kills
from whisperd.config import DispatcherSettings
from whisperd.dispatcher import retry, reuse
from whisperd.dispatcher.engines import Engine, Memory
from whisperd.dispatcher.intake import Intake
from whisperd.dispatcher.pool import Pool
from whisperd.dispatcher.staging import StagingFailed, stage
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, LeaseLost, Ledger
from whisperd.vocabulary import Failure, FailureKind, Summary, assemble
from whisperd.wire import Abandoned, Finished, JobFailed, Message, Progress, WindowDone

PROGRESS_STORE_S = 2.0
LEASES_RENEW_S = 5.0
NEEDS_MORE_MIB = 64
ALL_OF_A_CARD = 0.9  # the rest is the driver's


class Work:
    """All jobs that run."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        ledger: Ledger,
        pool: Pool,
        intake: Intake,
        settings: DispatcherSettings,
        *,
        memory: Callable[[], Mapping[str, Memory]],
        on_news: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._memory = memory
        self._ledger = ledger
        self._pool = pool
        self._intake = intake
        self._on_news = on_news
        self._random = random.Random()
        self._memory_kills = kernel_memory_kills()
        self._progress: dict[int, Progress] = {}  # the newest of each job, not yet stored
        self._progress_stored_at = 0.0  # monotonic
        self.settings = settings

    @property
    def lease_s(self) -> float:
        return self.settings.stall_s

    def engine_said(self, engine: Engine, message: Message) -> None:
        """A frame of an engine, about one of its jobs or about itself."""
        job = getattr(message, "job", None)
        if job in engine.tasks:
            engine.moved_at = time.monotonic()
            self._renew_leases(engine)
            try:
                self._store(engine, job, message)
            except (LeaseLost, IllegalMove) as error:  # cancelled or replaced meanwhile: its work is not wanted
                logger.bind(job=job).info(f"job {job}: {error}; its work is dropped")
                self._forget(engine, job, message)
        self._on_news()

    def _renew_leases(self, engine: Engine) -> None:
        """A job that waits for others in the same engine makes no progress of its own."""
        if engine.moved_at - engine.renewed_at >= LEASES_RENEW_S:
            engine.renewed_at = engine.moved_at
            self._ledger.renew(engine.child.name, time.time(), lease_s=self.lease_s)

    def _forget(self, engine: Engine, job: int, message: object) -> None:
        now = time.monotonic()
        if isinstance(message, Finished | JobFailed | Abandoned):
            self._pool.release(engine, job, now)
        else:
            self._pool.drop(engine, job, now)

    def _store(self, engine: Engine, job: int, message: object) -> None:
        match message:
            case Progress() as progress:
                self._progress[job] = progress
            case WindowDone(window=window, duration_s=duration_s, front_end=front_end):
                self._progress.pop(job, None)
                self._ledger.checkpoint(
                    job,
                    engine.child.name,
                    window,
                    time.time(),
                    lease_s=self.lease_s,
                    duration_s=duration_s,
                    made_by=engine.tasks[job].made_by,
                    front_end=front_end,
                )
            case Finished(summary=summary):
                self._finish(engine, job, summary)
            case JobFailed(failure=failure):
                self._job_failed(engine, job, failure)
            case Abandoned():
                self._interrupted(engine, job, "it was stopped at a boundary")

    def store_progress(self, now: float) -> None:
        """How far the recordings were read, of all jobs in one transaction."""
        if not self._progress or now - self._progress_stored_at < PROGRESS_STORE_S:
            return
        self._progress_stored_at = now
        waiting, self._progress = self._progress, {}
        wall = time.time()
        with self._ledger.transaction():
            for job, progress in waiting.items():
                engine = self._pool.of_job(job)
                if engine is None:
                    continue
                try:
                    self._ledger.progress(job, engine.child.name, progress.position_s, progress.duration_s, wall, lease_s=self.lease_s)
                except (LeaseLost, IllegalMove) as error:
                    logger.bind(job=job).info(f"job {job}: {error}; its work is dropped")
                    self._pool.drop(engine, job, now)

    def _finish(self, engine: Engine, job: int, summary: Summary) -> None:
        row = self._ledger.job(job)
        windows = self._ledger.windows(job)
        if [window.index for window in windows] != list(range(summary.windows)):
            failure = Failure(kind=FailureKind.TRANSIENT, code="windows_missing", what="the engine did not report every window")
            self._job_failed(engine, job, failure)
            return
        if row["sha256"] not in (None, summary.source_sha256):
            failure = Failure(kind=FailureKind.TRANSIENT, code="changed_while_read", what="the file got another content while it waited")
            self._job_failed(engine, job, failure)
            return
        options = self._ledger.options(row)
        transcript = assemble(
            source=printable(os.path.basename(row["path"])),
            size=row["size"],
            mtime_ns=row["mtime_ns"],
            windows=windows,
            options=options,
            summary=summary,
        )
        now = time.time()
        name = f"{job}.json"
        try:
            size = stage(self._ledger.state_dir, name, transcript)
        except StagingFailed as error:
            self._job_failed(engine, job, Failure(kind=FailureKind.WAITING, code=error.code, what=error.what, hint=error.hint))
            return
        process_s = round(now - row["started_at"], 3)
        wall_s = round(max(0.0, now - max(row["started_at"], engine.finished_at)), 3)  # its slice of a shared engine: slices add up
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
                quality=transcript.quality.verdict,
                asked=reuse.question(options, engine.request.model),
                revision=summary.model_revision,
                size=size,
            )
            self._ledger.record_throughput(job, workers=len(self._pool.working()), audio_s=summary.duration_s, wall_s=wall_s, now=now)
        engine.finished_at = now
        self._release(engine, job)
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event="transcribed").info(
            f"job {job} transcribed: {summary.duration_s:.1f} s of audio in {process_s:.1f} s, {len(transcript.segments)} segments"
            + ("" if transcript.quality.verdict != "doubtful" else ", doubtful")
        )

    def _release(self, engine: Engine, job: int) -> None:
        self._progress.pop(job, None)
        self._pool.release(engine, job, time.monotonic())

    def _job_failed(
        self, engine: Engine, job: int, failure: Failure, *, tail: str = "", at_once: bool = False, shared: bool = False
    ) -> None:
        """Decide what a failure means, store it, free the slot."""
        now, child = time.time(), engine.child.name
        row = self._ledger.job(job)
        log = logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), child=child)
        settings = self.settings
        if failure.code == "changed_while_read":
            self._ledger.vanish(job, now, note=failure.what)
            self._intake.scan_now(row["inbox_id"])
            log.bind(event="changed").info(f"job {job}: {failure.what}")
        else:
            backoff = retry.Backoff(**settings.backoff.model_dump())
            needs_mib, had_all = self._ran_out(engine, failure)
            if not had_all:  # others hold the card's memory: that is not the file's fault
                failure = msgspec.structs.replace(failure, kind=FailureKind.WAITING)
            verdict = retry.after_failure(
                failure,
                attempts=row["attempts"],
                attempts_max=settings.attempts_max,
                now=now,
                backoff=backoff,
                chance=self._random.random(),
                at_once=at_once,
                shared=shared,
            )
            match verdict:
                case retry.Fail():
                    self._ledger.fail(job, child, failure, now, tail=tail)
                    log.bind(event="failed").error(f"job {job} failed: {failure.what}")
                case retry.Retry(not_before=not_before):
                    self._ledger.release(job, child, failure, now, not_before=not_before, tail=tail, needs_mib=needs_mib)
                    log.bind(event="retry").warning(
                        f"job {job} attempt {row['attempts']} of {settings.attempts_max} failed: {failure.what}; "
                        f"again in {not_before - now:.0f} s"
                    )
                    self._loop.call_later(max(0.0, not_before - now) + 0.01, self._on_news)
                case retry.Wait(not_before=not_before):
                    self._ledger.wait(job, child, failure, now, not_before=not_before, needs_mib=needs_mib)
                    log.bind(event="waits").warning(f"job {job} waits: {failure.what}; {failure.hint}")
        self._release(engine, job)

    def _ran_out(self, engine: Engine, failure: Failure) -> tuple[int | None, bool]:
        """What a file that ran out of a card's memory is known to need of it: more than there was; and whether that was all of the card."""
        memory = self._memory().get(engine.card)
        if failure.code != "out_of_memory" or memory is None or engine.memory_mib is None:
            return None, True
        had_mib = engine.memory_mib + memory.free_mib
        had_all = had_mib >= ALL_OF_A_CARD * memory.total_mib
        return max(had_mib + NEEDS_MORE_MIB, memory.total_mib + 1 if had_all else 0), had_all

    def _interrupted(self, engine: Engine, job: int, why: str) -> None:
        """Not the file's fault: ready again at once, the attempt given back."""
        self._ledger.interrupt(job, engine.child.name, why, time.time())
        logger.bind(job=job, event="interrupted", child=engine.child.name).info(f"job {job} interrupted: {why}")
        self._release(engine, job)

    def engine_died(self, engine: Engine, how: str, *, stopping: bool) -> None:
        """An engine ended: what it had in hand is ready again, or failed."""
        child = engine.child
        memory_kills = kernel_memory_kills()
        ran_out = memory_kills > self._memory_kills
        self._memory_kills = memory_kills
        tasks, engine.tasks = engine.tasks, {}
        company = sum(task.sent for task in tasks.values()) - 1
        for job, task in tasks.items():
            self._progress.pop(job, None)
            try:
                self._blame_or_not(engine, job, how, sent=task.sent, stopping=stopping, ran_out=ran_out, company=company)
            except (LeaseLost, IllegalMove) as error:  # cancelled meanwhile
                logger.bind(job=job).info(f"job {job}: {error}")
        if not stopping and engine.ready:
            logger.bind(child=child.name).log(
                "INFO" if child.process.returncode == 0 else "WARNING", f"{child.name} (pid {child.pid}) {how}"
            )
        self._on_news()

    def _blame_or_not(self, engine: Engine, job: int, how: str, *, sent: bool, stopping: bool, ran_out: bool, company: int) -> None:
        """What a death means for one of the jobs in hand. Which of several is guilty cannot be told: all are blamed, and each then runs
        alone, so that an innocent one gets through and a guilty one is found out (docs/decisions/0002, 0009)."""
        row = self._ledger.job(job)
        code = engine.child.process.returncode
        stopped_by_us = stopping or code == 0 or (engine.asked_to_leave and not engine.stalled)
        blamed = not stopped_by_us and blames_the_work(code, memory_ran_out=ran_out, killed_by_us=engine.stalled)
        if not sent or (not blamed and row["interruptions"] < retry.INTERRUPTIONS_MAX):
            self._interrupted(engine, job, f"{engine.child.name} {how}")
            return
        at = f" at {row['position_s']:.0f} s" if row["position_s"] else " at its beginning"
        beside = f" and on {company} other{'s' if company > 1 else ''}" if company else ""
        memory = ", the machine ran out of memory" if ran_out else ""
        failure = Failure(
            kind=FailureKind.TRANSIENT,
            code="worker_died",
            what=f"the worker {how}{memory} while it worked on this file{at}{beside}",
            hint="if only this file does it, the recording crashes the decoder: convert it to another format and drop it again",
        )
        self._job_failed(engine, job, failure, tail="\n".join(engine.child.last_lines), at_once=True, shared=company > 0)
