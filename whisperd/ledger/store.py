"""store: the one way to write to the ledger. Transactions, and the guarded UPDATE behind every verb.

Owns: the write lock's depth, the refusals, the columns that verbs share. The table `transition` is the only list of legal moves: a verb
names itself, the store finds where it leads or refuses. Fails with `NoSuchJob`, `IllegalMove`, `LeaseLost`, `LedgerStuck`, `LedgerBroken`.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import msgspec

from whisperd.errors import WhisperdError
from whisperd.ledger.backups import advice
from whisperd.ledger.connection import LedgerBroken, LedgerStuck, blames_the_disk, blames_the_file, open_for_writing, write_lock
from whisperd.ledger.queries import Queries
from whisperd.ledger.reader import Row, signed
from whisperd.vocabulary import Failure, Sighting


class NoSuchJob(WhisperdError):
    """There is no job of that number."""

    code = "no_such_job"


class IllegalMove(WhisperdError):
    """The verb does not fit the state the job is in."""

    code = "illegal_move"


class LeaseLost(WhisperdError):
    """The job does not run for this child in this life of the daemon."""

    code = "lease_lost"


class Store(Queries):
    """Write access, without the verbs. One per process that writes; every write is one BEGIN IMMEDIATE transaction under the write lock.

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
            except sqlite3.DatabaseError as error:
                if blames_the_file(error):
                    raise LedgerBroken(f"cannot go on with the ledger in {self.state_dir}: {error}", hint=advice(self.state_dir)) from error
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

    def _require(self, verb: str, job: int) -> Row:
        """The row of a job that a verb is about to move. Raises NoSuchJob."""
        if not self.exists(job):
            self._refuse(verb, job, None)
        return self.job(job)

    def _forget_checkpoints(self, job: int) -> int:
        return int(self.db.conn.execute("DELETE FROM checkpoint WHERE job_id = ?", [job]).rowcount)

    # Lists are read whole here: an open cursor pins a moment of the file, and nothing can be written upon a moment that has passed.

    def jobs(
        self, *, state: str | None = None, inbox: bytes | None = None, quality: str | None = None, limit: int = -1, newest: bool = False
    ) -> Iterator[Row]:
        return iter(list(super().jobs(state=state, inbox=inbox, quality=quality, limit=limit, newest=newest)))

    def latest_per_path(self, inbox: int) -> Iterator[Row]:
        return iter(list(super().latest_per_path(inbox)))


def known(**columns: Any) -> dict[str, Any]:
    """Only what is known: None would wipe what was."""
    return {name: value for name, value in columns.items() if value is not None}


BY_OPERATOR = "asked for by the operator"
NO_LEASE: dict[str, Any] = {"lease_child": None, "lease_epoch": None, "lease_until": None}
NO_FAILURE: dict[str, Any] = {
    "failure_kind": None,
    "failure_code": None,
    "failure_what": None,
    "failure_hint": None,
    "failure_tail": "",
}


def failing(failure: Failure, tail: str) -> dict[str, Any]:
    return {
        "failure_kind": failure.kind.value,
        "failure_code": failure.code,
        "failure_what": failure.what,
        "failure_hint": failure.hint,
        "failure_tail": tail,
    }


def identity(sighting: Sighting) -> dict[str, Any]:
    return {
        "dev": signed(sighting.dev),
        "inode": signed(sighting.inode),
        "size": sighting.size,
        "mtime_ns": sighting.mtime_ns,
        "ctime_ns": sighting.ctime_ns,
    }


def sighting_of(row: Mapping[str, Any]) -> Sighting:
    """A job's file as it settled."""
    return Sighting(**{name: row[name] for name in ("path", "dev", "inode", "size", "mtime_ns", "ctime_ns")})


def as_json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def insert(table: str, row: Mapping[str, Any]) -> str:
    return f"INSERT INTO {table} ({', '.join(row)}) VALUES ({', '.join(':' + column for column in row)})"
