"""engines: one engine child as the pool knows it: what runs in it, what it has in hand, what it has done.

Owns: nothing but these values; `pool` changes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from whisperd.child import Child, Life
from whisperd.dispatcher.optimiser import values
from whisperd.dispatcher.queueing import Seat
from whisperd.wire import EngineReady, LoadModel


class Share(NamedTuple):
    """What should run of one model on one card. `quarantine`: one engine more, in which suspects run alone."""

    request: LoadModel
    workers: int
    quarantine: bool = False

    @property
    def card(self) -> str:
        return card_of(self.request)


class Memory(NamedTuple):
    """A card's memory now."""

    free_mib: int
    total_mib: int


def card_of(request: LoadModel) -> str:
    """The card that an engine runs on: a GPU's UUID, or "cpu"."""
    return request.gpu or values.CPU


def identity(request: LoadModel) -> LoadModel:
    """What cannot be changed without loading anew: all but the batch."""
    return msgspec.structs.replace(request, batch=0)


@dataclass
class Task:
    """One job in an engine's hands."""

    inbox: int
    suspect: bool = False  # it may have killed a worker, so nothing runs beside it
    long: bool = False  # a long recording, of which an engine has no more than some of its slots full
    sent: bool = False  # the source's descriptor is with the child
    made_by: str = ""  # the fingerprint of its windows, once it is sent


@dataclass
class Engine:
    """One engine child and the jobs it has in hand."""

    child: Child[Any]
    number: int  # never used twice in a daemon's life
    request: LoadModel  # its batch is the one that it was last told
    quarantine: bool = False
    tasks: dict[int, Task] = field(default_factory=dict)
    ready: EngineReady | None = None  # what it said of itself; None until it did
    slots: int = 0
    moved_at: float = 0.0  # monotonic: when any of its jobs last made progress
    renewed_at: float = 0.0  # monotonic: when the leases of its jobs were last renewed
    finished_at: float = 0.0  # epoch: when it last finished a job
    batches: int = 0
    working_mib: int = 0  # the most memory it had in its first batches
    memory_mib: int | None = None  # what it holds of its card's memory, by its own word
    told_at: float = 0.0  # monotonic: when that changed
    told_before_mib: int | None = None
    seen_mib: int | None = None  # what it held when its card was looked at
    audio_s: float = 0.0  # finished in its life
    jobs_done: int = 0
    unloading: bool = False  # asked to give its model's memory back, and no work since
    asked_to_leave: bool = False  # its end is not a failure of its own
    stalled: bool = False  # killed because its work made no progress
    starved: bool = True  # it had too little in hand, at some moment since the last observation, to fill its batches

    @property
    def card(self) -> str:
        return card_of(self.request)

    @property
    def serves(self) -> bool:
        return self.ready is not None and self.child.life in (Life.IDLE, Life.BUSY)

    @property
    def leaving(self) -> bool:
        return self.child.life in (Life.DRAINING, Life.KILLING)

    def seat(self, free_mib: int | None) -> Seat:
        """Its place in the queue's eyes. `free_mib` is what its card has left."""
        tasks = self.tasks.values()
        held_mib = self.memory_mib if self.seen_mib is None else self.seen_mib
        return Seat(
            engine=self.child.pid,
            tasks=len(tasks),
            free=(self.slots if self.serves else 0) - len(tasks),
            suspect=any(task.suspect for task in tasks),
            model=self.request.model,
            room_mib=None if free_mib is None or held_mib is None else free_mib + held_mib,
            long=sum(task.long for task in tasks),
            quarantine=self.quarantine,
        )

    def tell_memory(self, mib: int | None, now: float) -> None:
        if mib is not None and mib != self.memory_mib:
            self.told_before_mib, self.memory_mib, self.told_at = self.memory_mib, mib, now

    def see_memory(self, by_driver_mib: int | None, looked_at: float) -> None:
        """Where the driver tells what a process of ours holds, that is what it holds; else its own word, as it stood at that look: a figure
        newer than the card's would make the difference look like somebody else's."""
        own = self.memory_mib if self.told_at <= looked_at else self.told_before_mib
        self.seen_mib = own if by_driver_mib is None else by_driver_mib

    def note_hunger(self) -> None:
        """Each recording offers several windows at once, so half as many of them as a batch holds fill it."""
        if 2 * len(self.tasks) < self.request.batch or not self.tasks:
            self.starved = True

    def observed(self) -> values.Worker:
        """As the optimiser sees it; the next observation's hunger is counted from here."""
        fed, self.starved = not self.starved, False
        self.note_hunger()
        return values.Worker(
            id=self.number,
            model=self.request.model,
            compute_type=self.request.compute_type,
            batch=self.request.batch,
            life=_life(self),
            memory_mib=self.seen_mib,
            audio_s=self.audio_s,
            jobs=len(self.tasks),
            jobs_done=self.jobs_done,
            fed=fed,
        )


def _life(engine: Engine) -> values.Life:
    match engine.child.life:
        case Life.BOOTING:
            return "loading"
        case Life.IDLE:
            return "idle"
        case Life.BUSY:
            return "busy"
        case _:
            return "draining"
