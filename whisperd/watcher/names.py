"""names: what a file's name says about it (pure).

Owns: the list of names that say "not yet" or "never", and the operator's include and ignore patterns. Patterns are shell patterns for
the whole name (not the path), compared without regard to case, accents as one or as two characters being the same.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterable

NOT_YET = ("*.part", "*.partial", "*.tmp", "*.crdownload", "*.download", "*.filepart")
"""Names that browsers, WinSCP and careful copiers use until a file is whole; the rename is what we wait for."""

NEVER = (
    ".*",  # hidden; so are rsync's .name.XXXXXX, Syncthing's .syncthing.name.tmp and .stversions, macOS's ._name and .DS_Store
    "~$*",  # Office's owner files
    "~syncthing~*",
    "@eaDir",  # NAS housekeeping: Synology, QNAP, Samba
    "@tmp",
    "#recycle",
    "@Recycle",
    "$RECYCLE.BIN",
    "System Volume Information",
    "lost+found",
    "Thumbs.db",
    "desktop.ini",
    "*.error.txt",  # our own, when somebody points an outbox into an inbox
)


class Names:
    """The name rules of one inbox."""

    def __init__(self, include: Iterable[str], ignore: Iterable[str]) -> None:
        self._ignored = _any_of((*NOT_YET, *NEVER, *ignore))
        included = tuple(include)
        self._included = _any_of(included) if included else None

    def ignored(self, name: bytes) -> bool:
        """Whether to act as if this file or directory were not there."""
        return self._ignored.match(_folded(os.fsdecode(name))) is not None

    def is_recording(self, name: bytes) -> bool:
        """Whether a file of this name, not ignored, is work. Without include patterns every file is."""
        return self._included is None or self._included.match(_folded(os.fsdecode(name))) is not None


def _any_of(patterns: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(fnmatch.translate(_folded(pattern)) for pattern in patterns))


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).lower()
