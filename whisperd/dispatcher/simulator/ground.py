"""ground: cards while the simulation runs: their memory, other programs on them, their heat, and what can be read of them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence

from whisperd.dispatcher.optimiser.values import Card, Limits, Usable, Worker
from whisperd.dispatcher.simulator.outcome import Denial
from whisperd.dispatcher.simulator.scenario import CardSpec, Change

HYSTERESIS_K = 6.0
SLOWED = 0.5
"""Clock of a card that slows itself down for heat."""


class Ground:
    """One card."""

    def __init__(self, index: int, spec: CardSpec) -> None:
        self.index, self.spec = index, spec
        self.own_mib = self.foreign_mib = self.wanted_mib = self.foreign_busy = 0.0
        self.ambient_c = spec.ambient_c
        self.celsius = spec.ambient_c + spec.kelvin_per_w * spec.idle_w
        self.clock = 1.0
        self.busy = 0.0  # share of time
        self.throttled_s = 0.0
        self.blind = self.lost = self.frozen = False
        self.limits = Limits()
        self.asked_at: float | None = None
        self.denials: list[Denial] = []

    @property
    def free_mib(self) -> float:
        return self.spec.memory_mib - self.spec.reserved_mib - self.own_mib - self.foreign_mib

    @property
    def usable(self) -> Usable:
        if self.lost:
            return "lost"
        return "unknown" if self.blind else "frozen" if self.frozen else "ok"

    def change(self, change: Change) -> None:
        match change.what:
            case "foreign":
                self.wanted_mib, self.foreign_busy = change.mib, change.busy
            case "ambient":
                self.ambient_c = change.celsius
            case "blind":
                self.blind = change.on
            case "lost":
                self.lost = change.on
            case "frozen":
                self.frozen = change.on
            case "limits":
                self.limits = change.limits

    def let_others_in(self, now: float) -> None:
        """Another program takes what it wants as soon as it is free; how long it waited for all of it is kept."""
        if self.wanted_mib <= self.foreign_mib:
            self.foreign_mib = self.wanted_mib
        else:
            if self.asked_at is None:
                self.asked_at = now
            self.foreign_mib += max(0.0, min(self.wanted_mib - self.foreign_mib, self.free_mib))
        if self.asked_at is not None and self.wanted_mib - self.foreign_mib <= 1:
            self.denials.append(Denial(self.asked_at, self.index, now - self.asked_at))
            self.asked_at = None

    def heat(self, seconds: float) -> bool:
        """Warm up or cool down; whether the clock changed."""
        spec = self.spec
        watts = spec.idle_w + (spec.full_w - spec.idle_w) * self.busy * self.clock
        target = self.ambient_c + spec.kelvin_per_w * watts
        self.celsius += (target - self.celsius) * (1 - math.exp(-seconds / spec.tau_s))
        if self.clock < 1:
            self.throttled_s += seconds
        before = self.clock
        if self.celsius >= spec.slowdown_c:
            self.clock = SLOWED
        elif self.celsius < spec.slowdown_c - HYSTERESIS_K:
            self.clock = 1.0
        return self.clock != before

    def observed(self, workers: Iterable[Worker], chance: random.Random) -> Card:
        """What can be read of it: rounded, noisy, or nothing."""
        spec = self.spec
        if spec.is_cpu:
            return Card(
                gpu=spec.gpu,
                memory_total_mib=round(spec.memory_mib),
                memory_free_mib=round(self.free_mib),
                workers=tuple(workers),
                limits=self.limits,
            )
        seen = not (self.blind or self.lost)
        busy = 1.0 if spec.ghost else min(1.0, max(0.0, self.busy + chance.gauss(0, 0.06)))
        celsius = self.celsius + chance.gauss(0, 0.5)
        usable = self.usable
        return Card(
            gpu=spec.gpu,
            driver=spec.driver,
            usable=usable,
            why="" if usable == "ok" else f"simulated: {usable}",
            memory_total_mib=round(spec.memory_mib),
            memory_free_mib=round(self.free_mib) if seen else None,
            utilisation_percent=round(100 * busy) if seen else None,
            temperature_c=round(celsius) if seen else None,
            slowdown_c=round(spec.slowdown_c),
            throttled=seen and self.clock < 1,
            workers=tuple(workers),
            limits=self.limits,
        )


def grounds(cards: Sequence[CardSpec]) -> list[Ground]:
    return [Ground(index, spec) for index, spec in enumerate(cards)]
