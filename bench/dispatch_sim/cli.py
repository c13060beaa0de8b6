"""cli: the command line of the scenarios.

python -m bench.dispatch_sim run --scenario NAME --policy P --seed N     one run, with its decisions
python -m bench.dispatch_sim named [--policies P,Q] [--seeds 1:4]        every named scenario
python -m bench.dispatch_sim random --seeds 1000:1060 [--policies P,Q]   random ones
python -m bench.dispatch_sim goals [--parts named,held_out] [--saved]    what OPTIMISER.md §6 asks, into docs/optimiser/
python -m bench.dispatch_sim report                                      docs/optimiser.md and its pictures
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import Any

from bench.dispatch_sim import goals, report
from bench.dispatch_sim.run import Order, play, play_all
from bench.dispatch_sim.scenes import named
from whisperd.dispatcher.simulator.record import share_of


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.dispatch_sim", description=(__doc__ or "").partition("\n\n")[0])
    verbs = parser.add_subparsers(required=True, metavar="COMMAND")
    one = verbs.add_parser("run", help="one scenario, with every decision")
    one.add_argument("--scenario", required=True)
    one.add_argument("--policy", default="current")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--json", action="store_true")
    one.set_defaults(act=run_one)
    many = verbs.add_parser("named", help="every named scenario")
    many.add_argument("--scenarios", default="")
    many.add_argument("--seeds", type=span, default=range(1, 2))
    _common(many)
    many.set_defaults(act=run_named)
    chance = verbs.add_parser("random", help="random scenarios")
    chance.add_argument("--seeds", type=span, default=range(1000, 1030))
    chance.add_argument("--crooked", action="store_true", help="on machines unlike the simulator's own model")
    _common(chance)
    chance.set_defaults(act=run_random)
    judged = verbs.add_parser("goals", help="make the runs of the goals, keep their scores, judge them")
    judged.add_argument("--parts", default=",".join(goals.PARTS), help="of " + ", ".join(goals.PARTS))
    judged.add_argument("--processes", type=int, default=2, choices=(1, 2))
    judged.add_argument("--results", default=goals.RESULTS)
    judged.add_argument("--saved", action="store_true", help="run nothing: judge what was saved")
    judged.set_defaults(act=run_goals)
    page = verbs.add_parser("report", help="docs/optimiser.md and its pictures from what was saved")
    page.add_argument("--page", default=report.PAGE)
    page.add_argument("--results", default=goals.RESULTS)
    page.add_argument("--no-pictures", action="store_true", help="leave the pictures as they are")
    page.set_defaults(act=run_report)
    args = parser.parse_args(arguments)
    return int(args.act(args))


def _common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--policies", default="current")
    command.add_argument("--processes", type=int, default=2, choices=(1, 2))
    command.add_argument("--save", metavar="FILE", help="scores as JSON")


def span(text: str) -> range:
    """ "1000:1060" or "7"."""
    begin, _, end = text.partition(":")
    return range(int(begin), int(end) if end else int(begin) + 1)


def run_one(args: argparse.Namespace) -> int:
    found, outcome, _ = play(Order(args.scenario, args.policy, args.seed))
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
        return 0
    for decision in outcome.decisions:
        plans = " + ".join(f"{plan.gpu} {plan.workers}×b{plan.batch} {plan.model} {plan.compute_type}" for plan in decision.cards)
        why = "; ".join(f"[{reason.code}] {reason.text}" for reason in decision.reasons)
        print(f"{decision.at_s / 60:8.2f} min  {plans}  {why}")
    print("oracle:", *found.best, sep="\n  ")
    print(HEAD, line(dataclasses.asdict(found)), sep="\n")
    for step in found.convergence:
        print(f"  {step.begin_s / 3600:.2f} h {step.what}{' with search' if step.search else ''}: {_minutes(step.took_s)}")
    return 0


def run_named(args: argparse.Namespace) -> int:
    names = args.scenarios.split(",") if args.scenarios else list(named())
    return _play(args, [Order(name, policy, seed) for policy in args.policies.split(",") for name in names for seed in args.seeds])


def run_random(args: argparse.Namespace) -> int:
    return _play(
        args,
        [
            Order(f"{'crooked' if args.crooked else 'random'}-{seed}", policy, seed)
            for policy in args.policies.split(",")
            for seed in args.seeds
        ],
    )


def run_goals(args: argparse.Namespace) -> int:
    """0 when every goal is kept, 1 when one is missed."""
    for part in () if args.saved else args.parts.split(","):
        goals.save(goals.make(part, args.processes), args.results)
    found = goals.judge(goals.load(args.results))
    print(*goals.table(found), sep="\n")
    return int(any(goal.verdict == "missed" for goal in found))


def run_report(args: argparse.Namespace) -> int:
    report.write(args.page, args.results, pictures=not args.no_pictures)
    return 0


def _play(args: argparse.Namespace, orders: Sequence[Order]) -> int:
    found = []
    print(HEAD)
    for one in play_all(orders, args.processes):
        found.append(one)
        print(line(one), flush=True)
    print(*summaries(found), sep="\n")
    if args.save:
        with open(args.save, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)
    return 0


HEAD = (
    f"{'scenario':22} {'policy':10} {'seed':>5} {'regret%':>8} {'jobs':>6} {'OOM':>4} {'load':>5} {'died':>4} {'denied p95/max s':>17}"
    f" {'thr min':>8} {'chg/h':>6} {'rev':>4} {'p95 wait/oracle min':>20} {'starts':>6} {'converged min':>24} {'ms p99':>7}"
)


def line(one: dict[str, Any]) -> str:
    """One score on one line."""
    denied = f"{share_of(one['denied_s'], 0.95):.0f}/{max(one['denied_s'], default=0):.0f}"
    waits = f"{one['wait_p95_s'] / 60:.1f}/{one['oracle_wait_p95_s'] / 60:.1f}"
    took = " ".join(_minutes(step["took_s"]) + ("s" if step["search"] else "") for step in map(_plain, one["convergence"]))
    return (
        f"{one['scenario']:22} {one['policy']:10} {one['seed']:5} {100 * one['regret']:8.1f} {one['jobs']:6} {one['out_of_memory']:4}"
        f" {one['load_out_of_memory']:5} {one['died']:4} {denied:>17} {one['throttled_s'] / 60:8.1f} {one['changes_per_h']:6.2f}"
        f" {one['reversals']:4} {waits:>20} {one['starts']:6} {took:>24} {one['decide_p99_ms'] or 0:7.2f}"
    )


def _plain(step: Any) -> dict[str, Any]:
    return step if isinstance(step, dict) else dataclasses.asdict(step)


def _minutes(took_s: float | None) -> str:
    return "never" if took_s is None else f"{took_s / 60:.1f}"


def summaries(found: Iterable[dict[str, Any]]) -> list[str]:
    """One line for each policy."""
    by_policy: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for one in found:
        by_policy[one["policy"]].append(one)
    lines = []
    for policy, own in by_policy.items():
        regrets = [100 * one["regret"] for one in own]
        denied = [waited for one in own for waited in one["denied_s"]]
        throttled = [one["throttled_s"] / 60 for one in own]
        jobs, hits = sum(one["jobs"] for one in own), sum(one["out_of_memory"] for one in own)
        p50, p90, p95 = (share_of(regrets, share) for share in (0.5, 0.9, 0.95))
        lines.append(
            f"{policy}: {len(own)} runs, regret p50 {p50:.1f} p90 {p90:.1f} p95 {p95:.1f} max {max(regrets):.1f} %;"
            f" OOM {hits} ({1000 * hits / max(1, jobs):.2f} per 1000), load {sum(one['load_out_of_memory'] for one in own)},"
            f" twice {sum(one['hit_twice'] for one in own)}; denied p95 {share_of(denied, 0.95):.0f} max {max(denied, default=0):.0f} s;"
            f" throttled p95 {share_of(throttled, 0.95):.1f} min;"
            f" changes/h {sum(one['changes_per_h'] for one in own) / len(own):.2f}, reversals {sum(one['reversals'] for one in own)}"
        )
    return lines
