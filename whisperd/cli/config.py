"""`whisperd config`: check and show settings; print an example and the unit file for this installation."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.resources import files
from typing import Any

from whisperd import config

SCHEMA = "whisperd.config/1"
SHARE_S = 5.0  # for the answer of a share


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("config", help="check and show settings")
    what = command.add_subparsers(title="what", metavar="WHAT", required=True)
    check = what.add_parser("check", parents=[common], help="say whether the configuration can be used")
    check.add_argument("--json", action="store_true", help="machine-readable")
    check.set_defaults(act=act_check)
    show = what.add_parser("show", parents=[common], help="every setting, its value and where that comes from")
    show.add_argument("--json", action="store_true", help="machine-readable")
    show.set_defaults(act=act_show)
    what.add_parser("example", help="print a configuration with every setting explained").set_defaults(act=act_example)
    what.add_parser("unit", help="print the systemd unit for this installation").set_defaults(act=act_unit)


def act_check(args: argparse.Namespace) -> int:
    settings = config.load(args.config)
    notes = list(_notes(settings))
    if args.json:
        print(json.dumps({"schema": SCHEMA, "config": args.config, "usable": True, "notes": notes}, indent=2))
    else:
        print("\n".join([f"{args.config}: good, {len(settings.inbox)} inbox(es)", *("note: " + note for note in notes)]))
    return 0


def _notes(settings: config.Settings) -> Any:
    for inbox in settings.inbox:
        match _is_directory(inbox.path):
            case False:
                yield f"inbox {inbox.path} does not exist (yet): its watcher will wait for it"
            case None:
                yield f"inbox {inbox.path} is on a share that does not answer: its watcher will wait for it"
    if settings.engine.model == "demo":
        yield "engine.model = demo knows a few hundred spoken English words; it is for trying whisperd out"


def _is_directory(path: str) -> bool | None:
    """None: nobody says so in time. Another process asks, for on a share that hangs not even SIGKILL ends who does."""
    nothing = subprocess.DEVNULL  # or who reads what we say would wait for the end of what it says
    asker = subprocess.Popen(["test", "-d", path], stdin=nothing, stdout=nothing, stderr=nothing)
    try:
        return asker.wait(SHARE_S) == 0
    except subprocess.TimeoutExpired:
        asker.kill()
        return None


def act_show(args: argparse.Namespace) -> int:
    found = config.origin_of(config.load(args.config), args.config)
    if args.json:
        settings = {key: {"value": value, "origin": origin} for key, (value, origin) in found.items()}
        print(json.dumps({"schema": SCHEMA, "config": args.config, "settings": settings}, indent=2))
    else:
        width = max(map(len, found))
        for key, (value, origin) in found.items():
            print(f"{key:<{width}}  {config.toml_value(value)}  ({origin})")
    return 0


def shared(*parts: str) -> str:
    """A file that ships with whisperd: in the wheel below whisperd/share, in a checkout beside the package."""
    packaged = files("whisperd").joinpath("share", *parts)
    if packaged.is_file():
        return packaged.read_text("utf-8")
    return files("whisperd").joinpath("..", *parts).read_text("utf-8")


def act_example(args: argparse.Namespace) -> int:
    print(shared("etc", "whisperd.toml"), end="")
    return 0


def act_unit(args: argparse.Namespace) -> int:
    command = os.path.join(os.path.dirname(sys.executable), "whisperd")
    print(shared("systemd", "whisperd.service").replace("/opt/whisperd/bin/whisperd", command), end="")
    return 0
