"""scan: what lies in the inbox now.

Owns: the walk over the inbox, by directory descriptors: no symbolic link is followed (neither to a file nor to a directory), no other
filesystem entered, nothing but regular files reported. Fails with `InboxAbsent` when the inbox itself cannot be listed; a directory
below that cannot be read makes the result say of itself how far it can be trusted, since a file not seen is not a file deleted.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import Sighting
from whisperd.watcher.names import Names
from whisperd.watcher.source import FOLDER_FLAGS, ROOT_FLAGS, sighting_of

DEPTH_MAX = 100  # each level holds a descriptor
PATH_BYTES_MAX = 3500  # PATH_MAX is 4096, and a transcript needs a path as well
BREATHE_EVERY = 1000  # entries


class InboxAbsent(WhisperdError):
    """The inbox cannot be listed: not there, not ours to read, or on a share that does not answer."""

    code = "inbox_absent"
    recoverable = True


@dataclass
class ScanResult:
    """What one scan saw. `hidden` is what we may not look at (with all below), `skipped` what we would not report; each with the reason."""

    sightings: dict[bytes, Sighting] = field(default_factory=dict)
    left_out: int = 0
    complete: bool = True
    hidden: dict[bytes, str] = field(default_factory=dict)
    skipped: dict[bytes, str] = field(default_factory=dict)
    dev: int = 0
    inode: int = 0
    empty: bool = False  # the inbox has no entry of any name
    directories: int = 0

    def knows_absent(self, path: bytes) -> bool:
        """Whether this scan proves that `path` is not in the inbox."""
        if not self.complete or path in self.sightings:
            return False
        return not any(path == hidden or path.startswith(hidden + b"/") for hidden in self.hidden)


def scan(
    root: bytes,
    exclude: Iterable[bytes],
    include: Iterable[str],
    ignore: Iterable[str],
    recursive: bool,
    *,
    breathe: Callable[[], None] = lambda: None,
) -> ScanResult:
    """List the inbox. `breathe` is called now and then, so that a long scan keeps nobody waiting. Raises InboxAbsent."""
    walk = _Walk(_below(root, exclude), Names(include, ignore), recursive, breathe)
    try:
        top = os.open(root, ROOT_FLAGS)
        try:
            walk.begin(top)
        finally:
            os.close(top)
    except OSError as error:
        raise absent(root, error) from error
    return walk.result


def absent(root: bytes, error: OSError) -> InboxAbsent:
    """Why an inbox cannot be listed, with what to do."""
    hints = {
        errno.ENOENT: "make the directory, or mount the share that holds it",
        errno.ENOTDIR: "an inbox must be a directory",
        errno.EACCES: "let the user that runs whisperd read and enter it",
        errno.EPERM: "let the user that runs whisperd read and enter it",
    }
    hint = hints.get(error.errno or 0, "look whether the disk or the share's server answers; it is tried again by itself")
    return InboxAbsent(f"cannot list the inbox {printable(root)}: {error.strerror}", hint=hint)


def _below(root: bytes, exclude: Iterable[bytes]) -> frozenset[bytes]:
    """The excluded directories as paths relative to the inbox. By name only: an outbox may be on a share that does not answer."""
    tops = {os.path.normpath(root), os.path.realpath(root)}
    return frozenset(
        os.path.relpath(os.path.normpath(path), top) for path in exclude for top in tops if os.path.normpath(path).startswith(top + b"/")
    )


class _Walk:
    """One scan under way."""

    def __init__(self, excluded: frozenset[bytes], names: Names, recursive: bool, breathe: Callable[[], None]) -> None:
        self.result = ScanResult()
        self._excluded = excluded
        self._names = names
        self._recursive = recursive
        self._breathe = breathe
        self._until_breath = BREATHE_EVERY

    def begin(self, top: int) -> None:
        found = os.fstat(top)
        self.result.dev, self.result.inode = found.st_dev, found.st_ino
        entries = _listed(top)
        self.result.empty = not entries
        self._folder(top, b"", 1, entries)

    def _folder(self, folder: int, prefix: bytes, depth: int, entries: list[os.DirEntry[str]]) -> None:
        self.result.directories += 1
        self._breathe()
        below: list[bytes] = []
        for entry in entries:
            self._pause()
            name = os.fsencode(entry.name)
            try:
                if self._entry(entry, name, prefix + name):
                    below.append(name)
            except FileNotFoundError:  # deleted since the listing
                continue
            except OSError as error:
                self._unread(prefix + name, error)
        for name in below:
            self._enter(folder, name, prefix + name, depth)

    def _pause(self) -> None:
        self._until_breath -= 1
        if self._until_breath <= 0:
            self._until_breath = BREATHE_EVERY
            self._breathe()

    def _entry(self, entry: os.DirEntry[str], name: bytes, path: bytes) -> bool:
        """Take note of a file; True for a directory to enter. Raises OSError."""
        if self._names.ignored(name):
            return False
        if entry.is_dir(follow_symlinks=False):
            return self._recursive and path not in self._excluded
        if not entry.is_file(follow_symlinks=False):
            return False
        if not self._names.is_recording(name):
            self.result.left_out += 1
        elif len(path) > PATH_BYTES_MAX:
            self.result.skipped[path] = f"its path is longer than {PATH_BYTES_MAX} bytes"
        else:
            self.result.sightings[path] = sighting_of(path, entry.stat(follow_symlinks=False), self.result.dev)
        return False

    def _enter(self, folder: int, name: bytes, path: bytes, depth: int) -> None:
        if depth >= DEPTH_MAX:
            self.result.skipped[path] = f"it lies more than {DEPTH_MAX} folders deep"
            return
        try:
            below = os.open(name, FOLDER_FLAGS, dir_fd=folder)
        except (FileNotFoundError, NotADirectoryError):  # deleted or replaced since the listing
            return
        except OSError as error:
            self._unread(path, error)
            return
        try:
            if os.fstat(below).st_dev != self.result.dev:
                self.result.skipped[path] = "another filesystem is mounted there; make it an inbox of its own"
            else:
                self._folder(below, path + b"/", depth + 1, _listed(below))
        except OSError as error:
            self._unread(path, error)
        finally:
            os.close(below)

    def _unread(self, path: bytes, error: OSError) -> None:
        """Forbidden is a lasting fact about one directory; any other error makes the whole scan doubtful."""
        if error.errno == errno.ELOOP:  # a symbolic link took the directory's place since the listing
            return
        self.result.hidden[path] = error.strerror or str(error)
        if error.errno not in (errno.EACCES, errno.EPERM):
            self.result.complete = False


def _listed(folder: int) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)
