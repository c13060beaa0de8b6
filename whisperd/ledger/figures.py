"""figures: how many, how fast, how full: what the desk and health show. No answer counts a million rows."""

from __future__ import annotations

import json

import msgspec

from whisperd.ledger.reader import Reader, Row
from whisperd.vocabulary import CardMinute, State

QUALITIES = ("good", "second_pass", "doubtful")
LEARNED_KEY = ("gpu", "driver", "model", "compute_type", "batch")

_LATEST_READINGS = (  # one step in the index for each GPU
    "WITH RECURSIVE card (gpu) AS (SELECT min(gpu) FROM reading UNION ALL"
    " SELECT (SELECT min(gpu) FROM reading WHERE gpu > card.gpu) FROM card WHERE gpu IS NOT NULL)"
    " SELECT reading.* FROM card CROSS JOIN reading ON reading.id = (SELECT max(id) FROM reading WHERE gpu = card.gpu)"
    " ORDER BY reading.gpu"
)


class FigureQueries(Reader):
    """Read access to figures."""

    def counts(self) -> dict[str, int]:
        """Number of jobs in every state (zeros included)."""
        found = {row["state"]: row["n"] for row in self.db.query("SELECT state, sum(jobs) AS n FROM tally GROUP BY state")}
        return {state.value: found.get(state.value, 0) for state in State}

    def qualities(self) -> dict[str, int]:
        """How many of the transcripts that are out have which verdict (zeros included)."""
        rows = self.db.query("SELECT quality, sum(jobs) AS n FROM tally WHERE state = 'done' AND quality <> '' GROUP BY quality")
        return dict.fromkeys(QUALITIES, 0) | {row["quality"]: row["n"] for row in rows}

    def outcomes_since(self, since: float) -> dict[str, int]:
        """How many jobs ended done and failed since then."""
        rows = self.db.query(
            "SELECT state, count(*) AS n FROM job INDEXED BY job_by_end WHERE ended_at >= ? AND state IN ('done', 'failed') GROUP BY state",
            [since],
        )
        return {"done": 0, "failed": 0} | {row["state"]: row["n"] for row in rows}

    def throughput_since(self, since: float) -> tuple[float, float]:
        """Audio seconds and working seconds of the jobs that finished since then."""
        row = self.db.conn.execute("SELECT coalesce(sum(audio_s), 0), coalesce(sum(wall_s), 0) FROM throughput WHERE at >= ?", [since])
        audio_s, wall_s = row.fetchone()
        return float(audio_s), float(wall_s)

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

    # --- what the daemon observes ---

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
        return list(self.db.query(_LATEST_READINGS))

    def open_alerts(self) -> list[Row]:
        return list(self.db.table("alert").rows_where("cleared_at IS NULL", order_by="raised_at"))
