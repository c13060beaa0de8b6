"""waiting: what is still to be done, as the daemon asks for it every few seconds. However many wait, each answer takes milliseconds."""

from __future__ import annotations

from collections.abc import Collection

from whisperd.ledger.reader import JOBS, Reader, Row

BACKLOG_MAX = 10_000
READY_MIN = 8

_READY = "job.state = 'ready' AND job.held = 0"
_FRESH = f"{_READY} AND job.attempts = 0 AND job.needs_mib IS NULL"
_APART = f"{_READY} AND (job.attempts > 0 OR job.needs_mib IS NOT NULL)"
_SPOOLED = f"{_READY} AND job.spooled = 1"
_UNPUBLISHED = "state = 'failed' AND reported_at IS NULL"
_MODEL = "json_extract(job.options, '$.model')"
_INBOXES_WITH_WORK = (  # one that is down has what was copied from it
    "SELECT id, state FROM inbox WHERE active = 1 AND (state = 'up' AND (EXISTS"
    f" (SELECT 1 FROM job INDEXED BY job_waiting WHERE job.inbox_id = inbox.id AND {_FRESH}) OR EXISTS"
    f" (SELECT 1 FROM job INDEXED BY job_waiting_apart WHERE job.inbox_id = inbox.id AND {_APART}))"
    f" OR state = 'down' AND EXISTS (SELECT 1 FROM job INDEXED BY job_spooled WHERE job.inbox_id = inbox.id AND {_SPOOLED}))"
)


def _first(kind: str, index: str, order: str) -> str:
    return (
        f"SELECT id FROM (SELECT id FROM job INDEXED BY {index} WHERE {kind} AND inbox_id = :inbox AND priority = :priority"
        f" AND not_before <= :now ORDER BY {order} LIMIT :each)"
    )


_FIRST_READY = {
    "up": (
        f"{JOBS} WHERE job.id IN ({_first(_FRESH, 'job_waiting', 'ready_at')} UNION {_first(_FRESH, 'job_waiting_short', 'size')}"
        f" UNION {_first(_APART, 'job_waiting_apart', 'ready_at')})"
    ),
    "down": f"{JOBS} WHERE job.id IN ({_first(_SPOOLED, 'job_spooled', 'ready_at')})",
}
_MODELS_THAT_WAIT = (  # one step in the index for each of them, however many jobs there are
    f"WITH RECURSIVE model (name) AS (SELECT min({_MODEL}) FROM job INDEXED BY job_waiting_by_model WHERE {_READY} UNION ALL"
    f" SELECT (SELECT min({_MODEL}) FROM job INDEXED BY job_waiting_by_model WHERE {_READY} AND {_MODEL} > name)"
    " FROM model WHERE name IS NOT NULL)"
    " SELECT name FROM model WHERE name IS NOT NULL"
)
_WAITING_OF_MODEL = (
    "SELECT count(*), min(ready_at) FROM (SELECT job.ready_at FROM job INDEXED BY job_waiting_by_model"
    f" CROSS JOIN inbox ON inbox.id = job.inbox_id WHERE {_READY} AND {_MODEL} = :model AND job.priority = :priority"
    " AND job.not_before <= :now AND inbox.state = 'up' AND inbox.active = 1 ORDER BY job.ready_at LIMIT :most)"
)
_OLDEST_READY = (
    f"SELECT min(first) FROM (SELECT (SELECT min(ready_at) FROM job INDEXED BY job_waiting WHERE {_FRESH}"
    " AND inbox_id = inbox.id AND priority = class.priority) AS first FROM inbox CROSS JOIN class WHERE inbox.active = 1"
    f" UNION ALL SELECT (SELECT min(ready_at) FROM job INDEXED BY job_waiting_apart WHERE {_APART}"
    " AND inbox_id = inbox.id AND priority = class.priority) FROM inbox CROSS JOIN class WHERE inbox.active = 1)"
)


class WaitingQueries(Reader):
    """Read access to what is open."""

    def ready(self, now: float, limit: int = 200) -> list[Row]:
        """Jobs that may run now, in active inboxes that are up, as they came: enough of them to choose well among all.

        Of each inbox and class those that came first, the shortest, and those that ask for a place of their own (an attempt is behind
        them, or they need much memory): of each of these kinds some `limit`, shared among the inboxes. Of an inbox that is down those of
        which there is a copy.
        """
        found: list[Row] = []
        inboxes = self.db.conn.execute(_INBOXES_WITH_WORK).fetchall()
        for inbox, state in inboxes:
            for priority in range(3):
                asked = {"inbox": inbox, "priority": priority, "now": now, "each": max(READY_MIN, limit // len(inboxes))}
                found += self.db.query(_FIRST_READY[state], asked)
        return sorted(found, key=lambda row: (row["priority"], row["ready_at"], row["id"]))

    def backlog(self, now: float, *, default_model: str) -> list[Row]:
        """What waits of each model, in nobody's hands: `model`, `jobs` (counted up to `BACKLOG_MAX` of a class), `oldest_s` (the longest
        wait), `urgent` (jobs of the first class). `default_model` is what "auto" means now."""
        waiting: dict[str, Row] = {}
        for (model,) in self.db.conn.execute(_MODELS_THAT_WAIT).fetchall():
            name = default_model if model == "auto" else model
            for priority in range(3):
                asked = {"model": model, "priority": priority, "now": now, "most": BACKLOG_MAX}
                jobs, first_at = self.db.conn.execute(_WAITING_OF_MODEL, asked).fetchone()
                if jobs:
                    known = waiting.setdefault(name, {"model": name, "jobs": 0, "oldest_s": 0.0, "urgent": 0})
                    known["jobs"] += jobs
                    known["oldest_s"] = max(known["oldest_s"], now - first_at)
                    known["urgent"] += jobs if priority == 0 else 0
        return list(waiting.values())

    def unpublished(self, limit: int = 200, *, but: Collection[bytes] = ()) -> list[Row]:
        """Work for the outboxes `but` these: transcripts, and failures whose error file is not out yet; oldest first."""
        served = f"inbox.active = 1 AND inbox.outbox NOT IN ({', '.join('?' * len(but))})"
        waiting = (
            "SELECT job.id FROM inbox CROSS JOIN job INDEXED BY job_by_state ON job.inbox_id = inbox.id AND job.state = 'transcribed'"
            f" WHERE {served} UNION ALL"
            f" SELECT job.id FROM job INDEXED BY job_unreported CROSS JOIN inbox ON inbox.id = job.inbox_id WHERE job.{_UNPUBLISHED}"
            f" AND {served}"
        )
        found = self.db.query(f"{JOBS} WHERE job.id IN ({waiting} ORDER BY 1 LIMIT ?) ORDER BY job.id", [*but, *but, limit])
        return list(found)

    def open_work(self) -> dict[str, int]:
        """What has to happen before a drained daemon may end, by what it waits for; only inboxes in use count, and nothing that is held."""
        row = next(
            self.db.query(
                "SELECT coalesce(sum(jobs * (tally.state = 'seen')), 0) AS seen,"
                " coalesce(sum(jobs * (tally.state = 'ready' AND NOT held)), 0) AS ready,"
                " coalesce(sum(jobs * (tally.state = 'running')), 0) AS running,"
                " coalesce(sum(jobs * (tally.state = 'transcribed')), 0) AS unpublished"
                " FROM tally JOIN inbox ON inbox.id = tally.inbox_id WHERE inbox.active = 1"
            )
        )
        (failed,) = self.db.conn.execute(
            "SELECT count(*) FROM job INDEXED BY job_unreported JOIN inbox ON inbox.id = job.inbox_id"
            f" WHERE inbox.active = 1 AND job.{_UNPUBLISHED}"
        ).fetchone()
        return {**row, "unpublished": row["unpublished"] + failed}

    def only_waiting_work_left(self) -> str:
        """When all that is open waits for something that is not a file: what that is. "" otherwise."""
        work = self.open_work()
        if work["running"] or work["unpublished"]:
            return ""
        ready = f"FROM job %s CROSS JOIN inbox ON inbox.id = job.inbox_id WHERE {_READY} AND inbox.active = 1 AND "
        waits = self.db.conn.execute(
            "SELECT failure_what " + ready % "INDEXED BY job_postponed" + "failure_kind = 'waiting' ORDER BY job.id LIMIT 1"
        ).fetchone()
        if waits is None:
            return ""
        other = "SELECT 1 " + ready % "INDEXED BY job_by_state" + "job.inbox_id IN (SELECT id FROM inbox) AND failure_kind IS NOT 'waiting'"
        return "" if self.db.conn.execute(other + " LIMIT 1").fetchone() else str(waits[0])

    def oldest_ready_at(self) -> float | None:
        classes = "WITH class (priority) AS (VALUES (0), (1), (2)) "
        row = self.db.conn.execute(classes + _OLDEST_READY).fetchone()
        return None if row[0] is None else float(row[0])

    # --- after the transcript ---

    def owed_disposals(self, limit: int, *, but: Collection[bytes] = ()) -> list[Row]:
        """Jobs whose source is still to be archived or deleted (`disposal`), oldest first; `but` not those of these outboxes."""
        return list(
            self.db.query(
                f"{JOBS} WHERE job.id IN (SELECT job.id FROM job INDEXED BY job_owed JOIN inbox ON inbox.id = job.inbox_id"
                " WHERE job.state = 'done' AND (job.disposal = 'archive' OR job.disposal = 'delete')"
                f" AND inbox.active = 1 AND inbox.outbox NOT IN ({', '.join('?' * len(but))}) ORDER BY job.id LIMIT ?)"
                " ORDER BY job.id",
                [*but, limit],
            )
        )

    def due_notices(self, now: float, limit: int) -> list[Row]:
        """Notices that are owed and whose time has come, the one that waits longest first; `body` is bytes."""
        rows = self.db.query(
            "SELECT * FROM notice INDEXED BY notice_due WHERE state = 'due' AND not_before <= ? ORDER BY not_before, id LIMIT ?",
            [now, limit],
        )
        return [{**row, "body": row["body"].encode()} for row in rows]
