"""hung_share: what a share that hangs costs the others: files of a local inbox, alone and beside an inbox on a share that stops answering.

A real FUSE file system (sshfs on a local sftp server, tests/tools/share.py) with files of a higher class, whose server is stopped as soon
as the first of them is worked on. The dispatcher runs in a process of its own with scripted engines, whose batches take as long as real
ones. Throughput is what the engines finished of both inboxes until the last local file was done: copies made before the hang are work, too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from loguru import logger

from bench import measure
from bench.measure import Bar, Cost, Failed, Report, median, run_tree
from tests.floor import TRUE, Floor, environment, plan
from tests.tools.share import Share, missing

KEPT_LEAST_PERCENT = 95.0
BATCH = 4


def one_run(args: argparse.Namespace) -> dict[str, float]:
    """All local files: files of both inboxes done for each second from the arrival of the local ones. Raises Failed."""
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ.update(environment(home, window_s=args.window_s))
        share = stack.enter_context(Share(home / "served", home / "share")) if args.far else None
        inboxes = [{}, *([{"path": str(home / "share" / "inbox"), "outbox": str(home / "far"), "priority": "urgent"}] if share else [])]
        usual_s = args.near * args.length_s / 30 / BATCH * args.window_s
        life = Floor(home, pace=TRUE, patience_s=120 + 10 * usual_s, inboxes=inboxes, engine={"batch": BATCH})
        stack.callback(life.end)
        if share is not None:
            stack.callback(share.close)  # first, or the end would wait for who hangs on it
        life.want(plan(1, batch=BATCH))
        life.until(lambda: life.serve(1), "the engine serves")
        if share is not None:
            for number in range(args.far):
                life.drop(f"far {number:04}", inbox="served/inbox", length_s=args.length_s)
            life.until(life.in_hand, "the share is worked on")
        for number in range(args.near):
            life.drop(f"near {number:04}", length_s=args.length_s)
        if share is not None:
            share.hang()
        began = time.monotonic()
        life.until(lambda: _done(life, "near") == args.near, "all local files are done", every_s=0.1)
        wall_s = time.monotonic() - began
        far = _done(life, "far")
        if share is not None and (far == args.far or not any(row["state"] == "down" for row in life.ledger.inboxes())):
            raise Failed("the share did not hang")
        return {"wall_s": round(wall_s, 3), "far": far, "files_per_s": round((args.near + far) / wall_s, 4)}


def _done(life: Floor, which: str) -> int:
    return sum(row["path"].startswith(which.encode()) for row in life.ledger.jobs(state="done"))


def in_a_process(args: list[str]) -> Cost:
    """This script itself, for one run."""
    cost = run_tree([sys.executable, "-m", "bench.hung_share", *args, "--one"])
    return Cost(cost.cpu_s, float(cost.said["wall_s"]), cost.peak_mib, cost.said)


def main() -> int:
    parser = measure.arguments("hung_share", __doc__, runs=3)
    parser.add_argument("--near", type=int, default=200, help="files of the local inbox")
    parser.add_argument("--far", type=int, default=100, help="files on the share; 0: no share")
    parser.add_argument("--window-s", type=float, default=0.04, help="how long a batch of four windows takes")
    parser.add_argument("--length-s", type=float, default=600.0, help="of every recording")
    parser.add_argument("--one", action="store_true", help="one run, as JSON")
    args = parser.parse_args()
    logger.remove()
    if args.one:
        print(json.dumps(one_run(args)))
        return 0
    if why := missing():
        raise Failed(why)
    same = ["--near", str(args.near), "--window-s", str(args.window_s), "--length-s", str(args.length_s)]
    report = Report("hung_share", f"{args.near} local files alone and beside an inbox of {args.far} on a share that hangs")
    report.runs = measure.alternated(
        {
            "the local inbox alone": lambda: in_a_process([*same, "--far", "0"]),
            "beside a share that hangs": lambda: in_a_process([*same, "--far", str(args.far)]),
        },
        args.runs,
    )
    alone, beside = (median(costs, lambda cost: cost.said["files_per_s"]) for costs in report.runs.values())
    report.details = {name: [cost.said for cost in costs] for name, costs in report.runs.items()}
    kept = round(100 * beside / alone, 2)
    report.bars.append(Bar("throughput kept beside a share that hangs", kept, KEPT_LEAST_PERCENT, "%", at_most=False))
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
