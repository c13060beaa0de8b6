"""fake_nvml: a machine whose GPUs are a script, seen through the real nvidia-ml-py by way of a compiled libnvidia-ml.so.1.

Owns: compiling `fake_nvml.c` (its head tells the language of scripts), and `Machine`: one script with its clock, its fake workers and the
log of who called what. A process sees it when it is started with `Machine.environment()`: the library is found at exec, never later.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

SOURCE = Path(__file__).with_name("fake_nvml.c")
LIBRARY = "libnvidia-ml.so.1"

FIRST = "GPU-aaaa0000-0000-0000-0000-000000000001"
SECOND = "GPU-bbbb0000-0000-0000-0000-000000000002"
TWO_CARDS = f"""\
driver 570.11
gpu 0 {FIRST} 00000000:01:00.0 24576 420 NVIDIA GeForce RTX 4090
gpu 1 {SECOND} 00000000:02:00.0 8192 260 NVIDIA GeForce RTX 3070
set 0 util=37 memory_util=12 used=1200 temp=61 power=250000 limit=450000
set 1 used=10 temp=40
"""


def compiler() -> str | None:
    """A C compiler, or None where there is none."""
    return shutil.which("gcc") or shutil.which("cc")


def build(directory: Path) -> Path:
    """Compile the library into `directory`, every warning being an error."""
    cc = compiler()
    if cc is None:
        raise FileNotFoundError("no C compiler")
    made = directory / LIBRARY
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", f"-Wl,-soname,{LIBRARY}"]
    subprocess.run([cc, *flags, "-o", str(made), str(SOURCE), "-lpthread"], check=True)
    return made


def functions(library: Path) -> set[str]:
    """The NVML functions that the library has."""
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library)], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in listed.stdout.splitlines() if " T nvml" in line}


class Machine:
    """A directory with the library, a script and a clock; 0 s is now until `clock` says otherwise."""

    def __init__(self, directory: Path, library: Path, script: str = TWO_CARDS) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.library = directory / LIBRARY
        shutil.copyfile(library, self.library)
        self._script = directory / "script"
        self._clock = directory / "clock"
        self._workers = directory / "workers"
        self._workers.mkdir()
        self._log = directory / "calls"
        self._log.touch()
        self._kernel_log = directory / "kmsg"
        self._kernel_log.touch()
        self._serial = 0
        self.text = ""
        self.clock(0)
        self.script(script)

    def environment(self, **more: str) -> dict[str, str]:
        """What a process needs in its environment to see this machine."""
        return {
            "LD_LIBRARY_PATH": str(self.library.parent),
            "FAKE_NVML_SCRIPT": str(self._script),
            "FAKE_NVML_CLOCK": str(self._clock),
            "FAKE_NVML_WORKERS": str(self._workers),
            "FAKE_NVML_LOG": str(self._log),
            "FAKE_KERNEL_LOG": str(self._kernel_log),
            **more,
        }

    def script(self, text: str) -> None:
        """From the next call on, this is the machine. `{xid}` stands for a new serial number of an event."""
        self.text = text
        while "{xid}" in text:
            self._serial += 1
            text = text.replace("{xid}", str(self._serial), 1)
        _replace(self._script, text)

    def clock(self, seconds: float) -> None:
        _replace(self._clock, f"{seconds}\n")

    def employ(self, gpu: int, pid: int, *, mib: int, percent: int) -> None:
        """A fake worker holds memory and keeps the GPU busy for as long as its process lives."""
        _replace(self._workers / f"{gpu}.{pid}", f"{mib} {percent}\n")

    def kernel_says(self, line: str) -> None:
        """A line in the kernel's log, for a probe that reads it here (`fake_nvml.probe`)."""
        with self._kernel_log.open("a") as log:
            log.write(f"6,1,1,-;{line}\n")

    def callers(self) -> Counter[int]:
        """How many calls each process made, by pid."""
        return Counter(int(line.split()[0]) for line in self._log.read_text().splitlines())

    def called(self) -> set[str]:
        """The functions that were called."""
        return {line.split()[1] for line in self._log.read_text().splitlines()}

    def replace_library(self) -> None:
        """What a package upgrade does: another file under the same name."""
        new = self.library.with_suffix(".new")
        shutil.copyfile(self.library, new)
        new.replace(self.library)

    def python(self, code: str, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Run Python code in a process that sees this machine."""
        return subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, **self.environment()},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def _replace(path: Path, text: str) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    new.replace(path)
