"""scene: what the search looks at beside a card's own state, and the words that its parts share: proven knobs, blocks, what fits.

Owns: Scene. No decisions.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from whisperd.dispatcher.optimiser import gate
from whisperd.dispatcher.optimiser.compose import batches_of
from whisperd.dispatcher.optimiser.state import Block, CardState, Knobs, Proven
from whisperd.dispatcher.optimiser.values import Card, Policy

replace = msgspec.structs.replace

WORTH = 0.012
"""Gain (logarithm) that a larger setting must bring."""
BRISK_S, CALM_S = 20.0, 45.0
"""Seconds that a pace must cover before it is judged, while searching and later."""
BLOCK_S, BLOCK_MAX_S = 3600.0, 8 * 3600.0


class Scene(NamedTuple):
    """What the climb looks at beside its own state."""

    now: float
    card: Card
    policy: Policy
    cores: int
    cores_busy: float
    host_full: bool
    most_workers: int  # what everything but memory allows
    batch_max: int


def pace_needs_s(state: CardState) -> float:
    """How long a pace must be to say anything."""
    return BRISK_S if state.brisk else CALM_S


def proven_of(state: CardState, model: str) -> Proven | None:
    return next((one for one in reversed(state.proven) if one.model == model), None)


def with_proven(state: CardState, proven: Proven, **changed: float) -> CardState:
    new = replace(proven, **changed)
    return replace(state, proven=tuple(new if one is proven else one for one in state.proven))


def room_for(state: CardState, scene: Scene, knobs: Knobs) -> int:
    most = gate.most(
        state,
        scene.policy,
        scene.card.limits.memory_max_mib,
        compute_type=knobs.compute_type,
        batch=knobs.batch,
        growing=True,
        now=scene.now,
    )
    return 0 if most is None else min(most, scene.most_workers)


def batches(scene: Scene) -> tuple[int, ...]:
    allowed = batches_of(scene.card, scene.policy)
    return tuple(batch for batch in allowed if batch <= scene.batch_max) or allowed[:1]


def block(state: CardState, knobs: Knobs, now: float) -> CardState:
    """It did not pay: not for an hour, then two, up to eight."""
    before = next((one for one in state.blocks if (one.model, one.knobs) == (state.model, knobs)), None)
    times = before.times + 1 if before is not None else 1
    others = tuple(one for one in state.blocks if one is not before)
    until = now + min(BLOCK_MAX_S, BLOCK_S * 2 ** (times - 1))
    return replace(state, blocks=(*others, Block(model=state.model, knobs=knobs, until=until, times=times)))


def is_blocked(state: CardState, knobs: Knobs, now: float) -> bool:
    return any(block.model == state.model and block.knobs == knobs and now < block.until for block in state.blocks)


def any_of(compute_type: str) -> Knobs:
    """Stands for a precision with whatever batch and workers."""
    return Knobs(compute_type=compute_type, batch=0, workers=0)
