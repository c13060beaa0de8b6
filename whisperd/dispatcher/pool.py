"""pool: the engine children, stepped from what is toward what the plan wants.

Owns: which engines live, which jobs each has in hand, what their batches add up to. A model that cannot be loaded is a boot failure:
it has its own back-off, no job is touched, and `blocked` says in a sentence what is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from loguru import logger

from whisperd.child import Child, Life
from whisperd.dispatcher.counters import Counters
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.queueing import Seat
from whisperd.dispatcher.retry import Backoff
from whisperd.vocabulary import Failure
from whisperd.wire import (
    Abandon,
    BatchDone,
    BootFailed,
    EngineOut,
    EngineReady,
    Frame,
    LoadModel,
    Message,
    OutOfMemory,
    Transcribe,
    Unload,
    Unloaded,
)

BOOT_PAUSE = Backoff(base_s=1.0, max_s=60.0)
KILL_AFTER_TERM_S = 5.0
SETTLING_BATCHES = 16  # until an engine has the memory that its work needs; what comes on top later is a leak
CUDA_CACHE = "cuda-cache"


@dataclass
class Task:
    """One job in an engine's hands."""

    suspect: bool  # it may have killed a worker, so nothing runs beside it
    sent: bool = False  # the source's descriptor is with the child
    made_by: str = ""  # the fingerprint of its windows, once it is sent


@dataclass
class Engine:
    """One engine child and the jobs it has in hand."""

    child: Child[Any]
    tasks: dict[int, Task] = field(default_factory=dict)
    ready: EngineReady | None = None  # what it said of itself; None until it did
    moved_at: float = 0.0  # monotonic: when any of its jobs last made progress
    renewed_at: float = 0.0  # monotonic: when the leases of its jobs were last renewed
    finished_at: float = 0.0  # epoch: when it last finished a job
    batches: int = 0
    working_mib: int = 0  # the most memory it had in its first batches
    unloading: bool = False  # asked to give its model's memory back, and no work since

    @property
    def seat(self) -> Seat:
        slots = self.ready.slots if self.ready and self.child.life in (Life.IDLE, Life.BUSY) else 0
        return Seat(self.child.pid, len(self.tasks), slots - len(self.tasks), any(task.suspect for task in self.tasks.values()))


OnFrame = Callable[[Engine, Frame[Any]], None]
OnDeath = Callable[[Engine, str], None]


class Pool:
    """The engines."""

    def __init__(self, nursery: Nursery, state_dir: str, *, on_frame: OnFrame, on_death: OnDeath, module: str = "whisperd.engine") -> None:
        self._nursery = nursery
        self._state_dir = state_dir
        self._on_frame = on_frame
        self._on_death = on_death
        self._module = module
        self._count = 0
        self._boot_failures = 0
        self._start_at = 0.0
        self.engines: dict[int, Engine] = {}  # by pid
        self.request: LoadModel | None = None
        self.blocked: Failure | None = None
        self.counters = Counters()
        self.unload_idle_s = 0.0  # 0: never
        self.rss_growth_max_mib = 0  # 0: no limit

    def step(self, wanted: int, now: float) -> None:
        """One step from actual toward wanted: start what is missing, drain what is too much or has another model."""
        if self.request is None:
            return
        living = [engine for engine in self.engines.values() if engine.child.life not in (Life.DRAINING, Life.KILLING)]
        if len(living) < wanted and now >= self._start_at:
            for _ in range(wanted - len(living) if not self._boot_failures else 1):
                self._start(self.request, now)
        for engine in sorted(living, key=lambda engine: (len(engine.tasks), -engine.child.born_at))[: max(0, len(living) - wanted)]:
            self.drain(engine, now)
        for engine in living:
            self._unload_when_idle(engine, now)

    def load(self, request: LoadModel, now: float) -> None:
        """Run this model from now on; engines with another one are drained."""
        if request == self.request:
            return
        self.request, self.blocked, self._boot_failures, self._start_at = request, None, 0, 0.0
        for engine in self.engines.values():
            self.drain(engine, now)

    def _start(self, request: LoadModel, now: float) -> None:
        self._count += 1
        child = self._nursery.start(
            name=f"engine-{self._count}",
            module=self._module,
            receives=EngineOut,
            on_frame=self._frame,
            on_exit=self._exit,
            env=environment(self._state_dir, request.device),
        )
        self.engines[child.pid] = Engine(child=child)
        self._nursery.send(child, request)

    def drain(self, engine: Engine, now: float) -> None:
        """Ask an engine to end at its next boundary."""
        engine.child.drain(now)
        self._nursery.watch(engine.child)

    def kill(self, engine: Engine, why: str, now: float) -> None:
        """Not cooperative any more. SIGTERM ends an engine at once; SIGKILL follows where even that is not heard."""
        engine.child.terminate(now, why)

    def enforce_kills(self, now: float) -> None:
        for engine in self.engines.values():
            if engine.child.life is Life.KILLING and now - engine.child.since > KILL_AFTER_TERM_S:
                engine.child.kill(now, engine.child.killed_by_us)

    def _unload_when_idle(self, engine: Engine, now: float) -> None:
        idle = engine.child.life is Life.IDLE and now - engine.child.since >= self.unload_idle_s
        if self.unload_idle_s and idle and not engine.unloading:
            engine.unloading = True
            self.send(engine, Unload())

    # --- who has what ---

    def seats(self) -> list[Seat]:
        return [engine.seat for engine in self.engines.values()]

    def told(self) -> list[dict[str, Any]]:
        """The engines as the desk shows them."""
        return [
            {
                "name": engine.child.name,
                "pid": engine.child.pid,
                "life": str(engine.child.life),
                "slots": engine.ready.slots if engine.ready else None,
                "jobs": sorted(engine.tasks),
            }
            for engine in self.engines.values()
        ]

    def working(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.tasks]

    def tasks(self) -> list[tuple[Engine, int]]:
        """Every job in an engine's hands."""
        return [(engine, job) for engine in self.engines.values() for job in engine.tasks]

    def of_job(self, job: int) -> Engine | None:
        return next((engine for engine in self.engines.values() if job in engine.tasks), None)

    def assign(self, engine: Engine, job: int, now: float, *, suspect: bool) -> None:
        if not engine.tasks:
            engine.child.assign(now)
            engine.moved_at = engine.renewed_at = now
        engine.tasks[job] = Task(suspect=suspect)
        engine.unloading = False

    def give(self, engine: Engine, work: Transcribe, source: int, now: float, *, made_by: str) -> None:
        """The job with its source's descriptor; from here on a death of the child may be its doing."""
        if not any(task.sent for task in engine.tasks.values()):
            engine.moved_at = now
        task = engine.tasks[work.job]
        task.sent, task.made_by = True, made_by
        self.send(engine, work, (source,))

    def release(self, engine: Engine, job: int, now: float) -> None:
        """The job is out of its hands."""
        if engine.tasks.pop(job, None) is not None and not engine.tasks:
            engine.child.release(now)

    def send(self, engine: Engine, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        self._nursery.send(engine.child, message, descriptors)

    def drop(self, engine: Engine, job: int, now: float) -> None:
        """The job is not wanted any more: an engine that knows of it is asked to drop it and answers `Abandoned`."""
        if engine.tasks[job].sent:
            self.send(engine, Abandon(job=job))
        else:
            self.release(engine, job, now)

    # --- what engines say ---

    def _frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        engine = self.engines.get(child.pid)
        if engine is None:
            return
        match frame.message:
            case EngineReady() if engine.ready:
                child.kill(time.monotonic(), "it broke the protocol: ready twice")
            case EngineReady() as ready:
                engine.ready = ready
                self.blocked, self._boot_failures = None, 0
                child.ready(time.monotonic())
                logger.bind(child=child.name).info(
                    f"{child.name} ready: {ready.model} on {ready.device} ({ready.compute_type}, encoder {ready.encoder}),"
                    f" {ready.slots} slot{'s' if ready.slots != 1 else ''}, loaded in {ready.load_s:.2f} s"
                )
            case BootFailed(failure=failure):
                if failure != self.blocked:
                    logger.bind(event="engine_blocked").error(f"cannot start an engine: {failure.what}; {failure.hint}")
                self.blocked = failure
            case BatchDone() as batch:
                self.counters = self.counters.plus(batch)
                self._recycle_when_grown(engine, batch.rss_mib)
            case OutOfMemory() as event:
                self.counters = replace(self.counters, out_of_memory=self.counters.out_of_memory + 1)
                logger.bind(child=child.name, event="out_of_memory").warning(
                    f"{child.name} ran out of memory with {event.windows} windows of {event.frames} frames (beam {event.beam});"
                    f" it goes on with at most {event.limit}: {event.what}"
                )
            case Unloaded(rss_mib=rss_mib):
                logger.bind(child=child.name, event="unloaded").info(f"{child.name} was idle and gave its model back: {rss_mib} MiB left")
        self._on_frame(engine, frame)

    def _recycle_when_grown(self, engine: Engine, rss_mib: int) -> None:
        engine.batches += 1
        if engine.batches <= SETTLING_BATCHES:
            engine.working_mib = max(engine.working_mib, rss_mib)
        growth_mib = rss_mib - engine.working_mib
        if 0 < self.rss_growth_max_mib < growth_mib and engine.child.life in (Life.IDLE, Life.BUSY):
            logger.bind(child=engine.child.name, event="recycled").warning(
                f"{engine.child.name} is replaced: its memory grew by {growth_mib} MiB to {rss_mib} MiB"
                f" (engine.rss_growth_max_mib = {self.rss_growth_max_mib})"
            )
            self.drain(engine, time.monotonic())

    def _exit(self, child: Child[Any], how: str) -> None:
        engine = self.engines.pop(child.pid, None)
        if engine is None:
            return
        now = time.monotonic()
        if engine.ready is None:
            self._boot_failures += 1
            pause_s = BOOT_PAUSE.pause_s(self._boot_failures)
            self._start_at = now + pause_s
            if self.blocked is None:
                logger.bind(child=child.name).error(f"{child.name} did not start: {how}; trying again in {pause_s:g} s")
        self._on_death(engine, how)


def environment(state_dir: str, device: str) -> dict[str, str]:
    """What an engine's environment needs beyond ours: on a GPU, kernels compiled once are kept where the service may write."""
    if device == "cpu" or "CUDA_CACHE_PATH" in os.environ:
        return {}
    cache = os.path.join(state_dir, CUDA_CACHE)
    os.makedirs(cache, mode=0o750, exist_ok=True)
    return {"CUDA_CACHE_PATH": cache}
