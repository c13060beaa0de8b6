"""`whisperd prioritise JOB… --class urgent|normal|low`: who goes first. What runs already goes on."""

from __future__ import annotations

import argparse
import time
from typing import Any

from whisperd.cli import each
from whisperd.config import Settings

CLASSES = ("urgent", "normal", "low")


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = each.add(verbs, common, "prioritise", text="give files another class", done="prioritised")
    command.add_argument("--class", dest="chosen", choices=CLASSES, required=True, help="urgent ones go first, low ones last")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    def prioritise(settings: Settings) -> each.Act:
        return lambda ledger, job: ledger.prioritise(job, CLASSES.index(args.chosen), time.time())

    return each.do(args, "prioritise", prioritise, done="prioritised", said=f"is {args.chosen} now")
