"""names: what a file's name says about it (pure).

Owns: the list of names that say "not yet" or "never", the names that are meant for us (profiles, the skip marker), and the operator's
include and ignore patterns. Patterns are shell patterns for the whole name; an ignore pattern with a "/" in it is one for the whole path
below the inbox, in which "*" crosses no "/" and "**" does. Compared without regard to case, accents as one or as two characters being
the same.
"""

from __future__ import annotations

import fnmatch
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator

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

PROFILE = ".whisperd.toml"  # the whole name: of a folder; the end of a name: of the file whose name stands before it
SKIP_MARKER = b".whisperd-skip"

RECORDING, LEFT_OUT, IGNORED = "recording", "left out", "ignored"


class Names:
    """The name rules of one inbox."""

    def __init__(self, include: Iterable[str], ignore: Iterable[str]) -> None:
        operators = tuple(ignore)
        self._ignored = _AnyOf((*NOT_YET, *NEVER, *(pattern for pattern in operators if "/" not in pattern)))
        self.has_paths = any("/" in pattern for pattern in operators)
        self._ignored_paths = [re.compile(_of_path(_folded(pattern))) for pattern in operators if "/" in pattern]
        included = tuple(include)
        self._included = _AnyOf(included) if included else None

    def ignored(self, name: bytes | str) -> bool:
        """Whether to act as if a file or directory of this name were not there."""
        return self._ignored.matches(_folded(os.fsdecode(name)))

    def ignored_path(self, path: bytes) -> bool:
        """The same for a path below the inbox, by the operator's patterns of whole paths."""
        return any(pattern.match(_folded(os.fsdecode(path))) for pattern in self._ignored_paths)

    def is_recording(self, name: bytes | str) -> bool:
        """Whether a file of this name, not ignored, is work. Without include patterns every file is."""
        return self._included is None or self._included.matches(_folded(os.fsdecode(name)))

    def kind(self, name: str) -> str:
        """Both at once, for very many names: RECORDING, LEFT_OUT or IGNORED."""
        folded = _folded(name)
        if self._ignored.matches(folded):
            return IGNORED
        return RECORDING if self._included is None or self._included.matches(folded) else LEFT_OUT


def is_profile(name: bytes | str) -> bool:
    """Whether a file of this name is settings for a folder, or for the file beside it."""
    return os.fsdecode(name).endswith(PROFILE)


_WILD = re.compile(r"[*?[]")


class _AnyOf:
    """Several patterns of names. Most are of the kind "*.mp3", for which no regular expression is needed."""

    def __init__(self, patterns: Iterable[str]) -> None:
        folded = [_folded(pattern) for pattern in patterns]
        self._ends = tuple(pattern[1:] for pattern in folded if pattern.startswith("*") and not _WILD.search(pattern, 1))
        others = [pattern for pattern in folded if not (pattern.startswith("*") and pattern[1:] in self._ends)]
        self._match = re.compile("|".join(map(fnmatch.translate, others))).match if others else None
        beginnings = {pattern[:1] for pattern in others}
        self._begins = None if beginnings & {"*", "?", "[", ""} else frozenset(beginnings)

    def matches(self, folded: str) -> bool:
        if folded.endswith(self._ends):
            return True
        if self._match is None or (self._begins is not None and folded[:1] not in self._begins):
            return False
        return self._match(folded) is not None


def _of_path(pattern: str) -> str:
    return rf"(?s:{''.join(_steps(pattern.strip('/')))})\Z"


def _steps(pattern: str) -> Iterator[str]:
    """A pattern of a path as pieces of a regular expression."""
    for piece in re.findall(r"\*\*/|\*+|\?|\[!?\]?[^\]]*\]|.", pattern, re.DOTALL):
        match piece:
            case "**/":
                yield r"(?:.*/)?"
            case "*":
                yield "[^/]*"
            case "?":
                yield "[^/]"
            case _ if piece.startswith("**"):
                yield ".*"
            case _ if piece.startswith("[") and len(piece) > 1:
                yield rf"(?!/){fnmatch.translate(piece)[4:-3]}"
            case _:
                yield re.escape(piece)


def _folded(text: str) -> str:
    return text.lower() if text.isascii() else unicodedata.normalize("NFC", text).lower()
