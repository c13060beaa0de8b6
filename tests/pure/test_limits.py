"""What the operator allows on a card at an hour: settings and a local time in, limits out."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from whisperd.config import QuietSettings, Settings
from whisperd.dispatcher import limits

MONDAY = datetime(2026, 11, 23)
GPU = "GPU-1"


def settings(**sections: Any) -> Settings:
    return Settings(inbox=[{"path": "/in"}], **sections)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("day", "clock", "quiet"),
    [
        (0, "21:59", False),
        (0, "22:00", True),
        (0, "23:59", True),
        (1, "00:00", True),
        (1, "05:59", True),
        (1, "06:00", False),
        (6, "05:00", False),  # Sunday morning: Saturday is not among the days
    ],
)
def test_hours_that_end_on_the_next_day_belong_to_the_day_they_begin_on(day: int, clock: str, quiet: bool) -> None:
    """22:00 to 06:00 on weekdays holds on Tuesday at five, but not on Sunday at five."""
    hours = QuietSettings(begin="22:00", end="06:00", days=("mon", "tue", "wed", "thu", "fri"))
    local = MONDAY.replace(day=MONDAY.day + day, hour=int(clock[:2]), minute=int(clock[3:]))
    assert limits.is_quiet(hours, local) is quiet


def test_hours_within_one_day() -> None:
    """08:00 to 18:00 holds from the first minute to the one before the last."""
    hours = QuietSettings(begin="08:00", end="18:00")
    assert [limits.is_quiet(hours, MONDAY.replace(hour=hour)) for hour in (7, 8, 17, 18)] == [False, True, True, False]


def test_without_settings_the_optimiser_is_free() -> None:
    """Nothing pinned, nothing paused, at most dispatcher.workers_max."""
    allowed = limits.limits_of(GPU, settings(), MONDAY)
    assert (allowed.workers_min, allowed.workers_max, allowed.memory_max_mib, allowed.paused) == (0, 12, None, "")


def test_a_number_of_workers_is_pinned() -> None:
    """dispatcher.workers holds for every card, a [[card]] table for its own."""
    own = settings(dispatcher={"workers": 3}, card=[{"gpu": GPU, "workers": 1, "memory_max_mib": 4000}])
    assert [limits.limits_of(GPU, own, MONDAY).workers_min, limits.limits_of(GPU, own, MONDAY).workers_max] == [1, 1]
    assert limits.limits_of(GPU, own, MONDAY).memory_max_mib == 4000
    assert limits.limits_of("GPU-2", own, MONDAY).workers_max == limits.limits_of("GPU-2", own, MONDAY).workers_min == 3


def test_a_card_may_be_left_alone() -> None:
    """`use = false` is said in words; the other card is free."""
    own = settings(card=[{"gpu": GPU, "use": False}])
    assert limits.limits_of(GPU, own, MONDAY).workers_max == 0 and GPU in limits.limits_of(GPU, own, MONDAY).paused
    assert limits.limits_of("GPU-2", own, MONDAY).paused == ""


def test_quiet_hours_win_over_a_pinned_number() -> None:
    """Three workers are asked for, one is left in quiet hours, none where the hours say none."""
    busy = {"begin": "08:00", "end": "18:00", "gpu": GPU}
    at_noon = MONDAY.replace(hour=12)
    one = limits.limits_of(GPU, settings(dispatcher={"workers": 3}, quiet=[{**busy, "workers_max": 1}]), at_noon)
    none = limits.limits_of(GPU, settings(dispatcher={"workers": 3}, quiet=[busy]), at_noon)
    other = limits.limits_of("GPU-2", settings(dispatcher={"workers": 3}, quiet=[busy]), at_noon)
    assert (one.workers_min, one.workers_max, one.paused) == (1, 1, "")
    assert (none.workers_max, none.paused) == (0, "quiet hours")
    assert other.workers_max == 3


def test_a_batch_that_is_set_is_the_only_one() -> None:
    """engine.batch pins the batch on any card; otherwise there is a ladder to climb."""
    pinned = limits.policy_of(settings(engine={"batch": 6}), "int8")
    free = limits.policy_of(settings(), "float16")
    assert pinned.batches == pinned.cpu_batches == (6,) and pinned.batch_first == 6
    assert len(free.batches) > 3 and free.compute_types == ("float16",)


def test_the_operator_names_the_precisions() -> None:
    """dispatcher.compute_types is the list the optimiser may choose from; without one there is no choice."""
    assert limits.policy_of(settings(dispatcher={"compute_types": ["float16", "int8_float16"]}), "float16").compute_types == (
        "float16",
        "int8_float16",
    )
