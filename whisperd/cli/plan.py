"""`whisperd plan`: what the optimiser decided and why; its history as a file; that history through another policy."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from typing import Any

from whisperd import config
from whisperd.errors import WhisperdError
from whisperd.ledger.queries import Queries
from whisperd.report import plan

DAY_S = 86_400.0
ALL_PLANS = 100_000


class BadPolicy(WhisperdError):
    """There is no policy of that name."""

    code = "bad_policy"


class CannotWrite(WhisperdError):
    """The file cannot be written or read."""

    code = "trace_file"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("plan", parents=[common], help="the last plans and why; `export` and `simulate` replay history")
    command.add_argument("--limit", type=int, default=10, help="newest N (default 10)")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({plan.SCHEMA})")
    command.set_defaults(act=act)
    parts = command.add_subparsers(title="more", metavar="")
    export = parts.add_parser("export", help="write this installation's history, without names of files")
    export.add_argument("file", metavar="FILE", help="lines of JSON; it must not exist yet")
    export.add_argument("--days", type=float, default=14.0, help="how far back (default 14)")
    export.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="as above")
    export.set_defaults(act=act_export)
    simulate = parts.add_parser("simulate", help="what a policy would have made of such a history")
    simulate.add_argument("trace", metavar="TRACE", help="written by `whisperd plan export`")
    simulate.add_argument("--policy", default="current", help="current (default), rule-a, formula-b, fixed-N or fixed-NxBATCH")
    simulate.add_argument("--seed", type=int, default=1, help="of what is left to chance (default 1)")
    simulate.add_argument("--json", action="store_true", help=f"machine-readable ({plan.REPLAY_SCHEMA})")
    simulate.set_defaults(act=act_simulate)


def act(args: argparse.Namespace) -> int:
    ledger = Queries.open(config.load(args.config).state_dir)
    found = plan.shown(ledger.last_plans(max(1, args.limit)))
    print(json.dumps(found, indent=2) if args.json else plan.render(found))
    return 0


# --- export ---


def act_export(args: argparse.Namespace) -> int:
    from whisperd.dispatcher.simulator import trace

    settings = config.load(args.config)
    ledger = Queries.open(settings.state_dir)
    now = time.time()
    history = _history(ledger, settings, since=now - args.days * DAY_S, now=now)
    _write(args.file, trace.lines(history))
    print(f"{args.file}: {len(history.jobs)} recordings, {len(history.minutes)} minutes, {len(history.plans)} plans")
    return 0


def _history(ledger: Queries, settings: config.Settings, *, since: float, now: float) -> Any:
    """The trace; it begins with the first minute that is known."""
    from whisperd.dispatcher import limits, machine
    from whisperd.dispatcher.simulator import trace

    minutes = ledger.minutes(since)
    plans = [row for row in ledger.last_plans(ALL_PLANS) if row["at"] >= since]
    model, compute_type = _usual(plans, settings)
    begin = min((minute.at - 60 for minute in minutes), default=since)
    head = trace.Head(
        begin=begin,
        end=max((minute.at for minute in minutes), default=now),
        cores=machine.cores(),
        model=model,
        compute_type=compute_type,
        policy=limits.policy_of(settings, compute_type),
    )
    return trace.trace_of(head, jobs=ledger.arrivals(begin), minutes=minutes, plans=plans, learned=ledger.learned())


def _usual(plans: Sequence[dict[str, Any]], settings: config.Settings) -> tuple[str, str]:
    """What "auto" meant in most plans."""
    named = [(card["model"], card["compute_type"]) for row in plans for card in (row["body"] or {}).get("cards", []) if card["model"]]
    return max(named, key=named.count) if named else (settings.engine.model, settings.engine.compute_type)


def _write(path: str, lines: Any) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        with os.fdopen(descriptor, "wb") as file:
            file.writelines(line + b"\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise CannotWrite(f"cannot write {path}: {error.strerror}", hint="name a new file in a directory that is yours") from error


# --- simulate ---


def act_simulate(args: argparse.Namespace) -> int:
    from whisperd.dispatcher.simulator import trace

    try:
        with open(args.trace, "rb") as file:
            history = trace.parse(file)
    except OSError as error:
        raise CannotWrite(f"cannot read {args.trace}: {error.strerror}", hint="`whisperd plan export FILE` writes one") from error
    found = replay(history, args.policy, args.seed)
    print(json.dumps(found, indent=2) if args.json else plan.render_replay(found))
    return 0


def replay(history: Any, policy: str, seed: int) -> dict[str, Any]:
    """A history through a policy, beside what happened (schema whisperd.replay/1). Raises BadTrace, BadPolicy."""
    from whisperd.dispatcher.simulator import baselines, record, world
    from whisperd.dispatcher.simulator.decider import Current
    from whisperd.dispatcher.simulator.history import scenario_of

    try:
        decider = Current() if policy == "current" else baselines.named(policy)
    except ValueError as error:
        raise BadPolicy(str(error)) from error
    scenario = scenario_of(history)
    outcome = world.simulate(scenario, decider, seed)
    return {
        "schema": plan.REPLAY_SCHEMA,
        "policy": decider.name,
        "seed": seed,
        "note": scenario.note,
        "seconds": scenario.horizon_s,
        "happened": record.happened(history)._asdict(),
        "replayed": record.replayed(outcome)._asdict(),
    }
