"""queueing: who is next. Pure: rows and `now` in, one row out."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

AGING_S = 1800.0
"""Waiting this long lifts a job by one priority class, so that nothing starves."""


def next_job(ready: Sequence[dict[str, Any]], now: float, *, inboxes: Collection[int]) -> dict[str, Any] | None:
    """The job to run now among `ready`, of inboxes that can open their files: by aged class, then first come, first served."""
    eligible = [row for row in ready if row["inbox_id"] in inboxes]
    return min(eligible, key=lambda row: _rank(row, now), default=None)


def _rank(row: dict[str, Any], now: float) -> tuple[int, float, int]:
    waited_s = max(0.0, now - row["ready_at"])
    return row["priority"] - int(waited_s // AGING_S), row["ready_at"], row["id"]
