"""A small part of the goals of OPTIMISER.md §6, fast enough for every run. All of them: `python -m bench.dispatch_sim goals`.

The random scenarios here are of the development set; those that are held out are judged in docs/optimiser.md only.
"""

from __future__ import annotations

import dataclasses
import functools

import msgspec
import pytest

from bench.dispatch_sim import goals, report, scenes
from bench.dispatch_sim.run import Order, Timed, play
from bench.dispatch_sim.score import Score
from whisperd.dispatcher.simulator.decider import Current
from whisperd.dispatcher.simulator.outcome import Outcome
from whisperd.dispatcher.simulator.record import share_of
from whisperd.dispatcher.simulator.world import simulate

STEADY = ("balanced_24g", "cpu_bound", "ghost_util", "two_unequal")
DEVELOPMENT = range(1000, 1007)


@functools.cache
def played(scenario: str, policy: str = "current", seed: int = 1) -> tuple[Score, Outcome]:
    score, outcome, _ = play(Order(scenario, policy, seed))
    return score, outcome


def random_scores(policy: str = "current") -> list[Score]:
    return [played(f"random-{seed}", policy, seed)[0] for seed in DEVELOPMENT]


@pytest.mark.parametrize("name", STEADY)
def test_regret_is_small_where_nothing_changes(name: str) -> None:
    """Goal 2: at most 3 % behind the best plan, which it does not know, over eight hours from a cold start."""
    assert played(name)[0].regret <= 0.03


def test_regret_is_small_on_random_installations() -> None:
    """Goal 1, on seven of the development set: median 1.5 % (2.5 % for so few), worst 12 %."""
    regrets = [score.regret for score in random_scores()]
    assert share_of(regrets, 0.5) <= 0.025
    assert max(regrets) <= 0.12


def test_memory_is_a_gate() -> None:
    """Goal 3: no load runs out of memory, no recording twice, and hardly a batch."""
    scores = [*random_scores(), *(played(name)[0] for name in STEADY)]
    assert sum(score.load_out_of_memory for score in scores) == 0
    assert sum(score.hit_twice for score in scores) == 0
    assert 1000 * sum(score.out_of_memory for score in scores) / sum(score.jobs for score in scores) <= 0.5


def test_it_comes_near_the_best_within_minutes() -> None:
    """Goal 4: where workers and batch must both be found, within 5 % of the best in at most half an hour."""
    took = [step.took_s for name in STEADY for step in played(name)[0].convergence]
    assert None not in took
    assert max(seconds or 0.0 for seconds in took) <= 1800


def test_another_program_gets_its_memory_within_seconds() -> None:
    """Goal 5: 15 GB, later 19.5 GB, each within a minute and nearly always within ten seconds."""
    waited = [seconds for name in ("foreign", "yield_bursts") for seconds in played(name)[0].denied_s]
    assert share_of(waited, 0.95) <= 10
    assert max(waited, default=0.0) <= 60


def test_a_failed_fan_is_met_with_less_work() -> None:
    """Goal 6: in four hours the card slows itself down for at most two minutes, and no more than 3 % is lost beyond what must be."""
    score = played("heat")[0]
    assert score.throttled_s <= 120
    assert score.regret <= 0.03


def test_the_plan_is_at_rest() -> None:
    """Goal 7: at most three changes an hour where nothing changes, none of them a step back outside a scheduled trial."""
    for name in STEADY:
        score = played(name)[0]
        assert score.changes_per_h <= 3.5, name
        assert score.reversals == 0, name


def test_decisions_are_quick_explained_and_the_same_every_time() -> None:
    """Goal 10: a few milliseconds at most, a reason with every change, the same bytes for the same history."""
    for name in (*STEADY, "foreign", "heat"):
        score = played(name)[0]
        assert score.decide_p99_ms is not None
        assert score.decide_p99_ms <= 5, name
        assert score.unexplained == 0, name
    scenario = dataclasses.replace(scenes.named()["foreign"], horizon_s=3 * 3600)
    runs = [simulate(scenario, Timed(Current()), 3) for _ in range(2)]
    first, second = (msgspec.json.encode([(one.at_s, one.cards, one.reasons) for one in run.decisions]) for run in runs)
    assert first == second


def test_rule_a_fails_where_this_one_passes() -> None:
    """Goal 12: on the same scenarios the rule "busy → one more, idle → one fewer" misses goals 1, 2 and 3."""
    scores = random_scores("rule-a")
    assert share_of([score.regret for score in scores], 0.5) > 0.025
    assert max(score.regret for score in scores) > 0.12
    known = [played(name, "rule-a")[0] for name in STEADY]
    assert max(score.regret for score in known) > 0.5
    assert sum(score.load_out_of_memory for score in (*known, *scores)) > 100


def test_the_judge_says_missed_when_a_goal_is_missed() -> None:
    """Saved scores of rule A, judged as if they were ours, miss goals 1 and 2."""
    known = [dataclasses.asdict(played(name, "rule-a")[0]) for name in ("balanced_24g", "cpu_bound", "heat", "bursty")]
    judged = goals.judge({"named": {"scores": known}, "held_out": {"scores": known}})
    missed = {goal.number for goal in judged if goal.verdict == "missed"}
    assert {1, 2} <= missed
    assert any("**missed**" in line for line in goals.table(judged))


def test_the_page_is_what_was_saved() -> None:
    """Nobody types a figure into docs/optimiser.md: between its marks stands what the saved scores say."""
    with open(report.PAGE, encoding="utf-8") as file:
        text = file.read()
    between = text.split(report.BEGIN)[1].split(report.END)[0]
    assert between.strip() == report.figures(goals.RESULTS)
