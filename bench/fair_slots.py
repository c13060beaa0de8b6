"""fair_slots: a ten-second clip dropped while a long recording is worked on: how long it waits, and what the long one loses by it.

One clip after the other arrives for as long as the long recording takes: first at the engine alone over the wire, then (--daemon) in
the inbox of a daemon. The clip's latency is held against its latency on an idle engine; the long recording's time against its fair
share: its time alone plus that of the clips alone. The peer is a queue, first in first out, as a faster-whisper loop makes it: a clip
dropped at any moment waits for the rest of the long file.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from bench import clips, measure
from bench.engine import Engine, Job, model_of, options_of
from bench.house import Daemon, House
from bench.measure import Bar, Report, percentile, run_tree

LATENCY_LIMIT, LONG_LIMIT = 3.0, 1.1
SOLO_CLIPS = 10
CLIPS_MAX = 200
LONG_JOB = 1_000_000


class Mixed(NamedTuple):
    """Seconds: of clips on an idle system, of the long recording alone, of clips beside it, and of the long one beside them."""

    solo_s: list[float]
    long_alone_s: float
    beside_s: list[float]
    long_beside_s: float

    @property
    def bars(self) -> list[Bar]:
        solo_s = percentile(self.solo_s, 0.5)
        fair_s = self.long_alone_s + len(self.beside_s) * sum(self.solo_s) / len(self.solo_s)
        waits = round(percentile(self.beside_s, 0.95) / solo_s, 3) if self.beside_s else float("inf")
        return [
            Bar("p95 latency of a clip beside the long file / alone", waits, LATENCY_LIMIT),
            Bar("long file beside clips / its fair share", round(self.long_beside_s / fair_s, 3), LONG_LIMIT),
            Bar("  latency of a clip alone, median", round(solo_s, 3), None, "s"),
            Bar("  latency of a clip beside the long file, median", round(percentile(self.beside_s or [0.0], 0.5), 3), None, "s"),
            Bar("  clips done during the long file", len(self.beside_s), None, ""),
        ]


def through_engine(model: str, threads: int, long_path: str, clip_paths: Sequence[str]) -> Mixed:
    engine = Engine(model, threads=threads)

    def alone(path: str) -> float:
        job = Job(path, options_of(model))
        engine.work([job])
        return job.latency_s

    alone(clip_paths[0])  # the first one finds everything cold
    solo_s = [alone(path) for path in clip_paths[:SOLO_CLIPS]]
    long_alone_s = alone(long_path)
    long_job, done = Job(long_path, options_of(model)), list[Job]()
    engine.send(LONG_JOB, long_job)
    engine.send(0, Job(clip_paths[0], options_of(model)))
    flying = engine.flying[0]
    for number in engine.ended():
        if number == LONG_JOB:
            continue
        if long_job.finished is None:
            done.append(flying)
            flying = Job(clip_paths[(number + 1) % len(clip_paths)], options_of(model))
            engine.send(number + 1, flying)
    engine.stop()
    return Mixed(solo_s, long_alone_s, [job.latency_s for job in done], long_job.latency_s)


def through_daemon(home: str, model: str, threads: int, long_paths: Sequence[str], clip_paths: Sequence[str]) -> Mixed:
    """From the drop into the inbox until the job is done: quiet period, ledger and outbox included. Every file has its own content."""
    house = House(f"{home}/houses", model, threads=threads)
    daemon = Daemon(house)
    supply = iter(clip_paths)

    def alone(path: str) -> float:
        began = time.monotonic()
        house.drop([path])
        return daemon.wait_ended(path) - began

    try:
        daemon.wait_idle()
        alone(next(supply))
        solo_s = [alone(next(supply)) for _ in range(SOLO_CLIPS)]
        long_alone_s = alone(long_paths[0])
        began = time.monotonic()
        house.drop([long_paths[1]])
        beside_s: list[float] = []
        for path in supply:
            latency_s = alone(path)
            if daemon.has_ended(long_paths[1]):
                break
            beside_s.append(latency_s)
        long_beside_s = daemon.wait_ended(long_paths[1]) - began
        daemon.stop()
    finally:
        daemon.close()
        house.close()
    return Mixed(solo_s, long_alone_s, beside_s, long_beside_s)


def first_in_first_out(model: str, threads: int, long_path: str, clip_path: str) -> tuple[float, float]:
    """A faster-whisper loop over the long recording and a clip: seconds of each."""
    said = run_tree(
        [sys.executable, "-m", "bench.peers.faster_whisper_loop", "--no-previous-text", model, str(threads), long_path, clip_path]
    ).said
    long_s, both_s = said["about"]["ended_s"]
    return long_s - said["load_wall_s"], both_s - long_s


def main() -> int:
    parser = measure.arguments("fair_slots", __doc__, runs=1)
    parser.add_argument("--long-s", type=float, default=1200.0, help="length of the long recording")
    parser.add_argument("--daemon", action="store_true", help="drop into the inbox of a daemon instead of driving the engine alone")
    parser.add_argument("--no-peer", action="store_true", help="leave the first-in-first-out peer out")
    args = parser.parse_args()
    model = model_of(args.size, args.home)
    long_paths = [clips.long(args.home, args.long_s, turn=turn) for turn in (0, 1)]
    clip_paths = clips.equal(args.home, CLIPS_MAX)
    where = "the daemon" if args.daemon else "the engine"
    report = Report("fair_slots", f"ten-second clips beside a recording of {args.long_s:g} s through {where}, {args.size}")
    found = []
    for _ in range(args.runs):
        if args.daemon:
            found.append(through_daemon(args.home, model, args.threads, long_paths, clip_paths))
        else:
            found.append(through_engine(model, args.threads, long_paths[0], clip_paths))
    pooled = Mixed(
        [latency_s for mixed in found for latency_s in mixed.solo_s],
        sum(mixed.long_alone_s for mixed in found),
        [latency_s for mixed in found for latency_s in mixed.beside_s],
        sum(mixed.long_beside_s for mixed in found),
    )
    report.bars = pooled.bars
    report.details = {"runs": [mixed._asdict() for mixed in found]}
    if not args.no_peer:
        long_s, clip_s = first_in_first_out(model, args.threads, long_paths[0], clip_paths[0])
        fifo = round((0.95 * long_s + clip_s) / clip_s, 1)
        report.bars.append(Bar("peer, first in first out: p95 latency of a clip / alone", fifo, None))
        report.details["fifo"] = {"long_s": round(long_s, 2), "clip_s": round(clip_s, 2)}
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
