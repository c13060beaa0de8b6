"""`whisperd retry JOB… | --failed`: try files again. Works while the daemon runs: both write through the ledger's verbs."""

from __future__ import annotations

import argparse
import time
from typing import Any

from whisperd import config
from whisperd.errors import WhisperdError, printable
from whisperd.ledger.ledger import Ledger


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("retry", parents=[common], help="try failed or cancelled files again")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("job", type=int, nargs="*", default=[], help="numbers, from `whisperd jobs`")
    which.add_argument("--failed", action="store_true", help="every failed file")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    ledger = Ledger(config.load(args.config).state_dir, epoch="desk")
    try:
        jobs = [row["id"] for row in ledger.jobs(state="failed")] if args.failed else args.job
        refused = sum(not _retried(ledger, job) for job in jobs)
    finally:
        ledger.close()
    if not jobs:
        print("no failed files")
    return 1 if refused else 0


def _retried(ledger: Ledger, job: int) -> bool:
    try:
        ledger.retry(job, time.time())
    except WhisperdError as error:
        print(error)
        return False
    print(f"job {job} will be tried again: {printable(ledger.job(job)['path'])}")
    return True
