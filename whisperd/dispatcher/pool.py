"""pool: the engine children, stepped from what is toward what the plan wants.

Owns: which engines live, which job each has in hand. A model that cannot be loaded is a boot failure: it has its own back-off,
no job is touched, and `blocked` says in a sentence what is missing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loguru import logger

from whisperd.child import Child, Life
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.retry import Backoff
from whisperd.vocabulary import Failure
from whisperd.wire import Abandon, BootFailed, EngineOut, EngineReady, Frame, LoadModel, Message

BOOT_PAUSE = Backoff(base_s=1.0, max_s=60.0)
KILL_AFTER_TERM_S = 5.0


@dataclass
class Engine:
    """One engine child and the job it has in hand."""

    child: Child[Any]
    job: int | None = None
    moved_at: float = 0.0  # monotonic: when it last made progress
    sent: bool = False  # the source's descriptor is with the child
    model: str = ""
    device: str = ""
    compute_type: str = ""


OnFrame = Callable[[Engine, Frame[Any]], None]
OnDeath = Callable[[Engine, str], None]


class Pool:
    """The engines."""

    def __init__(self, nursery: Nursery, *, on_frame: OnFrame, on_death: OnDeath) -> None:
        self._nursery = nursery
        self._on_frame = on_frame
        self._on_death = on_death
        self._count = 0
        self._boot_failures = 0
        self._start_at = 0.0
        self.engines: dict[int, Engine] = {}  # by pid
        self.request: LoadModel | None = None
        self.blocked: Failure | None = None

    def step(self, wanted: int, now: float) -> None:
        """One step from actual toward wanted: start what is missing, drain what is too much or has another model."""
        if self.request is None:
            return
        living = [engine for engine in self.engines.values() if engine.child.life not in (Life.DRAINING, Life.KILLING)]
        if len(living) < wanted and now >= self._start_at:
            for _ in range(wanted - len(living) if not self._boot_failures else 1):
                self._start(now)
        for engine in sorted(living, key=lambda engine: (engine.job is not None, -engine.child.born_at))[: max(0, len(living) - wanted)]:
            self.drain(engine, now)

    def load(self, request: LoadModel, now: float) -> None:
        """Run this model from now on; engines with another one are drained."""
        if request == self.request:
            return
        self.request, self.blocked, self._boot_failures, self._start_at = request, None, 0, 0.0
        for engine in self.engines.values():
            self.drain(engine, now)

    def _start(self, now: float) -> None:
        if self.request is None:
            return
        self._count += 1
        child = self._nursery.start(
            name=f"engine-{self._count}",
            module="whisperd.engine",
            receives=EngineOut,
            on_frame=self._frame,
            on_exit=self._exit,
        )
        self.engines[child.pid] = Engine(child=child)
        self._nursery.send(child, self.request)

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

    def idle(self) -> list[Engine]:
        """Engines with a free slot, the longest idle first."""
        return sorted((e for e in self.engines.values() if e.child.life is Life.IDLE and e.job is None), key=lambda e: e.child.since)

    def working(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if engine.job is not None]

    def of_job(self, job: int) -> Engine | None:
        return next((engine for engine in self.engines.values() if engine.job == job), None)

    def assign(self, engine: Engine, job: int, now: float) -> None:
        engine.child.assign(now)
        engine.job, engine.moved_at, engine.sent = job, now, False

    def release(self, engine: Engine, now: float) -> None:
        """The job is out of its hands."""
        if engine.job is not None:
            engine.job = None
            engine.child.release(now)

    def send(self, engine: Engine, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        self._nursery.send(engine.child, message, descriptors)

    def abandon(self, engine: Engine) -> None:
        """Tell the engine to drop its job; it answers `Abandoned`."""
        if engine.job is not None:
            self.send(engine, Abandon(job=engine.job))

    def _frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        engine = self.engines.get(child.pid)
        if engine is None:
            return
        match frame.message:
            case EngineReady() if engine.model:
                child.kill(time.monotonic(), "it broke the protocol: ready twice")
            case EngineReady() as ready:
                engine.model, engine.device, engine.compute_type = ready.model, ready.device, ready.compute_type
                self.blocked, self._boot_failures = None, 0
                child.ready(time.monotonic())
                logger.bind(child=child.name).info(
                    f"{child.name} ready: {ready.model} on {ready.device} ({ready.compute_type}), loaded in {ready.load_s:.2f} s"
                )
            case BootFailed(failure=failure):
                if failure != self.blocked:
                    logger.bind(event="engine_blocked").error(f"cannot start an engine: {failure.what}; {failure.hint}")
                self.blocked = failure
        self._on_frame(engine, frame)

    def _exit(self, child: Child[Any], how: str) -> None:
        engine = self.engines.pop(child.pid, None)
        if engine is None:
            return
        now = time.monotonic()
        if not engine.model:  # it never became ready
            self._boot_failures += 1
            pause_s = BOOT_PAUSE.pause_s(self._boot_failures)
            self._start_at = now + pause_s
            if self.blocked is None:
                logger.bind(child=child.name).error(f"{child.name} did not start: {how}; trying again in {pause_s:g} s")
        self._on_death(engine, how)
