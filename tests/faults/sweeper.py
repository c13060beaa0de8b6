"""python sweeper.py SCRATCH: one worker of the fault sweep. Reads points as JSON lines, answers each with what was wrong.

Owns: the homes, used again for every point, and the judgement of one point (`judge`) of the corridor or of a passage. The first line it
says are the calls of each.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import loguru
from corridor import Home, Published, faults_after_a_cut, faults_at_the_end, standing, walk
from passages import PASSAGES, Passage, Undisturbed, begin, faults_after, faults_in_the_end, in_peace, recover, stretch_of
from zygote import Call, Ending, Fault, Zygote, count, disturb

SOURCES = 1
CORRIDOR = "corridor"
INTERRUPTIBLE = ("open", "openat", "read", "pread64", "write", "pwrite64", "fsync", "ftruncate", "fchown", "fchmod", "flock")
"""Not fdatasync: SQLite takes an interrupted one for a failed one. No filesystem that a ledger may lie on interrupts it."""
LATER_S = 3600.0  # what waits is due by then


class Sweeper:
    """A home, what it looks like when nothing goes wrong, and the points one after the other."""

    def __init__(self, scratch: Path) -> None:
        self.pristine = Home(scratch / "inbox", scratch / "pristine", scratch / "outbox")
        self.pristine.make(SOURCES)
        self.home = Home(scratch / "inbox", scratch / "state", scratch / "outbox")
        self.zygote = Zygote(scratch)
        for _ in range(2):  # here and not in a child: what is imported on the way is imported by then, and no child does so any more
            self.home.begin_anew_like(self.pristine)
            walk(self.home, lambda _: None)
        self.home.begin_anew_like(self.pristine)
        self.calls = count(self.zygote, self.home)
        self.whole: Published = standing(self.home.outbox)
        self.untouched = _facts(self.home.inbox)

    def judge(self, fault: Fault) -> dict[str, object]:
        """One point: the fault, the look, the recovery, the look."""
        self.home.begin_anew_like(self.pristine)
        ending, reached = disturb(self.zygote, self.home, fault)
        wrong = [] if reached else ["the call was not reached"]
        wrong += _indecent(ending, fault)
        wrong += faults_after_a_cut(self.home, self.whole, ending.acknowledged)
        try:
            walk(self.home, lambda _: None, later_s=LATER_S)
        except Exception as error:  # noqa: BLE001 - the finding itself
            wrong.append(f"the recovery failed: {type(error).__name__}: {error}")
        wrong += faults_at_the_end(self.home, self.whole)
        if _facts(self.home.inbox) != self.untouched:
            wrong.append("the source was touched")
        return _said(wrong, ending)


class Side:
    """The same for the passages, in a home whose inbox is made anew for every point."""

    def __init__(self, scratch: Path, pristine: Home, zygote: Zygote) -> None:
        self.pristine, self.zygote = pristine, zygote
        self.home = Home(scratch / "drop", scratch / "side", scratch / "answer")
        self.passages = {passage.name: passage for passage in PASSAGES}
        self.whole: dict[str, Undisturbed] = {}
        self.calls: dict[str, list[Call]] = {}
        for passage in PASSAGES:
            for _ in range(2):
                begin(self.home, pristine)
                self.whole[passage.name] = in_peace(self.home, passage)
            begin(self.home, pristine)
            self.calls[passage.name] = count(zygote, self.home, stretch_of(passage))

    def judge(self, passage: Passage, fault: Fault) -> dict[str, object]:
        begin(self.home, self.pristine)
        whole = self.whole[passage.name]
        ending, reached = disturb(self.zygote, self.home, fault, stretch_of(passage))
        wrong = [] if reached else ["the call was not reached"]
        wrong += _indecent(ending, fault)
        wrong += faults_after(self.home, passage, whole, ending.acknowledged)
        told = list(ending.acknowledged)
        try:
            recover(self.home, passage, told.append, LATER_S)
        except Exception as error:  # noqa: BLE001 - the finding itself
            wrong.append(f"the recovery failed: {type(error).__name__}: {error}")
        wrong += faults_in_the_end(self.home, passage, whole, told)
        return _said(wrong, ending)


def _said(wrong: list[str], ending: Ending) -> dict[str, object]:
    return {"wrong": wrong, "named": ending.named, "killed": ending.killed, "done": bool(ending.acknowledged)}


def _indecent(ending: Ending, fault: Fault) -> list[str]:
    """What is wrong with the way a walk ended.

    A call that a signal may interrupt (POSIX; signal(7)) is made again, and nothing shows: that it is so costs one look at most, the
    file being taken up by the next. Elsewhere EINTR is an error like any other.
    """
    if ending.bare:
        return [f"it ended without a name: {ending.bare}"]
    if fault.name == "EINTR" and fault.call in INTERRUPTIBLE and ending.named:
        return [f"an interrupted call showed: {ending.named}"]
    return []


def _facts(inbox: Path) -> dict[str, tuple[int, int, int, int, bytes]]:
    """All that a reader must leave as it is (the time of the last access is the filesystem's)."""
    found = {}
    for path in sorted(inbox.rglob("*.wav")):
        known = path.stat()
        found[str(path)] = (known.st_ino, known.st_mtime_ns, known.st_ctime_ns, known.st_nlink, path.read_bytes())
    return found


def main(scratch: Path) -> None:
    loguru.logger.remove()
    sweeper = Sweeper(scratch)
    side = Side(scratch, sweeper.pristine, sweeper.zygote)
    calls = {CORRIDOR: sweeper.calls, **side.calls}
    print(json.dumps([(name, call.name, call.when, call.shown) for name, found in calls.items() for call in found]), flush=True)
    for line in sys.stdin:
        name, *point = json.loads(line)
        fault = Fault(*point)
        print(json.dumps(sweeper.judge(fault) if name == CORRIDOR else side.judge(side.passages[name], fault)), flush=True)


if __name__ == "__main__":
    os.umask(0o022)
    main(Path(sys.argv[1]))
