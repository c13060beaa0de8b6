"""oracle: the best static plan of each phase, from the model without noise; what a policy is measured against.

It knows everything but chance: memory is safe with every worker at the 99.7th percentile of its peak and one of them in the tail, no card
slows down for heat, no more threads than cores, changes are met the moment they come. Loads and drains cost it what they cost anybody.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from whisperd.dispatcher.optimiser.values import Advice, CardPlan, Observation, Policy
from whisperd.dispatcher.simulator import contention
from whisperd.dispatcher.simulator.contention import Group
from whisperd.dispatcher.simulator.ground import HYSTERESIS_K, SLOWED
from whisperd.dispatcher.simulator.outcome import Crew
from whisperd.dispatcher.simulator.scenario import CardSpec, Kind, Scenario, Weather, weather
from whisperd.dispatcher.simulator.world import EPOCH_S

SAFE_SIGMAS = 2.7
ROOMY = 1.3
"""Peak of a worker that holds no more than its batch needs."""
WORTH = 1.005
"""A larger plan must bring half a percent."""


class Phase(NamedTuple):
    """The best plan from `begin_s` on: audio seconds per second, and the crews."""

    begin_s: float
    end_s: float
    model: str
    rate: float
    crews: tuple[Crew, ...]


# --- what a plan would bring ---


def rate_of(scenario: Scenario, now: Weather, crews: Sequence[Crew], *, cool: bool = False) -> float:
    """Audio seconds per second of these crews, without noise. `cool`: 0 when a card would slow itself down."""
    crews = [crew for crew in crews if crew.number and now.usable[crew.card]]
    clocks = [1.0] * len(scenario.cards)
    rate, busy = _solve(scenario, now, crews, clocks)
    for index, spec in enumerate(scenario.cards):
        if spec.is_cpu or _celsius(spec, now.ambient_c[index], busy[index], 1.0) < spec.slowdown_c:
            continue
        if cool and any(crew.card == index for crew in crews):
            return 0.0
        clocks[index] = _mean_clock(scenario, now, crews, index, busy[index])
    return rate if min(clocks) == 1.0 else _solve(scenario, now, crews, clocks)[0]


def _mean_clock(scenario: Scenario, now: Weather, crews: Sequence[Crew], index: int, busy: float) -> float:
    """Of a card that goes to and fro between its full clock and its slow one."""
    spec = scenario.cards[index]
    slow = [SLOWED if other == index else 1.0 for other in range(len(scenario.cards))]
    hot = _celsius(spec, now.ambient_c[index], busy, 1.0)
    cold = _celsius(spec, now.ambient_c[index], _solve(scenario, now, crews, slow)[1][index], SLOWED)
    middle = spec.slowdown_c - HYSTERESIS_K / 2
    return SLOWED if cold >= middle else 1 - (1 - SLOWED) * max(0.0, min(1.0, (hot - middle) / (hot - cold)))


def _celsius(spec: CardSpec, ambient_c: float, busy: float, clock: float) -> float:
    return ambient_c + spec.kelvin_per_w * (spec.idle_w + (spec.full_w - spec.idle_w) * busy * clock)


def _solve(scenario: Scenario, now: Weather, crews: Sequence[Crew], clocks: Sequence[float]) -> tuple[float, tuple[float, ...]]:
    groups = []
    for crew in crews:
        spec, kind = scenario.cards[crew.card], scenario.kind(crew.model, crew.compute_type)
        cost = scenario.cost(kind, crew.batch)
        if spec.is_cpu:
            groups.append(Group(crew.card, crew.number, 0.0, kind.host_s * cost * now.host, crew.threads))
        else:
            gpu_s = kind.gpu_s * cost * now.gpu / (spec.speed * clocks[crew.card])
            groups.append(Group(crew.card, crew.number, gpu_s, kind.host_s * now.host))
    found = contention.solve(groups, scenario.cards, now.foreign_busy, scenario.cores, cores_busy=now.cores_busy, spin=scenario.spin)
    on_card = [sum(crew.number for crew in crews if crew.card == index) for index in range(len(scenario.cards))]
    rates = (
        crew.number * rate * scenario.factor(crew.card, on_card[crew.card], crew.batch)
        for crew, rate in zip(crews, found.rates, strict=True)
    )
    return sum(rates), found.busy


# --- the best of them ---


def best(scenario: Scenario) -> list[Phase]:
    """The best plan of every phase; of the first model where there are several."""
    return [phase for phases in (best_of(scenario, model) for model in list(scenario.models)[:1]) for phase in phases]


def best_of(scenario: Scenario, model: str, *, batches: tuple[int, ...] | None = None, kinds: int | None = None) -> list[Phase]:
    """For one model. `batches` and `kinds` narrow the choice."""
    found: list[Phase] = []
    known: dict[Weather, tuple[float, tuple[Crew, ...]]] = {}
    for begin_s, end_s in scenario.phases():
        now = weather(scenario, begin_s)
        if now not in known:
            options = [_options(scenario, now, index, model, batches=batches, kinds=kinds) for index in range(len(scenario.cards))]
            known[now] = _climb(scenario, now, options, cool=True)
            if not known[now][0]:
                known[now] = _climb(scenario, now, options, cool=False)
        found.append(Phase(begin_s, end_s, model, *known[now]))
    return found


def _climb(scenario: Scenario, now: Weather, options: list[list[Crew]], *, cool: bool) -> tuple[float, tuple[Crew, ...]]:
    """Card by card, again until nothing gets better: cards meet only at the host's cores."""
    chosen: list[Crew | None] = [None] * len(options)
    top = 0.0
    for _ in range(3):
        before = top
        for index, own in enumerate(options):
            others = [crew for other, crew in enumerate(chosen) if crew is not None and other != index]
            top, chosen[index] = rate_of(scenario, now, others, cool=cool), None
            for crew in own:
                rate = rate_of(scenario, now, [*others, crew], cool=cool)
                if rate > top * WORTH:
                    top, chosen[index] = rate, crew
        if len(options) == 1 or top <= before * WORTH:
            break
    return top, tuple(crew for crew in chosen if crew is not None)


def _options(scenario: Scenario, now: Weather, index: int, model: str, *, batches: tuple[int, ...] | None, kinds: int | None) -> list[Crew]:
    """Every plan of a card that its memory and its operator allow, the smallest first."""
    spec, limits, policy = scenario.cards[index], now.limits[index], scenario.policy
    if not now.usable[index] or limits.paused:
        return []
    allowed = batches or (policy.cpu_batches if spec.is_cpu else policy.batches)
    room = spec.memory_mib - spec.reserved_mib - now.foreign_mib[index]
    if limits.memory_max_mib is not None:
        room = min(room, limits.memory_max_mib)
    types = [kind for kind in scenario.models[model] if not policy.compute_types or kind.compute_type in policy.compute_types]
    found = []
    for kind in types[:kinds]:
        for batch in allowed:
            most = min(_fitting(scenario, kind, batch, room), limits.workers_max)
            for number in range(1, (min(most, round(scenario.cores)) if spec.is_cpu else most) + 1):
                threads = max(1, round(scenario.cores) // number) if spec.is_cpu else 0
                found.append(Crew(index, model, kind.compute_type, batch, threads, number))
    return sorted(found, key=lambda crew: crew.number * scenario.kind(model, crew.compute_type).memory_mib(crew.batch))


def _fitting(scenario: Scenario, kind: Kind, batch: int, room_mib: float) -> int:
    peak = math.exp(SAFE_SIGMAS * scenario.peak_sigma)
    spare = (scenario.tail_factor - 1) * peak * kind.window_mib * batch if scenario.tail_p else 0.0
    return max(0, int((room_mib - spare) // kind.memory_mib(batch, peak)))


# --- as a policy ---


@dataclass
class Remembered:
    model: str = ""
    phases: dict[str, list[Phase]] = field(default_factory=dict)
    crews: tuple[Crew, ...] = ()
    since: float = 0.0  # when the model was chosen
    settled: bool = True  # nobody leaves any more since the last change


class Oracle:
    """Follows its phases; of several models it stays with one as long as `swap_wait_s` lets it, or until its queue is empty."""

    name = "oracle"

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.phases = {model: best_of(scenario, model) for model in scenario.models}

    def start(self, policy: Policy) -> Remembered:
        return Remembered(model=next(iter(self.phases)), phases=self.phases, since=EPOCH_S)

    def restart(self, state: Remembered, policy: Policy) -> Remembered:
        return state

    def need_mib(self, state: Remembered, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        return math.ceil(self.scenario.kind(model, compute_type).weights_mib)

    def decide(self, state: Remembered, observation: Observation, policy: Policy) -> tuple[Remembered, Advice]:
        at_s = observation.now - EPOCH_S
        self._choose(state, observation, policy)
        phase = next((one for one in reversed(state.phases[state.model]) if one.begin_s <= at_s + 1e-6), state.phases[state.model][0])
        recycle = () if phase.crews == state.crews else self._bloated(observation, phase)
        if phase.crews != state.crews:
            state.crews, state.settled = phase.crews, False
        else:
            state.settled = state.settled or not any(one.life == "draining" for card in observation.cards for one in card.workers)
        plans = tuple(self._plan(crew, observation, settled=state.settled) for crew in phase.crews)
        return state, Advice(cards=plans, recycle=recycle)

    def _choose(self, state: Remembered, observation: Observation, policy: Policy) -> None:
        """The model whose turn it is: another one when this one's queue is empty, or when the others have waited as long as they may."""
        waiting = {one.model: one.oldest_s for one in observation.backlog if one.jobs}
        others = [model for model in self.phases if model != state.model and model in waiting]
        due = [model for model in others if waiting[model] > policy.swap_wait_s and observation.now - state.since > policy.swap_wait_s]
        if others and (due or state.model not in waiting):
            state.model, state.since = (due or others)[0], observation.now

    def _plan(self, crew: Crew, observation: Observation, *, settled: bool) -> CardPlan:
        """A batch grows only when those that were asked to leave have left."""
        has = [worker.batch for worker in observation.cards[crew.card].workers]
        return CardPlan(
            gpu=self.scenario.cards[crew.card].gpu,
            model=crew.model,
            compute_type=crew.compute_type,
            batch=crew.batch if settled else min([crew.batch, *has]),
            workers=crew.number,
        )

    def _bloated(self, observation: Observation, phase: Phase) -> tuple[int, ...]:
        """Workers that still hold the memory of a larger batch than they are about to have."""
        found: list[int] = []
        for crew in phase.crews:
            need_mib = self.scenario.kind(crew.model, crew.compute_type).memory_mib(crew.batch, ROOMY)
            found += [worker.id for worker in observation.cards[crew.card].workers if (worker.memory_mib or 0) > need_mib]
        return tuple(found)
