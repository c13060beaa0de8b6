"""The queue over time, under any arrivals: nobody waits for ever, long recordings never hold up short ones, inboxes share.

The engines are a model: in a round each decodes one window of every job it has in hand, as the real one does (the next window is that of
the recording served longest ago). The decisions are the real ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import hypothesis.strategies as st
from hypothesis import given, settings

from whisperd.dispatcher import queueing
from whisperd.dispatcher.queueing import AGING_S, LONG_S, SHORTNESS_S, Seat, Turns

ROUND_S = 60.0
WINDOW_S = 30.0
SHORT, LONG = 2, int(10 * LONG_S / WINDOW_S)

Job = dict[str, Any]


def job(number: int, at: float, windows: int = SHORT, *, inbox: int = 1, **more: Any) -> Job:
    usual = {"priority": 1, "size": 0, "attempts": 0, "failure_kind": None, "failure_code": None, "needs_mib": None, "model": ""}
    when = {"ready_at": at, "not_before": at, "duration_s": windows * WINDOW_S, "left": windows}
    return {"id": number, "inbox_id": inbox, **usual, **when, **more}


@dataclass
class Engine:
    """Some slots, and the jobs in them."""

    slots: int
    model: str = ""
    room_mib: int | None = None
    quarantine: bool = False
    hands: list[Job] = field(default_factory=list)
    suspects: bool = False

    def seat(self, number: int) -> Seat:
        long = sum(map(queueing.is_long, self.hands))
        rest = {"model": self.model, "room_mib": self.room_mib, "long": long, "quarantine": self.quarantine}
        return Seat(number, len(self.hands), self.slots - len(self.hands), self.suspects and bool(self.hands), **rest)


class Hall:
    """Engines, what waits, and a clock."""

    def __init__(self, *engines: Engine) -> None:
        self.engines = engines
        self.waiting: list[Job] = []
        self.turns = Turns()
        self.now = 0.0
        self.began: dict[int, float] = {}  # job → when it first had a slot
        self.ended: dict[int, float] = {}

    def in_hand(self) -> Counter[int]:
        return Counter(work["inbox_id"] for engine in self.engines for work in engine.hands)

    def round(self, arrivals: Iterable[Job] = ()) -> None:
        """What comes is handed out, then every engine decodes one window of each job in hand."""
        self.waiting += arrivals
        self.hand_out()
        self.now += ROUND_S
        for engine in self.engines:
            for work in engine.hands:
                work["left"] -= 1
                if work["left"] == 0:
                    self.ended[work["id"]] = self.now
            engine.hands = [work for work in engine.hands if work["left"] > 0]

    def hand_out(self) -> list[Job]:
        handed = []
        while True:
            seats = [engine.seat(number) for number, engine in enumerate(self.engines)]
            chosen = queueing.hand_out(self.waiting, seats, self.now, in_hand=self.in_hand(), turns=self.turns)
            if chosen is None:
                return handed
            work, seat = dict(chosen[0]), chosen[1]
            self.turns.take(work, self.now)
            self.waiting.remove(work)
            self.engines[seat.engine].suspects = queueing.suspect(work)
            self.engines[seat.engine].hands.append(work)
            self.began.setdefault(work["id"], self.now)
            handed.append(work)


ARRIVAL = st.tuples(
    st.integers(1, 3), st.integers(0, 2), st.sampled_from((1, 2, 5, 40, 200)), st.sampled_from((None, None, 5000, 90_000)), st.booleans()
)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(ARRIVAL, max_size=3), max_size=25),
    st.lists(st.tuples(st.sampled_from((2, 4, 8)), st.sampled_from((None, 4000, 8000)), st.booleans()), min_size=1, max_size=3),
)
def test_everything_that_comes_is_done(
    rounds: list[list[tuple[int, int, int, int | None, bool]]], shapes: list[tuple[int, int | None, bool]]
) -> None:
    """Whatever comes, in any order, to any engines: long, short, urgent, low, in need of more memory than there is, or suspected; once
    nothing more comes, all of it is done."""
    hall = Hall(Engine(slots=4), *(Engine(slots=slots, room_mib=room, quarantine=apart) for slots, room, apart in shapes))
    count = 0
    for arrivals in rounds:
        batch = []
        for inbox, priority, windows, needs_mib, bad in arrivals:
            count += 1
            batch.append(job(count, hall.now, windows, inbox=inbox, priority=priority, needs_mib=needs_mib, attempts=int(bad)))
        hall.round(batch)
    for _ in range(300 * (count + 1)):
        if len(hall.ended) == count:
            break
        hall.round()
    assert len(hall.ended) == count


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2), st.booleans(), st.booleans(), st.integers(2, 6), st.integers(1, 3))
def test_no_job_waits_for_ever_under_an_endless_flood(priority: int, giant: bool, long: bool, slots: int, inboxes: int) -> None:
    """One job of any class, in need of memory that nobody has, or long, among urgent short ones that never end to come and could fill all
    slots: it is begun, in the time that three classes of aging and the lines before it take."""
    hall = Hall(Engine(slots=slots, room_mib=4000))
    number = 1
    hall.waiting.append(job(0, 0.0, LONG if long else SHORT, inbox=inboxes, priority=priority, needs_mib=9000 if giant else None))
    while 0 not in hall.began:
        flood = [job(number + n, hall.now, inbox=1 + n % inboxes, priority=0) for n in range(slots)]
        number += len(flood)
        hall.waiting = [work for work in hall.waiting if work["id"] == 0] + hall.waiting[-3 * slots :]  # the flood never runs dry
        hall.round(work for work in flood)
        assert hall.now < 5 * AGING_S + SHORTNESS_S, hall.in_hand()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.lists(st.integers(0, 40), min_size=1, max_size=8, unique=True), st.integers(1, 30))
def test_a_long_recording_delays_a_short_one_by_no_more_than_a_window(slots: int, shorts: list[int], longs: int) -> None:
    """Ten-hour recordings, more than there are slots, came first. A one-minute file that comes then is begun at once, so that its first
    window is delayed by the one that is being decoded, and its last by none."""
    hall = Hall(Engine(slots=slots))
    hall.round(job(1000 + number, 0.0, LONG) for number in range(longs))
    for here in range(60):
        came = [job(here, hall.now)] if here in shorts and hall.engines[0].seat(0).free > 0 else []
        hall.round(came)
        for work in came:
            assert hall.began[work["id"]] == work["ready_at"]
    assert all(hall.ended[n] == hall.began[n] + SHORT * ROUND_S for n in hall.began if n < 1000 and n in hall.ended)
    assert hall.began.keys() >= {min(shorts)}, "there was a slot for the first of them"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 8), st.integers(2, 4), st.integers(0, 3000), st.integers(3, 40))
def test_inboxes_have_equal_shares(slots: int, inboxes: int, head_start_s: int, rounds: int) -> None:
    """While several inboxes have files of one class, none has two jobs more in hand than another, and over time none is served two
    files more than another, however early it came and however many it has."""
    hall = Hall(Engine(slots=slots))
    number = 0
    for inbox in range(1, inboxes + 1):
        for _ in range(slots * rounds):
            number += 1
            hall.waiting.append(job(number, 0.0 if inbox == 1 else float(head_start_s), 1, inbox=inbox))
    hall.now = float(head_start_s)
    served: Counter[int] = Counter()
    for _ in range(rounds):
        served.update(work["inbox_id"] for work in hall.hand_out())
        shares = [hall.in_hand()[inbox] for inbox in range(1, inboxes + 1)]
        assert max(shares) - min(shares) <= 1
        totals = [served[inbox] for inbox in range(1, inboxes + 1)]
        assert max(totals) - min(totals) <= 1 + (head_start_s >= AGING_S) * inboxes * slots
        hall.round()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=2, max_size=20), st.integers(1, 4))
def test_classes_go_in_order(files: list[tuple[int, int]], slots: int) -> None:
    """Of files that came together, none is begun before one of a higher class, as long as nobody has waited for long."""
    hall = Hall(Engine(slots=slots))
    hall.waiting = [job(number, 0.0, 1, inbox=inbox, priority=priority) for number, (inbox, priority) in enumerate(files)]
    classes = [work["priority"] for _ in range(len(files)) for work in [*hall.hand_out(), hall.round()] if work]
    assert classes == sorted(classes)
