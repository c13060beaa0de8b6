"""queueing: who is next, and to whom. Pure: rows, seats and `now` in, one row and its seat out (FEATURES F29 to F33, G5).

A *line* is what waits of one inbox, one class, one model and one kind. Lines are ordered by class, lifted by one for every `AGING_S` that a
line has not had its turn; then suspects before others; then by what their inbox has in hand already; then by whose turn was longest ago.
Within a line the order is that of arrival, where a short recording may be brought forward by at most `SHORTNESS_S`. So a backlog that is
served does not age, an urgent file overtakes it however old it is, and no job waits for ever: a line that is passed over rises until it
is first, and in a line only those can overtake a job that came within `SHORTNESS_S` of it.

Who cannot be placed is overtaken: a job of a model that no engine has loaded, one that needs more memory than there is, a long recording
beyond the share of slots that long ones may have. Who may have killed a worker runs alone (docs/decisions/0009).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Row = Mapping[str, Any]

AGING_S = 1800.0
"""A line that has not had its turn for this long is lifted by one priority class; a job without room for as long makes room."""

SHORTNESS_S = 900.0
"""A short recording overtakes, in its line, only what came less than this before it."""

LONG_S = 3600.0
"""A recording longer than this is a long one: together they never have all slots of an engine."""

COMPANY = 4
"""While there are suspects an engine takes no more jobs together than this: whoever kills it next has few to be mistaken for.

As each offers several windows at once, four still fill most of a batch. Found by simulation: 100 files that kill among 1,000."""

BYTES_PER_S = 16_000
"""What is assumed of a recording of unknown length where lengths are compared: 128 kbit/s."""

BYTES_PER_S_MIN = 2_000
"""And where it matters that it is not a long one: 16 kbit/s, the thinnest that people use."""


Kind = Literal["usual", "long", "roomy", "suspect"]
"""What a job asks of its place: any slot, one that long recordings may have, known memory, an engine of its own."""


class Line(NamedTuple):
    """Jobs that are served in the order they came, because they wait for the same places."""

    inbox: int
    priority: int
    model: str
    kind: Kind


class Seat(NamedTuple):
    """What an engine has in hand, and how much more it may have."""

    engine: int
    tasks: int
    free: int
    suspect: bool  # what it has in hand is one job that must run alone
    model: str = ""  # loaded there
    room_mib: int | None = None  # memory that a job may use there; None: unknown
    long: int = 0  # long recordings among its tasks
    quarantine: bool = False  # started for suspects, who run in it one after the other; nobody else does

    @property
    def long_max(self) -> int:
        """How many long recordings it may have: a quarter of its slots, one at least, is kept for short ones (an only slot is anybody's).

        Each recording offers several windows at once, so the rest is enough to fill its batches.
        """
        slots = self.tasks + self.free
        return slots - max(1, slots // 4) if slots > 1 else slots


@dataclass
class Turns:
    """Who last had a turn, and when. The dispatcher keeps it for its life; a new one begins with what waits longest."""

    taken: int = 0
    lines: dict[Line, tuple[float, int]] = field(default_factory=dict)  # by the clock, and by number
    inboxes: dict[int, int] = field(default_factory=dict)  # by number

    def take(self, row: Row, now: float) -> None:
        """A job was handed out: its line and its inbox have had their turn."""
        self.taken += 1
        self.lines[line_of(row)] = (now, self.taken)
        self.inboxes[row["inbox_id"]] = self.taken


def line_of(row: Row) -> Line:
    return Line(row["inbox_id"], row["priority"], row.get("model") or "", kind_of(row))


def kind_of(row: Row) -> Kind:
    if suspect(row):
        return "suspect"
    if row.get("needs_mib") is not None:
        return "roomy"
    return "long" if is_long(row) else "usual"


def length_s(row: Row) -> float:
    """How long a recording is, or is likely to be by its size."""
    duration_s = row.get("duration_s")
    return float(row.get("size") or 0) / BYTES_PER_S if duration_s is None else float(duration_s)


def is_long(row: Row) -> bool:
    """Whether a recording is longer than `LONG_S`, or may be by its size."""
    duration_s = row.get("duration_s")
    longest_s = float(row.get("size") or 0) / BYTES_PER_S_MIN if duration_s is None else float(duration_s)
    return longest_s > LONG_S


def suspect(row: Row) -> bool:
    """Whether a ready job may have killed a worker, so that it must run alone (docs/decisions/0009).

    An attempt is behind it, and the job itself did not fail in it: a worker died, or what came since (an interruption, a share that was
    away) has covered the cause. Told by the row alone, it outlives the daemon.
    """
    failed_by_itself = row["failure_kind"] == "transient" and row["failure_code"] != "worker_died"
    return row["attempts"] > 0 and not failed_by_itself


def due(row: Row) -> tuple[float, int]:
    """The order within a line. It never changes while a job waits: whoever comes `SHORTNESS_S` later can never overtake it."""
    length = length_s(row)
    return float(row["ready_at"]) + SHORTNESS_S * length / (length + LONG_S), int(row["id"])


def in_order(ready: Sequence[Row], now: float, *, in_hand: Mapping[int, int], turns: Turns) -> Iterator[Row]:
    """All jobs, the next one first."""
    lines: dict[Line, list[Row]] = {}
    for row in ready:
        lines.setdefault(line_of(row), []).append(row)

    def rank(line: Line) -> tuple[int, bool, int, int, int, tuple[float, int]]:
        at, turn = turns.lines.get(line, (0.0, 0))
        waited_s = max(0.0, now - max(at, min(row["ready_at"] for row in lines[line])))
        lifted = line.priority - int(waited_s // AGING_S)
        later = line.kind != "suspect"  # all of them while an engine is empty for them, so that it need not be emptied again
        return lifted, later, in_hand.get(line.inbox, 0), turns.inboxes.get(line.inbox, 0), turn, min(map(due, lines[line]))

    for line in sorted(lines, key=rank):
        yield from sorted(lines[line], key=due)


def hand_out(
    ready: Sequence[Row],
    seats: Sequence[Seat],
    now: float,
    *,
    in_hand: Mapping[int, int],
    turns: Turns,
) -> tuple[Row, Seat] | None:
    """The next job and the engine for it; None when there is no job, no room, or nothing for it to do but wait.

    `ready` are jobs that may run now, each with its `model` ("" is any), `in_hand` how many jobs of each inbox are running. The caller
    tells `turns` when the job was really taken.
    """
    if not ready or not any(_open(seat) for seat in seats):
        return None
    others_wait = any(not suspect(row) and _fitting(row, seats) for row in ready)
    wary = any(map(suspect, ready)) or any(seat.suspect for seat in seats)
    left = [_in_small_company(seat) if wary else seat for seat in seats]
    for row in in_order(ready, now, in_hand=in_hand, turns=turns):
        seat = _alone(row, left, others_wait=others_wait) if suspect(row) else _together(row, left)
        if seat is not None:
            return row, seat
        emptied = _to_be_emptied(row, left, now)
        if emptied is not None:
            left.remove(emptied)  # nobody overtakes there
    return None


def wants_quarantine(ready: Sequence[Row], seats: Sequence[Seat], *, model: str) -> bool:
    """Whether an engine of this model should be there for suspects: some wait, or one is in hand there, and the others have work beside.

    Without one (no memory for it) one of the usual engines is emptied for them, again and again.
    """
    own = [seat for seat in seats if seat.model == model]
    waiting = [row for row in ready if (row.get("model") or model) == model]
    suspects = any(map(suspect, waiting)) or any(seat.quarantine and seat.tasks for seat in own)
    others = any(not suspect(row) for row in waiting) or any(seat.tasks and not seat.suspect for seat in own)
    return suspects and others


def _in_small_company(seat: Seat) -> Seat:
    return seat._replace(free=max(0, min(seat.free, COMPANY - seat.tasks)))


def _open(seat: Seat) -> bool:
    return seat.free > 0 and not seat.suspect


def _fitting(row: Row, seats: Sequence[Seat]) -> list[Seat]:
    """Those that have its model loaded, or will have."""
    model = row.get("model") or ""
    return [seat for seat in seats if not model or seat.model == model]


def _together(row: Row, seats: Sequence[Seat]) -> Seat | None:
    """The roomiest engine where a job may run beside others."""
    usual = [seat for seat in _fitting(row, seats) if not seat.quarantine]
    may = [seat for seat in usual if _open(seat) and _has_room(row, seat, usual)]
    if is_long(row):
        may = [seat for seat in may if seat.long < seat.long_max]
    return max(may, key=lambda seat: (seat.free, -seat.tasks), default=None)


def _has_room(row: Row, seat: Seat, usual: Sequence[Seat]) -> bool:
    """Memory for it; or all there ever is, and nobody beside it: then the engine makes do with smaller batches."""
    if row.get("needs_mib") is None or seat.room_mib is None or seat.room_mib >= row["needs_mib"]:
        return True
    return seat.tasks == 0 and seat == _roomiest(usual)


def _roomiest(seats: Sequence[Seat]) -> Seat | None:
    """With most memory; among equals the one that is empty first."""
    return max(seats, key=lambda seat: (seat.room_mib or 0, -seat.tasks, -seat.engine), default=None)


def _alone(row: Row, seats: Sequence[Seat], *, others_wait: bool) -> Seat | None:
    """An engine without tasks for a suspect: the one for suspects; without one, or when nobody else waits, a usual one."""
    fitting = _fitting(row, seats)
    empty = [seat for seat in fitting if _open(seat) and seat.tasks == 0]
    place = next((seat for seat in empty if seat.quarantine), None)
    if place is not None or (others_wait and _place_for_suspects(fitting)):
        return place
    return max((seat for seat in empty if not seat.quarantine), key=lambda seat: (seat.room_mib or 0, seat.free), default=None)


def _place_for_suspects(seats: Sequence[Seat]) -> bool:
    """Whether an engine is there for them, or works on one: one engine at a time is theirs, the others go on."""
    return any(seat.quarantine or seat.suspect for seat in seats)


def _to_be_emptied(row: Row, seats: Sequence[Seat], now: float) -> Seat | None:
    """The engine that takes nothing else until this job can have it alone: for a suspect without a place, or a job long without room."""
    usual = [seat for seat in _fitting(row, seats) if not seat.quarantine]
    if suspect(row):
        waits = not _place_for_suspects(_fitting(row, seats))
        return min((seat for seat in usual if _slots(seat)), key=lambda seat: (seat.tasks, seat.engine), default=None) if waits else None
    roomiest = _roomiest([seat for seat in usual if _slots(seat)])
    if row.get("needs_mib") is None or roomiest is None or now - max(row["ready_at"], row["not_before"]) < AGING_S:
        return None
    return None if _has_room(row, roomiest, usual) else roomiest


def _slots(seat: Seat) -> int:
    return seat.tasks + seat.free
