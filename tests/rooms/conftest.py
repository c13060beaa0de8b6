"""A ledger of its own for each test, on a real disk. A file that wants another one makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from whisperd.ledger.ledger import Ledger


@pytest.fixture
def state_dir(tmp_path: Path) -> str:
    (tmp_path / "state").mkdir()
    return str(tmp_path / "state")


@pytest.fixture
def ledger(state_dir: str) -> Iterator[Ledger]:
    ledger = Ledger(state_dir, epoch="first life")
    yield ledger
    ledger.close()


@pytest.fixture
def inbox(ledger: Ledger) -> int:
    return ledger.register_inbox(b"/in", b"/out", 1.0)
