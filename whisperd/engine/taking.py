"""taking: the content of a recording read once, in a thread of its own: hashed, and from a share copied to the local disk on the way.

Owns: `Taker`, which does one job after the other, and what it writes: `<spool>/<job>` is whole and durable, or absent; a copy under way is
`<spool>/<job>.partial`. Nothing is decoded here. Fails, for one job at a time, with a `TakingFailed`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
import threading
from collections import deque
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from loguru import logger

from whisperd.errors import WhisperdError
from whisperd.vocabulary import Failure, FailureKind

BLOCK_BYTES = 1 << 20
MIB = 1 << 20
SYNCED_BYTES = 256 * MIB  # a copy goes to the disk in such parts: all of it at the end would look like a share that hangs
PARTIAL = ".partial"


class TakingFailed(WhisperdError):
    """Base of why a content could not be taken. All of it may pass."""

    recoverable = True
    kind: ClassVar[FailureKind] = FailureKind.WAITING

    def failure(self) -> Failure:
        """The same, as it travels to the daemon."""
        return Failure(kind=self.kind, code=self.code, what=self.what, hint=self.hint)


class ChangedWhileRead(TakingFailed):
    """What was read is not one file: its size, times or inode moved meanwhile."""

    code = "changed_while_read"
    kind = FailureKind.TRANSIENT


class SourceUnreadable(TakingFailed):
    """The share or disk of the source does not give it."""

    code = "source_unreadable"


class SpoolFull(TakingFailed):
    """There is no room for a copy on the local disk."""

    code = "spool_full"


class SpoolUnusable(TakingFailed):
    """The local disk does not take a copy for another reason."""

    code = "spool_unusable"


class Dropped(TakingFailed):
    """The job is no longer wanted."""

    code = "dropped"
    kind = FailureKind.TRANSIENT


class Errand(NamedTuple):
    """A source to take. `copy` is where, "" for nowhere; the descriptor is the taker's."""

    job: int
    descriptor: int
    copy: str
    free_min_mib: int


class Outcome(NamedTuple):
    """How it ended: a digest, or why there is none."""

    errand: Errand
    sha256: str = ""
    error: TakingFailed | None = None


class Taker:
    """The reading thread. `fileno()` is readable when there is an outcome."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[Errand] = deque()
        self._reading: Errand | None = None
        self._unwanted = False  # what is being read
        self._stopping = False
        self._outcomes: deque[Outcome] = deque()
        self._done_bytes = 0
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="taker", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._news

    def add(self, errand: Errand) -> None:
        with self._changed:
            self._waiting.append(errand)
            self._changed.notify()

    def progress(self) -> tuple[int, int] | None:
        """The job that is read now, or next, and how much of it was; None when there is nothing to do."""
        with self._changed:
            if self._reading is not None:
                return self._reading.job, self._done_bytes
            return (self._waiting[0].job, 0) if self._waiting else None

    def outcomes(self) -> list[Outcome]:
        """What ended since the last call. Clears the news."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._news)
        with self._changed:
            ended, self._outcomes = list(self._outcomes), deque()
            return ended

    def outcome(self, errand: Errand) -> Outcome:
        """Read one content to its end, in whatever thread this is called; nobody else may read meanwhile."""
        try:
            return Outcome(errand, sha256=self._take(errand))
        except TakingFailed as error:
            return Outcome(errand, error=error)

    def drop(self, job: int) -> None:
        """This job is not wanted any more: its turn does not come, or ends at the next block."""
        with self._changed:
            if self._reading is not None and self._reading.job == job:
                self._unwanted = True
            for errand in [errand for errand in self._waiting if errand.job == job]:
                self._waiting.remove(errand)
                self._end(errand, Outcome(errand, error=_dropped()))

    def stop(self) -> None:
        """End at once, and leave nothing half done."""
        with self._changed:
            self._stopping = self._unwanted = True
            self._changed.notify()
        self._thread.join(timeout=0.5)
        reading = self._reading
        if self._thread.is_alive() and reading is not None and reading.copy:
            remove(reading.copy + PARTIAL)  # a read from a dead share does not come back; the process ends all the same

    def _work(self) -> None:
        try:
            while (errand := self._next()) is not None:
                outcome = self.outcome(errand)
                with self._changed:
                    if self._unwanted and errand.copy:  # too late for a block to notice
                        remove(errand.copy)
                    self._reading = None
                    self._end(errand, outcome)
        except Exception as error:  # noqa: BLE001 - whatever it is: an examiner that takes nothing must not look alive
            logger.opt(exception=error).error("unexpected error while a recording was read")
            os._exit(1)

    def _next(self) -> Errand | None:
        with self._changed:
            while not self._stopping:
                if self._waiting:
                    self._reading, self._unwanted, self._done_bytes = self._waiting.popleft(), False, 0
                    return self._reading
                self._changed.wait()
            return None

    def _end(self, errand: Errand, outcome: Outcome) -> None:
        os.close(errand.descriptor)
        self._outcomes.append(outcome)
        os.eventfd_write(self._news, 1)

    def _take(self, errand: Errand) -> str:
        if not errand.copy:
            return self._hash(errand, None)
        with copying(errand) as copy:
            return self._hash(errand, copy)

    def _hash(self, errand: Errand, copy: Copy | None) -> str:
        """Read all of it, by position: the descriptor's offset is shared with others. Raises TakingFailed."""
        digest = hashlib.sha256()
        with reading():
            before = identity_of(errand.descriptor)
            os.posix_fadvise(errand.descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        if copy is not None:
            copy.need_room(before.st_size)
        while block := self._block(errand.descriptor, before.st_size):
            digest.update(block)
            if copy is not None:
                copy.write(block)
            self._done_bytes += len(block)
        with reading():
            after = identity_of(errand.descriptor)
        if after != before or self._done_bytes != before.st_size:
            raise ChangedWhileRead("the file changed while it was read", hint="it will be taken again once it is settled")
        if self._unwanted:
            raise _dropped()
        return digest.hexdigest()

    def _block(self, descriptor: int, size: int) -> bytes:
        """The next block; nothing at the end, nor past the size that the file had: one that grows need not be read further."""
        if self._unwanted:
            raise _dropped()
        with reading():
            return os.pread(descriptor, BLOCK_BYTES, self._done_bytes) if self._done_bytes <= size else b""


# --- the source ----------------------------------------------------------------------------------------------------------------


class Identity(NamedTuple):
    """What is the same as long as nobody touches a file."""

    st_dev: int
    st_ino: int
    st_size: int
    st_mtime_ns: int
    st_ctime_ns: int


def identity_of(descriptor: int) -> Identity:
    """Raises OSError, also for what cannot be read by position (a pipe)."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.ESPIPE, "not a regular file")
    return Identity(*(getattr(found, name) for name in Identity._fields))


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """What fails in here is the fault of the source's filesystem."""
    try:
        yield
    except OSError as error:
        raise unreadable(error) from error


def unreadable(error: OSError) -> SourceUnreadable:
    return SourceUnreadable(
        f"the file cannot be read: {error.strerror or type(error).__name__}",
        hint="is the share or the disk that holds it all right? See the kernel log",
    )


def _dropped() -> Dropped:
    return Dropped("the job is no longer wanted")


# --- the copy ------------------------------------------------------------------------------------------------------------------


class Copy:
    """A copy under way."""

    def __init__(self, descriptor: int, errand: Errand) -> None:
        self.descriptor = descriptor
        self._free_min_bytes = errand.free_min_mib * MIB
        self._unsynced_bytes = 0

    def need_room(self, more_bytes: int) -> None:
        """Raises SpoolFull where so much more would leave too little free."""
        found = os.fstatvfs(self.descriptor)
        if found.f_bavail * found.f_frsize - more_bytes < self._free_min_bytes:
            raise SpoolFull(
                f"there is no room for a copy of the recording ({more_bytes / MIB:.0f} MiB) in the spool",
                hint="free space on the disk that holds state_dir, or lower intake.free_min_mib",
            )

    def write(self, block: bytes) -> None:
        """Raises SpoolFull, OSError."""
        self.need_room(len(block))
        rest = memoryview(block)
        while rest:
            rest = rest[os.write(self.descriptor, rest) :]
        self._unsynced_bytes += len(block)
        if self._unsynced_bytes >= SYNCED_BYTES:
            os.fdatasync(self.descriptor)
            self._unsynced_bytes = 0


@contextlib.contextmanager
def copying(errand: Errand) -> Iterator[Copy]:
    """A copy that is whole and durable after the block, or not there. Raises TakingFailed."""
    partial = errand.copy + PARTIAL
    try:
        remove(errand.copy, partial)  # of an attempt that was killed
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            yield Copy(descriptor, errand)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(partial, errand.copy)
        fsync_directory(os.path.dirname(errand.copy))
    except OSError as error:
        remove(errand.copy, partial)
        raise unwritable(error) from error
    except BaseException:
        remove(partial)
        raise


def unwritable(error: OSError) -> TakingFailed:
    """What an error of the local disk means."""
    why = error.strerror or type(error).__name__
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SpoolFull(
            f"there is no room for a copy of the recording in the spool: {why}", hint="free space on the disk that holds state_dir"
        )
    return SpoolUnusable(f"the recording cannot be copied to the spool: {why}", hint="check the disk that holds state_dir")


def remove(*paths: str) -> None:
    """What is there of these; a disk that does not even remove will be told of by what is tried next."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.unlink(path)


def fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
