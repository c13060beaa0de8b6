"""life: one file's whole life, as a value and as text."""

from __future__ import annotations

from typing import Any

from whisperd.errors import printable
from whisperd.ledger.queries import Queries, Row
from whisperd.report.status import clock

SCHEMA = "whisperd.job/1"
LIST_SCHEMA = "whisperd.jobs/1"


QUALITY = {
    "good": "good",
    "second_pass": "good, after a second pass over parts of it",
    "doubtful": "doubtful: the JSON transcript marks the parts",
}


def brief(row: Row) -> dict[str, Any]:
    """One line of `whisperd jobs` (schema whisperd.job/1, short form)."""
    return {
        "job": row["id"],
        "state": row["state"],
        "path": printable(row["path"]),
        "inbox": printable(row["inbox_path"]),
        "size": row["size"],
        "attempts": row["attempts"],
        "priority": row["priority"],
        "held": bool(row["held"]),
        "duration_s": row["duration_s"],
        "language": row["language"],
        "process_s": row["process_s"],
        "quality": row["quality"],
        "seen_at": row["seen_at"],
        "ended_at": row["ended_at"],
        "failure": _failure(row),
    }


def _failure(row: Row) -> dict[str, Any] | None:
    if row["failure_code"] is None:
        return None
    return {"kind": row["failure_kind"], "code": row["failure_code"], "what": row["failure_what"], "hint": row["failure_hint"]}


def whole(ledger: Queries, job: int) -> dict[str, Any]:
    """Everything the ledger knows of one job. Raises LookupError."""
    row = ledger.job(job)
    return {
        "schema": SCHEMA,
        **brief(row),
        "sha256": row["sha256"],
        "checkpoints": len(ledger.windows(job)),
        "last_lines": row["failure_tail"].splitlines(),
        "published": [
            {"path": printable(item["outbox"]) + "/" + printable(item["path"]), "format": item["format"], "sha256": item["sha256"]}
            for item in ledger.publications(job)
        ],
        "events": [
            {key: event[key] for key in ("at", "verb", "from_state", "to_state", "attempt", "note")} for event in ledger.events(job)
        ],
    }


def render(shown: dict[str, Any]) -> str:
    """The life for a terminal."""
    lines = [
        f"job {shown['job']}: {shown['path']}",
        f"  state     {shown['state']}",
        f"  inbox     {shown['inbox']}",
        f"  size      {shown['size']} bytes",
    ]
    if shown["duration_s"]:
        lines.append(
            f"  length    {shown['duration_s']:.1f} s, language {shown['language'] or '?'}, worked {shown['process_s'] or 0:.1f} s"
        )
    if shown["quality"]:
        lines.append(f"  quality   {QUALITY[shown['quality']]}")
    if shown["failure"]:
        lines += [f"  failure   {shown['failure']['what']}", f"  to do     {shown['failure']['hint'] or '-'}"]
    lines += [f"  | {line}" for line in shown["last_lines"]]
    lines += [f"  published {item['path']}" for item in shown["published"]]
    for event in shown["events"]:
        note = f"  ({event['note']})" if event["note"] else ""
        move = f"{event['from_state'] or '·':>11} → {event['to_state']:<11}"
        lines.append(f"  {clock(event['at'])}  {event['verb']:<10} {move} attempt {event['attempt']}{note}")
    return "\n".join(lines)


def table(rows: list[dict[str, Any]]) -> str:
    """`whisperd jobs` for a terminal."""
    if not rows:
        return "no jobs"
    lines = [f"{'job':>6}  {'state':<11} {'length':>8}  {'att':>3}  file"]
    for row in rows:
        length = "" if row["duration_s"] is None else f"{row['duration_s']:.1f} s"
        why = f"  [{row['failure']['what']}]" if row["failure"] and row["state"] == "failed" else ""
        why = "  [doubtful]" if row["quality"] == "doubtful" else why
        why = "  [held]" if row["held"] else why
        lines.append(f"{row['job']:>6}  {row['state']:<11} {length:>8}  {row['attempts']:>3}  {row['path']}{why}")
    return "\n".join(lines)
