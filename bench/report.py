"""report: the saved figures of docs/performance/*.json into docs/performance.md, between its two marks, and the plots beside them.

No figure in that page is typed by hand. Fails with FileNotFoundError when the page is absent, ValueError when it has lost its marks.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from bench import plots
from bench.measure import RESULTS, ROOT

PAGE = os.path.join(ROOT, "docs", "performance.md")
BEGIN, END = "<!-- figures: begin (python -m bench.report) -->", "<!-- figures: end -->"
ALT = {
    "bars.svg": "how much of its limit each figure takes",
    "rivals.svg": "CPU-seconds a file of every contender",
    "fairness.svg": "latency of short clips beside a long recording",
    "tax.svg": "what a file costs beside its transcription",
}


def documents(directory: str) -> dict[str, dict[str, Any]]:
    """Every saved document by the name of its file."""
    found = {}
    for path in sorted(glob.glob(os.path.join(directory, "*.json"))):
        with open(path, encoding="utf-8") as file:
            found[os.path.basename(path).removesuffix(".json")] = json.load(file)
    return found


def section(document: Mapping[str, Any]) -> list[str]:
    """One script's figures."""
    machine = document["machine"]
    lines = [f"### {document['title']}", "", f"`{document['command']}`, {machine['date']}", ""]
    lines += ["| figure | | bar | verdict |", "|---|--:|--:|---|"]
    for bar in document["bars"]:
        wanted = "" if bar["limit"] is None else f"{'≤' if bar['at_most'] else '≥'} {bar['limit']:g} {bar['unit']}".strip()
        verdict = "**missed**" if bar["verdict"] == "missed" else bar["verdict"]
        lines.append(f"| {bar['name'].strip()} | {bar['figure']:g} {bar['unit']} | {wanted} | {verdict} |")
    if document["runs"]:
        lines += ["", "| median of the runs | CPU-s | wall s | peak MiB |", "|---|--:|--:|--:|"]
        for name, runs in document["runs"].items():
            middle = [sorted(values)[len(values) // 2] for values in zip(*runs, strict=True)]
            lines.append(f"| {name} ({len(runs)}) | {middle[0]:.2f} | {middle[1]:.2f} | {middle[2]:.0f} |")
    return [*lines, "", *(f"- {note}" for note in document["notes"]), ""]


def machines(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where and with what; once for each machine."""
    seen: list[str] = []
    for document in found.values():
        machine = document["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
        said = f"{machine['cpu']}, {machine['cores']} cores ({machine['flags']}), {machine['memory_gib']} GiB, Linux {machine['kernel']}"
        line = f"Machine: {said}; Python {machine['python']}, {versions}."
        if line not in seen:
            seen.append(line)
    return seen


def figures(directory: str) -> str:
    """The generated part of the page."""
    found = documents(directory)
    pictures = plots.draw(found, directory)
    lines = [*machines(found), "", *(f"![{ALT[name]}](performance/{name})" for name in pictures), ""]
    for document in found.values():
        lines += section(document)
    return "\n".join(lines).strip()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--page", default=PAGE)
    parser.add_argument("--results", default=RESULTS)
    args = parser.parse_args()
    with open(args.page, encoding="utf-8") as file:
        page = file.read()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    with open(args.page, "w", encoding="utf-8") as file:
        file.write(f"{before}{BEGIN}\n\n{figures(args.results)}\n\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
