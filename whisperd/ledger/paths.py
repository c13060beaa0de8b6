"""paths: what the ledger knows of files, by their names, inodes and contents. Made for a million of them.

A path is in one of two indexes: that of its live job, or that of those that are over. The watcher reads all paths of its inbox once, as a
stream, and from then on only what moved.
"""

from __future__ import annotations

from collections.abc import Iterator

from whisperd.ledger.reader import IS_LIVE, IS_OVER, Reader, Row, signed

Identity = tuple[bytes, int, int, int, int, int, str]
"""path, dev, inode, size, mtime_ns, ctime_ns, state. Numbers are signed 64-bit, as SQLite has them."""

_IDENTITY = "job.dev, job.inode, job.size, job.mtime_ns, job.ctime_ns, job.state"
_NEWEST_AT = (  # of a path in `moved`
    "(SELECT max(id) FROM (SELECT max(id) AS id FROM job INDEXED BY job_one_live_per_path"
    f" WHERE inbox_id = :inbox AND path = moved.path AND {IS_LIVE}"
    f" UNION ALL SELECT max(id) FROM job INDEXED BY job_over_per_path WHERE inbox_id = :inbox AND path = moved.path AND {IS_OVER}))"
)
_MOVED = (
    "WITH mover (id) AS MATERIALIZED (SELECT DISTINCT job_id FROM event NOT INDEXED WHERE id > :since),"
    " moved (path) AS MATERIALIZED (SELECT path FROM mover CROSS JOIN job ON job.id = mover.id WHERE inbox_id = :inbox"
    " UNION SELECT event.path FROM event NOT INDEXED CROSS JOIN job ON job.id = event.job_id"
    " WHERE event.id > :since AND event.path IS NOT NULL AND inbox_id = :inbox)"
    f" SELECT moved.path, {_IDENTITY} FROM moved LEFT JOIN job ON job.id = {_NEWEST_AT}"
)
NOTHING_THERE = (0, 0, 0, 0, 0, "gone")


class PathQueries(Reader):
    """Read access by path, inode and content."""

    def live_job(self, inbox: int, path: bytes) -> Row | None:
        """The one job of a path whose source is still needed."""
        rows = self.db.query(f"SELECT * FROM job WHERE inbox_id = ? AND path = ? AND {IS_LIVE}", [inbox, path])
        return next(iter(rows), None)

    def latest_job(self, inbox: int, path: bytes) -> Row | None:
        """The newest job of a path, whatever its state."""
        rows = self.db.query(
            f"SELECT * FROM job WHERE inbox_id = :inbox AND path = :path AND {IS_OVER} ORDER BY id DESC LIMIT 1",
            {"inbox": inbox, "path": path},
        )
        live, over = self.live_job(inbox, path), next(iter(rows), None)
        return max((row for row in (live, over) if row is not None), key=lambda row: row["id"], default=None)

    def latest_per_path(self, inbox: int) -> Iterator[Row]:
        """What is known of every path of an inbox: the newest job of each."""
        return self.db.query(
            "SELECT path, dev, inode, size, mtime_ns, ctime_ns, state, max(id) AS id FROM job WHERE inbox_id = ? GROUP BY path", [inbox]
        )

    def identities(self, inbox: int) -> Iterator[Identity]:
        """What is known of every path of an inbox, streamed in the order of the jobs: of a path that comes again, the last word counts."""
        return iter(self.db.conn.execute(f"SELECT path, {_IDENTITY} FROM job NOT INDEXED WHERE inbox_id = ? ORDER BY id", [inbox]))

    def newest_event(self) -> int:
        """The number of the newest event; 0 when there is none. Asked for before `identities`, nothing that moved meanwhile is missed."""
        return int(self.db.conn.execute("SELECT coalesce(max(id), 0) FROM event").fetchone()[0])

    def moved_since(self, event: int, inbox: int) -> Iterator[Identity]:
        """The newest job of every path that a job of this inbox stood at, or left by a rename, when it moved after that event.

        A path without any job comes as "gone". A file that is seen again before it has settled makes no event (who told of it knows):
        the identity of a `seen` row may be an older one.
        """
        for row in self.db.conn.execute(_MOVED, {"since": event, "inbox": inbox}):
            yield row if row[-1] is not None else (row[0], *NOTHING_THERE)

    def by_inode(self, inbox: int, inode: int, size: int, mtime_ns: int) -> list[Row]:
        """Jobs, oldest first, of a file of that inode, size and time: it may have had another name."""
        return list(
            self.db.query(
                "SELECT * FROM job INDEXED BY job_by_inode WHERE inbox_id = ? AND inode = ? AND size = ? AND mtime_ns = ? ORDER BY id",
                [inbox, signed(inode), size, mtime_ns],
            )
        )

    def publications_of_source(self, inbox: int, path: bytes) -> list[Row]:
        """Everything any version of this source has in the outbox."""
        return list(
            self.db.query(
                "SELECT publication.* FROM publication WHERE job_id IN"
                f" (SELECT id FROM job WHERE inbox_id = :inbox AND path = :path AND {IS_LIVE}"
                f" UNION ALL SELECT id FROM job WHERE inbox_id = :inbox AND path = :path AND {IS_OVER})",
                {"inbox": inbox, "path": path},
            )
        )

    # --- contents ---

    def result(self, sha256: str, asked: str) -> Row | None:
        """The stored transcript of this content, asked the same."""
        return next(iter(self.db.query("SELECT * FROM result WHERE sha256 = ? AND asked = ?", [sha256, asked])), None)

    def being_made(self, sha256: str, asked: str, other_than: int) -> bool:
        """Whether another job with this content, asked the same, is running: who waits for it needs no GPU."""
        found = self.db.conn.execute(
            "SELECT 1 FROM job INDEXED BY job_by_content WHERE sha256 = ? AND asked = ? AND state = 'running' AND id <> ?",
            [sha256, asked, other_than],
        )
        return found.fetchone() is not None

    def needed_transcripts(self) -> set[str]:
        """Names of staged files that somebody still needs: as a stored result, or to be published."""
        rows = self.db.conn.execute(
            "SELECT transcript FROM result UNION SELECT transcript FROM job INDEXED BY job_by_state"
            " WHERE inbox_id IN (SELECT id FROM inbox) AND state = 'transcribed'"
        )
        return {row[0] for row in rows}
