"""Fixtures that every kind of test shares: a place for one whisperd, and recordings to drop into it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from installation import Installation
from recordings import Studio

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """Makes recordings; each is made once in a run."""
    return Studio(tmp_path_factory.mktemp("studio"))


@pytest.fixture
def place(tmp_path: Path) -> Installation:
    """An installation of its own: inbox, outbox, state, a configuration with the demo model."""
    return Installation(tmp_path / "home")


@pytest.fixture
def another_place(tmp_path: Path) -> Callable[[str], Installation]:
    """More installations beside the first."""
    return lambda name: Installation(tmp_path / name)


@pytest.fixture(scope="session")
def shared_audio() -> Path:
    """The collection of real recordings beside the checkout (WHISPERD_TEST_AUDIO names another place)."""
    where = Path(os.environ.get("WHISPERD_TEST_AUDIO", ROOT.parent / "shared" / "audio"))
    if not (where / "manifest.csv").is_file():
        pytest.skip(f"no collection of real recordings: {where} has no manifest.csv (set WHISPERD_TEST_AUDIO to name one)")
    return where
