"""`whisperd scan --dry-run`: every entry of every inbox, what would happen to it, and why; nothing is taken in.

The watcher's own code looks through each inbox, in a process of its own; here its findings meet the profiles and the ledger (read-only;
without one everything is new).
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from typing import Any

import msgspec

from whisperd import config
from whisperd.config import InboxSettings, Settings
from whisperd.dispatcher import intake
from whisperd.dispatcher.profiles import PRIORITY, Asked, Profiles
from whisperd.errors import WhisperdError, printable
from whisperd.ledger.connection import LEDGER_NAME
from whisperd.ledger.queries import Queries, Row
from whisperd.vocabulary import Sighting
from whisperd.wire import ProfileFile, WatchInbox

SCHEMA = "whisperd.scan/1"
OPTIONS = ("model", "mode", "language", "task", "formats", "channels", "speakers", "audio_track", "word_timestamps")
IN_WORDS = ("model", "language", "formats")
WIDTH = 40

Entry = dict[str, Any]


class PreviewFailed(WhisperdError):
    """An inbox could not be looked through, for a reason that is none of the inbox's."""

    code = "preview_failed"


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("scan", parents=[common], help="what lies in the inboxes, what would happen to it, and why")
    command.add_argument("--dry-run", action="store_true", help="required: this command only looks")
    command.add_argument("--json", action="store_true", help=f"machine-readable ({SCHEMA})")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    settings = config.load(args.config)
    if not args.dry_run:
        print("whisperd: scan only looks: say `whisperd scan --dry-run` (`whisperd run --once` does the work)", file=sys.stderr)
        return 2
    there = os.path.exists(os.path.join(settings.state_dir, LEDGER_NAME))
    with closing(Queries.open(settings.state_dir)) if there else nullcontext() as ledger:
        found = ((inbox, entries(settings, inbox, ledger, time.time())) for inbox in settings.inbox)
        down = print_json(found) if args.json else print_text(found)
    return 3 if down else 0


def entries(settings: Settings, inbox: InboxSettings, ledger: Queries | None, now: float) -> Iterator[Entry]:
    """What lies in one inbox, as it is found, its profiles last; one of verdict "down" if it cannot be listed. Raises PreviewFailed."""
    profiles, places = Profiles(), []
    judge = Judge(settings, inbox, profiles, now)
    known = _known(ledger, inbox)
    for item in look(intake.watch_order(0, inbox, settings)):
        if item["kind"] == "profile":  # these come before all others
            places.append(item["path"])
            profiles.update([ProfileFile(path=item["path"], text=item.get("text"), fault=item.get("why", ""))])
        else:
            yield judge.entry(item, known)
    faults = dict(profiles.faults())  # by now every file has asked: what is impossible together is known
    for place in places:
        fault = faults.get(place)
        yield {"path": printable(place), "verdict": "bad_profile" if fault else "profile", "why": fault or "in use", "job": None}


def look(order: WatchInbox) -> Iterator[Entry]:
    """What the watcher finds, as it finds it. Raises PreviewFailed."""
    command = [sys.executable, "-m", "whisperd.watcher.preview"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        if child.stdin is None or child.stdout is None:
            raise PreviewFailed("a child without its pipes")
        with child.stdin as pipe:
            pipe.write(msgspec.json.encode(order))
        for line in child.stdout:
            item = json.loads(line)
            yield {**item, "path": base64.b64decode(item.get("path", ""))}
    if child.returncode != 0:
        raise PreviewFailed(f"cannot look through {printable(order.path)}: its watcher ended with status {child.returncode}")


def _known(ledger: Queries | None, inbox: InboxSettings) -> Any:
    """A look-up: the newest job of a path, or None."""
    if ledger is None:
        return lambda path: None
    number = next((row["id"] for row in ledger.inboxes() if os.fsdecode(row["path"]) == inbox.path), None)
    return (lambda path: None) if number is None else (lambda path: ledger.latest_job(number, path))


class Judge:
    """What would happen to the entries of one inbox."""

    def __init__(self, settings: Settings, inbox: InboxSettings, profiles: Profiles, now: float) -> None:
        self._quiet_s = settings.watcher.quiet_s
        self._base = settings.options(inbox)
        self._priority = PRIORITY[inbox.priority]
        self._profiles = profiles
        self._now = now

    def entry(self, item: Entry, known: Any) -> Entry:
        """One entry as it is shown."""
        if item["kind"] != "recording":
            return {"path": printable(item["path"]), "verdict": item["kind"], "why": item["why"], "job": None}
        sighting = msgspec.convert(item["sighting"], Sighting)
        row = known(sighting.path)
        asked = self._profiles.asked(sighting.path, self._base, self._priority)
        verdict, why = self._verdict(sighting, row, asked)
        shown: Entry = {"path": printable(sighting.path), "verdict": verdict, "why": why, "job": row["id"] if row else None}
        if verdict in ("new", "changed", "unsettled"):
            shown["options"] = {key: getattr(asked.options, key) for key in OPTIONS}
            shown["priority"] = asked.priority
            shown["profiles"] = {key: printable(place) for key, place in asked.sources.items()}
        return shown

    def _verdict(self, sighting: Sighting, row: Row | None, asked: Asked) -> tuple[str, str]:
        if row is not None and row["state"] != "gone" and _same(row, sighting) and row["state"] != "seen":
            return _of_known(sighting, row)
        if asked.skip:
            return "skipped", f"{printable(asked.sources['skip'])} says skip = true"
        age_s = self._now - sighting.ctime_ns / 1e9
        if 0 <= age_s < self._quiet_s:
            return "unsettled", f"it changed {age_s:.1f} s ago, and is taken once it has not for {self._quiet_s:g} s"
        if row is not None and row["state"] not in ("gone", "seen"):
            return "changed", f"it is another file than that of job {row['id']} ({row['state']}): it would be transcribed anew"
        return "new", "it would be transcribed"


def _same(row: Row, sighting: Sighting) -> bool:
    return (row["size"], row["mtime_ns"]) == (sighting.size, sighting.mtime_ns)


def _of_known(sighting: Sighting, row: Row) -> tuple[str, str]:
    """A file whose size and time are those of its newest job."""
    state, job = row["state"], row["id"]
    finished = state in ("transcribed", "done", "failed", "cancelled")
    if finished and (row["inode"], row["ctime_ns"]) != (sighting.inode, sighting.ctime_ns):
        return "doubted", f"{state} as job {job}, but somebody touched it since: its content would be compared"
    words = {
        "ready": f"it waits its turn as job {job}",
        "running": f"job {job} is at work on it",
        "failed": f"failed as job {job}: {row['failure_what']} (`whisperd retry {job}` tries it again)",
    }
    return "known", words.get(state, f"{state} as job {job}")


# --- how it is shown; both say whether an inbox is down ---


def print_json(found: Iterable[tuple[InboxSettings, Iterator[Entry]]]) -> bool:
    shown: list[Entry] = []
    for inbox, lying in found:
        listed = list(lying)
        down = next((entry["why"] for entry in listed if entry["verdict"] == "down"), "")
        shown.append({"inbox": printable(inbox.path), "down": down, "entries": [] if down else listed})
    print(json.dumps({"schema": SCHEMA, "inboxes": shown}, indent=2))
    return any(inbox["down"] for inbox in shown)


def print_text(found: Iterable[tuple[InboxSettings, Iterator[Entry]]]) -> bool:
    """A line an entry, as they are found: there may be a million."""
    down = False
    for inbox, lying in found:
        print(printable(inbox.path))
        counts: Counter[str] = Counter()
        for entry in lying:
            verdict = entry["verdict"].replace("_", " ")
            counts[verdict] += 1
            print(f"  {entry['path']:<{WIDTH}}  {verdict}: {entry['why']}{_how(entry)}")
        print("  " + (", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())) or "empty"), end="\n\n")
        down = down or counts["down"] > 0
    return down


def _how(entry: Entry) -> str:
    """With what it would be transcribed, and which profile says so."""
    if "options" not in entry:
        return ""
    options, profiles = entry["options"], entry["profiles"]
    words = [f"{key} {' '.join(value) if isinstance(value, tuple) else value}" for key, value in options.items() if key in IN_WORDS]
    said = ", ".join(dict.fromkeys(profiles.values()))
    return f" ({', '.join(words)}{f'; by {said}' if said else ''})"
