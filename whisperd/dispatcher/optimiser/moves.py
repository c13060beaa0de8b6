"""moves: which setting is worth trying next: another batch first, then workers, then both at once, then the precision; and which a
scheduled look asks about. What the curves expect decides, among what fits into memory and was not refused lately.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from whisperd.dispatcher.optimiser import curves
from whisperd.dispatcher.optimiser.curves import Belief
from whisperd.dispatcher.optimiser.scene import WORTH, Scene, any_of, batches, is_blocked, replace, room_for
from whisperd.dispatcher.optimiser.state import CardState, Knobs
from whisperd.dispatcher.optimiser.values import CPU

HOPE = 0.5
"""Share of its uncertainty by which a setting is given the benefit of the doubt while searching."""
STILL_S = 600.0
"""Batch and workers have to stand for so long before another precision is tried."""
PRECISION_SD = 0.2


class Move(NamedTuple):
    """A setting worth trying."""

    code: str
    knobs: Knobs
    gain: float
    sd: float


def best_move(state: CardState, scene: Scene, now_at: Knobs) -> Move | None:
    """Batch first: it costs nothing to turn. Then workers, then both at once, then the precision."""
    belief = curves.belief(
        state.comparisons, now_at.compute_type, state.model, scene.now, cores=scene.cores, processor=scene.card.gpu == CPU
    )
    moves = [move for move in _moves(state, scene, now_at, belief) if not is_blocked(state, move.knobs, scene.now)]
    hope = HOPE if state.brisk else 0.0
    worth = [move for move in moves if move.gain + (hope * move.sd if move.knobs.workers > now_at.workers else 0.0) > WORTH]
    if not worth:
        return _precision(state, scene, now_at)
    top = max(worth, key=lambda move: move.gain)
    cheap = [move for move in worth if move.knobs.workers == now_at.workers and _leads_to(now_at, move.knobs, top.knobs)]
    if cheap:
        return max(cheap, key=lambda move: move.gain)
    steps = [move for move in worth if move.knobs.batch == now_at.batch]
    return max(steps, key=lambda move: move.gain) if steps else top


def _leads_to(now_at: Knobs, step: Knobs, top: Knobs) -> bool:
    """A batch larger than the best setting has would take memory that its workers need."""
    return step.batch <= max(top.batch, now_at.batch)


def _moves(state: CardState, scene: Scene, now_at: Knobs, belief: Belief) -> Iterator[Move]:
    for batch in batches(scene):
        fit = room_for(state, scene, replace(now_at, batch=batch))
        if scene.host_full:
            fit = min(fit, now_at.workers)
        least = max(1, min(scene.card.limits.workers_min, scene.most_workers))
        numbers = {now_at.workers, now_at.workers + 1, now_at.workers - 1, _peak(belief, now_at, batch, least, fit)}
        if state.brisk:
            numbers.add(now_at.workers + 2)
        for number in sorted(numbers):
            knobs = Knobs(compute_type=now_at.compute_type, batch=batch, workers=number)
            if least <= number <= fit and knobs != now_at and abs(number - now_at.workers) <= 2:
                gain, sd = _expected(state, belief, now_at, knobs, scene.now)
                yield Move(_code(now_at, knobs), knobs, gain, sd)


def _peak(belief: Belief, now_at: Knobs, batch: int, least: int, most: int) -> int:
    """The number of workers beyond which the curve gains nothing, for a batch."""
    number = min(max(now_at.workers, least), max(most, least))
    while number < most:
        here, more = (Knobs(compute_type=now_at.compute_type, batch=batch, workers=number + step) for step in (0, 1))
        if belief.gain(here, more)[0] < WORTH / 2:
            break
        number += 1
    return number


def _expected(state: CardState, belief: Belief, before: Knobs, after: Knobs, now: float) -> tuple[float, float]:
    return curves.together(belief.gain(before, after), curves.measured(state.comparisons, before, after, state.model, now))


def _code(before: Knobs, after: Knobs) -> str:
    if before.compute_type != after.compute_type:
        return "trial_precision"
    if before.workers == after.workers:
        return "trial_batch"
    return "trial_workers" if before.batch == after.batch else "trial_trade"


def _precision(state: CardState, scene: Scene, now_at: Knobs) -> Move | None:
    """The operator's next precision, when everything else has stood still for long."""
    if scene.now - state.still_since < STILL_S or scene.card.gpu == CPU:
        return None
    for compute_type in scene.policy.compute_types:
        knobs = replace(now_at, compute_type=compute_type)
        if compute_type != now_at.compute_type and not is_blocked(state, any_of(compute_type), scene.now):
            fit = room_for(state, scene, knobs)
            if fit:
                return Move("trial_precision", replace(knobs, workers=min(fit, now_at.workers)), 0.0, PRECISION_SD)
    return None


def scheduled(turn: int, state: CardState, scene: Scene, knobs: Knobs) -> tuple[str, Knobs] | None:
    """What a scheduled look asks about, in turn: one worker fewer, a smaller batch, one worker more; those of them that are possible."""
    asked = (kind(state, scene, knobs) for kind in (_fewer, _smaller, _more))
    possible = [(code, other) for code, other in asked if other is not None]
    return possible[turn % len(possible)] if possible else None


def _fewer(state: CardState, scene: Scene, knobs: Knobs) -> tuple[str, Knobs | None]:
    least = max(1, scene.card.limits.workers_min)
    return "probe_fewer", replace(knobs, workers=knobs.workers - 1) if knobs.workers > least else None


def _smaller(state: CardState, scene: Scene, knobs: Knobs) -> tuple[str, Knobs | None]:
    smaller = [batch for batch in batches(scene) if batch < knobs.batch]
    return "probe_smaller", replace(knobs, batch=max(smaller)) if smaller else None


def _more(state: CardState, scene: Scene, knobs: Knobs) -> tuple[str, Knobs | None]:
    """With the largest batch that leaves room for it."""
    wanted = (
        replace(knobs, batch=batch, workers=knobs.workers + 1) for batch in sorted(batches(scene), reverse=True) if batch <= knobs.batch
    )
    fitting = (more for more in wanted if not scene.host_full and room_for(state, scene, more) >= more.workers)
    return "probe_more", next(fitting, None)
