"""`python -m whisperd`, and the `whisperd` command."""

from __future__ import annotations

import sys

from whisperd.cli import main

if __name__ == "__main__":
    sys.exit(main())
