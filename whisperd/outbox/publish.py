"""publish: put the files of one source into the outbox, each whole or not at all, and never over somebody else's.

Owns: the decision what may happen at each name (`decide`, pure) and the order of effects. All names are judged before the first
byte is written; all files are written and made durable under temporary names before the first gets its own. So a full disk is
met while nothing shows, and a crash at any point is mended by doing the same again: what is there already is known by its bytes.
Fails with the errors of `failures`, and then leaves no temporary file where it can still be removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from whisperd.errors import printable
from whisperd.outbox.failures import FolderGone, NameTaken, OutboxBlocked, UnknownFormat, Unpublished
from whisperd.outbox.names import components, fit_name, temporary
from whisperd.outbox.place import Folder, Outbox
from whisperd.wire import OwnFile, PublishedFile

_TRIES = 3


class Action(StrEnum):
    """What to do at one name."""

    CREATE = "create"  # nothing is there
    KEEP = "keep"  # what we would write is there already: a crash came between publishing and the ledger
    REPLACE = "replace"  # an older version of ours, untouched since
    REFUSE = "refuse"  # not ours, or no longer as we wrote it


def decide(standing: str | None, ours: str, own: str | None) -> Action:
    """What may happen at a name, from the sha256 of what stands there, of what we have, and of what we wrote there before."""
    if standing is None:
        return Action.CREATE
    if standing == ours:
        return Action.KEEP
    return Action.REPLACE if standing == own else Action.REFUSE


@dataclass(frozen=True, slots=True)
class Target:
    """One file to be published. `path` is relative to the outbox, `name` to its folder."""

    path: bytes
    format: str
    content: bytes
    sha256: str
    own: str | None
    temporary: bytes

    @property
    def name(self) -> bytes:
        return self.path.rpartition(b"/")[2]


def publish(
    outbox: Outbox, *, job: int, base: bytes, contents: dict[str, bytes], own: Iterable[OwnFile] = (), stale: Iterable[OwnFile] = ()
) -> tuple[PublishedFile, ...]:
    """Publish each content as `base`.format, then remove stale files; say what stands in the outbox now. Raises Unpublished."""
    targets = plan(job, base, contents, own)
    *parents, _ = components(targets[0].path)
    with outbox.folder(tuple(parents)) as folder:
        _publish_all(folder, targets, outbox.unsure)
    fresh = {target.path for target in targets}
    for file in stale:
        if file.path not in fresh:
            remove_own(outbox, file)
    return tuple(PublishedFile(path=target.path, format=target.format, sha256=target.sha256) for target in targets)


def plan(job: int, base: bytes, contents: dict[str, bytes], own: Iterable[OwnFile]) -> list[Target]:
    """Names and digests of what is to be published. Raises BadName, UnknownFormat."""
    if not contents:
        raise UnknownFormat("cannot publish a transcript in no format at all", hint="name at least one in `formats`")
    components(base)
    stem = fit_name(base, max((b"." + name.encode() for name in contents), key=len))
    known = {file.path: file.sha256 for file in own}
    return [_target(job, stem, name, content, known) for name, content in contents.items()]


def _target(job: int, stem: bytes, name: str, content: bytes, known: dict[bytes, str]) -> Target:
    path = stem + b"." + name.encode()
    return Target(path, name, content, hashlib.sha256(content).hexdigest(), known.get(path), temporary(job, name))


def remove_own(outbox: Outbox, file: OwnFile) -> None:
    """Remove a file of ours, if it is still as we wrote it. Raises Unpublished."""
    *parents, name = components(file.path)
    try:
        with outbox.folder(tuple(parents), make=False) as folder:
            if folder.observe(name, size=None) == file.sha256:
                folder.discard(name)
                folder.sync()
    except (FolderGone, OutboxBlocked):  # its folder is gone or is somebody else's now: so is the file
        pass


def _publish_all(folder: Folder, targets: list[Target], unsure: set[bytes]) -> None:
    """`unsure` are paths of ours whose folder could not be made durable. A second fsync would say that all is well, whatever became of
    the first one's pages; so they are written anew, even if they stand there as they should."""
    paths = {target.path for target in targets}
    try:
        judged = [(target, _judge(folder, target)) for target in targets]
        judged = [(target, Action.REPLACE if action is Action.KEEP and target.path in unsure else action) for target, action in judged]
        for target, action in judged:
            if action is not Action.KEEP:
                folder.write(target.temporary, target.content, meant_for=target.name)
        for target, action in judged:
            _settle(folder, target, action)
    finally:
        _sweep(folder, targets)
    unsure |= paths
    folder.sync()
    unsure -= paths


def _judge(folder: Folder, target: Target) -> Action:
    """What to do about one target. Raises NameTaken."""
    size = None if target.own else len(target.content)
    action = decide(folder.observe(target.name, size=size), target.sha256, target.own)
    if action is Action.REFUSE:
        raise NameTaken(f"cannot publish {printable(folder.full(target.name))}: another file stands there")
    return action


def _settle(folder: Folder, target: Target, action: Action) -> None:
    """Give one written file its name. The place is judged once more: a user may have been faster. Raises NameTaken."""
    if action is Action.REPLACE and _judge(folder, target) is Action.CREATE:
        action = Action.CREATE
    for _ in range(_TRIES):
        if action is Action.REPLACE:
            folder.replace(target.temporary, target.name)
            return
        if action is Action.KEEP or folder.settle_at(target.temporary, target.name):
            return
        action = _judge(folder, target)
    raise NameTaken(f"cannot publish {printable(folder.full(target.name))}: something comes and goes at that name")


def _sweep(folder: Folder, targets: list[Target]) -> None:
    """Leave no temporary file, not even one of a run that was killed."""
    for target in targets:
        with suppress(Unpublished):  # a share that went away takes them along; the next run has the same names and tries again
            folder.discard(target.temporary)
