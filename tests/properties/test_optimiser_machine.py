"""The optimiser under any sequence of observations: what must never happen, whatever is seen.

Cards come and go, are lost, blind, hot or full of others' memory; workers lag behind the plan, hold any memory and make any progress; jobs,
limits and events are anything. A sequence is a list of small numbers, so that hypothesis can make a failing one short.
WHISPERD_OPTIMISER_SEQUENCES says how many sequences are tried (goal 11 of OPTIMISER §6: 100 000).
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import hypothesis.strategies as st
import msgspec
from hypothesis import HealthCheck, given, settings

from whisperd.dispatcher import optimiser
from whisperd.dispatcher.optimiser import gate
from whisperd.dispatcher.optimiser.values import CPU, Advice, Backlog, Card, CardPlan, Event, Limits, ModelNeed, Observation, Policy, Worker

SEQUENCES = int(os.environ.get("WHISPERD_OPTIMISER_SEQUENCES", "300"))
STEPS = 40

MODELS = ("large", "small")
TYPES = ("float16", "int8")
NEEDS = tuple(ModelNeed(model=model, compute_type=kind, weights_mib=2500, window_mib=120) for model in MODELS for kind in TYPES)
POLICIES = (
    Policy(compute_types=TYPES, needs=NEEDS),
    Policy(compute_types=("float16",), idle_workers=0, yield_to_others=False),
    Policy(batches=(8,), interval_s=20.0, temperature_max_c=70, reserve_mib=0),
)
LIMITS = (
    Limits(),
    Limits(),
    Limits(workers_max=2),
    Limits(workers_min=3, workers_max=3),
    Limits(memory_max_mib=6000),
    Limits(workers_max=0, paused="quiet hours"),
)
USABLE = ("ok", "ok", "ok", "ok", "unknown", "frozen", "suspect", "drain", "lost")
EVENTS = ("out_of_memory", "load_out_of_memory", "worker_died")
KEEPERS = ("ok", "suspect")


class Glimpse(NamedTuple):
    """One card at one moment."""

    usable: int
    foreign_mib: int | None  # None: its memory cannot be read
    celsius: int
    throttled: bool
    limits: int
    speed: int
    lag: int  # workers that have not come or gone yet
    fat_mib: int
    hungry: bool
    event: int


class Moment(NamedTuple):
    """One observation."""

    after_s: float
    jobs: tuple[int, int]
    oldest_s: float
    cores_busy: float | None
    cards: tuple[Glimpse, ...]


glimpses = st.builds(
    Glimpse,
    usable=st.integers(0, len(USABLE) - 1),
    foreign_mib=st.one_of(st.integers(0, 20_000), st.integers(0, 2_000), st.none()),
    celsius=st.integers(40, 100),
    throttled=st.booleans(),
    limits=st.integers(0, len(LIMITS) - 1),
    speed=st.integers(0, 60),
    lag=st.integers(-2, 1),
    fat_mib=st.integers(0, 3_000),
    hungry=st.booleans(),
    event=st.integers(0, 12),
)
moments = st.builds(
    Moment,
    after_s=st.sampled_from((2.0, 2.0, 2.0, 20.0, 20.0, 60.0, 300.0, 4000.0)),
    jobs=st.tuples(st.integers(0, 50), st.integers(0, 50)),
    oldest_s=st.floats(0, 5000),
    cores_busy=st.one_of(st.none(), st.floats(0, 16)),
    cards=st.tuples(glimpses, glimpses),
)


class Room:
    """Cards whose workers follow the advice more or less."""

    def __init__(self, policy: Policy, names: tuple[str, ...]) -> None:
        self.policy, self.names = policy, names
        self.now = 1_000_000.0
        self.plans: dict[str, CardPlan] = {}
        self.audio: dict[int, float] = {}
        self.ids: dict[str, list[int]] = {name: [] for name in names}
        self.count = 0

    def seen(self, moment: Moment) -> Observation:
        self.now += moment.after_s
        cards = tuple(self._card(name, one) for name, one in zip(self.names, moment.cards, strict=False))
        rows = zip(MODELS, moment.jobs, strict=True)
        return Observation(
            now=self.now,
            cards=cards,
            backlog=tuple(Backlog(model=model, jobs=jobs, oldest_s=moment.oldest_s) for model, jobs in rows if jobs),
            events=tuple(event for card, one in zip(cards, moment.cards, strict=False) for event in self._events(card, one)),
            cores=16,
            cores_busy=moment.cores_busy,
        )

    def _events(self, card: Card, one: Glimpse) -> tuple[Event, ...]:
        if one.event >= len(EVENTS) or not card.workers:
            return ()
        worker = card.workers[0]
        return (
            Event(kind=EVENTS[one.event], gpu=card.gpu, worker=worker.id, compute_type=worker.compute_type, batch=worker.batch),  # type: ignore[arg-type]
        )

    def _card(self, name: str, one: Glimpse) -> Card:
        usable = "ok" if name == CPU else USABLE[one.usable]
        workers = () if usable == "lost" else self._workers(name, one)
        own_mib = sum(worker.memory_mib or 0 for worker in workers)
        blind = usable in ("unknown", "lost") or (one.foreign_mib is None and name != CPU)
        return Card(
            gpu=name,
            usable=usable,  # type: ignore[arg-type]
            why="simulated",
            memory_total_mib=24_000,
            memory_free_mib=None if blind else max(0, 24_000 - own_mib - (one.foreign_mib or 0)),
            temperature_c=None if blind or name == CPU else one.celsius,
            slowdown_c=88,
            throttled=one.throttled and name != CPU,
            workers=workers,
            limits=LIMITS[one.limits],
        )

    def _workers(self, name: str, one: Glimpse) -> tuple[Worker, ...]:
        plan = self.plans.get(name)
        if plan is None:
            return ()
        ids = self.ids[name]
        while len(ids) < plan.workers + one.lag:
            self.count += 1
            ids.append(self.count)
        del ids[max(0, plan.workers - min(0, one.lag)) :]
        found = []
        for number in ids:
            self.audio[number] = self.audio.get(number, -30.0) + one.speed * 2.0
            ready = self.audio[number] > 0
            found.append(
                Worker(
                    id=number,
                    model=plan.model,
                    compute_type=plan.compute_type,
                    batch=plan.batch,
                    life="busy" if ready else "loading",
                    memory_mib=2500 + one.fat_mib + (120 * plan.batch if ready else 0),
                    audio_s=max(0.0, self.audio[number]),
                    jobs=2 * plan.batch if ready else 0,
                    fed=ready and not one.hungry,
                )
            )
        return tuple(found)

    def follow(self, advice: Advice) -> None:
        self.plans = {plan.gpu: plan for plan in advice.cards}
        for ids in self.ids.values():
            ids[:] = [number for number in ids if number not in advice.recycle]


def hold(before: optimiser.State, after: optimiser.State, seen: Observation, advice: Advice, room: Room) -> None:
    """Everything that must be so after any call."""
    plans = {plan.gpu: plan for plan in advice.cards}
    known = {worker.id for card in seen.cards for worker in card.workers}
    assert set(advice.recycle) <= known
    assert all(reason.text and reason.code for reason in advice.reasons)
    assert set(plans) <= {card.gpu for card in seen.cards}
    if plans != room.plans:
        assert advice.reasons, (room.plans, plans)
    for card in seen.cards:
        plan = plans.get(card.gpu)
        if plan is None:
            continue
        _bounded(card, plan, seen, room.policy)
        old = room.plans.get(card.gpu)
        if old is None or plan.workers > old.workers or plan.batch > old.batch:
            _may_rise(before, after, card, plan, Setting(seen, room.policy))


def _bounded(card: Card, plan: CardPlan, seen: Observation, policy: Policy) -> None:
    """Within what the operator, the card and the machine allow."""
    assert 0 <= plan.workers <= min(12, card.limits.workers_max)
    assert plan.batch in (policy.cpu_batches if card.gpu == CPU else policy.batches)
    assert plan.compute_type in policy.compute_types or not policy.compute_types
    if card.usable in ("lost", "drain") or card.limits.paused:
        assert plan.workers == 0
    if card.usable == "suspect":
        assert plan.workers <= 1
    if card.gpu == CPU:
        assert plan.workers <= seen.cores


class Setting(NamedTuple):
    seen: Observation
    policy: Policy


def _may_rise(before: Any, after: Any, card: Card, plan: CardPlan, setting: Setting) -> None:
    """Only at a look, with eyes open, and within the gate."""
    seen, policy = setting
    if not plan.workers:
        return
    old, new = before.card(card.gpu), after.card(card.gpu)
    assert old is None or old.plan is None or seen.now >= old.look_at
    assert card.usable in KEEPERS
    if card.memory_free_mib is None and new.room_mib is None:  # it never told of its memory: one worker at most
        assert plan.workers <= 1
        return
    assert card.memory_free_mib is not None
    if old is None or old.plan is None:
        return
    most = gate.most(new, policy, card.limits.memory_max_mib, compute_type=plan.compute_type, batch=plan.batch, growing=True, now=seen.now)
    assert most is not None
    kept = old.plan is not None and old.plan.batch == plan.batch and plan.workers <= old.plan.workers
    assert plan.workers <= most or kept, (plan, most)


@settings(
    max_examples=SEQUENCES,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(
    policy=st.sampled_from(POLICIES),
    names=st.sampled_from((("GPU-0",), ("GPU-0", "GPU-1"), (CPU,))),
    story=st.lists(moments, min_size=1, max_size=STEPS),
)
def test_whatever_is_seen(policy: Policy, names: tuple[str, ...], story: list[Moment]) -> None:
    """It never plans above the memory gate, never grows blind or between looks, stays within every bound, says why, and its state is a
    value: stored and read back it gives the same answer."""
    room = Room(policy, names)
    state = optimiser.start(policy)
    for moment in story:
        seen = room.seen(moment)
        after, advice = optimiser.decide(state, seen, policy)
        hold(state, after, seen, advice, room)
        room.follow(advice)
        state = after
    stored = msgspec.json.encode(state)
    again = msgspec.json.decode(stored, type=optimiser.State)
    assert msgspec.json.encode(again) == stored
    seen = room.seen(story[-1])
    assert optimiser.decide(again, seen, policy) == optimiser.decide(state, seen, policy)
    rows = msgspec.json.decode(msgspec.json.encode(state.learned()), type=list[optimiser.Learned])
    optimiser.decide(optimiser.start(policy, rows), seen, policy)
