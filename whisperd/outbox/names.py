"""names: what a file is called in the outbox. Pure; names are bytes, relative to the outbox.

Owns: the check that a name stays inside the outbox, names too long for a filesystem, names of temporary files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from whisperd.errors import printable
from whisperd.outbox.failures import BadName

NAME_BYTES_MAX = 255
NAMES_TRIED = 1000
_MARK_DIGITS = 8


def components(path: bytes) -> tuple[bytes, ...]:
    """The parts of a relative path. Raises BadName for one that is absolute, empty, or leads upwards."""
    parts = tuple(path.split(b"/"))
    if any(part in (b"", b".", b"..") or b"\0" in part for part in parts):
        raise BadName(f"cannot publish under {printable(path)!r}: not a plain path below the outbox")
    return parts


def fit_name(base: bytes, longest_suffix: bytes) -> bytes:
    """`base`, its last part cut if it would be too long for a filesystem with the suffix.

    A cut name ends in `~` and eight digits that stand for the whole one, so two long names that differ only at the end stay two.
    """
    folder, slash, name = base.rpartition(b"/")
    if len(name) + len(longest_suffix) <= NAME_BYTES_MAX:
        return base
    mark = b"~" + hashlib.sha256(name).hexdigest()[:_MARK_DIGITS].encode()
    return folder + slash + _cut(name, NAME_BYTES_MAX - len(mark) - len(longest_suffix)) + mark


def _cut(name: bytes, length: int) -> bytes:
    """At most `length` bytes, without the first half of a UTF-8 character. Bytes that are not UTF-8 are cut anywhere."""
    for end in range(length, length - 4, -1):
        if name[end] & 0xC0 != 0x80:
            return name[:end]
    return name[:length]


def numbered(path: bytes) -> Iterator[bytes]:
    """`path`, then `path`.2, `path`.3 and so on."""
    yield path
    for number in range(2, NAMES_TRIED):
        suffix = b".%d" % number
        yield fit_name(path, suffix) + suffix


def temporary(job: int, suffix: str) -> bytes:
    """The same name for the same work, so that a run after a crash finds what the one before left; every watcher ignores it."""
    return f".whisperd-{job}.{suffix}.tmp".encode()
