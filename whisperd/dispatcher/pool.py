"""pool: the engine children, stepped from what is toward what the plan wants.

Owns: which engines live on which card, which jobs each has in hand, what their batches add up to. Children are started one at a time on
a GPU, and only where there is room; they leave at a window boundary (Stop), then by SIGTERM, then by SIGKILL of their group. A model
that cannot be loaded is a boot failure: it has its own back-off, no job is touched, and `blocked` says in a sentence what is missing.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import msgspec
from loguru import logger

from whisperd.child import Child, Life
from whisperd.dispatcher.counters import Counters
from whisperd.dispatcher.engines import Engine, Share, Task, card_of, identity
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.optimiser.values import CPU, Event
from whisperd.dispatcher.queueing import Seat
from whisperd.dispatcher.retry import Backoff
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import (
    Abandon,
    BatchDone,
    BatchSet,
    BootFailed,
    EngineOut,
    EngineReady,
    Finished,
    Frame,
    LoadModel,
    Message,
    OutOfMemory,
    SetBatch,
    Transcribe,
    Unload,
    Unloaded,
    WindowDone,
)

BOOT_PAUSE = Backoff(base_s=1.0, max_s=25.0)
DRAIN_S = 60.0  # an asked engine that has not ended by then is terminated: what it decoded is kept anyway
KILL_AFTER_TERM_S = 5.0
SETTLING_BATCHES = 16  # until an engine has the memory that its work needs; what comes on top later is a leak
QUARANTINE_BATCH = 4  # of a suspect's own windows, on a GPU: alone with one it would take many times as long
CUDA_CACHE = "cuda-cache"
MUTE_DEATHS_MAX = 2  # engines that end while they start and do not say why: one may be somebody's hand

OnFrame = Callable[[Engine, Frame[Any]], None]
OnDeath = Callable[[Engine, str], None]
NoRoom = Callable[[LoadModel], str]  # why an engine may not be started now, "" when it may


@dataclass
class Boot:
    """How the starts of one kind of engine went lately."""

    failures: int = 0
    start_at: float = 0.0  # monotonic: not before
    failure: Failure | None = None


@dataclass
class Recycling:
    """When an engine is replaced by a fresh one; 0 is never."""

    rss_growth_max_mib: int = 0
    jobs: int = 0
    age_s: float = 0.0


class Pool:
    """The engines."""

    def __init__(self, nursery: Nursery, state_dir: str, *, on_frame: OnFrame, on_death: OnDeath, module: str = "whisperd.engine") -> None:
        self._nursery = nursery
        self._state_dir = state_dir
        self._on_frame = on_frame
        self._on_death = on_death
        self._module = module
        self._count = 0
        self._boots: dict[LoadModel, Boot] = {}  # by identity
        self._shares: tuple[Share, ...] = ()
        self._refused: dict[str, str] = {}  # card → why nothing more is started there, as last told
        self.events: list[Event] = []  # for the optimiser, until it takes them
        self.engines: dict[int, Engine] = {}  # by pid
        self.counters = Counters()
        self.audio_s: defaultdict[str, float] = defaultdict(float)  # finished on each card in this daemon's life
        self.unload_idle_s = 0.0  # 0: never
        self.recycling = Recycling()

    # --- toward the plan ---

    def step(self, shares: Sequence[Share], now: float, *, no_room: NoRoom = lambda request: "") -> None:
        """One step from actual toward wanted: drain what is too much or something else, set batches, start what is missing."""
        self._shares = tuple(shares)
        wanted = {identity(share.request) for share in shares}
        self._boots = {kind: boot for kind, boot in self._boots.items() if kind in wanted}
        for engine in list(self.engines.values()):
            if identity(engine.request) not in wanted:
                self.drain(engine, now)
        for share in shares:
            self._drain_surplus(share, now)
            self._set_batches(share)
            self._start_missing(share, now, no_room)
        for engine in self._staying():
            self._recycle_when_old(engine, now)
            self._unload_when_idle(engine, now)

    def _staying(self) -> list[Engine]:
        return [engine for engine in self.engines.values() if not engine.leaving]

    def _of(self, share: Share, *, quarantine: bool) -> list[Engine]:
        kind = identity(share.request)
        return [engine for engine in self._staying() if identity(engine.request) == kind and engine.quarantine == quarantine]

    def _drain_surplus(self, share: Share, now: float) -> None:
        """Who has nothing in hand goes first, then who is still loading, then the youngest."""

        def order(engine: Engine) -> tuple[bool, bool, int]:
            return bool(engine.tasks), engine.serves, -engine.number

        for engine in sorted(self._of(share, quarantine=False), key=order)[: -share.workers or None]:
            self.drain(engine, now)
        for engine in self._of(share, quarantine=True):
            if not share.quarantine and not engine.tasks:
                self.drain(engine, now)

    def _set_batches(self, share: Share) -> None:
        for engine in self._of(share, quarantine=False):
            if engine.ready is not None and engine.request.batch != share.request.batch:
                engine.request = share.request
                self.send(engine, SetBatch(batch=share.request.batch))

    def _start_missing(self, share: Share, now: float, no_room: NoRoom) -> None:
        missing = share.workers - len(self._of(share, quarantine=False))
        alone = share.quarantine and not self._of(share, quarantine=True)
        boot = self._boots.get(identity(share.request), Boot())
        if (missing <= 0 and not alone) or now < boot.start_at:
            return
        if boot.failures:
            missing = min(missing, 1)
        for _ in range(max(0, missing)):
            if not self._start_one(share.request, now, no_room):
                return
        if alone:
            batch = 1 if share.card == CPU else min(QUARANTINE_BATCH, share.request.batch)
            self._start_one(msgspec.structs.replace(share.request, batch=batch), now, no_room, quarantine=True)

    def _start_one(self, request: LoadModel, now: float, no_room: NoRoom, *, quarantine: bool = False) -> bool:
        """Start an engine where it may be; whether it was."""
        card = card_of(request)
        if card != CPU and any(engine.card == card and engine.child.life is Life.BOOTING for engine in self.engines.values()):
            return False  # one at a time: so each start sees the memory that the one before took
        why = no_room(request)
        if why and self._refused.get(card) != why:
            logger.bind(event="no_room").info(f"no further worker for {request.model}: {why}")
        self._refused[card] = why
        if why:
            return False
        self._count += 1
        child = self._nursery.start(
            name=f"engine-{self._count}",
            module=self._module,
            receives=EngineOut,
            on_frame=self._frame,
            on_exit=self._exit,
            env=environment(self._state_dir, request),
        )
        self.engines[child.pid] = Engine(child=child, number=self._count, request=request, quarantine=quarantine)
        self._nursery.send(child, request)
        return True

    def drain(self, engine: Engine, now: float) -> None:
        """Ask an engine to end at its next boundary."""
        engine.asked_to_leave = True
        engine.child.drain(now)
        self._nursery.watch(engine.child)

    def recycle(self, numbers: Collection[int], now: float) -> None:
        """These engines hold more memory than their work needs: fresh ones take their places."""
        for engine in self._staying():
            if engine.number in numbers:
                self._replace(engine, f"it holds {engine.memory_mib} MiB, more than its work needs", now)

    def _recycle_when_old(self, engine: Engine, now: float) -> None:
        limits = self.recycling
        if 0 < limits.jobs <= engine.jobs_done:
            self._replace(engine, f"it has finished {engine.jobs_done} files (dispatcher.recycle_jobs = {limits.jobs})", now)
        elif 0 < limits.age_s <= now - engine.child.born_at:
            self._replace(engine, f"it is {now - engine.child.born_at:.0f} s old (dispatcher.recycle_s = {limits.age_s:g})", now)

    def _replace(self, engine: Engine, why: str, now: float) -> None:
        logger.bind(child=engine.child.name, event="recycled").info(f"{engine.child.name} is replaced: {why}")
        self.drain(engine, now)

    def kill(self, engine: Engine, why: str, now: float) -> None:
        """Not cooperative any more. SIGTERM ends an engine at once; SIGKILL follows where even that is not heard."""
        engine.child.terminate(now, why)

    def kill_card(self, card: str, why: str, now: float) -> None:
        """The card is gone: what runs on it is dead already, whatever it still looks like."""
        for engine in self.engines.values():
            if engine.card == card and engine.child.life is not Life.KILLING:
                engine.asked_to_leave = True
                engine.child.kill(now, why)

    def enforce_kills(self, now: float) -> None:
        for engine in self.engines.values():
            waited_s = now - engine.child.since
            if engine.child.life is Life.KILLING and waited_s > KILL_AFTER_TERM_S:
                engine.child.kill(now, engine.child.killed_by_us)
            elif engine.child.life is Life.DRAINING and waited_s > DRAIN_S:
                self.kill(engine, f"it did not come to a boundary within {DRAIN_S:g} s", now)

    def _unload_when_idle(self, engine: Engine, now: float) -> None:
        idle = engine.child.life is Life.IDLE and now - engine.child.since >= self.unload_idle_s
        if self.unload_idle_s and idle and not engine.unloading:
            engine.unloading = True
            self.send(engine, Unload())

    # --- who has what ---

    @property
    def blocked(self) -> Failure | None:
        """Why no engine can be started of a kind that is wanted and of which there is none."""
        for share in self._shares:
            boot = self._boots.get(identity(share.request))
            if boot is not None and boot.failure is not None and not any(engine.serves for engine in self._of(share, quarantine=False)):
                return boot.failure
        return None

    def revision_of(self, model: str) -> str:
        """The revision of a model that is loaded; "" while none is."""
        return next((engine.ready.revision for engine in self.engines.values() if engine.ready and engine.request.model == model), "")

    def seats(self, free_mib: Mapping[str, int] = MappingProxyType({})) -> list[Seat]:
        """Who has room for whom. `free_mib` is what is left of each card's memory, where that is known."""
        return [engine.seat(free_mib.get(engine.card)) for engine in self.engines.values()]

    def told(self) -> list[dict[str, Any]]:
        """The engines as the desk shows them."""
        return [
            {
                "name": engine.child.name,
                "pid": engine.child.pid,
                "card": engine.card,
                "model": engine.request.model,
                "batch": engine.request.batch,
                "life": str(engine.child.life),
                "slots": engine.slots if engine.ready else None,
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

    def assign(self, engine: Engine, job: int, task: Task, now: float) -> None:
        if not engine.tasks:
            engine.child.assign(now)
            engine.moved_at = engine.renewed_at = now
        engine.tasks[job] = task
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
        if engine.tasks.pop(job, None) is None:
            return
        engine.note_hunger()
        if not engine.tasks:
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
                self._became_ready(engine, ready)
            case BootFailed(failure=failure):
                self._boot_failed(engine, failure)
            case BatchSet(slots=slots):
                engine.slots = slots
            case WindowDone(window=window):
                audio_s = max(0.0, window.end_s - window.start_s)
                engine.audio_s += audio_s
                self.audio_s[engine.card] += audio_s
            case Finished():
                engine.jobs_done += 1
            case BatchDone() as batch:
                self.counters = self.counters.plus(batch)
                self._note_memory(engine, batch.rss_mib, batch.vram_mib)
                self._recycle_when_grown(engine, batch.rss_mib)
            case OutOfMemory() as event:
                self._out_of_memory(engine, event)
            case Unloaded(rss_mib=rss_mib):
                logger.bind(child=child.name, event="unloaded").info(f"{child.name} was idle and gave its model back: {rss_mib} MiB left")
        self._on_frame(engine, frame)

    def _became_ready(self, engine: Engine, ready: EngineReady) -> None:
        engine.ready, engine.slots = ready, ready.slots
        self._boots.pop(identity(engine.request), None)
        self._note_memory(engine, ready.rss_mib, ready.vram_mib)
        engine.child.ready(time.monotonic())
        name = engine.child.name
        logger.bind(child=name).info(
            f"{name} ready: {ready.model} on {ready.device} ({ready.compute_type}, encoder {ready.encoder}),"
            f" {ready.slots} slot{'s' if ready.slots != 1 else ''}, loaded in {ready.load_s:.2f} s"
        )

    def _boot_failed(self, engine: Engine, failure: Failure) -> None:
        boot = self._boots.setdefault(identity(engine.request), Boot())
        if failure != boot.failure:
            logger.bind(event="engine_blocked").error(f"cannot start an engine: {failure.what}; {failure.hint}")
        boot.failure = failure
        if failure.code == "out_of_memory":
            self._tell("load_out_of_memory", engine)

    def _note_memory(self, engine: Engine, rss_mib: int, vram_mib: int | None) -> None:
        engine.tell_memory(rss_mib if engine.card == CPU else vram_mib, time.monotonic())

    def _out_of_memory(self, engine: Engine, event: OutOfMemory) -> None:
        self.counters = replace(self.counters, out_of_memory=self.counters.out_of_memory + 1)
        self._tell("out_of_memory", engine, batch=event.windows)
        logger.bind(child=engine.child.name, event="out_of_memory").warning(
            f"{engine.child.name} ran out of memory with {event.windows} windows of {event.frames} frames (beam {event.beam});"
            f" it goes on with at most {event.limit}: {event.what}"
        )

    def _tell(self, kind: Any, engine: Engine, *, batch: int = 0) -> None:
        self.events.append(
            Event(
                kind=kind,
                gpu=engine.card,
                worker=engine.number,
                compute_type=engine.request.compute_type,
                batch=batch or engine.request.batch,
                need_mib=engine.memory_mib,
            )
        )

    def take_events(self) -> tuple[Event, ...]:
        taken, self.events = tuple(self.events), []
        return taken

    def _recycle_when_grown(self, engine: Engine, rss_mib: int) -> None:
        engine.batches += 1
        if engine.batches <= SETTLING_BATCHES:
            engine.working_mib = max(engine.working_mib, rss_mib)
        growth_mib, limit_mib = rss_mib - engine.working_mib, self.recycling.rss_growth_max_mib
        if 0 < limit_mib < growth_mib and engine.child.life in (Life.IDLE, Life.BUSY):
            why = f"its memory grew by {growth_mib} MiB to {rss_mib} MiB (engine.rss_growth_max_mib = {limit_mib})"
            self._replace(engine, why, time.monotonic())

    def _exit(self, child: Child[Any], how: str) -> None:
        engine = self.engines.pop(child.pid, None)
        if engine is None:
            return
        if engine.ready is None and not engine.asked_to_leave:
            self._count_boot_failure(engine, how)
        elif child.process.returncode != 0 and not engine.asked_to_leave:
            self._tell("worker_died", engine)
        self._on_death(engine, how)

    def _count_boot_failure(self, engine: Engine, how: str) -> None:
        boot = self._boots.setdefault(identity(engine.request), Boot())
        boot.failures += 1
        pause_s = BOOT_PAUSE.pause_s(boot.failures)
        boot.start_at = time.monotonic() + pause_s
        if boot.failure is not None:
            return
        logger.bind(child=engine.child.name).error(f"{engine.child.name} did not start: {how}; trying again in {pause_s:g} s")
        if boot.failures >= MUTE_DEATHS_MAX:
            boot.failure = Failure(
                kind=FailureKind.WAITING,
                code="engine_start",
                what=f"engines for {engine.request.model} end while they start, the last one {how}",
                hint="the journal has their last words",
            )


def environment(state_dir: str, request: LoadModel) -> dict[str, str]:
    """What an engine's environment needs beyond ours: on a GPU, the one card that it sees, and a place for kernels compiled once."""
    if request.device == "cpu":
        return {}
    seen = {"CUDA_VISIBLE_DEVICES": request.gpu, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} if request.gpu else {}
    if "CUDA_CACHE_PATH" in os.environ:
        return seen
    cache = os.path.join(state_dir, CUDA_CACHE)
    os.makedirs(cache, mode=0o750, exist_ok=True)
    return {**seen, "CUDA_CACHE_PATH": cache}
