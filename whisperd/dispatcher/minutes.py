"""minutes: what a card did in each minute, rolled up from the looks of the probe and from what the pool tells. Pure.

Owns: the minute under way, in memory. A minute is one of the wall clock's; what a daemon did not live through is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from whisperd.dispatcher.engines import Memory
from whisperd.vocabulary import CardMinute, Reading

MINUTE_S = 60.0


class Note(NamedTuple):
    """What our workers on a card are doing now; `audio_s` is what was finished since the note before."""

    workers: int
    batch: int
    own_mib: int | None
    audio_s: float
    memory: Memory | None = None  # of a card that no reading tells of


class Minutes:
    """The minute under way, of every card."""

    def __init__(self, *, sample_s: float) -> None:
        self._sample_s = sample_s
        self._number: int | None = None
        self._readings: dict[str, list[Reading]] = {}
        self._notes: dict[str, list[Note]] = {}
        self._audio_s: dict[str, float] = {}  # the sum last told, of the workers alive then

    def add(self, readings: Sequence[Reading]) -> None:
        """One look. A GPU that cannot be read has a minute as well, without figures."""
        for reading in readings:
            if reading.gpu:
                self._readings.setdefault(reading.gpu, []).append(reading)

    def note(self, gpu: str, *, workers: int, batch: int, own_mib: int | None, audio_s: float, memory: Memory | None = None) -> None:
        """`audio_s` is cumulative; should it fall, nothing is counted."""
        before = self._audio_s.get(gpu, audio_s)
        self._audio_s[gpu] = audio_s
        self._notes.setdefault(gpu, []).append(Note(workers, batch, own_mib, max(0.0, audio_s - before), memory))

    def take(self, now: float) -> tuple[CardMinute, ...]:
        """The minute that is over at `now` (epoch), once; () while it is not."""
        number = int(now // MINUTE_S)
        over, self._number = self._number, number
        if over is None or over == number:
            return ()
        cards = sorted(self._readings.keys() | self._notes.keys())
        end_at = (over + 1) * MINUTE_S
        rolled = tuple(
            roll_up(gpu, end_at, self._readings.get(gpu, []), self._notes.get(gpu, []), sample_s=self._sample_s) for gpu in cards
        )
        self._readings.clear()
        self._notes.clear()
        return rolled


def roll_up(gpu: str, end_at: float, readings: Sequence[Reading], notes: Sequence[Note], *, sample_s: float) -> CardMinute:
    """One minute of one card. A figure that nobody knew in it is None."""
    good = [reading for reading in readings if reading.status == "ok"]
    noted = [note.memory for note in notes if note.memory is not None]
    totals = [reading.vram_total_mib for reading in good if reading.vram_total_mib is not None] + [one.total_mib for one in noted]
    used = [reading.vram_used_mib for reading in good if reading.vram_used_mib is not None]
    used += [one.total_mib - one.free_mib for one in noted]
    heat = [reading.temperature_c for reading in good if reading.temperature_c is not None]
    own = [note.own_mib for note in notes if note.own_mib is not None]
    return CardMinute(
        gpu=gpu,
        at=end_at,
        samples=len(good) or len(noted),
        memory_total_mib=max(totals, default=None),
        memory_used_min_mib=min(used, default=None),
        memory_used_max_mib=max(used, default=None),
        own_max_mib=max(own, default=None),
        utilisation_mean_percent=_mean([reading.utilisation_percent for reading in good]),
        temperature_max_c=max(heat, default=None),
        power_mean_w=_mean([reading.power_w for reading in good]),
        throttled_s=sample_s * sum(1 for reading in good if set(reading.throttled) - {"power_cap"}),
        workers=_mean([note.workers for note in notes]) or 0.0,
        batch=max((note.batch for note in notes), default=0),
        audio_s=round(sum(note.audio_s for note in notes), 3),
    )


def _mean(values: Sequence[int | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(sum(known) / len(known), 2) if known else None
