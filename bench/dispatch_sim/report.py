"""report: the saved scores of docs/optimiser/*.json into docs/optimiser.md, between its two marks, and a picture of each named scenario.

No figure between the marks is typed by hand. Fails with FileNotFoundError when the page is absent, ValueError when it has lost its marks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from bench.dispatch_sim import goals
from bench.dispatch_sim.goals import Scores, by_scenario, mean
from bench.dispatch_sim.run import Order, play, scene_of
from bench.dispatch_sim.scenes import named
from bench.measure import ROOT
from whisperd.dispatcher.simulator.record import share_of

PAGE = os.path.join(ROOT, "docs", "optimiser.md")
BEGIN, END = "<!-- figures: begin (python -m bench.dispatch_sim report) -->", "<!-- figures: end -->"


def write(page: str, results: str, *, pictures: bool) -> None:
    """Renew the generated part of the page, and the pictures beside it."""
    with open(page, encoding="utf-8") as file:
        text = file.read()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{page} has lost its marks {BEGIN!r} and {END!r}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    if pictures:
        _draw(results)
    with open(page, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n\n{figures(results)}\n\n{END}{after}")


def _draw(results: str) -> None:
    from bench.dispatch_sim import plots

    for name in named():
        _, outcome, oracle = play(Order(name, "current", 1))
        plots.draw(scene_of(name), outcome, oracle, results)


def figures(results: str) -> str:
    """The generated part of the page."""
    saved = goals.load(results)
    lines = ["### Goals", "", *_made(saved), "", *goals.table(goals.judge(saved)), ""]
    if "named" in saved:
        naive = by_scenario(saved.get("naive_named", {}).get("scores", []))
        lines += ["### Named scenarios", "", *_named(saved["named"]["scores"], naive), ""]
    lines += ["### Random scenarios", "", *_random(saved), ""]
    if "endurance" in saved:
        lines += ["### Two days", "", *_endurance(saved["endurance"]["scores"][0]), ""]
    drawn = [name for name in named() if os.path.exists(os.path.join(results, f"{name}.svg"))]
    if drawn:
        lines += [
            "### Pictures",
            "",
            "Seed 1. Dashed lines: what happens to the installation, in red what goes wrong; dotted: the card's memory.",
            "",
        ]
        for name in drawn:
            note = named()[name].note
            lines += [f"**{name}**: {note}.", "", f"![{name}: workers, batch, memory, throughput](optimiser/{name}.svg)", ""]
    return "\n".join(lines).strip()


def _made(saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
    return [f"- `{document['command']}`, {document['date']}" for document in saved.values()]


def _named(scores: Scores, naive: Mapping[str, Scores]) -> list[str]:
    seeds = sorted({one["seed"] for one in scores})
    head = (
        "| scenario | best | regret % | OOM | denied max s | slowed min | changes/h | converged min (the oracle's) |"
        " rule A % | formula B % |"
    )
    lines = [
        f"Means of seeds {', '.join(map(str, seeds))}; rule A and formula B with seed 1.",
        "",
        head,
        "|---|---|--:|--:|--:|--:|--:|---|--:|--:|",
    ]
    for name, own in by_scenario(scores).items():
        others = {one["policy"]: f"{100 * one['regret']:.1f}" for one in naive.get(name, [])}
        denied = max((waited for one in own for waited in one["denied_s"]), default=0.0)
        cells = [
            name,
            own[0]["best"][0].partition(": ")[2],
            f"{100 * mean(one['regret'] for one in own):.1f}",
            f"{mean(one['out_of_memory'] for one in own):.1f}",
            f"{denied:.0f}",
            f"{mean(one['throttled_s'] for one in own) / 60:.1f}",
            f"{mean(one['changes_per_h'] for one in own):.1f}",
            " ".join(f"{_minutes(step['took_s'])} ({_minutes(step['oracle_s'])})" for step in own[0]["convergence"]),
            others.get("rule-a", ""),
            others.get("formula-b", ""),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _minutes(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds / 60:.1f}"


def _random(saved: Mapping[str, Mapping[str, Any]]) -> list[str]:
    head = "| set | policy | scenarios | p50 | p90 | p95 | max | OOM /1000 | load OOM | denied p95 s | slowed p95 min | changes/h |"
    lines = [head, "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"]
    for part, name in (
        ("development", "development"),
        ("held_out", "held out"),
        ("crooked", "held out, crooked"),
        ("naive_held_out", "held out, the first 60"),
    ):
        by_policy: dict[str, list[Mapping[str, Any]]] = {}
        for one in saved.get(part, {}).get("scores", []):
            by_policy.setdefault(one["policy"], []).append(one)
        lines += [_row(name, policy, own) for policy, own in by_policy.items()]
    return lines


def _row(name: str, policy: str, own: Sequence[Mapping[str, Any]]) -> str:
    regrets = [100 * one["regret"] for one in own]
    shares = [f"{share_of(regrets, share):.1f}" for share in (0.5, 0.9, 0.95)]
    denied = [waited for one in own for waited in one["denied_s"]]
    cells = [
        name,
        policy,
        str(len(own)),
        *shares,
        f"{max(regrets, default=math.nan):.1f}",
        f"{1000 * sum(one['out_of_memory'] for one in own) / max(1, sum(one['jobs'] for one in own)):.2f}",
        str(sum(one["load_out_of_memory"] for one in own)),
        f"{share_of(denied, 0.95):.0f}",
        f"{share_of([one['throttled_s'] / 60 for one in own], 0.95):.1f}",
        f"{mean(one['changes_per_h'] for one in own):.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _endurance(run: Mapping[str, Any]) -> list[str]:
    same = "the same bytes both times" if run["sha256"][0] == run["sha256"][1] else "different bytes"
    changes = [f"{run[key]:.2f}" for key in ("changes_per_h_first_8", "changes_per_h_8_to_24", "changes_per_h_later")]
    return [
        f"`{run['scenario']}` for {run['hours']:g} h: {changes[0]} changes an hour in the first 8 h, {changes[1]} until the end of the day,"
        f" {changes[2]} on the second; {run['out_of_memory']} out of memory. {run['calls']} calls of `decide`, p50"
        f" {run['decide_p50_ms']:.2f} ms, p99 {run['decide_p99_ms']:.2f} ms; {same}."
    ]
