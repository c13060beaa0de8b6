"""plan: the optimiser's plans as a value and as sentences; a replay of history beside what really happened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from whisperd.report.status import clock, duration

SCHEMA = "whisperd.plan/1"
REPLAY_SCHEMA = "whisperd.replay/1"


def shown(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of the ledger, the newest first, as a value (schema whisperd.plan/1), the newest last."""
    return {"schema": SCHEMA, "plans": [_plan(row) for row in reversed(rows)]}


def _plan(row: Mapping[str, Any]) -> dict[str, Any]:
    body = row["body"] or {}
    return {
        "at": row["at"],
        "workers": row["workers"],
        "reason": row["reason"],
        "cards": body.get("cards", []),
        "reasons": body.get("reasons", []),
    }


def render(plans: Mapping[str, Any]) -> str:
    """Each plan as sentences: when, what should run, and why."""
    if not plans["plans"]:
        return "no plans yet"
    return "\n".join(line for plan in plans["plans"] for line in _lines(plan))


def _lines(plan: Mapping[str, Any]) -> list[str]:
    what = "; ".join(_card(card) for card in plan["cards"]) or f"{plan['workers']} worker{_s(plan['workers'])}"
    why = [_because(reason) for reason in plan["reasons"]] or [plan["reason"]]
    return [f"{clock(plan['at'])}  {what}", *(f"    {text}" for text in why)]


def _card(card: Mapping[str, Any]) -> str:
    if not card["workers"]:
        return f"nothing on {card['gpu']}"
    kind = f"{card['model']} ({card['compute_type']})" if card["compute_type"] else card["model"]
    return f"{card['workers']} worker{_s(card['workers'])} with batch {card['batch']} for {kind} on {card['gpu']}"


def _because(reason: Mapping[str, Any]) -> str:
    where = f"{reason['gpu']}: " if reason["gpu"] else ""
    return f"{where}{reason['text']} [{reason['code']}]"


def _s(number: int) -> str:
    return "" if number == 1 else "s"


def render_replay(replay: Mapping[str, Any]) -> str:
    """What happened beside what the policy would have done."""
    rows = [("", "happened", f"policy {replay['policy']}")]
    for name, key, shape in (
        ("audio transcribed", "audio_s", _hours),
        ("speed", "speed", lambda value: f"{value:.1f}× real time"),
        ("recordings done", "done", str),
        ("wait, median", "wait_p50_s", duration),
        ("wait, 95 % within", "wait_p95_s", duration),
        ("out of memory", "out_of_memory", str),
        ("changes of plan", "changes", str),
    ):
        rows.append((name, _cell(replay["happened"][key], shape), _cell(replay["replayed"][key], shape)))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([f"{replay['note']}, {duration(replay['seconds'])}", *table])


def _cell(value: Any, shape: Any) -> str:
    return "?" if value is None else str(shape(value))


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h"
