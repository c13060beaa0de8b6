"""decide: the order of things at each call: look at the cards, guard them, plan now and then, and say what changed.

Owns: `decide`, `start_need_mib`. Each card is decided by itself, from its own state; a plan rises only at a look, never beyond the memory
gate, and only on a card that can be read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from whisperd.dispatcher.optimiser import climb, compose, gate, guards, models, recycling, sentences, watch
from whisperd.dispatcher.optimiser.compose import Terms, batches_of
from whisperd.dispatcher.optimiser.guards import Ceiling
from whisperd.dispatcher.optimiser.scene import Scene, proven_of
from whisperd.dispatcher.optimiser.state import CardState, Knobs, State, card_from
from whisperd.dispatcher.optimiser.trials import PROBE_FIRST_S
from whisperd.dispatcher.optimiser.values import CPU, Advice, Backlog, Card, CardPlan, Observation, Policy, Reason

replace = msgspec.structs.replace

HOST_SMOOTH_S = 20.0


def decide(state: State, seen: Observation, policy: Policy) -> tuple[State, Advice]:
    """What should run now, and why it differs from the answer before. Between looks it can only be less than that."""
    state = _meet(state, seen)
    busy = _host(state, seen)
    plans: list[CardPlan] = []
    recycled: tuple[int, ...] = ()
    reasons: tuple[Reason, ...] = ()
    cards: list[CardState] = []
    known = {card.gpu: card for card in state.cards}
    for card in seen.cards:
        one = known.pop(card.gpu)
        elsewhere = [other.model for other in (*cards, *known.values()) if other.plan is not None and other.plan.workers]
        one, ids, said = _decide_card(one, card, seen, policy, elsewhere=elsewhere, busy=busy)
        cards.append(one)
        recycled += ids
        reasons += said
        if one.plan is not None:
            plans.append(one.plan)
    state = State(cards=(*cards, *known.values()), stored=state.stored, policy=policy, at=seen.now, cores_busy=busy)
    return state, Advice(cards=tuple(plans), recycle=recycled, reasons=reasons)


def start_need_mib(state: State, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
    """What must be free before such a worker is started; None where nothing is known of the card."""
    card = state.card(gpu)
    if card is None or gate.is_unheard_of(card, state.policy, model, compute_type):
        return None
    return math.ceil(gate.need(card, state.policy, model, compute_type, batch).typical + card.pending_mib)


def _meet(state: State, seen: Observation) -> State:
    """Cards that are new get a state, from their rows if there are any."""
    new = [card for card in seen.cards if state.card(card.gpu) is None]
    changed = [card for card in seen.cards if (one := state.card(card.gpu)) is not None and card.driver and one.driver != card.driver]
    if not new and not changed:
        return state
    for card in changed:
        state = replace(state, cards=tuple(_under(one, card.driver) if one.gpu == card.gpu else one for one in state.cards))
    met = tuple(card_from(state.stored, card.gpu, card.driver) for card in new)
    names = {card.gpu for card in new}
    return replace(state, cards=state.cards + met, stored=tuple(row for row in state.stored if row.gpu not in names))


def _under(card: CardState, driver: str) -> CardState:
    """Another driver: speed has to be measured anew."""
    return replace(card, driver=driver, comparisons=(), blocks=(), brisk=True, trial=None)


def _host(state: State, seen: Observation) -> float:
    """Share of the host's cores that is busy, smoothed."""
    if seen.cores_busy is None:
        return state.cores_busy
    share = seen.cores_busy / max(1, seen.cores)
    return state.cores_busy + (share - state.cores_busy) * min(1.0, max(0.0, seen.now - state.at) / HOST_SMOOTH_S)


# --- one card ---


def _decide_card(
    state: CardState, card: Card, seen: Observation, policy: Policy, *, elsewhere: Sequence[str], busy: float
) -> tuple[CardState, tuple[int, ...], tuple[Reason, ...]]:
    now = seen.now
    room_before = state.room_mib
    state = guards.see(gate.follow_workers(gate.observe_room(state, card, now), card), card, now)
    state, reasons = _guard(state, card, seen, policy)
    state = _follow_work(state, card, seen.backlog, now)
    woken = state.binding == "idle" and state.work_at == now  # the first recording after a pause does not wait for the next look
    is_look = now >= state.look_at or state.plan is None or woken
    recycled: tuple[int, ...] = ()
    if is_look:
        state = gate.learn_memory(replace(state, look_at=now + policy.look_s), card)
        state, said = _choose_model(state, card, seen, policy, elsewhere)
        reasons += said
    if not state.model:
        return state, (), reasons
    limits = guards.ceilings(state, card, policy, seen.cores, now)
    if is_look:
        state, said = climb.look(state, _scene(state, card, seen, policy, limits, busy=busy))
        reasons += said
    memory_moved = state.room_mib != room_before
    terms = Terms(card, policy, limits, now, may_rise=is_look, check_memory=is_look or memory_moved)
    state, said = compose.compose(state, terms, told=bool(reasons))
    reasons += said
    if is_look:
        state, recycled, said = recycling.recycle(state, card, policy, now)
        reasons += said
    pending = gate.pending_mib(state, card, policy)
    if pending != state.pending_mib:
        state = replace(state, pending_mib=pending)
    return watch.observe(state, card, now), recycled, reasons


def _guard(state: CardState, card: Card, seen: Observation, policy: Policy) -> tuple[CardState, tuple[Reason, ...]]:
    now = seen.now
    reasons: tuple[Reason, ...] = ()
    if seen.events:
        state, reasons = guards.out_of_memory(state, card, seen.events, policy, now)
    state = guards.missing(state, card, now)
    if card.usable not in guards.WORKING:
        return state, reasons
    state, said = guards.others(state, card, policy, now)
    reasons += said
    if card.temperature_c is not None:
        seconds = now - state.felt_at if state.felt_at else 0.0
        state, said = guards.heat(replace(guards.feel(state, card, seconds), felt_at=now), card, policy, now)
        reasons += said
    return state, reasons


def _follow_work(state: CardState, card: Card, backlog: Sequence[Backlog], now: float) -> CardState:
    """When there was work last, and since when more of it waits."""
    waiting = any(one.jobs for one in backlog)
    backed = any(one.jobs for one in backlog if one.model == state.model)
    work = waiting or any(worker.jobs for worker in card.workers)
    work_at = now if work else state.work_at
    backed_at = (now if state.backed_at is None else state.backed_at) if backed else None
    starved = None if backed else now if state.starved_since is None else state.starved_since
    if waiting and state.binding == "idle":  # work again: at once, not at the next look
        state = replace(state, look_at=now)
    return replace(state, work_at=work_at, backed_at=backed_at, starved_since=starved)


def _scene(state: CardState, card: Card, seen: Observation, policy: Policy, limits: Sequence[Ceiling], *, busy: float) -> Scene:
    caps = [cap.batch for cap in state.caps if cap.batch and seen.now < cap.until]
    return Scene(
        now=seen.now,
        card=card,
        policy=policy,
        cores=seen.cores,
        cores_busy=busy * seen.cores,
        host_full=busy >= climb.HOST_FULL and card.gpu != CPU,
        most_workers=min(limit.workers for limit in limits),
        batch_max=min(caps, default=1 << 30),
    )


# --- which model, with which knobs ---


def _choose_model(
    state: CardState, card: Card, seen: Observation, policy: Policy, elsewhere: Sequence[str]
) -> tuple[CardState, tuple[Reason, ...]]:
    model = models.choose(state, card, seen.backlog, elsewhere=elsewhere, policy=policy, now=seen.now)
    if not model or model == state.model:
        return state, ()
    before = state.model
    proven = proven_of(state, model)
    allowed = _types(card, policy)
    usable = proven is not None and (proven.knobs.compute_type in allowed or not allowed) and proven.knobs.batch in batches_of(card, policy)
    state = replace(
        state, model=model, trial=None, window=None, pace=None, bound=False, swapped_at=seen.now if before else state.swapped_at
    )
    if proven is not None and usable:
        state = replace(state, knobs=proven.knobs, probe_at=seen.now + proven.probe_wait_s, plan_at=seen.now)
        text = f"{sentences.setting(proven.knobs)} for {model}, as it was proven ({proven.speed:.0f} audio-seconds per second)"
        return state, (sentences.reason(card.gpu, "swapped" if before else "warm", text, speed=proven.speed),)
    state = replace(state, knobs=_first_knobs(state, card, policy), brisk=True, probe_at=seen.now + PROBE_FIRST_S)
    text = f"{sentences.setting(state.knobs)} to begin with for {model}: nothing is known of its speed here"
    return state, (sentences.reason(card.gpu, "swapped" if before else "first", text),)


def _first_knobs(state: CardState, card: Card, policy: Policy) -> Knobs:
    """One worker, with the usual batch or the largest below it that fits."""
    allowed, first = batches_of(card, policy), policy.cpu_batch_first if card.gpu == CPU else policy.batch_first
    compute_type = next(iter(_types(card, policy)), "")
    fitting = [batch for batch in allowed if batch <= first and _fits_alone(state, card, policy, compute_type, batch)]
    return Knobs(compute_type=compute_type, batch=max(fitting, default=min(allowed)), workers=1)


def _fits_alone(state: CardState, card: Card, policy: Policy, compute_type: str, batch: int) -> bool:
    most = gate.most(state, policy, card.limits.memory_max_mib, compute_type=compute_type, batch=batch, growing=True, now=0.0)
    return most is None or most >= 1


def _types(card: Card, policy: Policy) -> tuple[str, ...]:
    return policy.compute_types[:1] if card.gpu == CPU else policy.compute_types
