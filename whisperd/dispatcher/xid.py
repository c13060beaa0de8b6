"""xid: NVIDIA's numbers for errors of a GPU, what they are called, and what follows from them. Pure.

The numbers and their consequences follow NVIDIA's catalogue (docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html) and
OPTIMISER.md §2. A number that is not here is told and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from whisperd.vocabulary import Xid

Follows = Literal["restart", "drain", "lost", "nothing"]
"""restart: the process that caused it must begin anew; drain: the GPU needs a reset before new work; lost: it is not there any more."""


class Kind(NamedTuple):
    """What an XID is called, what follows, and what a person can do."""

    name: str
    follows: Follows
    todo: str


class KernelLine(NamedTuple):
    """An XID as the kernel's log tells it, with the process that NVML does not name."""

    pci: tuple[int, ...]
    xid: Xid


RESET = "stop whisperd, reset the GPU (nvidia-smi --gpu-reset) or reboot the machine, start whisperd"
RETURN = "if it happens again, have the board checked"
APPLICATION = "the process that caused it begins anew; if many files do this, suspect the board"
SEATING = "check power, cooling and seating of the board, then reboot the machine"

TABLE: dict[int, Kind] = {
    13: Kind("graphics engine exception", "restart", APPLICATION),
    31: Kind("memory page fault", "restart", APPLICATION),
    43: Kind("GPU stopped processing", "restart", APPLICATION),
    45: Kind("preemptive cleanup after an earlier error", "restart", APPLICATION),
    48: Kind("double-bit ECC error", "drain", RESET),
    62: Kind("internal micro-controller halt", "drain", RESET),
    63: Kind("memory row remapping recorded", "drain", RESET),
    64: Kind("memory row remapping failed", "drain", f"{RESET}; {RETURN}"),
    74: Kind("NVLink error", "nothing", RETURN),
    79: Kind("GPU has fallen off the bus", "lost", SEATING),
    92: Kind("high rate of single-bit ECC errors", "nothing", RETURN),
    94: Kind("contained ECC error", "drain", RESET),
    95: Kind("uncontained ECC error", "drain", RESET),
    119: Kind("no answer from the GPU's own processor (GSP)", "drain", RESET),
    120: Kind("error of the GPU's own processor (GSP)", "drain", RESET),
    140: Kind("unrecovered ECC error", "drain", RESET),
    143: Kind("GPU could not be initialised", "drain", RESET),
    154: Kind("the recovery that the GPU asks for changed", "nothing", ""),
}

_LINE = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)[^)]*\): (\d+)(?:, pid='?(\d+))?")


def kind(code: int) -> Kind:
    """What is known of an XID."""
    return TABLE.get(code, Kind("not in our table", "nothing", "see NVIDIA's catalogue of XIDs"))


def describe(code: int) -> str:
    """'XID 79 (GPU has fallen off the bus)'."""
    return f"XID {code} ({kind(code).name})"


def parse_kernel_line(line: str) -> KernelLine | None:
    """The XID in a line of the kernel's log, if there is one."""
    found = _LINE.search(line)
    if found is None:
        return None
    pci, code, pid = found.groups()
    return KernelLine(pci_address(pci), Xid(code=int(code), pid=int(pid) if pid else None))


def pci_address(text: str) -> tuple[int, ...]:
    """Domain, bus and device: "00000000:01:00.0" (NVML) and "0000:01:00" (kernel) are one place."""
    return tuple(int(part, 16) for part in text.split(".", maxsplit=1)[0].split(":"))


def name_processes(codes: Sequence[int], told: Sequence[Xid]) -> tuple[Xid, ...]:
    """NVML's events with the processes that the kernel named for the same codes, each used once."""
    left = list(told)
    named = []
    for code in codes:
        match = next((event for event in left if event.code == code), None)
        if match is not None:
            left.remove(match)
        named.append(match or Xid(code=code))
    return tuple(named)
