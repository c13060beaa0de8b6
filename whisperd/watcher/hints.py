"""hints: "look now", from inotify where inotify can be trusted.

Owns: watchdog. An event does nothing but wake the loop and name the directory to be listed; what happened is for the scan to find out.
Network and FUSE filesystems have no observer at all (other machines' changes make no events there): the loop polls. Fails softly: an
observer that died, lost events or watches a directory that is no longer the inbox is replaced, and where the kernel gives no more watches
the loop polls.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from loguru import logger
from watchdog.events import (
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers.inotify import InotifyObserver

from whisperd.errors import printable

HEARD: list[type[FileSystemEvent]] = [
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileMovedEvent,
]
"""Not "opened" or "closed unwritten", which we cause ourselves; not "modified": a file that grows is waited for anyway."""

SHORT_TWICE = 2  # counts of too few watches in a row, before anything is done about it
COUNT_EVERY_S = 2.0
FOLDERS_MAX = 1000  # events in more directories than that, and everything is listed

Identity = tuple[int, int]  # device and inode of the inbox


class Hints(FileSystemEventHandler):
    """The observer of one inbox: kept alive by `keep`, which the loop calls before each scan."""

    def __init__(self, root: bytes, *, recursive: bool, wake: Callable[[], None]) -> None:
        self._root = root
        self._recursive = recursive
        self._wake = wake
        self._native = False
        self._observer: InotifyObserver | None = None
        self._watched: Identity | None = None
        self._lost = False  # set by watchdog's threads, too
        self._short = 0
        self._deaf = False
        self._count_at = 0.0
        self._top = b""
        self._folders: set[bytes] = set()
        self._everything = False
        self._lock = threading.Lock()
        self._listen_to_watchdog()

    @property
    def polling(self) -> bool:
        """Whether the loop has to look by itself, since not everything will be heard."""
        return self._observer is None or self._deaf

    @property
    def uneasy(self) -> bool:
        """Whether directories seem to be unwatched, which another scan has to confirm."""
        return self._short > 0 and not self._deaf

    def on_any_event(self, event: FileSystemEvent) -> None:
        with self._lock:
            for path in filter(None, (str(event.src_path), str(event.dest_path))):
                self._folders.add(os.path.dirname(os.fsencode(path))[len(self._top) :].lstrip(b"/"))
            if len(self._folders) > FOLDERS_MAX:
                self._folders, self._everything = set(), True
        self._wake()

    def take(self) -> set[bytes] | None:
        """The directories with events since the last call, relative to the inbox; None when events may have been lost."""
        with self._lock:
            folders, everything = self._folders, self._everything
            self._folders, self._everything = set(), False
        return None if everything else folders

    def keep(self, identity: Identity, *, native: bool) -> None:
        """One step toward an observer that lives and watches this very directory (or toward none, if it is not `native`)."""
        if (identity, native) == (self._watched, self._native) and (self._observer is None or self._healthy(self._observer)):
            return
        if identity != self._watched:
            self._short, self._deaf = 0, False
        self.stop()
        if native:
            self._start()
        self._watched, self._native = identity, native

    def stop(self) -> None:
        """End the observer, if there is one."""
        observer, self._observer, self._watched = self._observer, None, None
        if observer is not None:
            _end(observer)
        self._lost = False

    def count(self, directories: int, now: float) -> None:
        """Hold the number of watches against the number of directories that a scan found.

        watchdog keeps silent when the kernel refuses a watch below the inbox, or when it overlooked a new directory.
        """
        if self._observer is None or now < self._count_at:
            return
        self._count_at = now + COUNT_EVERY_S
        if _watches() >= directories:
            self._short, self._deaf = 0, False
            return
        self._short += 1
        if self._short == SHORT_TWICE:
            self._lost = True
            self._wake()
        elif self._short == 2 * SHORT_TWICE:
            self._deaf = True
            self._warn("not all of its directories can be watched")

    def _healthy(self, observer: InotifyObserver) -> bool:
        threads = [observer, *observer.emitters]
        return not self._lost and len(threads) > 1 and all(thread.is_alive() for thread in threads)

    def _start(self) -> None:
        try:
            self._observer = InotifyObserver()
            self._everything = True  # what happened since the last scan was heard by nobody
            # The real path, since watchdog does not follow a symbolic link, not even the one that the operator named.
            self._top = os.path.realpath(self._root)
            self._observer.schedule(self, os.fsdecode(self._top), recursive=self._recursive, event_filter=HEARD)
            self._observer.start()
        except OSError as error:
            self._warn(error.strerror or str(error))
            self.stop()

    def _warn(self, why: str) -> None:
        logger.warning(
            "cannot hear of all changes in {}: {}; it is polled (raise fs.inotify.max_user_watches and max_user_instances)",
            printable(self._root),
            why,
        )

    def _listen_to_watchdog(self) -> None:
        """watchdog tells of lost events only in its log, and of a dead thread not at all."""
        log = logging.getLogger("watchdog")
        log.addHandler(_Tell(self._lose))
        log.propagate = False
        threading.excepthook = lambda args: self._lose(f"a thread of watchdog died: {args.exc_value!r}")

    def _lose(self, why: str) -> None:
        if self._observer is None:  # it is being ended, and grumbles
            return
        logger.warning("lost track of changes in {}: {}; looking anew", printable(self._root), why)
        self._lost = self._everything = True
        self._wake()


class _Tell(logging.Handler):
    def __init__(self, tell: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(printable(record.getMessage()))


def _end(observer: InotifyObserver) -> None:
    observer.stop()
    if observer.is_alive():
        observer.join()


def _watches() -> int:
    """How many inotify watches this process has, as the kernel counts them."""
    found = 0
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{descriptor}") == "anon_inode:inotify":
                with open(f"/proc/self/fdinfo/{descriptor}", "rb") as info:
                    found += sum(line.startswith(b"inotify wd:") for line in info)
        except OSError:  # closed since the listing
            continue
    return found
