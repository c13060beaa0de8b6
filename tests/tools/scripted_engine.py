"""scripted_engine: a real process that speaks the engine's wire and does with each file what is written in it.

A file is JSON: `windows` to report at once, `then` what happens ("finish", "crash", "hold"), `after` the path of a file to wait for
first, `ticking` to tell of progress until then, `batches` and `out_of_memory` as frames to send. SCRIPTED is JSON as well: `slots`,
`revision`, `log` (a file to which every frame taken is appended).
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

from whisperd.vocabulary import Segment, Summary, Window
from whisperd.wire import (
    Abandon,
    Abandoned,
    BatchDone,
    Channel,
    EngineIn,
    EngineReady,
    Finished,
    LoadModel,
    OutOfMemory,
    Progress,
    Stop,
    Transcribe,
    Unload,
    Unloaded,
    WindowDone,
    WireClosed,
    join_daemon,
)

ME = json.loads(os.environ["SCRIPTED"])


class Work:
    """One file in hand."""

    def __init__(self, order: Transcribe, descriptor: int) -> None:
        self.order = order
        with os.fdopen(descriptor, "rb") as file:
            self.script: dict[str, Any] = json.load(file)
        self.told_s = 0.0


def window(index: int) -> Window:
    said = Segment(start_s=float(index), end_s=index + 1.0, text=f"window {index}")
    return Window(
        index=index,
        start_s=float(index),
        end_s=index + 1.0,
        language="en",
        language_probability=1.0,
        segments=(said,),
        tokens=(10 * index, 10 * index + 1),
        seek=100 * index,
    )


def begin(channel: Channel[EngineIn], work: Work) -> None:
    for index in range(work.order.windows_done, work.script.get("windows", 1)):
        channel.send_all(WindowDone(job=work.order.job, window=window(index), duration_s=None, front_end=b"state %d" % index))
    usual = {"windows": 1, "limit": 4, "beam": 5, "frames": 3000, "encoded": 1, "encoded_needed": 1, "took_s": 0.1, "rss_mib": 100}
    for batch in work.script.get("batches", []):
        channel.send_all(BatchDone(**{**usual, **batch}))
    for _ in range(work.script.get("out_of_memory", 0)):
        channel.send_all(OutOfMemory(windows=4, beam=5, frames=3000, limit=2, what="no room"))


def go_on(channel: Channel[EngineIn], work: Work) -> bool:
    """Do what the file says; True when it is out of our hands."""
    if "after" in work.script and not os.path.exists(work.script["after"]):
        if work.script.get("ticking") and time.monotonic() - work.told_s > 0.1:
            work.told_s = time.monotonic()
            channel.send_all(Progress(job=work.order.job, position_s=1.0, duration_s=None))
        return False
    match work.script.get("then", "finish"):
        case "finish":
            summary = Summary(
                duration_s=9.0,
                speech_s=9.0,
                windows=work.script.get("windows", 1),
                source_sha256="ab",
                container="json",
                codec="json",
                model="scripted",
                model_revision=ME["revision"],
                device="cpu",
                compute_type="none",
                engine_version="0",
            )
            channel.send_all(Finished(job=work.order.job, summary=summary))
            return True
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
    return False


def note(message: EngineIn) -> None:
    told = {"pid": os.getpid(), "kind": type(message).__name__}
    if isinstance(message, Transcribe | Abandon):
        told["job"] = message.job
    if isinstance(message, Transcribe):
        told |= {"windows_done": message.windows_done, "position_s": message.position_s, "front_end": message.front_end.decode()}
    with open(ME["log"], "a", encoding="utf-8") as log:
        log.write(json.dumps(told) + "\n")


def serve(channel: Channel[EngineIn]) -> None:
    hands: dict[int, Work] = {}
    while True:
        for frame in channel.wait(0.01 if hands else None):
            message = frame.message
            note(message)
            match message:
                case LoadModel():
                    made = {"model": "scripted", "revision": ME["revision"], "device": "cpu", "compute_type": "none", "encoder": "none"}
                    channel.send_all(EngineReady(**made, slots=ME["slots"], load_s=0.0, rss_mib=100))
                case Transcribe():
                    hands[message.job] = Work(message, frame.descriptors[0])
                    begin(channel, hands[message.job])
                case Abandon(job=job):
                    if hands.pop(job, None):
                        channel.send_all(Abandoned(job=job))
                case Unload():
                    channel.send_all(Unloaded(rss_mib=10))
                case Stop():
                    for job in hands:
                        channel.send_all(Abandoned(job=job))
                    return
        for job in [job for job, work in hands.items() if go_on(channel, work)]:
            del hands[job]


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    wire: Channel[EngineIn] = join_daemon(EngineIn)
    try:
        serve(wire)
    except WireClosed:
        sys.exit(0)
