"""`whisperd cancel JOB…`: these files are not transcribed, until `whisperd retry`. Works while the daemon runs, on what it runs, too."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

from whisperd.cli import each
from whisperd.config import Settings
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    each.add(verbs, common, "cancel", text="do not transcribe files that wait or run", done="cancelled").set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    return each.do(args, "cancel", _cancel, done="cancelled", said="is cancelled")


def _cancel(settings: Settings) -> each.Act:
    def cancel(ledger: Ledger, job: int) -> None:
        ledger.cancel(job, time.time(), options=_options(settings, ledger, job))

    return cancel


def _options(settings: Settings, ledger: Ledger, job: int) -> JobOptions | None:
    """What a file asks for that has not settled yet: what its inbox says now."""
    if not ledger.exists(job):
        return None
    inbox = ledger.job(job)["inbox_path"]
    return next((settings.options(known) for known in settings.inbox if os.fsencode(known.path) == inbox), None)
