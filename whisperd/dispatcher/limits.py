"""limits: what the operator allows on a card at this hour, as the optimiser takes it. Pure: settings and a local time in."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta

from whisperd.config import CardSettings, DispatcherSettings, QuietSettings, Settings
from whisperd.dispatcher.optimiser.values import Limits, Policy
from whisperd.dispatcher.priors import NEEDS

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")


def limits_of(gpu: str, settings: Settings, local: datetime) -> Limits:
    """Of one card now: [dispatcher], then the [[card]] tables that name it, then the quiet hours that it is in."""
    own = [card for card in settings.card if card.gpu in (gpu, "*")]
    if any(not card.use for card in own):
        return Limits(workers_max=0, paused=f"[[card]] gpu = {gpu!r} has use = false")
    pinned, most = _workers(own, settings.dispatcher)
    quiet = [hours for hours in settings.quiet if hours.gpu in (gpu, "*") and is_quiet(hours, local)]
    left = min([hours.workers_max for hours in quiet], default=most)
    return Limits(
        workers_min=min(pinned, left),
        workers_max=min(pinned or most, left),
        memory_max_mib=min([card.memory_max_mib for card in own if card.memory_max_mib], default=None),
        paused="quiet hours" if quiet and left == 0 else "",
    )


def _workers(own: Sequence[CardSettings], dispatcher: DispatcherSettings) -> tuple[int, int]:
    """(pinned number or 0, most)."""
    pinned = next((card.workers for card in own if card.workers is not None), dispatcher.workers)
    return pinned, next((card.workers_max for card in own if card.workers_max is not None), dispatcher.workers_max)


def is_quiet(hours: QuietSettings, local: datetime) -> bool:
    """Whether these hours hold at a local time. Hours that end before they begin go on into the next day."""
    time_of_day = local.strftime("%H:%M")
    today, yesterday = DAYS[local.weekday()], DAYS[(local - timedelta(days=1)).weekday()]
    if hours.begin < hours.end:
        return today in hours.days and hours.begin <= time_of_day < hours.end
    return (today in hours.days and time_of_day >= hours.begin) or (yesterday in hours.days and time_of_day < hours.end)


def policy_of(settings: Settings, compute_type: str) -> Policy:
    """The settings that matter to the optimiser. `compute_type` is the one that "auto" came to."""
    dispatcher, batch = settings.dispatcher, settings.engine.batch
    usual = Policy()
    return Policy(
        interval_s=dispatcher.interval_s,
        batches=(batch,) if batch else usual.batches,
        cpu_batches=(batch,) if batch else usual.cpu_batches,
        batch_first=batch or usual.batch_first,
        cpu_batch_first=batch or usual.cpu_batch_first,
        compute_types=dispatcher.compute_types or (compute_type,),
        reserve_mib=dispatcher.reserve_mib,
        temperature_max_c=dispatcher.temperature_max_c,
        idle_s=dispatcher.idle_s,
        idle_workers=dispatcher.idle_workers,
        yield_to_others=dispatcher.yield_to_others,
        needs=NEEDS,
    )
