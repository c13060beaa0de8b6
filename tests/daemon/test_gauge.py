"""The gauge, with the true probe process on machines that are scripts: every trouble of a GPU becomes a reading, and a reaction.

A timeline is a script for the fake libnvidia-ml.so.1 (tests/tools/fake_nvml) in which time is set by hand. What is counted is looks of the
probe, never time: the right reading and the right reaction are there with the second look after the trouble began (OPTIMISER.md, goal 9).
XIDs come by a thread of the probe, beside its looks: these have more of them, since looks here are forty times as frequent as in life.
"""

from __future__ import annotations

import asyncio
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from tools import fake_nvml
from tools.fake_nvml import FIRST, SECOND, TWO_CARDS, Machine

from whisperd import child as child_module
from whisperd.dispatcher.gauge import HANGS, STUCK, Gauge
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.reaction import BACK_S, Reactions, Restart, Standing, react
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Reading

PATIENCE_S = 60.0
INTERVAL_S = 0.025
TURN_S = 0.002
SILENT_S = 1.5
LOOKS_MAX = 2
XID_LOOKS = 20
TOOLS = Path(fake_nvml.__file__).parents[1]
UUIDS = (FIRST, SECOND)


# --- the rig -------------------------------------------------------------------------------------------------------------------


class Rig:
    """A gauge on a loop of its own, fake workers on both GPUs, and a machine to torment."""

    def __init__(self, home: Path, library: Path, **options: float) -> None:
        self.machine = Machine(home / "machine", library)
        os.environ.update(self.machine.environment(PYTHONPATH=str(TOOLS), container="podman"))
        self.loop = asyncio.new_event_loop()
        self.ledger = Ledger(str(home), epoch="gauge")
        nursery = Nursery(self.loop, on_end=lambda: None)
        self.nursery = nursery
        self.changes = 0
        options = {"sample_s": INTERVAL_S, "silent_s": SILENT_S, **options}
        self.gauge = Gauge(nursery, self.ledger, on_change=self._changed, module="fake_nvml.probe", **options)
        self.workers = [[subprocess.Popen(["sleep", "3600"]) for _ in range(3)] for _ in UUIDS]
        for gpu, workers in enumerate(self.workers):
            for worker in workers:
                self.machine.employ(gpu, worker.pid, mib=1000, percent=10)
        self.state = Reactions()
        self.now = 0.0  # of the reactions: one second for each look
        self.standings: dict[str, Standing] = {}
        self.restarts: list[Restart] = []
        self.stall_s = 0.0  # the longest that one turn of the loop took
        self.loop.call_soon(self._tick)

    def _changed(self) -> None:
        self.changes += 1

    def _tick(self) -> None:
        self.gauge.tick(time.monotonic())
        self.loop.call_later(0.01, self._tick)

    def turn(self) -> None:
        """One turn of the loop."""
        began = time.monotonic()
        self.loop.run_until_complete(asyncio.sleep(TURN_S))
        self.stall_s = max(self.stall_s, time.monotonic() - began - TURN_S)

    def look(self) -> None:
        """The next look of the probe, and the reaction to it."""
        before = self.gauge.looks
        self.until(lambda: self.gauge.looks > before, react_too=False)
        self._react()

    def until(self, true: Callable[[], bool], *, react_too: bool = True) -> None:
        """Turn the loop until this is so."""
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert time.monotonic() < deadline, f"not within {PATIENCE_S:g} s: {self.gauge.readings} {self.standings}"
            looks = self.gauge.looks
            self.turn()
            if react_too and (self.gauge.looks != looks or any(one.status == "unknown" for one in self.gauge.readings)):
                self._react()

    def _react(self) -> None:
        self.now += 1
        pids = {uuid: [worker.pid for worker in workers] for uuid, workers in zip(UUIDS, self.workers, strict=True)}
        self.state, self.standings, restarts = react(self.state, self.gauge.collect(), pids, self.now)
        self.restarts += restarts

    def set_clock(self, at: float) -> int:
        """Move the machine's time right after a look; returns how many looks of the old time may still come."""
        self.look()
        began = time.monotonic()
        self.machine.clock(at)
        return math.floor((time.monotonic() - began) / INTERVAL_S)

    def reading(self, uuid: str) -> Reading:
        """What is known of a GPU: its own reading, or the one that holds for all."""
        by_gpu = {one.gpu: one for one in self.gauge.readings}
        return by_gpu.get(uuid) or by_gpu.get("") or Reading(gpu=uuid, status="unnamed", what="")

    def healthy(self) -> bool:
        return [(one.gpu, one.status) for one in self.gauge.readings] == [(uuid, "ok") for uuid in UUIDS]

    def begin(self, script: str) -> None:
        """A healthy machine, at 0 s of a new script; nothing is remembered of before."""
        self.machine.clock(0)
        self.machine.script(TWO_CARDS + script)
        self.until(self.healthy)
        self.look()
        self.state, self.standings, self.restarts = Reactions(), {}, []
        self.look()
        assert {uuid: standing.usable for uuid, standing in self.standings.items()} == dict.fromkeys(UUIDS, "ok")

    def everybody_lives(self) -> bool:
        return all(worker.poll() is None for workers in self.workers for worker in workers)

    def close(self) -> None:
        self.gauge.stop()
        self.until(lambda: self.gauge.keeper.child is None, react_too=False)
        self.loop.close()
        self.ledger.close()
        for worker in (worker for workers in self.workers for worker in workers):
            worker.kill()
            worker.wait()
        print(f"{self.gauge.looks} looks; the longest turn of the loop took {1000 * self.stall_s:.0f} ms")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if fake_nvml.compiler() is None:
        pytest.skip("no C compiler: the fake libnvidia-ml.so.1 cannot be built")
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture(scope="module")
def shared(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    """One rig for all timelines that the probe's process survives."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setattr(os, "environ", os.environ.copy())
        rig = Rig(tmp_path_factory.mktemp("shared"), library)
        yield rig
        rig.close()


@pytest.fixture
def new_rig(library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """A rig of its own, for what ends the probe's process."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    made: list[Rig] = []

    def make(**options: float) -> Rig:
        made.append(Rig(tmp_path, library, **options))
        return made[-1]

    yield make
    for rig in made:
        rig.close()


# --- timelines that the probe survives -----------------------------------------------------------------------------------------


class Then(NamedTuple):
    """What is so at a time: status and usability of the two GPUs, what else a reading says, whose workers must begin anew."""

    at: float
    status: tuple[str, str]
    usable: tuple[str, str]
    says: Callable[[Reading, Reading], bool] = lambda first, second: True
    restarts: Sequence[tuple[int, int]] = ()  # GPU and number of its worker
    looks: int = LOOKS_MAX


class Timeline(NamedTuple):
    """A script, and what follows from it. `kernel` are lines of the kernel's log with the time before which they are there."""

    script: str
    then: Sequence[Then]
    kernel: Sequence[tuple[float, str]] = ()


def whole(code: int, status: str, usable: str) -> Timeline:
    """Every call fails from 10 s to 20 s; then all is well again."""
    back = BACK_S + 2 if usable == "lost" else 10  # the tries grow rarer, but not much in a few looks
    return Timeline(
        f"at 10\nfail * {code}\nat 20\nheal",
        [Then(10, (status, status), (usable, usable)), Then(20, ("ok", "ok"), ("ok", "ok"), looks=int(back))],
    )


def one(script: str, status: str, usable: str, says: Callable[[Reading, Reading], bool] = lambda first, second: True) -> Timeline:
    """Something is the matter with the second GPU alone: the first goes on."""
    return Timeline(f"at 10\n{script}", [Then(10, ("ok", status), ("ok", usable), says)])


def board(script: str, says: Callable[[Reading, Reading], bool]) -> Timeline:
    """A figure that is odd or missing, which is no trouble."""
    return one(script, "ok", "ok", says)


def event(code: int, usable: str) -> Timeline:
    """An XID that NVML tells without a process."""
    return Timeline(f"at 10\nxid 1 {code} {{xid}}", [Then(10, ("ok", "ok"), ("ok", usable), looks=XID_LOOKS)])


XID_LINE = "NVRM: Xid (PCI:0000:02:00): {code}, pid={pid}, name=python, Ch 00000008"
BACK_LOOKS = int(BACK_S) + 8

TIMELINES = {
    "driver not loaded": whole(9, "no_driver", "frozen"),
    "driver's library is gone": whole(12, "no_driver", "frozen"),
    "driver updated under us": whole(18, "mismatch", "frozen"),
    "container lost its right": whole(999, "revoked", "unknown"),
    "no permission": whole(4, "unknown", "unknown"),
    "timeout": whole(10, "unknown", "unknown"),
    "interrupts fail": whole(11, "unknown", "unknown"),
    "corrupted inforom": whole(14, "unknown", "unknown"),
    "the operating system refuses": whole(17, "unknown", "unknown"),
    "no memory in the driver": whole(20, "unknown", "unknown"),
    "never open": whole(1, "unknown", "unknown"),
    "everything is lost": whole(15, "lost", "lost"),
    "driver updated, but we are inside": board("fail nvmlInitWithFlags 18\nset 1 power=77000", lambda first, second: second.power_w == 77),
    "closed under us, once": Timeline(
        "at 10\nfail nvmlDeviceGetCount_v2 1\nat 20\nheal",
        [Then(10, ("unknown",) * 2, ("unknown",) * 2), Then(20, ("ok",) * 2, ("ok",) * 2, looks=10)],
    ),
    "no GPU at all any more": Timeline("at 10\ngone 0\ngone 1", [Then(10, ("lost", "lost"), ("lost", "lost"))]),
    "off the bus": one("fail * 15 1", "lost", "lost"),
    "not named any more": one("gone 1", "lost", "lost"),
    "first off the bus": Timeline("at 10\nfail * 15 0", [Then(10, ("lost", "ok"), ("lost", "ok"))]),
    "off the bus and back": Timeline(
        "at 10\nfail * 15 1\nat 20\nheal",
        [Then(10, ("ok", "lost"), ("ok", "lost")), Then(20, ("ok", "ok"), ("ok", "ok"), looks=BACK_LOOKS)],
    ),
    "not named and back": Timeline(
        f"at 10\ngone 1\nat 20\n{TWO_CARDS}",
        [Then(10, ("ok", "lost"), ("ok", "lost")), Then(20, ("ok", "ok"), ("ok", "ok"), looks=BACK_LOOKS)],
    ),
    "reset required": one("fail * 16 1", "reset_required", "drain"),
    "memory row cannot be remapped": one("set 1 remap_failure=1", "reset_required", "drain"),
    "the board asks for a reset": one("set 1 recovery=1", "reset_required", "drain"),
    "the board asks for a reboot": one("set 1 recovery=2", "reset_required", "drain"),
    "the board asks to leave its links": board("set 1 recovery=3 power=77000", lambda first, second: second.power_w == 77),
    "a row will be remapped": board("set 1 remap_pending=1 power=77000", lambda first, second: second.power_w == 77),
    "its right is revoked, one GPU": one("fail nvmlDeviceGetMemoryInfo_v2 999 1\nfail nvmlDeviceGetMemoryInfo 999 1", "revoked", "unknown"),
    "its memory cannot be read": one("fail nvmlDeviceGetMemoryInfo_v2 17 1\nfail nvmlDeviceGetMemoryInfo 17 1", "unknown", "unknown"),
    "memory by the old way": board(
        "fail nvmlDeviceGetMemoryInfo_v2 999 1\nset 1 used=500", lambda first, second: second.vram_used_mib == 3760
    ),
    "memory not told": board(
        "set 1 used=n/a", lambda first, second: second.vram_used_mib is None and "vram_used_mib" in second.unsupported
    ),
    "divided by MIG": board("set 1 mig=1", lambda first, second: second.mig is True and second.utilisation_percent is None),
    "load fails for a moment": board("fail nvmlDeviceGetUtilizationRates 999 1", lambda first, second: second.utilisation_percent is None),
    "heat not told": board("set 1 temp=n/a", lambda first, second: second.temperature_c is None),
    "power not told": board("set 1 power=n/a limit=n/a", lambda first, second: second.power_w is None and second.power_limit_w is None),
    "threshold by margin": board("set 1 slowdown=n/a margin=30", lambda first, second: second.slowdown_c == 70),
    "no threshold": board("set 1 slowdown=n/a margin=n/a", lambda first, second: second.slowdown_c is None),
    "an old driver's throttling": board(
        "fail nvmlDeviceGetCurrentClocksEventReasons 13 1\nset 1 reasons=0x20", lambda first, second: second.throttled == ("thermal",)
    ),
    "hot": board("set 1 temp=92 reasons=0x40", lambda first, second: second.throttled == ("thermal",) and second.temperature_c == 92),
    "power brake": board("set 1 reasons=0x88", lambda first, second: second.throttled == ("hw_slowdown", "power_brake")),
    "power cap": board("set 1 reasons=0x4", lambda first, second: second.throttled == ("power_cap",)),
    "nonsense for load": board("set 1 util=4294967295", lambda first, second: second.utilisation_percent == 100),
    "ghost load": board(f"{TWO_CARDS}set 1 util=100", lambda first, second: second.utilisation_percent == 100),
    "a stranger takes memory": board("proc 1 77 4000 0", lambda first, second: second.vram_used_mib == 7270),
    "a stranger's memory is not told": board(
        "proc 1 77 n/a 0", lambda first, second: any(process.vram_mib is None for process in second.processes or ())
    ),
    "processes not told": board("fail nvmlDeviceGetComputeRunningProcesses_v3 3 1", lambda first, second: second.processes is None),
    "memory leaves and comes": Timeline(
        "at 10\nset 0 used=9000\nat 20\nset 0 used=100",
        [
            Then(10, ("ok", "ok"), ("ok", "ok"), lambda first, second: first.vram_used_mib == 9000 + 420 + 3000),
            Then(20, ("ok", "ok"), ("ok", "ok"), lambda first, second: first.vram_used_mib == 100 + 420 + 3000),
        ],
    ),
    "XID 48": event(48, "drain"),
    "XID 63": event(63, "drain"),
    "XID 64": event(64, "drain"),
    "XID 94": event(94, "drain"),
    "XID 95": event(95, "drain"),
    "XID 119": event(119, "drain"),
    "XID 79, while it still answers": event(79, "lost"),
    "XID 79, then off the bus, then back": Timeline(
        "at 10\nxid 1 79 {xid}\nfail * 15 1\nat 20\nheal",
        [Then(10, ("ok", "lost"), ("ok", "lost")), Then(20, ("ok", "ok"), ("ok", "ok"), looks=BACK_LOOKS)],
    ),
    "XID 31 of a worker of ours": Timeline(
        "at 10\nxid 1 31 {xid}",
        [Then(10, ("ok", "ok"), ("ok", "ok"), restarts=[(1, 0)], looks=XID_LOOKS)],
        kernel=[(10, XID_LINE.format(code=31, pid="{1.0}"))],
    ),
    "XID 13 of somebody else": Timeline(
        "at 10\nxid 1 13 {xid}", [Then(10, ("ok", "ok"), ("ok", "ok"))], kernel=[(10, XID_LINE.format(code=13, pid=1))]
    ),
    "XIDs of three workers": Timeline(
        "at 10\nxid 1 31 {xid}\nat 20\nxid 1 43 {xid}\nat 30\nxid 1 45 {xid}",
        [
            Then(10, ("ok", "ok"), ("ok", "ok"), restarts=[(1, 0)], looks=XID_LOOKS),
            Then(20, ("ok", "ok"), ("ok", "ok"), restarts=[(1, 1)], looks=XID_LOOKS),
            Then(30, ("ok", "ok"), ("ok", "suspect"), restarts=[(1, 2)], looks=XID_LOOKS),
        ],
        kernel=[
            (10, XID_LINE.format(code=31, pid="{1.0}")),
            (20, XID_LINE.format(code=43, pid="{1.1}")),
            (30, XID_LINE.format(code=45, pid="{1.2}")),
        ],
    ),
}


def test_there_are_enough_timelines() -> None:
    """At least forty (OPTIMISER.md, goal 9), and the library has at least 35 functions for them."""
    assert len(TIMELINES) >= 40


@pytest.mark.parametrize("name", TIMELINES)
def test_timeline(shared: Rig, name: str) -> None:
    """Within its looks there are the right reading and the right reaction; no worker was lost; the daemon never called NVML."""
    rig, timeline = shared, TIMELINES[name]
    rig.begin(timeline.script)
    for then in timeline.then:
        for at, line in timeline.kernel:
            if at == then.at:
                rig.machine.kernel_says(_with_pids(line, rig))
        old_looks = rig.set_clock(then.at)
        rig.restarts.clear()
        for _ in range(old_looks + then.looks):
            rig.look()
            if _is_so(rig, then):
                break
        assert _is_so(rig, then), (rig.gauge.readings, rig.standings, rig.restarts)
    assert rig.everybody_lives()
    _nobody_else_called(rig)


def _with_pids(line: str, rig: Rig) -> str:
    for gpu, workers in enumerate(rig.workers):
        for number, worker in enumerate(workers):
            line = line.replace(f"{{{gpu}.{number}}}", str(worker.pid))
    return line


def _is_so(rig: Rig, then: Then) -> bool:
    readings = [rig.reading(uuid) for uuid in UUIDS]
    statuses = tuple(one.status for one in readings)
    usable = tuple(rig.standings[uuid].usable for uuid in UUIDS)
    wanted = {(UUIDS[gpu], rig.workers[gpu][number].pid) for gpu, number in then.restarts}
    right = (statuses, usable, {(one.gpu, one.pid) for one in rig.restarts}) == (then.status, then.usable, wanted)
    return right and then.says(*readings) and all(one.why or one.usable == "ok" for one in rig.standings.values())


def _nobody_else_called(rig: Rig) -> None:
    """Only the probe has NVML in it."""
    assert os.getpid() not in rig.machine.callers()
    with open("/proc/self/maps", encoding="utf-8") as maps:
        assert str(rig.machine.library) not in maps.read()


# --- what ends the probe's process ---------------------------------------------------------------------------------------------

DEADLY = {
    "hangs in a look": "hang nvmlDeviceGetTemperature 3600000",
    "hangs while counting": "hang nvmlDeviceGetCount_v2 3600000",
    "crashes in a look": "crash nvmlDeviceGetUtilizationRates",
    "crashes in the thread for XIDs": "crash nvmlEventSetWait_v2",
    "crashes with the second GPU": "crash nvmlDeviceGetMemoryInfo_v2 1",
}


@pytest.mark.parametrize("name", DEADLY)
def test_the_probe_is_replaced(new_rig: Callable[..., Rig], name: str) -> None:
    """A hang or a crash in NVML makes the readings unknown, never zero; the probe is ended and another takes its place, one at a time."""
    rig = new_rig(boot_s=SILENT_S)
    rig.begin(f"at 10\n{DEADLY[name]}\nat 20\nheal")
    first = rig.gauge.keeper.child
    assert first is not None
    rig.machine.clock(10)
    rig.until(lambda: [one.status for one in rig.gauge.readings] == ["unknown", "unknown"])
    assert [one.gpu for one in rig.gauge.readings] == list(UUIDS)
    assert all(one.vram_used_mib is None and one.utilisation_percent is None for one in rig.gauge.readings)
    assert {uuid: rig.standings[uuid].usable for uuid in UUIDS} == dict.fromkeys(UUIDS, "unknown")
    assert rig.gauge.unknown_since(FIRST) is not None
    assert len(rig.nursery.children) <= 1
    rig.machine.clock(20)
    rig.until(rig.healthy)
    rig.until(lambda: {standing.usable for standing in rig.standings.values()} == {"ok"})
    assert rig.gauge.keeper.child is not None and rig.gauge.keeper.child.pid != first.pid
    assert rig.gauge.unknown_since(FIRST) is None
    assert rig.everybody_lives() and not rig.restarts
    _nobody_else_called(rig)


def test_a_thread_that_hangs_harms_nobody(new_rig: Callable[..., Rig]) -> None:
    """The wait for XIDs hangs for ever: looks go on with the same probe."""
    rig = new_rig()
    rig.begin("at 10\nhang nvmlEventSetWait_v2 3600000\nset 0 temp=77")
    pid = rig.gauge.keeper.child.pid if rig.gauge.keeper.child else 0
    rig.machine.clock(10)
    rig.until(lambda: rig.reading(FIRST).temperature_c == 77)
    for _ in range(20):
        rig.look()
        assert rig.healthy()
    assert rig.gauge.keeper.child is not None and rig.gauge.keeper.child.pid == pid


def test_a_probe_that_does_not_die_is_the_only_one(new_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    """A probe stuck in the kernel ignores even SIGKILL: no other is started beside it until it is gone, and that is said."""
    rig = new_rig(silent_s=0.4)
    rig.begin("at 10\nhang nvmlDeviceGetTemperature 3600000\nat 20\nheal")
    stuck = rig.gauge.keeper.child
    assert stuck is not None
    killpg = os.killpg
    with monkeypatch.context() as kernel:
        kernel.setattr(child_module.os, "killpg", lambda group, number: None)
        rig.machine.clock(10)
        rig.until(lambda: all(one.what == STUCK for one in rig.gauge.readings))
        assert rig.gauge.keeper.child is stuck and list(rig.nursery.children) == [stuck.pid]
        assert {standing.usable for standing in rig.standings.values()} == {"unknown"}
    rig.machine.clock(20)
    killpg(stuck.pid, 9)
    rig.until(rig.healthy)
    assert rig.gauge.keeper.child is not None and rig.gauge.keeper.child.pid != stuck.pid


def test_a_probe_that_hangs_before_its_first_look(new_rig: Callable[..., Rig]) -> None:
    """With no reading ever, the gauge says that the driver does not answer, rather than nothing."""
    rig = new_rig(boot_s=0.5)
    rig.machine.script("hang nvmlInitWithFlags 3600000\n")
    rig.until(lambda: [(one.gpu, one.status) for one in rig.gauge.readings] == [("", "unknown")])
    rig.machine.script(TWO_CARDS)
    rig.until(rig.healthy)


def test_after_an_update_of_the_driver(new_rig: Callable[..., Rig]) -> None:
    """The library is replaced: a new probe finds that it does not fit the kernel's module, is begun anew after a while, finds it does."""
    rig = new_rig(mismatch_look_s=0.3)
    rig.begin("at 10\nfail * 18\nat 20\nheal")
    old = rig.gauge.keeper.child
    rig.machine.clock(10)
    rig.machine.replace_library()
    rig.until(lambda: {standing.usable for standing in rig.standings.values()} == {"frozen"})
    middle = rig.gauge.keeper.child
    rig.until(lambda: rig.gauge.keeper.child not in (None, old, middle))
    rig.machine.clock(20)
    rig.until(rig.healthy)
    rig.until(lambda: {standing.usable for standing in rig.standings.values()} == {"ok"})
    assert rig.everybody_lives()


# --- what is kept --------------------------------------------------------------------------------------------------------------


def test_the_ring_and_the_minutes(new_rig: Callable[..., Rig]) -> None:
    """Every look is in the ring; a full minute is rolled up once, with what the pool told of its workers."""
    rig = new_rig()
    rig.begin("")
    for gpu, workers, audio_s in ((FIRST, 1, 100.0), (FIRST, 3, 160.0), (FIRST, 2, 20.0), (FIRST, 2, 30.0), ("cpu", 1, 5.0)):
        rig.gauge.note(gpu, workers=workers, batch=8, own_mib=1000 * workers, audio_s=audio_s)
    looks = len(rig.gauge.ring(FIRST))
    for _ in range(3):
        rig.look()
    ring = rig.gauge.ring(FIRST)
    assert len(ring) == looks + 3 and all(later.at >= sooner.at for sooner, later in pairwise(ring))
    later = time.time() + 60
    rolled = {minute.gpu: minute for minute in rig.gauge.minutes(later)}
    assert set(rolled) == {FIRST, SECOND, "cpu"}
    first = rolled[FIRST]
    assert (first.workers, first.batch, first.own_max_mib, first.audio_s) == (2.0, 8, 3000, 70.0)
    assert (first.memory_total_mib, first.memory_used_max_mib, first.utilisation_mean_percent) == (24576, 4620, 67.0)
    assert first.at % 60 == 0 and first.at <= later
    assert (rolled["cpu"].samples, rolled["cpu"].memory_used_max_mib, rolled["cpu"].workers) == (0, None, 1.0)
    assert rig.gauge.minutes(later) == ()
    rig.ledger.record_minutes(tuple(rolled.values()))
    assert {minute.gpu: minute for minute in rig.ledger.minutes(later - 120)} == rolled


def test_xids_are_collected_once(new_rig: Callable[..., Rig]) -> None:
    """However many looks came meanwhile, whoever reacts gets each XID exactly once, and is woken for it."""
    rig = new_rig()
    rig.begin("at 10\nxid 0 13 {xid}\nxid 0 43 {xid}")
    changes = rig.changes
    rig.machine.clock(10)
    rig.until(lambda: rig.changes > changes, react_too=False)
    for _ in range(30):
        before = rig.gauge.looks
        rig.until(lambda before=before: rig.gauge.looks > before, react_too=False)
    collected = {reading.gpu: [event.code for event in reading.xids] for reading in rig.gauge.collect()}
    assert collected == {FIRST: [13, 43], SECOND: []}
    assert not any(reading.xids for reading in rig.gauge.collect())


def test_a_loop_that_stood_still_accuses_nobody(new_rig: Callable[..., Rig]) -> None:
    """After the daemon itself was held up for long, a probe that spoke all the while is neither killed nor called unknown."""
    rig = new_rig()
    rig.begin("")
    pid = rig.gauge.keeper.child.pid if rig.gauge.keeper.child else 0
    rig.gauge.tick(time.monotonic() + 3600)
    assert rig.healthy()
    rig.look()
    assert rig.gauge.keeper.child is not None and rig.gauge.keeper.child.pid == pid
    assert HANGS not in {one.what for one in rig.gauge.readings}
