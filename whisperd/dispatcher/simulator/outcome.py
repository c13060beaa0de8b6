"""outcome: what came of a simulated run, as values to score and to draw."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from whisperd.dispatcher.optimiser.values import CardPlan, Reason


class Decision(NamedTuple):
    """An answer that differed from the one before, or that had reasons."""

    at_s: float
    cards: tuple[CardPlan, ...]
    reasons: tuple[Reason, ...]


class Crew(NamedTuple):
    """Engines that serve, alike ones together."""

    card: int
    model: str
    compute_type: str
    batch: int
    threads: int
    number: int


class Staffing(NamedTuple):
    """What really serves from a moment on."""

    at_s: float
    crews: tuple[Crew, ...]


class Glance(NamedTuple):
    """One card at one minute, for a picture."""

    at_s: float
    card: int
    workers: int
    batch: int
    own_mib: float
    foreign_mib: float
    wanted_mib: float  # by foreign programs
    celsius: float
    progress_s: float  # of all cards since the begin


class Happening(NamedTuple):
    """Something worth a mark in a picture."""

    at_s: float
    card: int
    what: str


class Denial(NamedTuple):
    """A foreign program asked for memory and had to wait."""

    at_s: float
    card: int
    waited_s: float


@dataclass
class Outcome:
    """A whole run. `progress_s` is audio decoded, `lost_s` the part of it that was decoded in vain."""

    scenario: str
    policy: str
    seed: int
    horizon_s: float
    progress_s: float = 0.0
    lost_s: float = 0.0
    progress_of: dict[str, float] = field(default_factory=dict)
    recordings: int = 0
    ended: int = 0
    out_of_memory: int = 0  # batches that did not fit, each ladder counted once
    hit_twice: int = 0  # recordings that ran out of memory more than once
    load_out_of_memory: int = 0
    died: int = 0
    starts: int = 0
    swaps: int = 0
    throttled_s: list[float] = field(default_factory=list)
    idle_memory_mib_s: float = 0.0  # held by engines while there was nothing at all to do
    waits_s: list[float] = field(default_factory=list)  # arrival to end, of every recording (to the horizon where it has not ended)
    denials: list[Denial] = field(default_factory=list)
    decisions: list[Decision] = field(default_factory=list)
    staffing: list[Staffing] = field(default_factory=list)
    glances: list[Glance] = field(default_factory=list)
    happenings: list[Happening] = field(default_factory=list)

    @property
    def net_s(self) -> float:
        return self.progress_s - self.lost_s
