"""models: which model a card should run: the loaded one as long as it has work, within bounds (OPTIMISER §5, model choice).

A swap costs a load of every worker, so there is a least time between two; a job of another model waits no longer than `swap_wait_s` for the
card's turn, unless another card serves its model. Cards that could run the same prefer to differ while more than one model waits.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from whisperd.dispatcher.optimiser.state import CardState
from whisperd.dispatcher.optimiser.values import Backlog, Card, Policy


def choose(state: CardState, card: Card, backlog: Sequence[Backlog], *, elsewhere: Collection[str], policy: Policy, now: float) -> str:
    """The model for this card now; "" when none is known. `elsewhere`: models that other cards serve."""
    waiting = {one.model: one for one in backlog if one.jobs > 0}
    if not state.model:
        return _first(state, backlog, waiting, elsewhere)
    rivals = [one for one in waiting.values() if one.model != state.model]
    stayed_s = float("inf") if state.swapped_at is None else now - state.swapped_at
    if not rivals or stayed_s < policy.swap_min_s:
        return state.model
    unserved = [one for one in rivals if one.model not in elsewhere]
    own = waiting.get(state.model)
    if own is None and not any(worker.fed and worker.jobs for worker in card.workers if worker.model == state.model):
        return _next(unserved or rivals).model
    if state.model in elsewhere and unserved:
        return _next(unserved).model
    urgent = [one for one in unserved if one.urgent and not (own is not None and own.urgent)]
    if urgent:
        return _next(urgent).model
    overdue = [one for one in unserved if one.oldest_s >= policy.swap_wait_s]
    return _next(overdue).model if overdue and stayed_s >= policy.swap_wait_s else state.model


def _next(rivals: Sequence[Backlog]) -> Backlog:
    """Urgent ones first, then who has waited longest."""
    return max(rivals, key=lambda one: (one.urgent > 0, one.oldest_s, one.jobs, one.model))


def _first(state: CardState, backlog: Sequence[Backlog], waiting: Mapping[str, Backlog], elsewhere: Collection[str]) -> str:
    """Of a card that has none yet: what waits, not served by another card if possible; else what it ran last."""
    unserved = [one for one in waiting.values() if one.model not in elsewhere]
    if waiting:
        return _next(unserved or list(waiting.values())).model
    if backlog:
        return backlog[0].model
    return state.proven[-1].model if state.proven else ""
