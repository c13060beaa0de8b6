"""ledger: the verbs. Each arrow of the state diagram is one method, one guarded UPDATE, one event row written by a trigger.

The table `transition` is the only list of legal moves: a verb names itself, the store finds where it leads or refuses.
Fails with `NoSuchJob`, `IllegalMove` (the job is not where the verb begins), `LeaseLost` (the job runs for somebody else now),
`LedgerStuck` (the disk is full or failing). A verb that failed has changed nothing, also inside a longer transaction.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec

from whisperd.errors import WhisperdError
from whisperd.ledger.connection import LedgerStuck, blames_the_disk, open_for_writing, write_lock
from whisperd.ledger.queries import LEARNED_KEY, Queries, Row
from whisperd.vocabulary import LIVE, CardMinute, Failure, FailureKind, JobOptions, Plan, Reading, Sighting, Window


class NoSuchJob(WhisperdError):
    """There is no job of that number."""

    code = "no_such_job"


class IllegalMove(WhisperdError):
    """The verb does not fit the state the job is in."""

    code = "illegal_move"


class LeaseLost(WhisperdError):
    """The job does not run for this child in this life of the daemon."""

    code = "lease_lost"


class Ledger(Queries):
    """Read and write access. One per process that writes; every write is one BEGIN IMMEDIATE transaction under the write lock.

    `epoch` names one life of the daemon: leases of another epoch are dead.
    """

    def __init__(self, state_dir: str, *, epoch: str) -> None:
        super().__init__(open_for_writing(state_dir), state_dir)
        self.epoch = epoch
        self._depth = 0
        self._turn = threading.RLock()  # one connection, one transaction: a second thread waits for its turn

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Several verbs as one: all or none. A verb refused within, and caught within, takes back only itself."""
        with self._turn:
            try:
                if self._depth:
                    with self._all_or_none("SAVEPOINT verb", "RELEASE verb", "ROLLBACK TO verb", "RELEASE verb"):
                        yield
                else:
                    with write_lock(self.state_dir), self._all_or_none("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"):
                        yield
            except (sqlite3.IntegrityError, OverflowError) as error:
                raise IllegalMove(f"cannot write this to the ledger: {error}") from error
            except sqlite3.OperationalError as error:
                if blames_the_disk(error):
                    raise LedgerStuck(f"cannot write to the ledger: {error}", hint="is the disk full or read-only?") from error
                raise

    @contextmanager
    def _all_or_none(self, begin: str, commit: str, *undo: str) -> Iterator[None]:
        if self._depth and not self.db.conn.in_transaction:
            raise LedgerStuck("cannot go on with a transaction that SQLite has rolled back")
        self.db.conn.execute(begin)
        self._depth += 1
        try:
            yield
            self.db.conn.execute(commit)
        except BaseException:
            if self.db.conn.in_transaction:  # SQLite itself rolls back when the disk is full or failing
                for statement in undo:
                    self.db.conn.execute(statement)
            raise
        finally:
            self._depth -= 1

    def _move(self, verb: str, job: int, now: float, *, child: str | None = None, note: str = "", **changes: Any) -> None:
        """The one guarded UPDATE behind every verb. Raises NoSuchJob, IllegalMove, LeaseLost."""
        sets = "".join(f", {column} = :{column}" for column in changes)
        lease = " AND lease_child = :by_child AND lease_epoch = :by_epoch" if child is not None else ""
        with self.transaction():
            try:
                cursor = self.db.conn.execute(
                    "UPDATE job SET verb = :verb, note = :note, updated_at = :now,"
                    f" state = (SELECT to_state FROM transition WHERE verb = :verb AND from_state = job.state){sets}"
                    f" WHERE id = :job AND state IN (SELECT from_state FROM transition WHERE verb = :verb){lease}",
                    {"verb": verb, "note": note, "now": now, "job": job, "by_child": child, "by_epoch": self.epoch, **changes},
                )
            except (sqlite3.IntegrityError, OverflowError) as error:
                if not self.exists(job):
                    self._refuse(verb, job, child)
                raise IllegalMove(f"cannot {verb} job {job}: {error}") from error
            if cursor.rowcount != 1:
                self._refuse(verb, job, child)

    def _refuse(self, verb: str, job: int, child: str | None) -> NoReturn:
        if not self.exists(job):
            raise NoSuchJob(f"cannot {verb} job {job}: there is none", hint="`whisperd jobs` lists them")
        row = self.job(job)
        if child is not None and row["state"] == "running":
            raise LeaseLost(f"cannot {verb} job {job} for {child}: it runs for {row['lease_child']} now")
        raise IllegalMove(f"cannot {verb} job {job}: it is {row['state']}")

    # Lists are read whole here: an open cursor pins a moment of the file, and nothing can be written upon a moment that has passed.

    def jobs(
        self, *, state: str | None = None, inbox: bytes | None = None, quality: str | None = None, limit: int = -1, newest: bool = False
    ) -> Iterator[Row]:
        return iter(list(super().jobs(state=state, inbox=inbox, quality=quality, limit=limit, newest=newest)))

    def latest_per_path(self, inbox: int) -> Iterator[Row]:
        return iter(list(super().latest_per_path(inbox)))

    # --- inboxes ---

    def register_inbox(self, path: bytes, outbox: bytes, now: float) -> int:
        """Know an inbox (again); its number stays the same for ever."""
        with self.transaction():
            self.db.conn.execute(
                "INSERT INTO inbox (path, outbox, since) VALUES (?, ?, ?)"
                " ON CONFLICT (path) DO UPDATE SET outbox = excluded.outbox, active = 1",
                [path, outbox, now],
            )
            return int(self.db.conn.execute("SELECT id FROM inbox WHERE path = ?", [path]).fetchone()[0])

    def retire_inboxes(self, keep: Sequence[int]) -> None:
        """Inboxes that the configuration no longer names; their jobs and history stay."""
        with self.transaction():
            marks = ",".join("?" * len(keep))
            self.db.conn.execute(f"UPDATE inbox SET active = id IN ({marks})", list(keep))

    def inbox_up(self, inbox: int, now: float) -> None:
        with self.transaction():
            self.db.conn.execute(
                "UPDATE inbox SET scanned_at = :now, since = CASE state WHEN 'up' THEN since ELSE :now END, state = 'up', what = ''"
                " WHERE id = :inbox",
                {"now": now, "inbox": inbox},
            )

    def inbox_down(self, inbox: int, what: str, now: float) -> None:
        with self.transaction():
            self.db.conn.execute(
                "UPDATE inbox SET since = CASE state WHEN 'down' THEN since ELSE :now END, state = 'down', what = :what WHERE id = :inbox",
                {"now": now, "inbox": inbox, "what": what},
            )

    # --- seen, ready ---

    def see(self, inbox: int, sighting: Sighting, now: float) -> int:
        """A file was seen and is not settled; returns its job.

        Content that is known under this path, whatever became of it, is not new work. A live job whose content has changed since
        is gone (replaced), and a new one begins.
        """
        with self.transaction():
            live = self.live_job(inbox, sighting.path)  # not always the newest job of the path: an older one may be retried
            if live is not None and live["state"] == "seen":
                self._move("see", live["id"], now, **_identity(sighting))
                return int(live["id"])
            if live is not None and not _sighting(live).same_content(sighting):
                self.vanish(live["id"], now, note="the file was replaced")
                live = None
            known = live or self.latest_job(inbox, sighting.path)
            if known is not None and known["state"] != "gone" and _sighting(known).same_content(sighting):
                return int(known["id"])
            row = {
                "inbox_id": inbox,
                "path": sighting.path,
                **_identity(sighting),
                "state": "seen",
                "verb": "see",
                "updated_at": now,
                "seen_at": now,
            }
            return int(self.db.conn.execute(_insert("job", row), row).lastrowid or 0)

    def settle(self, job: int, sighting: Sighting, options: JobOptions, now: float, *, priority: int = 1) -> None:
        """seen → ready: the file has not changed for the quiet period. A class that the operator gave it meanwhile stays."""
        with self.transaction():
            if self.exists(job) and self.db.table("event").count_where("job_id = ? AND verb = 'prioritise'", [job]):
                priority = self.job(job)["priority"]
            self._move("settle", job, now, options=_json(options), priority=priority, ready_at=now, not_before=now, **_identity(sighting))

    def vanish(self, job: int, now: float, *, note: str = "the file is gone from the inbox") -> None:
        """seen, ready, running → gone."""
        with self.transaction():
            self._move("vanish", job, now, note=note, ended_at=now, **_NO_LEASE)
            self._forget_checkpoints(job)

    # --- running ---

    def claim(self, job: int, child: str, now: float, *, lease_s: float) -> None:
        """ready → running, the attempt counted before its work begins."""
        with self.transaction():
            attempts = self.job(job)["attempts"] if self.exists(job) else 0
            self._move(
                "claim",
                job,
                now,
                note=child,
                lease_child=child,
                lease_epoch=self.epoch,
                lease_until=now + lease_s,
                started_at=now,
                attempts=attempts + 1,
                **_NO_FAILURE,
            )

    def checkpoint(
        self,
        job: int,
        child: str,
        window: Window,
        now: float,
        *,
        lease_s: float,
        duration_s: float | None = None,
        made_by: str = "",
        front_end: bytes = b"",
    ) -> None:
        """Keep one finished window; it is the lease's heartbeat, too. The same window again changes nothing.

        `made_by` names what made it (see `drop_foreign_checkpoints`); `front_end` is kept for the last window only.
        """
        with self.transaction():
            self._move(
                "checkpoint",
                job,
                now,
                child=child,
                lease_until=now + lease_s,
                position_s=window.end_s,
                interruptions=0,
                **_known(duration_s=duration_s),
            )
            self.db.conn.execute(
                "INSERT INTO checkpoint (job_id, window_index, end_s, body, made_by, front_end) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                [job, window.index, window.end_s, _json(window), made_by, front_end or None],
            )
            self.db.conn.execute("UPDATE checkpoint SET front_end = NULL WHERE job_id = ? AND window_index = ?", [job, window.index - 1])

    def drop_foreign_checkpoints(self, job: int, child: str, made_by: str, now: float) -> int:
        """Windows that something else made (another model, other options) are not gone on from; returns how many were dropped."""
        with self.transaction():
            if not self.exists(job):
                self._refuse("resume", job, child)
            foreign = self.db.table("checkpoint").count_where("job_id = ? AND made_by <> ?", [job, made_by])
            if not foreign:
                return 0
            self._move("progress", job, now, child=child, position_s=0.0)
            return self._forget_checkpoints(job)

    def progress(self, job: int, child: str, position_s: float, duration_s: float | None, now: float, *, lease_s: float) -> None:
        """The recording was read further."""
        self._move("progress", job, now, child=child, lease_until=now + lease_s, position_s=position_s, **_known(duration_s=duration_s))

    def renew(self, child: str, now: float, *, lease_s: float) -> None:
        """The leases of all jobs in a child's hands: it moves, though perhaps not with each of them."""
        with self.transaction():
            self.db.conn.execute(
                "UPDATE job SET verb = 'progress', note = '', updated_at = :now, lease_until = :until"
                " WHERE state = 'running' AND lease_child = :child AND lease_epoch = :epoch",
                {"now": now, "until": now + lease_s, "child": child, "epoch": self.epoch},
            )

    def release(
        self, job: int, child: str, failure: Failure, now: float, *, not_before: float, tail: str = "", needs_mib: int | None = None
    ) -> None:
        """running → ready: try again later; the attempt stays counted. `needs_mib`: it ran out of memory, and should have so much."""
        changes = {"not_before": not_before, **_known(needs_mib=needs_mib)}
        self._move("release", job, now, child=child, note=failure.what, **changes, **_NO_LEASE, **_failure(failure, tail))

    def interrupt(self, job: int, child: str, why: str, now: float) -> None:
        """running → ready at once: what stopped the work was not the file's fault, so the attempt is given back."""
        self._give_back("interrupt", job, child, now, note=why, not_before=now)

    def wait(self, job: int, child: str, failure: Failure, now: float, *, not_before: float, needs_mib: int | None = None) -> None:
        """running → ready: something that is not the file is absent; no attempt is spent. `needs_mib`: as with `release`."""
        changes = {"not_before": not_before, **_known(needs_mib=needs_mib)}
        self._give_back("wait", job, child, now, note=failure.what, **changes, **_failure(failure, ""))

    def _give_back(self, verb: str, job: int, child: str, now: float, *, note: str, **changes: Any) -> None:
        with self.transaction():
            row = self.job(job) if self.exists(job) else {"attempts": 1, "interruptions": 0}
            self._move(
                verb,
                job,
                now,
                child=child,
                note=note,
                attempts=max(0, row["attempts"] - 1),
                interruptions=row["interruptions"] + (verb == "interrupt"),
                **_NO_LEASE,
                **changes,
            )

    def interrupt_other_epochs(self, now: float) -> list[int]:
        """At start: what a former life of the daemon left running is ready again."""
        with self.transaction():
            rows = list(self.db.query("SELECT id FROM job WHERE state = 'running' AND lease_epoch <> ?", [self.epoch]))
            self.db.conn.execute(
                "UPDATE job SET verb = 'interrupt', note = 'the daemon ended while it ran', updated_at = :now, state = 'ready',"
                " attempts = max(0, attempts - 1), interruptions = interruptions + 1, not_before = :now,"
                " lease_child = NULL, lease_epoch = NULL, lease_until = NULL WHERE state = 'running' AND lease_epoch <> :epoch",
                {"now": now, "epoch": self.epoch},
            )
            return [row["id"] for row in rows]

    def finish(
        self,
        job: int,
        child: str,
        now: float,
        *,
        transcript: str,
        sha256: str,
        duration_s: float,
        language: str,
        process_s: float,
        quality: str,
    ) -> None:
        """running → transcribed: the transcript is staged and durable, so the windows are no longer needed."""
        with self.transaction():
            self._move(
                "finish",
                job,
                now,
                child=child,
                transcript=transcript,
                sha256=sha256,
                duration_s=duration_s,
                position_s=duration_s,
                language=language,
                process_s=process_s,
                quality=quality,
                **_NO_LEASE,
            )
            self._forget_checkpoints(job)

    def fail(self, job: int, child: str, failure: Failure, now: float, *, tail: str = "") -> None:
        """running → failed: no further attempt; an error file will say so in the outbox."""
        if failure.kind is FailureKind.WAITING:
            raise IllegalMove(f"cannot fail job {job} for something that is waited for: {failure.what}")
        self._move("fail", job, now, child=child, note=failure.what, ended_at=now, **_NO_LEASE, **_failure(failure, tail))

    # --- publishing ---

    def reserve_name(self, job: int, outbox: bytes, candidates: Sequence[bytes], kind: str) -> bytes:
        """The first of `candidates` that no other source owns, kept for this source for ever. Raises IllegalMove when none is free."""
        with self.transaction():
            owner = {"outbox": outbox, **self._source("name", job), "kind": kind}
            kept = list(
                self.db.query(
                    "SELECT base FROM name WHERE outbox = :outbox AND inbox_id = :inbox_id AND path = :path AND kind = :kind", owner
                )
            )
            if kept:
                return bytes(kept[0]["base"])
            for base in candidates:
                with contextlib.suppress(sqlite3.IntegrityError):
                    values = {"base": base, **owner}
                    self.db.conn.execute(_insert("name", values), values)
                    return base
            raise IllegalMove(f"cannot name the {kind} of job {job}: all {len(candidates)} names are taken")

    def avoid_name(self, job: int, outbox: bytes, base: bytes) -> None:
        """A file that is not ours stands at this name: it is not offered again. A name that another source owns stays its own."""
        with self.transaction():
            values = {"outbox": outbox, "base": base, **self._source("name", job), "kind": "avoided"}
            self.db.conn.execute(
                _insert("name", values) + " ON CONFLICT (outbox, base) DO UPDATE SET kind = 'avoided'"
                " WHERE inbox_id = excluded.inbox_id AND path = excluded.path",
                values,
            )

    def _source(self, verb: str, job: int) -> dict[str, Any]:
        if not self.exists(job):
            self._refuse(verb, job, None)
        row = self.job(job)
        return {"inbox_id": row["inbox_id"], "path": row["path"]}

    def publish(self, job: int, outbox: bytes, files: Sequence[tuple[bytes, str, str]], now: float) -> None:
        """transcribed → done; `files` are (path, format, sha256) as they stand in the outbox."""
        with self.transaction():
            if not self.exists(job):
                self._refuse("publish", job, None)
            self._publications(job, outbox, files, now)
            self._move("publish", job, now, ended_at=now)

    def report(self, job: int, outbox: bytes, files: Sequence[tuple[bytes, str, str]], now: float) -> None:
        """failed, and now its error file is in the outbox."""
        with self.transaction():
            self._move("report", job, now, reported_at=now)
            self._publications(job, outbox, files, now)

    def withdraw(self, outbox: bytes, paths: Sequence[bytes]) -> None:
        """These files of ours are not in the outbox any more (an error file, once its recording has a transcript)."""
        with self.transaction():
            self.db.conn.executemany("DELETE FROM publication WHERE outbox = ? AND path = ?", [(outbox, path) for path in paths])

    def _publications(self, job: int, outbox: bytes, files: Sequence[tuple[bytes, str, str]], now: float) -> None:
        for path, kind, sha256 in files:
            row = {"outbox": outbox, "path": path, "job_id": job, "format": kind, "sha256": sha256, "published_at": now}
            self.db.conn.execute(_insert("publication", row).replace("INSERT", "INSERT OR REPLACE"), row)

    # --- the operator ---

    def retry(self, job: int, now: float) -> None:
        """failed, cancelled → ready, with a clean slate of attempts."""
        with self.transaction():
            ready_at = self.job(job)["ready_at"] if self.exists(job) else None
            self._move(
                "retry",
                job,
                now,
                note=BY_OPERATOR,
                attempts=0,
                interruptions=0,
                needs_mib=None,
                ready_at=now if ready_at is None else ready_at,
                not_before=now,
                ended_at=None,
                reported_at=None,
                **_NO_FAILURE,
            )

    def cancel(self, job: int, now: float, *, options: JobOptions | None = None) -> None:
        """seen, ready, running → cancelled. `options` are for a file that has not settled yet: a retry begins with them."""
        with self.transaction():
            kept = self.job(job)["options"] if self.exists(job) else None
            chosen = _json(options or JobOptions()) if kept is None else kept
            self._move("cancel", job, now, note=BY_OPERATOR, ended_at=now, held=0, options=chosen, **_NO_LEASE)

    def hold(self, job: int, now: float) -> None:
        """seen and ready stay, running → ready with its windows and its attempt given back: not handed out until `unhold`."""
        with self.transaction():
            row = self._held(job, False, "hold")
            attempts = max(0, row["attempts"] - (row["state"] == "running"))
            self._move("hold", job, now, note=BY_OPERATOR, held=1, attempts=attempts, **_NO_LEASE)

    def unhold(self, job: int, now: float) -> None:
        """A held job goes on as if nothing had been."""
        with self.transaction():
            self._held(job, True, "unhold")
            self._move("unhold", job, now, note=BY_OPERATOR, held=0)

    def prioritise(self, job: int, priority: int, now: float) -> None:
        """seen, ready, running: another class (0 urgent, 1 normal, 2 low)."""
        self._move("prioritise", job, now, note=f"class {priority}, {BY_OPERATOR}", priority=priority)

    def _held(self, job: int, held: bool, verb: str) -> Row:
        if not self.exists(job):
            self._refuse(verb, job, None)
        row = self.job(job)
        if row["state"] in LIVE and bool(row["held"]) != held:
            raise IllegalMove(f"cannot {verb} job {job}: it is {'held already' if row['held'] else 'not held'}")
        return row

    # --- what the daemon observes ---

    def record_readings(self, readings: Sequence[Reading], now: float) -> None:
        with self.transaction():
            for reading in readings:
                row = {
                    "at": now,
                    "gpu": reading.gpu,
                    "status": reading.status,
                    "what": reading.what,
                    "vram_total_mib": reading.vram_total_mib,
                    "vram_used_mib": reading.vram_used_mib,
                    "utilisation_percent": reading.utilisation_percent,
                    "temperature_c": reading.temperature_c,
                }
                self.db.table("reading").insert(row)

    def record_plan(self, plan: Plan, now: float, body: Mapping[str, Any] | None = None) -> None:
        """`body` is the whole plan: its cards and its reasons as values."""
        row = {"at": now, "workers": plan.workers, "reason": plan.reason, "body": None if body is None else _json(body)}
        with self.transaction():
            self.db.table("plan").insert(row)

    def record_minutes(self, minutes: Sequence[CardMinute]) -> None:
        """One row for a minute of a card; told again, the last word stands."""
        with self.transaction():
            self.db.table("card_minute").upsert_all([msgspec.structs.asdict(minute) for minute in minutes], pk=("gpu", "at"))

    def learn(self, rows: Sequence[Mapping[str, Any]], now: float) -> None:
        """What the optimiser learned, of each GPU, driver, model, precision and batch; `body` is its own."""
        kept = [{**{name: row[name] for name in LEARNED_KEY}, "body": _json(row["body"]), "updated_at": now} for row in rows]
        with self.transaction():
            self.db.table("learned").upsert_all(kept, pk=LEARNED_KEY)

    def record_throughput(self, job: int, *, workers: int, audio_s: float, wall_s: float, now: float) -> None:
        with self.transaction():
            self.db.table("throughput").insert({"at": now, "job_id": job, "workers": workers, "audio_s": audio_s, "wall_s": wall_s})

    def record_vram_peak(
        self, *, gpu: str, driver: str, model: str, compute_type: str, batch: int, beam: int, frames: int, peak_mib: int, now: float
    ) -> None:
        """The most memory of a GPU that a batch of this shape has been seen with; a smaller figure changes nothing."""
        row = {
            "gpu": gpu,
            "driver": driver,
            "model": model,
            "compute_type": compute_type,
            "batch": batch,
            "beam": beam,
            "frames": frames,
            "peak_mib": peak_mib,
            "measured_at": now,
        }
        with self.transaction():
            self.db.conn.execute(
                _insert("vram_peak", row) + " ON CONFLICT DO UPDATE SET peak_mib = excluded.peak_mib, measured_at = excluded.measured_at"
                " WHERE excluded.peak_mib > vram_peak.peak_mib",
                row,
            )

    def raise_alert(self, check: str, what: str, now: float) -> bool:
        """Open an alert; False when it is open already."""
        with self.transaction():
            cursor = self.db.conn.execute("INSERT OR IGNORE INTO alert (check_name, what, raised_at) VALUES (?, ?, ?)", [check, what, now])
            return cursor.rowcount == 1

    def clear_alert(self, check: str, now: float) -> bool:
        """Close an alert; False when none is open."""
        with self.transaction():
            cursor = self.db.conn.execute("UPDATE alert SET cleared_at = ? WHERE check_name = ? AND cleared_at IS NULL", [now, check])
            return cursor.rowcount == 1

    def say(self, topic: str, body: dict[str, Any], now: float) -> None:
        """Tell the desk something of the daemon itself (its pid, its plan, its children)."""
        with self.transaction():
            self.db.table("daemon").upsert({"topic": topic, "at": now, "body": json.dumps(body)}, pk="topic")

    # --- upkeep ---

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
        """Drop old readings, minutes, samples, plans and the history of jobs that ended before; returns rows dropped.

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
            return dropped

    def close(self) -> None:
        """The last connection checkpoints when it closes, so closing holds the lock as any checkpoint does."""
        with self._turn, write_lock(self.state_dir):
            self.db.conn.close()

    def _forget_checkpoints(self, job: int) -> int:
        return int(self.db.conn.execute("DELETE FROM checkpoint WHERE job_id = ?", [job]).rowcount)


def _known(**columns: Any) -> dict[str, Any]:
    """Only what is known: None would wipe what was."""
    return {name: value for name, value in columns.items() if value is not None}


BY_OPERATOR = "asked for by the operator"
_NO_LEASE: dict[str, Any] = {"lease_child": None, "lease_epoch": None, "lease_until": None}
_NO_FAILURE: dict[str, Any] = {
    "failure_kind": None,
    "failure_code": None,
    "failure_what": None,
    "failure_hint": None,
    "failure_tail": "",
}


def _failure(failure: Failure, tail: str) -> dict[str, Any]:
    return {
        "failure_kind": failure.kind.value,
        "failure_code": failure.code,
        "failure_what": failure.what,
        "failure_hint": failure.hint,
        "failure_tail": tail,
    }


def _identity(sighting: Sighting) -> dict[str, Any]:
    return {
        "dev": _signed(sighting.dev),
        "inode": _signed(sighting.inode),
        "size": sighting.size,
        "mtime_ns": sighting.mtime_ns,
        "ctime_ns": sighting.ctime_ns,
    }


def _signed(number: int) -> int:
    """SQLite integers are signed 64-bit; some network filesystems use inode numbers above that."""
    return number - (1 << 64) if number >= 1 << 63 else number


def _sighting(row: dict[str, Any]) -> Sighting:
    return Sighting(**{name: row[name] for name in ("path", "dev", "inode", "size", "mtime_ns", "ctime_ns")})


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _insert(table: str, row: dict[str, Any]) -> str:
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(':' + column for column in row)})"
