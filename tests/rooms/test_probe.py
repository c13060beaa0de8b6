"""The GPU probe, as the real process over the real wire: without a GPU, and on machines that are scripts (tests/tools/fake_nvml)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from tools import fake_nvml
from tools.fake_nvml import FIRST, SECOND, TWO_CARDS, Machine

from whisperd.child import Child, Life
from whisperd.dispatcher import nvml
from whisperd.dispatcher.probe import Pause
from whisperd.vocabulary import GpuProcess, Reading
from whisperd.wire import ProbeOut, Readings, StartProbe, WireClosed

PATIENCE_S = 60.0
PACKAGE = Path(fake_nvml.__file__).parents[3] / "whisperd"


class Watched:
    """A probe process, and what it says."""

    def __init__(self, environment: dict[str, str] | None = None, *, interval_s: float = 0.02) -> None:
        module = "fake_nvml.probe" if environment else "whisperd.dispatcher.probe"
        tools = str(Path(fake_nvml.__file__).parents[1])
        env = {**environment, "PYTHONPATH": tools} if environment else None
        self.child: Child[Readings] = Child(name="probe", module=module, receives=ProbeOut, now=time.monotonic(), env=env)
        self.child.send(StartProbe(interval_s=interval_s))

    def look(self) -> tuple[Reading, ...]:
        """The next one it tells."""
        while True:
            for frame in self.child.channel.wait(PATIENCE_S):
                return frame.message.readings

    def until(self, right: Callable[[tuple[Reading, ...]], bool]) -> tuple[Reading, ...]:
        """The first look that is as it should be."""
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            readings = self.look()
            if right(readings):
                return readings
        raise AssertionError(f"not seen within {PATIENCE_S:g} s; the last look was {readings}")

    def stop(self) -> str:
        self.child.drain(time.monotonic())
        return self.end()

    def end(self) -> str:
        """How it ends, once it has."""
        try:
            while True:
                self.child.channel.wait(PATIENCE_S)
        except WireClosed:
            pass
        how = self.child.gone(time.monotonic())
        assert self.child.life is Life.GONE
        return how


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if fake_nvml.compiler() is None:
        pytest.skip("no C compiler: the fake libnvidia-ml.so.1 cannot be built")
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(library: Path, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine", library)


@pytest.fixture
def watched(machine: Machine) -> Iterator[Watched]:
    """A probe on the scripted machine; it must end when asked."""
    made = Watched(machine.environment())
    yield made
    if made.child.life is not Life.GONE:
        assert made.stop() == "ended normally"


def test_the_probe_says_plainly_what_it_sees() -> None:
    """Every look gives at least one reading with a sentence; without a GPU it says so, and no figure is given as zero."""
    probe = Watched(interval_s=0.05)
    for look in (probe.look() for _ in range(3)):
        assert look
        for reading in look:
            assert reading.what
            if reading.status != "ok":
                assert reading.vram_total_mib is None and reading.utilisation_percent is None
            if reading.status == "no_driver":
                assert "no GPU" in reading.what
    assert probe.stop() == "ended normally"


def test_every_figure_of_a_card(watched: Watched, machine: Machine) -> None:
    """All that a card tells is in its reading, in our units; what is not used is free."""
    machine.script(TWO_CARDS + "proc 0 4242 3000 20\nset 0 reasons=0x44 mig=0\n")
    first, second = watched.until(lambda look: look[0].vram_used_mib == 4620)
    assert first == Reading(
        gpu=FIRST,
        status="ok",
        what="NVIDIA GeForce RTX 4090 (driver 570.11)",
        name="NVIDIA GeForce RTX 4090",
        driver="570.11",
        vram_total_mib=24576,
        vram_used_mib=1200 + 420 + 3000,
        utilisation_percent=57,
        temperature_c=61,
        slowdown_c=90,
        power_w=250,
        power_limit_w=450,
        throttled=("thermal", "power_cap"),
        mig=False,
        mps=first.mps,
        processes=(GpuProcess(pid=4242, vram_mib=3000),),
    )
    assert (second.gpu, second.vram_used_mib, second.processes) == (SECOND, 270, ())


class Poor(NamedTuple):
    """A card that does not tell all: the lines of its script, what is unknown then, and what is known to stay so."""

    script: str
    unknown: set[str]
    unsupported: set[str]


HEAT = {"temperature_c", "slowdown_c", "power_w", "power_limit_w"}
MEASURES = HEAT | {"vram_total_mib", "vram_used_mib", "utilisation_percent", "processes"}
POOR = {
    "a laptop": Poor(
        "set 1 util=n/a temp=n/a power=n/a limit=n/a slowdown=n/a margin=n/a reasons=n/a",
        HEAT | {"utilisation_percent"},
        HEAT | {"utilisation_percent", "throttled"},
    ),
    "shared memory": Poor("set 1 used=n/a", {"vram_total_mib", "vram_used_mib"}, {"vram_total_mib", "vram_used_mib"}),
    "no process list": Poor("fail nvmlDeviceGetComputeRunningProcesses_v3 3 1", {"processes"}, {"processes"}),
    "no right to the processes": Poor("fail nvmlDeviceGetComputeRunningProcesses_v3 4 1", {"processes"}, {"processes"}),
    "an old driver": Poor("fail nvmlDeviceGetMemoryInfo_v2 13 1\nfail nvmlDeviceGetCurrentClocksEventReasons 13 1", set(), set()),
    "a hiccup": Poor(
        "fail nvmlDeviceGetTemperature 999 1\nfail nvmlDeviceGetUtilizationRates 10 1", {"temperature_c", "utilisation_percent"}, set()
    ),
    "divided by MIG": Poor("set 1 mig=1", {"utilisation_percent"}, {"utilisation_percent"}),
}


@pytest.mark.parametrize("name", POOR)
def test_unknown_is_never_zero(watched: Watched, machine: Machine, name: str) -> None:
    """What a card does not tell is None; what it will never tell is named, and what only failed this time is not."""
    poor = POOR[name]
    machine.script(TWO_CARDS + poor.script + "\nset 1 fan=77\n")
    wanted = {figure: figure in poor.unknown for figure in MEASURES}
    seen = watched.until(lambda look: {figure: getattr(look[1], figure) is None for figure in MEASURES} == wanted)
    assert seen[1].status == "ok"
    assert set(seen[1].unsupported) == poor.unsupported
    assert seen[0].unsupported == ()


def test_the_slowdown_threshold_of_newer_boards(watched: Watched, machine: Machine) -> None:
    """A board that only tells the margin to its threshold has a threshold all the same."""
    machine.script(TWO_CARDS + "set 0 slowdown=n/a margin=20\n")
    assert watched.until(lambda look: look[0].slowdown_c != 90)[0].slowdown_c == 81


def test_events_that_are_not_told(machine: Machine, tmp_path: Path) -> None:
    """Without NVML's events the kernel's log tells XIDs; without both, that is said."""
    machine.script(TWO_CARDS + "set 1 events=n/a\n")
    deaf = Watched({**machine.environment(), "FAKE_KERNEL_LOG": str(tmp_path / "none")})
    assert [reading.unsupported for reading in deaf.look()] == [(), ("xids",)]
    assert deaf.stop() == "ended normally"
    reads = Watched(machine.environment())
    assert [reading.unsupported for reading in reads.look()] == [(), ()]
    machine.kernel_says("NVRM: Xid (PCI:0000:02:00): 31, pid=4242, name=python, Ch 00000008")
    seen = reads.until(lambda look: bool(look[1].xids))
    assert [(event.code, event.pid) for event in seen[1].xids] == [(31, 4242)]
    assert not any(reading.xids for reading in reads.look())
    assert reads.stop() == "ended normally"


def test_mps_is_seen(machine: Machine, tmp_path: Path) -> None:
    """A server of MPS on the machine is found by its name among the processes."""
    server = tmp_path / "nvidia-cuda-mps-server"
    server.write_bytes(Path("/bin/sleep").resolve().read_bytes())
    server.chmod(0o755)
    with subprocess.Popen([server, "600"]) as process:
        probe = Watched(machine.environment())
        try:
            assert probe.until(lambda look: look[0].mps is True)
        finally:
            process.kill()
        process.wait()
        assert probe.until(lambda look: look[0].mps is not True)
        assert probe.stop() == "ended normally"


def test_clients_of_mps_are_processes_too(watched: Watched, machine: Machine) -> None:
    """NVML lists them apart; where the server is hidden from us, its clients betray it."""
    machine.script(TWO_CARDS + "set 1 mps=1\nproc 1 4242 2000 5\n")
    seen = watched.until(lambda look: look[1].mps is True)
    assert seen[1].processes == (GpuProcess(pid=4242, vram_mib=2000),)


def test_it_ends_when_the_library_was_replaced(watched: Watched, machine: Machine) -> None:
    """A package upgrade puts another library in its place: only a new process can load that one, so this one ends by itself."""
    watched.look()
    machine.replace_library()
    assert watched.end() == "ended normally"


def test_it_ends_although_its_thread_hangs(watched: Watched, machine: Machine) -> None:
    """The thread that waits for XIDs hangs in the driver: looks go on, and the process still ends when asked."""
    watched.look()
    machine.script(TWO_CARDS + "hang nvmlEventSetWait_v2 600000\nset 0 temp=70\n")
    watched.until(lambda look: look[0].temperature_c == 70)
    watched.until(lambda look: "nvmlEventSetWait_v2" in machine.called())
    for _ in range(20):
        assert watched.look()[0].status == "ok"
    assert re.fullmatch("ended with status 1|ended normally", watched.stop())


def test_ten_thousand_looks_leak_nothing(machine: Machine) -> None:
    """Descriptors, threads and memory are as many after 10,000 looks as after 1,000 (500 of them with a lost GPU)."""
    probe = Watched(machine.environment(FAKE_NVML_LOG="/dev/null"), interval_s=0.0)

    def held() -> tuple[int, int, int]:
        """Descriptors, threads, KiB; the least of several counts: a look has some files open while it lasts."""
        proc, counts = f"/proc/{probe.child.pid}", []
        for _ in range(50):
            with open(f"{proc}/status") as status:
                fields = dict(line.split(":", 1) for line in status)
            counts.append((len(os.listdir(f"{proc}/fd")), int(fields["Threads"]), int(fields["VmRSS"].split()[0])))
            assert probe.look()
        fds, threads, kib = zip(*counts, strict=True)
        return min(fds), min(threads), min(kib)

    before = (0, 0, 0)
    for number in range(10_000):
        if number == 1_000:
            before = held()
        if number in (3_000, 3_500):
            machine.script(TWO_CARDS + ("fail * 15 1\n" if number == 3_000 else ""))
        assert probe.look()
    machine.script(TWO_CARDS)
    probe.until(lambda look: all(reading.status == "ok" for reading in look))
    after = held()
    assert after[:2] == before[:2]
    assert after[2] <= before[2] * 1.05 + 512, f"resident memory grew from {before[2]} to {after[2]} KiB"
    assert probe.stop() == "ended normally"


def test_only_the_probe_imports_the_bindings() -> None:
    """NVML can hang and crash: nobody else in the package imports pynvml, in any way."""
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if re.search(r"^\s*(import|from)\s+pynvml|import_module\(.pynvml", path.read_text("utf-8"), re.M)
    }
    assert found == {"dispatcher/probe.py"}
    loaded = "import sys, whisperd.dispatcher.probe, whisperd.dispatcher.gauge, whisperd.dispatcher.nvml; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], check=False).returncode == 0


def test_tries_grow_rarer() -> None:
    """1 s, 2 s, 4 s … 5 minutes between tries, counted in looks; once it worked, from the beginning."""
    pause = Pause(most=300)
    gaps = []
    for _ in range(11):
        pause.grow()
        looks = 1
        while not pause.over():
            looks += 1
        gaps.append(looks)
    assert gaps == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    pause.end()
    pause.grow()
    assert pause.over()


def test_every_error_has_its_meaning() -> None:
    """OPTIMISER.md §2: each code of NVML leads to a status and a sentence with what to do; 999 is a revoked right in containers only."""
    meanings = {4: "unknown", 9: "no_driver", 12: "no_driver", 15: "lost", 16: "reset_required", 17: "unknown", 18: "mismatch", 28: "lost"}
    for code, status in {**meanings, 999: "unknown"}.items():
        assert nvml.trouble(code, "said", in_container=False)[0] == status
    assert nvml.trouble(999, "said", in_container=True)[0] == "revoked"
    assert "recreate the container" in nvml.trouble(999, "said", in_container=True)[1]
    assert "reboot" in nvml.trouble(18, "said", in_container=True)[1]
    assert "DeviceAllow" in nvml.trouble(4, "said", in_container=False)[1]
