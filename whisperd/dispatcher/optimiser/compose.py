"""compose: the plan in force: the wanted knobs under everything that limits them (OPTIMISER §5).

What was in force is only exceeded at a look, within the memory gate, and on a card that can be read and on which something can start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from whisperd.dispatcher.optimiser import gate, sentences
from whisperd.dispatcher.optimiser.guards import WORKING, Ceiling
from whisperd.dispatcher.optimiser.sentences import gib, workers
from whisperd.dispatcher.optimiser.state import CardState
from whisperd.dispatcher.optimiser.values import CPU, Card, CardPlan, Policy, Reason

replace = msgspec.structs.replace

PROBE_AFTER_S = 900.0
"""A setting is not questioned sooner than this after a change."""


class Terms(NamedTuple):
    """What a plan is made under."""

    card: Card
    policy: Policy
    limits: Sequence[Ceiling]
    now: float
    may_rise: bool  # this is a look
    check_memory: bool  # something about memory may have changed


class Size(NamedTuple):
    """How many, how large, and what keeps it from being more."""

    workers: int
    batch: int
    binding: Ceiling | None


def compose(state: CardState, terms: Terms, *, told: bool) -> tuple[CardState, tuple[Reason, ...]]:
    """The plan, and why it changed unless that was `told` already."""
    before = state.plan
    size = _held_back(state, terms, _limited(state, terms))
    plan = CardPlan(gpu=state.gpu, model=state.model, compute_type=state.knobs.compute_type, batch=size.batch, workers=size.workers)
    code = size.binding.code if size.binding else ""
    if plan == before:
        return (state if code == state.binding else replace(state, binding=code)), ()
    said = () if told else _said(state, before, plan, size.binding)
    return replace(state, plan=plan, binding=code, probe_at=max(state.probe_at, terms.now + PROBE_AFTER_S)), said


def batches_of(card: Card, policy: Policy) -> tuple[int, ...]:
    return policy.cpu_batches if card.gpu == CPU else policy.batches


# --- under limits ---


def _limited(state: CardState, terms: Terms) -> Size:
    """As wanted, or what settings, guards and memory leave of it."""
    before, card = state.plan, terms.card
    wanted = max(state.knobs.workers, min(card.limits.workers_min, card.limits.workers_max))
    limit = min(terms.limits, key=lambda one: one.workers)
    binding = limit if limit.workers < wanted else None
    number = min(wanted, limit.workers)
    batch = _capped_batch(state, terms)
    if batch < state.knobs.batch and binding is None:
        binding = Ceiling(number, "out_of_memory", f"batch {batch} at most for now: memory ran out with more")
    if terms.check_memory and number:
        size = _within_memory(state, terms, number, batch)
        return Size(size.workers, size.batch, size.binding or binding)
    if before is not None:
        number, batch = min(number, before.workers), min(batch, before.batch)
        if binding is None and number < wanted and state.binding:
            binding = Ceiling(number, state.binding, "")
    return Size(number, batch, binding)


def _capped_batch(state: CardState, terms: Terms) -> int:
    most = min((cap.batch for cap in state.caps if cap.batch and terms.now < cap.until), default=state.knobs.batch)
    if most >= state.knobs.batch:
        return state.knobs.batch
    allowed = batches_of(terms.card, terms.policy)
    return max((batch for batch in allowed if batch <= most), default=min(allowed))


def _within_memory(state: CardState, terms: Terms, number: int, batch: int) -> Size:
    """What is new must pass the gate of growth; what runs already must fit into the room as it is now. Smaller batches are for when not
    even one fits."""
    before = state.plan
    kept = before is not None and (before.model, before.compute_type, before.batch) == (state.model, state.knobs.compute_type, batch)
    running = min(before.workers, number) if before is not None and kept else 0
    room = gib(state.room_mib or 0)
    smaller = sorted((one for one in batches_of(terms.card, terms.policy) if one < batch), reverse=True)
    for size in (batch, *smaller):
        fit = _fit(state, terms, size, running if size == batch else 0)
        if fit is None:
            return Size(number, batch, None)
        if fit:
            text = f"at most {workers(fit)} with batch {size}: more does not fit into {room}"
            short = Ceiling(fit, "memory", text) if fit < number or size < batch else None
            return Size(min(number, fit), size, short)
    return Size(0, batch, Ceiling(0, "memory", f"no worker: none fits into {room}"))


def _fit(state: CardState, terms: Terms, batch: int, running: int) -> int | None:
    """How many workers memory takes; None: nobody knows."""

    def most(*, growing: bool) -> int | None:
        return gate.most(
            state,
            terms.policy,
            terms.card.limits.memory_max_mib,
            compute_type=state.knobs.compute_type,
            batch=batch,
            growing=growing,
            now=terms.now,
        )

    grow = most(growing=True)
    if grow is None or not running:
        return grow
    return max(grow, min(running, most(growing=False) or 0))


# --- what may rise, and when ---


def _held_back(state: CardState, terms: Terms, size: Size) -> Size:
    """Nothing rises between looks, blind, or where nothing new can start; a batch only once those that leave are gone."""
    before = state.plan
    number, batch = size.workers, size.batch
    if state.blind_since is not None and state.room_mib is None:  # a card that never tells: one worker, as far as anybody knows
        number = min(number, 1 if before is None else max(1, before.workers))
    starts = terms.may_rise and _can_start(state, terms.card)
    if before is None:
        return Size(number if starts else 0, batch, size.binding)
    same = (before.model, before.compute_type) == (state.model, state.knobs.compute_type)
    if same and batch > before.batch and (number < before.workers or len(terms.card.workers) > number):
        batch = before.batch
    risen = number > before.workers or batch > before.batch or not same
    if risen and not starts:
        number, batch = min(number, before.workers), min(batch, before.batch)
    return Size(number, batch, size.binding)


def _can_start(state: CardState, card: Card) -> bool:
    """Never on a card that told of its memory once and does not now."""
    return card.usable in WORKING and (state.blind_since is None or state.room_mib is None)


# --- why ---


def _said(state: CardState, before: CardPlan | None, plan: CardPlan, binding: Ceiling | None) -> tuple[Reason, ...]:
    """When neither a trial nor a guard has spoken: the limit that holds now, or the one that held until now."""
    facts = {"workers": float(plan.workers), "batch": float(plan.batch)}
    if binding is not None and binding.text:
        return (sentences.reason(state.gpu, binding.code, binding.text, **facts),)
    if before is not None and plan.workers == before.workers and not state.binding:
        text = f"batch {plan.batch} instead of {before.batch}, now that those who left are gone"
        return (sentences.reason(state.gpu, "trial_goes_on" if state.trial else "followed", text, **facts),)
    over = f": {OVER[state.binding]}" if state.binding in OVER else ""
    again = "again" if before is not None and plan.workers > before.workers else "from now on"
    text = f"{workers(plan.workers)} with batch {plan.batch} {again}{over}"
    return (sentences.reason(state.gpu, "resumed" if over else "plan", text, **facts),)


OVER = {
    "lost": "the card is back",
    "drain": "the card was reset",
    "suspect": "the card has been quiet",
    "frozen": "new ones can start again",
    "blind": "the card can be read again",
    "paused": "the pause is over",
    "limits": "the settings allow more",
    "idle": "there is work",
    "heat": "the card is cool",
    "hot": "the card is cool",
    "foreign": "there is room again",
    "squeezed": "there is room again",
    "memory": "there is room again",
    "out_of_memory": "memory has sufficed for a while",
    "no_room": "another attempt to start more",
    "load_out_of_memory": "another attempt to start more",
}
"""What is said when a limit has ended."""
