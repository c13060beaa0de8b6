"""daemon: composition root. Builds the rooms, wires them, owns signals, sd_notify and the end.

One event loop in the main thread; signals and the scheduler only enqueue onto it. Fails loudly: an exception anywhere in the loop
ends the process with status 70, and whoever started us (systemd) starts us again; the ledger knows where the work was left.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import signal
import sqlite3
import time
import uuid
from collections.abc import Callable
from typing import Any

import sdnotify
from loguru import logger

from whisperd import __version__, config
from whisperd.config import Settings
from whisperd.dispatcher.dispatcher import Dispatcher
from whisperd.dispatcher.staging import drop, drop_orphans
from whisperd.errors import ConfigError, StateDirError, printable
from whisperd.health.checks import Observation
from whisperd.health.health import Acts, Health, disk_free_mib, memory_used_percent
from whisperd.ledger.connection import LedgerBroken, LedgerBusy, LedgerStuck
from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Queries
from whisperd.log import to_journal_or_stderr
from whisperd.report.status import LOCK_NAME, status_line

OK, SOME_FAILED, ENVIRONMENT, INTERNAL = 0, 1, 3, 70

READY_AFTER_S = 10.0
READY_LOOK_S = 0.05
ENGINES_TERM_S = 2.0
DELIVERY_S = 2.0
CHILDREN_S = 1.5
BACKUPS_KEPT = 3


def lock_state_dir(state_dir: str) -> int:
    """One daemon for one state directory. The returned descriptor holds the lock for life. Raises StateDirError."""
    try:
        os.makedirs(state_dir, mode=0o750, exist_ok=True)
        lock = os.open(os.path.join(state_dir, LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StateDirError(
            f"cannot use the state directory {state_dir}: {error.strerror}",
            hint="create it and give it to the user whisperd runs as, or set state_dir",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise StateDirError(
            f"another whisperd is running on {state_dir}", hint="stop it first, or give this one a state_dir of its own"
        ) from None
    return lock


class Daemon:
    """One life of the daemon, from READY to the last child's end."""

    def __init__(self, settings: Settings, config_path: str, *, once: bool) -> None:
        self._settings = settings
        self._config_path = config_path
        self._once = once
        self._began = time.time()
        self._notifier = sdnotify.SystemdNotifier()
        self._lock = lock_state_dir(settings.state_dir)
        self._ledger = Ledger(settings.state_dir, epoch=uuid.uuid4().hex)
        self._loop = asyncio.new_event_loop()
        self._loop.set_exception_handler(self._loop_failed)
        self._dispatcher = Dispatcher(self._loop, self._ledger, settings)
        self._health = Health(settings, self._acts())
        self._exit_code = OK
        self._ready = False
        self._stop_began: float | None = None
        self._steps_at_beat = -1
        self._said: dict[str, Any] = {}

    def _acts(self) -> Acts:
        """What health may do to the other rooms: the one place where they are wired."""
        return Acts(
            post=self._post,
            tick=self._tick,
            beat=self._beat,
            optimise=self._dispatcher.optimise,
            rescan=self._dispatcher.intake.scan_all,
            observe=self._observe,
            verdicts=self._verdicts,
            heals={"inbox": self._dispatcher.intake.scan_all, "queue_age": self._dispatcher.wake, "disk_free": self._retention},
            checkpoint=lambda: void(self._ledger.truncate_wal()),
            retention=self._retention,
            backup=self._backup,
            fatal=self._fatal,
        )

    # --- life ---

    def run(self) -> int:
        """Serve until told to stop (or, with `once`, until drained). Returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, signal.Signals(number).name)
        self._loop.add_signal_handler(signal.SIGHUP, self._reload)
        logger.info(f"whisperd {__version__} starts: state in {self._settings.state_dir}, {len(self._settings.inbox)} inbox(es)")
        self._loop.call_soon(self._dispatcher.start)
        self._loop.call_soon(self._await_ready)
        self._health.start()
        try:
            self._loop.run_forever()
        finally:
            self._health.stop()
            self._dispatcher.kill_all("the daemon ends")
            self._ledger.close()
            os.close(self._lock)
        return self._exit_code

    def _post(self, act: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(act)
        except RuntimeError:  # the loop is closed: the daemon is on its way out
            pass

    def _tick(self) -> None:
        if self._stop_began is not None:
            return
        self._dispatcher.wake()
        self._say()
        if self._once and self._ready:
            self._end_when_drained()

    def _await_ready(self) -> None:
        """Say READY as soon as it is true; no model has to be loaded for it."""
        if not self._is_ready():
            self._loop.call_later(READY_LOOK_S, self._await_ready)
            return
        self._ready = True
        self._notifier.notify("READY=1")
        logger.bind(event="ready").info("ready")

    def _is_ready(self) -> bool:
        intake, delivery = self._dispatcher.intake, self._dispatcher.delivery
        answered = all(inbox.down or inbox.keeper.usable for inbox in intake.inboxes.values())
        served = all(writer.keeper.usable for writer in delivery.writers.values())
        return (answered and served and self._dispatcher.planning.advice is not None) or time.time() - self._began > READY_AFTER_S

    def _end_when_drained(self) -> None:
        hopeless = self._dispatcher.hopeless()
        if self._dispatcher.drained():
            self._exit_code = SOME_FAILED if self._ledger.outcomes_since(self._began)["failed"] else OK
            self._stop("drained")
        elif hopeless:
            logger.error(f"cannot go on: {hopeless}; what is left waits in the ledger")
            self._exit_code = ENVIRONMENT
            self._stop("work is left that waits")

    # --- the end ---

    def _stop(self, why: str) -> None:
        if self._stop_began is not None:
            return
        self._stop_began = time.monotonic()
        longest_s = self._settings.dispatcher.stop_grace_s + ENGINES_TERM_S + DELIVERY_S + CHILDREN_S + 5
        self._notifier.notify(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(longest_s * 1e6)}\nSTATUS=stopping: {why}")
        logger.bind(event="stopping").info(f"stopping ({why})")
        self._dispatcher.stop()
        self._await_engines()

    def _await_engines(self) -> None:
        """Engines end at their next boundary; after the grace they are terminated (their windows are in the ledger)."""
        waited_s = time.monotonic() - (self._stop_began or 0.0)
        grace_s = self._settings.dispatcher.stop_grace_s
        if self._dispatcher.pool.engines and waited_s < grace_s + ENGINES_TERM_S:
            if waited_s > grace_s:
                self._dispatcher.kill_engines("the daemon stops")
            self._loop.call_later(0.05, self._await_engines)
        else:
            self._await_delivery(time.monotonic() + DELIVERY_S)

    def _await_delivery(self, until: float) -> None:
        """What is on its way to an outbox gets there, when the outbox answers."""
        if not self._dispatcher.delivery.idle() and time.monotonic() < until:
            self._loop.call_later(0.05, lambda: self._await_delivery(until))
            return
        self._dispatcher.stop_delivery()
        self._await_children(time.monotonic() + CHILDREN_S)

    def _await_children(self, until: float) -> None:
        children = self._dispatcher.nursery.children
        if children and time.monotonic() < until:
            self._loop.call_later(0.02, lambda: self._await_children(until))
            return
        for child in children.values():
            logger.warning(f"{child.name} (pid {child.pid}) did not end in time and is killed")
        logger.bind(event="stopped").info("stopped")
        self._loop.stop()

    def _fatal(self, error: BaseException) -> None:
        if isinstance(error, (LedgerStuck, LedgerBusy, LedgerBroken, StateDirError)):  # a full disk is not our fault: files wait
            logger.bind(event="ledger_stuck").critical(f"{error}; ending, to be started again")
            self._exit_code = ENVIRONMENT
            self._loop.stop()
            return
        logger.opt(exception=error).critical("a loop of the daemon died; ending so that the daemon is started again")
        self._exit_code = INTERNAL
        self._loop.stop()

    def _loop_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self._fatal(context.get("exception") or RuntimeError(context["message"]))

    # --- reload ---

    def _reload(self) -> None:
        """SIGHUP: new settings, or the old ones when the file is bad."""
        self._notifier.notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            settings = config.load(self._config_path)
            if settings.state_dir != self._settings.state_dir:
                raise ConfigError("state_dir cannot change while the daemon runs", hint="restart it")
        except ConfigError as error:
            logger.bind(event="reload_refused").error(f"the settings stay as they were: {error}")
        else:
            self._settings = settings
            to_journal_or_stderr(settings.log.level)
            self._dispatcher.apply(settings)
            self._health.apply(settings)
            logger.bind(event="reloaded").info("settings reloaded")
        if self._ready:
            self._notifier.notify("READY=1")

    # --- what health asks for ---

    def _beat(self) -> None:
        """The watchdog is fed only when the dispatcher has stepped since the last time; the scheduler has, or we were not here."""
        steps = self._dispatcher.steps
        if steps != self._steps_at_beat:
            self._steps_at_beat = steps
            self._notifier.notify("WATCHDOG=1")
        if self._stop_began is None:
            down = [*self._inboxes_down(), *self._outboxes_down()]
            running = len(self._dispatcher.pool.tasks())
            self._notifier.notify("STATUS=" + status_line(self._ledger.counts(), running=running, waits_for=self._blocked(), down=down))

    def _inboxes_down(self) -> list[str]:
        return self._dispatcher.acceptance.down()

    def _outboxes_down(self) -> list[str]:
        now, writers = time.monotonic(), self._dispatcher.delivery.writers.values()
        late = {writer.path: f"the share of {printable(writer.path)} does not answer" for writer in writers if writer.keeper.late(now)}
        return [what for writer in writers if (what := writer.down or late.get(writer.path, ""))]

    def _blocked(self) -> str:
        failure = self._dispatcher.pool.blocked
        return self._dispatcher.no_room() if failure is None else f"{failure.what} ({failure.hint})"

    def _model(self) -> str:
        choice = self._dispatcher.planning.choice
        return choice.reason if choice else ""

    def _say(self) -> None:
        """Tell the desk, when there is news."""
        said = {
            "pid": os.getpid(),
            "version": __version__,
            "since": self._began,
            "blocked": self._blocked(),
            "outboxes_down": self._outboxes_down(),
            "model": self._model(),
            "engines": self._dispatcher.pool.told(),
            "batches": self._dispatcher.pool.counters.told(),
        }
        if said != self._said:
            self._said = said
            self._ledger.say("daemon", said, time.time())

    def _observe(self) -> Observation:
        now = time.time()
        outcomes = self._ledger.outcomes_since(now - 3600)
        oldest = self._ledger.oldest_ready_at()
        return Observation(
            disk_free_mib=disk_free_mib(self._settings.state_dir),
            memory_used_percent=memory_used_percent(),
            done_last_hour=outcomes["done"],
            failed_last_hour=outcomes["failed"],
            oldest_ready_age_s=None if oldest is None else now - oldest,
            inboxes_down=self._inboxes_down(),
            outboxes_down=self._outboxes_down(),
            engine_blocked=self._blocked(),
        )

    def _verdicts(self, verdicts: dict[str, str | None]) -> None:
        now = time.time()
        for name, fault in verdicts.items():
            if fault is not None and self._ledger.raise_alert(name, fault, now):
                logger.bind(event="alert").warning(f"alert: {fault}")
            elif fault is None and self._ledger.clear_alert(name, now):
                logger.bind(event="alert_cleared").info(f"alert over: {name}")

    def _retention(self) -> None:
        now, limits = time.time(), self._settings.health
        rows = self._ledger.prune(
            readings_before=now - limits.readings_keep_days * 86_400, events_before=now - limits.history_keep_days * 86_400
        )
        forgotten = self._ledger.drop_results(limits.transcripts_max_mib << 20, now - limits.transcripts_keep_days * 86_400)
        files = drop(self._settings.state_dir, forgotten) + drop_orphans(self._settings.state_dir, self._ledger.needed_transcripts())
        if rows or files:
            logger.info(f"retention: {rows} rows and {files} staged transcripts dropped")

    def _backup(self) -> None:
        """Hourly copy of the ledger, in a thread of the scheduler, over a connection of its own."""
        directory = os.path.join(self._settings.state_dir, "backup")
        try:
            os.makedirs(directory, mode=0o750, exist_ok=True)
            source = Queries.open(self._settings.state_dir)
            try:
                source.backup(os.path.join(directory, time.strftime("ledger-%Y%m%dT%H%M%SZ.sqlite3", time.gmtime())))
            finally:
                source.close()
            kept = sorted(name for name in os.listdir(directory) if name.endswith(".sqlite3"))
            for name in kept[:-BACKUPS_KEPT]:
                os.unlink(os.path.join(directory, name))
        except (OSError, sqlite3.Error, StateDirError) as error:  # no room for a backup is no reason to stop the work; disk_free alerts
            logger.bind(event="backup_failed").warning(f"cannot back up the ledger: {error}")


def void(_: object) -> None:
    """Drop a result."""


def run(config_path: str, *, once: bool = False) -> int:
    """Load settings and serve. Raises WhisperdError before the daemon is up."""
    settings = config.load(config_path)
    to_journal_or_stderr(settings.log.level)
    return Daemon(settings, config_path, once=once).run()
