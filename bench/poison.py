"""poison: what files that kill their engine cost the others: a thousand good ones, without and with a hundred that kill, side by side.

The dispatcher runs in a process of its own with scripted engines (tests/tools/scripted_engine.py), whose batches take as long as real
ones, so that throughput means something. Each poisoned file must be failed after exactly three deaths, its error naming the signal and
the stage; every good one must be done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from loguru import logger

from bench import measure
from bench.measure import Bar, Cost, Failed, Report, median, run_tree
from tests.floor import TRUE, Floor, environment, plan

LOSS_LIMIT_PERCENT = 10.0
DEATHS = 3
BATCH = 4


def one_run(args: argparse.Namespace) -> dict[str, float]:
    """All of them through so many engines: wall time from their arrival to the last end. Raises Failed."""
    workers, count = args.workers[0], args.good + args.poisoned
    with tempfile.TemporaryDirectory() as place:
        home = Path(place)
        os.environ.update(environment(home, window_s=args.window_s, load_s=args.load_s))
        usual_s = args.good * args.length_s / 30 / BATCH * args.window_s / workers
        life = Floor(home, pace=TRUE, patience_s=120 + 10 * usual_s, engine={"batch": BATCH})
        try:
            life.want(plan(workers, batch=BATCH))
            life.until(lambda: life.serve(workers), "all serve")
            _drop(life, args)
            began = time.monotonic()
            life.until(lambda: _ended(life) == count, "all have ended", every_s=0.1)
            wall_s = time.monotonic() - began
            _judge(life, args.good, args.poisoned)
            return {"wall_s": round(wall_s, 3), "engines": len(life.loads())}
        finally:
            life.end()


def _drop(life: Floor, args: argparse.Namespace) -> None:
    """The poisoned ones evenly among the good ones, and of the same size: who is next follows from it."""
    every = args.good // args.poisoned if args.poisoned else 0
    for number in range(args.good):
        life.drop(f"good {number:04}", length_s=args.length_s, poison=0)
        if every and number % every == every // 2:
            life.drop(f"poison {number:04}", length_s=args.length_s, poison=1)


def _ended(life: Floor) -> int:
    counts = life.ledger.counts()
    return int(counts["done"] + counts["failed"])


def _judge(life: Floor, good: int, poisoned: int) -> None:
    """Raises Failed."""
    rows = life.rows()
    done = [row for name, row in rows.items() if name.startswith("good") and row["state"] == "done"]
    if len(done) != good:
        raise Failed(f"{len(done)} of {good} good files are done")
    for name, row in rows.items():
        if name.startswith("poison"):
            verbs = life.verbs(name)
            deaths = verbs.count("release") + verbs.count("fail")
            said = row["failure_what"] or ""
            if row["state"] != "failed" or deaths != DEATHS or "SIGSEGV" not in said or "while it worked on this file" not in said:
                raise Failed(f"{name} is {row['state']} after {deaths} deaths: {said}")
    if sum(name.startswith("poison") for name in rows) != poisoned:
        raise Failed("not every poisoned file was seen")


def in_a_process(args: list[str]) -> Cost:
    """This script itself, for one run."""
    cost = run_tree([sys.executable, "-m", "bench.poison", *args, "--one"])
    return Cost(cost.cpu_s, float(cost.said["wall_s"]), cost.peak_mib, cost.said)


def main() -> int:
    parser = measure.arguments("poison", __doc__, runs=1)
    parser.add_argument("--good", type=int, default=1000)
    parser.add_argument("--poisoned", type=int, default=100)
    parser.add_argument("--workers", type=int, action="append", help="engines; may be given more than once (1 and 3 when absent)")
    parser.add_argument("--window-s", type=float, default=0.04, help="how long a batch of four windows takes")
    parser.add_argument("--length-s", type=float, default=600.0, help="of every recording")
    parser.add_argument("--load-s", type=float, default=0.0, help="what a start takes beyond that of the process, which is about 0.1 s")
    parser.add_argument("--one", action="store_true", help="one run, as JSON")
    args = parser.parse_args()
    logger.remove()
    if args.one:
        print(json.dumps(one_run(args)))
        return 0
    report = Report("poison", f"{args.good} good files without and with {args.poisoned} that kill their engine")
    for workers in args.workers or (1, 3):
        common = ["--good", str(args.good), "--workers", str(workers), "--window-s", str(args.window_s)]
        common += ["--length-s", str(args.length_s), "--load-s", str(args.load_s)]
        runs = measure.alternated(
            {
                f"{workers} engines, good alone": lambda common=common: in_a_process([*common, "--poisoned", "0"]),
                f"{workers} engines, with poison": lambda common=common: in_a_process([*common, "--poisoned", str(args.poisoned)]),
            },
            args.runs,
        )
        report.runs |= runs
        alone_s, together_s = (median(costs, lambda cost: cost.wall_s) for costs in runs.values())
        loss = 100 * (1 - alone_s / together_s)
        report.bars.append(Bar(f"throughput lost, {workers} engines", round(loss, 2), LOSS_LIMIT_PERCENT, "%"))
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
