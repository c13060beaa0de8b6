"""guards: what is looked at on every call, every 2 s, and may only lower the plan (OPTIMISER §5, immediate reactions).

Out of memory, other programs on the card, heat, a card in trouble, the operator's limits. Each guard either puts a cap into the state or
finds a ceiling; nothing here can raise anything: caps end by time, and what follows then is the plan's business.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from whisperd.dispatcher.optimiser import gate
from whisperd.dispatcher.optimiser.sentences import gib, reason, workers
from whisperd.dispatcher.optimiser.state import Cap, CardState
from whisperd.dispatcher.optimiser.values import CPU, Card, Event, Policy, Reason

COOL_DOWN_S, LOAD_COOL_DOWN_S = 900.0, 60.0
HEAT_CAP_S = 1800.0
MISSING_S = 120.0
DOUBLINGS_MAX = 4
SPLIT_BATCH = 4
"""From this batch on half of it is the smaller loss; below, one worker fewer."""
FORGET_S = 4 * 3600.0
"""After so long a cap's repetitions are forgotten."""

FOREIGN_MIB, CREEP_MIB = 500.0, 32.0
"""More than that is somebody moving in or out; with next to nothing left free, much less is."""
HOLD_S, HOLD_MAX_S, HOLD_MEMORY_S = 30.0, 300.0, 7200.0
GROWN_S = 60.0
"""Others took memory so lately that they may want more."""
CUT_S = 2.0
"""So long is waited whether the first cut is enough: another program that is denied may give up."""

HOT_S = 10.0
HOT_AGAIN_S, HOT_RISING_AGAIN_S = 90.0, 20.0
AHEAD_S = 60.0
RISING = 0.02
PAUSE_K, COOL_K, COOLER_K = 5.0, 12.0, 8.0
SETTLED_S = 300.0
"""A card has the temperature that belongs to its work by then."""

BLIND_S = 600.0
WORKING = ("ok", "suspect")
"""Cards on which something can start."""


class Ceiling(NamedTuple):
    """At most so many workers, and why."""

    workers: int
    code: str
    text: str


def capped(state: CardState, code: str, most: int, until: float, now: float, *, batch: int = 0) -> CardState:
    """With this cap; one of the same code that was there counts as a repetition."""
    before = next((cap for cap in state.caps if cap.code == code), None)
    times = before.times + 1 if before is not None and now < before.until + FORGET_S else 1
    others = tuple(cap for cap in state.caps if cap.code != code)
    return msgspec.structs.replace(state, caps=(*others, Cap(code=code, workers=most, until=until, at=now, times=times, batch=batch)))


def repeated(state: CardState, code: str, now: float) -> int:
    """How often there was such a cap lately."""
    return next((cap.times for cap in state.caps if cap.code == code and now < cap.until + FORGET_S), 0)


# --- out of memory ---


def out_of_memory(
    state: CardState, card: Card, events: Iterable[Event], policy: Policy, now: float
) -> tuple[CardState, tuple[Reason, ...]]:
    """Half the batch (or, of a small one, a worker fewer) for 15 min, longer each time; needs are larger than they looked. Where one worker
    alone cannot hold one window, the next lighter precision; the climb tries the other again when all has stood still."""
    own = [event for event in events if event.gpu == card.gpu and event.kind != "worker_died"]
    reasons: tuple[Reason, ...] = ()
    for kind in ("load_out_of_memory", "out_of_memory"):
        hit = [event for event in own if event.kind == kind]
        if hit:
            worst = max(hit, key=lambda event: event.need_mib or 0)
            state, said = _lightened(state, card, worst, policy) or _ran_out(state, card, worst, now)
            reasons += said
    return state, reasons


def _lightened(state: CardState, card: Card, event: Event, policy: Policy) -> tuple[CardState, tuple[Reason, ...]] | None:
    """The next precision on the operator's list; None where there is none, or where less would do."""
    planned = state.plan.workers if state.plan is not None else 0
    serving = sum(1 for worker in card.workers if worker.life in ("idle", "busy"))
    least = event.batch <= 1 if event.kind == "out_of_memory" else not serving
    heavy = event.compute_type or state.knobs.compute_type
    if card.gpu == CPU or planned > 1 or not least or heavy != state.knobs.compute_type or heavy not in policy.compute_types[:-1]:
        return None
    lighter = policy.compute_types[policy.compute_types.index(heavy) + 1]
    state = msgspec.structs.replace(state, knobs=msgspec.structs.replace(state.knobs, compute_type=lighter, workers=1), trial=None)
    text = f"{lighter} instead of {heavy}: one worker alone ran out of memory with it"
    return state, (reason(card.gpu, "lighter", text, need_mib=event.need_mib or 0),)


def _ran_out(state: CardState, card: Card, event: Event, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    state = gate.widen(state, state.model, event.compute_type or state.knobs.compute_type, now)
    planned = state.plan.workers if state.plan is not None else 0
    serving = sum(1 for worker in card.workers if worker.life in ("idle", "busy"))
    doublings = 2 ** min(DOUBLINGS_MAX, repeated(state, event.kind, now))
    if event.kind == "load_out_of_memory":
        state = capped(state, event.kind, min(planned, serving), now + LOAD_COOL_DOWN_S * doublings, now)
        text = f"{workers(min(planned, serving))}: another one ran out of memory while it loaded; the next attempt in {doublings} min"
        return state, (reason(card.gpu, event.kind, text, need_mib=event.need_mib or 0),)
    state = gate.note_worst(state, card, event)
    wait_s = COOL_DOWN_S * doublings
    for_s = f"for {wait_s / 60:.0f} min"
    if event.batch < SPLIT_BATCH and planned > 1:
        state = capped(state, event.kind, planned - 1, now + wait_s, now)
        text = f"{workers(planned - 1)} instead of {planned} {for_s}: a batch of {event.batch} ran out of memory"
    else:
        state = capped(state, event.kind, planned, now + wait_s, now, batch=max(1, event.batch // 2))
        text = f"batch {max(1, event.batch // 2)} at most {for_s}: one of {event.batch} ran out of memory"
    return state, (reason(card.gpu, event.kind, text, batch=event.batch, need_mib=event.need_mib or 0),)


# --- other programs ---


def others(state: CardState, card: Card, policy: Policy, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    """Another program took memory, or gave it back. It gets room before it is denied any; what it gave back is taken after a while."""
    if card.memory_free_mib is None or state.room_mib is None or state.total_mib is None or card.gpu == CPU:
        return state, ()
    foreign = state.total_mib - state.room_mib
    if state.foreign_mib is None:
        return msgspec.structs.replace(state, foreign_mib=foreign), ()
    moved = foreign - state.foreign_mib
    if moved > FOREIGN_MIB or (moved > CREEP_MIB and _is_short(state, card, policy)):
        return _moved_in(state, card, policy, foreign, now)
    if moved < -FOREIGN_MIB:
        return _moved_out(state, foreign, now), ()
    return _squeezed(state, card, policy, now)


def _moved_in(state: CardState, card: Card, policy: Policy, foreign: float, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    again = bool(state.foreign_grown) and now - state.foreign_grown[-1] < GROWN_S
    since = now - GROWN_S if again else now
    grown = (*(at for at in state.foreign_grown if now - HOLD_MEMORY_S < at <= since), now)
    before = state.foreign_mib or 0.0
    state = msgspec.structs.replace(state, foreign_mib=foreign, foreign_grown=grown, brisk=True, blocks=(), trial=None)
    planned = state.plan.workers if state.plan is not None else 0
    batch = state.plan.batch if state.plan is not None else state.knobs.batch
    most = gate.most(state, policy, card.limits.memory_max_mib, compute_type=state.knobs.compute_type, batch=batch, growing=True, now=now)
    fit = planned if most is None else min(planned, most)
    if _is_short(state, card, policy):
        fit = 0 if again else min(fit, planned // 2)  # what it wants is not known: half of ours, then all
    fit = min(planned, max(fit, 0 if policy.yield_to_others else 1))
    if fit >= planned:
        return state, ()
    text = f"{workers(fit)} instead of {planned}: another program took {gib(foreign - before)} of the card's memory"
    state = capped(state, "foreign", fit, now + HOLD_S, now)
    return state, (reason(card.gpu, "foreign", text, foreign_mib=foreign, grown_mib=foreign - before),)


def _moved_out(state: CardState, foreign: float, now: float) -> CardState:
    """The room counts from now on, and only when it has stayed for a while."""
    planned = state.plan.workers if state.plan is not None else 0
    rooms = ((now, state.room_mib or 0.0),)
    state = msgspec.structs.replace(state, foreign_mib=foreign, rooms=rooms, brisk=True, blocks=(), trial=None)
    return capped(state, "foreign", planned, now + hold_s(state), now)


def hold_s(state: CardState) -> float:
    """How long room must stay: twice as long for each time that others came lately."""
    return min(HOLD_MAX_S, HOLD_S * 2.0 ** max(0, len(state.foreign_grown) - 1))


def _is_short(state: CardState, card: Card, policy: Policy) -> bool:
    reserve = gate.reserve_mib(state.total_mib or 0, policy, card.gpu)
    return card.memory_free_mib is not None and card.memory_free_mib < 0.5 * reserve


def _squeezed(state: CardState, card: Card, policy: Policy, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    """Next to nothing is free, right after somebody came: he wants more. All of ours then, where that is allowed."""
    planned = state.plan.workers if state.plan is not None else 0
    lately = bool(state.foreign_grown) and now - state.foreign_grown[-1] < GROWN_S
    if not planned or not lately or not _is_short(state, card, policy):
        return state, ()
    cap = next((cap for cap in state.caps if cap.code == "foreign" and now < cap.until), None)
    if cap is not None and now - cap.at < CUT_S and any(worker.life == "draining" for worker in card.workers):
        return state, ()
    fit = min(planned, 0 if policy.yield_to_others else 1)
    if fit >= planned:
        return state, ()
    state = capped(state, "foreign", fit, now + HOLD_S, now)
    free = card.memory_free_mib or 0
    text = f"{workers(fit)} instead of {planned}: only {gib(free)} of the card's memory are free and another program wants more"
    return state, (reason(card.gpu, "squeezed", text, free_mib=free),)


# --- heat ---


def limit_c(card: Card, policy: Policy) -> float | None:
    """The card is not to reach this."""
    known = [
        one for one in (card.slowdown_c, None if policy.temperature_max_c is None else policy.temperature_max_c + 1) if one is not None
    ]
    return float(min(known)) if known else None


def feel(state: CardState, card: Card, seconds: float) -> CardState:
    """Temperature and how fast it rises, smoothed."""
    if card.temperature_c is None:
        return state
    if state.warm_c is None or seconds <= 0:
        return msgspec.structs.replace(state, warm_c=float(card.temperature_c), warming=0.0)
    pull = min(1.0, seconds / 10.0)
    warm = state.warm_c + (card.temperature_c - state.warm_c) * pull
    rate = (warm - state.warm_c) / seconds
    warming = state.warming + (rate - state.warming) * min(1.0, seconds / 20.0)
    return msgspec.structs.replace(state, warm_c=warm, warming=warming)


def heat(state: CardState, card: Card, policy: Policy, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    """Fewer workers before the card slows itself down; none while it is far too hot; back when it is cool again."""
    limit = limit_c(card, policy)
    if state.warm_c is None or (limit is None and not card.throttled):
        return state, ()
    limit = limit if limit is not None else 1000.0
    warm = state.warm_c
    state = _pause(state, limit)
    heading = warm + AHEAD_S * state.warming
    over = card.throttled or warm >= limit - 1 or (warm >= limit - 5 and heading >= limit + 2)
    if not over:
        state = state if state.hot_since is None else msgspec.structs.replace(state, hot_since=None)
        return _cooled(state, limit, now), ()
    if state.hot_since is None:
        return msgspec.structs.replace(state, hot_since=now), ()
    return _reduce(state, card, now) if now - state.hot_since >= HOT_S else (state, ())


def _pause(state: CardState, limit: float) -> CardState:
    warm = state.warm_c or 0.0
    paused = warm > limit + PAUSE_K or (state.hot_paused and warm > limit - 10)
    return state if paused == state.hot_paused else msgspec.structs.replace(state, hot_paused=paused)


def _reduce(state: CardState, card: Card, now: float) -> tuple[CardState, tuple[Reason, ...]]:
    planned = state.plan.workers if state.plan is not None else 0
    cap = next((cap for cap in state.caps if cap.code == "heat"), None)
    again_s = HOT_RISING_AGAIN_S if state.warming > RISING else HOT_AGAIN_S
    if planned <= 1 or (cap is not None and now - cap.at < again_s):
        return state, ()
    same = cap is not None and now < cap.until and now - cap.at < 600
    times = cap.times if cap is not None and same else repeated(state, "heat", now) + 1
    until = now + HEAT_CAP_S * 2 ** min(3, times - 1)
    rest = tuple(one for one in state.caps if one.code != "heat")
    new = Cap(code="heat", workers=planned - 1, until=until, at=now, times=times)
    state = msgspec.structs.replace(state, caps=(*rest, new), trial=None)
    slows = "; it slows itself down" if card.throttled else ""
    text = f"{workers(planned - 1)} instead of {planned}: the card has {state.warm_c:.0f} °C{slows}"
    return state, (reason(card.gpu, "heat", text, celsius=state.warm_c or 0.0, kelvin_per_min=60 * state.warming),)


def _cooled(state: CardState, limit: float, now: float) -> CardState:
    """Clearly cooler than it settled at after the cut, and far below the limit: the cause is gone."""
    cap = next((cap for cap in state.caps if cap.code == "heat" and now < cap.until), None)
    warm = state.warm_c or 0.0
    if cap is None or now - cap.at < SETTLED_S:
        return state
    if cap.settled_c is None:
        new = msgspec.structs.replace(cap, settled_c=warm)
    elif warm <= limit - COOL_K and warm <= cap.settled_c - COOLER_K:
        new = msgspec.structs.replace(cap, until=now)
    else:
        return state
    return msgspec.structs.replace(state, caps=tuple(new if one is cap else one for one in state.caps))


# --- workers that do not come ---


def missing(state: CardState, card: Card, now: float) -> CardState:
    """Fewer run than planned and none is on its way, for minutes: the pool finds no room for it. The plan follows what is."""
    planned = state.plan.workers if state.plan is not None else 0
    waiting = 0 < len(card.workers) < planned and all(worker.life in ("idle", "busy") for worker in card.workers)
    if not waiting:
        return state if state.short_since is None else msgspec.structs.replace(state, short_since=None)
    if state.short_since is None:
        return msgspec.structs.replace(state, short_since=now)
    if now - state.short_since < MISSING_S:
        return state
    state = msgspec.structs.replace(state, short_since=None, trial=None)
    return capped(state, "no_room", len(card.workers), now + COOL_DOWN_S, now)


# --- all of them as ceilings ---


def see(state: CardState, card: Card, now: float) -> CardState:
    """Whether the card can be read."""
    blind = card.usable == "unknown" or (card.usable in WORKING and card.gpu != CPU and card.memory_free_mib is None)
    if blind == (state.blind_since is not None):
        return state
    return msgspec.structs.replace(state, blind_since=now if blind else None)


def ceilings(state: CardState, card: Card, policy: Policy, cores: int, now: float) -> list[Ceiling]:
    """Everything that limits the number of workers now, but for memory."""
    found = _of_card(state, card, now)
    limits = card.limits
    if limits.paused:
        found.append(Ceiling(0, "paused", f"no worker: {limits.paused}"))
    found.append(Ceiling(limits.workers_max, "limits", f"at most {workers(limits.workers_max)}, as the settings say"))
    if card.gpu == CPU:
        found.append(Ceiling(max(1, cores), "cores", f"at most {workers(max(1, cores))}: one for each core"))
    for cap in state.caps:
        if now < cap.until:
            found.append(Ceiling(cap.workers, cap.code, f"at most {workers(cap.workers)} for now ({CAP_WORDS[cap.code]})"))
    if state.hot_paused:
        found.append(Ceiling(0, "hot", f"no worker: the card has {state.warm_c or 0:.0f} °C"))
    if state.work_at is None or now - state.work_at >= policy.idle_s:
        found.append(Ceiling(policy.idle_workers, "idle", f"{workers(policy.idle_workers)}: there is nothing to do"))
    return found


CAP_WORDS = {
    "out_of_memory": "memory ran out with more",
    "load_out_of_memory": "memory ran out while one more loaded",
    "foreign": "another program needs the memory",
    "heat": "the card gets too hot with more",
    "no_room": "there was no room to start another",
}


def _of_card(state: CardState, card: Card, now: float) -> list[Ceiling]:
    why = f": {card.why}" if card.why else ""
    match card.usable:
        case "lost":
            return [Ceiling(0, "lost", f"no worker: the card is gone{why}")]
        case "drain":
            return [Ceiling(0, "drain", f"no worker: the card has to be reset{why}")]
        case "suspect":
            return [Ceiling(1, "suspect", f"1 worker at most: the card is suspect{why}")]
        case "frozen":
            alive = sum(1 for worker in card.workers if worker.life != "draining")
            return [Ceiling(alive, "frozen", f"{workers(alive)}: what runs may go on, nothing new can start{why}")]
    if state.blind_since is not None and now - state.blind_since > BLIND_S:
        proven = next((one.knobs.workers for one in state.proven if one.model == state.model), 1)
        return [Ceiling(max(1, proven), "blind", f"{workers(max(1, proven))} at most: the card cannot be read for ten minutes{why}")]
    return []
