"""phases: what a contender took until its model was loaded, and after that; printed as the last line of its output."""

from __future__ import annotations

import json
import os
import time
from typing import Any


class Phases:
    """A stop-watch that began with the process."""

    def __init__(self) -> None:
        self._loaded = (0.0, 0.0)

    def loaded(self, *, children_cpu_s: float = 0.0) -> None:
        """The model is loaded (by a child, when its CPU time is given)."""
        self._loaded = (time.process_time() + children_cpu_s, age_s())

    def say(self, texts: list[str], *, children_cpu_s: float = 0.0, **about: Any) -> None:
        cpu_s, wall_s = time.process_time() + children_cpu_s, age_s()
        load_cpu_s, load_wall_s = self._loaded
        print(
            json.dumps(
                {
                    "texts": texts,
                    "load_cpu_s": round(load_cpu_s, 3),
                    "load_wall_s": round(load_wall_s, 3),
                    "run_cpu_s": round(cpu_s - load_cpu_s, 3),
                    "run_wall_s": round(wall_s - load_wall_s, 3),
                    "about": about,
                }
            ),
            flush=True,
        )


def age_s() -> float:
    """How long ago this process was started."""
    with open("/proc/self/stat", encoding="ascii") as file:
        began_ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began_ticks / os.sysconf("SC_CLK_TCK")
