"""run: scenarios through policies, two processes at most; scores as plain values.

Owns: `play` (one scenario, one policy, one seed), `play_all` (many of them), `policy_named`.
"""

from __future__ import annotations

import dataclasses
import functools
import multiprocessing
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.dispatch_sim import baselines
from bench.dispatch_sim.oracle import Oracle
from bench.dispatch_sim.scenes import crooked_scene, named, random_scene
from bench.dispatch_sim.score import Score, score
from whisperd.dispatcher.optimiser.values import Advice, Observation, Policy
from whisperd.dispatcher.simulator.decider import Current, Decider
from whisperd.dispatcher.simulator.outcome import Outcome
from whisperd.dispatcher.simulator.record import share_of
from whisperd.dispatcher.simulator.scenario import Scenario
from whisperd.dispatcher.simulator.world import simulate


class Timed:
    """A policy with a stop watch beside it: its own processor time, whatever else the machine does."""

    def __init__(self, decider: Decider) -> None:
        self.decider, self.name = decider, decider.name
        self.took_ms: list[float] = []

    def start(self, policy: Policy) -> Any:
        return self.decider.start(policy)

    def restart(self, state: Any, policy: Policy) -> Any:
        return self.decider.restart(state, policy)

    def need_mib(self, state: Any, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        return self.decider.need_mib(state, gpu, model, compute_type, batch)

    def decide(self, state: Any, observation: Observation, policy: Policy) -> tuple[Any, Advice]:
        began = time.thread_time()
        answer = self.decider.decide(state, observation, policy)
        self.took_ms.append(1000 * (time.thread_time() - began))
        return answer


class Order(NamedTuple):
    """One run: a scenario by name, or "random-SEED", or "crooked-SEED"."""

    scenario: str
    policy: str
    seed: int


def policy_named(name: str) -> Decider:
    """By the name that the command line takes. Raises ValueError."""
    return Current() if name == "current" else baselines.named(name)


def scene_of(name: str) -> Scenario:
    """By its name. Raises KeyError."""
    kind, _, seed = name.partition("-")
    made = {"random": random_scene, "crooked": crooked_scene}
    return made[kind](int(seed)) if kind in made else named()[name]


@functools.lru_cache(maxsize=32)
def _oracle(name: str, seed: int) -> tuple[Oracle, Outcome]:
    oracle = Oracle(scene_of(name))
    return oracle, simulate(oracle.scenario, oracle, seed)


def play(order: Order, decider: Decider | None = None) -> tuple[Score, Outcome, Outcome]:
    """The score, the run and the oracle's run."""
    oracle, best = _oracle(order.scenario, order.seed)
    timed = Timed(decider or policy_named(order.policy))
    outcome = simulate(oracle.scenario, timed, order.seed)
    found = score(oracle.scenario, outcome, best, oracle.phases)
    times = dataclasses.replace(found, decide_p99_ms=share_of(timed.took_ms, 0.99), decide_max_ms=max(timed.took_ms))
    return times, outcome, best


def _scored(order: Order) -> dict[str, Any]:
    return dataclasses.asdict(play(order)[0])


def play_all(orders: Sequence[Order], processes: int = 2) -> Iterable[dict[str, Any]]:
    """Scores as plain values, in the order of `orders`."""
    if processes <= 1:
        yield from map(_scored, orders)
        return
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        yield from pool.imap(_scored, orders, chunksize=1)
