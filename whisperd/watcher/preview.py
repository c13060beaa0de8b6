"""python -m whisperd.watcher.preview: what lies in an inbox and what the rules say of each entry, taking nothing in.

Owns: the explanation of a scan. The scan alone decides; here every entry is named with the rule that keeps it out. Reads the order (a
WatchInbox as JSON) from standard input, writes one `Found` as JSON on each line, and ends; an inbox that cannot be listed is one as well.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import sys
from collections.abc import Callable, Iterator

import msgspec

from whisperd.errors import printable
from whisperd.log import to_parent
from whisperd.vocabulary import Sighting
from whisperd.watcher import profiles
from whisperd.watcher.names import NEVER, NOT_YET, SKIP_MARKER, Names
from whisperd.watcher.scan import InboxAbsent, Rules, ScanResult, scan
from whisperd.wire import WatchInbox

MARKED = f"it holds a {os.fsdecode(SKIP_MARKER)}"


class Found(msgspec.Struct, frozen=True, omit_defaults=True):
    """One entry: `kind` is recording, left_out, ignored, not_a_file, left_alone (a folder, with all below), profile, or down (the inbox).

    `text` is a profile's, None where it cannot be read.
    """

    kind: str
    path: bytes = b""
    why: str = ""
    sighting: Sighting | None = None
    text: str | None = None


def main() -> int:
    to_parent()
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=WatchInbox)
    encode = msgspec.json.Encoder().encode
    try:
        for found in preview(order):
            sys.stdout.buffer.write(encode(found) + b"\n")
        sys.stdout.buffer.flush()
    except BrokenPipeError:  # nobody wants to read on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def preview(order: WatchInbox) -> Iterator[Found]:
    """The profiles first, then every entry of the inbox, folder by folder; nothing below a folder that is left alone."""
    try:
        result = scan(order.path, order.exclude, order.include, order.ignore, order.recursive)
    except InboxAbsent as error:
        yield Found(kind="down", why=str(error))
        return
    names = Names(order.include, order.ignore)
    for path in sorted(result.profiles):
        read = profiles.read(order.path, path)
        yield Found(kind="profile", path=path, text=read.text, why=read.fault)
    explain = Explanation(result, Rules.of(order.path, order.exclude, names, order.recursive), order.ignore)
    if b"" in result.marked:
        yield Found(kind="left_alone", why=MARKED)
        return
    for where, folders, files, descriptor in os.fwalk(order.path):
        prefix = where[len(order.path) :].strip(b"/")
        prefix += b"/" if prefix else b""
        for name in sorted(files):
            yield from explain.file(prefix + name, name, descriptor)
        enter: list[bytes] = []
        for name in sorted(folders):
            left_alone = explain.folder(prefix + name, name, descriptor)
            if left_alone is None:
                enter.append(name)
            else:
                yield left_alone
        folders[:] = enter


class Explanation:
    """Why the entries of one scan are what they are."""

    def __init__(self, result: ScanResult, rules: Rules, ignore: tuple[str, ...]) -> None:
        self._result = result
        self._rules = rules
        self._operators = [(pattern, Names((), (pattern,))) for pattern in ignore]

    def file(self, path: bytes, name: bytes, folder: int) -> Iterator[Found]:
        """One entry that is no directory; nothing if it is a profile or went away meanwhile."""
        sighting = self._result.sightings.get(path)
        if sighting is not None:
            yield Found(kind="recording", path=path, sighting=sighting)
            return
        try:
            mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
        except OSError:
            return
        if path in self._result.profiles:
            return
        if self._ignored(path, name):
            yield Found(kind="ignored", path=path, why=self._rule(path, name))
        elif not stat.S_ISREG(mode):
            yield Found(kind="not_a_file", path=path, why=f"it is {_thing(mode)}")
        elif not self._rules.names.is_recording(name):
            yield Found(kind="left_out", path=path, why="its name is not among `include`")
        else:
            yield Found(kind="left_out", path=path, why=self._obstacle(path) or "it came while the inbox was looked through")

    def folder(self, path: bytes, name: bytes, above: int) -> Found | None:
        """Why a directory is left alone, or None for one to look into."""
        try:
            mode = os.stat(name, dir_fd=above, follow_symlinks=False).st_mode
        except OSError as error:
            return Found(kind="left_alone", path=path, why=error.strerror or "it is gone")
        if not (stat.S_ISDIR(mode) or self._ignored(path, name)):
            return Found(kind="not_a_file", path=path, why=f"it is {_thing(mode)}")
        why = self._why_closed(path, name)
        return Found(kind="left_alone", path=path, why=why) if why else None

    def _why_closed(self, path: bytes, name: bytes) -> str:
        if self._ignored(path, name):
            return self._rule(path, name)
        if path in self._rules.excluded:
            return "it is an outbox or an archive"
        if not self._rules.recursive:
            return "only the inbox itself is looked through (recursive = false)"
        if path in self._result.marked:
            return MARKED
        return self._obstacle(path)

    def _obstacle(self, path: bytes) -> str:
        return self._result.skipped.get(path) or self._result.hidden.get(path, "")

    def _ignored(self, path: bytes, name: bytes) -> bool:
        return self._rules.names.ignored(name) or self._rules.names.ignored_path(path)

    def _rule(self, path: bytes, name: bytes) -> str:
        """Which of the patterns it is; the built-in ones first."""
        shown = os.fsdecode(name).lower()
        for pattern in NOT_YET:
            if fnmatch.fnmatchcase(shown, pattern.lower()):
                return f'its name says that it is not whole yet ("{pattern}")'
        for pattern in NEVER:
            if fnmatch.fnmatchcase(shown, pattern.lower()):
                return f'no such name is a recording ("{pattern}")'
        rules = (pattern for pattern, rule in self._operators if rule.ignored(name) or rule.ignored_path(path))
        return f'`ignore` has "{printable(next(rules, "?"))}"'


_THINGS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a symbolic link, and those are not followed"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def _thing(mode: int) -> str:
    return next((what for test, what in _THINGS if test(mode)), "a device")


if __name__ == "__main__":
    sys.exit(main())
