"""curves: what is believed of the speed at each batch and number of workers, from what was compared so far.

A family of curves is weighed by the comparisons: a process alternates between work of its own (host) and the shared card; a batch divides a
part of the card's work among its windows; beyond the places of a card processes wait for each other, and each further one costs a little
(OPTIMISER §0.2, §4). On the processor: Amdahl's law for threads, and memory bandwidth. The family only says what is worth trying: a trial
decides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from whisperd.dispatcher.optimiser.state import Comparison, Knobs

MISFIT = 0.03
"""No member of the family is the truth: this much of a gain is never explained by one (standard deviation)."""
AGE_SD, AGE_S = 0.06, 4 * 3600.0
"""What a comparison loses in trust, after so long."""


class Curve(NamedTuple):
    """One possible card. `host`: share of a window's work at batch 1 that is the process's own; `amortised`: share of the card's work that
    a batch divides; `places`: processes that run at once; `switch`: cost of each further one."""

    host: float
    amortised: float
    places: float
    switch: float


class Threads(NamedTuple):
    """One possible processor: what threads cannot divide, what a further process costs, what a batch divides."""

    serial: float
    bandwidth: float
    amortised: float


CARDS = tuple(
    Curve(host, amortised, places, switch)
    for host, amortised, (places, switch) in product(
        (0.03, 0.07, 0.15, 0.3, 0.5, 0.7, 0.9), (0.45, 0.65, 0.8), ((1.0, 0.02), (1.0, 0.06), (1.7, 0.03), (3.0, 0.02))
    )
)
PROCESSORS = tuple(Threads(*one) for one in product((0.02, 0.06, 0.12, 0.2), (0.0, 0.02, 0.05, 0.1), (0.0, 0.2, 0.4, 0.65)))

SPIN = 0.4
"""Of a core, burned by a process that waits for its card."""


@lru_cache(maxsize=65_536)
def log_speed(curve: Curve | Threads, batch: int, workers: int, cores: int) -> float:
    """Logarithm of audio seconds per second, in a unit of the curve's own."""
    if isinstance(curve, Threads):
        return _on_processor(curve, batch, workers, cores)
    card_s = (1 - curve.host) * (1 - curve.amortised + curve.amortised / batch) * (1 + curve.switch * (workers - 1))
    host_s = curve.host
    stay_s = card_s
    for _ in range(3):
        lean = curve.places * host_s - card_s * workers
        queued = (-lean + math.sqrt(lean * lean + 4 * curve.places * card_s * host_s)) / (2 * curve.places)
        stay_s = max(card_s, queued)
        busy = workers * (host_s + SPIN * stay_s) / (host_s + stay_s)
        host_s = curve.host * max(1.0, busy / cores)
    return math.log(workers / (host_s + stay_s))


def _on_processor(curve: Threads, batch: int, workers: int, cores: int) -> float:
    threads = max(1, cores // workers)
    each = threads / (1 + curve.serial * (threads - 1)) / (1 - curve.amortised + curve.amortised / batch)
    return math.log(workers * each / (1 + curve.bandwidth * (workers - 1)))


class Belief(NamedTuple):
    """The family, weighed."""

    family: Sequence[Curve | Threads]
    weights: tuple[float, ...]
    cores: int

    def gain(self, before: Knobs, after: Knobs) -> tuple[float, float]:
        """(expected logarithm of how much faster, its standard deviation) of another batch or number of workers."""
        if before == after:
            return 0.0, 0.0
        one, two = (before.batch, before.workers, self.cores), (after.batch, after.workers, self.cores)
        mean = square = 0.0
        for curve, weight in zip(self.family, self.weights, strict=True):
            if weight > 1e-4:
                gain = log_speed(curve, *two) - log_speed(curve, *one)
                mean += weight * gain
                square += weight * gain * gain
        return mean, math.sqrt(max(0.0, square - mean * mean) + MISFIT**2)


def belief(comparisons: Iterable[Comparison], compute_type: str, model: str, now: float, *, cores: int, processor: bool) -> Belief:
    """The family after these comparisons of this model in this precision."""
    family: Sequence[Curve | Threads] = PROCESSORS if processor else CARDS
    scores = [0.0] * len(family)
    for one in comparisons:
        if one.model != model or {one.before.compute_type, one.after.compute_type} != {compute_type}:
            continue
        variance = one.sd**2 + MISFIT**2 + (AGE_SD * max(0.0, now - one.at) / AGE_S) ** 2
        first, second = (one.before.batch, one.before.workers, cores), (one.after.batch, one.after.workers, cores)
        for index, curve in enumerate(family):
            miss = log_speed(curve, *second) - log_speed(curve, *first) - one.gain
            scores[index] -= 0.5 * miss * miss / variance
    top = max(scores)
    raw = [math.exp(score - top) for score in scores]
    total = sum(raw)
    return Belief(family, tuple(weight / total for weight in raw), cores)


def measured(comparisons: Iterable[Comparison], before: Knobs, after: Knobs, model: str, now: float) -> tuple[float, float] | None:
    """What comparisons of exactly these two say together, whichever way round; None when there are none."""
    total = weight = 0.0
    for one in comparisons:
        if one.model != model:
            continue
        sign = 1 if (one.before, one.after) == (before, after) else -1 if (one.before, one.after) == (after, before) else 0
        if sign:
            variance = one.sd**2 + (AGE_SD * max(0.0, now - one.at) / AGE_S) ** 2
            total += sign * one.gain / variance
            weight += 1 / variance
    return (total / weight, math.sqrt(1 / weight)) if weight else None


def together(one: tuple[float, float], other: tuple[float, float] | None) -> tuple[float, float]:
    """Two independent estimates as one."""
    if other is None:
        return one
    first, second = 1 / max(1e-9, one[1] ** 2), 1 / max(1e-9, other[1] ** 2)
    return (one[0] * first + other[0] * second) / (first + second), math.sqrt(1 / (first + second))
