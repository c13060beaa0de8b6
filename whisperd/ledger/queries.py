"""queries: everything that is read from the ledger. Never writes; works on a read-only connection as well.

Here are the jobs, one by one and as lists. What waits is in `waiting`, what is known of files in `paths`, figures are in `figures`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import msgspec

from whisperd.ledger.backups import copy_whole
from whisperd.ledger.connection import LedgerBroken, LedgerStuck, open_for_reading
from whisperd.ledger.figures import LEARNED_KEY, QUALITIES, FigureQueries
from whisperd.ledger.paths import PathQueries
from whisperd.ledger.reader import JOBS, Row
from whisperd.ledger.waiting import WaitingQueries
from whisperd.vocabulary import JobOptions, Media, State, Window

__all__ = ["LEARNED_KEY", "QUALITIES", "Queries", "Row"]


@lru_cache(maxsize=256)
def _options(text: str) -> JobOptions:
    return msgspec.json.decode(text, type=JobOptions)


class Queries(WaitingQueries, PathQueries, FigureQueries):
    """Read access to one ledger."""

    @classmethod
    def open(cls, state_dir: str) -> Queries:
        """Open read-only. Raises StateDirError, LedgerBroken."""
        return cls(open_for_reading(state_dir), state_dir)

    def close(self) -> None:
        self.db.conn.close()

    def data_version(self) -> int:
        """Changes when another connection has committed: how the daemon notices the command line."""
        return int(self.db.conn.execute("PRAGMA data_version").fetchone()[0])

    # --- jobs ---

    def jobs(
        self, *, state: str | None = None, inbox: bytes | None = None, quality: str | None = None, limit: int = -1, newest: bool = False
    ) -> Iterator[Row]:
        """Jobs of that state, inbox and verdict, by their numbers: the first `limit` of them (-1: all), or the newest."""
        order = "DESC" if newest else "ASC"
        if state is None and inbox is None and quality is None:
            return self.db.query(f"{JOBS} ORDER BY job.id {order} LIMIT ?", [limit])
        ids = self._ids(state, inbox, quality, f"ORDER BY id {order} LIMIT {int(limit)}")
        chosen = sorted(ids, reverse=newest)[: limit if limit >= 0 else None]
        wanted = {"ids": str(chosen), "state": state, "quality": quality}  # asked for once more: somebody may have moved one meanwhile
        return self.db.query(
            f"{JOBS} WHERE job.id IN (SELECT value FROM json_each(:ids)) AND job.state = coalesce(:state, job.state)"
            f" AND job.quality IS coalesce(:quality, job.quality) ORDER BY job.id {order}",
            wanted,
        )

    def _ids(self, state: str | None, inbox: bytes | None, quality: str | None, order_and_limit: str) -> list[int]:
        """Numbers of jobs, from one place in an index for each inbox and state: there they lie in order."""
        inboxes = [row["id"] for row in self.inboxes(active_only=False) if inbox in (None, row["path"])]
        states = [state] if state is not None else [known.value for known in State]
        index, verdict = ("job_by_state", "") if quality is None else ("job_by_quality", "AND quality = :quality")
        statement = f"SELECT id FROM job INDEXED BY {index} WHERE inbox_id = :inbox AND state = :state {verdict} {order_and_limit}"
        found: list[int] = []
        for number in inboxes:
            for one in states:
                asked = {"inbox": number, "state": one, "quality": quality}
                found += [row[0] for row in self.db.conn.execute(statement, asked)]
        return found

    def running(self) -> list[Row]:
        return list(self.jobs(state="running"))

    def options(self, row: Mapping[str, Any]) -> JobOptions:
        """What was asked for a job: mostly the same as for thousands of others."""
        return _options(row["options"])

    def media(self, row: Row) -> Media | None:
        """What the container said of a job's file; None when it was not examined."""
        return None if row["media"] is None else msgspec.json.decode(row["media"], type=Media)

    def windows(self, job: int) -> list[Window]:
        """Finished windows of a job, in order."""
        rows = self.db.table("checkpoint").rows_where("job_id = ?", [job], order_by="window_index")
        return [msgspec.json.decode(row["body"], type=Window) for row in rows]

    def front_end(self, job: int) -> bytes:
        """The front end's state after the last finished window; empty when it is not known."""
        rows = self.db.query("SELECT front_end FROM checkpoint WHERE job_id = ? ORDER BY window_index DESC LIMIT 1", [job])
        return next((bytes(row["front_end"]) for row in rows if row["front_end"] is not None), b"")

    def events(self, job: int) -> list[Row]:
        return list(self.db.table("event").rows_where("job_id = ?", [job], order_by="id"))

    def publications(self, job: int) -> list[Row]:
        return list(self.db.table("publication").rows_where("job_id = ?", [job], order_by="path"))

    # --- the file itself ---

    def integrity(self) -> str:
        """'ok', or what SQLite found."""
        try:
            return str(self.db.conn.execute("PRAGMA integrity_check").fetchone()[0])
        except (sqlite3.DatabaseError, LedgerBroken, LedgerStuck) as error:  # damaged beyond checking
            return str(error)

    def backup(self, target: str) -> None:
        """Copy the whole ledger while it is in use; the copy appears whole under its name or not at all."""
        source = open_for_reading(self.state_dir).conn  # its own connection: what is not committed yet stays out of the copy
        try:
            copy_whole(source, target)
        except (sqlite3.OperationalError, OSError) as error:
            raise LedgerStuck(
                f"cannot back the ledger up to {target}: {error}", hint="is the directory there, and has the disk room?"
            ) from error
        finally:
            source.close()
