"""staging: transcripts on the local disk between the engine and the outbox. A name stands for a whole, durable file or for nothing."""

from __future__ import annotations

import os

import msgspec

from whisperd.errors import WhisperdError
from whisperd.vocabulary import Transcript

DIRECTORY = "staging"


class StagingFailed(WhisperdError):
    """The transcript cannot be kept on the local disk (full, read-only)."""

    code = "staging_failed"
    recoverable = True


def stage(state_dir: str, name: str, transcript: Transcript) -> None:
    """Write temp, fsync, rename, fsync directory. Raises StagingFailed; the name then stands for what it stood for before."""
    directory = os.path.join(state_dir, DIRECTORY)
    partial = os.path.join(directory, name + ".partial")
    try:
        with open(partial, "wb") as file:
            file.write(msgspec.json.encode(transcript))
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, os.path.join(directory, name))
        _fsync_directory(directory)
    except OSError as error:
        raise StagingFailed(f"cannot keep a transcript in {directory}: {error.strerror}", hint="free space on that disk") from error


def open_staged(state_dir: str, name: str) -> int:
    """A descriptor of a staged transcript. Raises OSError."""
    return os.open(os.path.join(state_dir, DIRECTORY, name), os.O_RDONLY | os.O_CLOEXEC)


def drop_older(state_dir: str, before: float, keep: frozenset[str]) -> int:
    """Remove staged files last written before then, except those still to be published; returns how many."""
    dropped = 0
    with os.scandir(os.path.join(state_dir, DIRECTORY)) as entries:
        for entry in entries:
            if entry.name not in keep and entry.stat(follow_symlinks=False).st_mtime < before:
                os.unlink(entry.path)
                dropped += 1
    return dropped


def _fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
