"""scenes: the named scenarios and the random ones (OPTIMISER §4.2 and §4.3), with the product's batches in them.

`named()` returns all named ones by name; `random_scene(seed)` and `crooked_scene(seed)` make one of a seed. Pure.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any

from whisperd.dispatcher.optimiser.values import CPU, Limits, ModelNeed, Policy
from whisperd.dispatcher.simulator.scenario import Arrival, Arrivals, CardSpec, Change, Crooked, Kind, Scenario

HOUR = 3600.0
MODEL = "large-v3"


# --- arrivals ---


def backlog(total_s: float, median_s: float = 1200.0, sigma: float = 0.8, model: str = MODEL) -> Arrivals:
    """Everything is there at the beginning."""

    def draw(chance: random.Random) -> list[Arrival]:
        found: list[Arrival] = []
        sum_s = 0.0
        while sum_s < total_s:
            audio_s = min(7200.0, max(60.0, chance.lognormvariate(math.log(median_s), sigma)))
            found.append(Arrival(0.0, audio_s, model))
            sum_s += audio_s
        return found

    return draw


def bursts(every_s: float, number: int, median_s: float, horizon_s: float, model: str = MODEL) -> Arrivals:
    """So many within a minute, then nothing."""

    def draw(chance: random.Random) -> list[Arrival]:
        found: list[Arrival] = []
        at_s = 600.0
        while at_s < horizon_s - 1800:
            for _ in range(number):
                audio_s = min(5400.0, max(30.0, chance.lognormvariate(math.log(median_s), 0.7)))
                found.append(Arrival(at_s + chance.uniform(0, 60), audio_s, model))
            at_s += every_s
        return found

    return draw


def two_models(total_s: float, large: str, small: str) -> Arrivals:
    """Half of them for each, a third at the beginning and the rest over four hours."""

    def draw(chance: random.Random) -> list[Arrival]:
        found: list[Arrival] = []
        sum_s = 0.0
        while sum_s < total_s:
            audio_s = min(5400.0, max(60.0, chance.lognormvariate(math.log(900), 0.7)))
            at_s = chance.uniform(0, 4 * HOUR) if sum_s > total_s * 0.3 else 0.0
            found.append(Arrival(at_s, audio_s, large if chance.random() < 0.5 else small))
            sum_s += audio_s
        return found

    return draw


def long_and_short(total_s: float) -> Arrivals:
    """Recordings of ten hours among recordings of one minute."""

    def draw(chance: random.Random) -> list[Arrival]:
        found: list[Arrival] = []
        sum_s = 0.0
        while sum_s < total_s:
            is_long = chance.random() < 0.003
            audio_s = 36_000.0 if is_long else chance.uniform(30, 90)
            found.append(Arrival(chance.uniform(0, 6 * HOUR) if len(found) > 400 else 0.0, audio_s, MODEL))
            sum_s += audio_s
        return found

    return draw


# --- kinds and policies ---


def kind(gpu_s: float, host_s: float, weights: float, window: float, *, compute_type: str = "float16", prior: float = 1.0) -> Kind:
    """`prior` is how much of the truth the table says."""
    return Kind(compute_type, gpu_s, host_s, weights, window, weights * prior, window * prior)


def policy(models: Mapping[str, tuple[Kind, ...]], **settings: Any) -> Policy:
    """The usual settings, with the table of these models."""
    first = next(iter(models.values()))
    needs = tuple(
        ModelNeed(
            model=model, compute_type=one.compute_type, weights_mib=round(one.prior_weights_mib), window_mib=round(one.prior_window_mib)
        )
        for model, kinds in models.items()
        for one in kinds
    )
    usual: dict[str, Any] = {"compute_types": (first[0].compute_type,), "needs": needs}
    return Policy(**{**usual, **settings})


LARGE = {MODEL: (kind(0.045, 0.022, 3000, 140, prior=0.92),)}


def scene(name: str, cards: tuple[CardSpec, ...], *, models: Mapping[str, tuple[Kind, ...]] = LARGE, **rest: Any) -> Scenario:
    """Eight hours of more work than can be done, unless told otherwise."""
    usual: dict[str, Any] = {"horizon_s": 8 * HOUR, "arrivals": backlog(2.6e6), "policy": policy(models)}
    return Scenario(name=name, cards=cards, models=models, **{**usual, **rest})


def card(mib: float = 24576, number: int = 0, **rest: Any) -> CardSpec:
    return CardSpec(gpu=f"GPU-{number}", memory_mib=mib, **rest)


def processor(mib: float) -> CardSpec:
    return CardSpec(gpu=CPU, memory_mib=mib, reserved_mib=1500)


def foreign(at_h: float, mib: float, busy: float = 0.0, number: int = 0) -> Change:
    return Change(at_h * HOUR, "foreign", card=number, mib=mib, busy=busy)


# --- the named ones ---


def named() -> dict[str, Scenario]:
    """All of them, by name."""
    return {one.name: one for one in (*_of_the_prototype(), *_of_the_product())}


def _of_the_prototype() -> list[Scenario]:
    """Those of OPTIMISER §4.2, with batches."""
    b1, b2 = (HOUR * 2, HOUR * 6)
    return [
        scene(
            "t4_saturated",
            (card(15360, switch=0.05),),
            models={MODEL: (kind(0.25, 0.011, 2700, 110),)},
            arrivals=backlog(8e5),
            cores=8,
            note="one worker fills the card; the batch is all there is to win",
        ),
        scene("balanced_24g", (card(),), note="both knobs pay a little"),
        scene(
            "cpu_bound",
            (card(8192),),
            models={MODEL: (kind(0.010, 0.030, 800, 25),)},
            arrivals=backlog(6e6),
            cores=4,
            note="the host decodes as fast as it can; the card is never busy",
        ),
        scene(
            "mps_overlap",
            (card(slots=3, switch=0.02),),
            models={MODEL: (kind(0.075, 0.003, 3200, 130),)},
            arrivals=backlog(7e6, 2400),
            note="busy at one worker, yet three run at once",
        ),
        scene(
            "foreign",
            (card(),),
            changes=(foreign(2, 15000, 0.35), foreign(4, 0), foreign(5, 19500, 0.2), foreign(5.5, 0)),
            note="another program takes 15 GB, later 19.5 GB",
        ),
        scene(
            "heat",
            (card(),),
            changes=(Change(b1, "ambient", celsius=52), Change(b2, "ambient", celsius=30)),
            note="a fan fails for four hours",
        ),
        scene("two_unequal", (card(), card(8192, 1, speed=0.45, switch=0.05)), arrivals=backlog(3.6e6), cores=12, note="24 GB and 8 GB"),
        scene("bursty", (card(),), horizon_s=12 * HOUR, arrivals=bursts(2 * HOUR, 60, 900, 12 * HOUR), note="60 files every two hours"),
        scene("vram_tail", (card(12288),), tail_p=0.03, tail_factor=2.5, note="3 % of the recordings need 2.5 times the batch memory"),
        scene(
            "mix_models",
            (card(),),
            models={MODEL: LARGE[MODEL], "small": (kind(0.015, 0.016, 1200, 60),)},
            arrivals=two_models(3e6, MODEL, "small"),
            load_s=25,
            note="two models in one queue",
        ),
        scene("ghost_util", (card(ghost=True),), note="utilisation stuck at 100 %"),
        scene(
            "nvml_blackout",
            (card(),),
            changes=(Change(2 * HOUR, "blind", on=True), Change(4 * HOUR, "blind")),
            note="no figures for two hours",
        ),
        scene(
            "gpu_lost",
            (card(), card(number=1)),
            arrivals=backlog(5e6),
            cores=24,
            changes=(Change(3 * HOUR, "lost", card=1, on=True), Change(5 * HOUR, "lost", card=1)),
            note="a card falls off the bus for two hours",
        ),
        scene(
            "batch_12g",
            (card(12288),),
            models={MODEL: (kind(0.030, 0.008, 2600, 330, prior=0.95),)},
            arrivals=backlog(4e6),
            note="large batches pay, and cost memory",
        ),
    ]


def _of_the_product() -> list[Scenario]:
    quiet, loud = Limits(workers_max=0, paused="quiet hours"), Limits()
    ladder = tuple(change for hour in range(1, 8) for change in (foreign(hour, 14000, 0.3), foreign(hour + 0.25, 0)))
    cpu_models = {"small": (kind(0, 0.55, 900, 90, compute_type="int8"),)}
    types = {
        MODEL: (
            kind(0.045, 0.012, 4700, 200, compute_type="float16"),
            kind(0.033, 0.012, 2900, 170, compute_type="int8_float16"),
        )
    }
    return [
        scene(
            "quiet_hours",
            (card(),),
            changes=(Change(3 * HOUR, "limits", limits=quiet), Change(5 * HOUR, "limits", limits=loud)),
            note="the card is left to others for two hours",
        ),
        scene(
            "per_card_limits",
            (card(), card(number=1)),
            arrivals=backlog(4e6),
            cores=24,
            changes=(Change(0.0, "limits", card=1, limits=Limits(workers_max=1, memory_max_mib=6000)),),
            note="one worker and 6 GB at most on the second card",
        ),
        scene("yield_bursts", (card(),), changes=ladder, note="another program wants 14 GB for a quarter of every hour"),
        scene(
            "cpu_only_16_cores",
            (processor(32768),),
            models=cpu_models,
            arrivals=backlog(1.8e6, 900, model="small"),
            note="no card; processes, threads and batch",
        ),
        scene(
            "cpu_only_2_cores",
            (processor(8192),),
            models=cpu_models,
            arrivals=backlog(2.6e5, 300, model="small"),
            cores=2,
            changes=(Change(3 * HOUR, "cores", busy=1.0), Change(5 * HOUR, "cores", busy=0.0)),
            note="two cores, one of them another program's for two hours",
        ),
        scene(
            "compute_type_trial",
            (card(),),
            models=types,
            arrivals=backlog(4e6),
            policy=policy(types, compute_types=("float16", "int8_float16")),
            note="the second precision is faster and smaller",
        ),
        scene(
            "three_cards_one_lost",
            (card(), card(16384, 1, speed=0.7), card(8192, 2, speed=0.45)),
            arrivals=backlog(6e6),
            cores=32,
            changes=(Change(2 * HOUR, "lost", card=0, on=True), Change(5 * HOUR, "lost", card=0)),
            note="the largest of three falls off the bus for three hours",
        ),
        scene(
            "oom_ladder_6g",
            (card(6144),),
            models={MODEL: (kind(0.050, 0.014, 2500, 230, prior=0.8),)},
            tail_p=0.04,
            tail_factor=1.8,
            note="a small card, a table that says too little, hungry recordings",
        ),
        scene("long_files", (card(),), arrivals=long_and_short(1.6e6), note="ten-hour recordings beside one-minute ones"),
        scene(
            "content_phase",
            (card(),),
            changes=(Change(3 * HOUR, "content", gpu=0.5, host=3.0), Change(6 * HOUR, "content")),
            note="for three hours recordings cost the host three times as much and the card half",
        ),
        scene(
            "warm_restart",
            (card(),),
            changes=(Change(3 * HOUR, "restart"), Change(6 * HOUR, "restart")),
            note="the daemon is restarted twice",
        ),
        scene(
            "driver_mismatch",
            (card(),),
            changes=(Change(2 * HOUR, "frozen", on=True), Change(4 * HOUR, "frozen")),
            note="the driver was replaced: what runs goes on, nothing can start",
        ),
        scene("in_container", (card(12288),), told_by_driver=False, note="the driver does not name our processes"),
    ]


# --- random ones ---


def random_scene(seed: int) -> Scenario:
    """One of OPTIMISER §4.3: work, memory, cores, other programs, heat, ghosts, one or two cards."""
    chance = random.Random(seed)
    horizon_s = 6 * HOUR

    def between(low: float, high: float) -> float:
        return math.exp(chance.uniform(math.log(low), math.log(high)))

    total_mib = chance.choice([6144, 8192, 12288, 16384, 24576, 49152])
    second = chance.random() >= 0.8
    totals = [total_mib, chance.choice([6144, 8192, 24576])] if second else [total_mib]
    cards = tuple(
        CardSpec(
            gpu=f"GPU-{number}",
            memory_mib=mib,
            speed=1.0 if number == 0 else chance.uniform(0.4, 1.2),
            slots=chance.choice([1, 1, 1, 1.5, 2.5]),
            switch=chance.uniform(0.01, 0.08),
            ghost=chance.random() < 0.1,
        )
        for number, mib in enumerate(totals)
    )
    weights = min(chance.uniform(800, 5000), min(totals) / 2)
    window = weights * between(0.012, 0.10)
    one = dataclasses.replace(
        kind(between(0.012, 0.2), between(0.003, 0.04), weights, window, prior=chance.uniform(0.8, 1.25)),
        amortised=chance.uniform(0.4, 0.8),
    )
    models = {MODEL: (one,)}
    cores = chance.choice([4, 8, 16, 32])
    changes = (*_random_foreign(chance, total_mib), *_random_heat(chance))
    tail = chance.random() < 0.3
    most = _most_audio_s(one, cards, cores, horizon_s)
    return Scenario(
        name=f"random-{seed}",
        cards=cards,
        models=models,
        horizon_s=horizon_s,
        arrivals=backlog(most, max(between(240, 2400), most / 7000)),
        policy=policy(models),
        changes=changes,
        cores=cores,
        spin=chance.uniform(0, 1),
        load_s=chance.uniform(6, 30),
        drain_s=chance.uniform(1, 5),
        tail_p=0.02 if tail else 0.0,
        tail_factor=2.0 if tail else 1.0,
        cost_sigma=chance.uniform(0.2, 0.6),
        local_sigma=chance.uniform(0.1, 0.35),
        told_by_driver=chance.random() < 0.7,
        note=f"gpu_s {one.gpu_s:.3f} host_s {one.host_s:.3f} weights {weights:.0f} window {window:.0f} cores {cores}",
    )


def crooked_scene(seed: int) -> Scenario:
    """A random one on a machine that departs from the simulator's own model: rough, with a plateau of the batch, thrashing."""
    chance = random.Random(f"crooked {seed}")
    crooked = Crooked(
        seed=seed,
        rough=chance.uniform(0.02, 0.06),
        plateau=chance.choice([4, 8, 16, 1000]),
        thrash_from=chance.choice([1, 2, 3, 1000]),
        thrash=chance.uniform(0.03, 0.15),
    )
    return dataclasses.replace(random_scene(seed), name=f"crooked-{seed}", crooked=crooked)


def _random_foreign(chance: random.Random, total_mib: float) -> tuple[Change, ...]:
    if chance.random() >= 0.5:
        return ()
    begin_h = chance.uniform(1, 3)
    end_h = begin_h + chance.uniform(0.5, 2)
    return foreign(begin_h, chance.uniform(0.2, 0.6) * total_mib, chance.choice([0.0, 0.2, 0.5])), foreign(end_h, 0)


def _random_heat(chance: random.Random) -> tuple[Change, ...]:
    if chance.random() >= 0.3:
        return ()
    begin_h = chance.uniform(1, 3)
    end_h = begin_h + chance.uniform(1, 2.5)
    return (
        Change(begin_h * HOUR, "ambient", celsius=chance.uniform(45, 56)),
        Change(end_h * HOUR, "ambient", celsius=30),
    )


def _most_audio_s(one: Kind, cards: tuple[CardSpec, ...], cores: float, horizon_s: float) -> float:
    """More than can be done in that time, so that the queue never runs dry."""
    least = one.gpu_s * one.cost(32)
    on_cards = sum(spec.slots * spec.speed / least for spec in cards)
    workers = sum(8 / (least / spec.speed + one.host_s) for spec in cards)
    return min(on_cards, workers, cores / one.host_s) * horizon_s * 1.15
