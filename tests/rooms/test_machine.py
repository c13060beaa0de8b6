"""The processor as a card, read from the real kernel."""

from __future__ import annotations

import os
import time

from whisperd.dispatcher import machine
from whisperd.dispatcher.machine import Ticks, busy_cores


def test_cores_and_memory_are_those_of_this_machine() -> None:
    """At least one core, no more than there are; free memory is less than all of it."""
    assert 1 <= machine.cores() <= (os.cpu_count() or 1)
    free_mib = machine.memory_free_mib()
    assert free_mib is not None and 0 < free_mib < machine.memory_total_mib()


def test_a_busy_core_is_seen() -> None:
    """While this process computes, about a core or more is busy."""
    before = machine.ticks()
    ends = time.process_time() + 0.3
    while time.process_time() < ends:
        pass
    busy = busy_cores(before, machine.ticks())
    assert busy is not None and busy > 0.3


def test_unknown_load_is_not_zero() -> None:
    """Without two counts, or with a clock that stands still, nothing is known."""
    assert busy_cores(None, Ticks(1, 2)) is None
    assert busy_cores(Ticks(5, 10), Ticks(5, 10)) is None
