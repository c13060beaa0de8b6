"""choice: what "auto" means for model, device and precision on this hardware. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from whisperd.vocabulary import Reading


class Hardware(NamedTuple):
    """What this machine can run on. `vram_mib` is that of the largest usable GPU, None without one."""

    vram_mib: int | None
    cores: int
    memory_mib: int


class Choice(NamedTuple):
    """Concrete model, device and precision, with the reason."""

    model: str
    device: str
    compute_type: str
    reason: str


def hardware_of(readings: Sequence[Reading], *, cores: int, memory_mib: int) -> Hardware:
    """The usable part of what the probe saw. An unknown size is no size."""
    sizes = [reading.vram_total_mib for reading in readings if reading.status == "ok" and reading.vram_total_mib]
    return Hardware(vram_mib=max(sizes) if sizes else None, cores=cores, memory_mib=memory_mib)


def choose(model: str, device: str, compute_type: str, hardware: Hardware) -> Choice:
    """Resolve every "auto". VRAM needs are published figures with room to spare (ENGINE.md §f)."""
    if device == "auto":
        device = "cuda" if hardware.vram_mib is not None else "cpu"
    if compute_type == "auto":
        compute_type = "float16" if device == "cuda" else "int8"
    if model != "auto":
        return Choice(model, device, compute_type, f"{model} on {device} as configured")
    if device == "cuda":
        return _for_gpu(compute_type, hardware.vram_mib or 0)
    return _for_cpu(compute_type, hardware)


def _for_gpu(compute_type: str, vram_mib: int) -> Choice:
    for floor_mib, name in ((7_500, "large-v3"), (4_500, "large-v3-turbo"), (2_500, "small")):
        if vram_mib >= floor_mib:
            return Choice(name, "cuda", compute_type, f"{name}: the GPU has {vram_mib} MiB")
    return Choice("base", "cuda", compute_type, f"base: the GPU has only {vram_mib} MiB")


def _for_cpu(compute_type: str, hardware: Hardware) -> Choice:
    large_enough = hardware.cores >= 4 and hardware.memory_mib >= 6_000
    name = "small" if large_enough else "base"
    return Choice(name, "cpu", compute_type, f"{name}: no GPU, {hardware.cores} cores, {hardware.memory_mib} MiB of memory")
