"""recovery: how soon work goes on after a death: of an engine at random moments, of the daemon itself.

Engines: SIGKILL at a random moment while they work; until every job that was in its hands is in another engine's, with its source. Nothing
may have been waited for: at that time every lease lies far in the future. Daemon: SIGKILL with jobs running; from the start of the next
life until READY, which must not wait for a model; then all jobs are done.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from loguru import logger

from bench import clips, measure
from bench.engine import model_of
from bench.house import Daemon, House
from bench.measure import Bar, Failed, Report, percentile
from tests.floor import TRUE, Floor, plan
from whisperd.dispatcher.engines import Engine
from whisperd.dispatcher.retry import INTERRUPTIONS_MAX

ENGINE_LIMIT_S, READY_LIMIT_S = 1.0, 2.0
OPEN_JOBS = 6  # fewer than one engine has slots, so that none waits for room
LEASE_LEFT_S = 60.0


class Shop:
    """A dispatcher in this process with real engines that always have work."""

    def __init__(self, home: Path, model: str, workers: int, recordings: list[str]) -> None:
        self.life = Floor(
            home,
            engine_module="whisperd.engine",
            pace=TRUE,
            engine={"model": model, "device": "cpu", "compute_type": "int8", "batch": 4, "offline": True},
            dispatcher={"workers": workers},
        )
        self._inbox, self._aside = home / "inbox", home / "aside"
        self._aside.mkdir()
        self._recordings = recordings
        self._dropped = 0

    def refill(self) -> None:
        counts = self.life.ledger.counts()
        for _ in range(max(0, OPEN_JOBS - self._dropped + counts["done"] + counts["failed"])):
            source = self._recordings[self._dropped % len(self._recordings)]
            aside = self._aside / f"{self._dropped:05}{Path(source).suffix}"
            aside.write_bytes(Path(source).read_bytes() + b"\0" * (self._dropped // len(self._recordings)))  # no two alike
            aside.rename(self._inbox / aside.name)
            self._dropped += 1

    def victims(self) -> list[Engine]:
        """Engines that work with a source. Nobody dies whose job has been interrupted many times without a window in between: from the
        twentieth on the daemon holds the recording to blame, and what is measured here is chance alone."""
        self.refill()
        return [engine for engine in self.life.engines() if self._sent(engine) and not any(map(self._harried, self._sent(engine)))]

    def _sent(self, engine: Engine) -> set[int]:
        return {job for job, task in engine.tasks.items() if task.sent}

    def _harried(self, job: int) -> bool:
        return bool(self.life.ledger.job(job)["interruptions"] >= INTERRUPTIONS_MAX // 2)

    def kill_one(self, chance: random.Random) -> float:
        """SIGKILL to one that works, at a random moment; seconds until all of its jobs run again. Raises Failed."""
        life = self.life
        life.until(self.victims, "an engine works", every_s=0.005)
        life.live(chance.uniform(0.0, 0.5))
        life.until(self.victims, "an engine works", every_s=0.005)
        victim = chance.choice(self.victims())
        mine = self._sent(victim)
        leases = [life.ledger.job(job)["lease_until"] for job in mine]
        if min(leases) - time.time() < LEASE_LEFT_S:
            raise Failed("a lease was about to end: what follows might be a rescue by time")
        os.kill(victim.child.pid, signal.SIGKILL)
        began = time.monotonic()
        life.until(lambda: all(self._runs_again(job, victim.child.name) for job in mine), "its jobs run again", every_s=0.002)
        return time.monotonic() - began

    def _runs_again(self, job: int, dead: str) -> bool:
        """Whether it is in another engine's hands and the ledger says so (or was done already: its last frame was on the way)."""
        row, engine = self.life.ledger.job(job), self.life.dispatcher.pool.of_job(job)
        sent = engine is not None and engine.child.name != dead and engine.tasks[job].sent
        return row["state"] == "done" or (sent and row["state"] == "running" and row["lease_child"] != dead)


def engine_deaths(model: str, workers: int, count: int, recordings: list[str]) -> list[float]:
    """Seconds from each death until work goes on."""
    chance = random.Random(workers)
    with tempfile.TemporaryDirectory() as place:
        shop = Shop(Path(place), model, workers, recordings)
        try:
            shop.life.want(plan(workers, model=model))
            shop.life.until(lambda: shop.life.serve(workers), "all serve")
            return [shop.kill_one(chance) for _ in range(count)]
        finally:
            shop.life.end()


def daemon_deaths(home: str, model: str, count: int, recordings: list[str]) -> list[float]:
    """Seconds from each start of the next life until READY, all with work left over from the one before. Raises Failed."""
    house, chance, ready_s = House(home, model), random.Random(0), []
    house.drop(recordings)
    try:
        daemon = Daemon(house)
        for _ in range(count):
            time.sleep(chance.uniform(0.2, 1.0))
            kill_all(daemon)
            os.unlink(os.path.join(house.place, "notify"))
            began = time.monotonic()
            daemon = Daemon(house)
            ready_s.append(time.monotonic() - began)
        daemon.wait_done(len(recordings))
        daemon.stop()
        house.assert_all_done(len(recordings))
    finally:
        daemon.close()
        house.close()
    return ready_s


def kill_all(daemon: Daemon) -> None:
    """As the end of a cgroup: the daemon first, so that nobody says anything to the ledger any more."""
    below = measure.descendants(daemon.process.pid)[1:]
    daemon.close()
    for pid in below:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it heard its wire close
            pass


def main() -> int:
    parser = measure.arguments("recovery", __doc__, size="demo")
    parser.add_argument("--deaths", type=int, default=200, help="of engines, half of them with one engine and half with two")
    parser.add_argument("--lives", type=int, default=50, help="of the daemon")
    args = parser.parse_args()
    logger.remove()
    model, recordings = model_of(args.size, args.home), [clips.long(args.home, 900.0, turn=turn) for turn in range(4)]
    report = Report("recovery", f"deaths of engines and of the daemon, {args.size}")
    for workers in (1, 2):
        found = engine_deaths(model, workers, args.deaths // 2, recordings)
        report.details[f"engines_{workers}_s"] = [round(one, 4) for one in found]
        report.bars += [
            Bar(f"an engine of {workers} dies until its job runs again, p99", round(percentile(found, 0.99), 3), ENGINE_LIMIT_S, "s"),
            Bar("  p50", round(percentile(found, 0.5), 3), None, "s"),
        ]
    ready_s = daemon_deaths(f"{args.home}/houses", model, max(1, args.lives), recordings)
    report.details["ready_s"] = [round(one, 4) for one in ready_s]
    report.bars += [
        Bar("the daemon is killed: the next one READY, p99", round(percentile(ready_s, 0.99), 3), READY_LIMIT_S, "s"),
        Bar("  p50", round(percentile(ready_s, 0.5), 3), None, "s"),
    ]
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
