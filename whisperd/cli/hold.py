"""`whisperd hold JOB…`: these files wait until `whisperd unhold`. One that runs is interrupted and keeps its finished windows."""

from __future__ import annotations

import argparse
import time
from typing import Any

from whisperd.cli import each
from whisperd.config import Settings


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    each.add(verbs, common, "hold", text="keep files waiting; one that runs is interrupted", done="held").set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    return each.do(args, "hold", _hold, done="held", said="is held")


def _hold(settings: Settings) -> each.Act:
    return lambda ledger, job: ledger.hold(job, time.time())
