"""gate: how many workers fit into a card's memory. It says what may be, never what should be (OPTIMISER §5, VRAM gate).

Everybody at the typical need, and one at a time at the worst that was ever seen; typical is what was measured, or the table's figure and a
quarter before anything was. Growth is measured against the least room of the last minutes; keeping what runs, against the room now.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from whisperd.dispatcher.optimiser.state import CardState, Held, Margin
from whisperd.dispatcher.optimiser.values import CPU, Card, Event, ModelNeed, Policy, Worker

UNMEASURED = 1.25
PEAK_FIRST, PEAK_SURE, PEAK_SAMPLES = 1.42, 1.08, 20
"""What windows take at their peak, of what they were seen to take: after few looks, after many, and how many are many."""
MARGIN_STEP, MARGIN_MAX, MARGIN_HALF_S = 1.08, 1.6, 7200.0
ROOM_S, BUCKET_S = 600.0, 30.0
SURE_SAMPLES, SURE_RESERVE = 100, 0.4
LEAVE_MIB, LESSON = 100.0, 1.01
"""Of the reserve, what a single worker leaves while its memory is not well known, or ran out so lately that the margin is above this."""
KEPT = 0.97
"""What runs already may stay as long as so much of its need is there."""
WORST_FADES = 0.0001
"""The worst that was seen is forgotten by so much at each look."""
BLOAT, BLOAT_PULL, SAMPLES_MAX = 1.5, 0.002, 200
"""Windows that take so much more than usual are one recording's fault, and count little."""
MOSTLY_WEIGHTS = 0.75
"""Of a worker's memory, where nobody says how large the loaded model is."""
UNKNOWN_MODEL = ModelNeed(model="", compute_type="", weights_mib=4600, window_mib=220)


class Need(NamedTuple):
    """Memory of one worker in MiB: as it usually comes to be, at the peaks that any of them may reach, and the worst that one did."""

    typical: float
    peak: float
    worst: float
    sure: bool = False  # seen so often that typical is what the hungriest come to
    known: bool = False  # of a GPU's worker, seen so often, with whatever batch, that a single one may do without any reserve


def reserve_mib(total_mib: float, policy: Policy, gpu: str = "") -> float:
    """Always left free."""
    if policy.reserve_mib is not None:
        return float(policy.reserve_mib)
    return max(512.0, 0.05 * total_mib) if gpu == CPU else max(256.0, 0.015 * total_mib)


def margin_of(state: CardState, model: str, compute_type: str, now: float) -> float:
    """An OOM's lesson fades with a half-life of two hours."""
    for margin in state.margins:
        if (margin.model, margin.compute_type) == (model, compute_type):
            return 1 + (margin.factor - 1) * math.exp(-math.log(2) * max(0.0, now - margin.at) / MARGIN_HALF_S)
    return 1.0


def widen(state: CardState, model: str, compute_type: str, now: float) -> CardState:
    """Memory ran out: needs are larger than they looked."""
    factor = min(MARGIN_MAX, margin_of(state, model, compute_type, now) * MARGIN_STEP)
    others = tuple(one for one in state.margins if (one.model, one.compute_type) != (model, compute_type))
    return msgspec.structs.replace(state, margins=(*others, Margin(model=model, compute_type=compute_type, factor=factor, at=now)))


def need(state: CardState, policy: Policy, model: str, compute_type: str, batch: int) -> Need:
    """What a worker will hold once it has worked for a while, as far as it is known: a loaded model is always as large, windows vary."""
    own = [held for held in state.held if (held.model, held.compute_type) == (model, compute_type)]
    table = _table(policy.needs, model, compute_type)
    loaded = next((held.typical_mib for held in own if held.batch == 0), None)
    weights = table.weights_mib * UNMEASURED if loaded is None else loaded
    used = [held for held in own if held.batch]
    exact = [held for held in used if held.batch == batch]
    if not used:
        windows = table.window_mib * UNMEASURED * batch
        return Need(weights + windows, weights + windows, weights + windows)
    if loaded is None:  # nobody said: the table's proportions, of what was measured
        weights = min(held.typical_mib * table.weights_mib / (table.weights_mib + table.window_mib * held.batch) for held in used)
    each = max(max(0.0, held.typical_mib - weights) / held.batch for held in exact or used)
    worst = max(max(0.0, held.worst_mib - weights) / held.batch for held in used)
    samples = sum(held.samples for held in used)
    sure = bool(exact) and exact[0].samples >= SURE_SAMPLES
    peak = each * (PEAK_SURE + (PEAK_FIRST - PEAK_SURE) * PEAK_SAMPLES / (PEAK_SAMPLES + samples))
    known = samples >= SURE_SAMPLES and policy.reserve_mib is None and state.gpu != CPU
    return Need(weights + each * batch, weights + peak * batch, weights + max(peak, worst) * batch, sure, known)


def _table(needs: Iterable[ModelNeed], model: str, compute_type: str) -> ModelNeed:
    name = model.rstrip("/").rsplit("/", 1)[-1].removeprefix("faster-").removeprefix("whisper-")  # of a directory or a repository
    own = [need for need in needs if need.model == name]
    return next((need for need in own if need.compute_type == compute_type), own[0] if own else UNKNOWN_MODEL)


def is_unheard_of(state: CardState, policy: Policy, model: str, compute_type: str) -> bool:
    """Neither published nor measured: a model of somebody's own, that may be of any size. Only a try can tell."""
    measured = any((held.model, held.compute_type) == (model, compute_type) for held in state.held)
    return not measured and _table(policy.needs, model, compute_type) is UNKNOWN_MODEL


def fits(room_mib: float, reserve: float, one: Need, margin: float = 1.0, *, smallest: bool = False) -> int:
    """How many workers: all of them typical beside the reserve; and all at their peaks, one at the worst, with a quarter of it left.

    A single one with the smallest batch may use most of the reserve, and all of it where its memory is well known: none at all costs most.
    """
    usual = int((room_mib - (SURE_RESERVE if one.sure else 1.0) * reserve) // (one.typical * margin))
    peaking = int((room_mib - 0.25 * reserve - (one.worst - one.peak)) // (one.peak * margin))
    leave = 0.0 if one.known and margin < LESSON else LEAVE_MIB
    return max(0, min(usual, peaking), 1 if smallest and room_mib - min(leave, reserve) >= one.typical else 0)


def most(
    state: CardState, policy: Policy, memory_max_mib: int | None, *, compute_type: str, batch: int, growing: bool, now: float
) -> int | None:
    """How many workers of this kind the card takes; None: nobody knows. `growing`: by the least room of the last minutes."""
    room = least_room(state) if growing else state.room_mib
    if room is None or state.total_mib is None:
        return None
    reserve = reserve_mib(state.total_mib, policy, state.gpu)
    if memory_max_mib is not None and memory_max_mib < room - reserve:
        room, reserve = float(memory_max_mib), 0.0
    one = need(state, policy, state.model, compute_type, batch)
    if is_unheard_of(state, policy, state.model, compute_type):
        return 1
    smallest = batch <= min(policy.cpu_batches if state.gpu == CPU else policy.batches)
    if growing:
        return fits(room, reserve, one, margin_of(state, state.model, compute_type, now), smallest=smallest)
    kept = KEPT * one.typical
    return fits(room, 0.5 * reserve, Need(kept, kept, kept, one.sure, one.known), smallest=smallest)


def least_room(state: CardState) -> float | None:
    """The least room of the last minutes."""
    if state.room_mib is None:
        return None
    return min((room for _, room in state.rooms), default=state.room_mib)


# --- what is seen ---


def own_mib(workers: Iterable[Worker]) -> float | None:
    """Held by ours; None when one of them does not say."""
    total = 0.0
    for worker in workers:
        if worker.memory_mib is None:
            return None
        total += worker.memory_mib
    return total


def observe_room(state: CardState, card: Card, now: float) -> CardState:
    """Free and ours together. A dip of one look is how two figures of different moments meet: it takes two."""
    if card.memory_total_mib is None or card.memory_free_mib is None:
        return state if state.last_room_mib is None else msgspec.structs.replace(state, last_room_mib=None)
    own = own_mib(card.workers)
    if own is None:
        return state
    room = card.memory_free_mib + own
    agreed = room if state.last_room_mib is None else max(room, state.last_room_mib)
    rooms = state.rooms
    if not rooms or now - rooms[-1][0] >= BUCKET_S:
        rooms = (*(one for one in rooms if one[0] > now - ROOM_S), (now, agreed))
    elif agreed < rooms[-1][1]:
        rooms = (*rooms[:-1], (rooms[-1][0], agreed))
    if agreed == state.room_mib and room == state.last_room_mib and rooms is state.rooms and card.memory_total_mib == state.total_mib:
        return state
    return msgspec.structs.replace(state, room_mib=agreed, last_room_mib=room, rooms=rooms, total_mib=card.memory_total_mib)


def learn_memory(state: CardState, card: Card) -> CardState:
    """Called at every look: what workers hold after work. Only its end gives a worker's memory back: whoever once had a larger batch than
    now tells nothing."""
    held = state.held
    widest = dict(state.widest)
    for worker in card.workers:
        serves = worker.life in ("idle", "busy") and worker.audio_s > 0
        if serves and worker.memory_mib is not None and widest.get(worker.id, worker.batch) == worker.batch:
            held = _noted(held, worker, worker.batch)
    return state if held is state.held else msgspec.structs.replace(state, held=held)


def follow_workers(state: CardState, card: Card) -> CardState:
    """Called at every observation: the largest batch that each was told; and the most that one held while it loaded is its model."""
    held = state.held
    for worker in card.workers:
        if worker.life == "loading" and worker.memory_mib:
            held = _noted(held, worker, 0)
    known = dict(state.widest)
    if len(known) != len(card.workers) or any(worker.batch > known.get(worker.id, 0) for worker in card.workers):
        widest = tuple((worker.id, max(worker.batch, known.get(worker.id, 0))) for worker in card.workers)
        return msgspec.structs.replace(state, held=held, widest=widest)
    return state if held is state.held else msgspec.structs.replace(state, held=held)


def _noted(held: tuple[Held, ...], worker: Worker, batch: int) -> tuple[Held, ...]:
    """Typical follows quickly upwards and slowly down: a worker's memory is the most that it ever needed."""
    mib = float(worker.memory_mib or 0)
    for index, one in enumerate(held):
        if (one.model, one.compute_type, one.batch) == (worker.model, worker.compute_type, batch):
            typical = _typical(held, one, mib)
            worst = max(mib, round(one.worst_mib - WORST_FADES * (one.worst_mib - typical), 1))
            samples = min(SAMPLES_MAX, one.samples + 1)
            if (typical, worst, samples) == (one.typical_mib, one.worst_mib, one.samples):
                return held
            new = msgspec.structs.replace(one, typical_mib=typical, worst_mib=worst, samples=samples)
            return (*held[:index], new, *held[index + 1 :])
    first = Held(model=worker.model, compute_type=worker.compute_type, batch=batch, typical_mib=mib, worst_mib=mib, samples=1)
    return (*held, first)


def _typical(held: tuple[Held, ...], one: Held, mib: float) -> float:
    if not one.batch:
        return max(mib, one.typical_mib)
    loaded = (other.typical_mib for other in held if other.batch == 0 and _key(other) == _key(one))
    weights = next(loaded, MOSTLY_WEIGHTS * one.typical_mib)
    bloated = mib - weights > BLOAT * (one.typical_mib - weights)
    pull = BLOAT_PULL if bloated else 0.3 if mib > one.typical_mib else 0.01
    return round(one.typical_mib + (mib - one.typical_mib) * pull, 1)


def pending_mib(state: CardState, card: Card, policy: Policy) -> float:
    """What those that run will still take, before a further one may."""
    plan = state.plan
    if plan is None or plan.workers <= len(card.workers):
        return 0.0
    one = need(state, policy, plan.model, plan.compute_type, plan.batch)
    return sum(max(0.0, one.typical - (worker.memory_mib or 0.0)) for worker in card.workers if worker.life != "draining")


def _key(held: Held) -> tuple[str, str]:
    return held.model, held.compute_type


def note_worst(state: CardState, card: Card, event: Event) -> CardState:
    """A worker that ran out of memory would have held more than it had and was free."""
    had = next((worker.memory_mib for worker in card.workers if worker.id == event.worker), None)
    least = max(float(event.need_mib or 0), float((had or 0) + (card.memory_free_mib or 0)) if had else 0.0)
    kind = event.compute_type or state.knobs.compute_type
    if not least or not event.batch:
        return state
    key = (state.model, kind, event.batch)
    known = next((one for one in state.held if (one.model, one.compute_type, one.batch) == key), None)
    if known is None:
        new = Held(model=state.model, compute_type=kind, batch=event.batch, typical_mib=0.9 * least, worst_mib=least, samples=1)
        return msgspec.structs.replace(state, held=(*state.held, new))
    worse = msgspec.structs.replace(known, worst_mib=max(known.worst_mib, least))
    return msgspec.structs.replace(state, held=tuple(worse if one is known else one for one in state.held))
