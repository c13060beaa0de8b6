"""gpu: what the cards do now and did in the last hours, as one versioned value and as lines for a terminal.

A card is a GPU by its UUID, or "cpu". What nobody knows is null in the value and a dot in the lines, never zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from whisperd.ledger.queries import Queries
from whisperd.report.status import duration
from whisperd.vocabulary import CardMinute, Reading

SCHEMA = "whisperd.gpu/1"
COLUMNS = 60
LEVELS = "▁▂▃▄▅▆▇█"
NOTHING = "·"
OLD_S = 60.0  # from here on the figures of "now" are the last ones known

THROTTLED = {
    "thermal": "slowed down by heat",
    "hw_slowdown": "slowed down by its hardware",
    "power_brake": "slowed down by its power supply",
    "power_cap": "at its power limit (usual under load)",
}
FIGURES = ("vram_used_mib", "vram_total_mib", "utilisation_percent", "temperature_c", "slowdown_c", "power_w", "power_limit_w")


def snapshot(ledger: Queries, now: float, hours: float) -> dict[str, Any]:
    """Everything `whisperd gpu` shows; the shape is a stable contract (schema whisperd.gpu/1)."""
    heard = ledger.heard("gpus")
    told_at, readings = (heard[0], msgspec.convert(heard[1]["readings"], list[Reading])) if heard else (None, [])
    minutes: dict[str, list[CardMinute]] = {}
    for minute in ledger.minutes(now - hours * 3600):
        minutes.setdefault(minute.gpu, []).append(minute)
    by_card = {reading.gpu: reading for reading in readings if reading.gpu}
    return {
        "schema": SCHEMA,
        "at": now,
        "hours": hours,
        "told_at": told_at,
        "trouble": next((reading.what for reading in readings if not reading.gpu), None),
        "cards": [_card(gpu, by_card.get(gpu), minutes.get(gpu, [])) for gpu in sorted(by_card.keys() | minutes.keys())],
    }


def _card(gpu: str, reading: Reading | None, minutes: Sequence[CardMinute]) -> dict[str, Any]:
    return {
        "gpu": gpu,
        "name": reading.name if reading else "",
        "status": reading.status if reading else None,
        "what": reading.what if reading else None,
        "now": {figure: getattr(reading, figure) for figure in FIGURES} if reading else None,
        "notes": notes(reading) if reading else [],
        "minutes": [{name: value for name, value in msgspec.structs.asdict(minute).items() if name != "gpu"} for minute in minutes],
    }


def notes(reading: Reading) -> list[str]:
    """What is special about a card now, in words."""
    said = [THROTTLED.get(reason, reason) for reason in reading.throttled]
    if reading.mig:
        said.append("divided by MIG: its load is not told, and a worker may see only a part of its memory")
    if reading.mps:
        said.append("an MPS server runs on this machine: it is used as it is, not managed")
    if reading.processes:
        said.append(f"{len(reading.processes)} process(es) on it, {_held(reading)}")
    if reading.unsupported:
        said.append("not told by this card: " + ", ".join(reading.unsupported))
    return said


def _held(reading: Reading) -> str:
    known = [process.vram_mib for process in reading.processes or () if process.vram_mib is not None]
    return f"{sum(known)} MiB" if known else "the driver does not tell their memory"


# --- for a terminal ---


def render(shown: dict[str, Any]) -> str:
    """The snapshot as lines: a card after the other, each with the curves of its last hours."""
    lines = [shown["trouble"]] if shown["trouble"] else []
    for card in shown["cards"]:
        lines += [*_now(card, shown), *_history(card["minutes"], shown["at"], shown["hours"]), ""]
    return "\n".join(lines).rstrip() or "no card is known yet: the daemon has not looked"


def _now(card: dict[str, Any], shown: dict[str, Any]) -> list[str]:
    if card["status"] is None:
        return [card["gpu"] if card["gpu"] != "cpu" else "the processor (cpu)"]
    lines = [f"{card['what']}  {card['gpu']}"]
    if shown["told_at"] is not None and shown["at"] - shown["told_at"] > OLD_S:
        lines.append(f"  last seen {duration(shown['at'] - shown['told_at'])} ago")
    if card["status"] == "ok":
        lines.append("  now       " + _figures(card["now"]))
    return lines + [f"  note      {note}" for note in card["notes"]]


def _figures(now: dict[str, Any]) -> str:
    def known(figure: str) -> str:
        return "?" if now[figure] is None else str(now[figure])

    slowdown = "" if now["slowdown_c"] is None else f" (slows down at {now['slowdown_c']})"
    return (
        f"{known('vram_used_mib')}/{known('vram_total_mib')} MiB, {known('utilisation_percent')} % busy,"
        f" {known('temperature_c')} °C{slowdown}, {known('power_w')}/{known('power_limit_w')} W"
    )


Figure = Callable[[dict[str, Any]], float | None]


def _history(minutes: Sequence[dict[str, Any]], now: float, hours: float) -> list[str]:
    if not minutes:
        return [f"  no history of the last {duration(hours * 3600)}"]
    total_mib = max((minute["memory_total_mib"] or 0 for minute in minutes), default=0)
    curves: list[tuple[str, Figure, float | None, str]] = [
        ("memory", lambda minute: minute["memory_used_max_mib"], total_mib, "MiB"),
        ("of ours", lambda minute: minute["own_max_mib"], total_mib, "MiB"),
        ("busy", lambda minute: minute["utilisation_mean_percent"], 100, "%"),
        ("heat", lambda minute: minute["temperature_max_c"], 100, "°C"),
        ("throttled", lambda minute: minute["throttled_s"] if minute["samples"] else None, 60, "s/min"),
        ("workers", lambda minute: minute["workers"], None, ""),
        ("speed", lambda minute: minute["audio_s"] / 60, None, "× real time"),
    ]
    lines = []
    for name, figure, most, unit in curves:
        buckets = in_buckets(minutes, figure, now=now, hours=hours)
        known = [value for value in buckets if value is not None]
        if known:
            reach = f"{_short(min(known))} to {_short(max(known))} {unit}".rstrip()
            lines.append(f"  {name:<9} {curve(buckets, most or max(known))}  {reach}")
    axis = f"{'-' + duration(hours * 3600):<{COLUMNS - 3}}now"
    return [*lines, f"  {'':<9} {axis}"]


def in_buckets(minutes: Sequence[dict[str, Any]], figure: Figure, *, now: float, hours: float) -> list[float | None]:
    """The highest value in each of `COLUMNS` equal parts of the time; None where nothing is known."""
    buckets: list[float | None] = [None] * COLUMNS
    span_s = hours * 3600 / COLUMNS
    for minute in minutes:
        column = COLUMNS - 1 - int((now - minute["at"]) // span_s)
        value = figure(minute)
        if value is not None:
            column = min(COLUMNS - 1, max(0, column))
            buckets[column] = max(value, buckets[column] or 0.0)
    return buckets


def curve(values: Sequence[float | None], most: float) -> str:
    """One letter for each value, on a scale from 0 to `most`."""
    top = len(LEVELS) - 1
    return "".join(NOTHING if value is None else LEVELS[min(top, round(top * value / most)) if most > 0 else 0] for value in values)


def _short(value: float) -> str:
    return f"{value:.0f}" if value == round(value) or value >= 100 else f"{value:.1f}"
