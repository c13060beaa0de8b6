"""`whisperd gpu`, from outside: what a daemon on a machine that is a script tells of its cards, in words and as JSON."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from installation import PATIENCE_S, Installation
from tools import fake_nvml
from tools.fake_nvml import FIRST, SECOND, TWO_CARDS, Machine

from whisperd.ledger.ledger import Ledger
from whisperd.report import gpu
from whisperd.vocabulary import CardMinute, GpuProcess, Reading

CARD_KEYS = {"gpu", "name", "status", "what", "now", "notes", "minutes"}
ODD = TWO_CARDS + "set 0 reasons=0x44\nset 1 mig=1 power=n/a\nproc 0 4242 3000 10\n"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The daemon of this test, and all it starts, live on this machine."""
    if fake_nvml.compiler() is None:
        pytest.skip("no C compiler: the fake libnvidia-ml.so.1 cannot be built")
    made = Machine(tmp_path / "machine", fake_nvml.build(tmp_path), ODD)
    for name, value in made.environment().items():
        monkeypatch.setenv(name, value)
    return made


def answer(place: Installation, *arguments: str) -> Any:
    done = place.desk("gpu", "--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


def minutes(now: float, gpu_: str, count: int) -> list[CardMinute]:
    """So many minutes until now, with memory and workers rising."""
    return [
        CardMinute(
            gpu=gpu_,
            at=now - 60 * (count - 1 - number),
            samples=60,
            memory_total_mib=8000,
            memory_used_min_mib=0,
            memory_used_max_mib=8000 * number // count,
            own_max_mib=None,
            utilisation_mean_percent=50.0,
            temperature_max_c=60,
            workers=number / count,
            batch=8,
            audio_s=600.0,
        )
        for number in range(count)
    ]


def test_before_any_daemon(place: Installation) -> None:
    """A ledger in which nobody has looked yet has no cards, and that is said."""
    place.state.mkdir()
    Ledger(str(place.state), epoch="test").close()
    assert answer(place)["cards"] == []
    assert "the daemon has not looked" in place.desk("gpu").out


def test_what_the_cards_do_and_did(place: Installation, machine: Machine) -> None:
    """What the probe saw reaches the operator: figures, what is special about a card, curves of the hours, as text and as JSON."""
    place.write_config(engine={"device": "cpu"})
    with place.daemon() as daemon:
        daemon.wait_until(lambda ledger: ledger.heard("gpus"), "the gauge told of its cards", PATIENCE_S)
        daemon.stop()
    assert daemon.pid not in machine.callers()
    now = time.time()
    ledger = Ledger(str(place.state), epoch="test")
    ledger.record_minutes(minutes(now, FIRST, 120))
    ledger.close()
    shown = answer(place, "--hours", "2")
    assert (shown["schema"], shown["hours"], shown["trouble"]) == ("whisperd.gpu/1", 2.0, None)
    cards = {card["gpu"]: card for card in shown["cards"]}
    first, second = cards[FIRST], cards[SECOND]
    assert set(first) == CARD_KEYS
    assert (first["status"], first["now"]["vram_used_mib"], first["now"]["temperature_c"]) == ("ok", 1200 + 420 + 3000, 61)
    assert first["notes"][:2] == ["slowed down by heat", "at its power limit (usual under load)"]
    assert second["now"]["power_w"] is None and second["now"]["utilisation_percent"] is None
    assert any("divided by MIG" in note for note in second["notes"])
    assert any("power_w" in note and "utilisation_percent" in note for note in second["notes"])
    assert len(first["minutes"]) >= 119 and "gpu" not in first["minutes"][0]
    text = place.desk("gpu", "--hours", "2").out
    for said in ("RTX 4090", FIRST, "4620/24576 MiB", "61 °C", "slowed down by heat", "?/300 W", "memory", "▁", "█", "now"):
        assert said in text


def test_hours_that_are_none(place: Installation) -> None:
    """A wrong number is a usage error, not a stack trace."""
    for wrong in ("0", "-3", "many", "nan"):
        done = place.desk("gpu", f"--hours={wrong}")
        assert done.code == 2 and "no number of hours" in done.err


# --- the curves, as values ---


def test_each_column_holds_the_highest_of_its_time() -> None:
    """The newest minute is in the last column; where nothing is known there is a hole, not a zero."""
    now = 1_000_000.0
    told: list[tuple[float, float | None]] = [(now, 5.0), (now - 30, 9.0), (now - 1800, 0.0), (now - 3599, None)]
    rows: list[dict[str, Any]] = [{"at": at, "x": value} for at, value in told]
    buckets = gpu.in_buckets(rows, lambda row: row["x"], now=now, hours=1)
    assert len(buckets) == gpu.COLUMNS
    assert (buckets[-1], buckets[-31], buckets[0]) == (9.0, 0.0, None)
    assert gpu.curve([0.0, 50.0, 100.0, None, 400.0], 100) == "▁▅█·█"
    assert gpu.curve([0.0, None], 0) == "▁·"


def test_what_is_unknown_is_said_so() -> None:
    """Processes without memory, MPS and figures that a card does not tell are words; a plain card has none."""
    plain = Reading(gpu="a", status="ok", what="a")
    assert gpu.notes(plain) == []
    here = (GpuProcess(pid=1),)
    odd = Reading(gpu="a", status="ok", what="a", mps=True, processes=here, unsupported=("power_w",), throttled=("power_brake",))
    assert gpu.notes(odd) == [
        "slowed down by its power supply",
        "an MPS server runs on this machine: it is used as it is, not managed",
        "1 process(es) on it, the driver does not tell their memory",
        "not told by this card: power_w",
    ]
