"""Fixtures of the tests that drive a dispatcher in their own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from floor import Floor, environment


@pytest.fixture
def floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Floor]]:
    """Lives of a dispatcher, one after the other; `scripted` is for its engines."""
    lives: list[Floor] = []

    def begin(scripted: dict[str, Any] | None = None, **changes: Any) -> Floor:
        for life in lives:
            life.end()
        for name, value in environment(tmp_path, **(scripted or {})).items():
            monkeypatch.setenv(name, value)
        lives.append(Floor(tmp_path, **changes))
        return lives[-1]

    yield begin
    for life in lives:
        life.end()
