"""decider: what the simulator asks a policy, and the product's own optimiser as one of them.

A decider keeps no state of its own: what it remembers is the value that `start` made and `decide` returned.
"""

from __future__ import annotations

from typing import Any, Protocol

from whisperd.dispatcher import optimiser
from whisperd.dispatcher.optimiser.values import Advice, Observation, Policy


class Decider(Protocol):
    """A policy that sizes the pool."""

    name: str

    def start(self, policy: Policy) -> Any:
        """What it knows when an installation is new."""

    def restart(self, state: Any, policy: Policy) -> Any:
        """What it still knows after the daemon has ended and begun anew."""

    def decide(self, state: Any, observation: Observation, policy: Policy) -> tuple[Any, Advice]:
        """Called every 2 s."""

    def need_mib(self, state: Any, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        """What must be free before a worker is started; None: nobody looks."""


class Current:
    """The optimiser of this very package."""

    name = "current"

    def start(self, policy: Policy) -> Any:
        return optimiser.start(policy, [])

    def restart(self, state: Any, policy: Policy) -> Any:
        return optimiser.start(policy, state.learned())

    def decide(self, state: Any, observation: Observation, policy: Policy) -> tuple[Any, Advice]:
        return optimiser.decide(state, observation, policy)

    def need_mib(self, state: Any, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        return optimiser.start_need_mib(state, gpu, model, compute_type, batch)
