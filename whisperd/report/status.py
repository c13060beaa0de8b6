"""status: what the daemon is doing, as one versioned value, as text for a terminal, and as one line for systemd."""

from __future__ import annotations

import fcntl
import os
import time
from typing import Any

from whisperd.errors import printable
from whisperd.ledger.queries import Queries, Row

SCHEMA = "whisperd.status/1"
LOCK_NAME = "daemon.lock"


def snapshot(ledger: Queries, state_dir: str, now: float) -> dict[str, Any]:
    """Everything `whisperd status` shows; the shape is a stable contract (schema whisperd.status/1)."""
    heard = ledger.heard("daemon")
    said = heard[1] if heard else {}
    audio_s, wall_s = ledger.throughput_since(now - 3600)
    plans = ledger.last_plans(1)
    return {
        "schema": SCHEMA,
        "at": now,
        "daemon": {"running": daemon_runs(state_dir), "pid": said.get("pid"), "version": said.get("version"), "since": said.get("since")},
        "waits_for": said.get("blocked") or None,
        "outboxes_down": said.get("outboxes_down", []),
        "model": said.get("model") or None,
        "engines": said.get("engines", []),
        "batches": said.get("batches"),
        "counts": ledger.counts(),
        "quality": ledger.qualities(),
        "running": [_running(row, now) for row in ledger.running()],
        "last_hour": {**ledger.outcomes_since(now - 3600), "audio_s": round(audio_s, 1), "working_s": round(wall_s, 1)},
        "gpus": [
            {key: row[key] for key in ("gpu", "status", "what", "vram_used_mib", "vram_total_mib", "utilisation_percent", "temperature_c")}
            for row in _newest(ledger.latest_readings())
        ],
        "plan": {"workers": plans[0]["workers"], "reason": plans[0]["reason"], "at": plans[0]["at"]} if plans else None,
        "inboxes": [
            {
                "path": printable(row["path"]),
                "outbox": printable(row["outbox"]),
                "state": row["state"],
                "what": row["what"],
                "since": row["since"],
            }
            for row in ledger.inboxes()
        ],
        "alerts": [{"check": row["check_name"], "what": row["what"], "since": row["raised_at"]} for row in ledger.open_alerts()],
    }


def _newest(readings: list[Row]) -> list[Row]:
    """Readings of the newest look only: a GPU that came up replaces the reading that said there was none."""
    latest = max((row["at"] for row in readings), default=0.0)
    return [row for row in readings if row["at"] >= latest - 5]


def _running(row: Row, now: float) -> dict[str, Any]:
    done_s, length_s, taken_s = row["position_s"] or 0.0, row["duration_s"], now - row["started_at"]
    share = min(1.0, done_s / length_s) if length_s else None
    return {
        "job": row["id"],
        "path": printable(row["path"]),
        "child": row["lease_child"],
        "attempt": row["attempts"],
        "position_s": done_s,
        "duration_s": length_s,
        "share": None if share is None else round(share, 3),
        "eta_s": None if not share else round(taken_s * (1 - share) / share),
    }


def daemon_runs(state_dir: str) -> bool:
    """Whether a daemon holds the state directory (asked of its lock, not of a pid that may be somebody else's by now)."""
    try:
        lock = os.open(os.path.join(state_dir, LOCK_NAME), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(lock)


def status_line(counts: dict[str, int], *, running: int, waits_for: str, down: list[str]) -> str:
    """systemd's STATUS=: what a person at `systemctl status` wants to know."""
    waiting = counts["seen"] + counts["ready"]
    parts = [f"{running} running", f"{waiting} waiting", f"{counts['done']} done", f"{counts['failed']} failed"]
    if counts["transcribed"]:
        parts.insert(2, f"{counts['transcribed']} to publish")
    line = ", ".join(parts)
    for reason in ([f"waiting: {waits_for}"] if waits_for else []) + down:
        line += f"; {reason}"
    return line[:400]


def render(shown: dict[str, Any]) -> str:
    """The snapshot for a terminal."""
    counts, daemon = shown["counts"], shown["daemon"]
    lines = [_daemon_line(daemon, shown["at"])]
    if shown["waits_for"]:
        lines.append(f"waits      {shown['waits_for']}")
    lines += [f"waits      {reason}" for reason in shown["outboxes_down"]]
    lines.append("files      " + "  ".join(f"{name} {number}" for name, number in counts.items() if number) or "files      none yet")
    doubtful = shown["quality"]["doubtful"]
    if doubtful:
        lines.append(f"doubtful   {doubtful} of the files that are done: see `whisperd jobs --quality doubtful`")
    for job in shown["running"]:
        lines.append("running    " + _running_line(job))
    hour = shown["last_hour"]
    if hour["working_s"]:
        speed = hour["audio_s"] / hour["working_s"]
        lines.append(
            f"last hour  {hour['done']} done, {hour['failed']} failed, {hour['audio_s'] / 60:.1f} min of audio, {speed:.1f}× real time"
        )
    if shown["model"]:
        lines.append(f"model      {shown['model']}")
    if shown["batches"] and shown["batches"]["batches"]:
        lines.append(f"engine     {_batches_line(shown['batches'])}")
    lines += [f"gpu        {_gpu_line(gpu)}" for gpu in shown["gpus"]]
    if shown["plan"]:
        lines.append(f"plan       {shown['plan']['workers']} worker(s): {shown['plan']['reason']}")
    for inbox in shown["inboxes"]:
        lines.append(f"inbox      {inbox['path']} → {inbox['outbox']}" + (f"  DOWN: {inbox['what']}" if inbox["state"] == "down" else ""))
    lines += [f"alert      {alert['check']}: {alert['what']}" for alert in shown["alerts"]]
    return "\n".join(lines)


def _daemon_line(daemon: dict[str, Any], now: float) -> str:
    if not daemon["running"]:
        return "daemon     not running"
    return f"daemon     running (pid {daemon['pid']}, version {daemon['version']}) for {duration(now - (daemon['since'] or now))}"


def _running_line(job: dict[str, Any]) -> str:
    share = "" if job["share"] is None else f"  {bar(job['share'])} {job['share']:4.0%}"
    eta = "" if job["eta_s"] is None else f", about {duration(job['eta_s'])} left"
    return f"#{job['job']} {job['path']}{share}{eta}"


def _batches_line(sums: dict[str, Any]) -> str:
    encoder = "" if sums["encoded_per_needed"] is None else f", encoder {sums['encoded_per_needed']:.2f} per window"
    return (
        f"{sums['windows']} windows in {sums['batches']} batches (mean {sums['mean_batch']:.1f} of {sums['mean_limit']:.3g}){encoder},"
        f" {sums['out_of_memory']} out of memory"
    )


def _gpu_line(gpu: dict[str, Any]) -> str:
    if gpu["status"] != "ok":
        return str(gpu["what"])
    used = "?" if gpu["vram_used_mib"] is None else gpu["vram_used_mib"]
    load = "?" if gpu["utilisation_percent"] is None else gpu["utilisation_percent"]
    heat = "?" if gpu["temperature_c"] is None else gpu["temperature_c"]
    return f"{gpu['what']}: {used}/{gpu['vram_total_mib']} MiB, {load} % busy, {heat} °C"


def bar(share: float, width: int = 20) -> str:
    full = round(share * width)
    return "█" * full + "░" * (width - full)


def duration(seconds: float) -> str:
    """3725 → '1 h 02 min'."""
    seconds = max(0, int(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def clock(at: float | None) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at)) if at else "-"
