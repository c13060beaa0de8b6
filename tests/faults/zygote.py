"""zygote: one corridor in a child that was forked with everything imported, traced by strace where a call is to be counted or to fail.

Owns: the memory shared with the child (where to begin, what is acknowledged, how it ended), the forking, the attaching of strace, and
the reading of what strace wrote. A child starts its walk only when strace has hold of it, so start-up is never counted.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from corridor import Acknowledge, Home, walk

from whisperd.errors import WhisperdError

_OF_BYTES = (
    "read",
    "pread64",
    "readv",
    "preadv",
    "write",
    "pwrite64",
    "writev",
    "pwritev",
    "lseek",
    "ftruncate",
    "truncate",
    "fallocate",
    "fsync",
    "fdatasync",
    "sync_file_range",
)
_OF_NAMES = (
    "open",
    "openat",
    "creat",
    "rename",
    "renameat",
    "renameat2",
    "link",
    "linkat",
    "unlink",
    "unlinkat",
    "rmdir",
    "mkdir",
    "mkdirat",
    "readlink",
    "readlinkat",
    "getdents64",
)
_OF_FACTS = (
    "stat",
    "lstat",
    "fstat",
    "newfstatat",
    "statx",
    "access",
    "faccessat",
    "faccessat2",
    "fchown",
    "fchownat",
    "chown",
    "fchmod",
    "fchmodat",
    "chmod",
    "utimensat",
)
_OF_LOCKS = ("flock", "fcntl")
CALLS = _OF_BYTES + _OF_NAMES + _OF_FACTS + _OF_LOCKS
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EINTR")
KILL = "SIGKILL"
_SPIN_S = 0.0003
_LINE = re.compile(r"^(?:\[pid +\d+\] |\d+ +)?(\w+)\((.*)$")


Stretch = Callable[[Home, Acknowledge], Callable[[], None]]
"""Goes the way up to some point, and returns how it goes on from there: only that is counted and disturbed."""


def whole_way(home: Home, acknowledge: Acknowledge) -> Callable[[], None]:
    return partial(walk, home, acknowledge)


class Fault(NamedTuple):
    """What is to happen to the `when`-th call of a name: KILL, or an error."""

    call: str
    when: int
    name: str


@dataclass(frozen=True)
class Ending:
    """How a walk ended. `named` is the code of a WhisperdError, `bare` the traceback of anything else, both empty when it went on."""

    killed: bool
    named: str
    bare: str
    acknowledged: set[bytes]
    took_s: float


class Report:
    """Memory that the child writes and that survives it: no system call is needed to tell something."""

    SIZE = 1 << 16

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, self.SIZE)

    def clear(self) -> None:
        self.memory[: self.SIZE] = bytes(self.SIZE)

    def go(self) -> None:
        self.memory[0] = 1

    def await_go(self) -> None:
        """Say that all is ready, and wait."""
        self.memory[1] = 1
        while not self.memory[0]:
            time.sleep(_SPIN_S)

    def await_ready(self, pid: int) -> None:
        """Until a child waits for `go`, or has ended."""
        while not self.memory[1] and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(_SPIN_S)

    def acknowledge(self, source: bytes) -> None:
        """Entries follow one another; the length comes last, so that a killed child leaves no half entry."""
        at = 1024
        while self.memory[at]:
            at += 1 + self.memory[at]
        self.memory[at + 1 : at + 1 + len(source)] = source
        self.memory[at] = len(source)

    def acknowledged(self) -> set[bytes]:
        at, found = 1024, set()
        while length := self.memory[at]:
            found.add(self.memory[at + 1 : at + 1 + length])
            at += 1 + length
        return found

    def end(self, named: str, bare: str, took_s: float) -> None:
        body = json.dumps({"named": named, "bare": bare[-20_000:], "took_s": took_s}).encode()
        self.memory[32_768 : 32_768 + len(body)] = body

    def ending(self, status: int) -> Ending:
        body = bytes(self.memory[32_768:]).rstrip(b"\0")
        said = json.loads(body) if body else {"named": "", "bare": "" if os.WIFSIGNALED(status) else "it told nothing", "took_s": 0.0}
        return Ending(killed=os.WIFSIGNALED(status), acknowledged=self.acknowledged(), **said)


class Zygote:
    """Forks walks, one at a time."""

    def __init__(self, scratch: Path) -> None:
        self.report = Report()
        self._trace = scratch / "trace"

    def spawn(self, home: Home, before: Callable[[], None] = lambda: None, stretch: Stretch = whole_way) -> int:
        """A child that waits for `report.go`; the caller reaps it."""
        self.report.clear()
        pid = os.fork()
        if pid == 0:
            self._live(home, before, stretch)
        return pid

    def _live(self, home: Home, before: Callable[[], None], stretch: Stretch) -> None:
        named = bare = ""
        began = time.monotonic()
        try:
            before()
            go_on = stretch(home, self.report.acknowledge)
            self.report.await_go()
            began = time.monotonic()
            go_on()
        except WhisperdError as error:
            named = error.code
        except BaseException:  # noqa: BLE001 - told, not handled
            bare = traceback.format_exc()
        self.report.end(named, bare, time.monotonic() - began)
        os._exit(0)

    def run(self, home: Home) -> Ending:
        """An undisturbed walk."""
        pid = self.spawn(home)
        self.report.go()
        return self.report.ending(os.waitpid(pid, 0)[1])

    def run_traced(self, home: Home, *arguments: str, stretch: Stretch = whole_way) -> tuple[Ending, str]:
        """A walk under strace with these arguments, and what strace wrote."""
        pid = self.spawn(home, stretch=stretch)
        self.report.await_ready(pid)
        with attached(pid, self._trace, *arguments) as strace:
            self.report.go()
            _, status = os.waitpid(pid, 0)
            strace.wait(timeout=20)
        return self.report.ending(status), self._trace.read_text(errors="replace")


@contextmanager
def attached(pid: int, output: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """strace on a process, from the moment it has hold of it; it ends with the process."""
    command = ["strace", "-p", str(pid), "-o", str(output), *arguments]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as strace:
        try:
            _await_hold(strace)
            yield strace
        except BaseException:
            os.kill(pid, signal.SIGKILL)
            raise
        finally:
            strace.terminate()  # a process that is stopped, or was killed, leaves nothing to wait for


def _await_hold(strace: subprocess.Popen[bytes]) -> None:
    """strace says so itself, once no call can escape it any more."""
    assert strace.stderr is not None
    said = b""
    while b"attached" not in said:
        part = os.read(strace.stderr.fileno(), 4096)
        if not part:
            raise RuntimeError(f"strace cannot attach: {said.decode(errors='replace')}")
        said += part


@dataclass(frozen=True)
class Call:
    """The `when`-th call of this name in a walk, and how strace shows it."""

    name: str
    when: int
    shown: str


def count(zygote: Zygote, home: Home, stretch: Stretch = whole_way) -> list[Call]:
    """Every I/O call of a walk that touches its home, in order."""
    traced = "trace=" + ",".join(f"?{name}" for name in CALLS)
    ending, text = zygote.run_traced(home, "-y", "-s", "16", "-e", traced, stretch=stretch)
    assert not ending.bare and not ending.named, ending
    place = os.path.commonpath([home.inbox, home.state_dir, home.outbox])
    seen: dict[str, int] = {}
    found = []
    for line in text.splitlines():
        match = _LINE.match(line)
        if match:
            seen[match[1]] = seen.get(match[1], 0) + 1
            if place in line:
                found.append(Call(match[1], seen[match[1]], line.replace(place, "…")))
    return found


def disturb(zygote: Zygote, home: Home, fault: Fault, stretch: Stretch = whole_way) -> tuple[Ending, bool]:
    """A walk in which one call meets a fault, and whether it got that far."""
    call, when, name = fault
    what = f"signal={KILL}" if name == KILL else f"error={name}"
    arguments = ("-e", f"trace={call}", "-e", f"inject={call}:{what}:when={when}")
    ending, text = zygote.run_traced(home, *arguments, stretch=stretch)
    return ending, ending.killed if name == KILL else "(INJECTED)" in text
