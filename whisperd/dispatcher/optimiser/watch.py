"""watch: how fast it goes, measured only while every worker had enough to do (OPTIMISER §5: app-limited windows teach nothing).

Progress arrives a batch at a time, so a worker is timed from one step to another. What is compared are two paces; how uncertain their
ratio is follows from how many recordings each rests on, how many they share, and how exactly they were timed.
"""

from __future__ import annotations

import math
from collections.abc import Set

import msgspec

from whisperd.dispatcher.optimiser.state import CardState, Knobs, Mark, Pace, Window
from whisperd.dispatcher.optimiser.values import CPU, Card, Worker

SETTLE_S = 8.0
STEPS_MIN = 2
COST_SIGMA = 0.5
"""Spread of what a second of audio costs, between recordings (logarithm)."""
LOCAL_SIGMA, LOCAL_S = 0.25, 30.0
"""The same within a recording, and for how long it lasts."""
TIMING_S = 0.6
"""How exactly a step is timed by looks 2 s apart."""


def observe(state: CardState, card: Card, now: float) -> CardState:
    """Go on with the window, begin one, or give it up. Called at every observation: nothing changes while nobody makes a step."""
    plan = state.plan
    if plan is None or not _all_at_work(card, plan.workers, plan.batch, plan.model, plan.compute_type):
        return state if state.window is None else msgspec.structs.replace(state, window=None)
    window = state.window
    if (
        window is None
        or len(window.marks) != len(card.workers)
        or any(m.worker != w.id for m, w in zip(window.marks, card.workers, strict=True))
    ):
        marks = tuple(_mark(worker, now) for worker in card.workers)
        return msgspec.structs.replace(state, window=Window(since=now, marks=marks))
    settled = now - window.since >= SETTLE_S
    moved = tuple(_moved(mark, worker, now, settled=settled) for mark, worker in zip(window.marks, card.workers, strict=True))
    if all(new is old for new, old in zip(moved, window.marks, strict=True)):
        return state
    return msgspec.structs.replace(state, window=Window(since=window.since, marks=moved))


def _all_at_work(card: Card, workers: int, batch: int, model: str, compute_type: str) -> bool:
    if not workers or len(card.workers) != workers or card.throttled:
        return False
    for one in card.workers:
        if one.life != "busy" or not one.fed or one.batch != batch or one.model != model or one.compute_type != compute_type:
            return False
    return True


def _mark(worker: Worker, now: float) -> Mark:
    return Mark(worker=worker.id, since=None, from_s=worker.audio_s, at=now, audio_s=worker.audio_s, steps=0, done=worker.jobs_done)


def _moved(mark: Mark, worker: Worker, now: float, *, settled: bool) -> Mark:
    if worker.audio_s <= mark.audio_s:
        return mark
    if not settled or mark.since is None:
        begun = now if settled else None
        return Mark(worker=mark.worker, since=begun, from_s=worker.audio_s, at=now, audio_s=worker.audio_s, steps=0, done=mark.done)
    return Mark(
        worker=mark.worker, since=mark.since, from_s=mark.from_s, at=now, audio_s=worker.audio_s, steps=mark.steps + 1, done=mark.done
    )


def pace_of(state: CardState, card: Card, now: float) -> Pace | None:
    """The pace in this window so far; None before every worker has made two steps."""
    window, plan = state.window, state.plan
    if window is None or plan is None or not window.marks:
        return None
    speeds = []
    for mark in window.marks:
        if mark.since is None or mark.steps < STEPS_MIN:
            return None
        speeds.append((mark.worker, (mark.audio_s - mark.from_s) / (mark.at - mark.since)))
    in_hand = sum(worker.jobs for worker in card.workers)
    done = sum(worker.jobs_done for worker in card.workers)
    ended = done - sum(mark.done for mark in window.marks)
    return Pace(
        at=now,
        knobs=Knobs(compute_type=plan.compute_type, batch=plan.batch, workers=plan.workers),
        seconds=min(mark.at - (mark.since or 0.0) for mark in window.marks),
        speeds=tuple(speeds),
        in_hand=in_hand,
        recordings=in_hand + ended,
        done=done,
    )


def compare(before: Pace, after: Pace, gpu: str) -> tuple[float, float]:
    """(logarithm of how much faster, its standard deviation): of all workers together, or, where that is more certain, of those that were
    there both times: with more or fewer beside them all are alike, and the sum follows. On the processor every worker is new when their
    number changes.
    """
    ways = [_compared(before, after, set(dict(before.speeds)), set(dict(after.speeds)))]
    common = set(dict(before.speeds)) & set(dict(after.speeds))
    if common and gpu != CPU:
        ways.append(_compared(before, after, common, common))
    return min(ways, key=lambda way: way[1])


def _compared(before: Pace, after: Pace, first: Set[int], second: Set[int]) -> tuple[float, float]:
    """By the speeds of these workers. Recordings that both rest on say nothing of chance: each costs the same twice."""
    shares = len(first) / before.knobs.workers, len(second) / after.knobs.workers
    speeds = (
        sum(speed for worker, speed in before.speeds if worker in first),
        sum(speed for worker, speed in after.speeds if worker in second),
    )
    gain = math.log(speeds[1] / shares[1]) - math.log(speeds[0] / shares[0])
    recordings = max(1.0, before.recordings * shares[0]), max(1.0, after.recordings * shares[1])
    shared = _shared(before, after, shares)
    costs = COST_SIGMA**2 * max(0.0, 1 / recordings[0] + 1 / recordings[1] - 2 * shared / (recordings[0] * recordings[1]))
    return gain, math.sqrt(costs + _noise(before, shares[0]) + _noise(after, shares[1]))


def _shared(before: Pace, after: Pace, shares: tuple[float, float]) -> float:
    """Recordings that both rest on: what leaves a worker's hands is handed out first, so they are those in hand at the end of the first,
    as many as the second had, but for those that had ended by the end of the second, and half of those that ended on the way."""
    ended = max(after.done - before.done, after.recordings - after.in_hand)
    return max(0.0, min(before.in_hand * shares[0], after.recordings * shares[1]) - 0.5 * ended)


def _noise(pace: Pace, share: float) -> float:
    """Of one pace by itself: its timing, and how the recordings in it vary from minute to minute."""
    workers = max(1.0, len(pace.speeds) * share)
    local = LOCAL_SIGMA**2 / max(1.0, pace.in_hand * share) / max(1.0, pace.seconds / LOCAL_S)
    return 2 * (TIMING_S / max(1.0, pace.seconds)) ** 2 / workers + local
