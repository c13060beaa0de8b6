"""disks: filesystems of our own on loop devices, whose power can be cut.

Owns: making, mounting, cutting and mounting again. The cut is the shutdown ioctl that ext4 and xfs share: from that moment nothing
reaches the device, and what was only in memory is lost; with `flush` the journal's own memory is written first, as by a slower death.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from contextlib import suppress
from pathlib import Path

SHUTDOWN = 0x8004587D  # _IOR('X', 125, u32): EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN
FLUSH, NO_FLUSH = 1, 2
MIB = 1 << 20
SIZE = {"ext4": 32 * MIB, "xfs": 320 * MIB}  # sparse; mkfs.xfs makes nothing below 300 MiB
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
TOOLS = ("mkfs.ext4", "mkfs.xfs", "losetup", "mount", "umount")


def missing() -> str:
    """Why there can be no such disks here; "" when there can."""
    if os.geteuid() != 0:
        return "mounting takes root"
    if not os.path.exists("/dev/loop-control"):
        return "no loop devices here"
    known = Path("/proc/filesystems").read_text()
    if absent := [name for name in SIZE if f"\t{name}\n" not in known]:
        return f"the kernel has no {' and no '.join(absent)}"
    if lost := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"not installed: {', '.join(lost)}"
    return ""


class Disk:
    """One filesystem on one image."""

    def __init__(self, kind: str, scratch: Path) -> None:
        self.kind = kind
        image, self.root = scratch / f"{kind}.image", scratch / kind
        with image.open("wb") as file:
            file.truncate(SIZE[kind])
        _do(*MAKE[kind], str(image))
        self.root.mkdir()
        self._device = _do("losetup", "--find", "--show", str(image)).strip()
        self._mount()
        self._hold = os.open(self.root, os.O_RDONLY)

    def _mount(self) -> None:
        _do("mount", "-t", self.kind, self._device, str(self.root))

    def cut(self, how: int) -> None:
        """From now on nothing reaches the device."""
        fcntl.ioctl(self._hold, SHUTDOWN, struct.pack("I", how))

    def power_up(self) -> None:
        """Unmount what is left and let the journal be replayed. Whoever had files open there must have ended."""
        os.close(self._hold)
        _do("umount", str(self.root))
        self._mount()
        self._hold = os.open(self.root, os.O_RDONLY)

    def remove(self) -> None:
        """Leave neither mount nor device behind."""
        with suppress(OSError):
            os.close(self._hold)
        for command in (("umount", "--lazy", str(self.root)), ("losetup", "--detach", self._device)):
            with suppress(RuntimeError):
                _do(*command)


def _do(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
