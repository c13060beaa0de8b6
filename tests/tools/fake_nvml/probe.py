"""The real probe, told another place for the kernel's log: that of the machine it runs on must not speak into a test."""

from __future__ import annotations

import os
import sys

from whisperd.dispatcher import probe

if __name__ == "__main__":
    probe.KERNEL_LOG = os.environ["FAKE_KERNEL_LOG"]
    sys.exit(probe.main())
