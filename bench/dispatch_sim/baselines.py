"""baselines: two more laws to compare with, beside those that the product ships.

Owns: Aimd (TCP's law with out of memory as its signal), Gradient (Netflix's Gradient2 with the time of a window as its signal).
"""

from __future__ import annotations

from dataclasses import dataclass

from whisperd.dispatcher.optimiser.values import Advice, Observation, Policy
from whisperd.dispatcher.simulator import baselines
from whisperd.dispatcher.simulator.baselines import Baseline, Remembered
from whisperd.dispatcher.simulator.decider import Decider

WORKERS_MAX = 12


@dataclass
class Growing(Remembered):
    """What a growing law keeps."""

    limit: float = 1.0
    looked_at: float | None = None
    audio_s: float = 0.0
    short: float = 0.0
    long: float = 0.0


class Aimd(Baseline):
    """One worker more every minute in which all are busy; out of memory halves them."""

    name = "aimd"

    def start(self, policy: Policy) -> Growing:
        return Growing()

    def decide(self, state: Growing, observation: Observation, policy: Policy) -> tuple[Growing, Advice]:
        if any("memory" in event.kind for event in observation.events):
            state.limit = max(1.0, state.limit * 0.5)
            state.looked_at = observation.now
        elif state.looked_at is None:
            state.looked_at = observation.now
        elif observation.now - state.looked_at >= 60:
            state.looked_at = observation.now
            state.limit = min(float(WORKERS_MAX), state.limit + 1)
        return state, _everywhere(self, state, observation, policy)


class Gradient(Baseline):
    """Gradient2: the limit follows the ratio of the long to the short mean of what a window takes one worker."""

    name = "gradient2"

    def start(self, policy: Policy) -> Growing:
        return Growing()

    def decide(self, state: Growing, observation: Observation, policy: Policy) -> tuple[Growing, Advice]:
        if state.looked_at is None:
            state.looked_at = observation.now
        if observation.now - state.looked_at >= 60:
            self._learn(state, observation, observation.now - state.looked_at)
            state.looked_at = observation.now
        return state, _everywhere(self, state, observation, policy)

    def _learn(self, state: Growing, observation: Observation, seconds: float) -> None:
        workers = [worker for card in observation.cards for worker in card.workers if worker.life == "busy"]
        audio_s = sum(worker.audio_s for card in observation.cards for worker in card.workers)
        gained_s, state.audio_s = audio_s - state.audio_s, audio_s
        if gained_s <= 0 or not workers or len(workers) < state.limit / 2:
            return
        state.short = len(workers) * seconds / gained_s
        state.long = state.short if not state.long else state.long + (state.short - state.long) * 2 / 601
        gradient = max(0.5, min(1.0, 1.5 * state.long / state.short))
        wanted = state.limit * gradient + 1
        state.limit = max(1.0, min(float(WORKERS_MAX), 0.8 * state.limit + 0.2 * wanted))


def _everywhere(law: Baseline, state: Growing, observation: Observation, policy: Policy) -> Advice:
    model = law.model(state, observation.backlog)
    return Advice(cards=tuple(law.plan(card, model, int(state.limit), policy) for card in observation.cards))


def named(name: str) -> Decider:
    """By name; those of the product too. Raises ValueError for none of them."""
    own: dict[str, Decider] = {law.name: law for law in (Aimd(), Gradient())}
    return own.get(name) or baselines.named(name)


NAMES = ("rule-a", "rule-a-full", "formula-b", "formula-b-naive", "aimd", "gradient2", "fixed-1")
