"""values: what the optimiser is told, what it remembers, and what it answers. Frozen, serialisable, no behaviour of their own.

A *card* is anything that runs engines and has memory of its own: a GPU, known by its UUID, or the machine's processor, known as "cpu",
whose memory is the RAM. `memory_…` is VRAM on the one and RAM on the other. Unknown is None, and never zero.
"""

from __future__ import annotations

from typing import Literal

from whisperd.vocabulary import Noun

CPU = "cpu"
"""The card that is the machine's processor."""

Usable = Literal["ok", "unknown", "frozen", "suspect", "drain", "lost"]
Life = Literal["loading", "idle", "busy", "draining"]


class Limits(Noun, frozen=True):
    """What the operator allows on a card at this hour (settings, quiet hours, `[[card]]`)."""

    workers_min: int = 0
    workers_max: int = 12
    memory_max_mib: int | None = None  # for all our workers together
    paused: str = ""  # why nothing may run here now; "" when it may


class Worker(Noun, frozen=True):
    """One engine process as the pool sees it."""

    id: int  # never used twice in a daemon's life; the youngest has the highest
    model: str
    compute_type: str
    batch: int  # windows decoded together at most, as it was told
    life: Life
    memory_mib: int | None = None  # what the process holds now
    audio_s: float = 0.0  # audio it has finished in its life, window by window
    jobs: int = 0  # in hand
    jobs_done: int = 0
    fed: bool = False  # it has had enough in hand, ever since the last observation, to fill its batches: its speed is its own


class Card(Noun, frozen=True):
    """One card now.

    `usable`: ok; unknown (no figures: hold, never grow); frozen (what runs may go on, nothing new can start: driver replaced); suspect
    (XIDs from several files: one worker at most); drain (ask all to end, start none: reset needed); lost (fallen off the bus: its
    workers are dead). `why` says it in words.
    """

    gpu: str
    driver: str = ""
    usable: Usable = "ok"
    why: str = ""
    memory_total_mib: int | None = None
    memory_free_mib: int | None = None
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None  # the card slows itself down from here on
    throttled: bool = False  # it does so now, for heat or power brake (the power cap of a loaded board does not count)
    workers: tuple[Worker, ...] = ()
    limits: Limits = Limits()


class Backlog(Noun, frozen=True):
    """Jobs that are ready and not in any worker's hands, of one model."""

    model: str
    jobs: int
    oldest_s: float  # how long the oldest has waited
    urgent: int = 0  # jobs of the first priority class among them


class Event(Noun, frozen=True):
    """Something that happened since the last observation."""

    kind: Literal["out_of_memory", "load_out_of_memory", "worker_died"]
    gpu: str
    worker: int = 0
    compute_type: str = ""
    batch: int = 0  # the windows of the call that did not fit
    need_mib: int | None = None  # what the worker would have held, where that is known


class Observation(Noun, frozen=True):
    """Everything there is to know at one moment. `now` is any clock that only goes forward and outlives the daemon (seconds)."""

    now: float
    cards: tuple[Card, ...]
    backlog: tuple[Backlog, ...] = ()
    events: tuple[Event, ...] = ()
    cores: int = 1
    cores_busy: float | None = None  # of the whole machine, everybody's work together, since the last observation


class ModelNeed(Noun, frozen=True):
    """What is believed of a model before anything was measured (published figures): memory of one worker, MiB."""

    model: str
    compute_type: str
    weights_mib: int  # process with the model loaded, context and library included
    window_mib: int  # more for each window of a batch


class Policy(Noun, frozen=True):
    """The operator's settings that matter here, and the optimiser's own constants. Times in seconds."""

    interval_s: float = 300.0  # a plan is made on history this often; trials under way are judged every `look_s`
    look_s: float = 20.0
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # that may be tried, ascending; one: pinned
    compute_types: tuple[
        str, ...
    ] = ()  # allowed, the preferred first; () as loaded; a second one is tried only when batch and workers stand
    cpu_batches: tuple[int, ...] = (1, 2, 4, 8)
    batch_first: int = 8  # a card with room begins with this batch
    cpu_batch_first: int = 4
    reserve_mib: int | None = None  # memory always left free; None: the larger of 256 MiB and 1.5 %
    temperature_max_c: int | None = None  # the operator's own limit beside the card's
    idle_s: float = 600.0  # without work for this long: down to `idle_workers`
    idle_workers: int = 1  # kept warm on each card, 0 or 1
    yield_to_others: bool = True  # a foreign process gets its memory at once, down to no worker of ours
    swap_min_s: float = 300.0  # between two models on one card
    swap_wait_s: float = 1800.0  # a job of another model waits at most this long while there is work for the loaded one
    needs: tuple[ModelNeed, ...] = ()


class CardPlan(Noun, frozen=True):
    """What should run on a card."""

    gpu: str
    model: str
    compute_type: str
    batch: int
    workers: int


class Reason(Noun, frozen=True):
    """One sentence why a plan is as it is. `code` is stable; `facts` are the figures it rests on."""

    gpu: str
    code: str
    text: str
    facts: tuple[tuple[str, float], ...] = ()


class Advice(Noun, frozen=True):
    """The optimiser's answer: what should run, which workers should be replaced (memory bloat: drained at the next boundary and started
    anew), and why it differs from the answer before. No reasons: nothing changed."""

    cards: tuple[CardPlan, ...]
    recycle: tuple[int, ...] = ()
    reasons: tuple[Reason, ...] = ()
