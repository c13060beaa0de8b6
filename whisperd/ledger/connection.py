"""connection: how the ledger's file is opened, locked and refused.

Owns: pragmas, the write lock, the choice of directory. SQLite 3.7.0 to 3.51.2 can lose a commit when one connection writes while
another checkpoints (sqlite.org/wal.html, "The WAL-Reset Bug"), so automatic checkpoints are off on every connection and each
write and each checkpoint, of any process, holds one flock: they can never meet.
Fails with `StateDirError` (network filesystem, not writable), `LedgerBroken` (not a ledger, damaged), `LedgerBusy` (locked for too
long) and `LedgerStuck` (the disk is full or failing).
"""

from __future__ import annotations

import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from sqlite_utils import Database

from whisperd.errors import StateDirError, WhisperdError
from whisperd.ledger.backups import advice
from whisperd.ledger.migrations import MIGRATIONS

LEDGER_NAME = "ledger.sqlite3"
LOCK_NAME = "ledger.lock"
LOCK_WAIT_S = 30.0
CACHE_KIB = 16 * 1024
"""Of the writer. A million names that come in no order touch as many pages: with SQLite's own 2 MiB they are read again and again."""
_OF_OTHER_MACHINES = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "ncpfs", "9p", "davfs", "fuse", "virtiofs", "vboxsf", "prl_fs", "coda")
_OF_CLUSTERS = ("ceph", "glusterfs", "lustre", "beegfs", "gpfs", "orangefs", "ocfs2", "gfs2")
NETWORK_FILESYSTEMS = frozenset(_OF_OTHER_MACHINES + _OF_CLUSTERS)


class LedgerBroken(WhisperdError):
    """The ledger's file is not one, or is damaged. It is never replaced silently."""

    code = "ledger_broken"


class LedgerBusy(WhisperdError):
    """Another process holds the write lock for too long."""

    code = "ledger_busy"
    recoverable = True


class LedgerStuck(WhisperdError):
    """The ledger cannot be written now, though nothing is wrong with it: the disk is full, read-only or failing."""

    code = "ledger_stuck"
    recoverable = True


_OF_THE_DISK = frozenset(
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
    }
)


_OF_THE_FILE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})


def blames_the_file(error: sqlite3.Error) -> bool:
    """Whether what SQLite found is damaged."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_FILE


def blames_the_disk(error: sqlite3.Error) -> bool:
    """Whether SQLite could not work where it is, as opposed to what it found there."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _OF_THE_DISK


def named(error: sqlite3.Error, state_dir: str) -> Exception:
    """An error of SQLite as one of ours, where it is the disk's or the file's fault; any other stays as it is."""
    if blames_the_disk(error):
        return LedgerStuck(f"cannot use the ledger in {state_dir}: {error}", hint="is the disk full, read-only or failing?")
    if blames_the_file(error):
        return LedgerBroken(f"cannot go on with the ledger in {state_dir}: {error}", hint=advice(state_dir))
    return error


class NamingCursor(sqlite3.Cursor):
    """A cursor whose errors have names: nobody who reads the ledger has to know what SQLite says when a disk fails."""

    connection: NamingConnection  # always one of these: it alone makes them

    def execute(self, *arguments: Any) -> Self:
        try:
            return super().execute(*arguments)
        except sqlite3.DatabaseError as error:
            raise named(error, self.connection.state_dir) from error

    def executemany(self, *arguments: Any) -> Self:
        try:
            return super().executemany(*arguments)
        except sqlite3.DatabaseError as error:
            raise named(error, self.connection.state_dir) from error

    def fetchone(self) -> Any:
        try:
            return super().fetchone()
        except sqlite3.DatabaseError as error:
            raise named(error, self.connection.state_dir) from error

    def fetchall(self) -> list[Any]:
        try:
            return super().fetchall()
        except sqlite3.DatabaseError as error:
            raise named(error, self.connection.state_dir) from error

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except sqlite3.DatabaseError as error:
            raise named(error, self.connection.state_dir) from error


class NamingConnection(sqlite3.Connection):
    """A connection that names its errors once it knows its directory: how opening failed is told by those who open."""

    state_dir = ""

    def cursor(self, factory: Any = None) -> sqlite3.Cursor:  # type: ignore[override]
        return super().cursor(NamingCursor if self.state_dir else factory or sqlite3.Cursor)

    def execute(self, *arguments: Any) -> sqlite3.Cursor:
        return self.cursor().execute(*arguments)

    def executemany(self, *arguments: Any) -> sqlite3.Cursor:
        return self.cursor().executemany(*arguments)


class Mount(NamedTuple):
    """A line of /proc/self/mountinfo, and the directory that it is about."""

    point: bytes
    line: bytes


def mounts_above(directory: bytes) -> tuple[Mount, ...]:
    """The mounts on the way to a directory, as they were made. By name: the directory itself is not asked, it may hang."""
    wanted = os.path.normpath(directory)
    with open("/proc/self/mountinfo", "rb") as lines:
        mounts = [Mount(re.sub(rb"\\([0-7]{3})", _octal, line.split(b" ")[4]), line) for line in lines]
    return tuple(mount for mount in mounts if wanted == mount.point or wanted.startswith(mount.point.rstrip(b"/") + b"/"))


def _octal(digits: re.Match[bytes]) -> bytes:
    return bytes([int(digits[1], 8)])


def filesystem_type(path: str | bytes) -> str:
    """Type of the filesystem that holds `path` ("ext4", "nfs4", "fuse.sshfs"); "" when not found."""
    innermost_last = sorted(mounts_above(os.fsencode(os.path.realpath(path))), key=lambda mount: len(mount.point))
    return innermost_last[-1].line.partition(b" - ")[2].split(b" ")[0].decode() if innermost_last else ""


def is_network(filesystem: str) -> bool:
    """Whether files there may be changed by another machine without inotify telling us, or whether locks there cannot be trusted."""
    return filesystem.split(".", maxsplit=1)[0] in NETWORK_FILESYSTEMS and filesystem != "fuseblk"


def open_for_writing(state_dir: str) -> Database:
    """Open (making and migrating it when needed) the ledger in `state_dir`. Raises StateDirError, LedgerBroken."""
    filesystem = filesystem_type(state_dir)
    if is_network(filesystem):
        raise StateDirError(
            f"cannot keep the ledger in {state_dir}: it is on a network filesystem ({filesystem})",
            hint="set state_dir to a directory on a local disk; inboxes may stay on the share",
        )
    path = os.path.join(state_dir, LEDGER_NAME)
    try:
        with write_lock(state_dir):  # also for closing what cannot be used: the last connection that closes checkpoints
            connection = sqlite3.connect(path, isolation_level=None, timeout=LOCK_WAIT_S, check_same_thread=False, factory=NamingConnection)
            try:
                db = _prepared(connection, path)
                connection.state_dir = state_dir
                return db
            except BaseException:
                connection.close()
                raise
    except sqlite3.DatabaseError as error:
        if blames_the_disk(error):
            raise StateDirError(
                f"cannot use the ledger {path}: {error}", hint="it must be readable and writable by this user, on a disk with room"
            ) from error
        raise LedgerBroken(
            f"cannot open the ledger {path}: {error}",
            hint=advice(state_dir),
        ) from error


def _prepared(connection: sqlite3.Connection, path: str) -> Database:
    """Look before touching: what is damaged, newer than this version or no ledger at all stays as it is."""
    _common_pragmas(connection)
    db = Database(connection, use_old_upsert=False)
    applied = {migration.name for migration in MIGRATIONS.applied(db)}
    if applied - {migration.name for migration in MIGRATIONS._migrations}:
        raise LedgerBroken(f"the ledger {path} was written by a newer whisperd", hint="install that version again")
    if not applied and set(db.table_names()) - {MIGRATIONS.migrations_table}:
        raise LedgerBroken(f"{path} is a database, but not a ledger", hint="move it away, or set state_dir to another directory")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA temp_store = MEMORY")  # each row of a verb that may be refused has an undo journal: 25 → 21 µs
    connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    MIGRATIONS.apply(db)
    return db


def open_for_reading(state_dir: str) -> Database:
    """Open an existing ledger read-only. Raises StateDirError when there is none, LedgerBroken when it cannot be read."""
    path = os.path.join(state_dir, LEDGER_NAME)
    if not os.path.exists(path):
        raise StateDirError(f"no ledger in {state_dir}", hint="has the daemon run with this configuration yet?")
    uri = f"file:{quote(os.fsencode(path))}?mode=ro"
    try:
        connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=10, check_same_thread=False, factory=NamingConnection)
        try:
            _common_pragmas(connection)
            (begun,) = connection.execute("SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = 'job'").fetchone()
            if not begun:
                raise StateDirError(
                    f"no ledger in {state_dir} yet: {path} is empty", hint="has the daemon run with this configuration yet?"
                )
            if MIGRATIONS.pending(Database(connection)):
                raise StateDirError(
                    f"the ledger {path} is of an older whisperd", hint="restart the daemon: it brings the ledger up to date"
                )
        except BaseException:
            connection.close()
            raise
    except sqlite3.DatabaseError as error:
        if blames_the_disk(error):
            raise StateDirError(f"cannot read the ledger {path}: {error}", hint="is it readable by this user?") from error
        raise LedgerBroken(f"cannot read the ledger {path}: {error}", hint=advice(state_dir)) from error
    connection.state_dir = state_dir
    return Database(connection)


def _common_pragmas(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA wal_autocheckpoint = 0")


@contextmanager
def write_lock(state_dir: str) -> Iterator[None]:
    """Hold the one lock that writers and checkpoints of all processes share. Raises LedgerBusy, StateDirError."""
    try:
        lock = os.open(os.path.join(state_dir, LOCK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o660)
    except OSError as error:
        raise StateDirError(
            f"cannot use the state directory {state_dir}: {error.strerror}", hint="it must exist and be writable by this user"
        ) from error
    try:
        _acquire(lock, state_dir)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, state_dir: str) -> None:
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise LedgerBusy(f"the ledger in {state_dir} is locked by another process for {LOCK_WAIT_S:g} s") from None
            time.sleep(0.002)
        except OSError as error:
            raise LedgerStuck(f"cannot lock the ledger in {state_dir}: {error.strerror}", hint="look for errors of that disk") from error
