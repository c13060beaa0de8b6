"""The fake libnvidia-ml.so.1 is worth trusting: the real nvidia-ml-py and two independent programs see on it what its script says."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tools import fake_nvml
from tools.fake_nvml import FIRST, SECOND, TWO_CARDS, Machine

TELL = """
import json, sys
import pynvml as N
def tell(**what):
    print(json.dumps(what), flush=True)
def code_of(function, *args):
    try:
        function(*args)
    except N.NVMLError as error:
        return error.value
    return 0
"""
OPEN = TELL + "N.nvmlInit()\nh, h1 = (N.nvmlDeviceGetHandleByIndex(i) for i in range(2))\n"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if fake_nvml.compiler() is None:
        pytest.skip("no C compiler: the fake libnvidia-ml.so.1 cannot be built")
    return fake_nvml.build(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def machine(library: Path, tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine", library)


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A living process, for the fake to follow."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


class Client:
    """A Python process with nvidia-ml-py, told line by line what to evaluate."""

    def __init__(self, machine: Machine) -> None:
        loop = OPEN + "tell(open=True)\nfor line in sys.stdin:\n    print(json.dumps(eval(line)), flush=True)\n"
        self._process = subprocess.Popen(
            [sys.executable, "-c", loop],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **machine.environment()},
            text=True,
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"open": True}

    def ask(self, expression: str) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(expression + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def client(machine: Machine) -> Iterator[Client]:
    made = Client(machine)
    yield made
    made.close()


def test_it_has_more_functions_than_anybody_here_calls(library: Path) -> None:
    """At least 35 functions (OPTIMISER.md, goal 9), and every one that the probe names is among them."""
    has = fake_nvml.functions(library)
    assert len(has) >= 35
    source = (Path(fake_nvml.__file__).parents[3] / "whisperd" / "dispatcher" / "nvml.py").read_text()
    named = set(re.findall(r"nvmlDevice\w+", source))
    versions = ("", "_v2", "_v3")
    assert named
    assert all(any(name + version in has for version in versions) for name in named)


def test_what_a_card_is(client: Client) -> None:
    """Count, name, UUID, bus, driver and the handles by each of them are those of the script."""
    assert client.ask("N.nvmlSystemGetDriverVersion()") == "570.11"
    assert client.ask("N.nvmlDeviceGetCount()") == 2
    assert client.ask("[N.nvmlDeviceGetName(h), N.nvmlDeviceGetUUID(h1)]") == ["NVIDIA GeForce RTX 4090", SECOND]
    assert client.ask("N.nvmlDeviceGetPciInfo(h1).busId") == "00000000:02:00.0"
    assert client.ask(f"N.nvmlDeviceGetIndex(N.nvmlDeviceGetHandleByUUID('{SECOND}'))") == 1
    assert client.ask("N.nvmlDeviceGetIndex(N.nvmlDeviceGetHandleByPciBusId(b'00000000:02:00.0'))") == 1
    assert client.ask("code_of(N.nvmlDeviceGetHandleByUUID, 'GPU-none')") == 6
    assert client.ask("code_of(N.nvmlDeviceGetHandleByIndex, 7)") == 2


def test_memory_in_both_versions(client: Client) -> None:
    """Version 1 counts what the driver keeps as used, version 2 does not; what is free is the same in both."""
    v1 = client.ask("[x >> 20 for x in (lambda m: (m.total, m.used, m.free))(N.nvmlDeviceGetMemoryInfo(h))]")
    v2 = client.ask(
        "[x >> 20 for x in (lambda m: (m.total, m.used, m.free, m.reserved))(N.nvmlDeviceGetMemoryInfo(h, version=N.nvmlMemory_v2))]"
    )
    assert v1 == [24576, 1620, 22956]
    assert v2 == [24576, 1200, 22956, 420]


def test_load_heat_power_and_clocks(client: Client, machine: Machine) -> None:
    """Figures are those of the script, in the units of nvml.h, and by both names where a function was renamed."""
    assert client.ask("(lambda u: [u.gpu, u.memory])(N.nvmlDeviceGetUtilizationRates(h))") == [37, 12]
    assert client.ask("[N.nvmlDeviceGetTemperature(h, 0), N.nvmlDeviceGetTemperatureThreshold(h, 1)]") == [61, 90]
    assert client.ask("[N.nvmlDeviceGetPowerUsage(h), N.nvmlDeviceGetEnforcedPowerLimit(h)]") == [250000, 450000]
    machine.script(TWO_CARDS + "set 0 reasons=0x40 encoder=3 mig=1 util=250\n")
    assert client.ask("[N.nvmlDeviceGetCurrentClocksEventReasons(h), N.nvmlDeviceGetCurrentClocksThrottleReasons(h)]") == [64, 64]
    assert client.ask("N.nvmlDeviceGetEncoderUtilization(h)")[0] == 3
    assert client.ask("[N.nvmlDeviceGetMigMode(h)[0], code_of(N.nvmlDeviceGetUtilizationRates, h)]") == [1, 3]
    assert client.ask("code_of(N.nvmlDeviceGetSamples, h, N.NVML_GPU_UTILIZATION_SAMPLES, 0)") == 3
    machine.script(TWO_CARDS + "set 0 util=250\n")
    assert client.ask("N.nvmlDeviceGetUtilizationRates(h).gpu") == 250, "nonsense is passed on as it is"


def test_what_is_not_supported_says_so(client: Client, machine: Machine) -> None:
    """A figure set to "n/a" is answered NOT_SUPPORTED by the functions that tell it, and by no other."""
    machine.script(TWO_CARDS + "set 1 temp=n/a power=n/a used=n/a reasons=n/a remap_failure=n/a\n")
    for name, arguments in (
        ("nvmlDeviceGetTemperature", ", 0"),
        ("nvmlDeviceGetPowerUsage", ""),
        ("nvmlDeviceGetMemoryInfo", ""),
        ("nvmlDeviceGetRemappedRows", ""),
        ("nvmlDeviceGetCurrentClocksEventReasons", ""),
    ):
        assert client.ask(f"code_of(N.{name}, h1{arguments})") == 3
        assert client.ask(f"code_of(N.{name}, h{arguments})") == 0


def test_the_clock_and_the_file_move_the_script(client: Client, machine: Machine) -> None:
    """Lines come into force at their time, not before, and a script that was replaced is read again."""
    machine.script(TWO_CARDS + "at 10\nset 0 temp=92\nat 20\nproc 0 777 15000 60\n")
    temperature = "N.nvmlDeviceGetTemperature(h, 0)"
    assert client.ask(temperature) == 61
    machine.clock(10)
    assert client.ask(temperature) == 92
    assert client.ask("N.nvmlDeviceGetMemoryInfo(h).used >> 20") == 1620
    machine.clock(20)
    assert client.ask("N.nvmlDeviceGetMemoryInfo(h).used >> 20") == 16620
    assert client.ask("[[p.pid, p.usedGpuMemory >> 20] for p in N.nvmlDeviceGetComputeRunningProcesses(h)]") == [[777, 15000]]
    assert client.ask("[[s.pid, s.smUtil] for s in N.nvmlDeviceGetProcessUtilization(h, 0)]") == [[777, 60]]
    assert client.ask("(lambda s: [s[0], len(s[1]), s[1][-1].sampleValue.uiVal])(N.nvmlDeviceGetSamples(h, 1, 0))") == [1, 100, 97]
    machine.clock(0)
    assert client.ask(temperature) == 61
    machine.script(TWO_CARDS + "set 0 temp=44\n")
    assert client.ask(temperature) == 44


def test_memory_and_load_follow_living_workers(client: Client, machine: Machine, worker: subprocess.Popen[bytes]) -> None:
    """A fake worker holds memory and keeps the GPU busy until it dies; what is above the size of the board is cut."""
    seen = "[N.nvmlDeviceGetMemoryInfo(h, version=N.nvmlMemory_v2).used >> 20, N.nvmlDeviceGetUtilizationRates(h).gpu]"
    machine.employ(0, worker.pid, mib=3000, percent=25)
    assert client.ask(seen) == [4200, 62]
    machine.employ(0, worker.pid, mib=99_000, percent=99)
    assert client.ask(seen) == [24576 - 420, 100]
    worker.kill()
    worker.wait()
    assert client.ask(seen) == [1200, 37]
    assert client.ask("N.nvmlDeviceGetComputeRunningProcesses(h)") == []


def test_a_process_of_which_the_driver_does_not_tell_the_memory(client: Client, machine: Machine) -> None:
    """NOT_AVAILABLE reaches Python as None, not as a huge number or as zero."""
    machine.script(TWO_CARDS + "proc 1 4242 n/a 5\n")
    assert client.ask("[[p.pid, p.usedGpuMemory] for p in N.nvmlDeviceGetComputeRunningProcesses(h1)]") == [[4242, None]]


def test_calls_fail_as_told(client: Client, machine: Machine) -> None:
    """By function, by GPU, all of them, and no more once healed."""
    memory, memory_1 = "code_of(N.nvmlDeviceGetMemoryInfo, h)", "code_of(N.nvmlDeviceGetMemoryInfo, h1)"
    machine.script(TWO_CARDS + "fail nvmlDeviceGetMemoryInfo 999 1\n")
    assert [client.ask(memory), client.ask(memory_1), client.ask("code_of(N.nvmlDeviceGetName, h1)")] == [0, 999, 0]
    machine.script(TWO_CARDS + "fail * 15 1\n")
    assert [client.ask(memory), client.ask(memory_1), client.ask("code_of(N.nvmlDeviceGetHandleByIndex, 1)")] == [0, 15, 15]
    machine.script(TWO_CARDS + "fail * 999\nheal\n")
    assert client.ask(memory) == 0


def test_a_gpu_that_went_is_lost_until_the_library_is_opened_anew(client: Client, machine: Machine) -> None:
    """Who has it open keeps the count of then and hears GPU_IS_LOST, also when it is back; who opens it finds what is there."""
    memory, memory_1 = "code_of(N.nvmlDeviceGetMemoryInfo, h)", "code_of(N.nvmlDeviceGetMemoryInfo, h1)"
    count = "N.nvmlInit(); tell(count=N.nvmlDeviceGetCount())"
    machine.script(TWO_CARDS + "gone 1\n")
    assert [client.ask("N.nvmlDeviceGetCount()"), client.ask(memory_1), client.ask(memory)] == [2, 15, 0]
    assert machine.python(TELL + count).stdout.strip() == '{"count": 1}'
    machine.script(TWO_CARDS)
    assert client.ask(memory_1) == 15
    assert machine.python(TELL + count).stdout.strip() == '{"count": 2}'
    assert client.ask("[N.nvmlShutdown(), N.nvmlInit()]") == [None, None]
    assert client.ask(f"code_of(N.nvmlDeviceGetMemoryInfo, N.nvmlDeviceGetHandleByUUID('{SECOND}'))") == 0


def test_a_live_handle_outlives_a_driver_update(client: Client, machine: Machine) -> None:
    """Mismatch meets new processes only: who is inside goes on."""
    machine.script(TWO_CARDS + "fail nvmlInitWithFlags 18\n")
    assert client.ask("N.nvmlDeviceGetTemperature(h, 0)") == 61
    assert machine.python(TELL + "tell(code=code_of(N.nvmlInit))").stdout.strip() == '{"code": 18}'


def test_it_crashes_and_hangs_as_told(machine: Machine) -> None:
    """A crash is a real SIGSEGV; a hang lasts as long as told and holds up no other thread's calls."""
    machine.script(TWO_CARDS + "crash nvmlDeviceGetUtilizationRates\n")
    assert machine.python(OPEN + "N.nvmlDeviceGetUtilizationRates(h)").returncode == -signal.SIGSEGV
    machine.script(TWO_CARDS + "hang nvmlDeviceGetTemperature 400\n")
    code = """
import threading, time
began = time.monotonic()
hung = threading.Thread(target=lambda: N.nvmlDeviceGetTemperature(h, 0)); hung.start()
N.nvmlDeviceGetPowerUsage(h)
free_while_hung = hung.is_alive()
hung.join()
tell(free_while_hung=free_while_hung, took=time.monotonic() - began)
"""
    told = json.loads(machine.python(OPEN + code).stdout)
    assert told["free_while_hung"] and told["took"] >= 0.4


def test_an_xid_is_told_once_to_who_was_registered(client: Client, machine: Machine) -> None:
    """An event that was there before nobody hears; a new one comes once, with its GPU; then the wait runs out of time."""
    machine.script(TWO_CARDS + "xid 0 13 {xid}\n")
    assert client.ask("globals().update(es=N.nvmlEventSetCreate())") is None
    assert client.ask("N.nvmlDeviceRegisterEvents(h1, N.nvmlEventTypeXidCriticalError, es)") is None
    wait = "(lambda e: [N.nvmlDeviceGetUUID(e.device), e.eventType, e.eventData])(N.nvmlEventSetWait_v2(es, 5000))"
    machine.script(TWO_CARDS + "xid 0 31 {xid}\nxid 1 79 {xid}\n")
    assert client.ask(wait) == [SECOND, 8, 79]
    assert client.ask("code_of(N.nvmlEventSetWait_v2, es, 50)") == 10
    machine.script(TWO_CARDS + "set 1 events=n/a\n")
    assert client.ask("code_of(N.nvmlDeviceRegisterEvents, h1, N.nvmlEventTypeXidCriticalError, es)") == 3


def test_nothing_works_before_it_was_opened(machine: Machine) -> None:
    """A call before init is refused as the real library refuses it."""
    assert machine.python(TELL + "tell(code=code_of(N.nvmlDeviceGetCount))").stdout.strip() == '{"code": 1}'
    code = "N.nvmlInit(); N.nvmlShutdown(); tell(code=code_of(N.nvmlDeviceGetCount))"
    assert machine.python(TELL + code).stdout.strip() == '{"code": 1}'


def test_a_slip_in_a_script_is_no_silent_success(machine: Machine) -> None:
    """An unknown word ends the process: a fault that was never injected would prove nothing."""
    machine.script(TWO_CARDS + "set 0 tmep=90\n")
    assert machine.python(OPEN).returncode == -signal.SIGABRT


def test_every_call_is_logged_with_its_process(client: Client, machine: Machine) -> None:
    """The log tells who called: that is how tests know that the daemon itself never did."""
    client.ask("N.nvmlDeviceGetCount()")
    assert len(machine.callers()) == 1
    assert "nvmlDeviceGetCount_v2" in machine.called()


# --- two programs that know nothing of us ---


def _installed(name: str) -> None:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed (it comes with the test extra)")


def test_gpustat_shows_the_cards(machine: Machine, worker: subprocess.Popen[bytes]) -> None:
    """gpustat, an independent program, reads names, memory, heat, load and processes as scripted."""
    _installed("gpustat")
    machine.employ(1, worker.pid, mib=2000, percent=40)
    done = machine.python("import sys; from gpustat.__main__ import main; sys.argv[1:] = ['--json']; main()")
    shown = {gpu["uuid"]: gpu for gpu in json.loads(done.stdout)["gpus"]}
    first, second = shown[FIRST], shown[SECOND]
    assert (first["name"], first["temperature.gpu"], first["utilization.gpu"]) == ("NVIDIA GeForce RTX 4090", 61, 37)
    assert (first["memory.total"], first["memory.used"]) == (24576, 1200)
    assert (first["power.draw"], first["enforced.power.limit"], first["processes"]) == (250, 450, [])
    assert (second["utilization.gpu"], second["memory.used"]) == (40, 2010)
    assert [(process["pid"], process["gpu_memory_usage"]) for process in second["processes"]] == [(worker.pid, 2000)]


def test_nvitop_shows_the_cards(machine: Machine, worker: subprocess.Popen[bytes]) -> None:
    """nvitop's own device model, and the page that it draws, show the same."""
    _installed("nvitop")
    machine.employ(0, worker.pid, mib=3000, percent=25)
    code = """
import json, sys
from nvitop import Device
print(json.dumps([[d.uuid(), d.name(), d.memory_total() >> 20, d.memory_used() >> 20, d.temperature(), d.gpu_utilization(),
    [[p.pid, p.gpu_memory() >> 20] for p in d.processes().values()]] for d in Device.all()]))
"""
    done = machine.python(code)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [
        [FIRST, "NVIDIA GeForce RTX 4090", 24576, 4200, 61, 62, [[worker.pid, 3000]]],
        [SECOND, "NVIDIA GeForce RTX 3070", 8192, 10, 40, 0, []],
    ]
    page = machine.python("import sys; from nvitop.cli import main; sys.argv[1:] = ['-1', '--ascii']; sys.exit(main())")
    assert page.returncode == 0, page.stderr
    for shown in ("RTX 4090", "RTX 3070", "4200MiB / 24.00GiB", "61C", "250W / 450W", str(worker.pid)):
        assert shown in page.stdout
