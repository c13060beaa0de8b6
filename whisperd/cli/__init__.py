"""cli: the operator's desk, one file for each verb.

Exit codes: 0 ok, 1 some work failed, 2 usage or configuration, 3 environment, 70 internal.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from whisperd import __version__
from whisperd.cli import cancel, config, demo, gpu, hold, jobs, plan, prioritise, retry, run, scan, show, status, unhold
from whisperd.config import DEFAULT_PATH
from whisperd.errors import ConfigError, WhisperdError
from whisperd.log import stderr_is_the_journal

VERBS = (demo, run, scan, status, jobs, show, retry, cancel, hold, unhold, prioritise, plan, gpu, config)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="whisperd", description="Turns every recording dropped into a folder into a transcript next to it.")
    top.add_argument("--version", action="version", version=f"whisperd {__version__}")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        metavar="FILE",
        default=os.environ.get("WHISPERD_CONFIG", DEFAULT_PATH),
        help=f"configuration file (default: $WHISPERD_CONFIG or {DEFAULT_PATH})",
    )
    verbs = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for verb in VERBS:
        verb.add(verbs, common)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; every error on purpose becomes a sentence and an exit code."""
    args = parser().parse_args(arguments)
    try:
        return int(args.act(args))
    except ConfigError as error:
        complain(error)
        return 2
    except WhisperdError as error:
        complain(error)
        return 3
    except BrokenPipeError:  # `whisperd jobs | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 0
    except KeyboardInterrupt:
        return 130


def complain(error: WhisperdError) -> None:
    """An error on standard error; in the journal every line of it has priority "err" (sd-daemon(3))."""
    priority = "<3>" if stderr_is_the_journal() else ""
    print("\n".join(priority + line for line in f"whisperd: {error}".splitlines()), file=sys.stderr)
