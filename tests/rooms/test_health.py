"""Health with the real scheduler: every periodic job runs, what it finds is told once, and a job that raises is not survived."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from whisperd.config import HealthSettings, InboxSettings, Settings, WatcherSettings
from whisperd.health.checks import Observation
from whisperd.health.health import Acts, Health, disk_free_mib, memory_used_percent


class Loop:
    """The daemon's loop, as health sees it: acts are queued by other threads and run here, in one thread."""

    def __init__(self) -> None:
        self.posted: queue.Queue[Callable[[], None]] = queue.Queue()
        self.done: list[str] = []
        self.verdicts: list[dict[str, str | None]] = []
        self.seen = Observation(disk_free_mib=10_000)
        self.fatal: list[BaseException] = []
        self.threads: set[int] = set()

    def acts(self) -> Acts:
        def act(name: str) -> Callable[[], None]:
            def note() -> None:
                self.done.append(name)
                self.threads.add(threading.get_ident())

            return note

        return Acts(
            post=self.posted.put,
            tick=act("tick"),
            beat=act("beat"),
            optimise=act("optimise"),
            rescan=act("rescan"),
            observe=lambda: self.seen,
            verdicts=self.verdicts.append,
            heals={"inbox": act("heal inbox")},
            checkpoint=act("checkpoint"),
            retention=act("retention"),
            backup=act("backup"),
            fatal=self.fatal.append,
        )

    def run_until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.posted.get(timeout=30)()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(
        state_dir=str(tmp_path / "state"),
        inbox=(InboxSettings(path=str(tmp_path / "inbox")),),
        health=HealthSettings(judge_s=1),
        watcher=WatcherSettings(rescan_s=1),
    )


def test_one_list_holds_every_periodic_job(settings: Settings) -> None:
    """The list is complete, each job once, each with a sane interval; what is not in it does not happen periodically."""
    names = [job.name for job in Health(settings, Loop().acts()).jobs()]
    assert names == ["tick", "beat", "optimise", "judge", "rescan", "checkpoint", "retention", "backup"]


def test_jobs_run_on_the_daemons_loop(settings: Settings) -> None:
    """The scheduler's threads only enqueue: what touches the rooms runs in the loop's own thread."""
    loop = Loop()
    health = Health(settings, loop.acts())
    health.start()
    try:
        loop.run_until(lambda: {"tick", "beat", "optimise"} <= set(loop.done) and bool(loop.verdicts))
    finally:
        health.stop()
    assert loop.threads == {threading.get_ident()}


def test_a_fault_is_judged_and_healed_once(settings: Settings) -> None:
    """A check that flips is told with a sentence, and its heal is called once, not at every look."""
    loop = Loop()
    health = Health(settings, loop.acts())
    loop.seen = replace(loop.seen, inboxes_down=["cannot list the inbox"])
    for _ in range(3):
        health.judge()
    assert [verdict["inbox"] for verdict in loop.verdicts] == ["cannot list the inbox"] * 3
    assert loop.done == ["heal inbox"]
    loop.seen = replace(loop.seen, inboxes_down=[])
    health.judge()
    loop.seen = replace(loop.seen, inboxes_down=["again"])
    health.judge()
    assert loop.done == ["heal inbox", "heal inbox"]


def test_a_job_that_raises_is_fatal(settings: Settings) -> None:
    """A dead helper loop stops the whole loudly: the daemon is told of the exception itself."""
    loop = Loop()

    def broken() -> None:
        raise RuntimeError("the scheduler's own thread failed")

    def post(act: Callable[[], None]) -> None:
        if threading.current_thread().name.startswith("ThreadPoolExecutor") and not loop.fatal and loop.posted.empty():
            loop.posted.put(lambda: None)
            broken()
        loop.posted.put(act)

    health = Health(settings, replace(loop.acts(), post=post))
    health.start()
    try:
        loop.run_until(lambda: bool(loop.fatal))
    finally:
        health.stop()
    assert isinstance(loop.fatal[0], RuntimeError)


def test_figures_of_this_machine(tmp_path: Path) -> None:
    """Free disk space and memory in use are real figures here; an absent path is unknown, not zero."""
    assert (disk_free_mib(str(tmp_path)) or 0) > 0
    assert disk_free_mib(str(tmp_path / "absent")) is None
    assert 0 < (memory_used_percent() or 0) < 100
