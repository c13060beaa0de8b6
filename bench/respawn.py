"""respawn: the life of an engine: how soon it is ready against a bare load of its model, and 200 deaths without a hang.

Ready: from the start of the process until it takes work, against the time of CTranslate2's constructor alone. Deaths: SIGKILL at a
random moment (booting, idle, in the middle of a file), then a new one, which must become ready; every tenth must transcribe a clip.
"""

from __future__ import annotations

import random
import statistics
import sys
import time

from bench import clips, measure
from bench.engine import Engine, Job, demo_directory, model_of, options_of
from bench.measure import Bar, Report, run_tree

READY_OVER_LOAD_LIMIT_S = 0.25
BARE_LOAD = """
import json, sys, time
import ctranslate2
began = time.monotonic()
ctranslate2.models.Whisper(sys.argv[1], device="cpu", compute_type="int8", intra_threads=int(sys.argv[2]))
print(json.dumps({"load_s": time.monotonic() - began}))
"""


def deaths(model: str, threads: int, count: int, path: str) -> tuple[int, float]:
    """Kill that many engines at random moments; how many, none of whose successors hung, and the slowest to be ready. Raises Failed."""
    chance = random.Random(0)
    slowest_s = 0.0
    for number in range(count):
        engine = Engine(model, threads=threads, wait=number % 3 != 0)
        if number % 3 == 0:  # while it boots
            time.sleep(chance.uniform(0.0, 0.4))
        else:
            slowest_s = max(slowest_s, engine.ready_s)
            engine.send(0, Job(path, options_of(model)))
            time.sleep(chance.uniform(0.0, 0.15))
        engine.kill()
        if number % 10 == 9:
            survivor = Engine(model, threads=threads)
            survivor.work([Job(path, options_of(model))])
            survivor.stop()
    return count, slowest_s


def main() -> int:
    parser = measure.arguments("respawn", __doc__, runs=5)
    parser.add_argument("--deaths", type=int, default=200)
    args = parser.parse_args()
    model = model_of(args.size, args.home)
    directory = demo_directory() if model == "demo" else model
    ready_s, load_s = [], []
    for _ in range(args.runs + 1):
        load_s.append(float(run_tree([sys.executable, "-c", BARE_LOAD, directory, str(args.threads)]).said["load_s"]))
        engine = Engine(model, threads=args.threads)
        ready_s.append(engine.ready_s)
        engine.stop()
    over_s = statistics.median(ready_s[1:]) - statistics.median(load_s[1:])  # the first of each finds the disk's cache cold
    count, slowest_s = deaths("demo", args.threads, args.deaths, clips.equal(args.home, 200)[0])
    report = Report("respawn", f"engines started ({args.size}) and killed (demo)")
    report.bars = [
        Bar("ready over the bare load", round(over_s, 3), READY_OVER_LOAD_LIMIT_S, "s"),
        Bar("  ready, median", round(statistics.median(ready_s[1:]), 3), None, "s"),
        Bar("  bare load, median", round(statistics.median(load_s[1:]), 3), None, "s"),
        Bar("deaths without a hang", count, args.deaths, "", at_most=False),
        Bar("  slowest successor ready", round(slowest_s, 3), None, "s"),
    ]
    report.details = {"ready_s": ready_s, "load_s": load_s}
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
