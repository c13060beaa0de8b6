"""failures: why something could not be published or put away, as named errors with a kind, a sentence and what to do.

Owns: `Unpublished` and its kinds, and the table that tells what an errno means for an outbox.
An absent, full or denied outbox is waited for (P5): such a failure spends no attempt.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar

from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import Failure, FailureKind


class Unpublished(WhisperdError):
    """Base of every reason why a publication did not happen. `advice` is the hint when nothing better is known.

    `where` is the directory it was met in: the outbox, or the inbox or archive of a disposal. It takes its place in the code.
    """

    kind: ClassVar[FailureKind] = FailureKind.PERMANENT
    advice: ClassVar[str] = ""

    def __init__(self, what: str, *, hint: str = "") -> None:
        super().__init__(what, hint=hint or self.advice)
        self.where = ""

    def failure(self) -> Failure:
        """The same, as it travels to the daemon."""
        return Failure(kind=self.kind, code=self.code.replace("outbox", self.where or "outbox"), what=self.what, hint=self.hint)


# --- the request itself --------------------------------------------------------------------------------------------------------


class NameTaken(Unpublished):
    """Somebody else's file, or one that a user edited, stands at the name."""

    code = "name_taken"
    recoverable = True
    kind = FailureKind.TRANSIENT
    advice = "it was left as it is; the transcript goes under another name"


class UnknownFormat(Unpublished):
    """A format that no renderer makes."""

    code = "unknown_format"


class BadName(Unpublished):
    """A name that would lead out of the outbox."""

    code = "bad_name"
    advice = "this is a fault in whisperd, please report it"


class NameRefused(Unpublished):
    """The filesystem of the outbox cannot carry this name."""

    code = "name_refused"
    advice = "its filesystem does not take such a name: rename the recording, or move the outbox to another filesystem"


class StagedBroken(Unpublished):
    """The staged transcript is not what an engine of ours wrote."""

    code = "staged_broken"
    advice = "check the disk that holds state_dir, then transcribe the recording again with `whisperd retry`"


# --- the outbox ----------------------------------------------------------------------------------------------------------------


class Waiting(Unpublished):
    """Base of what passes when somebody frees, mounts or permits something."""

    recoverable = True
    kind = FailureKind.WAITING


class OutboxFull(Waiting):
    code = "outbox_full"
    advice = "free some space or raise the quota; nothing is lost meanwhile, and it goes on as soon as there is room"


class OutboxReadOnly(Waiting):
    code = "outbox_read_only"
    advice = "mount it writable, or name it in ReadWritePaths= of the unit; if it became read-only by itself, look for disk errors"


class OutboxDenied(Waiting):
    code = "outbox_denied"
    advice = "allow the user of whisperd to write in that directory (owner, mode, ACL, export options of the share)"


class OutboxAbsent(Waiting):
    code = "outbox_absent"
    advice = "mount the share or make the directory; nothing is lost meanwhile, and it goes on when it is back"


class FolderGone(OutboxAbsent):
    """A sub-directory is not there, and was not to be made."""


class OutboxBlocked(Waiting):
    """Something that is not a directory, or a symbolic link, stands where a sub-directory belongs."""

    code = "outbox_blocked"
    advice = "move it away: whisperd follows no symbolic link there"


class OutboxTrouble(Waiting):
    """Any other error of the filesystem."""

    code = "outbox_io"
    advice = "look for errors of this disk or share in the kernel log; it is tried again by itself"


_BY_ERRNO: dict[int, type[Unpublished]] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), OutboxFull),
    errno.EROFS: OutboxReadOnly,
    **dict.fromkeys((errno.EACCES, errno.EPERM), OutboxDenied),
    **dict.fromkeys((errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL), NameRefused),
    **dict.fromkeys((errno.ENOENT, errno.ENODEV, errno.ENXIO, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN), OutboxAbsent),
    **dict.fromkeys((errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH), OutboxAbsent),
    **dict.fromkeys((errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET), OutboxAbsent),
    **dict.fromkeys((errno.ENOTDIR, errno.ELOOP), OutboxBlocked),
}


def explain(error: OSError, deed: str, path: bytes) -> Unpublished:
    """What an error of the operating system means for whoever waits for a transcript."""
    meaning = _BY_ERRNO.get(error.errno or 0, OutboxTrouble)
    return meaning(f"cannot {deed} {printable(path)}: {(error.strerror or type(error).__name__).lower()}")


@contextmanager
def met_in(where: str) -> Iterator[None]:
    """Let what fails inside say that it was the inbox or the archive. The innermost knows best."""
    try:
        yield
    except Unpublished as error:
        error.where = error.where or where
        raise


@contextmanager
def attempting(deed: str, path: bytes) -> Iterator[None]:
    """Give every OSError inside the name of what was attempted, and on what."""
    try:
        yield
    except OSError as error:
        raise explain(error, deed, path) from error
