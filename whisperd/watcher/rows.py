"""rows: what the ledger says of one inbox, followed as it changes. Reads the ledger only.

Owns: when the ledger is asked, and for how much: for what moved since the last look, or for everything, when that is more than a little or
some time has passed (a row that was removed leaves no trace of that). Fails with the errors of the ledger's reader.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from whisperd.ledger.queries import Queries
from whisperd.vocabulary import Sighting, State
from whisperd.watcher.known import KnownPaths, KnownRow

MOVED_MAX = 20_000  # events; for more than that everything is read
RENEW_S = 3600.0


class Rows:
    """The newest job of every path of one inbox."""

    def __init__(self, state_dir: str, inbox: int) -> None:
        self.known = KnownPaths()
        self._queries = Queries.open(state_dir)
        self._inbox = inbox
        self._version = -1
        self._event = -1
        self._renewed_at = -inf

    def close(self) -> None:
        self._queries.close()

    def catch_up(self, now: float) -> set[bytes] | None:
        """Follow the ledger before a scan. Returns the directories in which files have to be looked at again though nothing changed in
        them; None for all."""
        if now < self._renewed_at + RENEW_S and (found := self.follow()) is not None:
            return found
        self.known = KnownPaths()  # before the new one is made: there is room for one
        self._version, self._event = self._queries.data_version(), self._queries.newest_event()
        self.known = KnownPaths(self.all())
        self._renewed_at = now
        return None

    def follow(self) -> set[bytes] | None:
        """Take over what moved. Returns directories as `catch_up` does; None when too much moved for that, and nothing was taken over."""
        version = self._queries.data_version()
        if version == self._version:
            return set()
        newest = self._queries.newest_event()
        if newest - self._event > MOVED_MAX:
            return None
        moved = list(self._queries.moved_since(self._event, self._inbox)) if newest != self._event else []
        self._version, self._event = version, newest
        self.known.update(moved)
        return {row[0].rpartition(b"/")[0] for row in moved if row[-1] in (State.SEEN, State.GONE)}

    def all(self) -> Iterable[KnownRow]:
        """Every row, from the ledger."""
        return self._queries.identities(self._inbox)

    def twins(self, sighting: Sighting) -> Iterable[tuple[bytes, int, str]]:
        """Path, device and state of the jobs of the inbox whose source had this inode, size and mtime."""
        rows = self._queries.by_inode(self._inbox, sighting.inode, sighting.size, sighting.mtime_ns)
        return [(bytes(row["path"]), row["dev"], row["state"]) for row in rows]
