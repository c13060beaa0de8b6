"""staff: recordings and engines while the simulation runs.

Owns: Recording, Staff (one engine process) and Queue. An engine divides its speed equally among the recordings it has in hand: each has a
mark, the service of which it is done, so that the next event of an engine is the least of its marks.
"""

from __future__ import annotations

import heapq
import math
from typing import Literal

from whisperd.dispatcher.optimiser.values import Worker
from whisperd.dispatcher.simulator.scenario import Kind

WINDOW_S = 25.0
"""Audio in a window, on average: they are cut at speech boundaries, after at most 30 s."""
OFFERED = 4
"""Windows that a recording offers ahead at once."""

Life = Literal["loading", "idle", "busy", "draining"]


class Recording:
    """One recording on its way."""

    __slots__ = (
        "arrived_at",
        "audio_s",
        "cost",
        "ended_at",
        "first_at",
        "hits",
        "id",
        "left_s",
        "mark",
        "model",
        "needs_mib",
        "peak",
        "peak_left_s",
        "urgent",
    )

    def __init__(self, number: int, arrived_at: float, audio_s: float, model: str, *, urgent: bool) -> None:
        self.id, self.arrived_at, self.audio_s, self.model, self.urgent = number, arrived_at, audio_s, model, urgent
        self.left_s = audio_s
        self.cost = self.peak = 1.0
        self.peak_left_s = -1.0  # its hungriest batch comes with so much left; negative: it is over
        self.first_at = self.ended_at = -1.0
        self.needs_mib = 0.0  # it did not fit alone with less
        self.hits = 0  # times it ran out of memory
        self.mark = 0.0


class Staff:
    """One engine process."""

    __slots__ = (
        "audio_s",
        "birth",
        "born_at",
        "card",
        "climb_at",
        "climb_audio_s",
        "cost_sum",
        "done",
        "hungry",
        "id",
        "kind",
        "life",
        "limit",
        "marks",
        "memory_mib",
        "model",
        "next_at",
        "noise",
        "nominal",
        "rate",
        "recordings",
        "served_s",
        "threads",
        "told",
        "told_audio_s",
        "until",
    )

    def __init__(self, number: int, card: int, model: str, kind: Kind, *, batch: int, threads: int, now: float) -> None:
        self.id, self.card, self.model, self.kind, self.threads, self.born_at = number, card, model, kind, threads, now
        self.told = self.limit = batch
        self.life: Life = "loading"
        self.birth = True  # its memory is not taken yet
        self.until = math.inf  # end of what it is doing besides decoding
        self.memory_mib = 0.0
        self.recordings: dict[int, Recording] = {}
        self.marks: list[tuple[float, int, int, Recording]] = []
        self.served_s = self.audio_s = self.told_audio_s = self.cost_sum = 0.0
        self.noise = 1.0
        self.nominal = self.rate = 0.0
        self.done = 0
        self.hungry = True
        self.next_at = self.climb_at = math.inf
        self.climb_audio_s = math.inf  # calm for long enough when it has decoded so much

    @property
    def batch(self) -> int:
        """Windows that really are decoded together."""
        return min(self.limit, OFFERED * len(self.recordings))

    @property
    def serves(self) -> bool:
        return self.life in ("idle", "busy")

    def note_hunger(self) -> None:
        if 2 * len(self.recordings) < self.told or not self.recordings:
            self.hungry = True

    def take(self, recording: Recording) -> None:
        recording.mark = self.served_s + recording.left_s
        self.recordings[recording.id] = recording
        self.cost_sum += recording.cost
        heapq.heappush(self.marks, (recording.mark, 1, recording.id, recording))
        if recording.peak_left_s >= 0:
            at = recording.mark - min(recording.peak_left_s, recording.left_s)
            heapq.heappush(self.marks, (at, 0, recording.id, recording))

    def finish(self, recording: Recording) -> None:
        del self.recordings[recording.id]
        self.cost_sum -= recording.cost
        recording.left_s = 0.0
        self.done += 1

    def put_down(self) -> list[Recording]:
        """Everything in its hands, with what is left of it."""
        for recording in self.recordings.values():
            recording.left_s = max(0.001, recording.mark - self.served_s)
        given = list(self.recordings.values())
        self.recordings, self.marks, self.cost_sum = {}, [], 0.0
        return given

    def advance(self, seconds: float) -> float:
        """Audio decoded in that time."""
        audio_s = self.rate * seconds
        self.served_s += audio_s / len(self.recordings)
        self.audio_s += audio_s
        return audio_s

    def set_speed(self, now: float) -> None:
        """Its rate follows from the nominal one and from what it has in hand; its next event from its rate."""
        number = len(self.recordings)
        if not number or self.life == "loading":
            self.rate, self.next_at, self.climb_at = 0.0, math.inf, math.inf
            return
        self.rate = self.nominal * number / (self.cost_sum * self.noise)
        self.next_at = self.climb_at = math.inf
        if self.rate > 0:
            self.next_at = now + max(0.0, self.marks[0][0] - self.served_s) * number / self.rate
            self.climb_at = now + max(0.0, self.climb_audio_s - self.audio_s) / self.rate

    def observed(self, *, told_by_driver: bool) -> Worker:
        """As the dispatcher knows it."""
        chunk_s = WINDOW_S * max(1, self.batch)
        if self.audio_s - self.told_audio_s >= chunk_s:
            self.told_audio_s += (self.audio_s - self.told_audio_s) // chunk_s * chunk_s
        fed, self.hungry = not self.hungry, False
        self.note_hunger()
        known = self.life != "loading" or (told_by_driver and not self.birth)
        return Worker(
            id=self.id,
            model=self.model,
            compute_type=self.kind.compute_type,
            batch=self.told,
            life=self.life,
            memory_mib=round(self.memory_mib) if known else None,
            audio_s=self.told_audio_s,
            jobs=len(self.recordings),
            jobs_done=self.done,
            fed=fed,
        )


class Queue:
    """Recordings that are ready, by model; urgent ones first, then in the order of their arrival. Those that need more memory than
    they had are held apart until it is there."""

    def __init__(self) -> None:
        self.ready: dict[str, list[tuple[bool, float, int, Recording]]] = {}
        self.held: list[Recording] = []

    def __bool__(self) -> bool:
        return bool(self.held) or any(self.ready.values())

    def put(self, recording: Recording) -> None:
        if recording.needs_mib:
            self.held.append(recording)
            return
        entry = (not recording.urgent, recording.arrived_at, recording.id, recording)
        heapq.heappush(self.ready.setdefault(recording.model, []), entry)

    def next(self, model: str) -> Recording | None:
        waiting = self.ready.get(model)
        return heapq.heappop(waiting)[3] if waiting else None

    def fitting(self, model: str, room_mib: float) -> Recording | None:
        """A held one that fits by now."""
        for recording in self.held:
            if recording.model == model and recording.needs_mib <= room_mib:
                self.held.remove(recording)
                return recording
        return None
