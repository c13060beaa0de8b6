"""`whisperd retry JOB… | --failed`: try files again. Works while the daemon runs: both write through the ledger's verbs."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from whisperd import config
from whisperd.errors import WhisperdError, printable
from whisperd.ledger.ledger import Ledger

SCHEMA = "whisperd.retry/1"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("retry", parents=[common], help="try failed or cancelled files again")
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("job", type=int, nargs="*", default=[], help="numbers, from `whisperd jobs`")
    which.add_argument("--failed", action="store_true", help="every failed file")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({SCHEMA})")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    ledger = Ledger(config.load(args.config).state_dir, epoch="desk")
    try:
        jobs = [row["id"] for row in ledger.jobs(state="failed")] if args.failed else args.job
        retried, refused = _retry(ledger, jobs)
    finally:
        ledger.close()
    if args.json:
        shown = {
            "schema": SCHEMA,
            "retried": [{"job": job, "path": path} for job, path in retried.items()],
            "refused": [{"job": job, "what": what} for job, what in refused.items()],
        }
        print(json.dumps(shown, indent=2))
    else:
        lines = [f"job {job} will be tried again: {path}" for job, path in retried.items()]
        print("\n".join([*lines, *refused.values()]) or "no failed files")
    return 1 if refused else 0


def _retry(ledger: Ledger, jobs: list[int]) -> tuple[dict[int, str], dict[int, str]]:
    """Number → path of what will be tried again, number → why not of the rest."""
    retried: dict[int, str] = {}
    refused: dict[int, str] = {}
    for job in jobs:
        try:
            ledger.retry(job, time.time())
            retried[job] = printable(ledger.job(job)["path"])
        except WhisperdError as error:
            refused[job] = str(error)
    return retried, refused
