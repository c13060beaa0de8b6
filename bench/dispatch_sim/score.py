"""score: one run measured against the oracle's: regret, memory, courtesy, heat, changes, convergence, waits. Pure.

Regret can be negative where a policy breaks a constraint (takes memory from others, lets a card slow down): read it with the other columns.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from bench.dispatch_sim.oracle import Phase, best_of, rate_of
from whisperd.dispatcher.optimiser.values import CardPlan
from whisperd.dispatcher.simulator.outcome import Decision, Outcome, Staffing
from whisperd.dispatcher.simulator.record import share_of
from whisperd.dispatcher.simulator.scenario import Scenario, weather

WITHIN = 0.95
HELD_S = 300.0
HELD_SHARE = 0.9
REVERSAL_S = 1800.0
SCHEDULED = ("trial", "probe")
"""Reasons whose code begins so are scheduled experiments: a step back after one is no reversal."""
COURTESY = ("foreign", "squeezed", "limits", "paused", "lost", "idle")
"""A step down for somebody else's sake: to come back when they have what they want is no change of mind."""


@dataclass
class Convergence:
    """How long a phase took to come within 5 % of its best; None: never. `search`: the configured batch and precision do not come within
    5 % of it, so they had to be found; what an earlier phase needed need not be found again."""

    begin_s: float
    what: str  # "cold", "warm" (after a restart), "change"
    search: bool
    took_s: float | None
    oracle_s: float | None  # the loads alone


@dataclass
class Score:
    """One policy in one scenario with one seed."""

    scenario: str
    policy: str
    seed: int
    regret: float
    net_s: float
    jobs: int
    out_of_memory: int
    hit_twice: int
    load_out_of_memory: int
    died: int
    denied_s: list[float] = field(default_factory=list)
    throttled_s: float = 0.0
    changes_per_h: float = 0.0
    reversals: int = 0
    unexplained: int = 0  # changes without a reason
    wait_p95_s: float = 0.0
    oracle_wait_p95_s: float = 0.0
    idle_mib_h: float = 0.0
    oracle_idle_mib_h: float = 0.0
    starts: int = 0
    swaps: int = 0
    convergence: list[Convergence] = field(default_factory=list)
    decide_p99_ms: float | None = None
    decide_max_ms: float | None = None
    best: list[str] = field(default_factory=list)  # the oracle's plans, in words


def score(scenario: Scenario, outcome: Outcome, oracle: Outcome, phases: dict[str, list[Phase]]) -> Score:
    """Of a run and the oracle's run of the same scenario and seed."""
    first = next(iter(phases.values()))
    hours = scenario.horizon_s / 3600
    return Score(
        scenario=scenario.name,
        policy=outcome.policy,
        seed=outcome.seed,
        regret=1 - _worth(outcome, phases) / max(1e-9, _worth(oracle, phases)),
        net_s=outcome.net_s,
        jobs=outcome.ended,
        out_of_memory=outcome.out_of_memory,
        hit_twice=outcome.hit_twice,
        load_out_of_memory=outcome.load_out_of_memory,
        died=outcome.died,
        denied_s=[denial.waited_s for denial in outcome.denials],
        throttled_s=sum(outcome.throttled_s),
        changes_per_h=changes_per_h(outcome.decisions, 0, hours),
        reversals=reversals(scenario, outcome.decisions),
        unexplained=sum(1 for decision in _changed(outcome.decisions) if not decision.reasons),
        wait_p95_s=share_of(outcome.waits_s, 0.95),
        oracle_wait_p95_s=share_of(oracle.waits_s, 0.95),
        idle_mib_h=outcome.idle_memory_mib_s / 3600,
        oracle_idle_mib_h=oracle.idle_memory_mib_s / 3600,
        starts=outcome.starts,
        swaps=outcome.swaps,
        convergence=converged(scenario, outcome.staffing, oracle.staffing, first)
        if len(phases) == 1 and not oracle.idle_memory_mib_s
        else [],
        best=[spoken(phase) for phase in first],
    )


def _worth(outcome: Outcome, phases: dict[str, list[Phase]]) -> float:
    """Net audio; of several models, each counted in seconds of the best plan for it."""
    if len(phases) == 1:
        return outcome.net_s
    return sum(outcome.progress_of[model] / own[0].rate for model, own in phases.items())


def spoken(phase: Phase) -> str:
    crews = " + ".join(f"{crew.number}×b{crew.batch} {crew.compute_type}" for crew in phase.crews) or "nothing"
    return f"{phase.begin_s / 3600:.2f} h: {crews} = {phase.rate:.1f}×"


# --- changes ---


def _changed(decisions: Sequence[Decision]) -> list[Decision]:
    """Those in which a card's plan differs from the one before; the very first one is no change."""
    pairs = itertools.pairwise(decisions)
    return [after for before, after in pairs if _plans(before) != _plans(after)]


def changes_per_h(decisions: Sequence[Decision], begin_h: float, end_h: float) -> float:
    """Changes of plan in a stretch of time."""
    found = sum(1 for decision in _changed(decisions) if begin_h * 3600 <= decision.at_s < end_h * 3600)
    return found / (end_h - begin_h)


def _plans(decision: Decision) -> dict[str, CardPlan]:
    return {plan.gpu: plan for plan in decision.cards}


def reversals(scenario: Scenario, decisions: Sequence[Decision]) -> int:
    """Steps back within half an hour of a step, of workers or batch, of the same card in the same phase: changes of mind.

    Neither of the two is a trial, and the first one was not made for somebody else's sake.
    """
    cuts = [change.at_s for change in scenario.changes]
    last: dict[tuple[str, str], tuple[float, int, bool]] = {}
    found = 0
    for before, after in itertools.pairwise(decisions):
        excused = any(reason.code.startswith(SCHEDULED) for reason in after.reasons)
        courteous = any(reason.code in COURTESY for reason in after.reasons)
        old = _plans(before)
        for gpu, plan in _plans(after).items():
            if gpu not in old or (plan.model, plan.compute_type) != (old[gpu].model, old[gpu].compute_type):
                continue
            for knob in ("workers", "batch"):
                step = getattr(plan, knob) - getattr(old[gpu], knob)
                if not step:
                    continue
                at_s, sign, was_excused = last.get((gpu, knob), (-math.inf, 0, False))
                calm = not any(at_s < cut <= after.at_s for cut in cuts) and after.at_s - at_s < REVERSAL_S
                found += calm and step * sign < 0 and not (excused or was_excused)
                last[gpu, knob] = after.at_s, 1 if step > 0 else -1, excused or (courteous and step < 0)
    return found


# --- convergence ---


def converged(scenario: Scenario, staffing: Sequence[Staffing], oracle: Sequence[Staffing], phases: Sequence[Phase]) -> list[Convergence]:
    """For every phase that has a best and lasts ten minutes, where there is always work."""
    near = best_of(scenario, phases[0].model, batches=_configured(scenario), kinds=1)
    restarts = {change.at_s for change in scenario.changes if change.what == "restart"}
    unread = {change.at_s for change in scenario.changes if change.what in ("blind", "frozen")}
    found = []
    for phase, configured in zip(phases, near, strict=True):
        if not phase.rate or phase.end_s - phase.begin_s < 600 or phase.begin_s in unread:
            continue
        what = "warm" if phase.begin_s in restarts else "change" if phase.begin_s else "cold"
        known = phase.crews in [earlier.crews for earlier in phases if earlier.end_s <= phase.begin_s]
        search = configured.rate < WITHIN * phase.rate and not known
        found.append(Convergence(phase.begin_s, what, search, _took(scenario, staffing, phase), _took(scenario, oracle, phase)))
    return found


def _configured(scenario: Scenario) -> tuple[int, ...]:
    policy = scenario.policy
    return (policy.cpu_batch_first,) if all(card.is_cpu for card in scenario.cards) else (policy.batch_first,)


def _took(scenario: Scenario, staffing: Sequence[Staffing], phase: Phase) -> float | None:
    """Until what serves is within 5 % of the best, nine tenths of the following five minutes."""
    now = weather(scenario, phase.begin_s)
    known: dict[object, bool] = {}
    good: list[tuple[float, float]] = []
    until = [*(after.at_s for after in staffing[1:]), scenario.horizon_s]
    for record, next_s in zip(staffing, until, strict=True):
        begin_s, end_s = max(record.at_s, phase.begin_s), min(next_s, phase.end_s)
        if begin_s >= end_s:
            continue
        if record.crews not in known:
            known[record.crews] = rate_of(scenario, now, record.crews) >= WITHIN * phase.rate
        if known[record.crews]:
            good.append((begin_s, end_s))
    for begin_s, _ in good:
        until_s = min(begin_s + HELD_S, phase.end_s)
        held_s = sum(max(0.0, min(end_s, until_s) - max(other, begin_s)) for other, end_s in good)
        if held_s >= HELD_SHARE * (until_s - begin_s):
            return begin_s - phase.begin_s
    return None
