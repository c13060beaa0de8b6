"""Who is next, and to whom: one decision at a time. Rows, seats and `now` in, a row and its seat out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.dispatcher import queueing
from whisperd.dispatcher.queueing import AGING_S, COMPANY, LONG_S, SHORTNESS_S, Seat, Turns

Job = dict[str, Any]


def row(job: int, *, inbox: int = 1, attempts: int = 0, code: str | None = None, length_s: float | None = 60.0, **more: Any) -> Job:
    kind = {None: None, "source_down": "waiting"}.get(code, "transient")
    failed = {"attempts": attempts, "failure_kind": kind, "failure_code": code}
    usual = {"priority": 1, "ready_at": 0.0, "not_before": 0.0, "size": 1000, "needs_mib": None, "model": ""}
    return {"id": job, "inbox_id": inbox, "duration_s": length_s, **usual, **failed, **more}


def killer(job: int, **more: Any) -> Job:
    return row(job, attempts=1, code="worker_died", **more)


def seat(engine: int, tasks: int = 0, slots: int = 4, *, suspect: bool = False, **more: Any) -> Seat:
    return Seat(engine, tasks, slots - tasks, suspect, **more)


def handed(
    ready: Sequence[Job], *seats: Seat, now: float = 1.0, in_hand: Mapping[int, int] | None = None, turns: Turns | None = None
) -> tuple[int, int] | None:
    """(job, engine) of the next one handed out."""
    chosen = queueing.hand_out(ready, seats, now, in_hand=in_hand or {}, turns=turns or Turns())
    return None if chosen is None else (chosen[0]["id"], chosen[1].engine)


def order(ready: Sequence[Job], *, now: float = 1.0, slots: int = 100) -> list[int]:
    """Numbers as they are handed out one after the other, each finished before the next."""
    left, turns, out = list(ready), Turns(), []
    while (chosen := handed(left, seat(1, slots=slots), now=now, turns=turns)) is not None:
        (job,) = (item for item in left if item["id"] == chosen[0])
        turns.take(job, now)
        left.remove(job)
        out.append(job["id"])
    return out


# --- who is next -----------------------------------------------------------------------------------------------------------------


def test_urgent_goes_first_then_first_come() -> None:
    """Among files that wait equally long, the class decides, then who came first."""
    assert order([row(1, priority=2), row(2), row(3, ready_at=-5.0), row(4, priority=0)]) == [4, 3, 2, 1]


def test_the_shortest_of_equals_goes_first() -> None:
    """Of files that came together the shortest goes first; by its size where its length is not known."""
    assert order([row(1, length_s=900), row(2, length_s=60), row(3, length_s=None, size=1_600_000)]) == [2, 3, 1]


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.floats(SHORTNESS_S, 1e6))
def test_a_short_file_overtakes_only_what_came_a_little_before(long_s: float, short_s: float, later_s: float) -> None:
    """Whatever their lengths: who comes `SHORTNESS_S` later is behind, so a long file is not passed for ever."""
    assert queueing.due(row(1, length_s=long_s)) < queueing.due(row(2, length_s=short_s, ready_at=later_s + 1e-3))


def test_a_backlog_does_not_delay_urgent_files() -> None:
    """Normal files that have waited for hours, and are being served, are overtaken by an urgent one that comes now."""
    turns, now = Turns(), 10 * AGING_S
    old = [row(number) for number in range(50)]
    turns.take(old[0], now - 60)
    assert handed([*old, row(99, priority=0, ready_at=now)], seat(1), now=now, turns=turns) == (99, 1)


@given(st.lists(st.tuples(st.integers(0, 2), st.floats(0, 60)), min_size=1, max_size=30))
def test_nothing_starves(arrivals: list[tuple[int, float]]) -> None:
    """Whatever arrives: a file of the lowest class is next once it has waited two classes longer than all the others."""
    newer = [row(n, priority=p, ready_at=3 * AGING_S + at) for n, (p, at) in enumerate(arrivals, start=1)]
    now = max(item["ready_at"] for item in newer)
    assert handed([*newer, row(0, priority=2)], seat(1), now=now) == (0, 1)


def test_the_inbox_with_less_in_hand_goes_first() -> None:
    """Of two inboxes the one with fewer running jobs is next, however many files the other has dropped, however early."""
    flood = [row(number) for number in range(50)]
    guest = row(99, inbox=2, ready_at=100.0)
    assert handed([*flood, guest], seat(1), now=101.0, in_hand={1: 3}) == (99, 1)
    assert handed([*flood, guest], seat(1), now=101.0, in_hand={1: 3, 2: 4}) == (0, 1)


def test_inboxes_take_turns() -> None:
    """With one job at a time, the inboxes alternate."""
    ready = [*(row(number) for number in range(4)), *(row(10 + number, inbox=2, ready_at=100.0) for number in range(4))]
    assert order(ready, now=101.0) == [0, 10, 1, 11, 2, 12, 3, 13]


# --- and to whom -----------------------------------------------------------------------------------------------------------------


def test_the_roomiest_engine_is_next() -> None:
    """The engine with most free slots gets the job; full ones, those that are not ready and those with a suspect get none."""
    ready = [row(1), row(2)]
    assert handed(ready, seat(1, 3), seat(2, 1), seat(3, 2)) == (1, 2)
    assert handed(ready, seat(1, 4), seat(2, 0, slots=0)) is None
    assert handed(ready, seat(1, 1, suspect=True)) is None
    assert handed([], seat(1, 0)) is None


def test_a_job_goes_where_its_model_is() -> None:
    """Only an engine with its model may have a job; one whose model nobody has is overtaken; "" is at home everywhere."""
    large, usual = row(1, model="large-v3"), row(2, ready_at=50.0)
    assert handed([large, usual], seat(1, model="small"), seat(2, model="large-v3", tasks=3)) == (1, 2)
    assert handed([large, usual], seat(1, model="small")) == (2, 1)
    assert handed([large], seat(1, model="small")) is None


def test_long_recordings_leave_slots_free() -> None:
    """A quarter of an engine's slots, one at least, is never given to long recordings; what may be long counts as such."""
    long, short = row(1, length_s=10 * LONG_S), row(2, ready_at=SHORTNESS_S)
    assert handed([long, short], seat(1, 5, slots=8, long=5), now=SHORTNESS_S) == (1, 1)
    assert handed([long, short], seat(1, 6, slots=8, long=6), now=SHORTNESS_S) == (2, 1)
    assert handed([long], seat(1, 1, slots=2, long=1)) is None
    assert handed([long], seat(1, 0, slots=1)) == (1, 1), "an only slot is anybody's"
    assert handed([row(1, length_s=None, size=10**8)], seat(1, 3, slots=4, long=3)) is None
    assert handed([row(1, length_s=60.0, size=10**8)], seat(1, 3, slots=4, long=3)) == (1, 1), "known to be short"


def test_who_needs_much_memory_waits_for_it_and_is_overtaken() -> None:
    """It goes where there is room or where nobody knows; the roomiest engine takes it alone when it is idle, and makes itself idle for one
    that has waited long."""
    giant, other = row(1, attempts=1, code="out_of_memory", needs_mib=8000), row(2, ready_at=5.0)
    assert handed([giant, other], seat(1, room_mib=4000, tasks=1), seat(2, room_mib=9000, tasks=3)) == (1, 2)
    assert handed([giant, other], seat(1, tasks=1)) == (1, 1)
    assert handed([giant, other], seat(1, room_mib=4000, tasks=1), now=10.0) == (2, 1)
    assert handed([giant], seat(1, room_mib=4000), seat(2, room_mib=6000)) == (1, 2)
    assert handed([giant], seat(1, room_mib=4000), seat(2, room_mib=6000, tasks=1)) is None
    assert handed([giant, other], seat(1, room_mib=4000, tasks=1), now=2 * AGING_S) is None, "nobody overtakes it any more"
    beside = (seat(1, room_mib=4000, tasks=1), seat(2, room_mib=5000, tasks=1))
    assert handed([giant, other], *beside, now=2 * AGING_S) == (2, 1), "the other engine goes on"


# --- who may have killed a worker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attempts", "code", "suspected"),
    [
        (0, None, False),  # new
        (0, "source_down", False),  # waited for its share
        (1, "worker_died", True),
        (2, "worker_died", True),
        (1, None, True),  # died, ran alone, and the daemon was killed
        (1, "source_down", True),  # died, and then its share was away
        (1, "engine_error", False),  # failed by itself: everybody knows who it was
        (1, "out_of_memory", False),
    ],
)
def test_who_is_suspected(attempts: int, code: str | None, suspected: bool) -> None:
    """Who may have killed a worker is told by the row alone, whatever came since."""
    assert queueing.suspect(row(1, attempts=attempts, code=code)) is suspected


def test_a_suspect_gets_an_empty_engine_or_makes_one() -> None:
    """A suspect goes to an engine without tasks. While there is none, one engine is emptied for it and the others go on; one at a time."""
    suspect, other = killer(1), row(2, ready_at=5.0)
    assert handed([suspect, other], seat(1, 1, slots=32), seat(2, 0)) == (1, 2)
    assert handed([suspect, other], seat(1, 1)) is None, "the only engine is emptied"
    assert handed([suspect, other], seat(1, 1), seat(2, 3)) == (2, 2), "the emptier one is emptied, the other goes on"
    assert handed([suspect, other], seat(1, 1), seat(2, 1, suspect=True)) == (2, 1)
    assert handed([suspect, other], seat(1, 0), seat(2, 1, suspect=True)) == (2, 1), "one engine at a time is theirs"
    assert handed([suspect], seat(1, 0), seat(2, 1, suspect=True)) == (1, 1), "unless nobody else waits"
    assert handed([other, killer(3, ready_at=9.0)], seat(1)) == (3, 1), "before others of its class: no engine is emptied twice"
    assert handed([row(2, priority=0), suspect], seat(1, 1)) == (2, 1)


def test_an_engine_for_suspects() -> None:
    """Where there is one for them, even if it is not ready yet, suspects go there, one by one and nobody else."""
    suspect, other = killer(1), row(2, ready_at=5.0)
    assert handed([suspect, other], seat(1, 1), seat(2, 0, quarantine=True)) == (1, 2)
    assert handed([suspect, other], seat(1, 0), seat(2, 0, slots=0, quarantine=True)) == (2, 1)
    assert handed([suspect, other], seat(1, 0), seat(2, 1, suspect=True, quarantine=True)) == (2, 1)
    assert handed([other], seat(2, 0, quarantine=True)) is None


def test_few_run_together_while_there_are_suspects() -> None:
    """Where something kills, at most `COMPANY` files share an engine, so that few are blamed for the next death."""
    ready = [killer(1), row(2, ready_at=5.0)]
    there = seat(9, 1, suspect=True, quarantine=True)
    assert handed(ready, seat(1, COMPANY - 1, slots=32), there) == (2, 1)
    assert handed(ready, seat(1, COMPANY, slots=32), there) is None
    assert handed(ready[1:], seat(1, COMPANY, slots=32)) == (2, 1)
    long = row(3, length_s=10 * LONG_S)
    assert handed([killer(1), long], seat(1, COMPANY - 1, slots=32, long=COMPANY - 1), there) is None


@pytest.mark.parametrize(
    ("ready", "seats", "wanted"),
    [
        ([], [seat(1, 3, model="m")], False),
        ([row(1)], [seat(1, 3, model="m")], False),
        ([killer(1)], [seat(1, 3, model="m")], True),
        ([killer(1), row(2)], [seat(1, model="m")], True),
        ([killer(1)], [seat(1, model="m")], False),  # nobody else has work: the usual engine is good enough
        ([killer(1)], [seat(1, 1, suspect=True, model="m")], False),
        ([row(2)], [seat(1, 3, model="m"), seat(2, 1, suspect=True, quarantine=True, model="m")], True),  # until the last one is through
        ([killer(1, model="other"), row(2)], [seat(1, model="m")], False),
    ],
)
def test_when_an_engine_for_suspects_is_wanted(ready: list[Job], seats: list[Seat], wanted: bool) -> None:
    """While suspects wait or run in it and the others have work beside them."""
    assert queueing.wants_quarantine(ready, seats, model="m") is wanted


@given(
    st.lists(st.tuples(st.booleans(), st.floats(0, 9), st.booleans()), max_size=12),
    st.lists(st.tuples(st.integers(0, 4), st.booleans(), st.booleans()), min_size=1, max_size=4),
)
def test_suspects_are_alone_whatever_comes(jobs: list[tuple[bool, float, bool]], engines: list[tuple[int, bool, bool]]) -> None:
    """Handing out until nothing more goes: no suspect is ever beside another job, no engine has more than its slots, or long ones only, and
    a usual engine stays empty only when nothing is left for it."""
    ready = [row(n, attempts=int(bad), ready_at=at, length_s=9 * LONG_S if long else 9.0) for n, (bad, at, long) in enumerate(jobs)]
    seats = [seat(n, 1 if bad else tasks, suspect=bad, quarantine=apart) for n, (tasks, bad, apart) in enumerate(engines)]
    while (chosen := queueing.hand_out(ready, seats, 1.0, in_hand=Counter(), turns=Turns())) is not None:
        job, taken = chosen
        assert taken.free > 0 and not taken.suspect
        bad = queueing.suspect(job)
        assert taken.tasks == 0 if bad else not taken.quarantine
        ready.remove(dict(job))
        before = seats[taken.engine]
        long = before.long + (queueing.is_long(job) and not bad)
        assert long <= 3
        seats[taken.engine] = before._replace(tasks=before.tasks + 1, free=before.free - 1, suspect=bad, long=long)
    assert not ready or not any(seat.tasks == 0 and not seat.quarantine for seat in seats)
