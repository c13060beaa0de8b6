"""owner: to whom what is made in the outbox belongs, and with which mode.

Owns: the giving away of one open file or directory, what of that is refused, and the words for it. A filesystem that keeps no owners, or no
right to change them, stops no publication. Fails with OSError where the filesystem itself does.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
from collections.abc import Callable
from typing import NamedTuple

from whisperd.errors import printable

CANNOT_OWN = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)


class Owner(NamedTuple):
    """To whom new things are given; -1 leaves it as it is. `firm`: the group was named, so that no setgid folder has its way."""

    uid: int = -1
    gid: int = -1
    firm: bool = False


Refused = Callable[[Owner], None]
"""Told what of an owner could not be had; nothing of it (-1) where all could."""


def no_matter(refused: Owner) -> None:
    """An owner that nobody named is a courtesy."""


def owner_like(path: bytes) -> Owner | None:
    """The owner and group of a directory; only root can give things away, anybody can try the group. None when it is absent."""
    try:
        known = os.stat(path)
    except OSError:  # asked again with the next request; until then, what we make is simply ours
        return None
    return Owner(known.st_uid if os.geteuid() == 0 else -1, known.st_gid)


def hands_down_group(descriptor: int) -> bool:
    return bool(os.fstat(descriptor).st_mode & stat.S_ISGID)


def give(descriptor: int, owner: Owner, mode: int, *, inherits: bool) -> Owner:
    """Mode, owner, and what of the mode the change of owner cleared. A setgid parent has already chosen the group and keeps its bit.

    The mode comes first: what was given away may not be ours to change any more. Returns what was refused of the owner: by vfat, CIFS
    and squashed NFS, which keep their own idea of owners, or for want of the right to.
    """
    gid = -1 if inherits and not owner.firm else owner.gid
    _set_mode(descriptor, mode)
    refused = _set_owner(descriptor, owner.uid, gid)
    _set_mode(descriptor, mode)
    return refused


def _set_owner(descriptor: int, uid: int, gid: int) -> Owner:
    """Both or, where that is refused, the one of them that can be had. What could not is returned."""
    if (uid, gid) == (-1, -1):
        return Owner()
    try:
        os.fchown(descriptor, uid, gid)
        return Owner()
    except OSError as error:
        if error.errno not in CANNOT_OWN:
            raise
    if uid < 0 or gid < 0:
        return Owner(uid, gid)
    return Owner(uid, _set_owner(descriptor, -1, gid).gid)


def _set_mode(descriptor: int, mode: int) -> None:
    known = os.fstat(descriptor).st_mode
    try:
        if stat.S_IMODE(known) != mode | (known & stat.S_ISGID):
            os.fchmod(descriptor, mode | (known & stat.S_ISGID))
    except OSError as error:  # such filesystems have their own idea of modes, too
        if error.errno not in CANNOT_OWN:
            raise


def _user(uid: int) -> str:
    if uid < 0:
        return ""
    try:
        return printable(pwd.getpwuid(uid).pw_name)
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    if gid < 0:
        return ""
    try:
        return printable(grp.getgrgid(gid).gr_name)
    except KeyError:
        return str(gid)


def complaint(uid: int, gid: int) -> str:
    """To whom something cannot be given (-1: that one can be had, or was not asked for), and what to do about it."""
    asked = [(key, kind, name) for key, kind, name in (("`owner`", "user", _user(uid)), ("`group`", "group", _group(gid))) if name]
    named = " and ".join(f"to {kind} {name}" for _, kind, name in asked)
    member = "" if gid < 0 else "make the user that runs whisperd a member of that group, or "
    return (
        f"{named}: this takes the right to change owners, and a filesystem that keeps them. It is published all the same; {member}give the"
        " service CAP_CHOWN (CapabilityBoundingSet= and AmbientCapabilities= in a drop-in of its unit),"
        f" or remove {' and '.join(key for key, _, _ in asked)} from [outbox]"
    )
