"""machine: the processor as a card: its cores, how busy they are, its memory. Unknown is None."""

from __future__ import annotations

import os
from typing import NamedTuple


class Ticks(NamedTuple):
    """What /proc/stat counts, in hundredths of a second of all cores together."""

    busy: int
    all: int


def cores() -> int:
    """Cores that this process may use: its affinity, and less where a cgroup allows less."""
    allowed = len(os.sched_getaffinity(0))
    quota = _cgroup_cores()
    return allowed if quota is None else max(1, min(allowed, round(quota)))


def _cgroup_cores() -> float | None:
    try:
        with open("/proc/self/cgroup", encoding="ascii") as lines:
            path = next(line.strip().removeprefix("0::") for line in lines if line.startswith("0::"))
        with open(f"/sys/fs/cgroup{path}/cpu.max", encoding="ascii") as limit:
            quota, period = limit.read().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, StopIteration, ValueError):  # no cgroup v2, or none that can be seen
        return None


def ticks() -> Ticks | None:
    """Counted since boot; two of them make a load."""
    try:
        with open("/proc/stat", encoding="ascii") as lines:
            counts = [int(word) for word in lines.readline().split()[1:9]]  # user … steal; guest is in user
    except (OSError, ValueError):  # hidden by a sandbox
        return None
    return Ticks(busy=sum(counts) - counts[3] - counts[4], all=sum(counts)) if len(counts) >= 5 else None


def busy_cores(before: Ticks | None, after: Ticks | None) -> float | None:
    """Mean number of cores busy between two counts, whoever kept them so."""
    if before is None or after is None or after.all <= before.all:
        return None
    return (os.cpu_count() or 1) * (after.busy - before.busy) / (after.all - before.all)


def memory_total_mib() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20


def memory_free_mib() -> int | None:
    """What a new process could have without anything being swapped out."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # hidden by a sandbox
        return None
