"""archive: a file that is put away, and the folder of the archive that it goes to.

Owns: the two names of a file while it is put away (`Held`), and how it comes to stand in the archive (`Shelf`): moved where a rename can
reach it, copied where none can, never over anything, and durable before it is taken from where it was. What the archive has already is
known by its bytes, so that the same again after a crash makes no second one. Fails with the errors of `failures`.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import NamedTuple

from whisperd.errors import printable
from whisperd.outbox.failures import NameTaken, Unpublished, attempting, met_in
from whisperd.outbox.names import fit_name, numbered
from whisperd.outbox.place import FOREIGN, Folder, closing, digest, move, open_file

PROFILE = b".whisperd.toml"
"""What stands after the name of a recording in that of its profile."""
_COARSE_NS = 2_000_000_000  # vfat keeps times in steps of two seconds


def content_of(found: os.stat_result) -> tuple[int, int, int, int]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@dataclass(frozen=True, slots=True)
class Held:
    """A file to be put away: its folder, its name there, and the private one."""

    folder: Folder
    name: bytes
    hidden: bytes

    def known(self, name: bytes) -> os.stat_result | None:
        with attempting("look at", self.folder.full(name)):
            try:
                return os.stat(name, dir_fd=self.folder.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None

    def is_hidden(self) -> bool:
        return self.known(self.hidden) is not None

    def has_both_names(self) -> bool:
        """Where a rename is made of a link and an unlink, a crash in between leaves one file under two names."""
        one, other = self.known(self.name), self.known(self.hidden)
        return one is not None and other is not None and os.path.samestat(one, other)

    def take(self, held: os.stat_result) -> bool:
        """Bring it under its private name; False, and all is as it was, when that was another file than the one held open."""
        with attempting("take away", self.folder.full(self.name)):
            if not move(self.folder.descriptor, self.name, self.folder.descriptor, self.hidden):
                return False
        found = self.known(self.hidden)
        if found is not None and content_of(found) == content_of(held):
            return True
        self.give_back()
        return False

    def give_back(self) -> None:
        """From the private name to its own, or to the next one that is free, should somebody have been faster."""
        if self.has_both_names():
            self.folder.discard(self.hidden)
            return
        for name in numbered(self.name):
            with attempting("give back", self.folder.full(name)):
                if move(self.folder.descriptor, self.hidden, self.folder.descriptor, name):
                    break
        self.folder.sync()


class Shelf(NamedTuple):
    """The folder of the archive, a private name in it, and whether a rename cannot reach it from the inbox."""

    folder: Folder
    temporary: bytes
    far: bool


def kept_as(folder: Folder, name: bytes, size: int, mtime_ns: int, held: int | None) -> bytes | None:
    """Under which name the archive has it already: by size and time, and if the source is still there, by the very bytes."""
    for candidate in numbered(name):
        with attempting("look at", folder.full(candidate)):
            try:
                found = os.stat(candidate, dir_fd=folder.descriptor, follow_symlinks=False)
            except FileNotFoundError:
                return None
        alike = found.st_size == size and abs(found.st_mtime_ns - mtime_ns) < _COARSE_NS
        if alike and stat.S_ISREG(found.st_mode) and (held is None or _same_bytes(folder, candidate, found, held)):
            return candidate
    return None


def _same_bytes(folder: Folder, candidate: bytes, found: os.stat_result, held: int) -> bool:
    known = os.fstat(held)
    if (known.st_dev, known.st_ino) == (found.st_dev, found.st_ino):
        return True
    there = folder.observe(candidate, size=known.st_size)
    return there not in (None, FOREIGN) and there == digest(held, size=None)


@contextmanager
def copied(shelf: Shelf, held: int, wanted: bytes) -> Iterator[bytes | None]:
    """Have a copy of an open file in the archive where a rename cannot do, for the time of the block. Yields the name under which the
    archive has it already."""
    known = os.fstat(held)
    kept = kept_as(shelf.folder, wanted, known.st_size, known.st_mtime_ns, held)
    try:
        if shelf.far and kept is None:
            shelf.folder.copy(held, shelf.temporary, meant_for=wanted)
        yield kept
    finally:
        if shelf.far:
            with suppress(Unpublished):  # a share that went away takes it along; the next run has the same name
                shelf.folder.discard(shelf.temporary)


def shelve(file: Held, shelf: Shelf, kept: bytes | None, wanted: bytes) -> bytes:
    """Make it stand in the archive, durably: the copy, or the file itself, unless it is kept already; under which name. Raises Unpublished.

    A copy whose name could not be made durable is taken away again: a second fsync might say that all is well when it is not.
    """
    name = kept or _first_free(file, shelf, wanted)
    try:
        shelf.folder.sync()
    except Unpublished:
        if shelf.far and kept is None:
            shelf.folder.discard(name)
        raise
    return name


def _first_free(file: Held, shelf: Shelf, wanted: bytes) -> bytes:
    """The first name that nothing in the archive has, given to the copy or to the file itself. Raises NameTaken."""
    for name in numbered(wanted):
        if shelf.far:
            done = shelf.folder.settle_at(shelf.temporary, name)
        else:
            with attempting("archive as", shelf.folder.full(name)):
                done = move(file.folder.descriptor, file.hidden, shelf.folder.descriptor, name)
        if done:
            return name
    full = printable(shelf.folder.full(wanted))
    raise NameTaken(f"cannot archive as {full}: too many of that name are there", hint="clear up the archive")


def shelve_beside(profile: Held, shelf: Shelf, name: bytes) -> None:
    """Beside its recording, which stands in the archive under that name."""
    wanted = fit_name(name, PROFILE) + PROFILE
    with attempting("open", profile.folder.full(profile.hidden)):
        held = open_file(profile.folder.descriptor, profile.hidden)
    with closing(held), copied(shelf, held, wanted) as kept:
        shelve(profile, shelf, kept, wanted)
    with met_in("inbox"):
        profile.folder.discard(profile.hidden)
