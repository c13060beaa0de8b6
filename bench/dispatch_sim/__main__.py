"""`python -m bench.dispatch_sim`: run, named, random, goals, report."""

from __future__ import annotations

import sys

from bench.dispatch_sim.cli import main

if __name__ == "__main__":
    sys.exit(main())
