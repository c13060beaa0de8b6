"""`whisperd run`: the daemon in the foreground (systemd's ExecStart); `--once` drains what is there and ends."""

from __future__ import annotations

import argparse
from typing import Any


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("run", parents=[common], help="run the daemon in the foreground")
    command.add_argument("--once", action="store_true", help="transcribe what is there, then end: 0 all good, 1 some files failed")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    from whisperd import daemon

    return daemon.run(args.config, once=args.once)
