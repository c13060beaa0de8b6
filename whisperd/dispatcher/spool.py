"""spool: copies of recordings from shares on the local disk, each by the number of its job.

Owns: the directory, how much of it is in use, and what is removed from it. An examiner makes the copies (whole or not at all). A disk that
fails here stops nobody: what cannot be listed takes no copies, and what cannot be removed is tried again with the next sweep.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress

DIRECTORY = "spool"
MIB = 1 << 20
NO_ROOM_BYTES = 1 << 62


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
        """`NO_ROOM_BYTES` where nobody can say."""
        try:
            with os.scandir(self.path) as entries:
                return sum(_size(entry) for entry in entries)
        except OSError:
            return NO_ROOM_BYTES

    def free_mib(self) -> int:
        """What is left on its disk for us."""
        found = os.statvfs(self.path)
        return found.f_bavail * found.f_frsize // MIB

    def could_hold(self, size: int, free_min_mib: int) -> bool:
        """Whether a copy of so many bytes would leave enough free if nothing else of ours lay on its disk."""
        try:
            found = os.statvfs(self.path)
        except OSError:
            return False
        return size + free_min_mib * MIB <= found.f_blocks * found.f_frsize

    def sweep(self, wanted: Callable[[int], bool]) -> int:
        """Remove the copies of jobs that need none any more, and what an examiner that was killed left half done; returns how many."""
        removed = 0
        for name in self._names():
            number = name.partition(".")[0]
            if not number.isdigit() or not wanted(int(number)):
                with suppress(OSError):  # an examiner may have been faster; anything else shows where it matters, in a copy that fails
                    os.unlink(os.path.join(self.path, name))
                    removed += 1
        return removed

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.path)
        except OSError:
            return []


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat(follow_symlinks=False).st_size
    except OSError:  # removed since the listing
        return 0
