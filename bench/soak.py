"""soak: a pool that is re-sized hundreds of times while jobs run, and what is left of it: processes, descriptors, threads, memory.

The dispatcher runs in this process with scripted engines (tests/tools/scripted_engine.py); a seeded sequence turns workers, batch and
model. Counted twice with every engine gone and every job done: after a warm-up, and at the end.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from loguru import logger

from bench import measure
from bench.measure import Bar, Report
from tests.floor import Floor, environment, plan
from whisperd.dispatcher import machine
from whisperd.dispatcher.optimiser.values import CardPlan

MODELS = ("tiny", "base")
BATCHES = (1, 2, 4, 8)
WORKERS_MAX = 3
OPEN_JOBS = 6
WARM_UP = 50
RSS_LIMIT_PERCENT = 2.0
RECORDING_S = 600


class Held(NamedTuple):
    """What this process holds of the machine."""

    children: int
    descriptors: int
    threads: int
    shared_memory: frozenset[str]  # as it is mapped
    rss_kib: int


class Soaked(NamedTuple):
    """Before and after, and what was done between."""

    warm: Held
    end: Held
    resizes: int
    starts: int
    jobs: int
    wall_s: float

    @property
    def rss_growth_percent(self) -> float:
        return 100.0 * (self.end.rss_kib - self.warm.rss_kib) / self.warm.rss_kib


def held() -> Held:
    gc.collect()
    children: list[str] = []
    for task in os.listdir("/proc/self/task"):
        children += Path(f"/proc/self/task/{task}/children").read_text(encoding="ascii").split()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return Held(
        children=len(children),
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=int(status["Threads"]),
        shared_memory=_mapped(),
        rss_kib=int(status["VmRSS"].split()[0]),
    )


def _mapped() -> frozenset[str]:
    """Shared memory in this process's map. What lies in /dev/shm may be any program's."""
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return frozenset(line.split(None, 5)[5] for line in maps if "/dev/shm/" in line or "/memfd:" in line)


def sizes(seed: int) -> Iterator[CardPlan]:
    """One plan after the other, each with one knob turned: workers most often, then the batch, then the model."""
    chance = random.Random(seed)
    now = plan(1)
    while True:
        knob = chance.choices(("workers", "batch", "model"), (5, 4, 1))[0]
        workers = chance.choice([one for one in range(1, WORKERS_MAX + 1) if one != now.workers]) if knob == "workers" else now.workers
        batch = chance.choice([one for one in BATCHES if one != now.batch]) if knob == "batch" else now.batch
        model = MODELS[1 - MODELS.index(now.model)] if knob == "model" else now.model
        now = plan(workers, batch=batch, model=model)
        yield now


class Jobs:
    """Recordings of either model, so that some are always open."""

    def __init__(self, life: Floor) -> None:
        self._life = life
        self.dropped = 0

    def open(self) -> int:
        return self.dropped - int(self._life.ledger.counts()["done"])

    def refill(self) -> None:
        while self.open() < OPEN_JOBS:
            self._life.drop(f"{self.dropped}", inbox=MODELS[self.dropped % 2], length_s=RECORDING_S)
            self.dropped += 1


def soak(home: Path, resizes: int, *, seed: int = 1, warm_up: int = WARM_UP) -> Soaked:
    """So many resizes after the warm-up. The environment of the scripted engines must be set."""
    inboxes = [{"path": str(home / model), "outbox": str(home / f"out {model}"), "model": model} for model in MODELS]
    life = Floor(home, inboxes=inboxes, patience_s=120.0)
    try:
        jobs, wanted = Jobs(life), sizes(seed)
        _resize(life, jobs, wanted, warm_up)
        warm, began = _at_rest(life, jobs), time.monotonic()
        starts = _started(life)
        _resize(life, jobs, wanted, resizes)
        wall_s = time.monotonic() - began
        end = _at_rest(life, jobs)
        return Soaked(warm, end, resizes, _started(life) - starts, jobs.dropped, wall_s)
    finally:
        life.end()


def _started(life: Floor) -> int:
    return len(life.loads())


def _resize(life: Floor, jobs: Jobs, wanted: Iterator[CardPlan], count: int) -> None:
    for _ in range(count):
        jobs.refill()
        now = next(wanted)
        life.want(now)
        life.until(_follows(life, now), f"it is as {now}", every_s=0.005)


def _follows(life: Floor, wanted: CardPlan) -> Callable[[], bool]:
    """Whether what serves is what is wanted, the batch included."""

    def there() -> bool:
        engines = [engine for engine in life.dispatcher.pool.engines.values() if not engine.quarantine]
        return len(engines) == wanted.workers and all(
            engine.serves and engine.request.model == wanted.model and engine.slots == 2 * wanted.batch for engine in engines
        )

    return there


def _at_rest(life: Floor, jobs: Jobs) -> Held:
    """Every job done, every engine gone."""
    life.want(*(plan(1, batch=8, model=model) for model in MODELS))
    life.until(lambda: jobs.open() == 0, "all jobs are done", every_s=0.05)
    life.want(*(plan(0, model=model) for model in MODELS))
    life.until(lambda: not life.dispatcher.pool.engines, "all engines are gone")
    return held()


def main() -> int:
    parser = measure.arguments("soak", __doc__)
    parser.add_argument("--resizes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    logger.remove()
    machine.cores = lambda: 8  # the plan is this script's, not the machine's
    with tempfile.TemporaryDirectory() as place:
        os.environ.update(environment(Path(place), window_s=0.01))
        found = soak(Path(place), args.resizes, seed=args.seed)
    report = Report("soak", f"{found.resizes} resizes with scripted engines, {found.starts} engines started, {found.jobs} jobs")
    new_memory = found.end.shared_memory - found.warm.shared_memory
    report.bars = [
        Bar("processes left over", found.end.children - found.warm.children, 0, ""),
        Bar("descriptors left over", found.end.descriptors - found.warm.descriptors, 0, ""),
        Bar("threads left over", found.end.threads - found.warm.threads, 0, ""),
        Bar("shared memory left over", len(new_memory), 0, ""),
        Bar("growth of the resident memory", round(found.rss_growth_percent, 2), RSS_LIMIT_PERCENT, "%"),
        Bar("  resident memory at the end", round(found.end.rss_kib / 1024, 1), None, "MiB"),
        Bar("  a resize", round(found.wall_s / found.resizes, 3), None, "s"),
    ]
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
