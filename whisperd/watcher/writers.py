"""writers: whether somebody still writes to a file.

Owns: the lease test. A read lease (fcntl F_SETLEASE) is refused with EAGAIN while any process of this machine has the file open for
writing; it is asked for and given back at once. Not asked on network filesystems: NFS and SMB refuse every lease that way.
Fails open: where the kernel gives no answer (another's file without CAP_LEASE, a filesystem without leases) the quiet period decides.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal

from msgspec import structs

from whisperd.vocabulary import Sighting
from whisperd.watcher.source import ROOT_FLAGS, open_beneath, sighting_of


def ignore_lease_signals() -> None:
    """A writer that comes while we hold a lease makes the kernel send SIGIO, which would end the process."""
    signal.signal(signal.SIGIO, signal.SIG_IGN)


def still_written(root: bytes, sighting: Sighting, *, leases: bool) -> bool:
    """Whether a file whose quiet period is over must wait on: a writer has it open, or it is not as the scan saw it.

    Opening is worth its price on a share, too: NFS looks at the server again when a file is opened, a scan may be told old news.
    """
    try:
        top = os.open(root, ROOT_FLAGS)
    except OSError:
        return True
    try:
        descriptor = open_beneath(top, sighting.path)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EPERM)  # unreadable: it settles, and the job says why it cannot be opened
    finally:
        os.close(top)
    try:
        found = sighting_of(sighting.path, os.fstat(descriptor), sighting.dev)
        inode = found.inode if leases else sighting.inode  # some network filesystems number a file anew whenever it is opened
        changed = structs.replace(found, inode=inode) != sighting
        return changed or (leases and _lease_refused(descriptor))
    except OSError:  # the share went away under it: nothing is known
        return True
    finally:
        os.close(descriptor)


def _lease_refused(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError as error:
        return error.errno == errno.EAGAIN
    return False
