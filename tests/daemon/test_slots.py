"""The dispatcher with engines that have several jobs in hand: who gets what, whom a death blames, what a recording goes on from.

The dispatcher runs here in the test's own process; its watchers, outbox writers and probe are the real ones, its engines real processes
that do what is written in each file (tests/tools/scripted_engine.py).
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from floor import Floor, environment, plan

from whisperd.dispatcher.pool import SETTLING_BATCHES
from whisperd.ledger.ledger import Ledger

NewFloor = Callable[..., Floor]


@pytest.fixture
def floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[NewFloor]:
    """Lives of a dispatcher, one after the other; `slots` and `revision` are those of its engines."""
    lives: list[Floor] = []

    def begin(*, slots: int = 4, revision: str = "1", **changes: dict[str, Any]) -> Floor:
        for life in lives:
            life.end()
        for name, value in environment(tmp_path, slots=slots, revision=revision, echo=False).items():
            monkeypatch.setenv(name, value)
        lives.append(Floor(tmp_path, **changes))
        return lives[-1]

    yield begin
    for life in lives:
        life.end()


# --- who gets what ---------------------------------------------------------------------------------------------------------------


def test_no_more_is_claimed_than_there_are_slots(floor: NewFloor) -> None:
    """Of five files three are claimed for three slots, and the next one as soon as one is done."""
    life = floor(slots=3)
    for number in range(5):
        life.drop(f"{number}", after=life.go(f"{number}"))
    life.until(lambda: len(life.in_hand()) == 3 and len(life.states()) == 5, "three are in hand")
    assert sorted(life.states().values()) == ["ready"] * 2 + ["running"] * 3
    assert [row["attempts"] for row in life.rows().values() if row["state"] == "ready"] == [0, 0]
    first = sorted(life.in_hand())[0]
    Path(life.go(first)).touch()
    life.until(lambda: life.all_in(first) and len(life.in_hand()) == 3, "the next one has its place")
    assert len(life.dispatcher.pool.tasks()) == 3
    for number in range(5):
        Path(life.go(f"{number}")).touch()
    life.until(lambda: life.all_in("0", "1", "2", "3", "4"), "all are done")
    assert {row["attempts"] for row in life.rows().values()} == {1}


def test_the_engine_with_most_room_is_next(floor: NewFloor) -> None:
    """Two engines of two slots: the second file goes to the second engine, the fourth to whoever has room."""
    life = floor(slots=2)
    life.want(plan(2))
    life.until(lambda: sum(seat.free for seat in life.dispatcher.pool.seats()) == 4, "both are ready")
    for number in range(3):
        life.drop(f"{number}", after=life.go("all"))
        life.until(lambda number=number: len(life.in_hand()) == number + 1, f"{number} is in hand")
        assert sorted(len(hand) for hand in life.hands()) == [[0, 1], [1, 1], [1, 2]][number]
    Path(life.go("all")).touch()
    life.until(lambda: life.all_in("0", "1", "2"), "all are done")


def test_one_of_several_is_cancelled_and_taken_up_again(floor: NewFloor) -> None:
    """The operator cancels one of three: its slot is free once the engine has let go of it, the others go on. Tried again at once,
    it is not handed out while the engine still has it from before."""
    life = floor(slots=3)
    for name in "abc":
        life.drop(name, windows=1, then="hold")
    life.until(lambda: len(life.in_hand()) == 3, "three are in hand")
    job = life.rows()["b"]["id"]
    (pid,) = life.pids()
    os.kill(pid, signal.SIGSTOP)
    desk = Ledger(str(life.home / "state"), epoch="desk")
    desk.cancel(job, time.time())
    desk.retry(job, time.time())
    life.drop("d", then="hold")
    life.until(lambda: life.states().get("d") == "ready", "another waits")
    assert life.states()["b"] == "ready"
    os.kill(pid, signal.SIGCONT)
    life.until(lambda: [told["job"] for told in life.told("Transcribe")].count(job) == 2, "it is in hand again")
    assert job in [told["job"] for told in life.told("Abandon")]
    assert life.in_hand() == {"a", "b", "c"}
    assert life.rows()["b"]["attempts"] == 1
    desk.cancel(job, time.time())
    desk.close()
    life.until(lambda: life.in_hand() == {"a", "c", "d"}, "its slot is the next one's")
    assert life.states()["b"] == "cancelled" and life.pids() == [pid]


# --- whom a death blames ---------------------------------------------------------------------------------------------------------


def test_a_poisoned_file_among_twenty_good_ones(floor: NewFloor) -> None:
    """One file kills every engine that has it in hand: after three deaths it is failed, all twenty others are done. Who was in hand
    with it has one bad attempt, nobody two; after the first death it is never in company."""
    life = floor(slots=4)
    names = [f"good {number:02}" for number in range(20)]
    beside = set(names[:3])
    for name in beside:
        life.drop(name, after=life.go("good"))
    life.drop("poison", after=life.go("poison"), then="crash")
    life.until(lambda: life.in_hand() == {"poison", *beside}, "all slots are taken")
    for name in names[3:]:
        life.drop(name)
    life.until(lambda: list(life.states().values()).count("ready") == 17, "the others wait")
    Path(life.go("poison")).touch()
    life.until(lambda: all("release" in life.verbs(name) for name in beside), "the first death")
    Path(life.go("good")).touch()
    life.until(lambda: life.all_in(*names) and life.states()["poison"] == "failed", "all have ended")
    rows = life.rows()
    assert (rows["poison"]["attempts"], rows["poison"]["failure_code"]) == (3, "worker_died")
    assert "killed by SIGSEGV" in rows["poison"]["failure_what"]
    assert life.verbs("poison").count("claim") == 3
    assert len(life.told("LoadModel")) <= 5, "three deaths, an engine for suspects, and no more"
    for name in beside:
        assert life.verbs(name) == ["see", "settle", "claim", "release", "claim", "finish", "publish"]
    assert {rows[name]["attempts"] for name in names[3:]} == {1}


def test_suspects_run_alone_also_after_a_restart(floor: NewFloor) -> None:
    """After a shared death each file that was in hand runs by itself, though others wait and there are slots; a daemon that is killed
    meanwhile goes on so in its next life."""
    life = floor(slots=4)
    for name in "ab":
        life.drop(name, then="hold")
        life.until(lambda name=name: name in life.in_hand(), "it is in hand")
    os.kill(life.pids()[0], signal.SIGSEGV)
    life.until(lambda: life.rows()["a"]["attempts"] == 2 and "a" in life.in_hand(), "the first runs again")
    life.drop("c", then="hold")
    life.until(lambda: "c" in life.states(), "a third waits")
    life = floor(slots=4)
    desk = Ledger(str(life.home / "state"), epoch="desk")
    for name in "ab":
        life.until(lambda name=name: name in life.in_hand(), "it runs again")
        assert {life.rows()[name]["id"]} in life.hands(), "alone"
        desk.cancel(life.rows()[name]["id"], time.time())
    desk.close()
    life.drop("d", then="hold")
    life.until(lambda: life.in_hand() == {"c", "d"}, "then everybody")
    assert {life.rows()[name]["id"] for name in "cd"} in life.hands(), "in company"
    assert [row["attempts"] for row in life.rows().values()] == [2, 2, 1, 1]


def test_a_suspect_does_not_hold_up_other_engines(floor: NewFloor) -> None:
    """With two engines one has the suspect, the other goes on with the rest."""
    life = floor(slots=2)
    life.want(plan(2))
    life.drop("a", then="hold")
    life.until(lambda: life.in_hand() == {"a"}, "it is in hand")
    os.kill(life.dispatcher.pool.working()[0].child.pid, signal.SIGSEGV)
    life.until(lambda: life.rows()["a"]["attempts"] == 2 and life.in_hand() == {"a"}, "it runs alone")
    for name in "bcd":
        life.drop(name)
    life.until(lambda: life.all_in("b", "c", "d"), "the others are done")
    assert life.in_hand() == {"a"}


def test_somebodys_kill_blames_nobody(floor: NewFloor) -> None:
    """SIGKILL from outside: every file in hand has its attempt given back, and they go on together."""
    life = floor(slots=3)
    for name in "abc":
        life.drop(name, windows=2, then="hold")
    life.until(lambda: len(life.told("Transcribe")) == 3, "the engine has heard of three")
    os.kill(life.pids()[0], signal.SIGKILL)
    life.until(lambda: len(life.told("Transcribe")) == 6 and len(life.in_hand()) == 3, "they go on")
    assert {row["attempts"] for row in life.rows().values()} == {1}
    assert {row["failure_code"] for row in life.rows().values()} == {None}


def test_a_shared_death_is_never_the_last_word(floor: NewFloor) -> None:
    """Even with a single attempt allowed, a file is not failed for a death in company; alone, it is."""
    life = floor(slots=2, dispatcher={"attempts_max": 1})
    life.drop("innocent", after=life.go("crash"))
    life.drop("poison", after=life.go("crash"), then="crash")
    life.until(lambda: len(life.in_hand()) == 2, "both are in hand")
    Path(life.go("crash")).touch()
    life.until(lambda: life.states() == {"innocent": "done", "poison": "failed"}, "both have ended")
    assert life.rows()["innocent"]["attempts"] in (1, 2), "done before the crash, or alone after it"
    assert life.rows()["poison"]["attempts"] in (1, 2)


def test_an_engine_that_stalls_is_killed_and_one_that_moves_is_not(floor: NewFloor) -> None:
    """One file in hand makes progress: the other, which waits behind it, keeps its lease. When neither moves, the engine is killed
    and both are blamed."""
    life = floor(slots=2, dispatcher={"stall_s": 5.0})
    life.drop("moves", ticking=True, after=life.go("stop"), then="hold")
    life.drop("waits", then="hold")
    life.until(lambda: len(life.in_hand()) == 2, "both are in hand")
    leases = [life.rows()["waits"]["lease_until"]]
    life.until(lambda: life.rows()["waits"]["lease_until"] > leases[0], "its lease is renewed")
    assert len(life.told("LoadModel")) == 1
    Path(life.go("stop")).touch()
    life.until(lambda: sorted(row["attempts"] for row in life.rows().values()) == [1, 2], "another engine has one of them")
    for name in ("moves", "waits"):
        (blame,) = (event for event in life.ledger.events(life.rows()[name]["id"]) if event["verb"] == "release")
        assert "no progress for 5 s" in blame["note"]


# --- what a recording goes on from -----------------------------------------------------------------------------------------------


def test_work_goes_on_from_the_last_window(floor: NewFloor) -> None:
    """The next engine is told how many windows there are, where they end, and the state that came with the last of them."""
    life = floor()
    life.drop("a", windows=3, after=life.go("a"))
    life.until(lambda: life.rows() and len(life.ledger.windows(life.rows()["a"]["id"])) == 3, "three windows are kept")
    os.kill(life.pids()[0], signal.SIGKILL)
    life.until(lambda: len(life.told("Transcribe")) == 2, "it is taken up again")
    first, second = life.told("Transcribe")
    assert (first["windows_done"], first["front_end"]) == (0, "")
    assert (second["windows_done"], second["position_s"], second["front_end"]) == (3, 3.0, "state 2")
    Path(life.go("a")).touch()
    life.until(lambda: life.all_in("a"), "it is done")


def test_windows_of_another_model_are_not_gone_on_from(floor: NewFloor) -> None:
    """Between two lives the model changed: the recording begins anew, and says so; with the same model it goes on."""
    life = floor(revision="1")
    life.drop("a", windows=3, after=life.go("a"))
    life.until(lambda: life.rows() and len(life.ledger.windows(life.rows()["a"]["id"])) == 3, "three windows are kept")
    life = floor(revision="1")
    life.until(lambda: len(life.told("Transcribe")) == 2, "it is taken up again")
    life = floor(revision="2")
    life.until(lambda: len(life.told("Transcribe")) == 3, "it is taken up again")
    assert [told["windows_done"] for told in life.told("Transcribe")] == [0, 3, 0]
    Path(life.go("a")).touch()
    life.until(lambda: life.all_in("a"), "it is done")


# --- the life of the model -------------------------------------------------------------------------------------------------------


def test_an_idle_model_is_unloaded_once(floor: NewFloor) -> None:
    """Without work for the time that is set an engine is asked for its model's memory, once; again only after the next work."""
    life = floor(engine={"unload_idle_s": 0.2})
    life.until(lambda: life.told("Unload"), "it is asked")
    life.drop("a")
    life.until(lambda: life.all_in("a") and len(life.told("Unload")) == 2, "it is asked again")
    assert len(life.pids()) == 1


def test_an_engine_that_grew_is_replaced(floor: NewFloor) -> None:
    """Its memory grew beyond the limit over what its first batches needed, however much that was: it ends at a boundary, another takes
    its place, and no attempt is counted for what it had."""
    life = floor(engine={"rss_growth_max_mib": 64})
    life.drop("a", batches=[{"rss_mib": 1000}] * SETTLING_BATCHES + [{"rss_mib": 1064}], after=life.go("a"))
    life.until(lambda: life.in_hand() == {"a"}, "it is in hand")
    before = life.pids()
    life.drop("b", batches=[{"rss_mib": 1065}], after=life.go("b"))
    life.until(lambda: life.pids() and life.pids() != before, "another engine")
    for name in "ab":
        Path(life.go(name)).touch()
    life.until(lambda: life.all_in("a", "b"), "both are done")
    assert {row["attempts"] for row in life.rows().values()} == {1}


def test_batches_are_counted(floor: NewFloor) -> None:
    """What the engines say of their batches adds up."""
    life = floor()
    batches = [{"windows": 4}, {"windows": 4}, {"windows": 2, "encoded": 2}]
    life.drop("a", batches=batches, out_of_memory=1)
    life.until(lambda: life.all_in("a"), "it is done")
    told = life.dispatcher.pool.counters.told()
    assert told == {
        "batches": 3,
        "windows": 10,
        "mean_batch": 3.333,
        "mean_limit": 4.0,
        "encoded": 4,
        "encoded_needed": 3,
        "encoded_per_needed": 1.333,
        "out_of_memory": 1,
    }


def test_slices_of_a_shared_engine_add_up(floor: NewFloor) -> None:
    """Four files that share an engine: their working times together are no longer than the time that passed."""
    life = floor()
    began = time.time()
    for number in range(4):
        life.drop(f"{number}", after=life.go("all"))
    life.until(lambda: len(life.in_hand()) == 4, "all are in hand")
    Path(life.go("all")).touch()
    life.until(lambda: life.all_in("0", "1", "2", "3"), "all are done")
    _, wall_s = life.ledger.throughput_since(began)
    assert 0 < wall_s <= time.time() - began
    assert sum(row["process_s"] for row in life.rows().values()) > wall_s
