"""`whisperd demo`: the main job for real, in a temporary inbox: real daemon, embedded model, sample recordings of several formats."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from typing import Any

from whisperd.errors import WhisperdError, printable
from whisperd.ledger.queries import Queries

WAIT_S = 180.0


def add(verbs: Any, common: argparse.ArgumentParser) -> None:
    command = verbs.add_parser("demo", help="transcribe sample recordings in a temporary inbox, with the embedded model")
    command.add_argument("--keep", metavar="DIR", help="use (and keep) this directory instead of a new one under the temporary directory")
    command.set_defaults(act=act)


def act(args: argparse.Namespace) -> int:
    home = os.path.abspath(args.keep) if args.keep else tempfile.mkdtemp(prefix="whisperd-demo-")
    inbox, outbox = os.path.join(home, "inbox"), os.path.join(home, "outbox")
    os.makedirs(inbox, exist_ok=True)
    settings = os.path.join(home, "whisperd.toml")
    with open(settings, "w", encoding="utf-8") as file:
        file.write(CONFIG.format(home=home))
    clips = _drop_clips(inbox)
    print(f"{len(clips)} recordings dropped into {inbox}")
    began = time.monotonic()
    with open(os.path.join(home, "whisperd.log"), "wb") as log:
        daemon = subprocess.Popen([sys.executable, "-m", "whisperd", "run", "--once", "--config", settings], stdout=log, stderr=log)
        try:
            code = _follow(daemon, os.path.join(home, "state"), len(clips))
        finally:
            if daemon.poll() is None:
                daemon.terminate()
                daemon.wait()
    if code != 0:
        with open(log.name, encoding="utf-8", errors="replace") as file:
            print(file.read()[-4000:], file=sys.stderr)
    _show(home, outbox, time.monotonic() - began)
    return code


CONFIG = """\
state_dir = "{home}/state"
cache_dir = "{home}/cache"
[engine]
model = "demo"
[transcription]
language = "en"
[watcher]
quiet_s = 1.0
[outbox]
formats = ["txt", "srt", "vtt", "tsv", "json"]
[[inbox]]
path = "{home}/inbox"
"""


def _drop_clips(inbox: str) -> list[str]:
    names: list[str] = []
    for clip in sorted(files("whisperd").joinpath("share", "clips").iterdir(), key=lambda item: item.name):
        if clip.name.endswith((".csv", ".md", ".py")) or not clip.is_file():
            continue
        with clip.open("rb") as source, open(os.path.join(inbox, clip.name), "wb") as target:
            shutil.copyfileobj(source, target)
        names.append(clip.name)
    return names


def _follow(daemon: subprocess.Popen[bytes], state_dir: str, total: int) -> int:
    """Show every file as it ends, until the daemon is drained."""
    told: set[int] = set()
    deadline = time.monotonic() + WAIT_S
    print("starting the daemon (watcher, outbox, engine and probe are processes of their own)")
    while daemon.poll() is None:
        if time.monotonic() > deadline:
            print(f"not drained after {WAIT_S:g} s, giving up", file=sys.stderr)
            return 3
        _tell_new(state_dir, told, total)
        time.sleep(0.1)
    _tell_new(state_dir, told, total)
    return daemon.returncode


def _tell_new(state_dir: str, told: set[int], total: int) -> None:
    try:
        ledger = Queries.open(state_dir)
    except WhisperdError:  # the daemon has not made it yet
        return
    try:
        for row in ledger.jobs():
            if row["state"] in ("done", "failed") and row["id"] not in told:
                told.add(row["id"])
                length = f"{row['duration_s'] or 0:4.1f} s of audio in {row['process_s'] or 0:4.1f} s"
                print(f"  [{len(told):>2}/{total}] {row['state']:<6} {printable(row['path']):<28} {length}", flush=True)
    finally:
        ledger.close()


def _show(home: str, outbox: str, wall_s: float) -> None:
    ledger = Queries.open(os.path.join(home, "state"))
    print("\ntranscripts:")
    audio_s = 0.0
    for row in ledger.jobs(state="done"):
        audio_s += row["duration_s"] or 0.0
        paths = [os.fsdecode(item["path"]) for item in ledger.publications(row["id"])]
        text = next((path for path in paths if path.endswith(".txt")), None)
        if text is not None:
            path = os.path.join(outbox, text)
            with open(path, encoding="utf-8") as file:
                print(f"  {path}\n      {' '.join(file.read().split())}")
    worked_s = ledger.throughput_since(0)[1]
    ledger.close()
    if audio_s and worked_s:
        speed = f"{audio_s / worked_s:.0f}× real time while working"
        print(f"\n{audio_s:.1f} s of audio: {speed}, {wall_s:.1f} s in all with start-up and quiet period")
    print(f"everything (inbox, outbox, ledger, log) is left in {home}")
