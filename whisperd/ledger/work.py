"""work: verbs between the queue and the transcript: claims, windows, leases, and how an attempt ends.

Fails as `store` does; with `LeaseLost` when the job runs for somebody else now.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from whisperd.ledger.store import NO_FAILURE, NO_LEASE, IllegalMove, Store, as_json, failing, insert, known
from whisperd.vocabulary import Failure, FailureKind, Window


class WorkVerbs(Store):
    """Jobs in the hands of engines."""

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
                **NO_FAILURE,
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
                **known(duration_s=duration_s),
            )
            self.db.conn.execute(
                "INSERT INTO checkpoint (job_id, window_index, end_s, body, made_by, front_end) VALUES (?, ?, ?, ?, ?, ?)"
                " ON CONFLICT DO NOTHING",
                [job, window.index, window.end_s, as_json(window), made_by, front_end or None],
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
        self._move("progress", job, now, child=child, lease_until=now + lease_s, position_s=position_s, **known(duration_s=duration_s))

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
        changes = {"not_before": not_before, **known(needs_mib=needs_mib)}
        self._move("release", job, now, child=child, note=failure.what, **changes, **NO_LEASE, **failing(failure, tail))

    def interrupt(self, job: int, child: str, why: str, now: float) -> None:
        """running → ready at once: what stopped the work was not the file's fault, so the attempt is given back."""
        self._give_back("interrupt", job, child, now, note=why, not_before=now)

    def wait(self, job: int, child: str, failure: Failure, now: float, *, not_before: float, needs_mib: int | None = None) -> None:
        """running → ready: something that is not the file is absent; no attempt is spent. `needs_mib`: as with `release`."""
        changes = {"not_before": not_before, **known(needs_mib=needs_mib)}
        self._give_back("wait", job, child, now, note=failure.what, **changes, **failing(failure, ""))

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
                **NO_LEASE,
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
        asked: str = "",
        revision: str = "",
        size: int = 0,
    ) -> None:
        """running → transcribed: the transcript is staged and durable, so the windows are no longer needed.

        With a question (`asked`) it is kept as the answer to it, for whoever has the same content: `revision` is that of the model, `size`
        the bytes of the staged file.
        """
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
                **({"asked": asked} if asked else {}),
                **NO_LEASE,
            )
            self._forget_checkpoints(job)
            if asked:
                kept = {"sha256": sha256, "asked": asked, "transcript": transcript, "revision": revision, "bytes": size}
                row = {**kept, "used_at": now, "job_id": job}
                self.db.conn.execute(insert("result", row).replace("INSERT", "INSERT OR REPLACE"), row)

    def reuse(self, job: int, now: float, *, transcript: str, result: Mapping[str, Any]) -> None:
        """ready → transcribed without an engine: the stored `result` of the same content, asked the same, is published once more.

        `transcript` is the staged file of this job. Language, length and verdict are those of the job that made it (`origin`).
        """
        with self.transaction():
            row = self._require("reuse", job)
            kept = self.result(result["sha256"], result["asked"])
            if kept is None or kept["job_id"] != result["job_id"]:
                raise IllegalMove(f"cannot reuse a transcript for job {job}: it is not kept any more")
            if row["sha256"] not in (None, kept["sha256"]) or row["asked"] not in (None, kept["asked"]):
                raise IllegalMove(f"cannot reuse a transcript for job {job}: it is of another content, or was asked otherwise")
            maker = self.job(kept["job_id"])
            self._move(
                "reuse",
                job,
                now,
                note=f"its content is that of job {maker['id']}",
                transcript=transcript,
                sha256=kept["sha256"],
                asked=kept["asked"],
                origin=maker["id"],
                duration_s=maker["duration_s"],
                position_s=maker["duration_s"],
                language=maker["language"],
                quality=maker["quality"],
                **NO_FAILURE,
            )
            self._forget_checkpoints(job)
            self.db.conn.execute(
                "UPDATE result SET used_at = max(used_at, ?) WHERE sha256 = ? AND asked = ?", [now, kept["sha256"], kept["asked"]]
            )

    def fail(self, job: int, child: str, failure: Failure, now: float, *, tail: str = "") -> None:
        """running → failed: no further attempt; an error file will say so in the outbox."""
        if failure.kind is FailureKind.WAITING:
            raise IllegalMove(f"cannot fail job {job} for something that is waited for: {failure.what}")
        self._move("fail", job, now, child=child, note=failure.what, ended_at=now, **NO_LEASE, **failing(failure, tail))
