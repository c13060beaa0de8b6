"""delivery: verbs of the outbox: names, publications, and what is owed once a transcript is out.

Fails as `store` does.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Sequence
from typing import Any

from whisperd.ledger.store import IllegalMove, Store, insert

Files = Sequence[tuple[bytes, str, str]]
"""Path below the outbox, format, sha256."""

Notice = tuple[str, str, str | bytes]
"""Whom to tell (a target), the delivery's own id, the body (JSON)."""


class DeliveryVerbs(Store):
    """Names in the outbox, what stands there, and what follows."""

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
                    self.db.conn.execute(insert("name", values), values)
                    return base
            raise IllegalMove(f"cannot name the {kind} of job {job}: all {len(candidates)} names are taken")

    def avoid_name(self, job: int, outbox: bytes, base: bytes) -> None:
        """A file that is not ours stands at this name: it is not offered again. A name that another source owns stays its own."""
        with self.transaction():
            values = {"outbox": outbox, "base": base, **self._source("name", job), "kind": "avoided"}
            self.db.conn.execute(
                insert("name", values) + " ON CONFLICT (outbox, base) DO UPDATE SET kind = 'avoided'"
                " WHERE inbox_id = excluded.inbox_id AND path = excluded.path",
                values,
            )

    def _source(self, verb: str, job: int) -> dict[str, Any]:
        row = self._require(verb, job)
        return {"inbox_id": row["inbox_id"], "path": row["path"]}

    # --- publishing ---

    def publish(self, job: int, outbox: bytes, files: Files, now: float, *, disposal: str = "", notices: Sequence[Notice] = ()) -> None:
        """transcribed → done; `files` are (path, format, sha256) as they stand in the outbox.

        What is still owed is noted with it: what becomes of the source ("archive", "delete"; "" is nothing), and who is to be told.
        """
        with self.transaction():
            self._require("publish", job)
            self._publications(job, outbox, files, now)
            self._move("publish", job, now, ended_at=now, **({"disposal": disposal} if disposal else {}))
            self._owe(job, "done", notices, now)

    def report(self, job: int, outbox: bytes, files: Files, now: float, *, notices: Sequence[Notice] = ()) -> None:
        """failed, and now its error file is in the outbox."""
        with self.transaction():
            self._move("report", job, now, reported_at=now)
            self._publications(job, outbox, files, now)
            self._owe(job, "failed", notices, now)

    def withdraw(self, outbox: bytes, paths: Sequence[bytes]) -> None:
        """These files of ours are not in the outbox any more (an error file, once its recording has a transcript)."""
        with self.transaction():
            self.db.conn.executemany("DELETE FROM publication WHERE outbox = ? AND path = ?", [(outbox, path) for path in paths])

    def _publications(self, job: int, outbox: bytes, files: Files, now: float) -> None:
        for path, kind, sha256 in files:
            row = {"outbox": outbox, "path": path, "job_id": job, "format": kind, "sha256": sha256, "published_at": now}
            self.db.conn.execute(insert("publication", row).replace("INSERT", "INSERT OR REPLACE"), row)

    # --- what is owed afterwards ---

    def disposed(self, job: int, how: str, now: float) -> None:
        """The source of a job that is done is "archived", "deleted", "gone" (somebody was faster) or "changed" (it stays)."""
        self._move("dispose", job, now, note=how, disposal=how)

    def _owe(self, job: int, event: str, notices: Sequence[Notice], now: float) -> None:
        rows = [(job, event, target, delivery, _text(body), now, now) for target, delivery, body in notices]
        self.db.conn.executemany(
            "INSERT INTO notice (job_id, event, target, delivery, body, not_before, created_at) VALUES (?, ?, ?, ?, ?, ?, ?)", rows
        )

    def notice_sent(self, notice: int, now: float) -> None:
        """The receiver took it."""
        self._strike(notice, "sent", "", now)

    def notice_postponed(self, notice: int, what: str, not_before: float, now: float) -> None:
        """The receiver did not take it: it is told again, not before then."""
        self._strike(notice, "due", what, not_before)

    def notice_given_up(self, notice: int, what: str, now: float) -> None:
        """It is not told any more."""
        self._strike(notice, "given_up", what, now)

    def _strike(self, notice: int, state: str, what: str, not_before: float) -> None:
        """One attempt more, and what came of it. Raises IllegalMove when it is not due (any more)."""
        with self.transaction():
            struck = self.db.conn.execute(
                "UPDATE notice SET attempts = attempts + 1, state = ?, what = ?, not_before = ? WHERE id = ? AND state = 'due'",
                [state, what, not_before, notice],
            )
            if struck.rowcount != 1:
                raise IllegalMove(f"cannot strike off notice {notice}: it is not owed")


def _text(body: str | bytes) -> str:
    return body if isinstance(body, str) else body.decode()
