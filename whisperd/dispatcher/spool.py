"""spool: copies of recordings from shares on the local disk, each by the number of its job.

Owns: the directory, how much of it is in use, and what is removed from it. An examiner makes the copies (whole or not at all).
"""

from __future__ import annotations

import os
from collections.abc import Callable

DIRECTORY = "spool"
MIB = 1 << 20


class Spool:
    """The directory of one daemon."""

    def __init__(self, state_dir: str) -> None:
        self.path = os.path.join(state_dir, DIRECTORY)
        os.makedirs(self.path, mode=0o750, exist_ok=True)

    def open(self, job: int) -> int | None:
        """A descriptor of a job's copy, if there is one."""
        try:
            return os.open(os.path.join(self.path, str(job)), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # removed, or the disk fails: the share still has it
            return None

    def used_bytes(self) -> int:
        with os.scandir(self.path) as entries:
            return sum(_size(entry) for entry in entries)

    def free_mib(self) -> int:
        """What is left on its disk for us."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize // MIB

    def sweep(self, wanted: Callable[[int], bool]) -> int:
        """Remove the copies of jobs that need none any more, and what an examiner that was killed left half done; returns how many."""
        removed = 0
        with os.scandir(self.path) as entries:
            for entry in entries:
                number = entry.name.partition(".")[0]
                if not number.isdigit() or not wanted(int(number)):
                    os.unlink(entry.path)
                    removed += 1
        return removed


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except FileNotFoundError:  # removed since the listing
        return 0
