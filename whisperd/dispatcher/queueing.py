"""queueing: who is next, and to whom. Pure: rows and `now` in, one row out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

AGING_S = 1800.0
"""Waiting this long lifts a job by one priority class, so that nothing starves."""


class Seat(NamedTuple):
    """What an engine has in hand, and how much more it may have."""

    engine: int
    tasks: int
    free: int
    suspect: bool  # what it has in hand is one job that must run alone


def next_job(ready: Sequence[dict[str, Any]], now: float, *, inboxes: Collection[int]) -> dict[str, Any] | None:
    """The job to run now among `ready`, of inboxes that can open their files: by aged class, then first come, first served."""
    eligible = [row for row in ready if row["inbox_id"] in inboxes]
    return min(eligible, key=lambda row: _rank(row, now), default=None)


def suspect(row: dict[str, Any]) -> bool:
    """Whether a ready job may have killed a worker, so that it must run alone (docs/decisions/0009).

    An attempt is behind it, and the job itself did not fail in it: a worker died, or what came since (an interruption, a share that was
    away) has covered the cause. Told by the row alone, it outlives the daemon.
    """
    failed_by_itself = row["failure_kind"] == "transient" and row["failure_code"] != "worker_died"
    return row["attempts"] > 0 and not failed_by_itself


def hand_out(
    ready: Sequence[dict[str, Any]], seats: Sequence[Seat], now: float, *, inboxes: Collection[int]
) -> tuple[dict[str, Any], Seat] | None:
    """The next job and the engine with most room for it; None when there is no job, no room, or nothing for it to do but wait.

    A suspect gets an engine without tasks, which then takes nothing else. When one is next and no engine is empty, nobody overtakes it,
    so that one becomes empty; unless another suspect runs already, whose engine will be.
    """
    open_seats = [seat for seat in seats if seat.free > 0 and not seat.suspect]
    if not open_seats:
        return None
    roomiest = max(open_seats, key=lambda seat: (seat.free, -seat.tasks))
    row = next_job(ready, now, inboxes=inboxes)
    if row is None or not suspect(row):
        return None if row is None else (row, roomiest)
    empty = next((seat for seat in open_seats if seat.tasks == 0), None)
    if empty is not None:
        return row, empty
    if any(seat.suspect for seat in seats):
        return hand_out([other for other in ready if not suspect(other)], seats, now, inboxes=inboxes)
    return None


def _rank(row: dict[str, Any], now: float) -> tuple[int, float, int]:
    waited_s = max(0.0, now - row["ready_at"])
    return row["priority"] - int(waited_s // AGING_S), row["ready_at"], row["id"]
