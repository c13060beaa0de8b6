"""place: the outbox as directories, held open.

Owns: making the outbox and its sub-tree, and the few effects on one open directory. (Owner and mode of what is made: `owner`.)
Nothing is reached by a path that somebody could bend: each step is a descriptor, and below the outbox no symbolic link is followed.
Fails with the errors of `failures`; above all, an outbox whose share went away is absent, and is not made anew below the mount point.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from loguru import logger

from whisperd.errors import printable
from whisperd.outbox.failures import FolderGone, OutboxAbsent, OutboxBlocked, attempting
from whisperd.outbox.owner import Owner, Refused, complaint, give, hands_down_group, no_matter, owner_like
from whisperd.wire import ServeOutbox

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_LOOK = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_FRESH = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ_BYTES = 1 << 20

CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
CANNOT_RENAME_SO = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
CANNOT_LINK = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL)
UNREADABLE = (errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO)

FOREIGN = "foreign"
"""What `Folder.observe` says of something that cannot be a file of ours."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One open directory of the outbox. `path` is only for sentences."""

    descriptor: int
    path: bytes
    owner: Owner
    file_mode: int
    refused: Refused = no_matter

    def full(self, name: bytes) -> bytes:
        return self.path + b"/" + name

    def observe(self, name: bytes, *, size: int | None) -> str | None:
        """The sha256 of what stands at a name, None when nothing does, FOREIGN when it cannot be ours.

        With `size`, a file of another size is not read.
        """
        with attempting("look at", self.full(name)):
            try:
                descriptor = open_file(self.descriptor, name)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno not in UNREADABLE:
                    raise
                os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)  # a folder we may not enter is another matter
                return FOREIGN
            with closing(descriptor):
                return digest(descriptor, size=size)

    def write(self, temporary: bytes, content: bytes, *, meant_for: bytes) -> None:
        """A new file, whole and durable, that will be `meant_for`. What an earlier run left at the temporary name is never
        written to: it may be a second name of a published file."""
        with attempting("write", self.full(meant_for)), closing(self._create(temporary)) as descriptor:
            self.refused(give(descriptor, self.owner, self.file_mode, inherits=hands_down_group(self.descriptor)))
            _write_all(descriptor, content)
            _sync(descriptor)

    def copy(self, source: int, temporary: bytes, *, meant_for: bytes) -> None:
        """The same for a copy of an open file, with its mode, its time, and its owner where that can be had."""
        known = os.fstat(source)
        with attempting("copy to", self.full(meant_for)), closing(self._create(temporary)) as descriptor:
            give(descriptor, Owner(known.st_uid, known.st_gid, firm=True), stat.S_IMODE(known.st_mode), inherits=False)
            for data in _read(source):
                _write_all(descriptor, data)
            os.utime(descriptor, ns=(known.st_atime_ns, known.st_mtime_ns))
            _sync(descriptor)

    def _create(self, name: bytes) -> int:
        try:
            return os.open(name, _FRESH, 0o600, dir_fd=self.descriptor)
        except FileExistsError:
            self.discard(name)
            return os.open(name, _FRESH, 0o600, dir_fd=self.descriptor)

    def settle_at(self, temporary: bytes, name: bytes) -> bool:
        """Give a finished file its name, and say False rather than take the place of something that appeared there."""
        with attempting("publish", self.full(name)):
            try:
                os.link(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor, follow_symlinks=False)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in CANNOT_LINK:
                    raise
                return move(self.descriptor, temporary, self.descriptor, name)
            self.discard(temporary)
            return True

    def replace(self, temporary: bytes, name: bytes) -> None:
        """Put a finished file in the place of an older one of ours."""
        with attempting("replace", self.full(name)):
            os.rename(temporary, name, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def discard(self, name: bytes) -> None:
        """Remove a file; one that is not there is as good."""
        with attempting("remove", self.full(name)):
            try:
                os.unlink(name, dir_fd=self.descriptor)
            except FileNotFoundError:
                pass

    def sync(self) -> None:
        """Make the names in this directory durable, where the filesystem can."""
        with attempting("make durable", self.path):
            _sync(self.descriptor)


class Outbox:
    """The outbox as the daemon described it. Holds no descriptor between two requests, so that a share can be unmounted."""

    def __init__(self, terms: ServeOutbox) -> None:
        self.path = os.path.normpath(terms.path)
        self._terms = terms
        self._like: Owner | None = None
        self._device_above: int | None = None
        self._was_mounted = False
        self._complained = False
        self.unsure: set[bytes] = set()

    @contextmanager
    def folder(self, parts: tuple[bytes, ...] = (), *, make: bool = True) -> Iterator[Folder]:
        """The directory `parts` below the outbox, open. Raises FolderGone when it is absent and not to be made."""
        folder = self._open_root()
        try:
            for part in parts:
                below = self._step(folder, part, make)
                os.close(folder.descriptor)
                folder = below
            yield folder
        finally:
            os.close(folder.descriptor)

    def _folder(self, descriptor: int, path: bytes) -> Folder:
        return Folder(descriptor, path, self._owner(), self._terms.file_mode, self._refused)

    def _owner(self) -> Owner:
        """As the settings name it, else as the inbox has it."""
        uid, gid, like = self._terms.uid, self._terms.gid, self._like or Owner()
        return Owner(like.uid if uid < 0 else uid, like.gid if gid < 0 else gid, firm=gid >= 0)

    def _refused(self, refused: Owner) -> None:
        """Say once that the owner or group that the settings name cannot be given; what is published is published all the same."""
        uid = refused.uid if self._terms.uid >= 0 else -1
        gid = refused.gid if self._terms.gid >= 0 else -1
        if not self._complained and (uid, gid) != (-1, -1):
            self._complained = True
            logger.warning(f"cannot give what is published in {printable(self.path)} {complaint(uid, gid)}")

    # --- the outbox itself ---

    def _open_root(self) -> Folder:
        self._like = self._like or owner_like(self._terms.like)
        with attempting("open the outbox", self.path):
            try:
                descriptor = open_root(self.path)
            except FileNotFoundError:
                descriptor = self._make_root()
            try:
                self._know_mount(descriptor)
            except BaseException:
                os.close(descriptor)
                raise
        return self._folder(descriptor, self.path)

    def _know_mount(self, descriptor: int) -> None:
        """Remember whether the outbox is a mount point: if it is none later on, what is there now is the bare directory below."""
        above = os.stat(b"..", dir_fd=descriptor).st_dev
        mounted = os.fstat(descriptor).st_dev != above
        if self._was_mounted and not mounted:
            raise OutboxAbsent(f"cannot publish in {printable(self.path)}: it is no longer mounted")
        self._device_above, self._was_mounted = above, mounted

    def _make_root(self) -> int:
        """Make the outbox, unless its share seems to be away: the inbox is missing too, or its parent is another filesystem now."""
        if not os.path.isdir(self._terms.like):
            raise OutboxAbsent(f"cannot make the outbox {printable(self.path)}: {printable(self._terms.like)} is not there either")
        with closing(open_root(os.path.dirname(self.path))) as above:
            if self._device_above not in (None, os.fstat(above).st_dev):
                raise OutboxAbsent(f"cannot publish in {printable(self.path)}: its filesystem is no longer mounted")
            return self._make(above, os.path.basename(self.path))

    # --- below it ---

    def _step(self, above: Folder, name: bytes, make: bool) -> Folder:
        path = above.full(name)
        with attempting("open the folder", path):
            try:
                return self._folder(open_below(above.descriptor, name), path)
            except FileNotFoundError:
                if not make:
                    raise FolderGone(f"cannot open the folder {printable(path)}: it is not there") from None
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                raise OutboxBlocked(f"cannot publish below {printable(path)}: it is a symbolic link or a file") from error
        with attempting("make the folder", path):
            return self._folder(self._make(above.descriptor, name), path)

    def _make(self, above: int, name: bytes) -> int:
        try:
            os.mkdir(name, self._terms.directory_mode, dir_fd=above)
        except FileExistsError:  # somebody else made it a moment ago: then it is theirs
            return open_below(above, name)
        descriptor = open_below(above, name)
        try:
            self._refused(give(descriptor, self._owner(), self._terms.directory_mode, inherits=hands_down_group(above)))
            _sync(above)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def open_root(path: bytes) -> int:
    """A directory that an operator named, so that it may be a symbolic link."""
    return os.open(path, _DIRECTORY)


def open_below(above: int, name: bytes) -> int:
    return os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=above)


def open_file(above: int, name: bytes) -> int:
    return os.open(name, _LOOK, dir_fd=above)


@contextmanager
def closing(descriptor: int) -> Iterator[int]:
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# --- moving --------------------------------------------------------------------------------------------------------------------

_RENAME_NOREPLACE = 1


def move(source: int, name: bytes, target: int, new: bytes) -> bool:
    """Move a file between two open directories of one mount, and say False rather than take the place of something. Raises OSError.

    In one step where the filesystem can; by a second name that is taken away again where it cannot (NFS); and where there are no hard
    links either (some FUSE ones), look, then rename.
    """
    try:
        _rename_noreplace(source, name, target, new)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in CANNOT_RENAME_SO:
            raise
    try:
        os.link(name, new, src_dir_fd=source, dst_dir_fd=target, follow_symlinks=False)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in CANNOT_LINK:
            raise
        return _look_then_rename(source, name, target, new)
    os.unlink(name, dir_fd=source)
    return True


def _look_then_rename(source: int, name: bytes, target: int, new: bytes) -> bool:
    try:
        os.stat(new, dir_fd=target, follow_symlinks=False)
    except FileNotFoundError:
        os.rename(name, new, src_dir_fd=source, dst_dir_fd=target)
        return True
    return False


def _rename_noreplace(source: int, name: bytes, target: int, new: bytes) -> None:
    """renameat2(2), which Python does not have. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    number = errno.ENOSYS
    if renameat2 is not None:
        if renameat2(source, name, target, new, _RENAME_NOREPLACE) == 0:
            return
        number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


# --- bytes ---------------------------------------------------------------------------------------------------------------------


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:  # some network and FUSE filesystems cannot: then their own promise is all there is
        if error.errno not in CANNOT_SYNC:
            raise


def _write_all(descriptor: int, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[os.write(descriptor, left) :]


def digest(descriptor: int, *, size: int | None) -> str:
    """The sha256 of an open file, FOREIGN for what is no file or has another size."""
    known = os.fstat(descriptor)
    if not stat.S_ISREG(known.st_mode) or size not in (None, known.st_size):
        return FOREIGN
    sha256 = hashlib.sha256()
    for data in _read(descriptor):
        sha256.update(data)
    return sha256.hexdigest()


def _read(descriptor: int) -> Iterator[bytes]:
    """From the first byte, wherever an earlier reader stopped."""
    position = 0
    while data := os.pread(descriptor, _READ_BYTES, position):
        yield data
        position += len(data)
