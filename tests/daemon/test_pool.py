"""The pool with real processes: engines come and go as the plan says, and no work is lost by it (issue 4, Pool).

Where a claim is the pool's alone, a test gives it shares and work itself (`Stage`); else a whole dispatcher lives (tests/floor.py). What
needs GPUs is in test_cards.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from floor import Floor, Pace, environment, plan

from whisperd.child import Life
from whisperd.dispatcher import machine
from whisperd.dispatcher import pool as pool_module
from whisperd.dispatcher.engines import Engine, Share, Task
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.pool import Pool, Recycling
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions
from whisperd.wire import Abandoned, BatchSet, Finished, Frame, LoadModel, Transcribe, WindowDone

PATIENCE_S = 60.0

NewFloor = Callable[..., Floor]


def request(model: str = "tiny", *, batch: int = 4, gpu: str = "") -> LoadModel:
    return LoadModel(
        model=model,
        device="cuda" if gpu else "cpu",
        compute_type="int8",
        gpu=gpu,
        cpu_threads=1,
        batch=batch,
        encoder="auto",
        cache_dir="/nowhere",
        offline=True,
        duration_max_s=3600.0,
        channels_max=2,
        rate_max_hz=48_000,
    )


class Stage:
    """A pool with nothing around it: the test says what is wanted and who has which work."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.loop = asyncio.new_event_loop()
        self.errors: list[BaseException] = []
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context["exception"]))
        self.nursery = Nursery(self.loop, on_end=lambda: None)
        self.frames: list[tuple[int, Any]] = []  # number of the engine, what it said
        self.deaths: list[tuple[Engine, str]] = []
        self.pool = Pool(self.nursery, str(home), on_frame=self._heard, on_death=self._died, module="scripted_engine")
        self.shares: tuple[Share, ...] = ()
        self.refusal = ""

    def _heard(self, engine: Engine, frame: Frame[Any]) -> None:
        self.frames.append((engine.number, frame.message))
        if isinstance(frame.message, Finished | Abandoned):
            self.pool.release(engine, frame.message.job, time.monotonic())

    def _died(self, engine: Engine, how: str) -> None:
        self.deaths.append((engine, how))

    def want(self, *shares: Share) -> None:
        self.shares = shares

    def give(self, engine: Engine, job: int, **script: Any) -> None:
        """Work: what the engine does with it."""
        path = self.home / f"{job}.json"
        path.write_text(json.dumps(script))
        now = time.monotonic()
        self.pool.assign(engine, job, Task(inbox=1), now)
        work = Transcribe(job=job, options=JobOptions(model="tiny"))
        self.pool.give(engine, work, os.open(path, os.O_RDONLY), now, made_by="")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S

        async def live() -> None:
            while not condition():
                if self.errors:
                    raise self.errors[0]
                assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {what}; {self.pool.told()}"
                now = time.monotonic()
                self.pool.enforce_kills(now)
                self.pool.step(self.shares, now, no_room=lambda _: self.refusal)
                await asyncio.sleep(0.01)

        self.loop.run_until_complete(live())

    def serving(self) -> list[Engine]:
        """The oldest first."""
        return sorted((engine for engine in self.pool.engines.values() if engine.serves), key=lambda engine: engine.number)

    def numbers(self) -> list[int]:
        return [engine.number for engine in self.serving()]

    def said(self, kind: type, engine: Engine | None = None) -> list[Any]:
        return [what for number, what in self.frames if isinstance(what, kind) and (engine is None or number == engine.number)]

    def end(self) -> None:
        self.loop.close()
        for child in self.nursery.children.values():
            child.kill(time.monotonic(), "the test ends")
            child.gone(time.monotonic())


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Stage]]:
    """A pool; what is said of its engines goes to all of them."""
    made: list[Stage] = []

    def begin(**engine: Any) -> Stage:
        for name, value in environment(tmp_path, **engine).items():
            monkeypatch.setenv(name, value)
        made.append(Stage(tmp_path))
        return made[-1]

    yield begin
    for one in made:
        one.end()


# --- more and fewer --------------------------------------------------------------------------------------------------------------


def test_the_pool_grows_and_shrinks_to_the_plan(stage: Callable[..., Stage]) -> None:
    """Three engines where three are wanted, one where one is, none where none is; who leaves ends normally."""
    room = stage()
    for workers in (3, 1, 2, 0):
        room.want(Share(request(), workers))
        room.until(lambda workers=workers: len(room.serving()) == workers == len(room.pool.engines), f"{workers} serve")
    assert {how for _, how in room.deaths} == {"ended normally"}


def test_who_has_nothing_in_hand_leaves_first_then_the_youngest(stage: Callable[..., Stage]) -> None:
    """Of four the idle one goes though it is older than busy ones; among the busy ones the youngest; the oldest stays."""
    room = stage()
    room.want(Share(request(), 4))
    room.until(lambda: len(room.serving()) == 4, "four serve")
    for engine in room.serving():
        if engine.number != 2:
            room.give(engine, engine.number, then="hold")
    for workers, left in ((3, [1, 3, 4]), (2, [1, 3]), (1, [1])):
        room.want(Share(request(), workers))
        room.until(lambda workers=workers: len(room.pool.engines) == workers, f"{workers} are left")
        assert room.numbers() == left


def test_who_is_still_loading_leaves_before_one_that_serves(stage: Callable[..., Stage]) -> None:
    """A plan that falls while a second engine loads costs nobody a loaded model."""
    room = stage()
    room.want(Share(request(), 1))
    room.until(lambda: room.numbers() == [1], "one serves")
    room.give(room.serving()[0], 1, then="hold")
    room.want(Share(request(), 2))
    room.pool.step(room.shares, time.monotonic())
    room.want(Share(request(), 1))
    room.until(lambda: len(room.pool.engines) == 1, "one is left")
    assert room.numbers() == [1]


def test_the_batch_is_set_live_and_the_slots_follow(stage: Callable[..., Stage]) -> None:
    """Another batch is told to every engine, which answers with its slots; no process is started for it, no work is dropped."""
    room = stage()
    room.want(Share(request(batch=2), 2))
    room.until(lambda: len(room.serving()) == 2, "two serve")
    for engine in room.serving():
        room.give(engine, engine.number, then="hold")
    before = list(room.pool.engines)
    for batch in (8, 4):
        room.want(Share(request(batch=batch), 2))
        room.until(lambda batch=batch: all(engine.slots == 2 * batch for engine in room.serving()), "the slots are known")
        assert [told.batch for told in room.said(BatchSet)[-2:]] == [batch] * 2
    assert list(room.pool.engines) == before and not room.deaths
    assert [seat.free for seat in room.pool.seats()] == [7, 7]


def test_another_precision_is_another_process(stage: Callable[..., Stage]) -> None:
    """What cannot be changed in a living process is a new one; the old ones end at their boundary."""
    room = stage()
    room.want(Share(request(), 2))
    room.until(lambda: len(room.serving()) == 2, "two serve")
    room.want(Share(msgspec.structs.replace(request(), compute_type="float32"), 2))
    room.until(lambda: room.numbers() == [3, 4] and len(room.pool.engines) == 2, "two others")
    assert {engine.request.compute_type for engine in room.serving()} == {"float32"}


# --- how they leave --------------------------------------------------------------------------------------------------------------


def test_an_engine_leaves_at_a_boundary_and_loses_no_window(floor: NewFloor) -> None:
    """The plan falls from two to one in the middle of four recordings: those that were in the hands of the one that leaves go on elsewhere
    from their last window, every window is in the end there, and no attempt is spent."""
    life = floor({"window_s": 0.1})
    life.want(plan(2))
    life.until(lambda: life.serve(2), "two serve")
    for name in "abcd":
        life.drop(name, length_s=900)
    life.until(lambda: len(life.in_hand()) == 4 and all(len(hand) == 2 for hand in life.hands()), "two each")
    life.until(lambda: all(len(life.ledger.windows(row["id"])) >= 5 for row in life.rows().values()), "some windows are done")
    life.want(plan(1))
    life.until(lambda: life.all_in(*"abcd"), "all are done")
    assert life.serve(1)
    for name, row in life.rows().items():
        assert life.words(name) == [f"window {number}" for number in range(30)]
        assert row["attempts"] == 1
    assert sorted(told["windows_done"] >= 5 for told in life.told("Transcribe")) == [False] * 4 + [True] * 2, "two went on elsewhere"


def test_an_engine_that_does_not_listen_is_terminated_then_killed(stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to leave and stopped in its tracks: SIGTERM after the grace, SIGKILL when even that is not heard, and the reason is told."""
    monkeypatch.setattr(pool_module, "DRAIN_S", 0.2)
    monkeypatch.setattr(pool_module, "KILL_AFTER_TERM_S", 0.2)
    room = stage()
    room.want(Share(request(), 1))
    room.until(room.serving, "it serves")
    (engine,) = room.serving()
    os.kill(engine.child.pid, signal.SIGSTOP)
    room.want(Share(request(), 0))
    room.until(lambda: engine.child.life is Life.DRAINING, "it is asked")
    room.until(lambda: engine.child.life is Life.KILLING, "it is terminated")
    room.until(lambda: room.deaths, "it is gone")
    assert room.deaths[0][1].startswith("killed by SIGKILL") and "boundary" in room.deaths[0][1]
    assert not room.pool.events, "its end is no failure of its own"


def test_an_engine_that_hears_sigterm_is_not_killed(stage: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked to leave in the middle of something long, it ends by SIGTERM."""
    monkeypatch.setattr(pool_module, "DRAIN_S", 0.2)
    room = stage(window_s=60.0)
    room.want(Share(request(), 1))
    room.until(room.serving, "it serves")
    room.give(room.serving()[0], 1, length_s=30)
    room.want(Share(request(), 0))
    room.until(lambda: room.deaths, "it is gone")
    assert room.deaths[0][1].startswith("killed by SIGTERM")


# --- engines that do not start ---------------------------------------------------------------------------------------------------


def absent(model: str) -> dict[str, Any]:
    """A start that fails for want of the model, as the real engine says it."""
    return {"fail": {"code": "model_absent", "what": f"cannot load the model {model}: it is not there", "hint": "fetch it"}}


def test_a_model_that_cannot_be_loaded_stops_the_loop_and_touches_no_job(floor: NewFloor, tmp_path: Path) -> None:
    """Few starts, ever further apart; the desk is told what is missing; the file waits with no attempt spent, and goes on by itself when
    the cause is gone."""
    boot = tmp_path / "boot"
    boot.write_text(json.dumps({"*": absent("tiny")}))
    life = floor({"boot": str(boot)})
    life.drop("a")
    blocked = life.until(lambda: life.dispatcher.pool.blocked, "it says why")
    assert (blocked.code, blocked.what) == ("model_absent", "cannot load the model tiny: it is not there")
    life.until(lambda: len(life.loads()) == 3, "it is tried again")
    life.live(1.0)
    assert len(life.loads()) == 3, "at 0, 1 and 3 s, and then at 7 s"
    assert life.rows()["a"]["attempts"] == 0 and life.verbs("a") == ["see", "settle"]
    boot.unlink()
    life.until(lambda: life.all_in("a"), "it goes on by itself")
    assert life.dispatcher.pool.blocked is None and life.rows()["a"]["attempts"] == 1


def test_an_engine_that_dies_while_it_starts_blocks_with_a_reason(stage: Callable[..., Stage], tmp_path: Path) -> None:
    """It says nothing and ends: after the second time the reason is how it ended, and there is a pause between starts."""
    boot = tmp_path / "boot"
    boot.write_text(json.dumps({"*": {"exit": 7}}))
    room = stage(boot=str(boot))
    room.want(Share(request(), 1))
    room.until(lambda: room.pool.blocked is not None, "it says why")
    assert room.pool.blocked is not None and "ended with status 7" in room.pool.blocked.what
    assert len(room.deaths) == 2
    assert room.deaths[1][0].child.born_at - room.deaths[0][0].child.born_at >= 1.0, "the first pause"


def test_one_kind_that_cannot_start_leaves_the_other_alone(floor: NewFloor, tmp_path: Path) -> None:
    """A model that is absent does not keep a loaded one from its work."""
    boot = tmp_path / "boot"
    boot.write_text(json.dumps({"*/base/*": absent("base")}))
    inboxes = ({}, {"path": str(tmp_path / "other"), "outbox": str(tmp_path / "out"), "model": "base"})
    life = floor({"boot": str(boot)}, inboxes=inboxes)
    life.want(plan(1), plan(1, model="base"))
    life.drop("b", inbox="other")
    life.until(lambda: life.dispatcher.pool.blocked is not None, "one is blocked")
    life.drop("a")
    life.until(lambda: life.all_in("a"), "the other works")
    life.until(lambda: life.states()["b"] == "ready", "the one whose model is absent is taken in all the same, and waits")


def test_memory_that_does_not_suffice_for_loading_is_told_to_the_optimiser(stage: Callable[..., Stage], tmp_path: Path) -> None:
    """It is an event of its own, so that the plan gets smaller; and a boot failure, so that there is a pause."""
    boot = tmp_path / "boot"
    boot.write_text(json.dumps({"*": {"out_of_memory": True}}))
    room = stage(boot=str(boot))
    room.want(Share(request(gpu="GPU-1"), 1))
    room.until(lambda: room.deaths, "it ended")
    (event,) = room.pool.take_events()
    assert (event.kind, event.gpu, event.batch) == ("load_out_of_memory", "GPU-1", 4)
    assert room.pool.blocked is not None and room.pool.blocked.code == "out_of_memory"


# --- fresh engines for old ones --------------------------------------------------------------------------------------------------


def test_an_engine_is_replaced_after_so_many_files(floor: NewFloor) -> None:
    """With recycle_jobs = 3 ten files take at least three engines; all are done, at one attempt each."""
    life = floor({"slots": 2}, dispatcher={"recycle_jobs": 3})
    names = [f"{number}" for number in range(10)]
    for name in names:
        life.drop(name)
    life.until(lambda: life.all_in(*names), "all are done")
    assert 3 <= len(life.loads()) <= 5
    assert {row["attempts"] for row in life.rows().values()} == {1}


def test_an_engine_is_replaced_at_its_age(stage: Callable[..., Stage]) -> None:
    """Old enough, it leaves at its boundary and another takes its place; what it had in hand comes back."""
    room = stage(window_s=0.05)
    room.want(Share(request(), 1))
    room.until(room.serving, "it serves")
    room.give(room.serving()[0], 1, length_s=30_000)
    room.pool.recycling = Recycling(age_s=0.5)
    room.until(lambda: room.numbers() == [2], "another one")
    assert [told.job for told in room.said(Abandoned)] == [1]
    assert len(room.said(WindowDone)) >= 1
    assert room.deaths[0][1] == "ended normally"


def test_an_engine_is_replaced_on_advice(floor: NewFloor) -> None:
    """The optimiser names one that holds too much memory: it leaves at a boundary, its work goes on in another, the rest stays."""
    life = floor({"window_s": 0.05})
    life.want(plan(2))
    life.until(lambda: life.serve(2), "two serve")
    for name in "ab":
        life.drop(name, length_s=1200)
    life.until(lambda: len(life.in_hand()) == 2, "both are in hand")
    first, second = life.engines()
    life.dispatcher.pool.recycle({first.number}, time.monotonic())
    life.until(lambda: life.all_in("a", "b"), "both are done")
    assert [engine.number for engine in life.engines()] == [second.number, 3]
    assert {row["attempts"] for row in life.rows().values()} == {1}
    assert all(life.words(name) == [f"window {number}" for number in range(40)] for name in "ab")


# --- idle, and ready before the first file -----------------------------------------------------------------------------------------


def test_an_engine_is_ready_before_the_first_file(floor: NewFloor) -> None:
    """The model is loaded at the start: the first job pays nothing for it."""
    life = floor()
    life.until(lambda: life.serve(1), "one serves")
    assert not life.rows()
    life.drop("a")
    life.until(lambda: life.all_in("a"), "it is done")
    assert len(life.loads()) == 1


@pytest.mark.parametrize("warm", [0, 1])
def test_idle_engines_leave(floor: NewFloor, monkeypatch: pytest.MonkeyPatch, warm: int) -> None:
    """Without work for idle_s as many are left as the settings say; the next file is done all the same."""
    monkeypatch.setattr(machine, "cores", lambda: 8)
    life = floor(dispatcher={"workers": 3, "idle_s": 10, "idle_workers": warm})
    for name in "ab":
        for number in range(9):
            life.drop(f"{name}{number}", after=life.go(name))
        life.until(lambda: life.serve(3), "three serve")
        Path(life.go(name)).touch()
        life.until(lambda name=name: life.all_in(*(f"{name}{number}" for number in range(9))), "all are done")
        life.until(lambda: life.serve(warm), "idle")
    assert "idle" in dict(life.reasons())


# --- several models ----------------------------------------------------------------------------------------------------------------


def test_each_job_runs_with_its_own_model(floor: NewFloor, tmp_path: Path) -> None:
    """Two inboxes with a model each on one card: every file is transcribed by its own, and a swap serves many files."""
    inboxes = ({}, {"path": str(tmp_path / "other"), "outbox": str(tmp_path / "out"), "model": "base"})
    life = floor(inboxes=inboxes, pace=Pace(wake_s=0.02, look_s=0.1, haste=200.0))
    names = [f"{number}" for number in range(20)]
    for name in names:
        life.drop(name)
        life.drop(f"b{name}", inbox="other")
    life.until(lambda: life.all_in(*names, *(f"b{name}" for name in names)), "all are done")
    models = {told["pid"]: told["model"] for told in life.loads()}
    for told in life.told("Transcribe"):
        name = os.fsdecode(life.ledger.job(told["job"])["path"])
        assert models[told["pid"]] == ("base" if name.startswith("b") else "tiny")
    assert len(life.loads()) <= 4, "a load for each model, and not many more"
    life.drop("last")
    life.until(lambda: life.all_in("last"), "and back again")


# --- suspects ----------------------------------------------------------------------------------------------------------------------


def test_suspects_have_an_engine_of_their_own_while_the_others_go_on(floor: NewFloor) -> None:
    """Of two engines one dies with a file in hand: the file runs alone in a third one, and the two have the rest."""
    life = floor({"slots": 2})
    life.want(plan(2))
    life.until(lambda: life.serve(2), "two serve")
    for name in "abcd":
        life.drop(name, then="hold")
    life.until(lambda: len(life.in_hand()) == 4, "all are in hand")
    for name in "efgh":
        life.drop(name, then="hold")
    life.until(lambda: list(life.states().values()).count("ready") == 4, "others wait")
    os.kill(life.engines()[0].child.pid, signal.SIGSEGV)
    life.until(lambda: life.serve(3) and len(life.in_hand()) == 5, "three serve")
    quarantined = [engine for engine in life.engines() if engine.quarantine]
    assert len(quarantined) == 1 and len(quarantined[0].tasks) == 1
    assert all(len(engine.tasks) == 2 for engine in life.engines() if not engine.quarantine)
    assert [row["attempts"] for row in life.rows().values() if row["id"] in quarantined[0].tasks] == [2]


def test_ten_poisoned_files_among_a_hundred_good_ones(floor: NewFloor) -> None:
    """All good ones are done, with at most one bad attempt each; each poisoned one is failed after exactly three deaths, and its error
    names the signal and the stage."""
    life = floor({"window_s": 0.01})
    life.want(plan(2))
    good = [f"good {number:03}" for number in range(100)]
    poison = [f"poison {number}" for number in range(10)]
    for number, name in enumerate(good):
        life.drop(name, length_s=60, poison=0)
        if number % 10 == 5:
            life.drop(poison[number // 10], length_s=60, poison=1)
    life.until(lambda: life.all_in(*good) and life.all_in(*poison, state="failed"), "all have ended")
    rows = life.rows()
    assert max(rows[name]["attempts"] for name in good) <= 2
    for name in poison:
        assert (rows[name]["attempts"], rows[name]["failure_code"]) == (3, "worker_died")
        assert (life.verbs(name).count("release"), life.verbs(name).count("fail")) == (2, 1)
        assert "killed by SIGSEGV" in rows[name]["failure_what"]
        assert "while it worked on this file at its beginning" in rows[name]["failure_what"]


# --- the operator, and another life ---------------------------------------------------------------------------------------------------


def test_a_running_job_that_is_held_or_cancelled_is_dropped(floor: NewFloor) -> None:
    """Its slot is the next one's; held, it keeps its windows and its attempt, and goes on when it is let go."""
    life = floor({"slots": 2, "window_s": 0.05})
    for name in "ab":
        life.drop(name, length_s=30_000)
    life.until(lambda: life.in_hand() == {"a", "b"}, "both are in hand")
    life.drop("c", then="hold")
    life.drop("d", then="hold")
    jobs = {name: row["id"] for name, row in life.rows().items()}
    life.until(lambda: life.ledger.windows(jobs["a"]), "a window is done")
    desk = Ledger(str(life.home / "state"), epoch="desk")
    desk.hold(jobs["a"], time.time())
    desk.cancel(jobs["b"], time.time())
    life.until(lambda: life.in_hand() == {"c", "d"}, "others have their slots")
    row = life.rows()["a"]
    assert (row["state"], row["held"], row["attempts"]) == ("ready", 1, 0) and life.ledger.windows(jobs["a"])
    desk.unhold(jobs["a"], time.time())
    for name in "cd":
        desk.cancel(life.rows()[name]["id"], time.time())
    desk.close()
    life.until(lambda: life.in_hand() == {"a"} and life.told("Transcribe")[-1]["job"] == jobs["a"], "it goes on")
    assert life.told("Transcribe")[-1]["windows_done"] >= 1


def test_the_next_life_takes_up_everything(floor: NewFloor) -> None:
    """The daemon is killed in the middle: what ran goes on from its last window, what waited waits, no attempt is spent."""
    life = floor({"window_s": 0.05})
    names = [f"{number}" for number in range(12)]
    for name in names:
        life.drop(name, length_s=150)
    life.until(lambda: len(life.in_hand()) == 8, "as many as there are slots")
    life.until(lambda: any(life.ledger.windows(row["id"]) for row in life.rows().values()), "some windows are done")
    life = floor({"window_s": 0.05})
    life.until(lambda: life.all_in(*names), "all are done")
    assert {row["attempts"] for row in life.rows().values()} == {1}
    assert all(life.words(name) == [f"window {number}" for number in range(5)] for name in names)
    assert any(told["windows_done"] for told in life.told("Transcribe"))
