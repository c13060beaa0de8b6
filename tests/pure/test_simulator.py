"""The simulator keeps its own physics: what it says of a policy can be believed only as far as this holds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from typing import Any

import msgspec
import pytest

from bench.dispatch_sim import scenes
from bench.dispatch_sim.oracle import Oracle, rate_of
from bench.dispatch_sim.scenes import HOUR, MODEL, card, foreign, kind, policy, scene
from whisperd.dispatcher.optimiser.values import Advice, CardPlan, Limits, Observation, Policy
from whisperd.dispatcher.simulator.baselines import Fixed, FormulaB, RuleA
from whisperd.dispatcher.simulator.contention import Group, solve
from whisperd.dispatcher.simulator.history import scenario_of
from whisperd.dispatcher.simulator.outcome import Crew, Outcome
from whisperd.dispatcher.simulator.record import happened, replayed
from whisperd.dispatcher.simulator.scenario import Arrival, Change, Crooked, Scenario, weather
from whisperd.dispatcher.simulator.trace import BadTrace, Head, PastJob, PastLesson, Trace, lines, parse
from whisperd.dispatcher.simulator.world import EPOCH_S, World, simulate
from whisperd.vocabulary import CardMinute

QUIET: dict[str, Any] = {"cost_sigma": 0.0, "local_sigma": 0.0, "peak_sigma": 0.0}


class Scripted:
    """Plans by the clock: (from which second on, workers, batch)."""

    name = "scripted"

    def __init__(self, *steps: tuple[float, int, int], need_mib: int | None = None) -> None:
        self.steps, self.need = steps, need_mib
        self.seen: list[Observation] = []

    def start(self, policy: Policy) -> int:
        return 0

    def restart(self, state: int, policy: Policy) -> int:
        return state + 1

    def need_mib(self, state: int, gpu: str, model: str, compute_type: str, batch: int) -> int | None:
        return self.need

    def decide(self, state: int, observation: Observation, policy: Policy) -> tuple[int, Advice]:
        self.seen.append(observation)
        at_s = observation.now - EPOCH_S
        _, workers, batch = max(step for step in self.steps if step[0] <= at_s)
        plans = (CardPlan(gpu=one.gpu, model=MODEL, compute_type="float16", batch=batch, workers=workers) for one in observation.cards)
        return state, Advice(cards=tuple(plans))


def small(name: str = "small", mib: float = 24576, **rest: Any) -> Scenario:
    """One hour of work without noise."""
    usual: dict[str, Any] = {"horizon_s": HOUR, "arrivals": scenes.backlog(3e5, 600), **QUIET}
    return scene(name, (card(mib),), **{**usual, **rest})


def digest(outcome: Outcome) -> tuple[Any, ...]:
    decisions = msgspec.json.encode([decision.cards for decision in outcome.decisions])
    return outcome.progress_s, outcome.lost_s, outcome.ended, tuple(outcome.waits_s), tuple(outcome.staffing), decisions


# --- contention ---


def test_one_engine_alone_takes_its_two_phases_one_after_the_other() -> None:
    """Without company a second of audio costs its host seconds and its GPU seconds."""
    found = solve([Group(0, 1, 0.03, 0.02)], [card()], [0.0], 16, cores_busy=0, spin=0.3)
    assert found.rates[0] == pytest.approx(1 / 0.05, rel=1e-3)
    assert found.busy[0] == pytest.approx(0.6, rel=1e-2)


def test_a_saturated_card_gives_no_more_for_more_engines() -> None:
    """Where the GPU is everything, further engines lose by the penalty of switching."""
    total = [number * solve([Group(0, number, 0.1, 0.001)], [card()], [0.0], 16, cores_busy=0, spin=0).rates[0] for number in range(1, 7)]
    assert max(total) < 10.2
    assert total[5] < total[1] < total[0] * 1.02


def test_cores_bound_engines_that_decode_on_the_host() -> None:
    """Where the host is everything, so many engines as there are cores are of use."""
    total = [number * solve([Group(0, number, 0.001, 0.05)], [card()], [0.0], 4, cores_busy=0, spin=0).rates[0] for number in (1, 4, 8)]
    assert total[1] == pytest.approx(4 * total[0], rel=0.06)
    assert total[2] == pytest.approx(total[1], rel=0.1)


def test_places_for_kernels_let_engines_overlap() -> None:
    """With three places (MPS) three engines do nearly three times the work of one."""
    one, three = (
        number * solve([Group(0, number, 0.03, 0.003)], [card(slots=3, switch=0)], [0.0], 16, cores_busy=0, spin=0).rates[0]
        for number in (1, 3)
    )
    assert three > 2.5 * one


def test_threads_of_the_processor_share_its_cores() -> None:
    """Four processes of four threads beat one of sixteen, and others' work on the cores slows them all."""

    def total(number: int, busy: float = 0.0) -> float:
        groups = [Group(0, number, 0.0, 0.5, threads=16 // number)]
        return number * solve(groups, [scenes.processor(32768)], [0.0], 16, cores_busy=busy, spin=0).rates[0]

    assert total(4) > 1.3 * total(1)
    assert total(4, busy=8) == pytest.approx(total(4) / 1.5, rel=0.01)


# --- the world ---


def test_the_same_seed_gives_the_same_run() -> None:
    """Everything that is measured is a function of scenario, policy and seed."""
    scenario = scenes.named()["foreign"]
    first, second = (simulate(dataclasses.replace(scenario, horizon_s=3 * HOUR), RuleA(), 7) for _ in range(2))
    assert digest(first) == digest(second)
    assert digest(simulate(dataclasses.replace(scenario, horizon_s=3 * HOUR), RuleA(), 8)) != digest(first)


def test_throughput_without_noise_is_what_the_model_says() -> None:
    """A run and the closed form agree within the time of the loads."""
    scenario = small()
    outcome = simulate(scenario, Fixed(3, 8), 1)
    expected = rate_of(scenario, weather(scenario, 0), [Crew(0, MODEL, "float16", 8, 0, 3)])
    assert outcome.progress_s == pytest.approx(expected * (HOUR - 2 * scenario.load_s), rel=0.01)


def test_audio_is_neither_lost_nor_invented() -> None:
    """What was decoded is what has ended and what is in somebody's hands, whatever was drained in between."""
    scenario = small(horizon_s=1200.0)
    decider = Scripted(*[(200.0 * step, 1 + step % 3, 2 ** (step % 4)) for step in range(6)])
    world = World(scenario, decider, 3)
    outcome = world.run()
    for worker in world.staff:
        for recording in worker.put_down():
            world.queue.put(recording)
    waiting = [entry[3] for entries in world.queue.ready.values() for entry in entries]
    ended = sum(recording.audio_s for recording in world.recordings if recording.ended_at >= 0)
    assert len(waiting) + outcome.ended == len(world.recordings)
    partly = sum(recording.audio_s - recording.left_s for recording in waiting)
    assert outcome.net_s == pytest.approx(ended + partly, rel=1e-6)
    assert outcome.lost_s == 0


def test_a_batch_needs_recordings_to_fill_it() -> None:
    """One recording offers four windows ahead: alone it is decoded as with a batch of four, and its worker is not fed."""
    scenario = small(arrivals=lambda chance: [Arrival(0.0, 5000.0, MODEL, cost=1.0, peak=1.0)], horizon_s=120.0)
    decider = Scripted((0, 1, 16))
    outcome = simulate(scenario, decider, 1)
    expected = rate_of(scenario, weather(scenario, 0), [Crew(0, MODEL, "float16", 4, 0, 1)])
    assert outcome.progress_s == pytest.approx(expected * (120 - scenario.load_s), rel=0.02)
    assert not any(worker.fed for seen in decider.seen for one in seen.cards for worker in one.workers)


def test_an_observation_holds_nothing_that_a_dispatcher_does_not_know() -> None:
    """No figures of a blind card, no memory of a loading engine that the driver does not name, audio in whole batches only."""
    scenario = small(told_by_driver=False, changes=(Change(600.0, "blind", on=True), Change(1200.0, "blind")))
    decider = Scripted((0, 2, 8))
    simulate(scenario, decider, 1)
    for seen in decider.seen:
        one = seen.cards[0]
        blind = 600 <= seen.now - EPOCH_S < 1200
        assert (one.memory_free_mib is None) == blind
        assert (one.temperature_c is None) == blind
        assert one.usable == ("unknown" if blind else "ok")
        for worker in one.workers:
            assert (worker.memory_mib is None) == (worker.life == "loading")
            assert worker.audio_s % 200 == pytest.approx(0, abs=1e-6)
    assert decider.seen[0].backlog[0].jobs > 100


def test_memory_grows_with_the_largest_batch_and_stays() -> None:
    """A smaller batch gives nothing back; a new process does."""
    decider = Scripted((0, 1, 16), (900, 1, 2), (1800, 0, 2), (1900, 1, 2))
    scenario = small()
    simulate(scenario, decider, 1)
    one = scenario.models[MODEL][0]

    def held_at(at_s: float) -> int | None:
        return next(seen.cards[0].workers[0].memory_mib for seen in decider.seen if seen.now - EPOCH_S >= at_s)

    assert held_at(890) == held_at(1790) == round(one.memory_mib(16))
    assert held_at(3500) == round(one.memory_mib(2))


def test_out_of_memory_halves_the_batch_and_climbs_back() -> None:
    """A batch that does not fit costs no recording: the engine goes on with half of it and tries again after 64 calm batches."""
    crowd = (foreign(0.0, 24576 - 400 - 3000 - 140 * 12), foreign(0.5, 0))
    outcome = simulate(small(changes=crowd), decider := Scripted((0, 1, 16)), 1)
    batches = [record.crews[0].batch for record in outcome.staffing if record.crews]
    assert batches[0] in (8, 16)
    assert batches[-2:] == [8, 16]
    assert outcome.out_of_memory >= 2
    assert outcome.died == outcome.lost_s == 0
    events = [event for seen in decider.seen for event in seen.events]
    assert {event.kind for event in events} == {"out_of_memory"}
    assert all(event.batch == 16 and event.need_mib and event.need_mib <= 3000 + 140 * 12 for event in events)


def test_a_recording_that_does_not_fit_alone_ends_its_worker_once_and_is_held() -> None:
    """The worker dies, everybody else's recordings go back, and the hungry one waits for more memory than there is."""

    def arrivals(chance: random.Random) -> list[Arrival]:
        return [Arrival(0.0, 600.0, MODEL, peak=100.0 if number == 3 else 1.0) for number in range(40)]

    scenario = small(mib=12288, arrivals=arrivals, horizon_s=4 * HOUR)
    world = World(scenario, Scripted((0, 1, 4)), 1)
    outcome = world.run()
    assert (outcome.died, outcome.hit_twice, outcome.ended) == (1, 0, 39)
    assert [recording.id for recording in world.queue.held] == [3]
    assert 0 < outcome.lost_s <= 4 * 25


def test_a_worker_is_started_only_where_there_is_room_and_one_at_a_time() -> None:
    """With the memory check no load runs out of memory; without it, it does, again and again with longer pauses."""
    crowded = (foreign(0.0, 20000),)
    checked = simulate(small(changes=crowded), Scripted((0, 4, 1), need_mib=3200), 1)
    assert checked.load_out_of_memory == 0
    assert max((record.crews[0].number for record in checked.staffing if record.crews), default=0) == 1
    blind = simulate(small(changes=crowded), Scripted((0, 4, 1)), 1)
    assert 10 < blind.load_out_of_memory < 120
    ready = [record.at_s for record in simulate(small(), Scripted((0, 3, 1)), 1).staffing if record.crews]
    assert all(after - before >= 17 for before, after in itertools.pairwise(ready))


def test_another_program_takes_memory_as_soon_as_it_is_free_and_its_wait_is_counted() -> None:
    """It waits until enough of us have come to a boundary, and not longer."""
    scenario = small(changes=(foreign(0.25, 15000), foreign(0.5, 0)))
    patient = simulate(scenario, Scripted((0, 4, 4)), 1)
    assert [denial.waited_s for denial in patient.denials] == [pytest.approx(900, abs=5)]
    yielding = simulate(scenario, Scripted((0, 4, 4), (910, 2, 4)), 1)
    assert 10 <= yielding.denials[0].waited_s <= 10 + 1.5 * scenario.drain_s + 2


def test_heat_slows_a_card_down_and_less_work_cools_it() -> None:
    """Above its limit the card halves its clock until it is six degrees cooler."""
    hot = small(changes=(Change(0.0, "ambient", celsius=56),))
    assert simulate(hot, Scripted((0, 4, 8)), 1).throttled_s[0] > 600
    assert simulate(hot, Scripted((0, 0, 8)), 1).throttled_s[0] == 0
    assert simulate(small(), Scripted((0, 4, 8)), 1).throttled_s[0] == 0


def test_a_lost_card_takes_its_workers_and_only_the_windows_in_flight() -> None:
    """Nothing runs on it until it is back, and what was lost is at most a batch of each worker."""
    scenario = small(changes=(Change(1200.0, "lost", on=True), Change(2400.0, "lost")))
    outcome = simulate(scenario, Scripted((0, 2, 8), need_mib=3200), 1)
    assert 0 < outcome.lost_s <= 2 * 8 * 25
    assert not any(record.crews for record in outcome.staffing if 1201 < record.at_s < 2400)
    assert outcome.staffing[-1].crews[0].number == 2
    assert outcome.died == 0


def test_a_restart_asks_the_policy_what_it_still_knows() -> None:
    """The daemon's workers end with it, no audio is lost, and `restart` makes the state."""
    scenario = small(changes=(Change(1800.0, "restart"),))
    world = World(scenario, Scripted((0, 2, 8)), 1)
    outcome = world.run()
    assert world.state == 1
    assert outcome.lost_s == 0
    assert outcome.starts == 4


def test_two_models_are_swapped_only_when_the_policy_says_so() -> None:
    """A worker takes recordings of its own model only."""
    models = {MODEL: scenes.LARGE[MODEL], "small": (kind(0.015, 0.016, 1200, 60),)}
    scenario = small(models=models, policy=policy(models), arrivals=scenes.two_models(2e5, MODEL, "small"))
    outcome = simulate(scenario, Scripted((0, 2, 4)), 1)
    assert outcome.progress_of["small"] == 0 < outcome.progress_of[MODEL]
    assert outcome.swaps == 0


# --- scenarios, oracle, baselines ---


def test_every_named_scenario_keeps_its_queue_filled_for_the_oracle() -> None:
    """A backlog that runs dry would measure nothing: where it is all there from the first moment, a twentieth is left at the end."""
    found = scenes.named()
    assert len(found) >= 26
    for name, scenario in found.items():
        oracle = Oracle(scenario)
        best = sum((phase.end_s - phase.begin_s) * phase.rate for phase in next(iter(oracle.phases.values())))
        arrivals = scenario.arrivals(random.Random(1))
        if name not in ("bursty", "mix_models", "long_files"):
            assert sum(arrival.audio_s for arrival in arrivals) > 1.05 * best, name
        assert best > 0, name


def test_random_scenes_are_a_function_of_their_seed_and_all_can_be_worked() -> None:
    """One hundred of them have a plan in their first phase; two of one seed are alike."""
    for seed in range(1000, 1100):
        scenario = scenes.random_scene(seed)
        assert Oracle(scenario).phases[MODEL][0].rate > 0, seed
    first, second = scenes.random_scene(1007), scenes.random_scene(1007)
    assert (first.note, first.cards, first.changes, first.policy) == (second.note, second.cards, second.changes, second.policy)


def test_a_crooked_machine_departs_from_the_model_and_its_oracle_knows() -> None:
    """Rough, flat from a batch on, thrashing: the oracle's plan is the best of that machine, and a run agrees with it."""
    straight = small(horizon_s=2 * HOUR)
    bent = dataclasses.replace(straight, crooked=Crooked(seed=3, rough=0.0, plateau=4, thrash_from=1, thrash=0.2))
    now = weather(bent, 0)
    assert rate_of(bent, now, [Crew(0, MODEL, "float16", 16, 0, 1)]) == rate_of(bent, now, [Crew(0, MODEL, "float16", 4, 0, 1)])
    assert rate_of(bent, now, [Crew(0, MODEL, "float16", 4, 0, 3)]) == pytest.approx(
        0.64 * rate_of(straight, now, [Crew(0, MODEL, "float16", 4, 0, 3)])
    )
    phase = Oracle(bent).phases[MODEL][0]
    assert phase.crews[0].batch == 4
    assert simulate(bent, Oracle(bent), 1).progress_s == pytest.approx(phase.rate * (2 * HOUR - 60), rel=0.02)
    rough = dataclasses.replace(straight, crooked=Crooked(seed=3, rough=0.05))
    assert rough.factor(0, 2, 8) == rough.factor(0, 2, 8) != rough.factor(0, 3, 8)


def test_the_oracle_breaks_no_constraint() -> None:
    """No card slowed down, no program denied for longer than a drain, hardly a batch out of memory."""
    for name in ("foreign", "heat", "per_card_limits", "quiet_hours"):
        scenario = scenes.named()[name]
        outcome = simulate(scenario, Oracle(scenario), 1)
        assert sum(outcome.throttled_s) == 0, name
        assert max((denial.waited_s for denial in outcome.denials), default=0) <= 1.5 * scenario.drain_s + 2, name
        assert outcome.out_of_memory <= 3, name
        assert outcome.load_out_of_memory == 0, name


def test_the_oracle_is_no_worse_than_any_fixed_plan_that_keeps_the_constraints() -> None:
    """On one card with room, no number of workers and batch beats it by more than chance."""
    scenario = dataclasses.replace(scenes.named()["balanced_24g"], horizon_s=2 * HOUR)
    best = simulate(scenario, Oracle(scenario), 1).net_s
    for workers, batch in ((1, 32), (2, 16), (3, 8), (4, 8), (2, 32)):
        assert simulate(scenario, Fixed(workers, batch), 1).net_s < 1.01 * best, (workers, batch)


def test_rule_a_dies_down_where_the_host_is_the_bottleneck() -> None:
    """Low utilisation takes workers away, which lowers it further (OPTIMISER §0)."""
    scenario = dataclasses.replace(scenes.named()["cpu_bound"], horizon_s=2 * HOUR)
    outcome = simulate(scenario, RuleA(), 1)
    assert outcome.decisions[-1].cards[0].workers == 1
    assert outcome.net_s < 0.4 * simulate(scenario, Oracle(scenario), 1).net_s


def test_formula_b_follows_the_table_and_not_the_card() -> None:
    """floor(0.8 × memory / the table's figure), at most eight in all."""
    outcome = simulate(small(), FormulaB(), 1)
    room_mib = 24576 - 400
    need_mib = round(3000 * 0.92) + round(140 * 0.92) * 8
    assert outcome.decisions[0].cards[0].workers == math.floor(0.8 * room_mib / need_mib)


def test_limits_reach_the_policy() -> None:
    """What the operator allows is in the card of each observation from its moment on."""
    quiet = Limits(workers_max=0, paused="quiet hours")
    decider = Scripted((0, 1, 4))
    simulate(small(changes=(Change(1800.0, "limits", limits=quiet),)), decider, 1)
    assert {seen.cards[0].limits == quiet for seen in decider.seen if seen.now - EPOCH_S >= 1800} == {True}
    assert {seen.cards[0].limits == quiet for seen in decider.seen if seen.now - EPOCH_S < 1800} == {False}


# --- history ---


def lived(scenario: Scenario, decider: Any, seed: int = 1) -> Trace:
    """A history as an installation would keep it, of a simulated one."""
    outcome = simulate(scenario, decider, seed)
    minutes = []
    for before, after in itertools.pairwise(outcome.glances):
        minutes.append(
            CardMinute(
                gpu="GPU-0",
                at=EPOCH_S + after.at_s,
                samples=30,
                memory_total_mib=24576,
                memory_used_min_mib=round(400 + after.own_mib + after.foreign_mib),
                memory_used_max_mib=round(400 + after.own_mib + after.foreign_mib),
                own_max_mib=round(after.own_mib),
                utilisation_mean_percent=None,
                temperature_max_c=round(after.celsius),
                workers=after.workers,
                batch=after.batch,
                audio_s=after.progress_s - before.progress_s,
            )
        )
    one = scenario.models[MODEL][0]
    lessons = [
        PastLesson(gpu="GPU-0", model=MODEL, compute_type="float16", batch=batch, typical_mib=one.memory_mib(batch)) for batch in (0, 4, 16)
    ]
    jobs = [
        PastJob(ready_at=EPOCH_S + arrival.at_s, model=MODEL, audio_s=arrival.audio_s) for arrival in scenario.arrivals(random.Random(1))
    ]
    head = Head(begin=EPOCH_S, end=EPOCH_S + HOUR, cores=16, model=MODEL, compute_type="float16", policy=scenario.policy)
    return Trace(head=head, jobs=tuple(jobs), minutes=tuple(minutes), lessons=tuple(lessons))


def test_a_history_gives_its_installation_back() -> None:
    """Fitted costs predict other workers and batches within a tenth; memory is exact, others' memory is seen."""
    scenario = small(changes=(foreign(0.5, 4000), foreign(0.75, 0)))
    trace = lived(scenario, Scripted((0, 1, 4), (600, 2, 4), (1200, 3, 8), (2400, 2, 16)))
    again = scenario_of(trace)
    known, fitted = scenario.models[MODEL][0], again.models[MODEL][0]
    assert (fitted.weights_mib, fitted.window_mib) == pytest.approx((known.weights_mib, known.window_mib))
    now = weather(scenario, 0)
    for crew in (Crew(0, MODEL, "float16", 32, 0, 1), Crew(0, MODEL, "float16", 8, 0, 4), Crew(0, MODEL, "float16", 1, 0, 2)):
        assert rate_of(again, now, [crew]) == pytest.approx(rate_of(scenario, now, [crew]), rel=0.1), crew
    seen = [(change.at_s / HOUR, change.mib) for change in again.changes if change.what == "foreign"]
    assert seen == [(pytest.approx(0.5, abs=0.04), pytest.approx(4000, abs=1)), (pytest.approx(0.75, abs=0.04), 0)]
    assert sum(arrival.audio_s for arrival in again.arrivals(random.Random(9))) == sum(job.audio_s or 0 for job in trace.jobs)


def test_a_replayed_history_comes_out_as_it_was() -> None:
    """The plan that was in force, replayed through the fitted installation, does the same work within a tenth."""
    trace = lived(small(), Fixed(2, 8))
    outcome = simulate(scenario_of(trace), Fixed(2, 8), 1)
    assert replayed(outcome).audio_s == pytest.approx(happened(trace).audio_s, rel=0.1)


def test_a_trace_survives_its_file_and_names_nothing() -> None:
    """Lines and back are the same value; every other line than a trace's is refused with its number."""
    trace = lived(small(), Fixed(2, 8))
    written = list(lines(trace))
    assert parse(written) == trace
    assert b"path" not in b"".join(written)
    for bad in (b"{}", b"[1]", b'{"job": {"ready_at": "x"}}', b"not JSON", b'{"else": 1}'):
        with pytest.raises(BadTrace, match="line 2"):
            parse([written[0], bad])
    with pytest.raises(BadTrace, match="no trace"):
        parse(written[1:3])


def test_a_history_without_work_is_refused() -> None:
    """There is nothing to fit, and the error says what to do."""
    trace = lived(small(), Fixed(2, 8))
    for empty in ({"minutes": ()}, {"jobs": ()}):
        with pytest.raises(BadTrace, match="no work"):
            scenario_of(msgspec.structs.replace(trace, **empty))


class Erratic(Scripted):
    """Any plan at any time: what a policy must never be, to shake the simulator."""

    name = "erratic"

    def __init__(self, seed: int) -> None:
        super().__init__((0, 1, 1))
        self.chance = random.Random(seed)
        self.plans: tuple[CardPlan, ...] = ()

    def decide(self, state: int, observation: Observation, policy: Policy) -> tuple[int, Advice]:
        if not self.plans or self.chance.random() < 0.03:
            self.plans = tuple(
                CardPlan(
                    gpu=one.gpu,
                    model=MODEL,
                    compute_type="float16",
                    batch=self.chance.choice((1, 2, 4, 8, 16, 32)),
                    workers=self.chance.choice((0, 1, 1, 2, 3, 5, 9)),
                )
                for one in observation.cards
            )
        ids = [worker.id for one in observation.cards for worker in one.workers]
        recycle = (self.chance.choice(ids),) if ids and self.chance.random() < 0.01 else ()
        return state, Advice(cards=self.plans, recycle=recycle)


@pytest.mark.parametrize("seed", range(2000, 2012))
def test_nothing_is_lost_or_overdrawn_whatever_the_policy_does(seed: int) -> None:
    """On random machines, under a policy without sense: audio adds up, memory is never more than there is, every recording is somewhere."""
    scenario = dataclasses.replace(scenes.random_scene(seed), horizon_s=1.5 * HOUR)
    changes = (Change(1000.0, "lost", on=True), Change(1500.0, "lost"), Change(2500.0, "restart"), foreign(0.8, 3000), foreign(1.0, 0))
    world = World(dataclasses.replace(scenario, changes=changes), Erratic(seed), seed)
    observation = world.observation

    def checked() -> Observation:
        for ground in world.grounds:
            own = [worker for worker in world.staff if worker.card == ground.index]
            assert ground.own_mib == pytest.approx(sum(worker.memory_mib for worker in own), abs=1e-3)
            assert ground.free_mib >= -1e-3
            assert sum(worker.life == "loading" for worker in own) <= 1
        return observation()

    world.observation = checked  # type: ignore[method-assign]
    outcome = world.run()
    in_hand = [recording for worker in world.staff for recording in worker.put_down()]
    waiting = [entry[3] for entries in world.queue.ready.values() for entry in entries] + world.queue.held
    ended = [recording for recording in world.recordings if recording.ended_at >= 0]
    assert sorted(recording.id for recording in (*in_hand, *waiting, *ended)) == [recording.id for recording in world.recordings]
    done_s = sum(recording.audio_s - recording.left_s for recording in (*in_hand, *waiting, *ended))
    assert outcome.net_s == pytest.approx(done_s, rel=1e-6, abs=0.1)
