"""hook: one run of somebody else's program.

Owns: the programs that whisperd runs for others. No shell, a process group of its own, nothing on standard input, and an environment of
PATH, LANG and the facts it was given, nothing of ours. Its output is read so that it never stands still for want of room, and its last
lines are kept for the failure. When its time is over, or it has ended, its whole group is: SIGTERM, and SIGKILL soon after. Should we
be killed ourselves, the guard of the group ends it. Fails with `NotRun`.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from whisperd.child import describe_exit
from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import RunHook

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
LANG = "C.UTF-8"
TAIL_BYTES = 2048
LINE_CHARS = 300
LINES = 3
TERMINATE_S = 2.0
LOOK_S = 0.2
PIPE_BYTES = 65536
GUARD = ("/bin/sh", "-c", "trap '' HUP INT TERM; read -r _; kill -KILL 0")
"""Leads the group of a hook, and waits at a pipe that is at its end once we are gone, however we went: then it kills the group. A death
signal (prctl) would reach the hook itself, but nothing that it started."""

_LASTING = (errno.ENOENT, errno.EACCES, errno.ENOEXEC, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.E2BIG)


class NotRun(WhisperdError):
    """The hook did not do its work."""

    def __init__(self, kind: FailureKind, code: str, what: str, hint: str = "") -> None:
        super().__init__(what, hint=hint)
        self.failure = Failure(kind=kind, code=code, what=what, hint=hint)


def run(order: RunHook, *, stop: threading.Event) -> None:
    """Run one hook; returns once it ended with status 0. `stop` ends it early. Raises NotRun."""
    shown = printable(order.command[0])
    if stop.is_set():
        raise _interrupted(shown)
    group = _start(order, shown)
    try:
        tail, in_time = _follow(group.process, time.monotonic() + order.timeout_s, stop)
    finally:
        code = _end(group)
    if stop.is_set() and not in_time:
        raise _interrupted(shown)
    if not in_time:
        what = f"hook {shown} was ended: it took longer than {order.timeout_s:g} s{_last_lines(tail)}"
        raise NotRun(FailureKind.TRANSIENT, "hook_timeout", what, "make it faster, or give it more time with `timeout_s` of that [[hook]]")
    if code != 0:
        what = f"hook {shown} {describe_exit(code)}{_last_lines(tail)}"
        raise NotRun(FailureKind.TRANSIENT, "hook_failed", what, "run it by hand and look what it wants; it is tried again")


def _interrupted(shown: str) -> NotRun:
    return NotRun(FailureKind.WAITING, "hook_interrupted", f"hook {shown} was ended because whisperd stops", "it is run again")


def environment_of(facts: dict[str, str]) -> dict[bytes, bytes]:
    """The environment of a hook. Names are bytes and frames are not: each character of a fact stands for one byte (ISO 8859-1)."""
    given = {name.encode("latin-1"): value.encode("latin-1") for name, value in facts.items()}
    return {b"PATH": PATH.encode(), b"LANG": LANG.encode(), **given}


class Group(NamedTuple):
    """A hook and the guard that leads its process group, which keeps the group's number ours until it is reaped."""

    process: subprocess.Popen[bytes]
    guard: subprocess.Popen[bytes]


def _start(order: RunHook, shown: str) -> Group:
    """Raises NotRun. No such program is a lasting fact; no memory or no room for a process is not."""
    try:
        guard = subprocess.Popen(
            GUARD, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={}, process_group=0, cwd="/"
        )
    except OSError as error:
        hint = "look whether there is memory left, and room for processes (TasksMax= of the unit)"
        raise NotRun(FailureKind.TRANSIENT, "hook_unusable", f"cannot guard hook {shown}: {error.strerror}", hint) from error
    try:
        return Group(_start_in(guard.pid, order, shown), guard)
    except BaseException:
        _dismiss(guard)
        raise


def _start_in(group: int, order: RunHook, shown: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            [os.fsencode(word) for word in order.command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment_of(order.environment),
            process_group=group,
            cwd="/",
        )
    except OSError as error:
        kind = FailureKind.PERMANENT if error.errno in _LASTING else FailureKind.TRANSIENT
        hint = "is the program there, and may the user that runs whisperd execute it?"
        raise NotRun(kind, "hook_unusable", f"cannot run hook {shown}: {error.strerror}", hint) from error
    except ValueError as error:  # a NUL byte, or a character that is no byte
        raise NotRun(FailureKind.PERMANENT, "hook_unusable", f"cannot run hook {shown}: {error}", "correct `command` of it") from error


def _follow(process: subprocess.Popen[bytes], ends_at: float, stop: threading.Event) -> tuple[bytes, bool]:
    """Read what it says until it has ended; the end of that, and whether it ended in time."""
    out = process.stdout
    if out is None:
        raise NotRun(FailureKind.PERMANENT, "internal", "a hook without an output", "please report it")
    tail, said = b"", out.fileno()
    os.set_blocking(said, False)
    pidfd = os.pidfd_open(process.pid)
    try:
        open_ends = [said, pidfd]
        while time.monotonic() < ends_at and not stop.is_set():
            ready, _, _ = select.select(open_ends, [], [], max(0.0, min(LOOK_S, ends_at - time.monotonic())))
            data = _read(said) if said in ready else b""
            tail = (tail + data)[-TAIL_BYTES:]
            if pidfd in ready:  # its last words are there; whoever still holds the other end is not waited for
                return (tail + _read(said))[-TAIL_BYTES:], True
            if said in ready and not data:  # it closed its output and works on
                open_ends.remove(said)
        return tail, False
    finally:
        os.close(pidfd)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, PIPE_BYTES)
    except BlockingIOError:
        return b""


def _end(group: Group) -> int:
    """End the whole group and reap it. The hook's exit status."""
    process = group.process
    if not _ended(process, 0.0):
        os.killpg(group.guard.pid, signal.SIGTERM)
        _ended(process, TERMINATE_S)
    _dismiss(group.guard)
    with suppress(PermissionError):  # one that left the group
        process.kill()
    code = process.wait()
    if process.stdout is not None:
        process.stdout.close()
    return code


def _dismiss(guard: subprocess.Popen[bytes]) -> None:
    """Kill the group, and reap its leader last of all."""
    os.killpg(guard.pid, signal.SIGKILL)
    guard.wait()
    if guard.stdin is not None:
        guard.stdin.close()


def _ended(process: subprocess.Popen[bytes], wait_s: float) -> bool:
    """Whether the leader ended, without reaping it."""
    pidfd = os.pidfd_open(process.pid)
    try:
        return bool(select.select([pidfd], [], [], wait_s)[0])
    finally:
        os.close(pidfd)


def _last_lines(tail: bytes) -> str:
    lines = [printable(line)[:LINE_CHARS] for line in tail.splitlines() if line.strip()]
    return ": " + " / ".join(lines[-LINES:]) if lines else ""
