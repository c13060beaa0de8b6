"""plots: one picture for each named scenario: workers and batch, memory, throughput beside the oracle's, and what happened when.

The same runs give the same bytes. Fails with ImportError without matplotlib (the `bench` extra).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from typing import Any

from bench.plots import INK, KEPT, MISSED, OTHER
from whisperd.dispatcher.simulator.outcome import Glance, Outcome
from whisperd.dispatcher.simulator.scenario import Scenario

SHADES = ("#2e7d5b", "#1f5f8b", "#d9a441")
EVENTS = 60
"""More of them would hide the curves."""
EVERY = 4
"""Glances between two points of a throughput curve."""
SAID = {
    "foreign": "others' memory",
    "ambient": "ambient",
    "blind": "no figures",
    "lost": "card lost or back",
    "frozen": "driver",
    "cores": "others' cores",
    "content": "other recordings",
    "limits": "operator's limits",
    "restart": "restart",
    "out_of_memory": "out of memory",
    "worker_died": "worker died",
}


def draw(scenario: Scenario, outcome: Outcome, oracle: Outcome, directory: str) -> str:
    """One scenario's picture; the name of the file written."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whisperd", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.edgecolor": INK}
    )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6.4))
    rows = figure.subplots(4, 1, sharex=True, gridspec_kw={"height_ratios": (1, 1, 1.3, 1.3)})
    for axes in rows:
        axes.spines[["top", "right"]].set_visible(False)
    for index, card in enumerate(scenario.cards):
        own = [glance for glance in outcome.glances if glance.card == index]
        shade = SHADES[index % len(SHADES)]
        _steps(rows[0], own, [glance.workers for glance in own], shade, label=card.gpu)
        _steps(rows[1], own, [glance.batch for glance in own], shade)
        _memory(rows[2], own, shade, card.memory_mib, first=index == 0)
    _throughput(rows[3], outcome, oracle)
    for axes in rows:
        _events(axes, outcome, named=axes is rows[0])
    rows[0].set_ylabel("workers")
    rows[1].set_ylabel("batch")
    rows[2].set_ylabel("memory, GiB")
    rows[3].set_ylabel("× real time")
    rows[3].set_xlabel("hours")
    rows[3].set_xlim(0, scenario.horizon_s / 3600)
    for axes in rows:
        axes.set_ylim(bottom=0)
    if len(scenario.cards) > 1:
        rows[0].legend(frameon=False, ncols=len(scenario.cards), loc="upper right", bbox_to_anchor=(1.0, -0.02), fontsize=8)
    name = f"{scenario.name}.svg"
    figure.savefig(
        os.path.join(directory, name), format="svg", metadata={"Date": None, "Creator": "bench.dispatch_sim"}, bbox_inches="tight"
    )
    return name


def _steps(axes: Any, glances: Sequence[Glance], values: Sequence[float], shade: str, label: str | None = None) -> None:
    """Only the moments at which the value changes."""
    last = len(glances) - 1
    kept = [row for row in range(len(glances)) if row in (0, last) or values[row] != values[row - 1]]
    axes.step([glances[row].at_s / 3600 for row in kept], [values[row] for row in kept], where="post", color=shade, label=label)


def _memory(axes: Any, glances: Sequence[Glance], shade: str, total_mib: float, *, first: bool) -> None:
    own = [round(glance.own_mib / 1024, 1) for glance in glances]
    foreign = [round(glance.foreign_mib / 1024, 1) for glance in glances]
    _steps(axes, glances, own, shade, label="ours" if first else None)
    if any(foreign):
        _steps(axes, glances, foreign, MISSED, label="other programs'" if first else None)
        together = [round(mine + theirs, 1) for mine, theirs in zip(own, foreign, strict=True)]
        _steps(axes, glances, together, INK, label="together" if first else None)
    axes.axhline(total_mib / 1024, color=shade, linestyle=":", linewidth=0.8)
    if first:
        axes.legend(frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 0.98), fontsize=8)


def _throughput(axes: Any, outcome: Outcome, oracle: Outcome) -> None:
    """Audio seconds per second, over a few minutes each."""
    for run, shade, label in ((oracle, OTHER, "oracle"), (outcome, KEPT, outcome.policy)):
        own = [glance for glance in run.glances if glance.card == 0][::EVERY]
        hours = [glance.at_s / 3600 for glance in own[1:]]
        rates = [(after.progress_s - before.progress_s) / (after.at_s - before.at_s) for before, after in itertools.pairwise(own)]
        axes.plot(hours, rates, color=shade, linewidth=1.0, label=label)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 0.98), fontsize=8)


def _events(axes: Any, outcome: Outcome, *, named: bool) -> None:
    """A line for each; in the first row with its name, the first of its kind only."""
    seen: set[str] = set()
    labels: dict[float, list[str]] = {}
    for happening in outcome.happenings[:EVENTS]:
        bad = happening.what in ("out_of_memory", "worker_died")
        axes.axvline(happening.at_s / 3600, color=MISSED if bad else OTHER, linewidth=0.7, linestyle="--")
        if happening.what not in seen:
            seen.add(happening.what)
            labels.setdefault(happening.at_s, []).append(SAID[happening.what])
    for at_s, words in labels.items() if named else ():
        axes.annotate(", ".join(words), (at_s / 3600, 1.02), xycoords=("data", "axes fraction"), fontsize=7, color=INK, rotation=15)
