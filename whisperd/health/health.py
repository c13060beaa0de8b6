"""health: every periodic job of the daemon, in one list, run by APScheduler.

Owns: when. What is done is handed in as `Acts`, each of which runs on the daemon's own loop, so nothing here touches the ledger
from two threads. A job that raises stops the daemon loudly: systemd is the last healer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from apscheduler.events import EVENT_JOB_ERROR, JobExecutionEvent
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler
from loguru import logger

from whisperd.config import Settings
from whisperd.health.checks import Observation, judge
from whisperd.health.heals import CoolDown

Act = Callable[[], None]

RESCAN_S = 3600.0  # watchers list their inboxes by themselves every watcher.rescan_s, or more rarely where that is dear
OPTIMISE_S = 2.0  # guards look this often; plans are made every dispatcher.interval_s


@dataclass(frozen=True)
class Acts:
    """What the daemon hands to health. All run on the daemon's loop except `backup`, which has a connection of its own."""

    post: Callable[[Act], None]  # run this on the daemon's loop
    tick: Act
    beat: Act
    optimise: Act
    rescan: Act
    observe: Callable[[], Observation]
    verdicts: Callable[[dict[str, str | None]], None]  # store and tell
    heals: dict[str, Act]
    checkpoint: Act
    retention: Act
    backup: Act
    fatal: Callable[[BaseException], None]


@dataclass(frozen=True)
class Periodic:
    """One line of the list."""

    name: str
    every_s: float
    act: Act


class Health:
    """The scheduler and the judge."""

    def __init__(self, settings: Settings, acts: Acts) -> None:
        self._acts = acts
        self._cool_down = CoolDown()
        self._settings = settings
        self._scheduler = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(4)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
        )
        self._scheduler.add_listener(self._job_raised, EVENT_JOB_ERROR)

    def jobs(self) -> list[Periodic]:
        """Every periodic job there is."""
        limits, acts = self._settings.health, self._acts
        return [
            Periodic("tick", 1.0, lambda: acts.post(acts.tick)),
            Periodic("beat", 2.0, lambda: acts.post(acts.beat)),
            Periodic("optimise", OPTIMISE_S, lambda: acts.post(acts.optimise)),
            Periodic("judge", limits.judge_s, lambda: acts.post(self.judge)),
            Periodic("rescan", RESCAN_S, lambda: acts.post(acts.rescan)),
            Periodic("checkpoint", limits.checkpoint_s, lambda: acts.post(acts.checkpoint)),
            Periodic("retention", 6 * 3600.0, lambda: acts.post(acts.retention)),
            Periodic("backup", limits.backup_s, acts.backup),
        ]

    def start(self) -> None:
        for job in self.jobs():
            self._scheduler.add_job(job.act, "interval", seconds=job.every_s, id=job.name, name=job.name)
        self._scheduler.start()

    def apply(self, settings: Settings) -> None:
        """New intervals and thresholds."""
        self._settings = settings
        for job in self.jobs():
            self._scheduler.reschedule_job(job.name, trigger="interval", seconds=job.every_s)

    def stop(self) -> None:
        self._scheduler.shutdown(wait=False)

    def judge(self) -> None:
        """One round of all checks (on the daemon's loop)."""
        verdicts = judge(self._acts.observe(), self._settings.health)
        self._acts.verdicts(verdicts)
        for name, heal in self._acts.heals.items():
            if self._cool_down.due(name, faulty=verdicts.get(name) is not None, now=time.monotonic()):
                logger.bind(event="heal").info(f"healing {name}: {verdicts[name]}")
                heal()

    def _job_raised(self, event: JobExecutionEvent) -> None:
        self._acts.post(lambda: self._acts.fatal(event.exception))


def disk_free_mib(path: str) -> int | None:
    """Free space for an unprivileged process."""
    try:
        room = os.statvfs(path)
    except OSError:  # unknown is not judged
        return None
    return room.f_bavail * room.f_frsize >> 20


def memory_used_percent() -> float | None:
    """Share of the machine's memory that is not available any more."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            figures = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 100.0 * (1 - figures["MemAvailable"] / figures["MemTotal"])
    except (OSError, KeyError, ValueError):  # hidden by a sandbox
        return None
