"""python cutter.py SCRATCH SEED CUTS [CARELESS]: cut the power of corridors at random operations, and judge what is found after each.

Owns: two filesystems (ext4, xfs), on which ledger and outbox lie together or apart, and the choice of the moment. One cut in two comes at
a moment drawn from the whole walk (often in the middle of a call), the others right after an exact call. One JSON line for each cut.
CARELESS leaves fsync out of staging and publishing, of "files" or of "folders", and the ledger's in: the losses must then be found.
"""

from __future__ import annotations

import json
import os
import random
import signal
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import loguru
from corridor import Home, Published, faults_after_a_cut, faults_at_the_end, standing, walk
from disks import FLUSH, NO_FLUSH, Disk
from zygote import Call, Ending, Zygote, attached, count

SOURCES = 3
STOP_S = 10.0
LATER_S = 3600.0
CHANGING = frozenset(
    {
        "write",
        "pwrite64",
        "fsync",
        "fdatasync",
        "rename",
        "renameat",
        "link",
        "linkat",
        "unlink",
        "unlinkat",
        "mkdir",
        "mkdirat",
        "ftruncate",
        "fchown",
        "fchmod",
    }
)
WHERE = (("ext4", "ext4"), ("xfs", "xfs"), ("ext4", "xfs"), ("xfs", "ext4"))  # of the ledger, of the outbox


class Cutter:
    """Both disks, an inbox beside them, and what outboxes look like when the power stays on."""

    def __init__(self, scratch: Path, seed: int, *, careless: str) -> None:
        self.chance = random.Random(seed)
        self.disks = {}
        self.scratch = scratch
        self.zygote = Zygote(scratch)
        self.before = CARELESS[careless]
        self.pristine = Home(scratch / "inbox", scratch / "pristine", scratch / "outbox")
        self.pristine.make(SOURCES)
        try:
            for kind in ("ext4", "xfs"):
                self.disks[kind] = Disk(kind, scratch)
            calls, self.walk_s, self.whole = self._calm()
            self.changing = {
                name: [call for call in calls if call.name == name] for name in sorted({call.name for call in calls} & CHANGING)
            }
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        for disk in self.disks.values():
            disk.remove()

    def _home(self, state: str, outbox: str) -> Home:
        home = Home(self.scratch / "inbox", self.disks[state].root / "state", self.disks[outbox].root / "outbox")
        home.begin_anew_like(self.pristine)
        os.sync()
        return home

    def _calm(self) -> tuple[list[Call], float, Published]:
        """The calls of a walk, how long it takes, and what it publishes."""
        walk(self._home("xfs", "ext4"), lambda _: None)  # what is imported on the way is imported by then
        home = self._home("xfs", "ext4")
        took_s = self.zygote.run(home).took_s
        whole = standing(home.outbox)
        home = self._home("xfs", "ext4")
        return count(self.zygote, home), took_s, whole

    def cut(self, number: int) -> dict[str, object]:
        """One walk, cut off; the look after power is back; the recovery; the look."""
        state, outbox = WHERE[number % len(WHERE)]
        how = self.chance.choice((FLUSH, NO_FLUSH, NO_FLUSH, NO_FLUSH))
        home = self._home(state, outbox)
        disks = [self.disks[kind] for kind in sorted({state, outbox})]
        if number % 8 < len(WHERE):
            call = self.chance.choice(self.changing[self.chance.choice(sorted(self.changing))])
            ending, moment = self._cut_after(call, home, disks, how), f"after {call.shown}"
        else:
            after_s = self.chance.uniform(0, 1.2 * self.walk_s)
            ending, moment = self._cut_at(after_s, home, disks, how), f"at {after_s * 1000:.1f} ms"
        for disk in disks:
            disk.power_up()
        wrong = [*faults_after_a_cut(home, self.whole, ending.acknowledged)]
        showed = sum(not name.rpartition("/")[2].startswith(".") for name in standing(home.outbox))
        try:
            walk(home, lambda _: None, later_s=LATER_S)
        except Exception as error:  # noqa: BLE001 - the finding itself
            wrong.append(f"the recovery failed: {type(error).__name__}: {error}")
        wrong += faults_at_the_end(home, self.whole)
        return {
            "wrong": wrong,
            "where": f"ledger on {state}, outbox on {outbox}, cut {number} {'with' if how == FLUSH else 'without'} flush {moment}",
            "acknowledged": len(ending.acknowledged),
            "showed": showed,
        }

    def _cut_at(self, after_s: float, home: Home, disks: list[Disk], how: int) -> Ending:
        pid = self.zygote.spawn(home, self.before)
        self.zygote.report.go()
        time.sleep(after_s)
        return self._dead(pid, disks, how)

    def _cut_after(self, call: Call, home: Home, disks: list[Disk], how: int) -> Ending:
        """Stopped once the call is made (a signal reaches a process when its call returns), then cut."""
        pid = self.zygote.spawn(home, self.before)
        arguments = ("-e", f"trace={call.name}", "-e", f"inject={call.name}:signal=SIGSTOP:when={call.when}")
        trace = self.scratch / "trace"
        with attached(pid, trace, *arguments):
            self.zygote.report.go()
            _await_stop(pid, trace)
            return self._dead(pid, disks, how)

    def _dead(self, pid: int, disks: list[Disk], how: int) -> Ending:
        acknowledged = self.zygote.report.acknowledged()  # before: a filesystem on its way down may call a commit ended that it drops
        for disk in disks:
            disk.cut(how)
        os.kill(pid, signal.SIGKILL)
        return replace(self.zygote.report.ending(os.waitpid(pid, 0)[1]), acknowledged=acknowledged)


def _await_stop(pid: int, trace: Path) -> None:
    """Until strace says that the process is stopped for good, or it is over."""
    until = time.monotonic() + STOP_S
    while time.monotonic() < until:
        over = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
        if over or b"stopped by SIGSTOP" in trace.read_bytes():
            return
        time.sleep(0.001)
    raise RuntimeError("the walk neither stopped nor ended")


def _forget_files() -> None:
    _sync_only(stat.S_ISDIR)


def _forget_folders() -> None:
    _sync_only(stat.S_ISREG)


def _sync_only(wanted: Callable[[int], bool]) -> None:
    """From now on this process makes nothing else durable, where Python does it."""
    fsync = os.fsync

    def careless(descriptor: int) -> None:
        if wanted(os.fstat(descriptor).st_mode):
            fsync(descriptor)

    os.fsync = careless  # type: ignore[assignment]


CARELESS: dict[str, Callable[[], None]] = {"": lambda: None, "files": _forget_files, "folders": _forget_folders}


def main(scratch: Path, seed: int, cuts: int, *, careless: str) -> None:
    loguru.logger.remove()
    cutter = Cutter(scratch, seed, careless=careless)
    try:
        for number in range(cuts):
            print(json.dumps(cutter.cut(number)), flush=True)
    finally:
        cutter.remove()


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), careless="".join(sys.argv[4:]))
