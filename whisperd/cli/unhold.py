"""`whisperd unhold JOB…`: files that were held go on where they were."""

from __future__ import annotations

import argparse
import time
from typing import Any

from whisperd.cli import each
from whisperd.config import Settings


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    each.add(verbs, common, "unhold", text="let held files go on", done="unheld").set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    return each.do(args, "unhold", _unhold, done="unheld", said="is held no more")


def _unhold(settings: Settings) -> each.Act:
    return lambda ledger, job: ledger.unhold(job, time.time())
