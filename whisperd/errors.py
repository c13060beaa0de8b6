"""errors: the one base error of whisperd, and how names are written where people read them.

Owns: `WhisperdError` (code, what, hint, recoverable) and `printable`.
An error says what happened, to what, and what to do; its code is stable, so that people can search for it.
"""

from __future__ import annotations

import os
from typing import ClassVar


class WhisperdError(Exception):
    """Base of every error that whisperd raises on purpose.

    `code` is stable across releases; `recoverable` says whether trying again later can help.
    """

    code: ClassVar[str] = "internal"
    recoverable: ClassVar[bool] = False

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} ({self.hint})" if self.hint else self.what


class ConfigError(WhisperdError):
    """The settings cannot be used as they stand."""

    code = "config"


class StateDirError(WhisperdError):
    """The state directory cannot be used: busy, on a network filesystem, not writable."""

    code = "state_dir"


def printable(name: bytes | str) -> str:
    """Write a file name so that no reader can be fooled: one line, no control bytes, no forged direction.

    Linux names are bytes; what is not valid UTF-8 or not printable is shown as `\\xNN`, `\\uNNNN` or `\\UNNNNNNNN`, and a
    backslash as two: different names never look the same.
    """
    text = os.fsdecode(name) if isinstance(name, bytes) else name
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    point = ord(char)
    if 0xDC80 <= point <= 0xDCFF:  # surrogateescape: a byte that was not UTF-8
        return f"\\x{point - 0xDC00:02x}"
    if char == "\\":
        return "\\\\"
    if char.isprintable():
        return char
    if point < 0x80:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"
