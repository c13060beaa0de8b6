"""source: open a settled file for an engine, beneath the inbox and nowhere else.

Owns: the walk from the inbox to a file. Each component is opened by the descriptor of the one above with O_NOFOLLOW, and no directory may
lie on another device: that is what openat2's RESOLVE_BENEATH, RESOLVE_NO_SYMLINKS and RESOLVE_NO_XDEV promise, without ctypes and on
any kernel. (The device of the file itself is not compared: overlayfs gives files other device numbers than directories.)
Fails with `SourceGone`, `SourceChanged`, `SourceDenied`, `SourceDown`; each carries the wire's reason.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import ClassVar

from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import Sighting

ROOT_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC  # the inbox itself may be a symbolic link: the operator named it
FOLDER_FLAGS = ROOT_FLAGS | os.O_NOFOLLOW
FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_INT64_MAX = (1 << 63) - 1

Entry = tuple[bytes, int, int, int, int]
"""path, inode, size, mtime_ns, ctime_ns of one file: what a scan makes very many of."""


class CannotOpen(WhisperdError):
    """A settled file cannot be given to an engine."""

    code = "source"
    reason: ClassVar[str] = "down"


class SourceGone(CannotOpen):
    """It is not there any more, or no longer a regular file of the inbox."""

    code = "source_gone"
    reason = "gone"


class SourceChanged(CannotOpen):
    """Another content lies under its name: it has to settle again."""

    code = "source_changed"
    reason = "changed"
    recoverable = True


class SourceDenied(CannotOpen):
    """We may not read it."""

    code = "source_denied"
    reason = "denied"


class SourceDown(CannotOpen):
    """The inbox does not answer as it should; nothing is known of the file."""

    code = "source_down"
    reason = "down"
    recoverable = True


def sighting_of(path: bytes, found: os.stat_result, device: int) -> Sighting:
    """A file as seen. `device` is that of the inbox."""
    _, inode, size, mtime_ns, ctime_ns = entry_of(path, found)
    return Sighting(path=path, dev=device, inode=inode, size=size, mtime_ns=mtime_ns, ctime_ns=ctime_ns)


def entry_of(path: bytes, found: os.stat_result) -> Entry:
    """A file as the ledger can hold it: some network filesystems have inodes of 64 bits, some files times beyond the year 2262."""
    inode, mtime_ns, ctime_ns = found.st_ino, found.st_mtime_ns, found.st_ctime_ns
    if inode > _INT64_MAX:
        inode -= 1 << 64
    if not (-_INT64_MAX <= mtime_ns <= _INT64_MAX and -_INT64_MAX <= ctime_ns <= _INT64_MAX):
        mtime_ns, ctime_ns = (max(-_INT64_MAX, min(_INT64_MAX, time_ns)) for time_ns in (mtime_ns, ctime_ns))
    return path, inode, found.st_size, mtime_ns, ctime_ns


def open_beneath(root: int, path: bytes) -> int:
    """A read-only descriptor of the regular file `path` below the directory `root`. Raises OSError; ENOENT for what we would not enter."""
    *folders, name = path.split(b"/")
    device = os.fstat(root).st_dev
    folder = os.dup(root)
    try:
        for part in folders:
            below = os.open(_plain(part), FOLDER_FLAGS, dir_fd=folder)
            os.close(folder)
            folder = below
            if os.fstat(folder).st_dev != device:
                raise OSError(errno.ENOENT, "another filesystem is mounted over its folder")
        # Opening a device or a pipe can have effects of its own, so look first; what slips in between is refused by the caller's fstat.
        if not stat.S_ISREG(os.stat(_plain(name), dir_fd=folder, follow_symlinks=False).st_mode):
            raise OSError(errno.ENOENT, "it is not a regular file any more")
        return os.open(name, FILE_FLAGS, dir_fd=folder)
    finally:
        os.close(folder)


def _plain(part: bytes) -> bytes:
    if part in (b"", b".", b".."):
        raise OSError(errno.ENOENT, "its path leaves the inbox")
    return part


def open_source(root: bytes, sighting: Sighting) -> int:
    """Open the file of `sighting` if it still is that file. The caller owns the descriptor. Raises CannotOpen (one of its four kinds)."""
    name = printable(sighting.path)
    try:
        top = os.open(root, ROOT_FLAGS)
    except OSError as error:
        raise SourceDown(f"cannot open {name}: the inbox cannot be opened: {error.strerror}") from error
    try:
        descriptor = open_beneath(top, sighting.path)
    except OSError as error:
        raise _refusal(name, error, remounted=_device(top) != sighting.dev) from error
    finally:
        os.close(top)
    try:
        _check(name, os.fstat(descriptor), sighting)
        os.set_blocking(descriptor, True)
    except OSError as error:
        os.close(descriptor)
        raise _refusal(name, error, remounted=False) from error
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _device(top: int) -> int | None:
    """None when the inbox itself does not answer: it is not the device that it was, either."""
    try:
        return os.fstat(top).st_dev
    except OSError:
        return None


def _check(name: str, found: os.stat_result, sighting: Sighting) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise SourceGone(f"cannot open {name}: it is not a regular file any more")
    if not sighting_of(sighting.path, found, sighting.dev).same_content(sighting):
        raise SourceChanged(f"cannot use {name}: it has changed since it settled", hint="it is taken up again when it has settled anew")


def _refusal(name: str, error: OSError, *, remounted: bool) -> CannotOpen:
    """Which of the four an error of the walk means."""
    what = f"cannot open {name}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
        if remounted:
            return SourceDown(f"{what}, and the inbox is on another device than before", hint="is the share mounted?")
        return SourceGone(what)
    if error.errno in (errno.EACCES, errno.EPERM):
        return SourceDenied(what, hint="let the user that runs whisperd read the file and enter its folders")
    return SourceDown(what)
