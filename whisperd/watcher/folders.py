"""folders: which directories need not be listed again (pure).

Owns: what one watcher remembers of the directories of its inbox. A directory whose inode, mtime and ctime stand still has the same entries,
if it was listed at least `COARSE_S` after it was first met in that state: by then a clock of coarse steps had moved on. No clock of
another machine is compared with ours. File systems whose directories do not tell of changes (some FUSE ones) are found out: a time of zero
is not believed, and entries that changed while the directory says nothing for `LIE_S` make every directory be listed always.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

COARSE_S = 2.5  # FAT has steps of two seconds
LIE_S = 65.0  # clients of NFS may show an old mtime for a minute
FOLDERS_MAX = 100_000  # more are not remembered, and listed always


class Stamp(NamedTuple):
    """What changes when an entry is made, renamed or removed."""

    inode: int
    mtime_ns: int
    ctime_ns: int


class Contents(NamedTuple):
    """What a listing found. `names` is a digest of all entries' names, whatever their order; `below` the folders to enter."""

    names: int
    entries: int
    files: int
    left_out: int
    below: tuple[bytes, ...]


@dataclass(slots=True)
class Folder:
    """One directory as it was listed last."""

    stamp: Stamp
    since: float  # when it was first met with this stamp
    contents: Contents
    sure: bool  # the listing was late enough
    contradicted: float | None  # since when its entries changed without a change of its stamp
    visit: int


class Folders:
    """All directories of one inbox, by their path below it. Time is passed in: seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._known: dict[bytes, Folder] = {}
        self._doubted: frozenset[bytes] = frozenset()
        self._everything = True
        self._visit = 0
        self.lying = False

    def begin(self, *, everything: bool, doubted: Iterable[bytes] = ()) -> None:
        """A walk begins. Whatever it meets is listed with `everything`; otherwise what changed, and what is `doubted`."""
        self._visit += 1
        self._everything = everything or self.lying
        self._doubted = frozenset(doubted)

    def unchanged(self, path: bytes, stamp: Stamp) -> Contents | None:
        """What is in the directory, where that is known without a listing."""
        folder = self._known.get(path)
        if folder is None or folder.stamp != stamp:
            return None
        folder.visit = self._visit
        if self._everything or not folder.sure or folder.contradicted is not None or path in self._doubted:
            return None
        return folder.contents

    def listed(self, path: bytes, before: Stamp, after: Stamp, contents: Contents, now: float) -> None:
        """It was listed: `before` and `after` are its stamps around that, `now` is when it began."""
        known = self._known.get(path)
        if known is None or known.stamp != before:
            if known is not None or len(self._known) < FOLDERS_MAX:
                self._known[path] = Folder(before, now, contents, sure=False, contradicted=None, visit=self._visit)
            return
        if known.sure and known.contents.names != contents.names and before == after and known.contradicted is None:
            known.contradicted = now
        elif known.contradicted is not None and now - known.contradicted > LIE_S:
            self.lying = True
        known.sure = before.mtime_ns != 0 and now >= known.since + COARSE_S
        known.contents = contents
        known.visit = self._visit

    def forget(self, path: bytes) -> None:
        """Nothing is known of this directory."""
        self._known.pop(path, None)

    def end(self) -> None:
        """The walk met every directory there is."""
        gone = [path for path, folder in self._known.items() if folder.visit != self._visit]
        for path in gone:
            del self._known[path]
