"""disposal: what becomes of a recording once its transcript is durable: archived or deleted, and only if it still is that recording.

Owns: the identity check, the private name under which a source is held meanwhile, and the order of effects. The source is entered from
the inbox downwards by descriptors; no symbolic link is followed and no other filesystem entered. It is first taken to its private name
(`.whisperd-<job>.source-<mark>.tmp`; every watcher ignores it) and looked at once more: what was put at its name a moment before is given
back, and never lost. Cut off anywhere, the source is whole at its own name, at the private one, or in the archive; the same request
again finishes it, and then it is at one place.

The profile of the recording (`NAME.whisperd.toml`) goes the same way. It is taken to a private name (`.profile-`) once the source
is at its, and given back before the source is: one that is found there alone is one whose source was put away. A profile that another
recording of that name may need by now stays; so do the profiles of folders.

The same recording means the same size, mtime, inode and ctime. The device is no part of it, since a remount changes that. The ctime is:
it alone tells of a file that was rewritten in place with its size and mtime restored. Where only some of these differ (a chmod, a share
that makes up its inodes), the content decides, if its sha256 is known. Our own renames change the ctime too, so a source that had to be
given back is remembered.
Fails with the errors of `failures`, which then speak of the inbox or the archive.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from whisperd.errors import printable
from whisperd.outbox.archive import PROFILE, Held, Shelf, content_of, copied, kept_as, shelve, shelve_beside
from whisperd.outbox.failures import FolderGone, OutboxAbsent, Unpublished, attempting, met_in
from whisperd.outbox.names import NAME_BYTES_MAX, components, temporary
from whisperd.outbox.owner import Owner
from whisperd.outbox.place import Folder, Outbox, closing, open_below, open_file, open_root
from whisperd.vocabulary import Sighting
from whisperd.wire import Dispose, ServeOutbox

ARCHIVED, DELETED, GONE, CHANGED = "archived", "deleted", "gone", "changed"

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_INT64_MAX = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Source(Held):
    """A recording, and the profile beside it (none where its name would be too long for one)."""

    sighting: Sighting
    profile: Held | None

    def give_back(self) -> None:
        """Its profile before itself, so that one that is found alone is known to be left over."""
        if self.profile is not None and self.profile.is_hidden():
            self.profile.give_back()
        Held.give_back(self)

    def is_it(self, found: os.stat_result) -> bool:
        """Whether this is the file of the sighting, as far as a rename of ours leaves it alone."""
        wanted = self.sighting
        same = (found.st_size, _in_int64(found.st_mtime_ns), found.st_ino) == (wanted.size, wanted.mtime_ns, wanted.inode)
        return stat.S_ISREG(found.st_mode) and same

    def take_profile(self) -> None:
        """Bring the profile under its private name, unless it is by now that of another recording. The source is under its own already."""
        if self.profile is None:
            return
        if self.profile.is_hidden():  # by a run that was cut off
            if self.profile.has_both_names():
                self.profile.folder.discard(self.profile.name)
            return
        found = self.profile.known(self.profile.name)
        if found is not None and stat.S_ISREG(found.st_mode) and self.known(self.name) is None:
            self.profile.take(found)


class Disposal:
    """Disposes of sources. Remembers archives, so that one whose share went away is absent, and what it had to give back."""

    def __init__(self, terms: ServeOutbox) -> None:
        self._terms = terms
        self._archives: dict[bytes, Outbox] = {}
        self._given_back: dict[tuple[int, int], int] = {}  # (dev, inode) → ctime

    def dispose(self, request: Dispose) -> str:
        """Put one source away; the wire's word for how. Raises Unpublished."""
        *parents, name = components(request.sighting.path)
        try:
            with met_in("inbox"), _entered(request, parents) as folder:
                source = Source(folder, name, hidden_name(request), request.sighting, _profile_of(request, folder, name))
                if source.profile is not None and source.profile.is_hidden() and not source.is_hidden():
                    self._finish(request, source, source.profile)
                return self._dispose(request, source)
        except FolderGone:
            return self._missing(request)

    def _dispose(self, request: Dispose, source: Source) -> str:
        at = source.hidden if source.is_hidden() else source.name
        found = source.known(at)
        if found is None:
            return self._missing(request)
        surely = source.is_it(found) and (at == source.hidden or self._untouched(found, request.sighting))
        if not surely and not _same_content(source, at, found, request.sha256):
            if at == source.hidden:
                source.give_back()
            return CHANGED
        with attempting("open", source.folder.full(at)), closing(open_file(source.folder.descriptor, at)) as held:
            if content_of(os.fstat(held)) != content_of(found):
                return CHANGED
            _must_be_writable(source.folder)
            if source.has_both_names():
                source.folder.discard(source.name)
            if request.archive:
                return self._archive(request, source, held, taken=at == source.hidden)
            return self._delete(source, held, taken=at == source.hidden)

    def _untouched(self, found: os.stat_result, sighting: Sighting) -> bool:
        return _in_int64(found.st_ctime_ns) == sighting.ctime_ns or self._given_back.get((found.st_dev, found.st_ino)) == found.st_ctime_ns

    def _missing(self, request: Dispose) -> str:
        """Not in the inbox: put away by a run that was cut off before it could say so, or by somebody else."""
        if not request.archive:
            return GONE
        *parents, name = components(request.sighting.path)
        try:
            with met_in("archive"), self._shelf(request, parents, make=False) as shelf:
                if kept_as(shelf, name, request.sighting.size, request.sighting.mtime_ns, None) is None:
                    return GONE
                shelf.sync()
                return ARCHIVED
        except FolderGone:
            return GONE

    # --- the two ways ---

    def _delete(self, source: Source, held: int, *, taken: bool) -> str:
        with self._given_back_on_failure(source):
            if not taken and not source.take(os.fstat(held)):
                return CHANGED
            source.take_profile()
            source.folder.discard(source.hidden)
        if source.profile is not None and source.profile.is_hidden():
            source.folder.discard(source.profile.hidden)
        source.folder.sync()
        return DELETED

    def _archive(self, request: Dispose, source: Source, held: int, *, taken: bool) -> str:
        """Whatever can fail for want of room comes before the source is touched."""
        before = os.fstat(held)
        with met_in("archive"), self._shelf_for(request, source, make=True) as shelf:
            with copied(shelf, held, source.name) as kept, self._given_back_on_failure(source):
                with met_in("inbox"):
                    if not taken and (os.fstat(held).st_ctime_ns != before.st_ctime_ns or not source.take(before)):
                        return CHANGED
                    source.take_profile()
                name = shelve(source, shelf, kept, source.name)
            with met_in("inbox"):
                source.folder.discard(source.hidden)
            if source.profile is not None and source.profile.is_hidden():
                shelve_beside(source.profile, shelf, name)
        source.folder.sync()
        return ARCHIVED

    def _finish(self, request: Dispose, source: Source, profile: Held) -> None:
        """The source was put away by a run that was cut off before its profile was."""
        if request.archive:
            with met_in("archive"), self._shelf_for(request, source, make=True) as shelf:
                sighting = request.sighting
                name = kept_as(shelf.folder, source.name, sighting.size, sighting.mtime_ns, None)
                shelve_beside(profile, shelf, name or source.name)
        else:
            source.folder.discard(profile.hidden)
        source.folder.sync()

    @contextmanager
    def _shelf_for(self, request: Dispose, source: Source, *, make: bool) -> Iterator[Shelf]:
        *parents, _ = components(request.sighting.path)
        with self._shelf(request, parents, make=make) as folder:
            far = not _one_mount(folder.descriptor, source.folder.descriptor)
            yield Shelf(folder, temporary(request.job, "archive-" + _mark(request)), far)

    @contextmanager
    def _shelf(self, request: Dispose, parents: list[bytes], *, make: bool) -> Iterator[Folder]:
        """The folder of the archive that mirrors the source's."""
        if request.archive not in self._archives:
            terms = msgspec.structs.replace(self._terms, path=request.archive, like=request.inbox)
            self._archives[request.archive] = Outbox(terms)
        with self._archives[request.archive].folder(tuple(parents), make=make) as shelf:
            yield shelf

    @contextmanager
    def _given_back_on_failure(self, source: Source) -> Iterator[None]:
        """A source that cannot be put away now stands at its own name again, and is known by the ctime that this gave it."""
        try:
            yield
        except Unpublished:
            if source.is_hidden():
                source.give_back()
                found = source.known(source.name)
                if found is not None:
                    self._given_back[(found.st_dev, found.st_ino)] = found.st_ctime_ns
            raise


def hidden_name(request: Dispose) -> bytes:
    """The private name: the same for the same request, another for a job of that number in another ledger."""
    return temporary(request.job, "source-" + _mark(request))


def _profile_of(request: Dispose, folder: Folder, name: bytes) -> Held | None:
    if len(name) + len(PROFILE) > NAME_BYTES_MAX:
        return None
    return Held(folder, name + PROFILE, temporary(request.job, "profile-" + _mark(request)))


def _mark(request: Dispose) -> str:
    sighting = request.sighting
    return hashlib.sha256(b"%s/%d/%d/%d" % (sighting.path, sighting.inode, sighting.size, sighting.mtime_ns)).hexdigest()[:8]


# --- identity ------------------------------------------------------------------------------------------------------------------


def _same_content(source: Source, at: bytes, found: os.stat_result, sha256: str) -> bool:
    if not sha256 or not stat.S_ISREG(found.st_mode) or found.st_size != source.sighting.size:
        return False
    return source.folder.observe(at, size=found.st_size) == sha256


def _in_int64(number: int) -> int:
    """A time stamp as a sighting has it: beyond the year 2262 it is brought into what the ledger can hold."""
    return max(-_INT64_MAX, min(_INT64_MAX, number))


def _one_mount(one: int, other: int) -> bool:
    """Whether a rename between two directories can work. Two mounts of one filesystem (as ReadWritePaths= makes them) are two."""
    return os.fstat(one).st_dev == os.fstat(other).st_dev and _mount(one) == _mount(other) != ""


def _mount(descriptor: int) -> str:
    try:
        with open(f"/proc/self/fdinfo/{descriptor}") as facts:
            return next((line for line in facts if line.startswith("mnt_id:")), "")
    except OSError:  # a sandbox may hide /proc: then it is copied
        return ""


def _must_be_writable(folder: Folder) -> None:
    """Known before a large recording is copied, and again with every try. Raises OutboxReadOnly, OutboxDenied."""
    with attempting("take anything out of", folder.path):
        if not os.access(b".", os.W_OK | os.X_OK, dir_fd=folder.descriptor, effective_ids=True):
            number = errno.EROFS if os.fstatvfs(folder.descriptor).f_flag & os.ST_RDONLY else errno.EACCES
            raise OSError(number, os.strerror(number))


# --- the inbox -----------------------------------------------------------------------------------------------------------------


@contextmanager
def _entered(request: Dispose, parents: list[bytes]) -> Iterator[Folder]:
    """The folder of the source. Raises FolderGone when it is not there, OutboxAbsent when the inbox seems to be away."""
    with attempting("open the inbox", request.inbox), closing(open_root(request.inbox)) as top:
        device = os.fstat(top).st_dev
        if device != request.sighting.dev and next(os.scandir(top), None) is None:
            raise OutboxAbsent(f"cannot look into {printable(request.inbox)}: it is empty, and on another device than before")
        descriptor = os.dup(top)
    path = request.inbox
    try:
        for part in parents:
            path += b"/" + part
            below = _step(descriptor, part, path)
            os.close(descriptor)
            descriptor = below
            if os.fstat(descriptor).st_dev != device:
                raise FolderGone(f"cannot enter {printable(path)}: another filesystem is mounted there")
        yield Folder(descriptor, path, Owner(), 0)
    finally:
        os.close(descriptor)


def _step(above: int, part: bytes, path: bytes) -> int:
    with attempting("open the folder", path):
        try:
            return open_below(above, part)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            raise FolderGone(f"cannot open the folder {printable(path)}: it is not there") from error
