"""scan: what lies in the inbox now.

Owns: the walk over the inbox, by directory descriptors: no symbolic link is followed (neither to a file nor to a directory), no other
filesystem entered, nothing but regular files reported. A folder with a skip marker is left alone with all below it; a directory that did
not change since it was listed is not listed again, only files that are asked for by name are looked at there. Fails with `InboxAbsent`
when the inbox itself cannot be listed; a directory below that cannot be read makes the result say of itself how far it can be trusted,
since a file not seen is not a file deleted.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import Sighting
from whisperd.watcher.folders import Contents, Folders, Stamp
from whisperd.watcher.names import IGNORED, LEFT_OUT, PROFILE, RECORDING, SKIP_MARKER, Names, is_profile
from whisperd.watcher.source import FOLDER_FLAGS, ROOT_FLAGS, Entry, entry_of

DEPTH_MAX = 100  # each level holds a descriptor
PATH_BYTES_MAX = 3500  # PATH_MAX is 4096, and a transcript needs a path as well
BREATHE_EVERY = 1000  # entries
BATCH = 2000  # entries
FILENAMES = sys.getfilesystemencoding()


class InboxAbsent(WhisperdError):
    """The inbox cannot be listed: not there, not ours to read, or on a share that does not answer."""

    code = "inbox_absent"
    recoverable = True


@dataclass
class ScanResult:
    """What one scan saw. `hidden` is what we may not look at (with all below), `skipped` what we would not report; each with the reason."""

    sightings: dict[bytes, Sighting] = field(default_factory=dict)  # of `scan`; a walk hands its entries over as it goes
    files: int = 0
    left_out: int = 0
    complete: bool = True
    hidden: dict[bytes, str] = field(default_factory=dict)
    skipped: dict[bytes, str] = field(default_factory=dict)
    marked: set[bytes] = field(default_factory=set)  # folders with a skip marker; b"" is the inbox itself
    unlisted: set[bytes] = field(default_factory=set)  # folders that did not change and were not listed again
    profiles: dict[bytes, Entry] = field(default_factory=dict)
    dev: int = 0
    inode: int = 0
    empty: bool = False  # the inbox has no entry of any name
    directories: int = 0

    def knows_absent(self, path: bytes) -> bool:
        """Whether this scan proves that `path`, if it did not report it, is not in the inbox."""
        if not self.complete or path in self.sightings or path.rpartition(b"/")[0] in self.unlisted:
            return False
        return not any(path == hidden or path.startswith(hidden + b"/") for hidden in self.hidden)

    def left_alone(self, path: bytes) -> bool:
        """Whether a skip marker stands above `path`."""
        return any(not folder or path.startswith(folder + b"/") for folder in self.marked)


class Rules(NamedTuple):
    """What belongs to the inbox. `excluded` are directories, relative to it."""

    excluded: frozenset[bytes]
    names: Names
    recursive: bool

    @classmethod
    def of(cls, root: bytes, exclude: Iterable[bytes], names: Names, recursive: bool) -> Rules:
        """`exclude` are absolute directories. By name only: an outbox may be on a share that does not answer."""
        tops = {os.path.normpath(root), os.path.realpath(root)}
        below = (
            os.path.relpath(os.path.normpath(path), top)
            for path in exclude
            for top in tops
            if os.path.normpath(path).startswith(top + b"/")
        )
        return cls(frozenset(below), names, recursive)


def scan(
    root: bytes,
    exclude: Iterable[bytes],
    include: Iterable[str],
    ignore: Iterable[str],
    recursive: bool,
    *,
    breathe: Callable[[], None] = lambda: None,
) -> ScanResult:
    """List the whole inbox into `sightings`. `breathe` is called now and then. Raises InboxAbsent."""
    found: list[Entry] = []
    walk = Walk(Rules.of(root, exclude, Names(include, ignore), recursive), lambda batch, _: found.extend(batch), breathe=breathe)
    result = walk.over(root)
    result.sightings = {
        path: Sighting(path=path, dev=result.dev, inode=inode, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)
        for path, inode, size, mtime_ns, ctime_ns in found
    }
    return result


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


class Walk:
    """One scan. `take` is given the recordings in batches, with the inbox's device; `singles` are names by folder, to be looked at
    where the folder is not listed again."""

    def __init__(
        self,
        rules: Rules,
        take: Callable[[list[Entry], int], object],
        *,
        breathe: Callable[[], None] = lambda: None,
        folders: Folders | None = None,
        singles: Mapping[bytes, Iterable[bytes]] | None = None,
    ) -> None:
        self.result = ScanResult()
        self._rules = rules
        self._take = take
        self._breathe = breathe
        self._folders = folders or Folders()
        self._singles = singles or {}
        self._batch: list[Entry] = []
        self._until_breath = BREATHE_EVERY

    def over(self, root: bytes) -> ScanResult:
        """Go over the inbox `root`. Raises InboxAbsent."""
        try:
            top = os.open(root, ROOT_FLAGS)
            try:
                found = os.fstat(top)
                self.result.dev, self.result.inode = found.st_dev, found.st_ino
                self._folder(top, b"", 1, found)
            finally:
                os.close(top)
        except OSError as error:
            raise absent(root, error) from error
        self._hand_over()
        if self.result.complete:
            self._folders.end()
        return self.result

    def _folder(self, folder: int, path: bytes, depth: int, found: os.stat_result) -> None:
        """Raises OSError when it cannot be listed."""
        self.result.directories += 1
        self._breathe()
        stamp = _stamp(found)
        contents = self._folders.unchanged(path, stamp)
        if contents is not None:
            self.result.unlisted.add(path)
            self._look_at_singles(folder, path)
        elif _has_marker(folder):
            self.result.marked.add(path)
            self._folders.forget(path)
            return
        else:
            contents = self._list(folder, path, stamp)
        if not path:
            self.result.empty = contents.entries == 0
        self.result.files += contents.files
        self.result.left_out += contents.left_out
        prefix = path + b"/" if path else b""
        for name in contents.below:
            self._enter(folder, name, prefix + name, depth)

    def _list(self, folder: int, path: bytes, stamp: Stamp) -> Contents:
        began, prefix, doubts = time.monotonic(), path + b"/" if path else b"", self._doubts()
        below: list[bytes] = []
        names = entries = files = left_out = 0
        with os.scandir(folder) as listing:
            for entry in listing:
                entries += 1
                names ^= hash(entry.name)
                self._until_breath -= 1
                if self._until_breath <= 0:
                    self._pause()
                name = entry.name.encode(FILENAMES, "surrogateescape")  # as os.fsencode does, in a third of the time
                try:
                    kind = self._entry(entry, prefix + name)
                except FileNotFoundError:  # deleted since the listing
                    continue
                except OSError as error:
                    self._unread(prefix + name, error)
                    continue
                if kind is RECORDING:
                    files += 1
                elif kind is LEFT_OUT:
                    left_out += 1
                elif kind is _FOLDER:
                    below.append(name)
        contents = Contents(names, entries, files, left_out, tuple(below))
        if self._doubts() == doubts:
            self._folders.listed(path, stamp, _stamp(os.fstat(folder)), contents, began)
        else:
            self._folders.forget(path)
        return contents

    def _doubts(self) -> int:
        """What has to be told again after the next scan must be found again by it."""
        return len(self.result.hidden) + len(self.result.skipped)

    def _entry(self, entry: os.DirEntry[str], path: bytes) -> str:
        """What an entry is; a recording goes into the batch. Raises OSError."""
        names, name = self._rules.names, entry.name
        kind = names.kind(name)
        if name.endswith(PROFILE) and entry.is_file(follow_symlinks=False):
            self.result.profiles[path] = entry_of(path, entry.stat(follow_symlinks=False))
        elif kind is IGNORED or (names.has_paths and names.ignored_path(path)):
            pass
        elif entry.is_file(follow_symlinks=False):
            if kind is LEFT_OUT:
                return LEFT_OUT
            if len(path) <= PATH_BYTES_MAX:
                self._note(path, entry.stat(follow_symlinks=False))
                return RECORDING
            self.result.skipped[path] = f"its path is longer than {PATH_BYTES_MAX} bytes"
        elif entry.is_dir(follow_symlinks=False) and self._rules.recursive and path not in self._rules.excluded:
            return _FOLDER
        return _NOTHING

    def _look_at_singles(self, folder: int, path: bytes) -> None:
        """Look at the files that are asked for; where one is away, the next walk lists its folder."""
        for name in self._singles.get(path, ()):
            whole = path + b"/" + name if path else name
            try:
                found = os.stat(name, dir_fd=folder, follow_symlinks=False)
            except OSError:
                self._folders.forget(path)
                continue
            if is_profile(name):
                self.result.profiles[whole] = entry_of(whole, found)
            elif stat.S_ISREG(found.st_mode):
                self._note(whole, found)

    def _note(self, path: bytes, found: os.stat_result) -> None:
        self._batch.append(entry_of(path, found))
        if len(self._batch) >= BATCH:
            self._hand_over()

    def _hand_over(self) -> None:
        batch, self._batch = self._batch, []
        self._take(batch, self.result.dev)

    def _pause(self) -> None:
        self._until_breath = BREATHE_EVERY
        self._breathe()

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
            found = os.fstat(below)
            if found.st_dev != self.result.dev:
                self.result.skipped[path] = "another filesystem is mounted there; make it an inbox of its own"
            else:
                self._folder(below, path, depth + 1, found)
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


_NOTHING, _FOLDER = "nothing", "folder"


def _has_marker(folder: int) -> bool:
    try:
        os.stat(SKIP_MARKER, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _stamp(found: os.stat_result) -> Stamp:
    return Stamp(found.st_ino, found.st_mtime_ns, found.st_ctime_ns)
