"""plots: the saved figures as SVG, the same bytes for the same figures (no dates, no random ids inside).

Owns: the plots in docs/performance/. A plot whose figures were not saved is left out. Fails with ImportError without matplotlib (the
`bench` extra).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

INK, KEPT, MISSED, OTHER = "#333333", "#2e7d5b", "#c0392b", "#8a94a6"
Documents = Mapping[str, Mapping[str, Any]]


def draw(documents: Documents, directory: str) -> list[str]:
    """Every plot whose figures are there; the names of the files written."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "whisperd", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": INK}
    )
    written = []
    for name, plot in PLOTS.items():
        figure = plot(documents)
        if figure is not None:
            figure.savefig(
                os.path.join(directory, name), format="svg", metadata={"Date": None, "Creator": "bench.plots"}, bbox_inches="tight"
            )
            written.append(name)
    return written


def bars(documents: Documents) -> Any:
    """How much of its limit each judged figure takes: left of the line is kept."""
    rows = [(f"{bar['name']} ({name})", _taken(bar), bar["verdict"]) for name, document in documents.items() for bar in document["bars"]]
    rows = [(name, taken, verdict) for name, taken, verdict in rows if verdict]
    if not rows:
        return None
    figure, axes = _axes(0.27 * len(rows) + 1)
    colours = [KEPT if verdict == "kept" else MISSED for _, _, verdict in rows]
    axes.barh([name for name, _, _ in rows], [min(taken, 2.0) for _, taken, _ in rows], color=colours)
    axes.axvline(1.0, color=INK)
    axes.set_xlim(0, 2)
    axes.set_xlabel("share of the limit (at most 1 is kept; cut off at 2)")
    axes.invert_yaxis()
    return figure


def _taken(bar: Mapping[str, Any]) -> float:
    if not bar["verdict"] or not bar["limit"] or not bar["figure"]:
        return 0.0
    share = float(bar["figure"]) / float(bar["limit"])
    return share if bar["at_most"] else 1 / share


def rivals(documents: Documents) -> Any:
    """CPU-seconds a file of every contender."""
    if "rivals" not in documents:
        return None
    found = sorted(documents["rivals"]["details"]["cpu_s_a_file"].items(), key=lambda item: item[1])
    figure, axes = _axes(0.3 * len(found) + 1)
    axes.barh(
        [name for name, _ in found], [value for _, value in found], color=[KEPT if "whisperd" in name else OTHER for name, _ in found]
    )
    for row, (_, value) in enumerate(found):
        axes.text(value, row, f" {value:.2f}", va="center", color=INK)
    axes.set_xlabel("CPU-seconds a file, model loaded")
    axes.invert_yaxis()
    return figure


def fairness(documents: Documents) -> Any:
    """Latencies of the short clips, alone and beside the long recording."""
    parts = {name: documents[name]["details"]["runs"] for name in ("fair-engine", "fair-daemon") if name in documents}
    if not parts:
        return None
    figure, axes = _axes(3.2)
    for (name, runs), colour in zip(parts.items(), (KEPT, INK), strict=False):
        for key, style in (("solo_s", ":"), ("beside_s", "-")):
            values = sorted(value for run in runs for value in run[key])
            shares = [100 * (rank + 1) / len(values) for rank in range(len(values))]
            beside = "beside the long file" if key == "beside_s" else "alone"
            axes.step(values, shares, style, where="post", color=colour, label=f"{name.removeprefix('fair-')}, {beside}")
    axes.set_xlim(left=0)
    axes.set_xlabel("latency of a ten-second clip, seconds")
    axes.set_ylabel("% of clips within")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def tax(documents: Documents) -> Any:
    """What a file costs beside its transcription."""
    found = {name: document for name, document in documents.items() if name.startswith("daemon-tax")}
    if not found:
        return None
    figure, axes = _axes(0.5 * len(found) + 1.4)
    left = dict.fromkeys(found, 0.0)
    shades = ("#1f5f8b", "#2e7d5b", "#d9a441", "#8a94a6", "#b56576")
    names = [bar["name"] for bar in next(iter(found.values()))["bars"] if bar["name"].startswith("  of it")]
    for name, shade in zip(names, shades, strict=False):
        values = {key: next(bar["figure"] for bar in document["bars"] if bar["name"] == name) for key, document in found.items()}
        axes.barh(list(values), list(values.values()), left=[left[key] for key in values], color=shade, label=name.removeprefix("  of it "))
        left = {key: left[key] + value for key, value in values.items()}
    axes.axvline(10, color=INK)
    axes.set_xlabel("CPU-milliseconds a file (the line is the limit)")
    axes.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _axes(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height))
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


PLOTS: dict[str, Callable[[Documents], Any]] = {"bars.svg": bars, "rivals.svg": rivals, "fairness.svg": fairness, "tax.svg": tax}
