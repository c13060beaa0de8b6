"""history: a scenario made of what an installation has lived through.

Owns: `scenario_of(trace)`. Recordings come when they came. A card's foreign memory and the warmth around it are what its minutes leave when
our own part is taken away. The cost of a model is fitted to the speeds that its minutes show, its memory to what its workers held; where a
history shows only one batch or only one number of workers, the prior of OPTIMISER §4 fills in. Fails with BadTrace when there is nothing to
fit. A fit says how this machine went on average, not how it would go far from where it was ever seen.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from whisperd.dispatcher.optimiser.values import CardPlan
from whisperd.dispatcher.simulator.contention import Group, solve
from whisperd.dispatcher.simulator.scenario import AMORTISED, Arrival, CardSpec, Change, Kind, Scenario
from whisperd.dispatcher.simulator.trace import BadTrace, PastJob, Trace
from whisperd.vocabulary import CardMinute

MINUTE_S = 60.0
STEP_MIB = 256.0
STEP_K = 4.0
FULL_SHARE = 0.8
"""Of the minutes of one setting the fastest fifth counts: in the others there may have been too little to do."""
UTILISATION_WEIGHT = 0.3
GRID = tuple(10 ** (-3 + 3 * step / 36) for step in range(37))
"""Seconds of work for a second of audio that are tried: 1 ms to 1 s."""
WINDOW_SHARE = 0.05
"""Of a model's weights, for each window of a batch, where nothing was seen."""
DEFAULT_AUDIO_S = 600.0


class Measured(NamedTuple):
    """How fast one setting was on one card, at its best."""

    card: int
    batch: int
    workers: int
    rate: float
    utilisation: float | None


def scenario_of(trace: Trace, name: str = "history") -> Scenario:
    """Raises BadTrace."""
    if not trace.minutes or not trace.jobs:
        raise BadTrace("the history holds no work to replay", hint="let the daemon work for an hour first")
    gpus = sorted({minute.gpu for minute in trace.minutes})
    cards = tuple(_card(gpu, [minute for minute in trace.minutes if minute.gpu == gpu]) for gpu in gpus)
    models = _models(trace, cards)
    changes = [change for index, card in enumerate(cards) for change in _changes(trace, card, index)]
    return Scenario(
        name=name,
        cards=cards,
        models=models,
        horizon_s=max(MINUTE_S, trace.head.end - trace.head.begin),
        arrivals=_arrivals(trace),
        policy=trace.head.policy,
        changes=tuple(sorted(changes, key=lambda change: change.at_s)),
        cores=trace.head.cores,
        note=f"{len(trace.jobs)} recordings on {', '.join(gpus)}",
    )


def _arrivals(trace: Trace) -> Callable[[random.Random], list[Arrival]]:
    known = [job.audio_s for job in trace.jobs if job.audio_s]
    usual_s = statistics.median(known) if known else DEFAULT_AUDIO_S
    found = [_arrival(job, trace.head.begin, usual_s) for job in trace.jobs]
    return lambda chance: list(found)


def _arrival(job: PastJob, begin: float, usual_s: float) -> Arrival:
    return Arrival(max(0.0, job.ready_at - begin), max(1.0, job.audio_s or usual_s), job.model, job.urgent)


# --- cards ---


def _card(gpu: str, minutes: Sequence[CardMinute]) -> CardSpec:
    """What nobody's program ever gave back counts as the driver's own."""
    total = next((minute.memory_total_mib for minute in minutes if minute.memory_total_mib), None)
    if total is None:
        raise BadTrace(f"the history does not say how much memory {gpu} has")
    return CardSpec(gpu=gpu, memory_mib=total, reserved_mib=min((_others(minute) for minute in minutes), default=0.0))


def _others(minute: CardMinute) -> float:
    """Memory in use that was not ours, or 0 where that is unknown."""
    if minute.memory_used_max_mib is None:
        return 0.0
    return max(0.0, minute.memory_used_max_mib - (minute.own_max_mib or 0))


def _changes(trace: Trace, card: CardSpec, index: int) -> Iterable[Change]:
    """Other programs' memory and the warmth, whenever they moved clearly."""
    foreign, ambient = 0.0, card.ambient_c
    for minute in trace.minutes:
        if minute.gpu != card.gpu:
            continue
        at_s = max(0.0, minute.at - MINUTE_S - trace.head.begin)
        now_foreign = max(0.0, _others(minute) - card.reserved_mib)
        if abs(now_foreign - foreign) >= STEP_MIB:
            foreign = now_foreign
            yield Change(at_s, "foreign", card=index, mib=foreign)
        now_ambient = _ambient(minute, card)
        if now_ambient is not None and abs(now_ambient - ambient) >= STEP_K:
            ambient = now_ambient
            yield Change(at_s, "ambient", card=index, celsius=ambient)


def _ambient(minute: CardMinute, card: CardSpec) -> float | None:
    if minute.temperature_max_c is None or minute.power_mean_w is None:
        return None
    return minute.temperature_max_c - card.kelvin_per_w * minute.power_mean_w


# --- models ---


def _models(trace: Trace, cards: Sequence[CardSpec]) -> dict[str, tuple[Kind, ...]]:
    """Every model that was asked for; one that never ran costs what the first one that ran does."""
    measured = _measured(trace, cards)
    seen = {model for model, _ in measured} | {job.model for job in trace.jobs}
    fits: dict[str, tuple[float, float]] = {}
    for model in sorted(seen):
        own = [one for (name, _), found in measured.items() if name == model for one in found]
        if own:
            fits[model] = _fit(own, cards, trace.head.cores)
    if not fits:
        raise BadTrace("no minute of the history shows a worker at work", hint="let the daemon work for an hour first")
    usual = next(iter(fits.values()))
    types = trace.head.policy.compute_types or (trace.head.compute_type,)
    ordered = sorted(seen, key=lambda model: (model != trace.head.model, model))
    return {model: tuple(_kind(trace, model, compute_type, fits.get(model, usual)) for compute_type in types) for model in ordered}


def _measured(trace: Trace, cards: Sequence[CardSpec]) -> dict[tuple[str, str], list[Measured]]:
    """The best speeds by model and precision, which are those of the plan in force in each minute."""
    index = {card.gpu: number for number, card in enumerate(cards)}
    rates: dict[tuple[str, str, int, int, int], list[tuple[float, float | None]]] = {}
    for minute in trace.minutes:
        workers = round(minute.workers)
        if not minute.audio_s or not minute.batch or workers < 1 or abs(minute.workers - workers) > 0.1:
            continue
        plan = _plan_at(trace, minute)
        model, compute_type = (plan.model, plan.compute_type) if plan else (trace.head.model, trace.head.compute_type)
        key = (model, compute_type, index[minute.gpu], minute.batch, workers)
        rates.setdefault(key, []).append((minute.audio_s / MINUTE_S, minute.utilisation_mean_percent))
    found: dict[tuple[str, str], list[Measured]] = {}
    for (model, compute_type, card, batch, workers), values in rates.items():
        rate, utilisation = sorted(values, key=lambda value: value[0])[int(FULL_SHARE * (len(values) - 1))]
        found.setdefault((model, compute_type), []).append(Measured(card, batch, workers, rate, utilisation))
    return found


def _plan_at(trace: Trace, minute: CardMinute) -> CardPlan | None:
    before = [plan for plan in trace.plans if plan.at <= minute.at - MINUTE_S / 2]
    return next((card for card in before[-1].cards if card.gpu == minute.gpu), None) if before else None


def _fit(measured: Sequence[Measured], cards: Sequence[CardSpec], cores: float) -> tuple[float, float]:
    """(gpu_s, host_s) whose speeds and utilisations come nearest."""
    if all(cards[one.card].is_cpu for one in measured):
        return min(((0.0, host_s) for host_s in GRID), key=lambda costs: _miss(costs, measured, cards, cores))
    return min(itertools.product(GRID, GRID), key=lambda costs: _miss(costs, measured, cards, cores))


def _miss(costs: tuple[float, float], measured: Sequence[Measured], cards: Sequence[CardSpec], cores: float) -> float:
    gpu_s, host_s = costs
    sum_of_squares = 0.0
    for one in measured:
        card = cards[one.card]
        cost = 1 - AMORTISED + AMORTISED / one.batch
        threads = max(1, round(cores) // one.workers) if card.is_cpu else 0
        group = Group(one.card, one.workers, 0.0 if card.is_cpu else gpu_s * cost, host_s * (cost if card.is_cpu else 1), threads)
        found = solve([group], cards, [0.0] * len(cards), cores, cores_busy=0.0, spin=0.3)
        sum_of_squares += math.log(one.workers * found.rates[0] / one.rate) ** 2
        if one.utilisation is not None and not card.is_cpu:
            sum_of_squares += UTILISATION_WEIGHT * (found.busy[one.card] - one.utilisation / 100) ** 2
    return sum_of_squares


def _kind(trace: Trace, model: str, compute_type: str, costs: tuple[float, float]) -> Kind:
    weights_mib, window_mib = _memory(trace, model, compute_type)
    prior = next((one for one in trace.head.policy.needs if (one.model, one.compute_type) == (model, compute_type)), None)
    return Kind(
        compute_type=compute_type,
        gpu_s=costs[0],
        host_s=costs[1],
        weights_mib=weights_mib,
        window_mib=window_mib,
        prior_weights_mib=prior.weights_mib if prior else weights_mib,
        prior_window_mib=prior.window_mib if prior else window_mib,
    )


def _memory(trace: Trace, model: str, compute_type: str) -> tuple[float, float]:
    """(weights, for each window) of one worker: a line through what was learned at each batch, or the table's figures."""
    held: dict[int, list[float]] = {}
    for lesson in trace.lessons:
        if (lesson.model, lesson.compute_type) == (model, compute_type):
            held.setdefault(lesson.batch, []).append(lesson.typical_mib)
    points = sorted((batch, statistics.fmean(values)) for batch, values in held.items())
    if len(points) >= 2 and points[-1][1] > points[0][1]:
        window_mib = (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])
        return max(1.0, points[0][1] - window_mib * points[0][0]), window_mib
    prior = next((one for one in trace.head.policy.needs if (one.model, one.compute_type) == (model, compute_type)), None)
    if prior is not None:
        return float(prior.weights_mib), float(prior.window_mib)
    batch, mib = points[0] if points else _seen_memory(trace)
    weights_mib = mib / (1 + WINDOW_SHARE * batch)
    return weights_mib, WINDOW_SHARE * weights_mib


def _seen_memory(trace: Trace) -> tuple[int, float]:
    """(batch, memory of one worker) as the minutes show it."""
    found = [(minute.batch, minute.own_max_mib / minute.workers) for minute in trace.minutes if minute.own_max_mib and minute.workers >= 1]
    if not found:
        raise BadTrace("the history does not say how much memory a worker takes")
    return max(found, key=lambda one: one[1])
