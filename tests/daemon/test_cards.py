"""The pool on GPUs: one start at a time, each after a look at the memory; cards that are lost; memory that runs out (issue 4, Pool).

The GPUs are the compiled fake of the driver's library (tests/tools/fake_nvml), loaded by the real probe process; engines are scripted
ones, whose memory that driver sees.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from floor import Floor, plan
from loguru import logger
from tools import fake_nvml

from whisperd.child import Life
from whisperd.dispatcher.engines import Engine
from whisperd.dispatcher.optimiser.values import CPU
from whisperd.ledger.ledger import Ledger

NewFloor = Callable[..., Floor]

TOTAL_MIB, RESERVED_MIB = 8192, 200
WEIGHTS_MIB, WINDOW_MIB = 700, 50


class Cards:
    """A machine with GPUs of 8 GiB that are a script; what its engines hold is seen by the driver."""

    def __init__(self, machine_of: fake_nvml.Machine, count: int) -> None:
        self.machine = machine_of
        self.names = [f"GPU-0000000{number}-0000-0000-0000-000000000000" for number in range(count)]
        self.say()

    def say(self, *lines: str) -> None:
        """The machine as it is from now on; without lines, all is well."""
        cards = [
            f"gpu {number} {name} 00000000:0{number + 1}:00.0 {TOTAL_MIB} {RESERVED_MIB} NVIDIA Fake"
            for number, name in enumerate(self.names)
        ]
        self.machine.script("\n".join(["driver 570.11", *cards, *lines, ""]))

    def engines(self, **script: Any) -> dict[str, Any]:
        """What the scripted engines need to hold memory there."""
        memory = {
            "dir": self.machine.environment()["FAKE_NVML_WORKERS"],
            "gpus": {name: number for number, name in enumerate(self.names)},
            "capacity_mib": TOTAL_MIB - RESERVED_MIB,
            "weights_mib": WEIGHTS_MIB,
            "window_mib": WINDOW_MIB,
        }
        return {**script, "vram": {**memory, **script.pop("memory", {})}}


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if fake_nvml.compiler() is None:
        pytest.skip("the fake of the GPU driver's library needs a C compiler")
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def cards(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Cards]:
    """So many GPUs, for every process that is started from now on."""

    def begin(count: int) -> Cards:
        made = Cards(fake_nvml.Machine(tmp_path / "machine", library), count)
        for name, value in made.machine.environment().items():
            monkeypatch.setenv(name, value)
        return made

    return begin


GPU = {"device": "auto", "compute_type": "float16"}


def on_gpu(life: Floor, number: int) -> list[Engine]:
    name = f"GPU-0000000{number}-"
    return [engine for engine in life.engines() if engine.card.startswith(name)]


def used_mib(life: Floor, gpu: str) -> int:
    """Of a card, as the probe last saw it."""
    return next(int(seen.vram_used_mib or 0) for seen in life.dispatcher.gauge.readings if seen.gpu == gpu)


def test_one_start_at_a_time_on_a_gpu(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """Three engines on each of two cards: at no moment do two load on the same one, and the two cards do not wait for each other."""
    room = cards(2)
    life = floor(room.engines(load_s=0.2), engine=GPU)
    life.want(*(plan(3, gpu=name, compute_type="float16") for name in room.names))
    most: dict[str, int] = {}
    together = 0

    def look() -> bool:
        nonlocal together
        loading = [engine.card for engine in life.dispatcher.pool.engines.values() if engine.child.life is Life.BOOTING]
        for name in room.names:
            most[name] = max(most.get(name, 0), loading.count(name))
        together = max(together, len(loading))
        return life.serve(6)

    life.until(look, "six serve")
    assert most == dict.fromkeys(room.names, 1) and together == 2


def test_memory_is_looked_at_before_each_start(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """Somebody else has nearly all of the card: nothing is started there, and the reason is told; he leaves, and it is."""
    room = cards(1)
    room.say(f"proc 0 1 {TOTAL_MIB - RESERVED_MIB - 300} 0")
    said: list[str] = []
    sink = logger.add(said.append, filter=lambda record: record["extra"].get("event") == "no_room", format="{message}")
    life = floor(room.engines(), engine=GPU)
    life.want(plan(1, gpu=room.names[0], compute_type="float16"))
    life.drop("a")
    life.until(lambda: said, "it is refused")
    logger.remove(sink)
    assert "no further worker for tiny: 300 MiB are free, it needs" in said[0]
    life.live(1.5)
    assert not life.loads() and life.states() == {"a": "ready"}
    room.say()
    life.until(lambda: life.all_in("a"), "it is started")


def test_idle_engines_give_all_of_a_cards_memory_back(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """With idle_workers = 0 the driver counts nothing of ours any more; the next file is done all the same."""
    room = cards(1)
    life = floor(room.engines(), engine=GPU, dispatcher={"workers": 2, "idle_s": 10, "idle_workers": 0})
    life.until(lambda: life.dispatcher.gauge.readings, "the card is seen")
    before = used_mib(life, room.names[0])
    for name in "ab":
        life.drop(name, length_s=60)
        life.until(lambda name=name: life.all_in(name), "it is done")
        life.until(lambda: used_mib(life, room.names[0]) >= before + WEIGHTS_MIB, "the driver sees it")
        life.until(lambda: life.serve(0) and used_mib(life, room.names[0]) == before, "all is given back")


def test_peaks_of_a_cards_memory_are_kept(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """The most that an engine held of its card with each shape of a batch is in the ledger, by card, driver, model and precision."""
    room = cards(1)
    life = floor(room.engines(), engine=GPU)
    life.drop("a", batches=[{"windows": 4, "vram_mib": 900}, {"windows": 4, "vram_mib": 1000}, {"windows": 4, "vram_mib": 950}])
    life.until(lambda: life.all_in("a"), "it is done")
    peaks = life.ledger.db.conn.execute("SELECT gpu, driver, compute_type, batch, beam, frames, peak_mib FROM vram_peak WHERE batch = 4")
    assert list(peaks) == [(room.names[0], "570.11", "float16", 4, 5, 3000, 1000)]


def test_a_lost_card_costs_no_attempt_and_the_other_goes_on(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """One of two cards falls off the bus: its engines are killed at once, their files go on on the other, no attempt is spent; back again,
    it is used again."""
    room = cards(2)
    life = floor(room.engines(window_s=0.1), engine=GPU)
    names = [f"{number}" for number in range(8)]
    for name in names:
        life.drop(name, length_s=1800)
    life.until(lambda: all(on_gpu(life, number) and on_gpu(life, number)[0].tasks for number in (0, 1)), "both cards work")
    (lost,) = on_gpu(life, 1)
    (kept,) = on_gpu(life, 0)
    room.say("fail * 15 1")
    life.until(lambda: lost.child.life is Life.GONE, "its engine is killed")
    life.until(lambda: kept.tasks, "the other goes on")
    assert kept.child.life is Life.BUSY
    life.until(lambda: "lost" in dict(life.reasons()), "the plan says so")
    room.say()
    life.until(lambda: on_gpu(life, 1), "it is used again")
    life.until(lambda: life.all_in(*names), "all are done")
    assert {row["attempts"] for row in life.rows().values()} == {1}


def test_out_of_memory_halves_the_batch_and_makes_the_plan_smaller(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """A batch does not fit: the engine goes on with half of it, the file is done at its first attempt, and the optimiser makes the plan
    smaller and says why."""
    room = cards(1)
    life = floor(room.engines(memory={"capacity_mib": WEIGHTS_MIB + 5 * WINDOW_MIB}), engine={**GPU, "batch": 0})
    life.until(lambda: life.serve(1), "one serves")
    (engine,) = life.engines()
    before = engine.request.batch
    assert before > 5
    for number in range(8):
        life.drop(f"{number}", length_s=300, after=life.go("all"))
    life.until(lambda: len(life.in_hand()) == 8, "enough for a full batch")
    Path(life.go("all")).touch()
    life.until(lambda: life.all_in(*(f"{number}" for number in range(8))), "all are done")
    assert {row["attempts"] for row in life.rows().values()} == {1}
    assert life.dispatcher.pool.counters.out_of_memory >= 1
    life.until(lambda: "out_of_memory" in dict(life.reasons()), "the plan says why")
    life.until(lambda: engine.request.batch < before, "the batch is smaller")
    assert life.engines() == [engine], "nothing was loaded anew"


def test_a_file_that_needs_more_memory_than_there_was_waits_for_it(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """A window does not fit even alone: what it needs is remembered, and the file is handed out only where that much is, or alone where
    the most is: never beside others."""
    room = cards(1)
    memory = {"capacity_mib": WEIGHTS_MIB + WINDOW_MIB // 2}
    backoff = {"base_s": 0.1, "max_s": 0.1}
    life = floor(room.engines(memory=memory), engine=GPU, dispatcher={"workers": 1, "backoff": backoff, "attempts_max": 2})
    life.want(plan(1, gpu=room.names[0], compute_type="float16"))
    life.drop("small", then="hold")
    life.until(lambda: life.in_hand() == {"small"}, "it is in hand")
    life.drop("large", length_s=60)
    life.until(lambda: life.rows().get("large", {}).get("needs_mib"), "its need is known")
    row = life.rows()["large"]
    assert row["needs_mib"] > WEIGHTS_MIB and row["failure_code"] == "out_of_memory" and row["attempts"] == 1
    life.live(1.0)
    assert life.states()["large"] == "ready" and life.in_hand() == {"small"}, "not beside others"
    desk = Ledger(str(life.home / "state"), epoch="desk")
    desk.cancel(life.rows()["small"]["id"], time.time())
    desk.close()
    life.until(lambda: life.all_in("large", state="failed"), "alone it is tried once more")
    assert "does not fit" in life.rows()["large"]["failure_what"]


def test_what_fits_no_card_goes_to_the_cpu_where_that_is_allowed(floor: NewFloor, cards: Callable[[int], Cards]) -> None:
    """With dispatcher.cpu_fallback a file that ran out of a card's whole memory is done by an engine on the CPU; what fits stays away
    from there."""
    room = cards(1)
    memory = {"capacity_mib": WEIGHTS_MIB + WINDOW_MIB // 2}
    backoff = {"base_s": 0.1, "max_s": 0.1}
    life = floor(room.engines(memory=memory), engine=GPU, dispatcher={"workers": 1, "backoff": backoff, "cpu_fallback": True})
    life.until(lambda: life.serve(1), "the card serves")
    assert {told["gpu"] for told in life.told("LoadModel")} == {room.names[0]}
    life.drop("large", length_s=60)
    life.until(lambda: life.all_in("large"), "it is done")
    assert {told["gpu"] for told in life.told("LoadModel")} == {room.names[0], ""}
    assert life.rows()["large"]["attempts"] == 2
    life.until(lambda: all(engine.card != CPU for engine in life.engines()), "nobody needs the CPU any more")
