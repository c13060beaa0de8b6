"""reaction: what each GPU is good for, from what the probe tells of it (OPTIMISER.md §2, table). Pure.

Owns: the memory that single looks do not have: which GPUs there are, XIDs that outlast their look, since when a lost one is back.
`now` is any clock that only goes forward, in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from whisperd.dispatcher import xid
from whisperd.dispatcher.optimiser.values import Usable
from whisperd.vocabulary import Reading, Xid

SUSPECT_INCIDENTS = 3
SUSPECT_S = 3600.0
INCIDENT_S = 10.0  # one crash is told by several XIDs
BACK_S = 10.0  # a lost GPU is back when it was seen for so long

_WHOLE: dict[str, Usable] = {
    "mismatch": "frozen",
    "no_driver": "frozen",  # it had one a moment ago: what runs has it loaded, new processes would not find it
    "lost": "lost",
    "no_gpu": "lost",
    "reset_required": "drain",
}
"""What a reading's status makes of a GPU; any other but "ok" is unknown: hold, never grow."""


class Standing(NamedTuple):
    """What a GPU is good for, and why it is no better; "" when nothing speaks against it."""

    usable: Usable
    why: str


class Restart(NamedTuple):
    """A worker whose CUDA context is dead, whatever else it says: it must begin anew. Its file is not judged here."""

    gpu: str
    pid: int
    why: str


class Incident(NamedTuple):
    """Something a process did to a GPU; `pid` where it is known."""

    at: float
    pid: int | None


@dataclass(frozen=True)
class Card:
    """What is remembered of one GPU."""

    lost: str = ""  # why it counts as lost, until it is back
    seen_since: float | None = None  # seen well without a break
    drain: str = ""  # why it needs a reset, until it was away and is back
    incidents: tuple[Incident, ...] = ()


@dataclass(frozen=True)
class Reactions:
    """What is remembered from look to look, by UUID."""

    cards: Mapping[str, Card] = field(default_factory=dict)


def react(
    state: Reactions, readings: Sequence[Reading], own_pids: Mapping[str, Collection[int]], now: float
) -> tuple[Reactions, dict[str, Standing], tuple[Restart, ...]]:
    """How each GPU that was ever seen stands now, and which workers must begin anew. Each XID may be in `readings` once only."""
    by_gpu = {reading.gpu: reading for reading in readings}
    cards: dict[str, Card] = {}
    standings: dict[str, Standing] = {}
    restarts: list[Restart] = []
    for gpu in sorted(state.cards.keys() | {reading.gpu for reading in readings if _is_card(reading)}):
        reading = by_gpu.get(gpu) or _of_all(by_gpu)
        before = _seen(state.cards.get(gpu, Card()), reading, now)
        cards[gpu], found = _take_xids(before, gpu, reading.xids if reading.gpu == gpu else (), own_pids.get(gpu, ()), now)
        standings[gpu] = _standing(cards[gpu], reading)
        restarts += found
    return Reactions(cards), standings, tuple(restarts)


def _is_card(reading: Reading) -> bool:
    """Whether it is about one GPU, known by its UUID ("#0" is one that could not even tell it)."""
    return bool(reading.gpu) and not reading.gpu.startswith("#")


def _of_all(by_gpu: Mapping[str, Reading]) -> Reading:
    """What is said of a GPU that has no reading of its own: what holds for all, or that only others are named."""
    if "" in by_gpu:
        return by_gpu[""]
    if not by_gpu:
        return Reading(gpu="", status="unknown", what="the GPU probe has not answered yet")
    return Reading(gpu="", status="lost", what="the driver does not name this GPU any more")


def _seen(card: Card, reading: Reading, now: float) -> Card:
    """A GPU that was away and is back has been reset, as far as anybody can know."""
    if reading.status in ("lost", "no_gpu"):
        return replace(card, lost=reading.what, seen_since=None)
    if reading.status != "ok":
        return replace(card, seen_since=None)
    since = now if card.seen_since is None else card.seen_since
    if card.lost and now - since >= BACK_S:
        return Card(seen_since=since)
    return replace(card, seen_since=since)


def _take_xids(card: Card, gpu: str, xids: Sequence[Xid], own_pids: Collection[int], now: float) -> tuple[Card, list[Restart]]:
    restarts: dict[int, Restart] = {}
    incidents = [incident for incident in card.incidents if now - incident.at < SUSPECT_S]
    for event in xids:
        said = xid.describe(event.code)
        match xid.kind(event.code).follows:
            case "lost":
                card = replace(card, lost=f"{said}: {xid.kind(event.code).todo}", seen_since=None)
            case "drain":
                card = replace(card, drain=card.drain or f"{said}: {xid.kind(event.code).todo}")
            case "restart" if event.pid in own_pids or (event.pid is None and own_pids):
                if not _same_incident(incidents, event, now):
                    incidents.append(Incident(now, event.pid))
                if event.pid is not None:
                    restarts.setdefault(event.pid, Restart(gpu, event.pid, said))
            case _:  # somebody else's process, or nothing to do about it
                pass
    return replace(card, incidents=tuple(incidents)), list(restarts.values())


def _same_incident(incidents: Sequence[Incident], event: Xid, now: float) -> bool:
    """Whether this XID belongs to a crash that was counted: the same process, or, where none is named, the same moment."""
    return any(
        (incident.pid == event.pid) if event.pid is not None and incident.pid is not None else now - incident.at < INCIDENT_S
        for incident in incidents
    )


def _standing(card: Card, reading: Reading) -> Standing:
    """The worst of what is true now and what is remembered."""
    if card.lost:
        return Standing("lost", card.lost)
    if card.drain:
        return Standing("drain", card.drain)
    if reading.status != "ok":
        return Standing(_WHOLE.get(reading.status, "unknown"), reading.what)
    if len(card.incidents) >= SUSPECT_INCIDENTS:
        return Standing("suspect", f"{len(card.incidents)} of its workers crashed within an hour, as its XIDs tell")
    return Standing("ok", "")
