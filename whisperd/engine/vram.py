"""vram: what this process holds of its GPU's memory, as its driver tells it.

Owns: the arithmetic between the figures of the whole GPU, of CTranslate2's pool and of a context (OPTIMISER.md §2.4: a worker reports
its own memory, for process lists lie in containers). Never fails: what the driver does not say is None, and None is never 0.
"""

from __future__ import annotations

from typing import NamedTuple

from whisperd.engine import cuda

CONTEXT_USUAL_MIB = 495  # where it cannot be measured (OPTIMISER.md, anchors)
CONTEXT_RANGE_MIB = (64, 2048)  # outside, somebody else came or went meanwhile
WORKSPACE_MAX_MIB = 512  # of cuBLAS and the code of kernels; more than that is somebody else's


class Before(NamedTuple):
    """A GPU before a model is loaded: what a context takes of it, and what is free beside ours."""

    context_mib: int | None
    free_mib: int


class Holding(NamedTuple):
    """What this process holds after loading, and how much of it lies outside CTranslate2's pool and stays as it is."""

    outside_mib: int
    loaded_mib: int

    @property
    def pooled(self) -> bool:
        return self.loaded_mib > self.outside_mib


def look() -> Before | None:
    """To be called before the model is loaded, after the environment is set."""
    memory = cuda.memory_mib(cuda.DEVICE_INDEX)
    return None if memory is None else Before(cuda.context_mib(cuda.DEVICE_INDEX), memory.free)


def settle(before: Before) -> Holding | None:
    """To be called after the model was loaded and has worked once."""
    memory, pool_mib = cuda.memory_mib(cuda.DEVICE_INDEX), cuda.pool_mib(cuda.DEVICE_INDEX)
    return None if memory is None or pool_mib is None else holding(before.context_mib, before.free_mib - memory.free, pool_mib)


def holding(context_mib: int | None, grown_mib: int, pool_mib: int) -> Holding:
    """`grown_mib` is by how much the whole GPU filled up while loading; what of it cannot be ours is left out."""
    low, high = CONTEXT_RANGE_MIB
    context = context_mib if context_mib is not None and low <= context_mib <= high else CONTEXT_USUAL_MIB
    beside_pool = max(0, grown_mib - pool_mib)
    if pool_mib:  # else another allocator was chosen, whose part of the growth cannot be told from the rest
        beside_pool = min(beside_pool, WORKSPACE_MAX_MIB)
    outside = context + beside_pool
    return Holding(outside, outside + pool_mib)


def peak_mib(held: Holding) -> int | None:
    """The most that this process held since the last call."""
    if not held.pooled:
        return None
    now_mib, peak = cuda.pool_mib(cuda.DEVICE_INDEX), cuda.pool_peak_mib(cuda.DEVICE_INDEX)
    return None if now_mib is None or peak is None else held.outside_mib + max(now_mib, peak)


def used_mib() -> int | None:
    """What all processes together hold of the GPU."""
    memory = cuda.memory_mib(cuda.DEVICE_INDEX)
    return None if memory is None else memory.total - memory.free


def told(held: Holding | None) -> str:
    """What there was when memory ran out, for a sentence."""
    memory, pool_mib = cuda.memory_mib(cuda.DEVICE_INDEX), cuda.pool_mib(cuda.DEVICE_INDEX)
    if memory is None:
        return "the GPU's driver does not say how much was free"
    own = "" if held is None or pool_mib is None else f", this process holds {held.outside_mib + pool_mib} MiB"
    return f"{memory.free} of {memory.total} MiB of the GPU are free{own}"
