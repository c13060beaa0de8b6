"""Fixtures of the fault tests."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOM_MIB = 512


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is room in it: calls, journals and cuts are what counts here, not the speed of a disk."""
    shared = Path("/dev/shm")
    room = os.statvfs(shared) if os.access(shared, os.W_OK) else None
    if room is None or room.f_bavail * room.f_frsize >> 20 < ROOM_MIB:
        yield tmp_path
        return
    made = Path(tempfile.mkdtemp(prefix="whisperd-faults-", dir=shared))
    try:
        yield made
    finally:
        shutil.rmtree(made)
