"""scenario: what an installation is made of and what happens to it, as frozen values.

Owns: Kind (a model in one precision), CardSpec, Arrival, Change, Scenario. Memory is MiB, time is seconds since the scenario's begin,
`gpu_s` and `host_s` are seconds of work for one second of audio.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from whisperd.dispatcher.optimiser.values import CPU, Limits, Policy

AMORTISED = 0.65
"""Share of a window's GPU time that a batch divides among its windows (OPTIMISER §4.2, scenario batch_12g)."""

NO_LIMITS = Limits()


@dataclass(frozen=True, eq=False)
class Kind:
    """A model in one precision: what it costs and what it holds; one value is one kind, however alike two are.

    The priors are what the table says before anything was measured.
    """

    compute_type: str
    gpu_s: float  # at batch 1 on a card of speed 1; 0 on a processor
    host_s: float
    weights_mib: float  # a process with the model loaded
    window_mib: float  # more for each window of the largest batch so far
    prior_weights_mib: float
    prior_window_mib: float
    amortised: float = AMORTISED

    def cost(self, batch: float) -> float:
        """What is left of the cost of one window in a batch, 1 at batch 1."""
        return 1 - self.amortised + self.amortised / batch

    def memory_mib(self, batch: float, peak: float = 1.0) -> float:
        return self.weights_mib + self.window_mib * batch * peak


@dataclass(frozen=True)
class CardSpec:
    """A card. On the processor (`gpu` = "cpu") memory is RAM, and speed, slots, switch and heat mean nothing."""

    gpu: str
    memory_mib: float
    speed: float = 1.0
    slots: float = 1.0  # kernels of different processes that run at once: 1 is time slicing, more is MPS or low occupancy
    switch: float = 0.04  # what each further process costs all of them
    reserved_mib: float = 400.0
    ambient_c: float = 30.0
    kelvin_per_w: float = 0.13
    idle_w: float = 40.0
    full_w: float = 320.0
    tau_s: float = 90.0
    slowdown_c: float = 88.0
    ghost: bool = False  # utilisation stuck at 100 %
    driver: str = "580.95"

    @property
    def is_cpu(self) -> bool:
        return self.gpu == CPU


@dataclass(frozen=True)
class Crooked:
    """How a machine departs from the model of `contention`, so that no policy can win by knowing that model.

    Every combination of workers and batch is a little faster or slower than it should be (`rough`, of a logarithm), batches larger than
    `plateau` bring nothing more, and each worker beyond `thrash_from` costs all of them the share `thrash`.
    """

    seed: int
    rough: float = 0.05
    plateau: int = 1000
    thrash_from: int = 1000
    thrash: float = 0.1

    def factor(self, card: int, workers: int, batch: int) -> float:
        """Of the speed of one worker among so many on its card."""
        chance = random.Random(f"{self.seed} {card} {workers} {batch}")
        return math.exp(chance.gauss(0, self.rough)) * (1 - self.thrash) ** max(0, workers - self.thrash_from)


class Arrival(NamedTuple):
    """A recording that becomes ready. `cost` and `peak` multiply its work and its batches' memory; None: drawn."""

    at_s: float
    audio_s: float
    model: str
    urgent: bool = False
    cost: float | None = None
    peak: float | None = None


What = Literal["foreign", "ambient", "blind", "lost", "frozen", "cores", "content", "limits", "restart"]


@dataclass(frozen=True)
class Change:
    """Something that happens at a moment.

    foreign: other programs want `mib` of the card and `busy` of its time. ambient: `celsius`. blind, lost, frozen: `on` or over.
    cores: other programs keep `busy` cores. content: from now on a second of audio costs `gpu` and `host` times as much.
    limits: what the operator allows. restart: the daemon ends and begins anew; its workers end with it.
    """

    at_s: float
    what: What
    card: int = 0
    mib: float = 0.0
    busy: float = 0.0
    celsius: float = 0.0
    on: bool = False
    gpu: float = 1.0
    host: float = 1.0
    limits: Limits = NO_LIMITS


Arrivals = Callable[[random.Random], list[Arrival]]


@dataclass(frozen=True)
class Scenario:
    """An installation and its hours."""

    name: str
    cards: tuple[CardSpec, ...]
    models: Mapping[str, tuple[Kind, ...]]  # the first kind is the one that is configured
    horizon_s: float
    arrivals: Arrivals
    policy: Policy
    changes: tuple[Change, ...] = ()
    cores: float = 16.0
    spin: float = 0.3  # of a core, burned by a worker that waits for its GPU
    load_s: float = 18.0
    drain_s: float = 3.0
    peak_sigma: float = 0.06  # of the logarithm of a recording's memory peak
    tail_p: float = 0.0
    tail_factor: float = 1.0
    cost_sigma: float = 0.35
    local_sigma: float = 0.20
    told_by_driver: bool = True  # the driver names our processes with their memory, so that a loading one is known as ours
    crooked: Crooked | None = None
    note: str = ""

    def kind(self, model: str, compute_type: str) -> Kind:
        """Raises KeyError for one that does not exist."""
        for kind in self.models[model]:
            if kind.compute_type == compute_type or not compute_type:
                return kind
        raise KeyError(compute_type)

    def cost(self, kind: Kind, batch: int) -> float:
        """Of one window in such a batch, on this machine."""
        return kind.cost(min(batch, self.crooked.plateau) if self.crooked else batch)

    def factor(self, card: int, workers: int, batch: int) -> float:
        """Of a worker's speed, beyond what contention says."""
        return self.crooked.factor(card, workers, batch) if self.crooked else 1.0

    def phases(self) -> list[tuple[float, float]]:
        """Stretches in which nothing changes but the recordings."""
        cuts = sorted({0.0, self.horizon_s, *(change.at_s for change in self.changes if 0 < change.at_s < self.horizon_s)})
        return list(itertools.pairwise(cuts))


class Weather(NamedTuple):
    """What the changes up to a moment add up to; one entry a card where it is a tuple."""

    foreign_mib: tuple[float, ...]
    foreign_busy: tuple[float, ...]
    ambient_c: tuple[float, ...]
    usable: tuple[bool, ...]
    limits: tuple[Limits, ...]
    cores_busy: float
    gpu: float
    host: float


def weather(scenario: Scenario, at_s: float) -> Weather:
    """How things stand at a moment, its own changes included."""
    number = len(scenario.cards)
    mib, busy = [0.0] * number, [0.0] * number
    ambient, usable, limits = [card.ambient_c for card in scenario.cards], [True] * number, [Limits()] * number
    cores_busy, gpu, host = 0.0, 1.0, 1.0
    for change in sorted(scenario.changes, key=lambda change: change.at_s):
        if change.at_s > at_s:
            break
        match change.what:
            case "foreign":
                mib[change.card], busy[change.card] = change.mib, change.busy
            case "ambient":
                ambient[change.card] = change.celsius
            case "lost":
                usable[change.card] = not change.on
            case "limits":
                limits[change.card] = change.limits
            case "cores":
                cores_busy = change.busy
            case "content":
                gpu, host = change.gpu, change.host
    return Weather(tuple(mib), tuple(busy), tuple(ambient), tuple(usable), tuple(limits), cores_busy, gpu, host)
