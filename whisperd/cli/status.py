"""`whisperd status`: what is queued, running, done and failed; GPUs; the plan and why."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from whisperd import config
from whisperd.ledger.queries import Queries
from whisperd.report import status


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("status", parents=[common], help="what the daemon is doing")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({status.SCHEMA})")
    command.add_argument("--watch", action="store_true", help="show it again every 2 seconds until Ctrl-C")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    state_dir = config.load(args.config).state_dir
    ledger = Queries.open(state_dir)
    while True:
        shown = status.snapshot(ledger, state_dir, time.time())
        text = json.dumps(shown, indent=2) if args.json else status.render(shown)
        if not args.watch:
            print(text)
            return 0
        sys.stdout.write("\x1b[H\x1b[2J" + text + "\n")
        sys.stdout.flush()
        time.sleep(2)
