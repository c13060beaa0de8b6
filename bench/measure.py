"""measure: what a command costs: CPU-seconds of its whole process tree, wall time, peak memory; and whether that keeps a bar.

Owns: `run_tree` (one command), `alternated` (several commands, A B A B …, so that a busy moment falls on all), `Bar` (figure, limit,
verdict) and `Report` (printed as a table, saved as JSON with machine, versions, command and date).
The CPU time is the kernel's own accounting of every reaped descendant (this process adopts orphans, so none is missed).
Fails with `Failed` when a command does: a figure of a run that went wrong is no figure.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import importlib.metadata
import json
import os
import platform
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOME = os.path.join(ROOT, "build", "bench")
RESULTS = os.path.join(ROOT, "docs", "performance")
MEMORY_EVERY_S = 0.1
PR_SET_CHILD_SUBREAPER = 36
PACKAGES = ("whisperd", "faster-whisper", "ctranslate2", "torch", "onnxruntime", "av", "numpy")


class Failed(Exception):
    """A command that was measured did not end well."""


class Cost(NamedTuple):
    """What one run took. `said` is the JSON object on the last line of its standard output, or an empty one."""

    cpu_s: float
    wall_s: float
    peak_mib: float
    said: dict[str, Any]


# --- one run -------------------------------------------------------------------------------------------------------------------


def run_tree(command: Sequence[str], *, env: dict[str, str] | None = None, cwd: str = ROOT, timeout_s: float = 1800.0) -> Cost:
    """Run a command to the end of all its descendants. Raises Failed."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    before = _reaped_cpu_s()
    began = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environment(env or {}), cwd=cwd)
        watch = MemoryWatch(process.pid)
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed(f"{shlex.join(command[:4])} … is not over within {timeout_s:g} s") from None
        finally:
            watch.stop()
        wall_s = time.monotonic() - began
        _reap_orphans()
        said = _tail(out, 1 << 20)
        if code != 0:
            raise Failed(f"{shlex.join(command[:4])} … ended with {code}: {_tail(err, 3000).strip()}")
    return Cost(round(_reaped_cpu_s() - before, 3), round(wall_s, 3), watch.peak_mib, _last_object(said))


def environment(extra: dict[str, str]) -> dict[str, str]:
    """One thread for every numeric library unless told otherwise, no telemetry, no settings of an installed whisperd."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WHISPERD_")}
    quiet = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    return {**kept, **quiet, "PYTHONPATH": ROOT, **extra}


def _reaped_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _reap_orphans() -> None:
    """Wait for descendants that outlived their parent."""
    try:
        while True:
            os.waitpid(-1, 0)
    except ChildProcessError:
        pass


def _tail(file: Any, size: int) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - size))
    return bytes(file.read()).decode("utf-8", "replace")


def _last_object(text: str) -> dict[str, Any]:
    last = text.strip().rpartition("\n")[2]
    return dict(json.loads(last)) if last.startswith("{") else {}


def cpu_s(pid: int) -> float:
    """CPU time of a living process, to the nanosecond; 0 when it is gone."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # the kernel's clock id for the CPU time of process `pid`
    except (OSError, OverflowError):
        return 0.0


class MemoryWatch:
    """The peak of the memory of a process tree: the sum of its proportional set sizes, sampled."""

    def __init__(self, pid: int) -> None:
        self.peak_mib = 0.0
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(MEMORY_EVERY_S):
            self.peak_mib = max(self.peak_mib, round(sum(map(_proportional_kib, descendants(self._pid))) / 1024, 1))


def descendants(pid: int) -> list[int]:
    """A process and everything below it."""
    found = [pid]
    for parent in found:
        try:
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children", encoding="ascii") as file:
                    found += map(int, file.read().split())
        except OSError:  # it has ended meanwhile
            continue
    return found


def _proportional_kib(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup", encoding="ascii") as file:
            return next((int(line.split()[1]) for line in file if line.startswith("Pss:")), 0)
    except OSError:
        return 0


# --- several runs --------------------------------------------------------------------------------------------------------------


def alternated(commands: dict[str, Callable[[], Cost]], runs: int) -> dict[str, list[Cost]]:
    """Each command once, then each again, …: what else the machine does falls on all alike."""
    found: dict[str, list[Cost]] = {name: [] for name in commands}
    for number in range(runs):
        for name, command in commands.items():
            cost = command()
            found[name].append(cost)
            print(f"  run {number + 1}/{runs}  {name:<28} {told(cost.cpu_s, cost.wall_s, cost.peak_mib)}", flush=True)
    return found


def told(cpu_s: float, wall_s: float, peak_mib: float) -> str:
    return f"cpu {cpu_s:8.2f} s  wall {wall_s:8.2f} s  {peak_mib:7.0f} MiB"


def median(costs: Sequence[Cost], what: Callable[[Cost], float] = lambda cost: cost.cpu_s) -> float:
    return statistics.median(what(cost) for cost in costs)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * round(share * 1000) // 1000) - 1)]


# --- what it means -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """One figure against its limit. `at_most` is False where more is better; `limit` None means told, not judged."""

    name: str
    figure: float
    limit: float | None
    unit: str = "×"
    at_most: bool = True

    @property
    def kept(self) -> bool | None:
        if self.limit is None:
            return None
        return self.figure <= self.limit if self.at_most else self.figure >= self.limit

    @property
    def verdict(self) -> str:
        return {True: "kept", False: "missed", None: ""}[self.kept]

    @property
    def wanted(self) -> str:
        return "" if self.limit is None else f"{'≤' if self.at_most else '≥'} {self.limit:g} {self.unit}"


@dataclass
class Report:
    """All figures of one script."""

    script: str
    title: str
    bars: list[Bar] = field(default_factory=list)
    runs: dict[str, list[Cost]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def show(self) -> None:
        machine = machine_of()
        print(f"\n{self.title}")
        print(f"{machine['cpu']}, {machine['cores']} cores, {machine['flags'] or 'no vector instructions'}; {machine['date']}")
        for name, costs in self.runs.items():
            medians = [median(costs), median(costs, lambda cost: cost.wall_s), median(costs, lambda cost: cost.peak_mib)]
            print(f"  {name:<30} {told(*medians)} (medians of {len(costs)})")
        for bar in self.bars:
            print(f"  {bar.name:<58} {bar.figure:9.3f} {bar.unit:<4} {bar.wanted:<12} {bar.verdict}")
        for note in self.notes:
            print(f"  {note}")

    def document(self) -> dict[str, Any]:
        """As JSON; what a run said of itself stays out, except in `details`."""
        return {
            "schema": "whisperd.bench/1",
            "script": self.script,
            "title": self.title,
            "command": shlex.join(["python", "-m", f"bench.{self.script}", *without_places(sys.argv[1:])]),
            "machine": machine_of(),
            "bars": [{**asdict(bar), "verdict": bar.verdict} for bar in self.bars],
            "runs": {name: [[cost.cpu_s, cost.wall_s, cost.peak_mib] for cost in costs] for name, costs in self.runs.items()},
            "details": self.details,
            "notes": self.notes,
        }

    def finish(self, args: argparse.Namespace) -> int:
        """Print, save where asked. 0 when every bar is kept."""
        self.show()
        if args.save:
            os.makedirs(args.results, exist_ok=True)
            with open(os.path.join(args.results, f"{args.save}.json"), "w", encoding="utf-8") as file:
                json.dump(self.document(), file, indent=1, ensure_ascii=False)
                file.write("\n")
        return int(any(bar.kept is False for bar in self.bars))


def without_places(words: Sequence[str]) -> list[str]:
    """A command line without what is about this machine alone."""
    kept, places = list(words), ("--home", "--peers", "--results")
    for number in reversed(range(len(kept))):
        if kept[number] in places:
            del kept[number : number + 2]
    return kept


def machine_of() -> dict[str, Any]:
    """CPU, cores, the instructions that matter, memory, versions, date."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in file)}
    flags = facts.get("flags", "").split()
    return {
        "cpu": facts.get("model name", platform.machine()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "flags": " ".join(flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8") if flag in flags),
        "kernel": platform.release().partition("-")[0],
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "date": datetime.date.today().isoformat(),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def ending(main: Callable[[], int]) -> int:
    """The exit status of a script: 0 every bar kept, 1 one missed, 2 with a sentence when something did not run."""
    try:
        return main()
    except Failed as error:
        print(f"cannot measure: {error}", file=sys.stderr)
        return 2


# --- the command line ----------------------------------------------------------------------------------------------------------


def arguments(script: str, doc: str | None, *, runs: int = 3, size: str = "tiny") -> argparse.ArgumentParser:
    """What every script understands."""
    parser = argparse.ArgumentParser(prog=f"python -m bench.{script}", description=(doc or "").partition("\n\n")[0])
    parser.add_argument("--size", default=size, help="tiny, base, small: a clock model of that size; demo: the embedded trained model")
    parser.add_argument("--runs", type=int, default=runs, help="runs of each side; medians are told")
    parser.add_argument("--threads", type=int, default=1, help="threads of the model on both sides")
    parser.add_argument("--home", default=HOME, help="where models and recordings are made and kept")
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="the interpreter that has the peers installed")
    parser.add_argument("--save", metavar="NAME", help="save the figures as NAME.json in --results")
    parser.add_argument("--results", default=RESULTS, help="the directory that --save writes into")
    return parser
