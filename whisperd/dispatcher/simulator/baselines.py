"""baselines: the rules met in the wild that the optimiser is measured against (OPTIMISER §0). None of them looks before it starts a worker.

Owns: Fixed, RuleA (utilisation), FormulaB (a share of the memory divided by the table's figure). Their state is their own mutable value.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from whisperd.dispatcher.optimiser.values import Advice, Backlog, Card, CardPlan, Observation, Policy
from whisperd.dispatcher.simulator.decider import Decider

EVERY_S = 300.0


@dataclass
class Remembered:
    """What a baseline keeps between two calls."""

    workers: int = 1
    acted_at: float | None = None
    model: str = ""
    busy: list[float] = field(default_factory=list)
    jobs: list[int] = field(default_factory=list)
    done_before: int = 0
    share: dict[str, int] = field(default_factory=dict)


class Baseline:
    """What they have in common: one batch, one precision, the model of whoever waits longest."""

    name = "baseline"

    def start(self, policy: Policy) -> Remembered:
        return Remembered()

    def restart(self, state: Remembered, policy: Policy) -> Remembered:
        return self.start(policy)

    def need_mib(self, state: Remembered, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        return None

    def model(self, state: Remembered, backlog: tuple[Backlog, ...]) -> str:
        if backlog:
            state.model = max(backlog, key=lambda waiting: waiting.oldest_s).model
        return state.model

    def plan(self, card: Card, model: str, workers: int, policy: Policy) -> CardPlan:
        compute_type = policy.compute_types[0] if policy.compute_types else ""
        return CardPlan(gpu=card.gpu, model=model, compute_type=compute_type, batch=batch_of(card, policy), workers=workers)


def batch_of(card: Card, policy: Policy) -> int:
    return policy.cpu_batch_first if card.gpu == "cpu" else policy.batch_first


def due(state: Remembered, now: float) -> bool:
    """Every five minutes, the first five being for looking."""
    if state.acted_at is None:
        state.acted_at = now
    if now - state.acted_at < EVERY_S:
        return False
    state.acted_at = now
    return True


def spread(workers: int, cards: int) -> list[int]:
    """One number for the whole machine, dealt out in turn."""
    return [workers // cards + (1 if index < workers % cards else 0) for index in range(cards)]


class Fixed(Baseline):
    """So many on each card, for ever."""

    def __init__(self, workers: int, batch: int | None = None) -> None:
        self.workers, self.batch, self.name = workers, batch, f"fixed-{workers}" + (f"x{batch}" if batch else "")

    def decide(self, state: Remembered, observation: Observation, policy: Policy) -> tuple[Remembered, Advice]:
        model = self.model(state, observation.backlog)
        plans = [self.plan(card, model, self.workers, policy) for card in observation.cards]
        if self.batch is not None:
            plans = [
                CardPlan(gpu=plan.gpu, model=plan.model, compute_type=plan.compute_type, batch=self.batch, workers=plan.workers)
                for plan in plans
            ]
        return state, Advice(cards=tuple(plans))


class RuleA(Baseline):
    """Every five minutes: utilisation above 0.9 is a worker more, below 0.6 one fewer, between 1 and 10. No figures count as 0.

    `full` adds: recordings that take more than a minute are a worker fewer, less than 20 s at a busy card one more.
    """

    def __init__(self, *, full: bool = False) -> None:
        self.full, self.name = full, "rule-a-full" if full else "rule-a"

    def start(self, policy: Policy) -> Remembered:
        return Remembered(workers=2)

    def decide(self, state: Remembered, observation: Observation, policy: Policy) -> tuple[Remembered, Advice]:
        state.busy += [(card.utilisation_percent or 0) / 100 for card in observation.cards]
        state.jobs.append(sum(worker.jobs for card in observation.cards for worker in card.workers))
        if due(state, observation.now) and state.busy:
            busy = sum(state.busy) / len(state.busy)
            change = 1 if busy > 0.9 else -1 if busy < 0.6 else 0
            state.workers = min(10, max(1, state.workers + change))
            if self.full:
                state.workers = min(10, max(1, state.workers + self._for_time(state, observation, busy)))
            state.busy, state.jobs = [], []
        model = self.model(state, observation.backlog)
        shares = spread(state.workers, len(observation.cards))
        plans = [self.plan(card, model, workers, policy) for card, workers in zip(observation.cards, shares, strict=True)]
        return state, Advice(cards=tuple(plans))

    def _for_time(self, state: Remembered, observation: Observation, busy: float) -> int:
        done = sum(worker.jobs_done for card in observation.cards for worker in card.workers)
        ended, state.done_before = max(0, done - state.done_before), done
        if not ended or not state.jobs:
            return 0
        takes_s = EVERY_S * sum(state.jobs) / len(state.jobs) / ended  # Little's law
        return -1 if takes_s > 60 else 1 if takes_s < 20 and busy > 0.7 else 0


class FormulaB(Baseline):
    """floor(0.8 × memory / what the table says a worker needs), at most eight in all; `naive` counts only what is free now."""

    def __init__(self, *, naive: bool = False) -> None:
        self.naive, self.name = naive, "formula-b-naive" if naive else "formula-b"

    def decide(self, state: Remembered, observation: Observation, policy: Policy) -> tuple[Remembered, Advice]:
        model = self.model(state, observation.backlog)
        if (due(state, observation.now) or not state.share) and all(card.memory_free_mib is not None for card in observation.cards):
            state.share = self._shares(observation.cards, model, policy)
        plans = [self.plan(card, model, state.share.get(card.gpu, 0), policy) for card in observation.cards]
        return state, Advice(cards=tuple(plans))

    def _shares(self, cards: tuple[Card, ...], model: str, policy: Policy) -> dict[str, int]:
        shares = {}
        for card in cards:
            own_mib = 0 if self.naive else sum(worker.memory_mib or 0 for worker in card.workers)
            shares[card.gpu] = int(0.8 * ((card.memory_free_mib or 0) + own_mib) // need_mib(card, model, policy))
        while sum(shares.values()) > 8:
            shares[max(shares, key=lambda gpu: shares[gpu])] -= 1
        if not any(shares.values()):
            shares[cards[0].gpu] = 1
        return shares


def need_mib(card: Card, model: str, policy: Policy) -> float:
    """What the table says of one worker with the usual batch."""
    for need in policy.needs:
        if need.model == model and (not policy.compute_types or need.compute_type == policy.compute_types[0]):
            return need.weights_mib + need.window_mib * batch_of(card, policy)
    return 4000.0


def named(name: str) -> Decider:
    """By the name that the command line takes. Raises ValueError for none of them."""
    fixed = re.fullmatch(r"fixed-(\d{1,3})(?:x(\d{1,3}))?", name)
    if fixed:
        return Fixed(int(fixed[1]), int(fixed[2]) if fixed[2] else None)
    known: dict[str, Decider] = {
        "rule-a": RuleA(),
        "rule-a-full": RuleA(full=True),
        "formula-b": FormulaB(),
        "formula-b-naive": FormulaB(naive=True),
    }
    if name not in known:
        raise ValueError(f"no policy {name!r}: current, {', '.join(known)}, fixed-N or fixed-NxBATCH")
    return known[name]
