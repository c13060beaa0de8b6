"""observations: what the daemon notes of itself and of the cards.

Fails as `store` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from whisperd.ledger.figures import LEARNED_KEY
from whisperd.ledger.store import Store, as_json, insert
from whisperd.vocabulary import CardMinute, Plan, Reading


class Observations(Store):
    """Readings, plans, minutes, lessons, alerts, topics."""

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
        row = {"at": now, "workers": plan.workers, "reason": plan.reason, "body": None if body is None else as_json(body)}
        with self.transaction():
            self.db.table("plan").insert(row)

    def record_minutes(self, minutes: Sequence[CardMinute]) -> None:
        """One row for a minute of a card; told again, the last word stands."""
        with self.transaction():
            self.db.table("card_minute").upsert_all([msgspec.structs.asdict(minute) for minute in minutes], pk=("gpu", "at"))

    def learn(self, rows: Sequence[Mapping[str, Any]], now: float) -> None:
        """What the optimiser learned, of each GPU, driver, model, precision and batch; `body` is its own."""
        kept = [{**{name: row[name] for name in LEARNED_KEY}, "body": as_json(row["body"]), "updated_at": now} for row in rows]
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
                insert("vram_peak", row) + " ON CONFLICT DO UPDATE SET peak_mib = excluded.peak_mib, measured_at = excluded.measured_at"
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
