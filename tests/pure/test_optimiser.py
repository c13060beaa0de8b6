"""The optimiser's laws, one by one, on a card made of a few lines of arithmetic: what it does, what it never does, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

import msgspec
import pytest

from whisperd.dispatcher import optimiser
from whisperd.dispatcher.optimiser import curves, gate, moves, watch
from whisperd.dispatcher.optimiser.curves import Belief
from whisperd.dispatcher.optimiser.gate import Need
from whisperd.dispatcher.optimiser.scene import Scene
from whisperd.dispatcher.optimiser.state import CardState, Comparison, Held, Knobs, Pace
from whisperd.dispatcher.optimiser.values import (
    CPU,
    Advice,
    Backlog,
    Card,
    CardPlan,
    Event,
    Limits,
    ModelNeed,
    Observation,
    Policy,
    Reason,
    Worker,
)
from whisperd.dispatcher.priors import NEEDS

GPU = "GPU-0"
MODEL, OTHER = "large-v3", "small"
NEED = tuple(
    ModelNeed(model=model, compute_type=kind, weights_mib=3000, window_mib=100) for model in (MODEL, OTHER) for kind in ("float16", "int8")
)
POLICY = Policy(compute_types=("float16",), needs=NEED)
STEP_S = 2.0

Speed = Callable[[int, int], float]


def saturating(batch: int, workers: int) -> float:
    """One worker fills the card; larger batches pay a little."""
    return 40.0 / workers**0.05 / (0.4 + 0.6 / batch)


def scaling(batch: int, workers: int) -> float:
    """Workers pay fully up to three, then cost; batches pay up to eight, then cost."""
    return (20.0 * min(workers, 3) - 4.0 * max(0, workers - 3)) * (1 - 0.05 * abs(math.log2(batch / 8)))


@dataclass
class Toy:
    """One card and its workers, which do at once what they are told; they load for ten seconds and are always fed."""

    speed: Speed = saturating
    total_mib: int = 24_000
    policy: Policy = POLICY
    gpu: str = GPU
    cores: int = 16
    load_s: float = 10.0
    now: float = 1_000_000.0
    foreign_mib: int = 400
    jobs: int = 500
    card: dict[str, object] = field(default_factory=dict)
    backlog: tuple[Backlog, ...] | None = None
    events: tuple[Event, ...] = ()
    cores_busy: float = 4.0
    state: optimiser.State | None = None
    workers: list[dict[str, float]] = field(default_factory=list)
    plan: CardPlan | None = None
    born: int = 0
    said: list[Reason] = field(default_factory=list)
    plans: list[tuple[float, CardPlan]] = field(default_factory=list)
    recycled: list[int] = field(default_factory=list)

    def run(self, seconds: float) -> Toy:
        """Go on for so long."""
        for _ in range(int(seconds / STEP_S)):
            self.step()
        return self

    def until(self, done: Callable[[Toy], bool], limit_s: float = 7200.0) -> float:
        """Go on until this holds; how long that took."""
        began = self.now
        while not done(self):
            assert self.now - began < limit_s, [reason.text for reason in self.said[-5:]]
            self.step()
        return self.now - began

    def step(self) -> Advice:
        self._work()
        if self.state is None:
            self.state = optimiser.start(self.policy)
        self.state, advice = optimiser.decide(self.state, self.observation(), self.policy)
        self.events = ()
        self.said += advice.reasons
        self.recycled += advice.recycle
        self._follow(advice)
        self.now += STEP_S
        return advice

    def observation(self) -> Observation:
        usual = {
            "gpu": self.gpu,
            "memory_total_mib": self.total_mib,
            "memory_free_mib": self.total_mib - self.foreign_mib - self.own_mib,
            "temperature_c": None if self.gpu == CPU else 60,
            "slowdown_c": None if self.gpu == CPU else 88,
        }
        backlog = self.backlog
        if backlog is None:
            backlog = (Backlog(model=MODEL, jobs=self.jobs, oldest_s=60.0),) if self.jobs else ()
        card = Card(**{**usual, "workers": tuple(self._seen(worker) for worker in self.workers), **self.card})  # type: ignore[arg-type]
        return Observation(now=self.now, cards=(card,), backlog=backlog, events=self.events, cores=self.cores, cores_busy=self.cores_busy)

    @property
    def own_mib(self) -> int:
        return int(sum(worker["mib"] for worker in self.workers))

    @property
    def knobs(self) -> tuple[int, int]:
        return (self.plan.batch, self.plan.workers) if self.plan else (0, 0)

    def codes(self) -> list[str]:
        return [reason.code for reason in self.said]

    def _seen(self, worker: dict[str, float]) -> Worker:
        assert self.plan is not None
        loading = self.now < worker["ready"]
        busy = bool(self.jobs) and not loading
        return Worker(
            id=int(worker["id"]),
            model=self.plan.model,
            compute_type=self.plan.compute_type,
            batch=int(worker["batch"]),
            life="loading" if loading else "busy" if busy else "idle",
            memory_mib=int(worker["mib"]),
            audio_s=worker["audio"],
            jobs=int(2 * worker["batch"]) if busy else 0,
            jobs_done=int(worker["audio"] / 300),
            fed=busy,
        )

    def _work(self) -> None:
        serving = [worker for worker in self.workers if self.now >= worker["ready"]]
        if not serving or not self.jobs:
            return
        for worker in serving:
            worker["audio"] += STEP_S * self.speed(int(worker["batch"]), len(serving)) / len(serving)
            worker["mib"] = max(worker["mib"], 3000 + 100 * worker["batch"])

    def _follow(self, advice: Advice) -> None:
        plan = advice.cards[0] if advice.cards else None
        self.workers = [worker for worker in self.workers if worker["id"] not in advice.recycle]
        if plan is None:
            self.workers = []
        elif plan != self.plan:
            self.plans.append((self.now, plan))
            if self.plan and (plan.model, plan.compute_type) != (self.plan.model, self.plan.compute_type):
                self.workers = []
        if self.plan and plan and self.gpu == CPU and plan.workers != self.plan.workers:
            self.workers = []  # their threads change
        self.plan = plan
        if plan is None:
            return
        del self.workers[plan.workers :]
        for worker in self.workers:
            worker["batch"] = plan.batch
        while len(self.workers) < plan.workers:
            self.born += 1
            self.workers.append({"id": self.born, "ready": self.now + self.load_s, "batch": plan.batch, "mib": 3000, "audio": 0.0})


def settled(toy: Toy) -> bool:
    """Nothing is searched for, no trial is under way, and the knobs are remembered as proven."""
    if toy.state is None or not toy.state.cards:
        return False
    card = toy.state.cards[0]
    return not card.brisk and card.trial is None and any(one.knobs == card.knobs for one in card.proven)


# --- the climb ---


def test_it_finds_the_number_of_workers_that_pays() -> None:
    """Where three workers pay and a fourth does not, three run within six minutes; they stay, and it says how much each step brought."""
    toy = Toy(speed=scaling)
    assert toy.until(lambda toy: toy.knobs[1] >= 3) <= 360
    toy.until(lambda toy: toy.knobs[1] == 3 and settled(toy))
    kept = [reason for reason in toy.said if reason.code == "trial_kept"]
    assert kept
    assert all("audio-seconds per second" in reason.text for reason in kept)


def test_a_worker_that_brings_nothing_is_taken_back() -> None:
    """Where one worker fills the card a second one is tried, measured and blocked; the plan ends at one."""
    toy = Toy().run(3600)
    assert toy.knobs[1] == 1
    assert "trial_ended" in toy.codes()
    assert toy.state is not None
    assert toy.state.cards[0].blocks


def test_the_batch_is_turned_first() -> None:
    """A larger batch needs no load, so it comes before a second worker, and stays because it pays."""
    toy = Toy()
    toy.until(lambda toy: "trial_batch" in toy.codes())
    assert "trial_workers" not in toy.codes()
    toy.until(settled)
    assert toy.knobs[0] > 8


def test_blocks_last_longer_each_time() -> None:
    """What did not pay is not tried for an hour, then two: in eight hours few changes are left."""
    toy = Toy().run(8 * 3600)
    assert len(toy.plans) <= 24
    tried = [reason for reason in toy.said if reason.code == "trial_workers"]
    assert len(tried) <= 4


def test_nothing_is_learned_without_work_to_do() -> None:
    """With an empty queue (app-limited) nothing is tried, however fast it goes."""
    toy = Toy(backlog=())
    toy.backlog = (Backlog(model=MODEL, jobs=0, oldest_s=0.0),)
    toy.run(1800)
    assert not [code for code in toy.codes() if code.startswith("trial")]


def test_nothing_is_learned_from_hungry_workers() -> None:
    """A worker that was not fed has a speed that is not its own."""
    card = Card(gpu=GPU, workers=(Worker(id=1, model=MODEL, compute_type="float16", batch=8, life="busy", fed=False, jobs=1),))
    plan = CardPlan(gpu=GPU, model=MODEL, compute_type="float16", batch=8, workers=1)
    state = watch.observe(CardState(gpu=GPU, plan=plan), card, 10.0)
    assert state.window is None


def test_no_growth_while_the_host_is_full() -> None:
    """With all cores busy more workers would only crowd them."""
    toy = Toy(speed=scaling, cores_busy=16.0).run(1800)
    assert toy.knobs[1] == 1


def test_a_scheduled_look_asks_whether_the_last_worker_pays() -> None:
    """When the third worker stops paying, a scheduled probe finds out and leaves it out."""
    toy = Toy(speed=scaling)
    toy.until(lambda toy: toy.knobs[1] == 3 and settled(toy))
    toy.speed = lambda batch, workers: scaling(batch, 3) * (0.5 if workers == 1 else 1 - 0.05 * (workers - 2))
    toy.until(lambda toy: toy.knobs[1] == 2 and settled(toy), 6 * 3600)
    assert "probe_fewer" in toy.codes()


def test_a_precision_is_tried_last_and_only_where_allowed() -> None:
    """With batch and workers at rest the second allowed precision is tried, and kept when it is faster; without one nothing is."""
    policy = msgspec.structs.replace(POLICY, compute_types=("float16", "int8"))
    toy = Toy(policy=policy, speed=lambda batch, workers: 40.0)
    plain = toy.speed
    toy.until(settled)
    assert "trial_precision" not in toy.codes()
    toy.speed = lambda batch, workers: plain(batch, workers) * (1.5 if toy.plan and toy.plan.compute_type == "int8" else 1.0)
    toy.until(lambda toy: toy.plan is not None and toy.plan.compute_type == "int8", 3 * 3600)
    toy.run(1200)
    assert toy.plan is not None
    assert toy.plan.compute_type == "int8"
    alone = Toy(speed=lambda batch, workers: 40.0).run(2 * 3600)
    assert "trial_precision" not in alone.codes()


def test_one_allowed_batch_is_never_left() -> None:
    """A pinned batch stays."""
    toy = Toy(policy=msgspec.structs.replace(POLICY, batches=(8,), batch_first=8)).run(3600)
    assert {plan.batch for _, plan in toy.plans} == {8}


def test_a_change_of_content_starts_the_search_anew() -> None:
    """Far from the proven speed for minutes, what was compared before counts no more."""
    toy = Toy()
    toy.until(settled)
    assert toy.knobs[1] == 1
    toy.speed = scaling
    toy.until(lambda toy: toy.knobs[1] == 3, 3600)


# --- measuring ---


def pace(workers: int, speed: float, *, batch: int = 8, first: int = 1, recordings: int = 1000, done: int = 0) -> Pace:
    """As if so many workers with numbers from `first` on had done `speed` each for two minutes, `done` recordings ago."""
    return Pace(
        at=0.0,
        knobs=Knobs(compute_type="float16", batch=batch, workers=workers),
        seconds=120.0,
        speeds=tuple((first + number, speed) for number in range(workers)),
        in_hand=recordings,
        recordings=recordings,
        done=done,
    )


def test_two_paces_compare_by_the_workers_that_both_have() -> None:
    """Two workers at 9 each after one at 10 are 80 % more; what the new one happens to do does not count."""
    gain, sd = watch.compare(pace(1, 10.0), pace(2, 9.0), GPU)
    assert math.exp(gain) == pytest.approx(1.8)
    assert sd < 0.05


def test_fewer_recordings_make_a_comparison_less_certain() -> None:
    """Each recording costs differently, so a figure that rests on few is worth little."""
    assert watch.compare(pace(1, 10.0, recordings=8), pace(1, 10.0, first=5, recordings=8, done=20), CPU)[1] > 0.15
    assert watch.compare(pace(1, 10.0), pace(1, 10.0, first=5, done=2000), CPU)[1] < 0.05


def test_the_same_recordings_make_a_comparison_more_certain() -> None:
    """What a worker leaves is handed out first: a new worker with as many in hand does the same recordings, and their cost is no chance."""
    others = watch.compare(pace(1, 10.0, recordings=8), pace(1, 10.0, first=5, recordings=8, done=20), GPU)[1]
    same = watch.compare(pace(1, 10.0, recordings=8), pace(1, 10.0, first=5, recordings=8), GPU)[1]
    assert same < 0.1 < others


def test_few_recordings_of_one_worker_do_not_outvote_all() -> None:
    """From two workers with two recordings each to one with many: all four say more than the two of the worker that stayed."""
    before = Pace(
        at=0.0,
        knobs=Knobs(compute_type="float16", batch=1, workers=2),
        seconds=120.0,
        speeds=((1, 5.0), (2, 15.0)),
        in_hand=4,
        recordings=4,
        done=0,
    )
    gain, _ = watch.compare(before, pace(1, 20.0, batch=32, recordings=64), GPU)
    assert math.exp(gain) == pytest.approx(1.0)


def test_what_is_possible_is_asked_in_turn() -> None:
    """With one worker there is no fewer to ask about: a smaller batch and one worker more take turns."""
    state = CardState(gpu=GPU, model=MODEL, total_mib=80_000, room_mib=80_000.0)
    scene = Scene(0.0, Card(gpu=GPU), POLICY, cores=16, cores_busy=4.0, host_full=False, most_workers=12, batch_max=32)
    alone = Knobs(compute_type="float16", batch=8, workers=1)
    asked = [moves.scheduled(turn, state, scene, alone) for turn in range(4)]
    assert [one[0] for one in asked if one] == ["probe_smaller", "probe_more"] * 2


def test_comparisons_weigh_the_curves() -> None:
    """After a second worker brought nothing, a third is expected to bring less than before."""
    one, two, three = (Knobs(compute_type="float16", batch=8, workers=number) for number in (1, 2, 3))
    flat = (Comparison(model=MODEL, before=one, after=two, gain=0.0, sd=0.02, at=0.0),)

    def believed(comparisons: tuple[Comparison, ...]) -> Belief:
        return curves.belief(comparisons, "float16", MODEL, 0.0, cores=16, processor=False)

    assert believed(flat).gain(two, three)[0] < 0.03 < believed(()).gain(two, three)[0]


# --- the memory gate ---


def test_the_gate_takes_everyone_typical_and_one_at_the_worst() -> None:
    """Beside the reserve all fit at their usual need; with a quarter of it all at their peaks and one at the worst that was seen."""
    assert gate.fits(10_000, 250, Need(3000, 3200, 3200)) == 3
    assert gate.fits(10_000, 250, Need(3000, 3200, 4000)) == 2
    assert gate.fits(9_100, 250, Need(3000, 3000, 3000)) == 2
    assert gate.fits(3_100, 250, Need(3000, 3000, 3000)) == 0
    assert gate.fits(3_100, 250, Need(3000, 3000, 3000), smallest=True) == 1
    assert gate.fits(3_010, 250, Need(3000, 3000, 3000), smallest=True) == 0
    assert gate.fits(3_010, 250, Need(3000, 3000, 3000, known=True), smallest=True) == 1
    assert gate.fits(3_010, 250, Need(3000, 3000, 3000, known=True), margin=1.05, smallest=True) == 0


def test_growth_looks_at_the_least_room_of_ten_minutes() -> None:
    """What was free for a moment is not room; a dip of a single look is not a loss of it."""
    state = CardState(gpu=GPU)

    def look(state: CardState, free: int, now: float) -> CardState:
        return gate.observe_room(state, Card(gpu=GPU, memory_total_mib=20_000, memory_free_mib=free), now)

    for number, free in enumerate((20_000, 20_000, 5_000, 20_000, 20_000)):
        state = look(state, free, 2.0 * number)
    assert gate.least_room(state) == 20_000
    for number, free in enumerate((8_000, 8_000, 20_000, 20_000)):
        state = look(state, free, 100 + 2.0 * number)
    assert gate.least_room(state) == 8_000
    for number in range(400):
        state = look(state, 20_000, 110 + 2.0 * number)
    assert gate.least_room(state) == 20_000


def test_needs_are_the_tables_until_something_was_measured() -> None:
    """A quarter is added to published figures, nothing to a model whose loaded size is known."""
    state = CardState(gpu=GPU, model=MODEL)
    assert gate.need(state, POLICY, MODEL, "float16", 8).typical == 1.25 * (3000 + 8 * 100)
    loaded = Held(model=MODEL, compute_type="float16", batch=0, typical_mib=2900, worst_mib=2900, samples=3)
    used = Held(model=MODEL, compute_type="float16", batch=8, typical_mib=3700, worst_mib=3700, samples=150)
    known = msgspec.structs.replace(state, held=(loaded, used))
    assert gate.need(known, POLICY, MODEL, "float16", 8).typical == 3700
    assert gate.need(known, POLICY, MODEL, "float16", 16).typical == 2900 + 16 * 100
    assert gate.need(state, POLICY, "no such model", "float16", 1).typical > 4000


def test_it_never_plans_more_than_fits() -> None:
    """On a card of 8 GiB three workers would pay, and one fits."""
    toy = Toy(speed=scaling, total_mib=7_000).run(3600)
    assert max(plan.workers for _, plan in toy.plans) <= 2
    assert all(3000 + 100 * plan.batch <= 7_000 for _, plan in toy.plans)


def test_a_small_card_begins_with_a_smaller_batch() -> None:
    """The usual first batch is lowered to the largest that fits, and no worker is planned where none fits."""
    assert Toy(total_mib=5_000).run(10).knobs == (4, 1)
    none = Toy(total_mib=3_000).run(10)
    assert none.knobs[1] == 0
    assert none.codes() == ["first", "memory"] or "none fits" in none.said[-1].text or none.said[0].code == "first"


def test_memory_of_all_workers_is_limited_by_the_operator() -> None:
    """`memory_max_mib` counts as if the card were no larger."""
    toy = Toy(speed=scaling, card={"limits": Limits(memory_max_mib=8_000)}).run(3600)
    assert max(plan.workers for _, plan in toy.plans) <= 2


# --- guards ---


def grown(speed: Speed = scaling, **rest: object) -> Toy:
    """A toy at rest with its three workers."""
    toy = Toy(speed=speed, **rest)  # type: ignore[arg-type]
    toy.until(lambda toy: toy.knobs[1] == 3 and settled(toy))
    toy.said.clear()
    toy.plans.clear()
    toy.recycled.clear()
    return toy


def test_out_of_memory_lowers_the_batch_and_comes_back() -> None:
    """A large batch that did not fit is halved for a quarter of an hour, longer the second time; then it is tried again."""
    toy = grown()
    batch, workers = toy.knobs
    ran_out = Event(kind="out_of_memory", gpu=GPU, worker=1, compute_type="float16", batch=batch, need_mib=4000)
    toy.events = (ran_out,)
    toy.step()
    assert toy.knobs == (batch // 2, workers)
    assert "15 min" in toy.said[-1].text
    toy.run(600)
    toy.events = (ran_out,)
    toy.step()
    assert "30 min" in [reason for reason in toy.said if reason.code == "out_of_memory"][-1].text


def test_out_of_memory_of_a_small_batch_costs_a_worker() -> None:
    """Where there is no batch to lower, there is a worker fewer."""
    three = {"limits": Limits(workers_min=3, workers_max=3)}
    toy = grown(policy=msgspec.structs.replace(POLICY, batches=(2,), batch_first=2), card=three)
    toy.events = (Event(kind="out_of_memory", gpu=GPU, worker=1, compute_type="float16", batch=2),)
    toy.step()
    assert toy.knobs == (2, 2)


def test_an_ooms_lesson_fades() -> None:
    """Needs look larger after it, half as much after two hours."""
    state = gate.widen(CardState(gpu=GPU), MODEL, "float16", 0.0)
    assert gate.margin_of(state, MODEL, "float16", 0.0) == pytest.approx(1.08)
    assert gate.margin_of(state, MODEL, "float16", 7200.0) == pytest.approx(1.04)


def test_a_load_that_did_not_fit_is_not_repeated_at_once() -> None:
    """One worker fewer for a minute, then two."""
    toy = grown()
    toy.workers[-1]["ready"] = toy.now + 5
    toy.events = (Event(kind="load_out_of_memory", gpu=GPU, worker=3, compute_type="float16", batch=8),)
    toy.step()
    assert toy.knobs[1] == 2


def test_another_program_gets_its_memory_at_once() -> None:
    """Within two looks there is room for it; what it wants beyond that it gets as well, down to no worker of ours."""
    toy = grown()
    toy.foreign_mib = toy.total_mib - toy.own_mib  # it took all that was free
    toy.run(4)
    assert toy.knobs[1] <= 1
    toy.foreign_mib = toy.total_mib - toy.own_mib
    toy.run(6)
    assert toy.knobs[1] == 0
    assert {"foreign", "squeezed"} & set(toy.codes())


def test_it_can_be_told_not_to_yield() -> None:
    """Without yielding the last worker stays."""
    toy = grown(policy=msgspec.structs.replace(POLICY, yield_to_others=False))
    for _ in range(5):
        toy.foreign_mib = toy.total_mib - toy.own_mib
        toy.run(4)
    assert toy.knobs[1] == 1


def test_room_that_comes_back_has_to_stay_for_a_while() -> None:
    """Half a minute after another program left, the proven knobs are back."""
    toy = grown()
    knobs, foreign = toy.knobs, toy.foreign_mib
    toy.foreign_mib = 16_000
    toy.run(120)
    assert toy.knobs[1] < knobs[1]
    toy.foreign_mib = foreign
    toy.run(20)
    assert toy.knobs[1] < knobs[1]
    toy.until(lambda toy: toy.knobs == knobs, 120)


def test_own_growth_is_nobodys_intrusion() -> None:
    """Our own workers growing into the reserve is not another program: nothing is given away."""
    toy = grown(total_mib=15_000)
    before = toy.knobs
    toy.workers[0]["mib"] += toy.total_mib - toy.foreign_mib - toy.own_mib - 20
    toy.run(10)
    assert not {"foreign", "squeezed"} & set(toy.codes())
    assert toy.knobs == before


def test_heat_takes_workers_away_before_the_card_slows_down() -> None:
    """From one degree below the slowdown on for ten seconds: one worker fewer, and another after a while; never the last."""
    toy = grown()
    toy.card["temperature_c"] = 88
    toy.until(lambda toy: toy.knobs[1] == 2, 30)
    assert toy.said[0].code == "heat"
    toy.run(600)
    assert toy.knobs[1] == 1


def test_the_operators_own_temperature_counts() -> None:
    """`temperature_max_c` holds where the card would not mind yet."""
    toy = grown(policy=msgspec.structs.replace(POLICY, temperature_max_c=70))
    toy.card["temperature_c"] = 72
    toy.until(lambda toy: toy.knobs[1] == 2, 30)


def test_a_card_far_too_hot_pauses_and_goes_on_when_cool() -> None:
    """More than five degrees above its slowdown nothing runs; ten below it does."""
    toy = grown()
    toy.card["temperature_c"] = 96
    toy.run(60)
    assert toy.knobs[1] == 0
    toy.card["temperature_c"] = 60
    toy.until(lambda toy: toy.knobs[1] >= 1, 120)


def test_a_heat_cap_is_lifted_when_the_cause_is_gone() -> None:
    """Clearly cooler than it settled at after the cut: the workers are back before the cap's half hour is over."""
    toy = grown()
    toy.card["temperature_c"] = 88
    toy.until(lambda toy: toy.knobs[1] == 2, 30)
    toy.card["temperature_c"] = 80
    toy.run(400)
    assert toy.knobs[1] == 2
    toy.card["temperature_c"] = 55
    assert toy.until(lambda toy: toy.knobs[1] == 3, 1200) < 1200


@pytest.mark.parametrize(("usable", "workers"), [("lost", 0), ("drain", 0), ("suspect", 1), ("frozen", 3), ("unknown", 3)], ids=str)
def test_a_card_in_trouble(usable: str, workers: int) -> None:
    """Gone or to be reset: none. Suspect: one. Frozen or unreadable: what runs goes on. Afterwards all is as before."""
    toy = grown()
    before = toy.knobs
    toy.card.update(usable=usable, why="simulated", memory_free_mib=None, temperature_c=None)
    toy.run(120)
    assert toy.knobs[1] == workers
    toy.card.clear()
    toy.until(lambda toy: toy.knobs == before, 300)


def test_blind_it_never_grows() -> None:
    """Without figures of the card nothing is tried; unknown is not zero."""
    toy = Toy(speed=scaling).run(30)
    toy.card["memory_free_mib"] = None
    toy.run(1800)
    assert toy.knobs[1] == 1


def test_blind_for_long_it_falls_back_to_what_was_proven() -> None:
    """After ten minutes without figures no more than the proven number is left: a trial under way ends."""
    toy = grown()
    toy.card.update(usable="unknown", memory_free_mib=None)
    toy.state = msgspec.structs.replace(
        toy.state,
        cards=tuple(msgspec.structs.replace(card, proven=tuple(_with_workers(one, 2) for one in card.proven)) for card in toy.state.cards),
    )
    toy.run(500)
    assert toy.knobs[1] == 3
    toy.run(200)
    assert toy.knobs[1] == 2


def _with_workers(proven: object, number: int) -> object:
    return msgspec.structs.replace(proven, knobs=msgspec.structs.replace(proven.knobs, workers=number))  # type: ignore[attr-defined]


def test_limits_pin_and_bound() -> None:
    """The operator's number is what runs; at most his maximum is tried; a pause is a pause."""
    pinned = Toy(speed=scaling, card={"limits": Limits(workers_min=2, workers_max=2)}).run(3600)
    assert {plan.workers for at, plan in pinned.plans} == {2}
    bounded = Toy(speed=scaling, card={"limits": Limits(workers_max=2)}).run(3600)
    assert max(plan.workers for _, plan in bounded.plans) == 2
    bounded.card["limits"] = Limits(workers_max=0, paused="quiet hours")
    bounded.step()
    assert bounded.knobs[1] == 0
    assert "quiet hours" in bounded.said[-1].text


@pytest.mark.parametrize("kept", [0, 1])
def test_idle_gives_memory_back_and_work_brings_it_again(kept: int) -> None:
    """After ten minutes without work one warm worker or none is left; the first job restores the learned knobs at the next look."""
    toy = grown(policy=msgspec.structs.replace(POLICY, idle_workers=kept))
    before = toy.knobs
    toy.jobs = 0
    toy.run(580)
    assert toy.knobs[1] == 3
    toy.run(60)
    assert toy.knobs[1] == kept
    toy.jobs = 500
    assert toy.until(lambda toy: toy.knobs == before, 60) <= 20


# --- recycling ---


def test_a_bloated_worker_is_replaced() -> None:
    """Only a new process gives memory back: who holds far more than usual is replaced, one at a time."""
    toy = grown(policy=msgspec.structs.replace(POLICY, batches=(8,)))
    toy.workers[1]["mib"] *= 1.6
    toy.run(60)
    assert toy.recycled == [toy.recycled[0]]
    assert "is replaced" in next(reason for reason in toy.said if reason.code == "recycle").text


# --- models ---


def two(large: int, small: int, *, large_s: float = 60.0, small_s: float = 60.0, urgent: int = 0) -> tuple[Backlog, ...]:
    rows = (
        Backlog(model=MODEL, jobs=large, oldest_s=large_s),
        Backlog(model=OTHER, jobs=small, oldest_s=small_s, urgent=urgent),
    )
    return tuple(row for row in rows if row.jobs)


def on(toy: Toy) -> str:
    return toy.plan.model if toy.plan else ""


def test_it_stays_with_the_loaded_model_while_that_has_work() -> None:
    """Another model's job waits for its turn, half an hour at most; then nothing is swapped for as long again."""
    toy = Toy(backlog=two(500, 0)).run(60)
    toy.backlog = two(500, 500)
    toy.run(1500)
    assert on(toy) == MODEL
    toy.backlog = two(500, 500, small_s=1801.0)
    toy.run(30)
    assert on(toy) == OTHER
    toy.backlog = two(500, 500, large_s=4000.0)
    toy.run(1500)
    assert on(toy) == OTHER
    toy.run(400)
    assert on(toy) == MODEL


def test_without_work_for_it_a_model_is_swapped_but_not_to_and_fro() -> None:
    """The other model is loaded when the first has no work left; back only after five minutes."""
    toy = Toy(backlog=two(500, 0)).run(60)
    toy.jobs, toy.backlog = 0, two(0, 50)
    toy.run(30)
    assert on(toy) == OTHER
    toy.backlog = two(50, 0)
    toy.run(200)
    assert on(toy) == OTHER
    toy.run(120)
    assert on(toy) == MODEL


def test_urgent_work_of_another_model_does_not_wait_half_an_hour() -> None:
    """Five minutes since the last swap are enough."""
    toy = Toy(backlog=two(500, 0)).run(400)
    toy.backlog = two(500, 3, urgent=3)
    toy.run(30)
    assert on(toy) == OTHER


def test_a_model_comes_back_with_its_proven_knobs() -> None:
    """Knobs are remembered for each model."""
    toy = grown()
    toy.jobs, toy.backlog = 0, two(0, 50)
    toy.run(30)
    assert on(toy) == OTHER
    toy.backlog = two(500, 0)
    toy.run(400)
    assert (on(toy), toy.knobs[1]) == (MODEL, 3)


def test_two_cards_take_two_models() -> None:
    """While both wait, the cards differ; each is decided by itself."""
    card = Card(gpu=GPU, memory_total_mib=24_000, memory_free_mib=23_600)
    cards = (card, msgspec.structs.replace(card, gpu="GPU-1", memory_total_mib=8_000, memory_free_mib=7_600))
    seen = Observation(now=1000.0, cards=cards, backlog=two(50, 50), cores=8)
    _, advice = optimiser.decide(optimiser.start(POLICY), seen, POLICY)
    assert {plan.model for plan in advice.cards} == {MODEL, OTHER}


def test_a_lost_card_leaves_the_other_alone() -> None:
    """One card at nought, the other as it was."""
    card = Card(gpu=GPU, memory_total_mib=24_000, memory_free_mib=23_600)
    cards = (card, msgspec.structs.replace(card, gpu="GPU-1"))
    seen = Observation(now=1000.0, cards=cards, backlog=two(50, 0), cores=8)
    state, _ = optimiser.decide(optimiser.start(POLICY), seen, POLICY)
    lost = msgspec.structs.replace(cards[1], usable="lost", memory_free_mib=None)
    state, advice = optimiser.decide(state, msgspec.structs.replace(seen, now=1002.0, cards=(card, lost)), POLICY)
    assert [plan.workers for plan in advice.cards] == [1, 0]
    _, advice = optimiser.decide(state, msgspec.structs.replace(seen, now=1030.0), POLICY)
    assert [plan.workers for plan in advice.cards] == [1, 1]


# --- the processor ---


def test_a_processor_is_a_card() -> None:
    """Processes and batch are found in the same way; never more processes than cores, and heat means nothing."""
    policy = msgspec.structs.replace(POLICY, compute_types=("int8",))
    toy = Toy(gpu=CPU, policy=policy, cores=4, total_mib=64_000, foreign_mib=2_000, speed=lambda batch, workers: 3.0 * workers**0.5)
    toy.run(2 * 3600)
    assert toy.knobs[1] == 4
    assert toy.knobs[0] in policy.cpu_batches


# --- restarts ---


def test_a_restart_is_warm() -> None:
    """What was learned goes through JSON and begins at the proven knobs at once; for another driver the search is done anew."""
    toy = grown()
    assert toy.state is not None
    stored = msgspec.json.encode(toy.state.learned())
    rows = msgspec.json.decode(stored, type=list[optimiser.Learned])
    again = Toy(speed=scaling, state=optimiser.start(POLICY, rows))
    again.step()
    assert again.knobs == toy.knobs
    assert again.said[0].code == "warm"
    assert settled(again)
    other = Toy(speed=scaling, state=optimiser.start(POLICY, rows), card={"driver": "999"})
    other.step()
    assert other.knobs == toy.knobs
    assert not settled(other)


def test_lessons_of_absent_cards_are_kept() -> None:
    """A card that is not there in this life is still known in the next."""
    toy = grown()
    assert toy.state is not None
    rows = toy.state.learned()
    elsewhere = Toy(gpu="GPU-9", state=optimiser.start(POLICY, rows)).run(10)
    assert elsewhere.state is not None
    assert set(rows) <= set(elsewhere.state.learned())


# --- the whole ---


def test_the_same_history_gives_the_same_bytes() -> None:
    """No clock, no chance: state and plans of two runs are equal, byte for byte, and the state survives JSON."""
    one, two_ = Toy(speed=scaling).run(3600), Toy(speed=scaling).run(3600)
    assert msgspec.json.encode(one.state) == msgspec.json.encode(two_.state)
    assert one.plans == two_.plans
    assert msgspec.json.decode(msgspec.json.encode(one.state), type=optimiser.State) == one.state


def test_every_change_says_why() -> None:
    """No plan differs from the one before without a sentence that names the card."""
    toy = Toy(speed=scaling)
    before = None
    for number in range(3600):
        toy.card = {"temperature_c": 89} if 900 < number < 960 else {"usable": "lost"} if 1500 < number < 1520 else {}
        toy.foreign_mib = 16_000 if 2000 < number < 2300 else 400
        advice = toy.step()
        if advice.cards != before:
            assert advice.reasons, number
        assert all(reason.text.startswith(GPU) and len(reason.text) > 20 for reason in advice.reasons)
        before = advice.cards


def test_what_a_start_needs() -> None:
    """What must be free before a start is the usual need; of an unknown card nothing is known."""
    toy = grown()
    assert toy.state is not None
    assert toy.plan is not None
    need = optimiser.start_need_mib(toy.state, GPU, MODEL, "float16", toy.plan.batch)
    assert need is not None
    assert 3000 + 100 * toy.plan.batch <= need <= 3300 + 100 * toy.plan.batch
    assert optimiser.start_need_mib(toy.state, "GPU-9", MODEL, "float16", 8) is None


def test_it_takes_no_time() -> None:
    """A call is far below five milliseconds on average (the goal is for each; a loaded machine may stretch one)."""
    toy = Toy(speed=scaling).run(600)
    seen, state = toy.observation(), toy.state
    assert state is not None
    began = perf_counter()
    for number in range(500):
        state, _ = optimiser.decide(state, msgspec.structs.replace(seen, now=toy.now + STEP_S * number), POLICY)
    assert (perf_counter() - began) / 500 < 0.005


def test_the_table_knows_every_model_that_auto_may_choose() -> None:
    """Each in every precision; larger batches need more, smaller precisions less."""
    known = {(need.model, need.compute_type): need for need in NEEDS}
    for model in ("base", "small", "large-v3-turbo", "large-v3"):
        assert known[model, "int8"].weights_mib < known[model, "float16"].weights_mib < known[model, "float32"].weights_mib
        assert known[model, "float16"].window_mib > 0
    assert known["large-v3", "float16"].weights_mib == 4521
