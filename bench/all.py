"""all: every measurement of docs/performance.md, one after the other, each saved, then the page: about an hour on two quiet cores.

The page and its plots are made by the peers' interpreter, which has matplotlib.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.measure import HOME, RESULTS, ROOT

MEASUREMENTS: dict[str, list[str]] = {  # the name it is saved under: script and arguments
    "backlog-tiny": ["backlog", "--size", "tiny"],
    "backlog-base": ["backlog", "--size", "base"],
    "backlog-demo": ["backlog", "--size", "demo"],
    "backlog-64": ["backlog", "--size", "tiny", "--clips", "64", "--runs", "1"],
    "short-windows-tiny": ["backlog", "--size", "tiny", "--short-windows"],
    "short-windows-base": ["backlog", "--size", "base", "--short-windows"],
    "installation": ["installation", "--size", "tiny"],
    "front-end": ["front_end"],
    "daemon-tax-tiny": ["daemon_tax", "--size", "tiny"],
    "daemon-tax-demo": ["daemon_tax", "--size", "demo", "--runs", "3"],
    "rivals": ["rivals", "--size", "tiny"],
    "fair-engine": ["fair_slots", "--size", "tiny"],
    "fair-daemon": ["fair_slots", "--size", "tiny", "--daemon", "--no-peer"],
    "respawn": ["respawn", "--size", "tiny"],
    "recovery": ["recovery"],
    "poison": ["poison"],
    "soak": ["soak"],
    "scan": ["scan", "--files", "1000000"],
    "arrivals": ["arrivals"],
    "hung-share": ["hung_share"],
    "gpu": ["gpu"],
}
NEEDS_A_GPU = "gpu"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.all", description=__doc__)
    parser.add_argument("--home", default=HOME)
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON")
    parser.add_argument("--results", default=RESULTS)
    parser.add_argument("--only", help="names, separated by commas: " + ",".join(MEASUREMENTS))
    args = parser.parse_args()
    chosen = args.only.split(",") if args.only else [name for name in MEASUREMENTS if name != NEEDS_A_GPU]
    codes = {}
    for name in chosen:
        script, *more = MEASUREMENTS[name]
        common = ["--home", args.home, "--peers", args.peers, "--save", name, "--results", args.results]
        print(f"\n=== {name}", flush=True)
        codes[name] = subprocess.run([sys.executable, "-m", f"bench.{script}", *more, *common], cwd=ROOT, check=False).returncode
    said = {0: "every bar kept", 1: "a bar missed"}
    print("\n" + "\n".join(f"{name:<20} {said.get(code, 'did not run')}" for name, code in codes.items()))
    page = subprocess.run([args.peers, "-m", "bench.report", "--results", args.results], cwd=ROOT, check=False).returncode
    return max(*codes.values(), page)


if __name__ == "__main__":
    sys.exit(main())
