"""profiles: the operator's settings files in the inbox, told as text; what they mean is for the daemon to say.

Owns: which `.whisperd.toml` (of a folder) and `NAME.whisperd.toml` (of the file NAME beside it) there are, and which of them changed.
Nothing is read but regular files below the inbox, and of those at most `BYTES_MAX`. What cannot be read is told with its fault.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator

from whisperd.watcher.scan import ScanResult
from whisperd.watcher.source import ROOT_FLAGS, Entry, open_beneath
from whisperd.wire import ProfileFile, Profiles

BYTES_MAX = 64 * 1024
IN_ONE_FRAME = 64


class ProfileFiles:
    """The profiles of one inbox, as they were told last."""

    def __init__(self, root: bytes) -> None:
        self._root = root
        self._told: dict[bytes, Entry] = {}
        self._first = True

    @property
    def paths(self) -> Iterable[bytes]:
        """The profiles that were there at the last scan."""
        return self._told

    def news(self, scan: ScanResult) -> Iterator[Profiles]:
        """What changed with this scan, as frames; what was told is remembered when the last of them is taken."""
        changed = sorted(path for path, entry in scan.profiles.items() if self._told.get(path) != entry)
        gone = sorted(path for path in self._told if path not in scan.profiles and scan.knows_absent(path))
        for start in range(0, max(len(changed), 1 if self._first else 0), IN_ONE_FRAME):
            files = tuple(read(self._root, path) for path in changed[start : start + IN_ONE_FRAME])
            yield Profiles(files=files, whole=self._first)
            self._first = False
        if gone:
            yield Profiles(files=tuple(ProfileFile(path=path) for path in gone))
        self._told = {path: entry for path, entry in (self._told | scan.profiles).items() if path not in gone}


def read(root: bytes, path: bytes) -> ProfileFile:
    """One profile as it stands."""
    try:
        top = os.open(root, ROOT_FLAGS)
        try:
            descriptor = open_beneath(top, path)
        finally:
            os.close(top)
        with open(descriptor, "rb") as file:
            content = file.read(BYTES_MAX + 1)
    except OSError as error:
        if error.errno == errno.ENOENT:
            return ProfileFile(path=path)
        return ProfileFile(path=path, fault=f"it cannot be read: {error.strerror}")
    if len(content) > BYTES_MAX:
        return ProfileFile(path=path, fault=f"it is larger than {BYTES_MAX // 1024} KiB")
    try:
        return ProfileFile(path=path, text=content.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ProfileFile(path=path, fault=f"it is not UTF-8 (byte {error.start})")
