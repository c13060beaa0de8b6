"""`whisperd jobs`: the ledger, a line a file."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from whisperd import config
from whisperd.ledger.queries import QUALITIES, Queries
from whisperd.report import life
from whisperd.vocabulary import State


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("jobs", parents=[common], help="list files and where they stand")
    command.add_argument("--state", choices=[state.value for state in State], help="only these")
    command.add_argument("--quality", choices=QUALITIES, help="only transcripts with this verdict")
    command.add_argument("--inbox", metavar="DIR", help="only of this inbox")
    command.add_argument("--limit", type=int, default=100, help="newest N (default 100, 0 for all)")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({life.LIST_SCHEMA})")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    ledger = Queries.open(config.load(args.config).state_dir)
    inbox = os.fsencode(os.path.normpath(os.path.abspath(args.inbox))) if args.inbox else None
    newest = ledger.jobs(state=args.state, inbox=inbox, quality=args.quality, limit=args.limit or -1, newest=True)
    rows = [life.brief(row) for row in newest][::-1]
    print(json.dumps({"schema": life.LIST_SCHEMA, "jobs": rows}, indent=2) if args.json else life.table(rows))
    return 0
