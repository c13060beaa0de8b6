"""child: the life of any child process, as a state machine.

Owns: starting processes (the only room that does), their states, their last words, their exit as a sentence.

            spawn            ready           assign
   (none) ────────▶ booting ───────▶ idle ◀────────▶ busy
                       │       drain  │    release    │ drain
                       │              ▼               ▼
                       └────────▶  draining ──────▶ killing ──▶ gone      (exit leads to gone from everywhere)

Fails with `ChildMove` when an event makes no sense in a state: that is a bug of ours, never a normal event.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import deque
from enum import StrEnum
from typing import IO, Generic, TypeVar

from whisperd.errors import WhisperdError, printable
from whisperd.wire import Channel, Message, Stop

In = TypeVar("In")

LAST_LINES = 20
PIPE_BYTES = 65536


class Life(StrEnum):
    BOOTING = "booting"
    IDLE = "idle"
    BUSY = "busy"
    DRAINING = "draining"
    KILLING = "killing"
    GONE = "gone"


class ChildMove(WhisperdError):
    """An event that a child in this state cannot have."""

    code = "child_move"


class Child(Generic[In]):
    """One child process: its process, its wire, its state. Time is passed in (monotonic seconds)."""

    def __init__(self, *, name: str, module: str, receives: object, now: float, env: dict[str, str] | None = None) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            try:
                self.process: subprocess.Popen[bytes] = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    process_group=0,
                    env={**os.environ, **(env or {})},
                )
            except BaseException:
                ours.close()
                raise
        self.name = name
        self.channel: Channel[In] = Channel(ours, receives)
        self.pidfd = os.pidfd_open(self.process.pid)
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        self.stderr_ended = False
        self.life = Life.BOOTING
        self.born_at = now
        self.since = now
        self.heard_at = now
        self.killed_by_us = ""
        stderr = self._stderr()
        os.set_blocking(stderr.fileno(), False)

    @property
    def pid(self) -> int:
        return self.process.pid

    def _stderr(self) -> IO[bytes]:
        if self.process.stderr is None:
            raise ChildMove("a child without a standard error")
        return self.process.stderr

    def stderr_fileno(self) -> int:
        return self._stderr().fileno()

    def _move(self, event: str, allowed: tuple[Life, ...], to: Life, now: float) -> None:
        if self.life not in allowed:
            raise ChildMove(f"cannot {event} child {self.name}: it is {self.life}")
        self.life = to
        self.since = now

    # --- events ---

    def ready(self, now: float) -> None:
        """The child says that it can take work. A child asked to stop while booting stays on its way out."""
        if self.life in (Life.DRAINING, Life.KILLING):
            return
        self._move("make ready", (Life.BOOTING,), Life.IDLE, now)

    def assign(self, now: float) -> None:
        self._move("assign work to", (Life.IDLE,), Life.BUSY, now)

    def release(self, now: float) -> None:
        """The work is over; a draining child keeps draining."""
        if self.life in (Life.DRAINING, Life.KILLING):
            return
        self._move("take work from", (Life.BUSY,), Life.IDLE, now)

    def drain(self, now: float) -> None:
        """Ask the child to end at its next good moment."""
        if self.life in (Life.DRAINING, Life.KILLING, Life.GONE):
            return
        self._move("drain", (Life.BOOTING, Life.IDLE, Life.BUSY), Life.DRAINING, now)
        self.send(Stop())

    def terminate(self, now: float, why: str) -> None:
        """SIGTERM to the whole group; `why` will be said when the child is gone."""
        self._signal(signal.SIGTERM, now, why)

    def kill(self, now: float, why: str) -> None:
        """SIGKILL to the whole group."""
        self._signal(signal.SIGKILL, now, why)

    def _signal(self, number: signal.Signals, now: float, why: str) -> None:
        if self.life is Life.GONE:
            return
        self.killed_by_us = self.killed_by_us or why
        if self.life is not Life.KILLING:
            self._move("kill", (Life.BOOTING, Life.IDLE, Life.BUSY, Life.DRAINING), Life.KILLING, now)
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it ended by itself a moment ago; its exit is on the way
            pass

    def gone(self, now: float) -> str:
        """Reap the process (call when its pidfd is readable) and say how it ended."""
        self._move("bury", (Life.BOOTING, Life.IDLE, Life.BUSY, Life.DRAINING, Life.KILLING), Life.GONE, now)
        os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOWAIT)
        self._kill_stragglers()  # before the process is reaped: until then nobody else can have its number
        code = self.process.wait()
        self.read_stderr()
        self.channel.close()
        self._stderr().close()
        os.close(self.pidfd)
        return describe_exit(code)

    def _kill_stragglers(self) -> None:
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # nothing of its group is left, as it should be
            pass

    # --- effects ---

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame. A child that is already dead is found out by its exit, not here."""
        try:
            self.channel.send(message, descriptors)
        except WhisperdError:
            pass

    def read_stderr(self) -> list[str]:
        """New lines the child wrote to standard error, escaped; the last ones are kept for its obituary.

        One pipe full at a time: a child that never stops writing cannot keep the daemon here. `stderr_ended` says that no more will
        come (an empty list does not: blank lines are left out).
        """
        try:
            data = os.read(self.stderr_fileno(), PIPE_BYTES)
        except BlockingIOError:
            return []
        self.stderr_ended = not data
        lines = [printable(line)[:1000] for line in data.splitlines() if line.strip()]
        self.last_lines.extend(lines)
        return lines


def describe_exit(returncode: int) -> str:
    """An exit status as a sentence: 'killed by SIGSEGV (Segmentation fault)', 'ended with status 3', 'ended normally'."""
    if returncode == 0:
        return "ended normally"
    if returncode > 0:
        return f"ended with status {returncode}"
    number = -returncode
    try:
        return f"killed by {signal.Signals(number).name} ({signal.strsignal(number)})"
    except ValueError:
        return f"killed by signal {number}"


def blames_the_work(returncode: int, *, memory_ran_out: bool, killed_by_us: bool) -> bool:
    """Whether a child's death counts as an attempt of the file it worked on (docs/decisions/0002).

    A crash counts, and so does a kill by the kernel for lack of memory or by ourselves for lack of progress. A SIGKILL, SIGTERM
    or SIGINT from outside is somebody's hand (an operator, a shutdown): the file is not to blame and runs again at once.
    """
    if killed_by_us or memory_ran_out:
        return True
    return -returncode not in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def kernel_memory_kills() -> int:
    """How many processes the kernel has killed for lack of memory since boot (0 where it does not say)."""
    try:
        with open("/proc/vmstat", encoding="ascii") as statistics:
            return next((int(line.split()[1]) for line in statistics if line.startswith("oom_kill ")), 0)
    except OSError:  # hidden by a sandbox
        return 0
