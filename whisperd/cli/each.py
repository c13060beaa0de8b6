"""each: one verb of the ledger done to several jobs, and what came of each. One that is refused does not stop the rest.

Owns: the words and the JSON shape that `cancel`, `hold`, `unhold` and `prioritise` share. Exit status 1 when any job was refused.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from whisperd import config
from whisperd.config import Settings
from whisperd.errors import WhisperdError, printable
from whisperd.ledger.ledger import Ledger

Act = Callable[[Ledger, int], None]


def add(verbs: Any, common: argparse.ArgumentParser, verb: str, *, text: str, done: str) -> argparse.ArgumentParser:
    """The part of a command line that these verbs share; `done` is what the JSON calls the jobs that it was done to."""
    command: argparse.ArgumentParser = verbs.add_parser(verb, parents=[common], help=text)
    command.add_argument("job", type=int, nargs="+", metavar="JOB", help="numbers, from `whisperd jobs`")
    command.add_argument("--json", action="store_true", help=f"machine-readable (whisperd.{verb}/1: `{done}` and `refused`)")
    return command


def do(args: argparse.Namespace, verb: str, act: Callable[[Settings], Act], *, done: str, said: str) -> int:
    """Do it to every job named and tell; `said` follows "job 7" in the sentence for people. Returns the exit status."""
    settings = config.load(args.config)
    ledger = Ledger(settings.state_dir, epoch="desk")
    try:
        obeyed, refused = _to_each(ledger, args.job, act(settings))
    finally:
        ledger.close()
    if args.json:
        shown = {
            "schema": f"whisperd.{verb}/1",
            done: [{"job": job, "path": path} for job, path in obeyed.items()],
            "refused": [{"job": job, "what": what} for job, what in refused.items()],
        }
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join([*(f"job {job} {said}: {path}" for job, path in obeyed.items()), *refused.values()]))
    return 1 if refused else 0


def _to_each(ledger: Ledger, jobs: list[int], act: Act) -> tuple[dict[int, str], dict[int, str]]:
    """Number → path of those it was done to, number → why not of the rest."""
    obeyed: dict[int, str] = {}
    refused: dict[int, str] = {}
    for job in dict.fromkeys(jobs):
        try:
            act(ledger, job)
            obeyed[job] = printable(ledger.job(job)["path"])
        except WhisperdError as error:
            refused[job] = str(error)
    return obeyed, refused
