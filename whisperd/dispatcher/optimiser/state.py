"""state: what the optimiser remembers between two calls, and what of it outlives the daemon.

Owns: State, CardState and their parts, `start` and `State.learned`. All frozen and serialisable; times are those of the observations.
What is learned is stored in rows of (GPU, driver, model, precision, batch), so that a restart begins at the knobs that were proven.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from whisperd.dispatcher.optimiser.values import CardPlan, Policy
from whisperd.vocabulary import Noun


class Knobs(Noun, frozen=True, order=True):
    """What can be turned on a card for a model."""

    compute_type: str
    batch: int
    workers: int


class Held(Noun, frozen=True):
    """Memory that workers were seen to hold. `batch` 0: with the model loaded and nothing decoded yet."""

    model: str
    compute_type: str
    batch: int
    typical_mib: float
    worst_mib: float
    samples: int


class Margin(Noun, frozen=True):
    """What running out of memory taught: needs are multiplied by `factor`, which fades."""

    model: str
    compute_type: str
    factor: float
    at: float


class Comparison(Noun, frozen=True):
    """Measured: how much faster the second setting was, as the logarithm of the ratio, and how uncertain that is."""

    model: str
    before: Knobs
    after: Knobs
    gain: float
    sd: float
    at: float


class Block(Noun, frozen=True):
    """A setting that was tried and did not pay: not again before `until`, and longer each time."""

    model: str
    knobs: Knobs
    until: float
    times: int


class Proven(Noun, frozen=True):
    """The knobs that a model came to on this card, and how long until they are questioned again."""

    model: str
    knobs: Knobs
    at: float
    speed: float = 0.0  # audio seconds per second there
    probe_wait_s: float = 1800.0
    room_mib: float = 0.0  # of the card's memory that was ours to use then
    cores_busy: float = 0.0  # of the host, by everybody
    probes: int = 0  # scheduled looks so far


class Mark(Noun, frozen=True):
    """One worker's progress: audio at the first step seen and at the last. `since` is None until the first step."""

    worker: int
    since: float | None
    from_s: float
    at: float
    audio_s: float
    steps: int
    done: int


class Window(Noun, frozen=True):
    """A stretch in which all workers had enough to do with the knobs as they are: only there speed is learned."""

    since: float
    marks: tuple[Mark, ...]


class Pace(Noun, frozen=True):
    """How fast it went. `in_hand` and `recordings`: how many recordings the figure rests on, since each costs differently."""

    at: float
    knobs: Knobs
    seconds: float
    speeds: tuple[tuple[int, float], ...]  # (worker, audio seconds per second)
    in_hand: int
    recordings: int
    done: int  # recordings ended until now, by these workers

    @property
    def speed(self) -> float:
        return sum(speed for _, speed in self.speeds)


class Trial(Noun, frozen=True):
    """An experiment under way: `before` was measured, `after` is being measured."""

    code: str
    before: Knobs
    after: Knobs
    base: Pace
    since: float
    expected: float = 0.0  # logarithm of how much faster it should be
    probe: bool = False  # asks whether less would do as well


class Echo(Noun, frozen=True):
    """A trial that has ended: how fast it went there is compared once more, with how fast it goes after it."""

    before: Knobs
    after: Pace


class Cap(Noun, frozen=True):
    """At most so many workers (or so large a batch) until then. `times` grows with each repetition, and so does the time."""

    code: str
    workers: int
    until: float
    at: float
    times: int = 1
    batch: int = 0  # 0: any
    settled_c: float | None = None  # temperature some minutes after a cut for heat


class CardState(Noun, frozen=True):
    """One card."""

    gpu: str
    driver: str = ""
    model: str = ""
    knobs: Knobs = Knobs(compute_type="", batch=0, workers=0)  # wanted, before limits and guards
    plan: CardPlan | None = None  # in force
    binding: str = ""  # what keeps the plan below the wanted knobs
    bound: bool = False  # the wanted knobs were lowered to what was possible: back to the proven ones when more is
    brisk: bool = True  # searching: one trial after the other
    look_at: float = 0.0
    plan_at: float = 0.0
    probe_at: float = 0.0
    still_since: float = 0.0
    swapped_at: float | None = None
    work_at: float | None = None  # when there was work last
    backed_at: float | None = None  # since when jobs of its model wait that nobody has in hand
    starved_since: float | None = None  # since when none do
    window: Window | None = None
    pace: Pace | None = None
    trial: Trial | None = None
    echo: Echo | None = None
    held: tuple[Held, ...] = ()
    widest: tuple[tuple[int, int], ...] = ()  # (worker, the largest batch it was ever told)
    margins: tuple[Margin, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    blocks: tuple[Block, ...] = ()
    proven: tuple[Proven, ...] = ()
    caps: tuple[Cap, ...] = ()
    total_mib: int | None = None
    room_mib: float | None = None  # free and ours together, now: what two looks agree upon
    last_room_mib: float | None = None
    rooms: tuple[tuple[float, float], ...] = ()  # (begin, least room) of half minutes, the newest last
    foreign_mib: float | None = None  # as it was when it last changed clearly
    foreign_grown: tuple[float, ...] = ()  # when others took more, lately
    blind_since: float | None = None
    hot_since: float | None = None
    felt_at: float = 0.0
    warm_c: float | None = None  # temperature, smoothed
    warming: float = 0.0  # kelvin per second, smoothed
    hot_paused: bool = False
    drifted: int = 0  # looks in a row at which the speed was not the proven one
    recycled_at: float = 0.0
    short_since: float | None = None  # since when fewer run than planned, and none is on its way
    pending_mib: float = 0.0  # that workers which run will still take, while more are to be started


class Lesson(msgspec.Struct, frozen=True, kw_only=True):
    """What is stored of one batch size. Unknown fields of another version are passed over."""

    held: tuple[Held, ...] = ()
    margin: Margin | None = None
    comparisons: tuple[Comparison, ...] = ()
    blocks: tuple[Block, ...] = ()
    proven: Proven | None = None


class Learned(msgspec.Struct, frozen=True, kw_only=True):
    """A row of what is learned; its first five fields are its key."""

    gpu: str
    driver: str
    model: str
    compute_type: str
    batch: int
    body: Lesson


class State(Noun, frozen=True):
    """Everything that is remembered."""

    cards: tuple[CardState, ...] = ()
    stored: tuple[Learned, ...] = ()  # rows of cards that have not been seen in this life
    policy: Policy = Policy()
    at: float = 0.0
    cores_busy: float = 0.0  # share of all cores, smoothed

    def learned(self) -> tuple[Learned, ...]:
        """What a restart should begin with."""
        return tuple(row for card in self.cards for row in rows_of(card)) + self.stored

    def card(self, gpu: str) -> CardState | None:
        return next((card for card in self.cards if card.gpu == gpu), None)


def start(policy: Policy, learned: Sequence[Learned] = ()) -> State:
    """The state of a daemon that has just begun: with what was learned before it, if anything."""
    return State(stored=tuple(learned), policy=policy)


def rows_of(card: CardState) -> tuple[Learned, ...]:
    """A card's lessons as rows. Batch 0 holds what belongs to no batch: the memory of a loaded model and its margin."""
    keys = {(one.model, one.compute_type, one.batch) for one in card.held}
    keys |= {(one.model, one.compute_type, 0) for one in card.margins}
    keys |= {(one.model, one.before.compute_type, one.before.batch) for one in card.comparisons}
    keys |= {(one.model, one.knobs.compute_type, one.knobs.batch) for one in card.proven}
    keys |= {(one.model, one.knobs.compute_type, one.knobs.batch) for one in card.blocks}
    return tuple(
        Learned(gpu=card.gpu, driver=card.driver, model=model, compute_type=kind, batch=batch, body=_lesson(card, model, kind, batch))
        for model, kind, batch in sorted(keys)
    )


def _lesson(card: CardState, model: str, compute_type: str, batch: int) -> Lesson:
    key = (model, compute_type, batch)
    return Lesson(
        held=tuple(one for one in card.held if (one.model, one.compute_type, one.batch) == key),
        margin=next((one for one in card.margins if not batch and (one.model, one.compute_type) == key[:2]), None),
        comparisons=tuple(one for one in card.comparisons if (one.model, one.before.compute_type, one.before.batch) == key),
        blocks=tuple(one for one in card.blocks if (one.model, one.knobs.compute_type, one.knobs.batch) == key),
        proven=next((one for one in card.proven if (one.model, one.knobs.compute_type, one.knobs.batch) == key), None),
    )


def card_from(rows: Sequence[Learned], gpu: str, driver: str) -> CardState:
    """A card as its rows tell. Under another driver memory and knobs are a beginning, but speed has to be measured anew."""
    own = [row for row in rows if row.gpu == gpu]
    same = [row for row in own if row.driver == driver]
    use = same or own
    return CardState(
        gpu=gpu,
        driver=driver,
        held=tuple(held for row in use for held in row.body.held),
        margins=tuple(row.body.margin for row in use if row.body.margin is not None),
        comparisons=tuple(sorted((one for row in same for one in row.body.comparisons), key=lambda one: one.at)),
        blocks=tuple(block for row in same for block in row.body.blocks),
        proven=tuple(sorted((row.body.proven for row in use if row.body.proven is not None), key=lambda one: one.at)),
        brisk=not same,
    )
