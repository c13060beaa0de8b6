"""nursery: children on the daemon's event loop.

Owns: reading their wires, their standard errors and their exits, and keeping one child of a kind alive (`Keeper`) with a back-off
of its own: a boot failure is not a job failure. A child that does not even die when killed (stuck in the kernel on a dead mount)
is abandoned and named; it is reaped whenever it does end. None takes its place before that, or it would hang there as well, unless
something else was mounted meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

from loguru import logger

from whisperd.child import Child, Life
from whisperd.dispatcher.retry import Backoff
from whisperd.ledger.connection import Mount, mounts_above
from whisperd.wire import Frame, Message, WireBroken, WireClosed

OnFrame = Callable[[Any, Frame[Any]], None]
OnExit = Callable[[Any, str], None]

ORPHANED_WIRE_S = 5.0
BOOT_PAUSE = Backoff(base_s=0.25, max_s=60.0)
HEALTHY_AFTER_S = 20.0
BOOT_S = 20.0
"""A child that is not ready by then hangs; or so it is said, for it may still come."""


class Nursery:
    """All living children."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, on_end: Callable[[], None]) -> None:
        self._loop = loop
        self._on_end = on_end
        self.children: dict[int, Child[Any]] = {}
        self._on_frame: dict[int, OnFrame] = {}

    def start(
        self, *, name: str, module: str, receives: object, on_frame: OnFrame, on_exit: OnExit, env: dict[str, str] | None = None
    ) -> Child[Any]:
        """Spawn a child (`env` is added to our own environment) and listen to it."""
        child: Child[Any] = Child(name=name, module=module, receives=receives, now=time.monotonic(), env=env)
        self.children[child.pid] = child
        self._on_frame[child.pid] = on_frame
        self._loop.add_reader(child.channel.fileno(), self._readable, child)
        self._loop.add_reader(child.stderr_fileno(), self._said, child)
        self._loop.add_reader(child.pidfd, self._ended, child, on_exit)
        logger.bind(child=name).debug(f"started {name} (pid {child.pid})")
        return child

    def send(self, child: Child[Any], message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame; what does not fit now is written when there is room."""
        child.send(message, descriptors)
        self.watch(child)

    def watch(self, child: Child[Any]) -> None:
        """Write what waits as soon as there is room."""
        if child.life is not Life.GONE and child.channel.wants_write:
            self._loop.add_writer(child.channel.fileno(), self._writable, child)

    def _writable(self, child: Child[Any]) -> None:
        try:
            child.channel.flush()
        except WireClosed:
            self._loop.remove_writer(child.channel.fileno())
            return
        if not child.channel.wants_write:
            self._loop.remove_writer(child.channel.fileno())

    def _readable(self, child: Child[Any]) -> None:
        try:
            self._take_frames(child)
        except WireClosed:
            self._loop.remove_reader(child.channel.fileno())
            self._loop.call_later(ORPHANED_WIRE_S, self._kill_if_alive, child, "it closed its wire and did not end")
        except WireBroken as error:
            self._loop.remove_reader(child.channel.fileno())
            child.kill(time.monotonic(), f"it broke the wire protocol: {error.what}")

    def _kill_if_alive(self, child: Child[Any], why: str) -> None:
        if child.life is not Life.GONE:
            child.kill(time.monotonic(), why)

    def _said(self, child: Child[Any]) -> None:
        self._log_lines(child, child.read_stderr())
        if child.stderr_ended:
            self._loop.remove_reader(child.stderr_fileno())

    def _log_lines(self, child: Child[Any], lines: list[str]) -> None:
        for line in lines:
            logger.bind(child=child.name).log(_level_of(line), f"{child.name}: {line}")

    def _ended(self, child: Child[Any], on_exit: OnExit) -> None:
        self._last_words(child)
        while lines := child.read_stderr():
            self._log_lines(child, lines)
        for descriptor in (child.channel.fileno(), child.stderr_fileno(), child.pidfd):
            self._loop.remove_reader(descriptor)
        self._loop.remove_writer(child.channel.fileno())
        how = child.gone(time.monotonic())
        if child.killed_by_us:
            how = f"{how}: {child.killed_by_us}"
        del self.children[child.pid], self._on_frame[child.pid]
        on_exit(child, how)
        self._on_end()

    def _take_frames(self, child: Child[Any]) -> int:
        child.heard_at = time.monotonic()
        count = 0
        for frame in child.channel.receive():
            self._on_frame[child.pid](child, frame)
            count += 1
        return count

    def _last_words(self, child: Child[Any]) -> None:
        """What a child said before it ended was still said: its last frame may be the job's result."""
        try:
            while self._take_frames(child):
                pass
        except (WireClosed, WireBroken):  # the end of it, expected here
            pass


class Keeper:
    """Keeps one child of a kind alive: starts it, starts it again after a pause that grows while it keeps failing."""

    def __init__(
        self, nursery: Nursery, *, name: str, module: str, receives: object, hello: Message, on_frame: OnFrame, place: bytes = b""
    ) -> None:
        """`place` is the directory that the child serves and may hang on, if there is one."""
        self._nursery = nursery
        self._module = module
        self._receives = receives
        self._hello = hello
        self._handle = on_frame
        self._place = place
        self._mounts: tuple[Mount, ...] = ()  # below which the place lay when the child was killed
        self.name = name
        self.child: Child[Any] | None = None
        self.down = ""  # why there is no usable child, when there is none
        self._failures = 0
        self._start_at = 0.0
        self._wanted = True

    @property
    def usable(self) -> bool:
        """Whether the child is there and said that it is ready."""
        return self.child is not None and self.child.life in (Life.IDLE, Life.BUSY)

    def late(self, now: float) -> bool:
        """Whether the child should have been ready long ago."""
        return self.child is not None and self.child.life is Life.BOOTING and now - self.child.born_at > BOOT_S

    def tick(self, now: float) -> None:
        """Start a child when one is wanted and it is time."""
        if self.child is not None and self.child.life is Life.KILLING and self._mounts and self._mounts != mounts_above(self._place):
            logger.bind(child=self.name).info(f"{self.name} (pid {self.child.pid}) hangs on a mount that is gone; it is left to itself")
            self.child = None  # the next tick starts another, when everybody has seen that this one is away
        elif self._wanted and self.child is None and now >= self._start_at:
            self.child = self._nursery.start(
                name=self.name, module=self._module, receives=self._receives, on_frame=self._on_frame, on_exit=self._on_exit
            )
            self.send(self._hello)

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        if self.child is not None:
            self._nursery.send(self.child, message, descriptors)

    def kill(self, why: str) -> None:
        """Not answering: kill it. If it does not even die, it is abandoned where it hangs and named in `down`."""
        if self.child is not None:
            self.down = why
            if self._place and self.child.life is not Life.KILLING:
                self._mounts = mounts_above(self._place)
            self.child.kill(time.monotonic(), why)

    def stop(self) -> None:
        """No child wanted any more."""
        self._wanted = False
        if self.child is not None:
            self.child.drain(time.monotonic())
            self._nursery.watch(self.child)

    def _on_frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        self._handle(child, frame)

    def _on_exit(self, child: Child[Any], how: str) -> None:
        if child is not self.child:  # it was left to itself
            return
        self.child, self._mounts = None, ()
        if not self._wanted:
            return
        now = time.monotonic()
        self._failures = 0 if now - child.born_at > HEALTHY_AFTER_S else self._failures + 1
        pause_s = BOOT_PAUSE.pause_s(self._failures) if self._failures > 1 else 0.0
        self._start_at = now + pause_s
        self.down = f"{self.name} {how}"
        logger.bind(child=self.name).warning(f"{self.name} (pid {child.pid}) {how}; starting it again in {pause_s:g} s")


def _level_of(line: str) -> str:
    word = line.split(" ", 1)[0]
    return word if word in ("TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL") else "WARNING"
