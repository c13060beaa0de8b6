"""queries: everything that is read from the ledger. Never writes; works on a read-only connection as well."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator
from typing import Any

import msgspec
from sqlite_utils import Database

from whisperd.ledger.connection import LedgerStuck, open_for_reading
from whisperd.vocabulary import CardMinute, JobOptions, State, Window

Row = dict[str, Any]

QUALITIES = ("good", "second_pass", "doubtful")
JOB_COLUMNS = "job.*, inbox.path AS inbox_path, inbox.outbox AS outbox"
_JOBS = f"SELECT {JOB_COLUMNS} FROM job JOIN inbox ON inbox.id = job.inbox_id"
LEARNED_KEY = ("gpu", "driver", "model", "compute_type", "batch")
BACKLOG_MAX = 10_000
READY_MIN = 8

_READY = "job.state = 'ready' AND job.held = 0"
_FRESH = f"{_READY} AND job.attempts = 0 AND job.needs_mib IS NULL"
_APART = f"{_READY} AND (job.attempts > 0 OR job.needs_mib IS NOT NULL)"
_MODEL = "json_extract(job.options, '$.model')"
_INBOXES_WITH_WORK = (
    "SELECT id FROM inbox WHERE state = 'up' AND active = 1 AND (EXISTS"
    f" (SELECT 1 FROM job INDEXED BY job_waiting WHERE job.inbox_id = inbox.id AND {_FRESH}) OR EXISTS"
    f" (SELECT 1 FROM job INDEXED BY job_waiting_apart WHERE job.inbox_id = inbox.id AND {_APART}))"
)


def _first(kind: str, index: str, order: str) -> str:
    return (
        f"SELECT id FROM (SELECT id FROM job INDEXED BY {index} WHERE {kind} AND inbox_id = :inbox AND priority = :priority"
        f" AND not_before <= :now ORDER BY {order} LIMIT :each)"
    )


_FIRST_READY = (
    f"{_JOBS} WHERE job.id IN ({_first(_FRESH, 'job_waiting', 'ready_at')} UNION {_first(_FRESH, 'job_waiting_short', 'size')}"
    f" UNION {_first(_APART, 'job_waiting_apart', 'ready_at')})"
)
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


class Queries:
    """Read access to one ledger."""

    def __init__(self, db: Database, state_dir: str) -> None:
        self.db = db
        self.state_dir = state_dir

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

    def exists(self, job: int) -> bool:
        try:
            return bool(self.db.table("job").count_where("id = ?", [job]))
        except OverflowError:  # no number that SQLite could hold
            return False

    def job(self, job: int) -> Row:
        """One job with the paths of its inbox and outbox. Raises LookupError."""
        if self.exists(job):
            for row in self.db.query(f"{_JOBS} WHERE job.id = ?", [job]):
                return row
        raise LookupError(f"no job {job}")

    def jobs(
        self, *, state: str | None = None, inbox: bytes | None = None, quality: str | None = None, limit: int = -1, newest: bool = False
    ) -> Iterator[Row]:
        columns = {"state": "job.state", "inbox": "inbox.path", "quality": "job.quality"}
        wanted = {name: value for name, value in (("state", state), ("inbox", inbox), ("quality", quality)) if value is not None}
        condition = " AND ".join(f"{columns[name]} = :{name}" for name in wanted) or "TRUE"
        order = "DESC" if newest else "ASC"
        return self.db.query(f"{_JOBS} WHERE {condition} ORDER BY job.id {order} LIMIT :limit", {**wanted, "limit": limit})

    def live_job(self, inbox: int, path: bytes) -> Row | None:
        """The one job of a path whose source is still needed."""
        rows = self.db.table("job").rows_where("inbox_id = ? AND path = ? AND state IN ('seen', 'ready', 'running')", [inbox, path])
        return next(iter(rows), None)

    def latest_job(self, inbox: int, path: bytes) -> Row | None:
        """The newest job of a path, whatever its state."""
        rows = self.db.table("job").rows_where("inbox_id = ? AND path = ?", [inbox, path], order_by="id desc", limit=1)
        return next(iter(rows), None)

    def latest_per_path(self, inbox: int) -> Iterator[Row]:
        """What is known of every path of an inbox: the newest job of each."""
        return self.db.query(
            "SELECT path, dev, inode, size, mtime_ns, ctime_ns, state, max(id) AS id FROM job WHERE inbox_id = ? GROUP BY path", [inbox]
        )

    def ready(self, now: float, limit: int = 200) -> list[Row]:
        """Jobs that may run now, in active inboxes that are up, as they came: enough of them to choose well among all.

        Of each inbox and class those that came first, the shortest, and those that ask for a place of their own (an attempt is behind
        them, or they need much memory): of each of these kinds some `limit`, shared among the inboxes.
        """
        found: list[Row] = []
        inboxes = self.db.conn.execute(_INBOXES_WITH_WORK).fetchall()
        for (inbox,) in inboxes:
            for priority in range(3):
                asked = {"inbox": inbox, "priority": priority, "now": now, "each": max(READY_MIN, limit // len(inboxes))}
                found += self.db.query(_FIRST_READY, asked)
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

    def arrivals(self, since: float) -> list[Row]:
        """The jobs that were there at any time since then, as they came, for whoever replays them: figures only, no names."""
        return list(
            self.db.query(
                "SELECT id, inbox_id, priority, state, size, duration_s, process_s, ready_at, started_at, ended_at,"
                " json_extract(options, '$.model') AS model FROM job"
                " WHERE ready_at IS NOT NULL AND (ended_at IS NULL OR ended_at >= ?) ORDER BY ready_at, id",
                [since],
            )
        )

    def running(self) -> list[Row]:
        return list(self.jobs(state="running"))

    def unpublished(self, limit: int = 200) -> list[Row]:
        """Work for the outboxes: transcripts, and failures whose error file is not out yet; oldest first."""
        return list(
            self.db.query(
                f"{_JOBS} WHERE (job.state = 'transcribed' OR (job.state = 'failed' AND job.reported_at IS NULL)) AND inbox.active = 1"
                " ORDER BY job.id LIMIT ?",
                [limit],
            )
        )

    def counts(self) -> dict[str, int]:
        """Number of jobs in every state (zeros included)."""
        found = {row["state"]: row["n"] for row in self.db.query("SELECT state, count(*) AS n FROM job GROUP BY state")}
        return {state.value: found.get(state.value, 0) for state in State}

    def open_work(self) -> dict[str, int]:
        """What has to happen before a drained daemon may end, by what it waits for; only inboxes in use count, and nothing that is held."""
        row = next(
            self.db.query(
                "SELECT coalesce(sum(job.state = 'seen'), 0) AS seen, coalesce(sum(job.state = 'ready' AND NOT job.held), 0) AS ready,"
                " coalesce(sum(job.state = 'running'), 0) AS running,"
                " coalesce(sum(job.state = 'transcribed' OR (job.state = 'failed' AND job.reported_at IS NULL)), 0) AS unpublished"
                " FROM job JOIN inbox ON inbox.id = job.inbox_id WHERE inbox.active = 1"
                " AND job.state IN ('seen', 'ready', 'running', 'transcribed', 'failed')"
            )
        )
        return dict(row)

    def only_waiting_work_left(self) -> str:
        """When all that is open waits for something that is not a file: what that is. "" otherwise."""
        work = self.open_work()
        rows = list(
            self.db.query(
                "SELECT failure_kind, failure_what FROM job JOIN inbox ON inbox.id = inbox_id"
                " WHERE job.state = 'ready' AND job.held = 0 AND inbox.active = 1 LIMIT 1000"
            )
        )
        if not rows or work["running"] or work["unpublished"] or any(row["failure_kind"] != "waiting" for row in rows):
            return ""
        return str(rows[0]["failure_what"])

    def options(self, row: Row) -> JobOptions:
        return msgspec.json.decode(row["options"], type=JobOptions)

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

    def publications_of_source(self, inbox: int, path: bytes) -> list[Row]:
        """Everything any version of this source has in the outbox."""
        return list(
            self.db.query(
                "SELECT publication.* FROM publication JOIN job ON job.id = publication.job_id WHERE job.inbox_id = ? AND job.path = ?",
                [inbox, path],
            )
        )

    # --- the rest ---

    def inboxes(self, *, active_only: bool = True) -> list[Row]:
        return list(self.db.table("inbox").rows_where("active = 1" if active_only else None, order_by="id"))

    def heard(self, topic: str) -> tuple[float, Row] | None:
        """What the daemon last said on a topic, and when."""
        for row in self.db.table("daemon").rows_where("topic = ?", [topic]):
            return row["at"], json.loads(row["body"])
        return None

    def last_plans(self, limit: int = 10) -> list[Row]:
        """The newest first; `body` is the whole plan, None where only its number of workers was kept."""
        rows = self.db.table("plan").rows_where(order_by="id desc", limit=limit)
        return [{**row, "body": None if row["body"] is None else json.loads(row["body"])} for row in rows]

    def minutes(self, since: float) -> list[CardMinute]:
        """The minutes of all cards that ended since then, as they passed."""
        rows = self.db.table("card_minute").rows_where("at >= ?", [since], order_by="at, gpu")
        return [msgspec.convert(row, CardMinute) for row in rows]

    def learned(self) -> list[Row]:
        """What the optimiser learned, row by row as it told it."""
        rows = self.db.table("learned").rows_where(order_by=", ".join(LEARNED_KEY))
        return [{**{name: row[name] for name in LEARNED_KEY}, "body": json.loads(row["body"])} for row in rows]

    def latest_readings(self) -> list[Row]:
        """The newest reading of every GPU (or the one that says why there is none)."""
        return list(self.db.query("SELECT *, max(id) FROM reading GROUP BY gpu ORDER BY gpu"))

    def open_alerts(self) -> list[Row]:
        return list(self.db.table("alert").rows_where("cleared_at IS NULL", order_by="raised_at"))

    def outcomes_since(self, since: float) -> dict[str, int]:
        """How many jobs ended done and failed since then."""
        rows = self.db.query(
            "SELECT state, count(*) AS n FROM job WHERE state IN ('done', 'failed') AND ended_at >= ? GROUP BY state", [since]
        )
        found = {row["state"]: row["n"] for row in rows}
        return {"done": found.get("done", 0), "failed": found.get("failed", 0)}

    def qualities(self) -> dict[str, int]:
        """How many of the transcripts that are out have which verdict (zeros included)."""
        rows = self.db.query("SELECT quality, count(*) AS n FROM job WHERE quality IS NOT NULL AND state = 'done' GROUP BY quality")
        return dict.fromkeys(QUALITIES, 0) | {row["quality"]: row["n"] for row in rows}

    def oldest_ready_at(self) -> float | None:
        row = self.db.conn.execute(
            "SELECT min(ready_at) FROM job JOIN inbox ON inbox.id = inbox_id"
            " WHERE job.state = 'ready' AND job.held = 0 AND inbox.active = 1"
        ).fetchone()
        return None if row[0] is None else float(row[0])

    def throughput_since(self, since: float) -> tuple[float, float]:
        """Audio seconds and working seconds of the jobs that finished since then."""
        row = self.db.conn.execute("SELECT coalesce(sum(audio_s), 0), coalesce(sum(wall_s), 0) FROM throughput WHERE at >= ?", [since])
        audio_s, wall_s = row.fetchone()
        return float(audio_s), float(wall_s)

    def integrity(self) -> str:
        """'ok', or what SQLite found."""
        try:
            return str(self.db.conn.execute("PRAGMA integrity_check").fetchone()[0])
        except sqlite3.DatabaseError as error:  # damaged beyond checking
            return str(error)

    def backup(self, target: str) -> None:
        """Copy the whole ledger while it is in use; the copy appears whole under its name or not at all."""
        partial = target + ".partial"
        source = open_for_reading(self.state_dir).conn  # its own connection: what is not committed yet stays out of the copy
        try:
            with contextlib.suppress(FileNotFoundError):  # of an earlier, interrupted backup
                os.unlink(partial)
            with contextlib.closing(sqlite3.connect(partial)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")
            _sync(partial)
            os.replace(partial, target)
            _sync(os.path.dirname(os.path.abspath(target)))
        except (sqlite3.OperationalError, OSError) as error:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise LedgerStuck(
                f"cannot back the ledger up to {target}: {error}", hint="is the directory there, and has the disk room?"
            ) from error
        finally:
            source.close()


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
