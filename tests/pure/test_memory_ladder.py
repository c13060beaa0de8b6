"""The last rungs of the ladder out of memory: a lighter precision among those that the operator allows (DESIGN §7.6)."""

from __future__ import annotations

from typing import Any

import pytest

from whisperd.dispatcher.optimiser import decide, start
from whisperd.dispatcher.optimiser.values import Advice, Backlog, Card, Event, ModelNeed, Observation, Policy, Worker

GPU = "GPU-0"
TYPES = ("float16", "int8_float16")
NEEDS = tuple(ModelNeed(model="m", compute_type=kind, weights_mib=3000, window_mib=100) for kind in TYPES)


def advised(event: dict[str, Any], *, types: tuple[str, ...] = TYPES, workers: int = 1, serving: int = 1) -> Advice:
    """What is advised two seconds after a plan of so many workers with batch 1, when this happens."""
    policy = Policy(compute_types=types, batches=(1,), batch_first=1, needs=NEEDS)
    backlog = (Backlog(model="m", jobs=9, oldest_s=1.0),)
    living = tuple(Worker(id=n, model="m", compute_type="float16", batch=1, life="busy", memory_mib=3100) for n in range(1, serving + 1))
    card = Card(gpu=GPU, memory_total_mib=24_000, memory_free_mib=20_000)
    limits = {"workers_min": workers, "workers_max": workers}
    card = Card(gpu=GPU, memory_total_mib=24_000, memory_free_mib=20_000, limits=type(card.limits)(**limits))
    state = start(policy)
    state, _ = decide(state, Observation(now=0.0, cards=(card,), backlog=backlog, cores=8), policy)
    busy = Card(gpu=GPU, memory_total_mib=24_000, memory_free_mib=20_000, limits=card.limits, workers=living)
    happened = Event(**{"gpu": GPU, "worker": 1, "compute_type": "float16", "batch": 1, **event})
    state, advice = decide(state, Observation(now=2.0, cards=(busy,), backlog=backlog, events=(happened,), cores=8), policy)
    return advice


def test_one_window_too_much_for_one_worker_takes_the_next_precision() -> None:
    """Nothing smaller is left but the precision; the sentence says from what to what."""
    advice = advised({"kind": "out_of_memory"})
    assert [(plan.compute_type, plan.workers, plan.batch) for plan in advice.cards] == [("int8_float16", 1, 1)]
    (reason,) = [reason for reason in advice.reasons if reason.code == "lighter"]
    assert "int8_float16 instead of float16" in reason.text


def test_a_model_that_does_not_even_load_takes_it_too() -> None:
    """The only worker ran out of memory while it loaded."""
    advice = advised({"kind": "load_out_of_memory"}, serving=0)
    assert advice.cards[0].compute_type == "int8_float16"


@pytest.mark.parametrize(
    ("event", "rest"),
    [
        ({"kind": "out_of_memory", "batch": 4}, {}),  # a smaller batch may do
        ({"kind": "out_of_memory"}, {"workers": 2, "serving": 2}),  # a worker fewer may do
        ({"kind": "load_out_of_memory"}, {"workers": 2, "serving": 1}),  # one serves: no second one
        ({"kind": "out_of_memory"}, {"types": ("float16",)}),  # the operator allows no other
    ],
)
def test_the_precision_is_the_last_thing_to_go(event: dict[str, Any], rest: dict[str, Any]) -> None:
    """What the operator prefers stays while anything else can give."""
    assert advised(event, **rest).cards[0].compute_type == "float16"
