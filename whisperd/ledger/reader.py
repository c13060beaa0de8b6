"""reader: what every reading of the ledger needs: a connection, and one job by its number."""

from __future__ import annotations

from typing import Any

from sqlite_utils import Database

Row = dict[str, Any]

JOBS = "SELECT job.*, inbox.path AS inbox_path, inbox.outbox AS outbox FROM job CROSS JOIN inbox ON inbox.id = job.inbox_id"
"""Jobs with the paths of their inbox and outbox. CROSS: the jobs are what is gone through."""

IS_LIVE = "(job.state = 'seen' OR job.state = 'ready' OR job.state = 'running')"
IS_OVER = "job.state <> 'seen' AND job.state <> 'ready' AND job.state <> 'running'"
"""As the two indexes of paths have it, word by word: a path is in one of them."""


class Reader:
    """Read access to one ledger."""

    def __init__(self, db: Database, state_dir: str) -> None:
        self.db = db
        self.state_dir = state_dir

    def exists(self, job: int) -> bool:
        try:
            return self.db.conn.execute("SELECT 1 FROM job WHERE id = ?", [job]).fetchone() is not None
        except OverflowError:  # no number that SQLite could hold
            return False

    def job(self, job: int) -> Row:
        """One job with the paths of its inbox and outbox. Raises LookupError."""
        if self.exists(job):
            for row in self.db.query(f"{JOBS} WHERE job.id = ?", [job]):
                return row
        raise LookupError(f"no job {job}")

    def inboxes(self, *, active_only: bool = True) -> list[Row]:
        return list(self.db.table("inbox").rows_where("active = 1" if active_only else None, order_by="id"))


def signed(number: int) -> int:
    """SQLite integers are signed 64-bit; some network filesystems use inode numbers above that."""
    return number - (1 << 64) if number >= 1 << 63 else number
