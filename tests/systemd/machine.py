"""machine: a real systemd, booted in namespaces (tests/tools/systemd-sandbox), and whisperd installed in it as an administrator would."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from whisperd.ledger.queries import Queries
from whisperd.vocabulary import Window

CHECKOUT = Path(__file__).parents[2]
TOOLS = CHECKOUT / "tests/tools/systemd-sandbox"
CLIPS = Path(str(files("whisperd").joinpath("share", "clips")))
HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # by ProtectHome= and PrivateTmp=
COMMAND = os.path.join(os.path.dirname(sys.executable), "whisperd")
INSTALLATION = sorted({str(CHECKOUT), os.path.realpath(sys.prefix), os.path.realpath(sys.base_prefix)})
SENTENCE = "the meeting is on tuesday the twenty of november at ten fifteen"  # meeting.wav
CLEAR_WORD = "meeting"
LONG_SENTENCES = 20

CONFIG = """\
[engine]
model = "demo"
[transcription]
language = "en"
beam_size = 1
temperatures = [0.0]
window_s = 5
[watcher]
quiet_s = 1.0
[outbox]
formats = ["txt", "srt", "vtt", "tsv", "json"]
[[inbox]]
path = "/srv/whisperd/inbox"
"""


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 90.0) -> Any:
    """Poll until the condition holds; its value. The deadline only ends what would never come."""
    until = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > until:
            pytest.fail(f"not within {seconds:g} s: {what}")
        time.sleep(0.05)
    return value


class Sandbox:
    """One booted systemd. `root` is its root directory, seen from here; `shared` its /shared."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        theirs, self._lifeline = os.pipe()  # closed when this process ends, however it ends
        booted = subprocess.run([TOOLS / "boot.sh", directory, *INSTALLATION], stdin=theirs, capture_output=True, text=True, check=False)
        os.close(theirs)
        if booted.returncode != 0:
            self.end()
            pytest.fail(f"systemd did not boot: {booted.stdout}{booted.stderr}")
        self.init = int((directory / "init.pid").read_text())
        self.root = Path(f"/proc/{self.init}/root")
        self.shared = directory / "shared"

    def end(self) -> None:
        subprocess.run([TOOLS / "stop.sh", self._directory], check=False)
        os.close(self._lifeline)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        inside = ["nsenter", "-t", str(self.init), "-a", "--", "env", *(f"{key}={value}" for key, value in environment.items()), *command]
        done = subprocess.run(inside, capture_output=True, text=True, check=False)
        assert not check or done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done

    def journal(self, *matches: str) -> list[dict[str, Any]]:
        """What journald has, in order."""
        self.run("journalctl", "--sync")
        lines = self.run("journalctl", "--no-pager", "--output=json", "--all", *matches).stdout.splitlines()
        return [json.loads(line) for line in lines]


class Service:
    """whisperd.service as shipped, in a sandbox, with its user and its first inbox."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.dropped = 0
        root = sandbox.root
        self.inbox, self.outbox = root / "srv/whisperd/inbox", root / "srv/whisperd/outbox"
        self.state_dir = sandbox.shared / "state"
        self.state_dir.mkdir()
        (root / "var/lib/whisperd").mkdir()
        sandbox.run("mount", "--bind", "/shared/state", "/var/lib/whisperd")
        sandbox.run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", "/srv")  # overlayfs is no place that anybody drops files into
        shutil.copy(CHECKOUT / "systemd/whisperd.sysusers.conf", root / "usr/lib/sysusers.d/whisperd.conf")
        shutil.copy(CHECKOUT / "systemd/whisperd.tmpfiles.conf", root / "usr/lib/tmpfiles.d/whisperd.conf")
        sandbox.run("systemd-sysusers")
        sandbox.run("systemd-tmpfiles", "--create", "whisperd.conf")
        (root / "etc/systemd/system/whisperd.service").write_text(unit())
        hidden = [place for place in INSTALLATION if place.startswith(HIDDEN)]
        self.drop_in("installation", f"BindReadOnlyPaths={' '.join(hidden)}" if hidden else "")
        self.configure()

    # --- the administrator's moves ---

    def drop_in(self, name: str, line: str) -> None:
        directory = self.sandbox.root / "etc/systemd/system/whisperd.service.d"
        directory.mkdir(exist_ok=True)
        (directory / f"{name}.conf").write_text(f"[Service]\n{line}\n")
        self.systemctl("daemon-reload")

    def configure(self, content: str = CONFIG) -> None:
        directory = self.sandbox.root / "etc/whisperd"
        directory.mkdir(exist_ok=True)
        (directory / "whisperd.toml").write_text(content)

    def systemctl(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.sandbox.run("systemctl", *arguments, check=check)

    def start(self) -> None:
        done = self.systemctl("start", "whisperd", check=False)
        assert done.returncode == 0, done.stderr + "\n".join(str(entry.get("MESSAGE")) for entry in self.sandbox.journal())

    def whisperd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The command line inside, as root."""
        return self.sandbox.run(COMMAND, *arguments, check=False)

    # --- what systemd says ---

    def show(self, name: str) -> str:
        return self.systemctl("show", "-P", name, "whisperd").stdout.strip()

    def is_active(self) -> bool:
        return self.show("ActiveState") == "active"

    def main_process(self) -> int:
        """The daemon, by its number outside the sandbox."""
        inside = self.show("MainPID")
        return next(process for process in self.processes() if about(process)["NSpid"].split()[-1] == inside)

    def processes(self) -> set[int]:
        """Every process of the unit, by its number outside the sandbox."""
        members = self.sandbox.root / "sys/fs/cgroup/system.slice/whisperd.service/cgroup.procs"
        return set(map(int, members.read_text().split())) if members.exists() else set()

    def said(self, *matches: str) -> list[str]:
        """Messages of the unit and of systemd about it."""
        return [str(entry["MESSAGE"]) for entry in self.sandbox.journal(*(matches or ("-u", "whisperd")))]

    # --- recordings ---

    def drop(self, name: str | bytes, source: Path = CLIPS / "meeting.wav") -> None:
        """A recording. No two have the same content: the second would be published from the first one's transcript."""
        self.dropped += 1
        content = source.read_bytes() + (b"\0" * self.dropped if source.suffix == ".wav" else b"")
        with open(os.path.join(os.fsencode(self.inbox), os.fsencode(name)), "wb") as file:
            file.write(content)

    @contextmanager
    def ledger(self) -> Iterator[Queries]:
        queries = Queries.open(str(self.state_dir))
        try:
            yield queries
        finally:
            queries.close()

    def job(self, name: str | bytes) -> dict[str, Any]:
        """The newest row of a file, {} while there is none."""
        if not (self.state_dir / "ledger.sqlite3").exists():
            return {}
        with self.ledger() as ledger:
            return next((dict(row) for row in ledger.jobs(newest=True) if row["path"] == os.fsencode(name)), {})

    def windows(self, name: str) -> list[Window]:
        """What is stored of a file that is not finished."""
        job = self.job(name)
        if not job:
            return []
        with self.ledger() as ledger:
            return ledger.windows(job["id"])

    def verbs(self, name: str | bytes) -> list[str]:
        with self.ledger() as ledger:
            return [event["verb"] for event in ledger.events(self.job(name)["id"])]

    def wait_for_state(self, name: str | bytes, state: str = "done") -> dict[str, Any]:
        return wait_for(lambda: (job := self.job(name)) and job["state"] == state and job, f"{name!r} is {state}: {self.job(name)}")

    def published(self) -> set[str]:
        return {path.name for path in self.outbox.iterdir()}

    @contextmanager
    def ledger_locked(self) -> Iterator[None]:
        """Hold the writers' lock of the ledger: whoever wants to write waits."""
        lock = os.open(self.state_dir / "ledger.lock", os.O_RDWR | os.O_CREAT, 0o660)
        try:
            os.fchown(lock, self.state_dir.stat().st_uid, self.state_dir.stat().st_gid)
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)


def about(process: int) -> dict[str, str]:
    """What the kernel says of a process."""
    with open(f"/proc/{process}/status", encoding="utf-8") as file:
        return dict(line.rstrip("\n").split(":\t", 1) for line in file)


@cache
def unit() -> str:
    """What `whisperd config unit` prints for this installation."""
    command = [sys.executable, "-m", "whisperd", "config", "unit"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
