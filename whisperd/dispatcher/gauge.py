"""gauge: what the GPUs are doing, from the probe child. The daemon itself never calls NVML, so a hang there hangs nothing here.

Owns: the probe's life, the newest readings, every look of the last quarter of an hour, and the roll-up of each minute into the ledger.
A probe that falls silent makes the readings unknown, which is never zero, and is killed. One that does not even die (stuck in the
kernel) is waited for: there is never a second one beside it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from loguru import logger

from whisperd.child import Child, Life
from whisperd.dispatcher import xid
from whisperd.dispatcher.engines import Memory
from whisperd.dispatcher.minutes import Minutes
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import CardMinute, Reading, Xid
from whisperd.wire import BatchDone, EngineReady, Frame, ProbeOut, Readings, StartProbe

SAMPLE_S = 1.0
SILENT_S = 5.0
BOOT_S = 30.0  # until the first look: without persistence mode a driver needs seconds for each GPU
MISMATCH_LOOK_S = 3600.0
STORE_S = 60.0
TELL_S = 10.0  # how old the figures are that the desk shows, at most
RING_S = 900.0

HANGS = "the GPU driver does not answer (the probe hangs)"
STUCK = "the GPU driver does not answer (the probe hangs in the kernel and cannot be ended; none is started beside it)"


class Sample(NamedTuple):
    """One look at one GPU."""

    at: float  # epoch
    reading: Reading


class Gauge:
    """The newest readings; () until the probe has answered once."""

    def __init__(
        self,
        nursery: Nursery,
        ledger: Ledger,
        *,
        on_change: Callable[[], None],
        module: str = "whisperd.dispatcher.probe",
        sample_s: float = SAMPLE_S,
        silent_s: float = SILENT_S,
        boot_s: float = BOOT_S,
        mismatch_look_s: float = MISMATCH_LOOK_S,
    ) -> None:
        self._nursery = nursery
        self._ledger = ledger
        self._on_change = on_change
        self._sample_s = sample_s
        self._silent_s = silent_s
        self._boot_s = boot_s
        self._mismatch_look_s = mismatch_look_s
        self._stored_at = 0.0
        self._told_at = 0.0
        self._ticked_at: float | None = None
        self._silence_s = 0.0  # since the last look
        self._child_silence_s = 0.0  # since this child's last look, or its birth
        self._spoke: Child[Any] | None = None  # the child that told the last look
        self._watched: Child[Any] | None = None
        self._unknown_since: dict[str, float] = {}
        self._rings: dict[str, deque[Sample]] = {}
        self._xids: dict[str, list[Xid]] = {}  # not collected yet
        self._minutes = Minutes(sample_s=sample_s)
        self._peaks_mib: dict[tuple[str, str, int, int, int], int] = {}  # by model, precision and the shape of a batch
        self.readings: tuple[Reading, ...] = ()
        self.looks = 0
        self.looked_at = 0.0  # monotonic: when the newest look came
        self.keeper = Keeper(
            nursery,
            name="probe",
            module=module,
            receives=ProbeOut,
            hello=StartProbe(interval_s=sample_s),
            on_frame=self._frame,
        )

    # --- life ---

    def tick(self, now: float) -> None:
        """Keep the probe alive and answering, and the ledger's minutes complete. `now` is monotonic."""
        self.keeper.tick(now)
        self._grow_silence(now)
        self._judge_silence()
        self._look_again_after_mismatch(now)
        if minutes := self.minutes(time.time()):
            self._ledger.record_minutes(minutes)

    def stop(self) -> None:
        self.keeper.stop()

    # --- what is known ---

    def collect(self) -> tuple[Reading, ...]:
        """The newest readings, each with every XID since the last call: whoever reacts sees each of them exactly once."""
        return tuple(msgspec.structs.replace(reading, xids=tuple(self._xids.pop(reading.gpu, ()))) for reading in self.readings)

    def unknown_since(self, gpu: str) -> float | None:
        """Since when (monotonic) a GPU that was seen has no figures; None while it has."""
        return self._unknown_since.get(gpu)

    def ring(self, gpu: str) -> tuple[Sample, ...]:
        """Every look of the last quarter of an hour, as they came."""
        return tuple(self._rings.get(gpu, ()))

    def note(self, gpu: str, *, workers: int, batch: int, own_mib: int | None, audio_s: float, memory: Memory | None = None) -> None:
        """What our workers on a card do now, about every 2 s; `audio_s` is what they ever finished there, `memory` that of the CPU."""
        self._minutes.note(gpu, workers=workers, batch=batch, own_mib=own_mib, audio_s=audio_s, memory=memory)

    def minutes(self, now: float) -> tuple[CardMinute, ...]:
        """The minute that is over at `now` (epoch), once."""
        return self._minutes.take(now)

    def learn_peak(self, card: str, engine: EngineReady, batch: BatchDone) -> None:
        """The most that one process held of a GPU for each shape of a batch, for whoever plans what fits."""
        reading = next((reading for reading in self.readings if reading.gpu == card and reading.status == "ok"), None)
        shape = (engine.model, engine.compute_type, batch.windows, batch.beam, batch.frames)
        if reading is None or batch.vram_mib is None or batch.vram_mib <= self._peaks_mib.get(shape, 0):
            return
        self._peaks_mib[shape] = batch.vram_mib
        self._ledger.record_vram_peak(
            gpu=reading.gpu,
            driver=reading.driver,
            model=engine.model,
            compute_type=engine.compute_type,
            batch=batch.windows,
            beam=batch.beam,
            frames=batch.frames,
            peak_mib=batch.vram_mib,
            now=time.time(),
        )

    # --- silence ---

    def _grow_silence(self, now: float) -> None:
        """Silence is only heard while we listen: a loop that stood still for a while accuses nobody."""
        passed_s = 0.0 if self._ticked_at is None else min(now - self._ticked_at, self._silent_s / 2)
        self._ticked_at = now
        self._silence_s += passed_s
        self._child_silence_s += passed_s
        if self.keeper.child is not self._watched:
            self._watched = self.keeper.child
            self._child_silence_s = 0.0

    def _judge_silence(self) -> None:
        child = self.keeper.child
        if self._silence_s > (self._silent_s if self.looks else self._boot_s):
            stuck = child is not None and child.life is Life.KILLING and self._child_silence_s > 2 * self._silent_s
            self._unknown(STUCK if stuck else HANGS if child is not None else f"the GPU driver does not answer ({self.keeper.down})")
        if child is None or child.life is Life.KILLING:
            return
        if self._child_silence_s > (self._silent_s if child is self._spoke else self._boot_s):
            self.keeper.kill("it was silent")

    def _look_again_after_mismatch(self, now: float) -> None:
        """A process keeps the driver's library that it once loaded: only a new one can find that the driver was reloaded."""
        child = self.keeper.child
        if child is None or child.life is not Life.IDLE or now - child.born_at < self._mismatch_look_s:
            return
        if any(reading.status == "mismatch" for reading in self.readings):
            child.drain(now)
            self._nursery.watch(child)

    def _unknown(self, what: str) -> None:
        """No figures of any GPU that was known."""
        known = [reading for reading in self.readings if reading.gpu] or [Reading(gpu="", status="unknown", what=what)]
        self._take(tuple(Reading(gpu=one.gpu, status="unknown", what=what, name=one.name, driver=one.driver) for one in known))

    # --- looks ---

    def _frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        if child is not self.keeper.child or not isinstance(frame.message, Readings):
            return
        child.ready(time.monotonic()) if child.life is Life.BOOTING else None
        self.looks += 1
        self.looked_at = time.monotonic()
        self._silence_s = self._child_silence_s = 0.0
        self._spoke = child
        readings = frame.message.readings
        self._minutes.add(readings)
        self._keep(readings, time.time())
        self._take(readings)

    def _keep(self, readings: tuple[Reading, ...], now: float) -> None:
        for reading in readings:
            if not reading.gpu:
                continue
            ring = self._rings.setdefault(reading.gpu, deque(maxlen=round(RING_S / self._sample_s)))
            ring.append(Sample(now, reading))
            while now - ring[0].at > RING_S:
                ring.popleft()
            for event in reading.xids:
                self._xids.setdefault(reading.gpu, []).append(event)
                logger.bind(event="xid", gpu=reading.gpu).warning(f"{reading.what}: {xid.describe(event.code)}")

    def _take(self, readings: tuple[Reading, ...]) -> None:
        before = [(reading.gpu, reading.status, reading.what) for reading in self.readings]
        self.readings = readings
        self._mark_unknown(time.monotonic())
        changed = before != [(reading.gpu, reading.status, reading.what) for reading in readings]
        now = time.time()
        measured = any(reading.status == "ok" for reading in readings)
        if changed or (measured and now - self._stored_at >= STORE_S):
            self._ledger.record_readings(readings, now)
            self._stored_at = now
        if changed or (measured and now - self._told_at >= TELL_S):
            self._ledger.say("gpus", {"readings": msgspec.to_builtins(readings)}, now)
            self._told_at = now
        if changed:
            logger.bind(event="gauge").info("; ".join(reading.what for reading in readings))
        if changed or any(reading.xids for reading in readings):
            self._on_change()

    def _mark_unknown(self, now: float) -> None:
        seen = {reading.gpu for reading in self.readings if reading.status == "ok"}
        for gpu in self._rings:
            if gpu in seen:
                self._unknown_since.pop(gpu, None)
            else:
                self._unknown_since.setdefault(gpu, now)
