"""record: what a history and a replay of it have in common: how much was done, how long it took, what went wrong. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from whisperd.dispatcher.simulator.outcome import Outcome
from whisperd.dispatcher.simulator.trace import Trace


class Record(NamedTuple):
    """Waits are from a recording's being ready to its end; of a recording that has not ended, to the end of the history."""

    audio_s: float
    speed: float  # audio seconds per second, idle time included
    done: int
    wait_p50_s: float
    wait_p95_s: float
    out_of_memory: int
    changes: int


def happened(trace: Trace) -> Record:
    """What really was. Out of memory is counted from the plans that it changed."""
    head = trace.head
    audio_s = sum(minute.audio_s for minute in trace.minutes)
    waits = [(head.end if job.ended_at is None else min(job.ended_at, head.end)) - max(job.ready_at, head.begin) for job in trace.jobs]
    cards = [plan.cards for plan in trace.plans]
    return Record(
        audio_s=audio_s,
        speed=audio_s / max(1.0, head.end - head.begin),
        done=sum(job.done for job in trace.jobs),
        wait_p50_s=share_of(waits, 0.5),
        wait_p95_s=share_of(waits, 0.95),
        out_of_memory=sum(any("memory" in reason.code for reason in plan.reasons) for plan in trace.plans),
        changes=sum(before != after for before, after in itertools.pairwise(cards)),
    )


def replayed(outcome: Outcome) -> Record:
    """What a policy would have made of it."""
    cards = [decision.cards for decision in outcome.decisions]
    return Record(
        audio_s=outcome.net_s,
        speed=outcome.net_s / outcome.horizon_s,
        done=outcome.ended,
        wait_p50_s=share_of(outcome.waits_s, 0.5),
        wait_p95_s=share_of(outcome.waits_s, 0.95),
        out_of_memory=outcome.out_of_memory,
        changes=sum(before != after for before, after in itertools.pairwise(cards)),
    )


def share_of(values: Sequence[float], share: float) -> float:
    """The value below which this share of them lies (nearest rank); 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0
