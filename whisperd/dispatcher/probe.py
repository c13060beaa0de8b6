"""probe process: the only importer of NVML, which can hang in the kernel or crash (OPTIMISER.md §2).

The wire is standard input. It sends `Readings` every `interval_s`: one for each GPU it knows, or one that says plainly why there is none.
NVML stays open from look to look; it is opened anew when it, or a GPU, does not answer any more, less and less often while that does not
help. When the driver's library is replaced under it the process ends: only a new one can load the new library.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any

import msgspec
from loguru import logger

from whisperd.dispatcher import nvml, xid
from whisperd.dispatcher.nvml import Card, Session
from whisperd.dispatcher.xid import KernelLine
from whisperd.log import to_parent
from whisperd.vocabulary import Reading, Xid
from whisperd.wire import Channel, ProbeIn, Readings, StartProbe, WireClosed, join_daemon

KERNEL_LOG = "/dev/kmsg"
KERNEL_READS_MAX = 1000  # of one look
KERNEL_LOOKS = 5  # the kernel's line comes first, NVML's event may come a look later
RETRY_LOOKS_MAX = 300  # 5 minutes at one look a second
REOPEN_LOOKS_MAX = 60
MPS_LOOKS = 30

Look = Callable[[], tuple[Reading, ...]]


def in_container() -> bool:
    """Whether this process lives in a container (podman, docker, systemd-nspawn say so in one of these ways)."""
    return bool(os.environ.get("container")) or os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv")  # noqa: SIM112


class KernelLog:
    """XIDs in the kernel's log: it names the process, which NVML does not. Often it may not be read; then there is nothing in it."""

    def __init__(self, path: str) -> None:
        self._fd: int | None = None
        self._told: list[tuple[int, KernelLine]] = []  # with the look that found it
        self._looks = 0
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)
        except OSError:  # not for us: no privilege, or a container
            pass

    @property
    def readable(self) -> bool:
        return self._fd is not None

    def read(self) -> None:
        """What is new in it. What nobody asked for is forgotten after a few looks."""
        self._looks += 1
        self._told = [(look, line) for look, line in self._told if self._looks - look < KERNEL_LOOKS]
        for line in self._lines():
            if told := xid.parse_kernel_line(line):
                self._told.append((self._looks, told))

    def take(self, pci: tuple[int, ...] | None, codes: list[int] | None) -> tuple[Xid, ...]:
        """NVML's events of a GPU, with their processes where they are named here; where NVML tells none (None), what the log tells."""
        here = [line.xid for _, line in self._told if line.pci == pci]
        found = tuple(here) if codes is None else xid.name_processes(codes, here)
        left = list(found)
        kept = []
        for look, line in self._told:
            if line.pci == pci and line.xid in left:
                left.remove(line.xid)
            else:
                kept.append((look, line))
        self._told = kept
        return found

    def _lines(self) -> Iterator[str]:
        for _ in range(KERNEL_READS_MAX if self._fd is not None else 0):
            try:
                data = os.read(self._fd or 0, 8192)
            except BrokenPipeError:  # records were overwritten before we came
                continue
            except OSError:  # no more for now
                return
            if not data:
                return
            yield from data.decode("utf-8", "replace").splitlines()


class Pause:
    """How many looks pass before something is tried again: 1, 2, 4, … `most`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._tries = 0
        self._left = 0

    def over(self) -> bool:
        """Counts one look."""
        self._left = max(0, self._left - 1)
        return self._left == 0

    def grow(self) -> None:
        self._left = min(self._most, 2**self._tries)
        self._tries = min(self._tries + 1, 16)

    def end(self) -> None:
        self._tries = self._left = 0


class Probe:
    """All looks of one process, with the bindings to NVML."""

    def __init__(self, bindings: Any, *, kernel_log: str) -> None:
        self._bindings = bindings
        self._kernel_log = KernelLog(kernel_log)
        self._session: Session | None = None
        self._known: dict[str, str] = {}  # every GPU seen in this life, with its name
        self._told: tuple[Reading, ...] = ()  # what is said until NVML is tried again
        self._retry = Pause(RETRY_LOOKS_MAX)
        self._reopen = Pause(REOPEN_LOOKS_MAX)
        self._looks = 0
        self._mps: bool | None = None

    @property
    def outdated(self) -> bool:
        """Whether only a new process can load the driver's library that is there now."""
        return self._session is not None and self._session.replaced()

    def look(self) -> tuple[Reading, ...]:
        """One reading for each GPU; every failure of NVML is a reading. Raises Stuck."""
        if self._looks % MPS_LOOKS == 0:
            self._mps = mps_runs()
        self._looks += 1
        if self._session is None and not self._retry.over():
            return self._told
        try:
            session = self._opened()
            readings = self._measure(session)
        except self._bindings.NVMLError as error:
            status, what = nvml.trouble(error.value, str(error), in_container=in_container())
            return self._without(status, what)
        if not readings:  # one may be plugged in: NVML only knows those it found when it was opened
            return self._without("no_gpu", f"no GPU: the driver {session.driver} knows none")
        self._retry.end()
        self._begin_anew_where_it_may_help(readings)
        return readings

    def close(self) -> None:
        """Raises Stuck."""
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def _opened(self) -> Session:
        """NVML, opened anew if it does not answer or its GPUs changed. Raises NVMLError, Stuck."""
        try:
            if self._session is not None and self._session.check():
                return self._session
        except self._bindings.NVMLError:  # what is wrong is told by the attempt to open it anew
            pass
        self.close()
        self._session = Session(self._bindings)
        return self._session

    def _without(self, status: str, what: str) -> tuple[Reading, ...]:
        self.close()
        self._retry.grow()
        self._told = (Reading(gpu="", status=status, what=what),)
        return self._told

    def _begin_anew_where_it_may_help(self, readings: tuple[Reading, ...]) -> None:
        """A GPU that came back is found again only by opening NVML again."""
        if all(reading.status == "ok" for reading in readings):
            self._reopen.end()
        elif self._reopen.over():
            self._reopen.grow()
            self.close()

    def _measure(self, session: Session) -> tuple[Reading, ...]:
        codes = {card.uuid: session.events.take(card.uuid) for card in session.cards.values()}
        self._kernel_log.read()  # after the events: the line of each of them is there by now
        readings = []
        for card in session.cards.values():
            self._known[card.uuid] = card.name
            readings.append(self._with_xids(self._read(card), self._kernel_log.take(card.pci, codes[card.uuid]), codes[card.uuid]))
        return (*readings, *self._absent(session))

    def _read(self, card: Card) -> Reading:
        try:
            return card.read(self._mps)
        except self._bindings.NVMLError as error:
            if error.value == nvml.NOT_INITIALISED:
                raise
            return _failed(card.uuid, card.name, error, card.driver)

    def _absent(self, session: Session) -> list[Reading]:
        """GPUs that cannot be opened, and those that were there and are not named any more."""
        missing = [uuid for uuid in self._known if uuid not in session.cards]
        found = []
        for number, (uuid, error) in enumerate(zip_longest(missing, session.unreachable)):
            told = error or self._bindings.NVMLError(nvml.GPU_IS_LOST)
            found.append(_failed(uuid or f"#{number}", self._known.get(uuid, "GPU"), told, session.driver))
        return found

    def _with_xids(self, reading: Reading, xids: tuple[Xid, ...], codes: list[int] | None) -> Reading:
        deaf = codes is None and not self._kernel_log.readable
        return msgspec.structs.replace(reading, xids=xids, unsupported=(*reading.unsupported, "xids") if deaf else reading.unsupported)


def _failed(uuid: str, name: str, error: Any, driver: str) -> Reading:
    status, what = nvml.trouble(error.value, str(error), in_container=in_container())
    return Reading(gpu=uuid, status=status, what=f"{name}: {what}", name=name, driver=driver)


def mps_runs() -> bool | None:
    """Whether an MPS server or its control daemon lives on this machine; None where the processes of others are hidden from us."""
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/comm", encoding="utf-8", errors="replace") as name:
                    if name.read().startswith("nvidia-cuda-mps"):  # the kernel keeps 15 letters of a name
                        return True
            except OSError:  # it ended meanwhile
                continue
    return False if os.path.exists("/proc/1") and not in_container() else None


def serve(channel: Channel[ProbeIn], look: Look, outdated: Callable[[], bool]) -> None:
    """Look and tell until asked to stop."""
    interval_s: float | None = None
    took_s = 0.0
    while True:
        for frame in channel.wait(None if interval_s is None else max(0.0, interval_s - took_s)):
            if not isinstance(frame.message, StartProbe):
                return
            interval_s = frame.message.interval_s
        if interval_s is None:
            continue
        began = time.monotonic()
        readings = look()
        took_s = time.monotonic() - began
        channel.send_all(Readings(readings=readings, took_s=took_s))
        if outdated():
            logger.info("the GPU driver's library was replaced: the probe begins anew with the new one")
            return


def main() -> int:
    to_parent()
    channel: Channel[ProbeIn] = join_daemon(ProbeIn)
    try:
        import pynvml
    except ImportError as error:
        none = Reading(gpu="", status="no_driver", what=f"no GPU: the NVML bindings cannot be imported ({error})")
        return _run(channel, lambda: (none,), outdated=lambda: False, close=lambda: None)
    probe = Probe(pynvml, kernel_log=KERNEL_LOG)
    return _run(channel, probe.look, outdated=lambda: probe.outdated, close=probe.close)


def _run(channel: Channel[ProbeIn], look: Look, *, outdated: Callable[[], bool], close: Callable[[], None]) -> int:
    try:
        serve(channel, look, outdated)
        close()
    except WireClosed:
        pass
    except nvml.Stuck as error:
        logger.warning(f"the probe ends: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
