"""`whisperd show JOB`: one file's whole life."""

from __future__ import annotations

import argparse
import json
from typing import Any

from whisperd import config
from whisperd.errors import WhisperdError
from whisperd.ledger.queries import Queries
from whisperd.report import life


class UnknownJob(WhisperdError):
    """The number is of no job."""

    code = "no_such_job"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("show", parents=[common], help="one file's whole life")
    command.add_argument("job", type=int, help="its number, from `whisperd jobs`")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({life.SCHEMA})")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    ledger = Queries.open(config.load(args.config).state_dir)
    try:
        shown = life.whole(ledger, args.job)
    except LookupError:
        raise UnknownJob(f"there is no job {args.job}", hint="`whisperd jobs` lists them") from None
    print(json.dumps(shown, indent=2) if args.json else life.render(shown))
    return 0
