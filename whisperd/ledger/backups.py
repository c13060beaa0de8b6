"""backups: copies of the ledger, and which of them is good.

Owns: how a copy is made while the ledger is in use, and what is said when the ledger itself is damaged: it is never replaced silently, but
the newest copy that holds together is named. Fails with what SQLite and the file system raise.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from urllib.parse import quote

from whisperd.errors import printable

DIRECTORY = "backup"
SUFFIX = ".sqlite3"


def newest_good(state_dir: str) -> str:
    """Path of the newest copy in `state_dir` that SQLite finds whole and that is a ledger; "" when there is none."""
    directory = os.path.join(state_dir, DIRECTORY)
    try:
        names = sorted((name for name in os.listdir(directory) if name.endswith(SUFFIX)), reverse=True)  # their names are their times
    except OSError:
        return ""
    return next((path for name in names if is_good(path := os.path.join(directory, name))), "")


def is_good(path: str) -> bool:
    """Whether this is a ledger, and whole. Nothing is written beside it."""
    try:
        uri = f"file:{quote(os.fsencode(path))}?mode=ro&immutable=1"
        with contextlib.closing(sqlite3.connect(uri, uri=True)) as copy:
            copy.execute("SELECT 1 FROM job, transition LIMIT 1").fetchone()
            return bool(copy.execute("PRAGMA integrity_check").fetchone()[0] == "ok")
    except sqlite3.Error:
        return False


def advice(state_dir: str) -> str:
    """What to do about a damaged ledger."""
    good = newest_good(state_dir)
    if good:
        return f"it is left as it is; the newest good backup is {printable(os.fsencode(good))}: stop the daemon and copy it to its place"
    directory = printable(os.fsencode(os.path.join(state_dir, DIRECTORY)))
    return f"it is left as it is, and there is no good backup in {directory}; move it away to begin anew"


def copy_whole(source: sqlite3.Connection, target: str) -> None:
    """Copy what is committed; the copy appears whole under its name or not at all. Raises OSError, sqlite3.OperationalError."""
    partial = target + ".partial"
    try:
        with contextlib.suppress(FileNotFoundError):  # of an earlier, interrupted backup
            os.unlink(partial)
        with contextlib.closing(sqlite3.connect(partial)) as copy:
            source.backup(copy)
            copy.execute("PRAGMA journal_mode = DELETE")
        _sync(partial)
        os.replace(partial, target)
        _sync(os.path.dirname(os.path.abspath(target)))
    except (sqlite3.OperationalError, OSError):
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
