"""staging: transcripts on the local disk between the engine and the outbox. A name stands for a whole, durable file or for nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Set

import msgspec

from whisperd.errors import WhisperdError
from whisperd.vocabulary import Transcript

DIRECTORY = "staging"


class StagingFailed(WhisperdError):
    """The transcript cannot be kept on the local disk (full, read-only)."""

    code = "staging_failed"
    recoverable = True


def stage(state_dir: str, name: str, transcript: Transcript) -> int:
    """Write temp, fsync, rename, fsync directory; returns how many bytes it has.

    Raises StagingFailed; the name then stands for what it stood for before.
    """
    directory = os.path.join(state_dir, DIRECTORY)
    partial = os.path.join(directory, name + ".partial")
    body = msgspec.json.encode(transcript)
    try:
        with open(partial, "wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, os.path.join(directory, name))
        _fsync_directory(directory)
    except OSError as error:
        raise StagingFailed(f"cannot keep a transcript in {directory}: {error.strerror}", hint="free space on that disk") from error
    return len(body)


def open_staged(state_dir: str, name: str) -> int:
    """A descriptor of a staged transcript. Raises StagingFailed."""
    path = os.path.join(state_dir, DIRECTORY, name)
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StagingFailed(f"cannot read the staged transcript {path}: {error.strerror}", hint="look for errors of that disk") from error


def drop(state_dir: str, names: Iterable[str]) -> int:
    """Remove staged files; returns how many were there."""
    dropped = 0
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(state_dir, DIRECTORY, name))
            dropped += 1
    return dropped


def drop_orphans(state_dir: str, wanted: Set[str]) -> int:
    """Remove staged files that nobody needs: of jobs that were made anew, or of a life that ended while it wrote."""
    with os.scandir(os.path.join(state_dir, DIRECTORY)) as entries:
        return drop(state_dir, [entry.name for entry in entries if entry.name not in wanted])


def _fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
