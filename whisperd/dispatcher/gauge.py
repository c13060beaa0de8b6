"""gauge: what the GPUs are doing, from the probe child. The daemon itself never calls NVML, so a hang there hangs nothing here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from whisperd.child import Child
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Reading
from whisperd.wire import BatchDone, EngineReady, Frame, ProbeOut, Readings, StartProbe

SAMPLE_S = 1.0
SILENT_S = 10.0
STORE_S = 60.0


class Gauge:
    """The newest readings; () until the probe has answered once."""

    def __init__(self, nursery: Nursery, ledger: Ledger, *, on_change: Callable[[], None]) -> None:
        self._ledger = ledger
        self._on_change = on_change
        self._stored_at = 0.0
        self._peaks_mib: dict[tuple[str, str, int, int, int], int] = {}  # by model, precision and the shape of a batch
        self.readings: tuple[Reading, ...] = ()
        self.keeper = Keeper(
            nursery,
            name="probe",
            module="whisperd.dispatcher.probe",
            receives=ProbeOut,
            hello=StartProbe(interval_s=SAMPLE_S),
            on_frame=self._frame,
        )

    def tick(self, now: float) -> None:
        self.keeper.tick(now)
        child = self.keeper.child
        if child is not None and now - max(child.heard_at, child.born_at) > SILENT_S:
            self._unknown("the GPU driver does not answer (the probe hangs)")
            self.keeper.kill("it was silent")

    def stop(self) -> None:
        self.keeper.stop()

    def learn_peak(self, engine: EngineReady, batch: BatchDone) -> None:
        """The peak of each shape of a batch on the (first) GPU, for whoever plans what fits."""
        card = next((reading for reading in self.readings if reading.status == "ok"), None)
        shape = (engine.model, engine.compute_type, batch.windows, batch.beam, batch.frames)
        if card is None or batch.vram_used_mib is None or batch.vram_used_mib <= self._peaks_mib.get(shape, 0):
            return
        self._peaks_mib[shape] = batch.vram_used_mib
        self._ledger.record_vram_peak(
            gpu=card.gpu,
            driver=card.driver,
            model=engine.model,
            compute_type=engine.compute_type,
            batch=batch.windows,
            beam=batch.beam,
            frames=batch.frames,
            peak_mib=batch.vram_used_mib,
            now=time.time(),
        )

    def _unknown(self, what: str) -> None:
        if any(reading.status != "unknown" for reading in self.readings):
            self._take((Reading(gpu="", status="unknown", what=what),))

    def _frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        if child is self.keeper.child and isinstance(frame.message, Readings):
            child.ready(time.monotonic()) if child.life == "booting" else None
            self._take(frame.message.readings)

    def _take(self, readings: tuple[Reading, ...]) -> None:
        before = [(reading.gpu, reading.status, reading.what) for reading in self.readings]
        self.readings = readings
        changed = before != [(reading.gpu, reading.status, reading.what) for reading in readings]
        now = time.time()
        measured = any(reading.status == "ok" for reading in readings)
        if changed or (measured and now - self._stored_at >= STORE_S):
            self._ledger.record_readings(readings, now)
            self._stored_at = now
        if changed:
            logger.bind(event="gauge").info("; ".join(reading.what for reading in readings))
            self._on_change()
