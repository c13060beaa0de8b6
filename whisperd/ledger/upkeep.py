"""upkeep: what keeps the ledger small and its file in order.

Fails as `store` does.
"""

from __future__ import annotations

from whisperd.ledger.connection import write_lock
from whisperd.ledger.store import Store


class Upkeep(Store):
    """Checkpoints of the WAL, retention, the end."""

    def truncate_wal(self) -> bool:
        """Checkpoint the WAL into the file; False when a reader was in the way (the next one will do)."""
        if self._depth:  # asked within a transaction of ours, which holds the lock
            return False
        with self._turn, write_lock(self.state_dir):
            (patience_ms,) = self.db.conn.execute("PRAGMA busy_timeout").fetchone()
            self.db.conn.execute("PRAGMA busy_timeout = 0")  # whoever waits here keeps every writer waiting
            try:
                busy, _, _ = self.db.conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self.db.conn.execute(f"PRAGMA busy_timeout = {patience_ms}")
            return not busy

    def prune(self, *, readings_before: float, events_before: float) -> int:
        """Drop old readings, minutes, samples, plans, notices and the history of jobs that ended before; returns rows dropped.

        Jobs themselves stay, and so does all that was learned.
        """
        with self.transaction():
            dropped = 0
            for statement in (
                "DELETE FROM reading WHERE at < ?",
                "DELETE FROM throughput WHERE at < ?",
                "DELETE FROM card_minute WHERE at < ?",
                "DELETE FROM plan WHERE at < ? AND id <> (SELECT max(id) FROM plan)",
            ):
                dropped += self.db.conn.execute(statement, [readings_before]).rowcount
            dropped += self.db.conn.execute(
                "DELETE FROM event WHERE job_id IN (SELECT id FROM job WHERE ended_at < ?)", [events_before]
            ).rowcount
            dropped += self.db.conn.execute("DELETE FROM notice WHERE state <> 'due' AND created_at < ?", [events_before]).rowcount
            return dropped

    def drop_results(self, max_bytes: int, before: float) -> list[str]:
        """Forget stored transcripts not used since `before`, and of the others those used longest ago, until `max_bytes` hold the rest.

        Returns the staged files that nobody needs any more: neither another result nor a job that is still to be published.
        """
        with self.transaction():
            dropped = list(
                self.db.query(
                    "SELECT sha256, asked, transcript FROM (SELECT *, sum(bytes) OVER (ORDER BY used_at DESC, job_id DESC, asked"
                    " ROWS UNBOUNDED PRECEDING) AS with_newer FROM result) WHERE used_at < ? OR with_newer > ?",
                    [before, max_bytes],
                )
            )
            self.db.conn.executemany(
                "DELETE FROM result WHERE sha256 = ? AND asked = ?", [(row["sha256"], row["asked"]) for row in dropped]
            )
            return sorted({row["transcript"] for row in dropped} - self.needed_transcripts())

    def close(self) -> None:
        """The last connection checkpoints when it closes, so closing holds the lock as any checkpoint does."""
        with self._turn, write_lock(self.state_dir):
            self.db.conn.close()
