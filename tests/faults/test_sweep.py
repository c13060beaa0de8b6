"""Every I/O system call from discovery to *done*, each met by every fault: nothing lost, nothing torn, nothing twice, no bare traceback.

The corridor runs in one process under `strace -e inject` (corridor.py has the order of its steps, passages.py that of the stretches beside
it: examined, copied, published again, failed, put away, told; sweeper.py has the judgement of one point).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest
from sweeper import CORRIDOR
from zygote import ERRORS, KILL

WORKERS = 6  # on two cores: some points wait ten seconds for a lock that SQLite could not give back
POINTS_MIN = 1500
FAULTS = (KILL, *ERRORS)
HERE = Path(__file__).parent

EVERY = os.environ.get("WHISPERD_TEST_SWEEP") == "all"
"""Every fault at every call takes many minutes; else each call of the corridor meets SIGKILL and one of the errors in turn, and every
third one of the other stretches one fault."""

Point = tuple[str, str, int, str]
"""Stretch, call, which one of that name, fault."""


class Worker:
    """One sweeper process, asked point by point."""

    def __init__(self, scratch: Path) -> None:
        scratch.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "sweeper.py"), str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.calls = [tuple(call) for call in self._read()]

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the sweeper ended with {self.process.wait()}"
        return json.loads(line)

    def judge(self, point: Point) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(point) + "\n")
        self.process.stdin.flush()
        return dict(self._read())

    def stop(self) -> None:
        """What it began ends with it: it takes no orders any more."""
        self.process.communicate(timeout=30)


@pytest.mark.timeout(900)
@pytest.mark.skipif(os.geteuid() != 0, reason="strace attaches to a forked process: that takes root")
def test_every_call_times_every_fault(memory: Path) -> None:
    """Each I/O call of the corridor and its side stretches meets SIGKILL and some of EIO, ENOSPC, EDQUOT, EROFS, ESTALE and EINTR (with
    WHISPERD_TEST_SWEEP=all: all of them), one at a time; all points are reached.

    After each: no transcript is torn, none that was acknowledged is missing, the ledger is whole and its history legal, the process was
    killed, went on, or ended with an error of ours, and the source is whole at one place, unless it is to be deleted and its transcript
    stands. After a recovery: every file finished and published once, nothing left over, no error file of what was mended; the source
    untouched, or archived once with its profile, or deleted; each event told under one delivery id. A call that may be interrupted and is
    never shows.
    """
    assert shutil.which("strace"), "strace is not installed: ./scripts/debian-packages strace"
    began = time.monotonic()
    workers = [Worker(memory / str(number)) for number in range(WORKERS)]
    try:
        calls = workers[0].calls
        assert all([call[:3] for call in worker.calls] == [call[:3] for call in calls] for worker in workers), "walks differ"
        points: list[Point] = [
            (stretch, name, when, fault)
            for number, (stretch, name, when, _) in enumerate(calls)
            for fault in (FAULTS if EVERY else _some(number, stretch))
        ]
        verdicts = dict(zip(points, _judged(workers, points), strict=True))
    finally:
        for worker in workers:
            worker.stop()
    shown = {tuple(call[:3]): f"{call[0]}: {call[3]}" for call in calls}
    wrong = [f"{point[3]} at {shown[point[:3]]}\n    {fact}" for point, said in verdicts.items() for fact in said["wrong"]]
    print(f"{len(points)} points at {len(calls)} calls, each reached, in {time.monotonic() - began:.0f} s")
    print("ended with: ", Counter(said["named"] or ("killed" if said["killed"] else "it went on") for said in verdicts.values()))
    assert not wrong, f"{len(wrong)} faults of {len(points)} points:\n" + "\n".join(wrong[:40])
    assert len(points) >= POINTS_MIN


def _some(number: int, stretch: str) -> tuple[str, ...]:
    """The faults of the call of that number: neighbours meet different ones."""
    if stretch == CORRIDOR:
        return (KILL, ERRORS[number % len(ERRORS)])
    return (FAULTS[number // 3 % len(FAULTS)],) if number % 3 == 0 else ()


def _judged(workers: list[Worker], points: list[Point]) -> Iterator[dict[str, Any]]:
    """The verdicts in the order of the points; whichever worker is free takes the next one."""
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def judge(point: Point) -> dict[str, Any]:
        worker = free.get()
        try:
            return worker.judge(point)
        finally:
            free.put(worker)

    with ThreadPoolExecutor(len(workers)) as threads:
        for number, said in enumerate(threads.map(judge, points)):
            if number % 500 == 0:
                print(f"point {number}/{len(points)}", flush=True)
            yield said
