"""daemon_tax: bar 6: what a file costs beside its transcription: watch, ledger, wire, dispatch, publish.

Two hundred ten-second clips arrive in the inbox of a daemon that has come to rest. Counted from their arrival until the last one is
published: the CPU time of the daemon, the watcher, the outbox writer and the probe, plus the engine's part of the wire, which is
measured by sending the very frames of one clip through a wire many times (both ends: more than the engine's part).
"""

from __future__ import annotations

import socket
import sys
import time
from typing import Any

from bench import clips, measure
from bench.engine import Engine, Job, model_of, options_of
from bench.house import Daemon, House
from bench.measure import Bar, Cost, Report, median
from whisperd.wire import Channel, EngineOut, Message

PER_FILE_LIMIT_MS, SHARE_LIMIT_PERCENT = 10.0, 3.0
WIRE_ROUNDS = 300


def frames_of_one_clip(model: str, path: str) -> list[Message]:
    """What the engine says about one clip, frame by frame."""
    engine = Engine(model)
    heard: list[Message] = []
    engine.listener = heard.append
    engine.work([Job(path, options_of(model))])
    engine.stop()
    return heard


def wire_ms(frames: list[Message]) -> float:
    """CPU time of these frames through a wire, sender and receiver together, in milliseconds."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    sender: Channel[Any] = Channel(ours, EngineOut)
    receiver: Channel[Any] = Channel(theirs, EngineOut)
    began = time.process_time()
    for _ in range(WIRE_ROUNDS):
        for frame in frames:
            sender.send(frame)
            while not list(receiver.receive()):
                sender.flush()
    used_s = time.process_time() - began
    sender.close()
    receiver.close()
    return used_s / WIRE_ROUNDS * 1000


def one_run(home: str, model: str, threads: int, paths: list[str]) -> Cost:
    """CPU time by process, from the arrival of the clips until the last is published; start-up apart."""
    house = House(home, model, threads=threads)
    daemon = Daemon(house)
    try:
        daemon.wait_idle()
        before, began = daemon.cpu_by_name(), time.monotonic()
        house.drop(paths)
        ended = daemon.wait_done(len(paths), every_s=0.25)
        after = daemon.cpu_by_name()
        daemon.stop()
    finally:
        daemon.close()
        house.close()
    spent = {name: round(after[name] - before.get(name, 0.0), 4) for name in sorted(after)}
    return Cost(round(sum(spent.values()), 3), round(ended - began, 3), 0.0, {"spent": spent, "start_up": before})


def main() -> int:
    parser = measure.arguments("daemon_tax", __doc__, runs=1)
    parser.add_argument("--clips", type=int, default=200)
    args = parser.parse_args()
    model, paths = model_of(args.size, args.home), clips.equal(args.home, args.clips)
    report = Report("daemon_tax", f"{args.clips} clips of 10 s through the daemon, {args.size}: what is not transcription")
    name = "the daemon and its children"
    report.runs = measure.alternated({name: lambda: one_run(f"{args.home}/houses", model, args.threads, paths)}, args.runs)
    costs = report.runs[name]

    def part_ms(process: str) -> float:
        spent_s = median(costs, lambda cost: float(cost.said["spent"].get(process, 0.0)))
        return round(1000 * spent_s / args.clips, 3)

    parts = {process: part_ms(process) for process in ("daemon", "watcher", "outbox", "probe")}
    parts["wire of the engine"] = round(wire_ms(frames_of_one_clip(model, paths[0])), 3)
    tax_ms = round(sum(parts.values()), 3)
    share = round(100 * tax_ms * args.clips / 1000 / median(costs), 3)
    report.bars = [
        Bar("tax for each file", tax_ms, PER_FILE_LIMIT_MS, "ms"),
        Bar("tax in all CPU time", share, SHARE_LIMIT_PERCENT if args.size != "demo" else None, "%"),
        *(Bar(f"  of it {process}", value, None, "ms") for process, value in parts.items()),
        Bar("engine for each file", part_ms("engine"), None, "ms"),
    ]
    report.details = {"spent": [cost.said["spent"] for cost in costs], "start_up": [cost.said["start_up"] for cost in costs]}
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
