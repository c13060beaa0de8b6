"""house: a whole installation to measure: inbox, outbox, state directory, configuration, the real daemon.

Owns: `House`. Its defaults are whisperd's own, except for what a measurement needs: the model, the quiet period at its least, native
events. Fails with `Failed` when the daemon ends, or a file does not become a transcript.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from bench.measure import ROOT, Failed, cpu_s, environment
from whisperd.config import toml_value
from whisperd.ledger.queries import Queries, Row

PATIENCE_S = 1800.0
LOOK_EVERY_S = 0.5
CALM_LOOKS = 4
CHILDREN = {"whisperd.watcher": "watcher", "whisperd.engine": "engine", "whisperd.outbox": "outbox", "whisperd.dispatcher.probe": "probe"}


class House:
    """One whisperd in a new directory below `home`; removed by `close`."""

    def __init__(self, home: str, model: str, *, threads: int = 1, mode: str = "batched") -> None:
        os.makedirs(home, exist_ok=True)
        self.place = tempfile.mkdtemp(prefix="house-", dir=home)
        self.inbox = os.path.join(self.place, "inbox")
        self.state = os.path.join(self.place, "state")
        self.config = os.path.join(self.place, "whisperd.toml")
        self._waiting = os.path.join(self.place, "waiting")  # on the same file system: a file arrives by one rename
        os.mkdir(self.inbox)
        os.mkdir(self._waiting)
        sections: dict[str, dict[str, object]] = {
            "engine": {"model": model, "device": "cpu", "compute_type": "int8", "cpu_threads": threads, "offline": True},
            "dispatcher": {"workers": 1},  # as many as the contender has
            "transcription": {"mode": mode},
            "watcher": {"quiet_s": 0.1},
        }
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(f"state_dir = {toml_value(self.state)}\ncache_dir = {toml_value(os.path.join(self.place, 'cache'))}\n")
            for section, settings in sections.items():
                file.write(f"[{section}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in settings.items()))
            file.write(f'[[inbox]]\npath = {toml_value(self.inbox)}\nevents = "native"\n')

    @property
    def once(self) -> list[str]:
        """The command that transcribes what lies in the inbox."""
        return [sys.executable, "-m", "whisperd", "run", "--once", "--config", self.config]

    def drop(self, paths: Sequence[str]) -> None:
        """Recordings arrive, whole, all in one moment."""
        for path in paths:
            shutil.copyfile(path, os.path.join(self._waiting, os.path.basename(path)))
        for path in paths:
            os.rename(os.path.join(self._waiting, os.path.basename(path)), os.path.join(self.inbox, os.path.basename(path)))

    def jobs(self) -> list[Row]:
        ledger = Queries.open(self.state)
        try:
            return list(ledger.jobs())
        finally:
            ledger.close()

    def assert_all_done(self, count: int) -> None:
        """Every recording has its transcript. Raises Failed."""
        states = [str(row["state"]) for row in self.jobs()]
        if states.count("done") != count:
            raise Failed(f"{states.count('done')} of {count} files have a transcript; the others: {sorted(set(states) - {'done'})}")

    def close(self) -> None:
        shutil.rmtree(self.place, ignore_errors=True)


class Daemon:
    """A running daemon in a house."""

    def __init__(self, house: House) -> None:
        self.house = house
        self._queries: Queries | None = None
        address = os.path.join(house.place, "notify")
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(address)
        self._notify.settimeout(PATIENCE_S)
        self._log_path = os.path.join(house.place, "log")
        with open(self._log_path, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "whisperd", "run", "--config", house.config],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment({"NOTIFY_SOCKET": address}),
                cwd=ROOT,
            )
        while b"READY=1" not in self._notify.recv(65536):
            pass

    def wait_done(self, count: int, *, every_s: float = 0.02) -> float:
        """Until that many files are done; when that was seen (monotonic). Raises Failed."""
        until = time.monotonic() + PATIENCE_S
        while (counts := self._ledger().counts())["done"] < count:
            self._hear()
            if self.process.poll() is not None or time.monotonic() > until or counts["failed"]:
                raise Failed(f"not all of {count} files are done: {counts}\n{self._log()}")
            time.sleep(every_s)
        return time.monotonic()

    def has_ended(self, path: str) -> bool:
        """Whether the recording of this name is done. Raises Failed when it cannot be."""
        self._hear()
        name = os.fsencode(os.path.basename(path))
        states = {row["state"] for row in self._ledger().jobs() if row["path"] == name}
        if self.process.poll() is not None or "failed" in states:
            raise Failed(f"{name!r} is not done: {states}\n{self._log()}")
        return "done" in states

    def wait_ended(self, path: str) -> float:
        """Until it is done; when that was seen (monotonic). Raises Failed."""
        until = time.monotonic() + PATIENCE_S
        while not self.has_ended(path):
            if time.monotonic() > until:
                raise Failed(f"{path} is not done within {PATIENCE_S:g} s\n{self._log()}")
            time.sleep(0.01)
        return time.monotonic()

    def _ledger(self) -> Queries:
        if self._queries is None:
            self._queries = Queries.open(self.house.state)
        return self._queries

    def wait_idle(self) -> None:
        """Until every process, an engine among them, has come to rest: it is started, and its model is loaded."""
        used_s, calm = -1.0, 0
        while calm < CALM_LOOKS:
            time.sleep(LOOK_EVERY_S)
            self._hear()
            found = self.cpu_by_name()
            calm = calm + 1 if "engine" in found and sum(found.values()) - used_s < LOOK_EVERY_S * 0.02 else 0
            used_s = sum(found.values())

    def processes(self) -> dict[str, list[int]]:
        """Process ids by name: daemon, watcher, engine, outbox, probe."""
        found: dict[str, list[int]] = {"daemon": [self.process.pid]}
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children", encoding="ascii") as file:
            children = [int(pid) for pid in file.read().split()]
        for pid in children:
            try:
                with open(f"/proc/{pid}/cmdline", encoding="utf-8") as file:
                    words = file.read().split("\0")
            except OSError:
                continue
            for module, name in CHILDREN.items():
                if module in words:
                    found.setdefault(name, []).append(pid)
        return found

    def cpu_by_name(self) -> dict[str, float]:
        """CPU-seconds of the living processes so far, by name."""
        return {name: sum(map(cpu_s, pids)) for name, pids in self.processes().items()}

    def stop(self) -> None:
        self.process.terminate()
        if self.process.wait(60) != 0:
            raise Failed(f"the daemon ended with {self.process.returncode}\n{self._log()}")
        self._notify.close()

    def close(self) -> None:
        """Whatever happened: nothing is left running."""
        if self._queries is not None:
            self._queries.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _hear(self) -> None:
        """Take in what the daemon tells its service manager, or it would wait for us."""
        self._notify.setblocking(False)
        try:
            while self._notify.recv(65536):
                pass
        except BlockingIOError:
            pass

    def _log(self) -> str:
        with open(self._log_path, encoding="utf-8", errors="replace") as file:
            return file.read()[-3000:]
