"""`whisperd gpu`: what each card does now, and what it did in the last hours."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from whisperd import config
from whisperd.ledger.queries import Queries
from whisperd.report import gpu


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("gpu", parents=[common], help="what the cards do and did: memory, load, heat, workers")
    command.add_argument("--hours", type=_hours, default=6.0, metavar="N", help="how far back (default: 6)")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({gpu.SCHEMA})")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    ledger = Queries.open(config.load(args.config).state_dir)
    shown = gpu.snapshot(ledger, time.time(), args.hours)
    print(json.dumps(shown, indent=2) if args.json else gpu.render(shown))
    return 0


def _hours(text: str) -> float:
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours <= 24 * 366:
        raise argparse.ArgumentTypeError(f"{text} is no number of hours")
    return hours
