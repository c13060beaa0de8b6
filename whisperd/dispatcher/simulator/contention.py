"""contention: how fast engines run beside one another. Pure.

A closed network: every busy engine alternates between a host phase, sharing the cores, and a GPU phase on a processor-sharing card with
`slots` places and a penalty for each further process; solved with the Bard–Schweitzer approximation of mean value analysis (OPTIMISER §4).
An engine on the processor keeps its threads busy; their speed-up is Amdahl's, and each further process costs memory bandwidth.
The constants are assumptions shaped on public reports.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from whisperd.dispatcher.simulator.scenario import CardSpec

SERIAL = 0.06  # of the work of an engine on the processor that one thread does alone
BANDWIDTH = 0.03  # what each further process on the processor costs all of them
ROUNDS = 60


class Group(NamedTuple):
    """Engines that are alike: same card, same kind, same batch."""

    card: int
    number: int
    gpu_s: float  # for one second of audio, on this card at its present clock
    host_s: float
    threads: int = 0  # of an engine on the processor


class Speeds(NamedTuple):
    """Audio seconds per second of one engine of each group; share of time each card is busy; busy cores of ours."""

    rates: tuple[float, ...]
    busy: tuple[float, ...]
    cores: float


def speed_up(threads: int) -> float:
    """Of one engine with so many threads on the processor."""
    return threads / (1 + SERIAL * (threads - 1))


def solve(
    groups: Sequence[Group], cards: Sequence[CardSpec], foreign_busy: Sequence[float], cores: float, *, cores_busy: float, spin: float
) -> Speeds:
    """The rates at which all of them go on together."""
    on_card = [0] * len(cards)
    for group in groups:
        on_card[group.card] += group.number
    penalty = [
        1 + card.switch * max(0, count - 1 + (1 if foreign > 0 else 0))
        for card, count, foreign in zip(cards, on_card, foreign_busy, strict=True)
    ]
    queued = [0.5] * len(groups)
    rates = [0.0] * len(groups)
    crowding = max(1.0, cores_busy / cores)
    busy_cores = 0.0
    for turn in range(ROUNDS):
        total = list(foreign_busy)
        for group, one in zip(groups, queued, strict=True):
            total[group.card] += group.number * one
        busy_cores = 0.0
        moved = 0.0
        for index, group in enumerate(groups):
            if group.threads:
                rates[index] = speed_up(group.threads) / (group.host_s * (1 + BANDWIDTH * (on_card[group.card] - 1)) * crowding)
                busy_cores += group.number * group.threads
                continue
            card = cards[group.card]
            stay = group.gpu_s * penalty[group.card] * max(1.0, (1 + total[group.card] - queued[index]) / card.slots)
            rate = 1.0 / (group.host_s * crowding + stay)
            share = rate * stay
            moved = max(moved, abs(share - queued[index]))
            queued[index] += 0.6 * (share - queued[index])
            rates[index] = rate
            busy_cores += group.number * (rate * group.host_s * crowding + spin * share)
        wanted = max(1.0, (busy_cores + cores_busy) / cores)
        moved = max(moved, abs(wanted - crowding) / 8)
        crowding += 0.5 * (wanted - crowding)
        if moved < 1e-4 and turn > 8:
            break
    return Speeds(tuple(rates), _busy(groups, rates, penalty, cards, foreign_busy), busy_cores)


def _busy(
    groups: Sequence[Group], rates: Sequence[float], penalty: Sequence[float], cards: Sequence[CardSpec], foreign_busy: Sequence[float]
) -> tuple[float, ...]:
    """With one place the shares of time add up; with more, kernels overlap by chance."""
    found = []
    for index, card in enumerate(cards):
        shares = [(g.number, rate * g.gpu_s * penalty[index]) for g, rate in zip(groups, rates, strict=True) if g.card == index]
        if card.slots == 1:
            found.append(min(1.0, foreign_busy[index] + sum(number * share for number, share in shares)))
            continue
        idle = 1 - foreign_busy[index]
        for number, share in shares:
            idle *= (1 - min(1.0, share)) ** number
        found.append(min(1.0, 1 - idle))
    return tuple(found)
