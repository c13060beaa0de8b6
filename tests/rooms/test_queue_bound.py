"""Backpressure: the list of files that wait their turn has a bound, and what finds no place in it is not forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from floor import Floor, environment, plan

QUEUE_MAX, FILES = 3, 6


@pytest.fixture
def life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Floor]:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    life = Floor(tmp_path, intake={"queue_max": QUEUE_MAX})
    yield life
    life.end()


def test_a_full_list_takes_no_more_and_the_rest_comes_when_there_is_room(life: Floor) -> None:
    """Of six settled files three are ready, the others stay seen, and `run --once` would go on waiting for them; never are more ready.
    When an engine has taken some, the rest comes by itself, and all are done at their first attempt."""
    names = [f"talk {number}" for number in range(FILES)]

    def bounded() -> bool:
        assert life.ledger.counts()["ready"] <= QUEUE_MAX
        return True

    life.want()
    for name in names:
        life.drop(name)
    life.until(lambda: bounded() and life.ledger.counts()["ready"] == QUEUE_MAX, "three are ready")
    life.until(lambda: bounded() and life.ledger.counts()["seen"] == FILES - QUEUE_MAX, "the others are seen")
    life.until(lambda: bounded() and life.dispatcher.acceptance.intake.settled(), "the watcher waits for nothing")
    assert not life.dispatcher.acceptance.idle(), "three settled files are in no list"
    life.want(plan(1))
    life.until(lambda: bounded() and life.all_in(*names), "all are done")
    assert {row["attempts"] for row in life.rows().values()} <= {0, 1}
    assert life.dispatcher.acceptance.idle()
