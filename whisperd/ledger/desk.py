"""desk: the operator's verbs.

Fails as `store` does.
"""

from __future__ import annotations

from whisperd.ledger.reader import Row
from whisperd.ledger.store import BY_OPERATOR, NO_FAILURE, NO_LEASE, IllegalMove, Store, as_json
from whisperd.vocabulary import LIVE, JobOptions


class DeskVerbs(Store):
    """What a person asks for."""

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
                spooled=0,  # the copy went when the job ended
                ready_at=now if ready_at is None else ready_at,
                not_before=now,
                ended_at=None,
                reported_at=None,
                **NO_FAILURE,
            )

    def cancel(self, job: int, now: float, *, options: JobOptions | None = None) -> None:
        """seen, ready, running → cancelled. `options` are for a file that has not settled yet: a retry begins with them."""
        with self.transaction():
            kept = self.job(job)["options"] if self.exists(job) else None
            chosen = as_json(options or JobOptions()) if kept is None else kept
            self._move("cancel", job, now, note=BY_OPERATOR, ended_at=now, held=0, options=chosen, **NO_LEASE)

    def hold(self, job: int, now: float) -> None:
        """seen and ready stay, running → ready with its windows and its attempt given back: not handed out until `unhold`."""
        with self.transaction():
            row = self._held(job, False, "hold")
            attempts = max(0, row["attempts"] - (row["state"] == "running"))
            self._move("hold", job, now, note=BY_OPERATOR, held=1, attempts=attempts, **NO_LEASE)

    def unhold(self, job: int, now: float) -> None:
        """A held job goes on as if nothing had been."""
        with self.transaction():
            self._held(job, True, "unhold")
            self._move("unhold", job, now, note=BY_OPERATOR, held=0)

    def prioritise(self, job: int, priority: int, now: float) -> None:
        """seen, ready, running: another class (0 urgent, 1 normal, 2 low)."""
        self._move("prioritise", job, now, note=f"class {priority}, {BY_OPERATOR}", priority=priority)

    def _held(self, job: int, held: bool, verb: str) -> Row:
        row = self._require(verb, job)
        if row["state"] in LIVE and bool(row["held"]) != held:
            raise IllegalMove(f"cannot {verb} job {job}: it is {'held already' if row['held'] else 'not held'}")
        return row
