"""The ledger on a real disk, with real SQLite and real processes: opening, refusing, sharing, dying, answering.

`python tests/rooms/test_ledger.py` writes `tests/data/ledgers/schema_4.sqlite3` anew (only while schema 4 is not released).
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from whisperd.errors import StateDirError
from whisperd.ledger import connection as ledger_connection
from whisperd.ledger.connection import (
    LEDGER_NAME,
    LOCK_NAME,
    LedgerBroken,
    LedgerBusy,
    LedgerStuck,
    filesystem_type,
    is_network,
    open_for_reading,
    open_for_writing,
    write_lock,
)
from whisperd.ledger.ledger import IllegalMove, LeaseLost, Ledger, NoSuchJob
from whisperd.ledger.migrations import MIGRATIONS
from whisperd.ledger.queries import Queries
from whisperd.vocabulary import CardMinute, Failure, FailureKind, JobOptions, Plan, Reading, Segment, Sighting, Window

RELEASED = Path(__file__).parents[1] / "data" / "ledgers"
BAD = Failure(kind=FailureKind.PERMANENT, code="no_audio", what="there is no audio in it", hint="send another")
DIED = Failure(kind=FailureKind.TRANSIENT, code="worker_died", what="the worker died")
ABSENT = Failure(kind=FailureKind.WAITING, code="no_gpu", what="no card")
MADE_BY = "0123456789abcdef"
LESSON = {"gpu": "GPU-1", "driver": "570", "model": "small", "compute_type": "float16", "batch": 8}
STATES = ("seen", "ready", "running", "transcribed", "done", "failed", "cancelled", "gone")


def sighting(path: bytes, size: int = 1000) -> Sighting:
    return Sighting(path=path, dev=1, inode=2, size=size, mtime_ns=3, ctime_ns=4)


def window(index: int) -> Window:
    said = Segment(start_s=index * 30.0, end_s=index * 30.0 + 2, text=f"window {index}")
    return Window(index=index, start_s=index * 30.0, end_s=index * 30.0 + 30, language="en", language_probability=0.9, segments=(said,))


def bring_to(ledger: Ledger, inbox: int, state: str, path: bytes, now: float = 100.0) -> int:
    """A job in that state, by legal verbs."""
    job = ledger.see(inbox, sighting(path), now)
    if state == "gone":
        ledger.vanish(job, now + 1)
    if state in ("seen", "gone"):
        return job
    ledger.settle(job, sighting(path), JobOptions(), now + 1)
    if state == "cancelled":
        ledger.cancel(job, now + 2)
    if state in ("ready", "cancelled"):
        return job
    ledger.claim(job, "anna", now + 2, lease_s=60)
    ledger.checkpoint(job, "anna", window(0), now + 3, lease_s=60, duration_s=60.0, made_by=MADE_BY, front_end=b"state 0")
    if state == "failed":
        ledger.fail(job, "anna", BAD, now + 4, tail="last words")
    if state in ("transcribed", "done"):
        done = {"transcript": f"{job}.json", "sha256": "ab", "duration_s": 60.0, "language": "en", "process_s": 2.0}
        ledger.finish(job, "anna", now + 4, **done, quality="good", asked="q", revision="main", size=100)
    if state == "done":
        told = [("hook:/bin/true", f"msg_{job}", "{}")]
        ledger.publish(job, b"/out", [(path + b".txt", "txt", "ab")], now + 5, disposal="archive", notices=told)
    return job


def file_of(state_dir: str) -> Path:
    return Path(state_dir) / LEDGER_NAME


def tables_of(path: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of every table."""
    with closing(sqlite3.connect(path)) as connection:
        names = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")]
        return {name: sorted(connection.execute(f"SELECT * FROM {name}"), key=repr) for name in names}


# --- opening and refusing --------------------------------------------------------------------------------------------------------


def test_migrations_apply_once_and_opening_again_changes_nothing(state_dir: str) -> None:
    """The first opening makes the schema; every later one leaves the file byte for byte as it was."""
    Ledger(state_dir, epoch="a").close()
    before = file_of(state_dir).read_bytes()
    for epoch in ("b", "c"):
        ledger = Ledger(state_dir, epoch=epoch)
        assert [migration.name for migration in MIGRATIONS.applied(ledger.db)] == [known.name for known in MIGRATIONS._migrations]
        ledger.close()
    assert file_of(state_dir).read_bytes() == before
    assert not Path(state_dir, LEDGER_NAME + "-wal").exists(), "closing did not bring the WAL home"


def test_every_connection_has_the_promised_settings(ledger: Ledger, state_dir: str) -> None:
    """WAL, synchronous=FULL, foreign keys, and no automatic checkpoint on any connection (DESIGN §4)."""
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "wal_autocheckpoint": 0}
    for pragma, value in expected.items():
        assert ledger.db.conn.execute(f"PRAGMA {pragma}").fetchone()[0] == value
    with closing(open_for_reading(state_dir).conn) as reader:
        assert reader.execute("PRAGMA wal_autocheckpoint").fetchone()[0] == 0


def test_a_ledger_of_a_newer_version_is_refused_and_left_alone(state_dir: str) -> None:
    """A file that a newer whisperd has migrated is refused by name; nothing in it is changed."""
    Ledger(state_dir, epoch="a").close()
    with closing(sqlite3.connect(file_of(state_dir))) as connection, connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('whisperd', 'schema_999', 'later')")
    before = file_of(state_dir).read_bytes()
    with pytest.raises(LedgerBroken, match="newer whisperd") as refusal:
        Ledger(state_dir, epoch="b")
    assert refusal.value.code == "ledger_broken"
    assert refusal.value.hint
    assert file_of(state_dir).read_bytes() == before


def break_it(path: Path, how: str) -> None:
    whole = path.read_bytes()
    rng = random.Random(how)
    kinds: dict[str, Callable[[], bytes]] = {
        "random bytes": lambda: rng.randbytes(len(whole)),
        "a text file": lambda: b"Dear operator,\n" * 1000,
        "cut to 2 bytes": lambda: whole[:2],
        "cut to 100 bytes": lambda: whole[:100],
        "cut to 511 bytes": lambda: whole[:511],
        "cut to one page": lambda: whole[:4096],
        "cut in the middle": lambda: whole[: len(whole) // 2],
        "cut by one page": lambda: whole[:-4096],
        "cut by a page and a byte": lambda: whole[:-4097],
        "header overwritten": lambda: rng.randbytes(100) + whole[100:],
        "first page overwritten": lambda: whole[:100] + rng.randbytes(3996) + whole[4096:],
        "zeroes": lambda: bytes(len(whole)),
    }
    path.write_bytes(kinds[how]())


@pytest.mark.parametrize(
    "how",
    [
        "random bytes",
        "a text file",
        "cut to 2 bytes",
        "cut to 100 bytes",
        "cut to 511 bytes",
        "cut to one page",
        "cut in the middle",
        "cut by one page",
        "cut by a page and a byte",
        "header overwritten",
        "first page overwritten",
        "zeroes",
    ],
)
def test_a_damaged_ledger_is_refused_and_left_as_it_is(state_dir: str, how: str) -> None:
    """A damaged file is refused with `ledger_broken` by writers and readers, and stays byte for byte what it was."""
    Ledger(state_dir, epoch="a").close()
    break_it(file_of(state_dir), how)
    before = file_of(state_dir).read_bytes()
    with pytest.raises(LedgerBroken) as refusal:
        Ledger(state_dir, epoch="b")
    assert LEDGER_NAME in refusal.value.what
    assert "backup" in refusal.value.hint
    with pytest.raises(LedgerBroken):
        Queries.open(state_dir)
    assert file_of(state_dir).read_bytes() == before


def test_damage_found_later_is_told_by_integrity(state_dir: str) -> None:
    """Damage inside, which opening does not meet, is what `integrity` says instead of 'ok' (it never raises); none goes unsaid."""
    ledger = Ledger(state_dir, epoch="a")
    inbox = ledger.register_inbox(b"/in", b"/out", 1.0)
    for number in range(200):
        ledger.see(inbox, sighting(b"%d" % number), 1.0)
    ledger.close()
    whole = bytearray(file_of(state_dir).read_bytes())
    pages = len(whole) // 4096
    met_later = 0
    for seed in range(6):
        page = random.Random(seed).randrange(pages // 2, pages)
        file_of(state_dir).write_bytes(whole[: page * 4096] + random.Random(seed).randbytes(4096) + whole[(page + 1) * 4096 :])
        try:
            queries = Queries.open(state_dir)
        except LedgerBroken:  # it met the damage at once
            continue
        assert queries.integrity() != "ok"
        met_later += 1
        queries.close()
    assert met_later


def test_another_database_is_no_ledger(state_dir: str) -> None:
    """A healthy database of somebody else is refused, and no table is added to it."""
    with closing(sqlite3.connect(file_of(state_dir))) as connection:
        connection.execute("CREATE TABLE recipe (name TEXT)")
    before = file_of(state_dir).read_bytes()
    with pytest.raises(LedgerBroken, match="not a ledger"):
        Ledger(state_dir, epoch="a")
    assert file_of(state_dir).read_bytes() == before
    with pytest.raises(StateDirError):
        Queries.open(state_dir)


def test_an_empty_file_becomes_a_ledger(state_dir: str) -> None:
    """What a crash at the very first start leaves behind (an empty file) is no damage; a reader says that there is nothing yet."""
    file_of(state_dir).touch()
    with pytest.raises(StateDirError, match="no ledger"):
        Queries.open(state_dir)
    Ledger(state_dir, epoch="a").close()
    queries = Queries.open(state_dir)
    assert queries.counts()["ready"] == 0
    queries.close()


def test_unusable_directories_are_named(tmp_path: Path) -> None:
    """A directory that is not there, or where nothing can be written, is a `state_dir` error that names it."""
    for absent in (str(tmp_path / "absent"), "/proc/sys"):
        with pytest.raises(StateDirError) as refusal:
            Ledger(absent, epoch="a")
        assert absent in refusal.value.what
        with pytest.raises(StateDirError, match="no ledger"):
            Queries.open(absent)


def test_a_ledger_that_cannot_be_opened_is_not_called_damaged(state_dir: str) -> None:
    """When the file system is in the way (here: a directory at the ledger's name), nobody is told to restore a backup."""
    file_of(state_dir).mkdir()
    for opening in (lambda: Ledger(state_dir, epoch="a"), lambda: Queries.open(state_dir)):
        with pytest.raises(StateDirError) as refusal:
            opening()
        assert "backup" not in refusal.value.hint


def test_nothing_stays_open_after_a_refusal(state_dir: str) -> None:
    """Refusing a file leaks no descriptor and leaves no lock behind."""
    file_of(state_dir).write_bytes(b"nonsense" * 1000)

    def refuse() -> list[str]:
        for opening in (lambda: Ledger(state_dir, epoch="a"), lambda: Queries.open(state_dir)):
            with pytest.raises(LedgerBroken):
                opening()
        links = [f"/proc/self/fd/{descriptor}" for descriptor in os.listdir("/proc/self/fd")]
        return [os.readlink(link) for link in links if os.path.lexists(link) and state_dir in os.readlink(link)]

    assert refuse() == []
    with write_lock(state_dir):
        pass


# --- where it may live -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filesystem", ["nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse", "fuse.sshfs", "fuse.rclone"])
def test_network_filesystems_are_known(filesystem: str) -> None:
    """Shares are told from disks by the name of their file system."""
    assert is_network(filesystem)


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "zfs", "tmpfs", "overlay", "fuseblk", "f2fs", ""])
def test_disks_are_not_taken_for_shares(filesystem: str) -> None:
    """Local file systems are not refused: neither NTFS through fuseblk nor one that is not found."""
    assert not is_network(filesystem)


a_root_that_is_mounted = pytest.mark.skipif(filesystem_type("/") == "", reason="/ is no mount point here (a plain chroot)")


@a_root_that_is_mounted
def test_filesystem_type_tells_real_mounts_apart(tmp_path: Path) -> None:
    """The type is that of the innermost mount that holds the path, also through a symlink and below the mount point."""
    assert filesystem_type("/proc") == "proc"
    assert filesystem_type(b"/proc/self/fd") == "proc"
    (tmp_path / "link").symlink_to("/proc/sys")
    assert filesystem_type(str(tmp_path / "link")) == "proc"
    assert filesystem_type("/") not in ("", "proc")
    assert filesystem_type("/processes") == filesystem_type("/"), "a name that only begins like a mount point is not below it"


@a_root_that_is_mounted
def test_mount_points_with_awkward_names(tmp_path: Path) -> None:
    """A mount point with blanks, line breaks and backslashes in its name (octal in mountinfo) is found."""
    awkward = str(tmp_path / "my\tshare \\040\nhere")
    os.mkdir(awkward)
    script = f"import sys; from whisperd.ledger.connection import filesystem_type; print(filesystem_type({awkward!r}))"
    mount = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$1" && exec "$2" -c "$3"', "sh", awkward, sys.executable, script]
    try:
        ran = subprocess.run(mount, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if "ermi" in ran.stderr:
        pytest.skip("may not mount here")
    assert ran.stdout.strip() == "tmpfs", ran.stderr


def test_a_ledger_on_a_share_is_refused(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system nothing is opened and nothing is made; the error says what to do."""
    monkeypatch.setattr(ledger_connection, "filesystem_type", lambda path: "nfs4")
    with pytest.raises(StateDirError, match=r"network filesystem \(nfs4\)") as refusal:
        Ledger(state_dir, epoch="a")
    assert "local disk" in refusal.value.hint
    assert os.listdir(state_dir) == []


def test_names_of_directories_do_not_matter(tmp_path: Path) -> None:
    """A state directory with `?`, `#`, `%`, quotes, blanks and bytes that are no UTF-8 in its name serves as any other."""
    state_dir = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"st?te #1 %41 'a' \xff\n"))
    os.mkdir(state_dir)
    ledger = Ledger(state_dir, epoch="a")
    ledger.register_inbox(b"/in", b"/out", 1.0)
    queries = Queries.open(state_dir)
    assert [row["path"] for row in queries.inboxes()] == [b"/in"]
    queries.close()
    ledger.close()
    assert sorted(os.listdir(state_dir)) == [LOCK_NAME, LEDGER_NAME]


def test_a_lock_that_is_held_too_long_is_named(state_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer waits for the lock, but not for ever: `ledger_busy`, which is worth trying again."""
    monkeypatch.setattr(ledger_connection, "LOCK_WAIT_S", 0.05)
    with write_lock(state_dir), pytest.raises(LedgerBusy) as refusal, write_lock(state_dir):
        pass
    assert refusal.value.recoverable


# --- names -----------------------------------------------------------------------------------------------------------------------

NAMES = [
    b"plain.wav",
    b"line\nbreak.wav",
    b"\xff\xfe not utf-8.wav",
    b"a'b\"c;--.wav",
    "žluťoučký кůň 🎤.wav".encode(),
    b"x" * 255,
    b"\r",
    b" ",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_bytes_and_come_back_as_they_were(ledger: Ledger, inbox: int, name: bytes) -> None:
    """Any name a Linux file can have comes back byte for byte from every table that holds it."""
    job = bring_to(ledger, inbox, "done", name)
    ledger.reserve_name(job, b"/out", [name], "transcript")
    assert ledger.job(job)["path"] == name
    assert next(iter(ledger.latest_per_path(inbox)))["path"] == name
    assert ledger.publications(job)[0]["path"] == name + b".txt"
    assert ledger.reserve_name(job, b"/out", [b"other"], "transcript") == name


def test_inode_numbers_beyond_a_signed_integer(ledger: Ledger, inbox: int) -> None:
    """Inode and device numbers of 64 bits, as some network file systems have them, are no error."""
    big = (1 << 64) - 1
    job = ledger.see(inbox, Sighting(path=b"a", dev=big, inode=big, size=1, mtime_ns=1, ctime_ns=1), 1.0)
    assert ledger.job(job)["inode"] == -1


def test_two_sources_never_share_a_name(ledger: Ledger, inbox: int) -> None:
    """`talk.wav` and `talk.mp3` both want `talk`: the first has it for ever, the other gets its own; asking again changes nothing."""
    wav, mp3 = bring_to(ledger, inbox, "transcribed", b"talk.wav"), bring_to(ledger, inbox, "transcribed", b"talk.mp3")
    assert ledger.reserve_name(wav, b"/out", [b"talk", b"talk.wav"], "transcript") == b"talk"
    assert ledger.reserve_name(mp3, b"/out", [b"talk", b"talk.mp3"], "transcript") == b"talk.mp3"
    assert ledger.reserve_name(mp3, b"/out", [b"talk", b"talk.mp3"], "transcript") == b"talk.mp3"
    assert ledger.reserve_name(wav, b"/out", [b"anything"], "transcript") == b"talk"
    assert ledger.reserve_name(wav, b"/out", [b"talk.wav.error"], "error") == b"talk.wav.error", "an error file has a name of its own"
    with pytest.raises(IllegalMove, match="taken"):
        ledger.reserve_name(mp3, b"/out", [b"talk", b"talk.wav.error"], "error")
    with pytest.raises(NoSuchJob):
        ledger.reserve_name(4711, b"/out", [b"free"], "transcript")


def test_a_name_belongs_to_the_source_not_to_the_job(ledger: Ledger, inbox: int) -> None:
    """The next version of a file gets the name of the former, so that its transcript replaces the old one."""
    first = bring_to(ledger, inbox, "done", b"talk.wav")
    assert ledger.reserve_name(first, b"/out", [b"talk"], "transcript") == b"talk"
    second = ledger.see(inbox, sighting(b"talk.wav", size=2000), 200.0)
    assert second != first
    assert ledger.reserve_name(second, b"/out", [b"elsewhere"], "transcript") == b"talk"


def test_another_outbox_is_another_set_of_names(ledger: Ledger, inbox: int) -> None:
    """When the outbox of an inbox changes, names of the old one are not carried into the new one, where somebody may own them."""
    other = ledger.register_inbox(b"/in2", b"/out2", 1.0)
    here, there = bring_to(ledger, inbox, "transcribed", b"talk.wav"), bring_to(ledger, other, "transcribed", b"talk.wav")
    assert ledger.reserve_name(here, b"/out", [b"talk"], "transcript") == b"talk"
    assert ledger.reserve_name(there, b"/out2", [b"talk"], "transcript") == b"talk"
    assert ledger.reserve_name(there, b"/out", [b"talk", b"talk.wav"], "transcript") == b"talk.wav"
    assert ledger.reserve_name(there, b"/out2", [b"talk"], "transcript") == b"talk"


def test_an_avoided_name_is_not_offered_again(ledger: Ledger, inbox: int) -> None:
    """A name where a user's own file stands is offered to nobody; a name that another source owns cannot be taken from it so."""
    wav, mp3 = bring_to(ledger, inbox, "transcribed", b"talk.wav"), bring_to(ledger, inbox, "transcribed", b"talk.mp3")
    assert ledger.reserve_name(wav, b"/out", [b"talk", b"talk.wav"], "transcript") == b"talk"
    ledger.avoid_name(mp3, b"/out", b"talk")
    assert ledger.reserve_name(wav, b"/out", [b"x"], "transcript") == b"talk", "taken away by a stranger"
    ledger.avoid_name(wav, b"/out", b"talk")
    assert ledger.reserve_name(wav, b"/out", [b"talk", b"talk.wav"], "transcript") == b"talk.wav"
    ledger.avoid_name(mp3, b"/out", b"never reserved")
    assert ledger.reserve_name(mp3, b"/out", [b"never reserved", b"talk", b"free"], "transcript") == b"free"


# --- transactions ----------------------------------------------------------------------------------------------------------------


def test_a_transaction_is_all_or_nothing(ledger: Ledger, inbox: int, state_dir: str) -> None:
    """Verbs in one `transaction()` are visible to others together or never, also those that sqlite-utils writes."""
    readers = Queries.open(state_dir)
    with ledger.transaction():
        job = ledger.see(inbox, sighting(b"a"), 1.0)
        ledger.settle(job, sighting(b"a"), JobOptions(), 1.0)
        assert sum(readers.counts().values()) == 0
    assert readers.counts()["ready"] == 1
    with pytest.raises(KeyError), ledger.transaction():
        ledger.claim(job, "anna", 2.0, lease_s=1)
        ledger.record_plan(Plan(workers=1, reason="why not"), 2.0)
        ledger.say("topic", {"a": 1}, 2.0)
        ledger.record_readings([Reading(gpu="", status="no_gpu", what="none")], 2.0)
        raise KeyError
    assert (ledger.counts()["ready"], ledger.last_plans(), ledger.heard("topic"), ledger.latest_readings()) == (1, [], None, [])
    readers.close()


def test_a_verb_refused_within_a_transaction_takes_back_only_itself(ledger: Ledger, inbox: int) -> None:
    """`publish` writes its publications and is then refused: caught within a transaction, nothing of it stays, the rest does."""
    running, ready = bring_to(ledger, inbox, "running", b"running"), bring_to(ledger, inbox, "ready", b"ready")
    with ledger.transaction():
        with pytest.raises(IllegalMove):
            ledger.publish(running, b"/out", [(b"running.txt", "txt", "ab")], 5.0)
        ledger.cancel(ready, 5.0)
    assert ledger.publications(running) == []
    assert ledger.job(ready)["state"] == "cancelled"
    with pytest.raises(NoSuchJob):
        ledger.publish(4711, b"/out", [(b"a.txt", "txt", "ab")], 5.0)


def test_an_old_retried_job_gives_way_to_new_content(ledger: Ledger, inbox: int) -> None:
    """A path whose older job lives again (retried) while a newer one is done: new content replaces the live one, whichever it is."""
    old = bring_to(ledger, inbox, "failed", b"a")
    new = ledger.see(inbox, sighting(b"a", size=2), 200.0)
    ledger.vanish(new, 201.0)
    ledger.retry(old, 202.0)
    newest = ledger.see(inbox, sighting(b"a", size=3), 203.0)
    assert (ledger.job(old)["state"], ledger.job(newest)["state"]) == ("gone", "seen")


def test_values_no_row_can_hold_are_refused_by_name(ledger: Ledger, inbox: int) -> None:
    """Nonsense from a child (a window of index −1, a job number of 30 digits, an inbox that is none) is an error of ours."""
    job = bring_to(ledger, inbox, "running", b"a")
    for nonsense in (
        lambda: ledger.checkpoint(job, "anna", window(-1), 5.0, lease_s=1),
        lambda: ledger.see(4711, sighting(b"b"), 5.0),
        lambda: ledger.see(inbox, sighting(b""), 5.0),
        lambda: ledger.see(inbox, sighting(b"b", size=10**30), 5.0),
        lambda: ledger.record_throughput(4711, workers=1, audio_s=1.0, wall_s=1.0, now=5.0),
        lambda: ledger.record_plan(Plan(workers=1, reason=""), 5.0),
        lambda: ledger.fail(job, "anna", ABSENT, 5.0),
    ):
        with pytest.raises(IllegalMove):
            nonsense()
    for verb in (ledger.cancel, ledger.retry, ledger.vanish):
        with pytest.raises(NoSuchJob):
            verb(10**30, 5.0)
    assert not ledger.exists(10**30)
    with pytest.raises(LookupError):
        ledger.job(10**30)
    assert [kept.index for kept in ledger.windows(job)] == [0]


def test_reading_on_while_writing(ledger: Ledger, inbox: int, state_dir: str) -> None:
    """Going through a list of jobs and moving each works while another process writes, too (no SQLITE_BUSY_SNAPSHOT)."""
    jobs = [bring_to(ledger, inbox, "failed", b"%d" % number) for number in range(3)]
    other = Ledger(state_dir, epoch="the desk")
    for row in ledger.jobs(state="failed"):
        other.say("topic", {"job": row["id"]}, 5.0)
        ledger.retry(row["id"], 5.0)
    for row in ledger.latest_per_path(inbox):
        other.say("topic", {"job": row["id"]}, 5.0)
        ledger.cancel(row["id"], 6.0)
    assert [ledger.job(job)["state"] for job in jobs] == ["cancelled"] * 3
    other.close()


def test_threads_take_turns(ledger: Ledger, inbox: int) -> None:
    """Two threads on one ledger never meet in one transaction: what one takes back leaves the other's verbs alone."""
    errors: list[Exception] = []

    def work(name: bytes, undo: bool) -> None:
        try:
            for number in range(40):
                try:
                    with ledger.transaction():
                        ledger.see(inbox, sighting(b"%s %d" % (name, number)), 1.0)
                        time.sleep(0.0005)
                        if undo:
                            raise KeyError
                except KeyError:
                    pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the test must hear of it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(b"kept", False)), threading.Thread(target=work, args=(b"undone", True))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sorted(row["path"] for row in ledger.jobs()) == sorted(b"kept %d" % number for number in range(40))


def test_a_full_disk_is_named_and_passes(ledger: Ledger, inbox: int) -> None:
    """When the disk is full a verb fails with `ledger_stuck`, changes nothing, and works again as soon as there is room."""
    (pages,) = ledger.db.conn.execute("PRAGMA page_count").fetchone()
    ledger.db.conn.execute(f"PRAGMA max_page_count = {pages + 1}")
    done = 0
    with pytest.raises(LedgerStuck) as refusal:
        for number in range(10_000):
            ledger.see(inbox, sighting(b"%d " % number + b"x" * 200), 1.0)
            done += 1
    assert refusal.value.recoverable
    assert sum(ledger.counts().values()) == done
    with pytest.raises(LedgerStuck), ledger.transaction():
        for number in range(10_000):
            ledger.see(inbox, sighting(b"%d y" % number + b"x" * 200), 1.0)
    assert sum(ledger.counts().values()) == done
    ledger.db.conn.execute("PRAGMA max_page_count = 1000000")
    ledger.see(inbox, sighting(b"room again"), 1.0)
    assert (sum(ledger.counts().values()), ledger.integrity()) == (done + 1, "ok")


def in_a_fork(work: Callable[[], None]) -> int:
    """Run something in a process of its own; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - a fork of the test process must never go on as a second one
            os.write(2, f"{error!r}\n".encode())
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def test_a_write_that_the_kernel_refuses_at_the_commit(state_dir: str) -> None:
    """A commit that cannot be written (here: a limit on the size of files) is taken back, and the same ledger goes on afterwards."""

    def work() -> None:
        ledger = Ledger(state_dir, epoch="a")
        inbox = ledger.register_inbox(b"/in", b"/out", 1.0)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        wal = os.path.getsize(file_of(state_dir).with_name(LEDGER_NAME + "-wal"))
        resource.setrlimit(resource.RLIMIT_FSIZE, (wal + 100_000, resource.RLIM_INFINITY))
        done = 0
        try:
            for number in range(10_000):
                ledger.see(inbox, sighting(b"%d" % number), 1.0)
                done += 1
        except LedgerStuck:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert 0 < done < 10_000
        assert sum(ledger.counts().values()) == done
        ledger.see(inbox, sighting(b"room again"), 1.0)
        assert (sum(ledger.counts().values()), ledger.integrity()) == (done + 1, "ok")
        ledger.close()

    assert in_a_fork(work) == 0


# --- several processes -----------------------------------------------------------------------------------------------------------

WRITER = """
import sys
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions, Sighting

state_dir, name, pairs = sys.argv[1], sys.argv[2].encode(), int(sys.argv[3])
ledger = Ledger(state_dir, epoch=sys.argv[2])
inbox = ledger.register_inbox(b"/in", b"/out", 1.0)
for number in range(pairs):
    sighting = Sighting(path=b"%s %d" % (name, number), dev=1, inode=1, size=1, mtime_ns=1, ctime_ns=1)
    job = ledger.see(inbox, sighting, 1.0)
    ledger.settle(job, sighting, JobOptions(), 2.0)
ledger.close()
"""

TRUNCATER = """
import select
import sys
from whisperd.ledger.ledger import Ledger

ledger = Ledger(sys.argv[1], epoch="truncater")
print("ready", flush=True)
done = 0
while not select.select([sys.stdin], [], [], 0.001)[0]:
    done += ledger.truncate_wal()
print(done, flush=True)
ledger.close()
"""


def start(script: str, *arguments: str, **pipes: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(script), *arguments], text=True, **pipes)


def test_two_processes_write_while_a_third_truncates_the_wal(state_dir: str) -> None:
    """400 verbs by two processes are all there, whole, while checkpoints run between them as fast as they can."""
    truncater = start(TRUNCATER, state_dir, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert truncater.stdout is not None
    assert truncater.stdout.readline() == "ready\n"
    writers = [start(WRITER, state_dir, name, "100") for name in ("anna", "bert")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    told, _ = truncater.communicate("stop\n", timeout=60)
    assert truncater.returncode == 0
    assert int(told) > 10, "the checkpoints did not get between the writes"
    queries = Queries.open(state_dir)
    paths = {row["path"] for row in queries.jobs(state="ready")}
    assert paths == {b"%s %d" % (name, number) for name in (b"anna", b"bert") for number in range(100)}
    assert all([event["verb"] for event in queries.events(row["id"])] == ["see", "settle"] for row in queries.jobs())
    assert queries.integrity() == "ok"
    queries.close()


def test_many_processes_make_the_first_ledger_together(state_dir: str) -> None:
    """The daemon and the desk may both be first: the schema is made once, and all of them can write."""
    writers = [start(WRITER, state_dir, name, "3") for name in ("anna", "bert", "cyril")]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    queries = Queries.open(state_dir)
    assert queries.counts()["ready"] == 9
    queries.close()


def test_a_killed_writer_leaves_no_half_transaction(state_dir: str) -> None:
    """SIGKILL at 20 random moments: the file is sound, everything said to be committed is there, and no see without its settle."""
    rng = random.Random(20)
    said = 0
    for life in range(20):
        ours, theirs = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                write_pairs_until_killed(state_dir, life, theirs)
            finally:
                os._exit(1)
        os.close(theirs)
        assert os.read(ours, 1), "the writer did not get to its first commit"
        said += 1
        time.sleep(rng.random() * 0.03)
        os.kill(pid, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
        while more := os.read(ours, 4096):
            said += len(more)
        os.close(ours)
        ledger = Ledger(state_dir, epoch="after")
        assert ledger.integrity() == "ok"
        counts = ledger.counts()
        assert counts["seen"] == 0, "a half transaction"
        assert said <= counts["ready"] <= said + life + 1, "a commit was lost"
        events = ledger.db.conn.execute("SELECT count(*), count(DISTINCT job_id) FROM event").fetchone()
        assert events == (2 * counts["ready"], counts["ready"])
        ledger.close()


def write_pairs_until_killed(state_dir: str, life: int, pipe: int) -> None:
    ledger = Ledger(state_dir, epoch=f"life {life}")
    inbox = ledger.register_inbox(b"/in", b"/out", 1.0)
    number = 0
    while True:
        number += 1
        with ledger.transaction():
            job = ledger.see(inbox, sighting(b"%d %d" % (life, number)), 1.0)
            ledger.settle(job, sighting(b"any"), JobOptions(), 1.0)
        os.write(pipe, b".")
        if number % 5 == 0:
            ledger.truncate_wal()


def test_a_reader_does_not_hold_up_a_checkpoint(ledger: Ledger, inbox: int, state_dir: str) -> None:
    """With a reader in the way `truncate_wal` says so at once (all writers wait for it meanwhile); without one it empties the WAL."""
    for number in range(20):
        ledger.see(inbox, sighting(b"%d" % number), 1.0)
    reader = Queries.open(state_dir)
    open_cursor = reader.jobs()
    next(open_cursor)
    ledger.see(inbox, sighting(b"one more"), 1.0)
    before = time.monotonic()
    assert ledger.truncate_wal() is False
    assert time.monotonic() - before < 5
    assert len(list(open_cursor)) == 19, "a reader sees one moment"
    reader.close()
    assert ledger.truncate_wal() is True
    assert file_of(state_dir).with_name(LEDGER_NAME + "-wal").stat().st_size == 0
    with ledger.transaction():
        assert ledger.truncate_wal() is False, "within a transaction there is nothing to wait for"


def test_a_reader_changes_nothing(state_dir: str) -> None:
    """A read-only connection cannot write, and opening and closing it leaves the file as it is, also when a killed writer left a WAL."""

    def write_and_die() -> None:
        ledger = Ledger(state_dir, epoch="a")
        bring_to(ledger, ledger.register_inbox(b"/in", b"/out", 1.0), "ready", b"a")
        os.kill(os.getpid(), signal.SIGKILL)

    assert os.WTERMSIG(in_a_fork(write_and_die)) == signal.SIGKILL
    wal = file_of(state_dir).with_name(LEDGER_NAME + "-wal")
    before = file_of(state_dir).read_bytes(), wal.read_bytes()
    assert before[1], "the writer left no WAL"
    queries = Queries.open(state_dir)
    assert queries.counts()["ready"] == 1
    for statement in ("DELETE FROM job", "INSERT INTO plan (at, workers, reason) VALUES (1, 1, 'x')", "PRAGMA user_version = 3", "VACUUM"):
        with pytest.raises(LedgerStuck, match="readonly"):
            queries.db.conn.execute(statement)
    queries.close()
    assert (file_of(state_dir).read_bytes(), wal.read_bytes()) == before


def test_data_version_tells_of_others_commits(ledger: Ledger, inbox: int, state_dir: str) -> None:
    """The number changes when another connection has committed, and not for our own writes."""
    other = Ledger(state_dir, epoch="the desk")
    before = ledger.data_version()
    job = bring_to(ledger, inbox, "ready", b"a")
    assert ledger.data_version() == before
    other.cancel(job, 5.0)
    assert ledger.data_version() != before
    other.close()


# --- backup ----------------------------------------------------------------------------------------------------------------------


def test_a_backup_opens_and_equals(ledger: Ledger, inbox: int, state_dir: str, tmp_path: Path) -> None:
    """A copy made while the ledger is in use opens as a ledger and holds the same rows; an older copy of that name is replaced."""
    for state in STATES:
        bring_to(ledger, inbox, state, state.encode())
    (tmp_path / "copy").mkdir()
    target = tmp_path / "copy" / LEDGER_NAME
    target.write_bytes(b"an old copy")
    target.with_name(LEDGER_NAME + ".partial").write_bytes(b"of an interrupted backup")
    ledger.backup(str(target))
    assert os.listdir(target.parent) == [LEDGER_NAME]
    ledger.truncate_wal()
    assert tables_of(target) == tables_of(file_of(state_dir))
    copy = Ledger(str(target.parent), epoch="restored")
    assert (copy.counts(), copy.integrity()) == (ledger.counts(), "ok")
    assert copy.interrupt_other_epochs(9.0) == [row["id"] for row in ledger.running()]
    copy.close()


def test_a_backup_holds_only_what_is_committed(ledger: Ledger, inbox: int, tmp_path: Path) -> None:
    """A backup made in the middle of a transaction does not hold its half."""
    bring_to(ledger, inbox, "ready", b"committed")
    with ledger.transaction():
        bring_to(ledger, inbox, "seen", b"not yet")
        ledger.backup(str(tmp_path / "copy.sqlite3"))
    assert [row[2] for row in tables_of(tmp_path / "copy.sqlite3")["job"]] == [b"committed"]


def test_a_backup_that_cannot_be_made_leaves_nothing(ledger: Ledger, tmp_path: Path) -> None:
    """A backup into a directory that is not there is a named error; the ledger goes on."""
    with pytest.raises(LedgerStuck, match="cannot back the ledger up"):
        ledger.backup(str(tmp_path / "absent" / "copy.sqlite3"))
    (tmp_path / "taken").mkdir()
    with pytest.raises(LedgerStuck):
        ledger.backup(str(tmp_path / "taken"))
    assert sorted(os.listdir(tmp_path)) == ["state", "taken"]
    ledger.register_inbox(b"/in", b"/out", 1.0)


# --- queries ---------------------------------------------------------------------------------------------------------------------


def test_counts_and_open_work(ledger: Ledger, inbox: int) -> None:
    """`counts` has every state, zeros too; `open_work` counts what must still happen, in inboxes that are in use only."""
    assert ledger.counts() == dict.fromkeys(STATES, 0)
    assert ledger.open_work() == {"seen": 0, "ready": 0, "running": 0, "unpublished": 0}
    for number, state in enumerate(STATES):
        for copy in range(number + 1):
            bring_to(ledger, inbox, state, b"%s %d" % (state.encode(), copy))
    assert ledger.counts() == {state: number + 1 for number, state in enumerate(STATES)}
    assert ledger.open_work() == {"seen": 1, "ready": 2, "running": 3, "unpublished": 4 + 6}
    failed = next(iter(ledger.jobs(state="failed")))["id"]
    ledger.report(failed, b"/out", [(b"e.txt", "error", "ab")], 9.0)
    assert ledger.open_work()["unpublished"] == 4 + 5
    ledger.retire_inboxes([])
    assert ledger.open_work() == {"seen": 0, "ready": 0, "running": 0, "unpublished": 0}
    assert ledger.counts()["ready"] == 2


def test_ready_honours_time_inboxes_and_order(ledger: Ledger, inbox: int) -> None:
    """Only jobs whose time has come, in inboxes that are up and in use, are ready: urgent first, then the one that waits longest."""
    other = ledger.register_inbox(b"/in2", b"/out", 1.0)
    normal, low, urgent = (ledger.see(inbox, sighting(name), 1.0) for name in (b"normal", b"low", b"urgent"))
    for job, priority in ((normal, 1), (low, 2), (urgent, 0)):
        ledger.settle(job, sighting(b""), JobOptions(), 10.0, priority=priority)
    elsewhere = bring_to(ledger, other, "ready", b"elsewhere", now=0.0)
    assert [row["id"] for row in ledger.ready(10.0)] == [urgent, elsewhere, normal, low]
    ledger.claim(urgent, "anna", 11.0, lease_s=60)
    ledger.release(urgent, "anna", DIED, 12.0, not_before=50.0)
    assert [row["id"] for row in ledger.ready(49.9)] == [elsewhere, normal, low]
    assert ledger.ready(50.0)[0]["id"] == urgent
    ledger.hold(normal, 12.0)
    assert [row["id"] for row in ledger.ready(50.0)] == [urgent, elsewhere, low]
    ledger.unhold(normal, 12.5)
    ledger.inbox_down(other, "the share is gone", 13.0)
    assert elsewhere not in [row["id"] for row in ledger.ready(99.0)]
    ledger.inbox_up(other, 14.0)
    assert elsewhere in [row["id"] for row in ledger.ready(99.0)]
    ledger.retire_inboxes([inbox])
    assert elsewhere not in [row["id"] for row in ledger.ready(99.0)]
    ledger.register_inbox(b"/in2", b"/out", 15.0)
    assert elsewhere in [row["id"] for row in ledger.ready(99.0)]


def test_ready_offers_something_of_every_kind(ledger: Ledger, inbox: int) -> None:
    """However many wait, there is a choice: of each inbox and class the oldest, the shortest, and those that ask for a place apart."""
    other = ledger.register_inbox(b"/in2", b"/out", 1.0)
    wanted = set()
    with ledger.transaction():
        for number in range(40):
            job = ledger.see(inbox, sighting(b"%d" % number, size=1000 - number), 1.0)
            ledger.settle(job, sighting(b"", size=1000 - number), JobOptions(), 10.0 + number)
            wanted |= {job} if number < 8 or number >= 32 else set()
        for name, place, priority in ((b"low", inbox, 2), (b"elsewhere", other, 1)):
            job = ledger.see(place, sighting(name, size=10**6), 1.0)
            ledger.settle(job, sighting(name, size=10**6), JobOptions(), 99.0, priority=priority)
            wanted.add(job)
        for name, failure, needs_mib in ((b"killer", DIED, None), (b"giant", DIED, 9000)):
            job = ledger.see(inbox, sighting(name, size=10**6), 1.0)
            ledger.settle(job, sighting(name, size=10**6), JobOptions(), 99.0)
            ledger.claim(job, "anna", 99.0, lease_s=60)
            ledger.release(job, "anna", failure, 99.0, not_before=99.0, needs_mib=needs_mib)
            wanted.add(job)
    rows = ledger.ready(100.0, limit=8)
    assert {row["id"] for row in rows} == wanted
    assert [row["needs_mib"] for row in rows if row["path"] == b"giant"] == [9000]


def test_the_backlog_is_told_by_model(ledger: Ledger, inbox: int) -> None:
    """What waits of each model: how many, how long, how many urgent; "auto" is the default of now; what is held, runs, waits for its
    time or lies in an inbox that is down is no backlog."""
    down = ledger.register_inbox(b"/in2", b"/out", 1.0)
    ledger.inbox_down(down, "gone", 1.0)

    def drop(name: bytes, model: str, at: float, priority: int = 1, place: int = inbox) -> int:
        job = ledger.see(place, sighting(name), 1.0)
        ledger.settle(job, sighting(name), JobOptions(model=model), at, priority=priority)
        return job

    assert ledger.backlog(100.0, default_model="small") == []
    for name, model, at, priority in ((b"a", "auto", 10.0, 1), (b"b", "small", 20.0, 0), (b"c", "base", 30.0, 2), (b"d", "auto", 40.0, 0)):
        drop(name, model, at, priority)
    drop(b"e", "large-v3", 1.0, place=down)
    ledger.hold(drop(b"f", "auto", 1.0), 2.0)
    ledger.claim(drop(b"g", "auto", 1.0), "anna", 2.0, lease_s=60)
    drop(b"h", "auto", 200.0)
    told = {row["model"]: row for row in ledger.backlog(100.0, default_model="small")}
    assert told == {
        "small": {"model": "small", "jobs": 3, "oldest_s": 90.0, "urgent": 2},
        "base": {"model": "base", "jobs": 1, "oldest_s": 70.0, "urgent": 0},
    }


def test_the_operators_word(ledger: Ledger, inbox: int) -> None:
    """Held jobs wait, whatever happens to them, until they are released; a class given before a file has settled stays; cancelling what has
    not settled leaves a job that can be tried again; what is said twice or too late is refused in words."""
    running = bring_to(ledger, inbox, "running", b"running")
    ledger.hold(running, 110.0)
    row = ledger.job(running)
    assert (row["state"], row["held"], row["attempts"], row["lease_child"], len(ledger.windows(running))) == ("ready", 1, 0, None, 1)
    assert ledger.open_work()["ready"] == 0 and ledger.oldest_ready_at() is None and ledger.ready(1e9) == []
    with pytest.raises(IllegalMove, match="held already"):
        ledger.hold(running, 111.0)
    with pytest.raises(IllegalMove, match="it is held"):
        ledger.claim(running, "anna", 111.0, lease_s=60)
    with pytest.raises(LeaseLost if ledger.job(running)["state"] == "running" else IllegalMove):
        ledger.checkpoint(running, "anna", window(1), 111.0, lease_s=60)
    ledger.unhold(running, 112.0)
    with pytest.raises(IllegalMove, match="not held"):
        ledger.unhold(running, 113.0)
    ledger.claim(running, "anna", 114.0, lease_s=60)
    ledger.prioritise(running, 0, 115.0)
    assert (ledger.job(running)["state"], ledger.job(running)["priority"]) == ("running", 0)
    seen = bring_to(ledger, inbox, "seen", b"seen")
    ledger.prioritise(seen, 2, 116.0)
    ledger.hold(seen, 116.0)
    ledger.settle(seen, sighting(b"seen"), JobOptions(), 117.0, priority=1)
    assert (ledger.job(seen)["priority"], ledger.job(seen)["held"]) == (2, 1)
    ledger.cancel(seen, 118.0)
    ledger.retry(seen, 119.0)
    assert [row["id"] for row in ledger.ready(120.0)] == [seen], "cancelled and tried again, it is held no more"
    unsettled = bring_to(ledger, inbox, "seen", b"unsettled")
    ledger.cancel(unsettled, 121.0, options=JobOptions(language="cs"))
    assert ledger.see(inbox, sighting(b"unsettled"), 122.0) == unsettled, "it is not taken for a new file"
    ledger.retry(unsettled, 123.0)
    assert (ledger.job(unsettled)["ready_at"], ledger.options(ledger.job(unsettled)).language) == (123.0, "cs")
    done = bring_to(ledger, inbox, "done", b"done")
    for verb in (ledger.cancel, ledger.hold, ledger.unhold):
        with pytest.raises(IllegalMove, match="it is done"):
            verb(done, 130.0)
        with pytest.raises(NoSuchJob):
            verb(4711, 130.0)
    with pytest.raises(IllegalMove):
        ledger.prioritise(running, 3, 131.0)


def test_what_the_optimiser_keeps(ledger: Ledger, inbox: int) -> None:
    """Minutes, lessons and whole plans come back as they were told; told again, the last word stands; arrivals have no names."""
    minute = CardMinute(gpu="GPU-1", at=60.0, samples=60, memory_total_mib=24_000, utilisation_mean_percent=51.5, workers=1.5, audio_s=12.5)
    cpu = CardMinute(gpu="cpu", at=120.0, samples=1)
    ledger.record_minutes([minute, cpu])
    ledger.record_minutes([CardMinute(gpu="cpu", at=120.0, samples=2)])
    assert ledger.minutes(0.0) == [minute, CardMinute(gpu="cpu", at=120.0, samples=2)]
    assert [kept.gpu for kept in ledger.minutes(61.0)] == ["cpu"]
    for speed in (1.5, 2.5):
        ledger.learn([{**LESSON, "body": {"speed": speed, "seen": [1, 2]}}, {**LESSON, "batch": 16, "body": {}}], 5.0)
    assert ledger.learned() == [{**LESSON, "batch": 16, "body": {}}, {**LESSON, "body": {"speed": 2.5, "seen": [1, 2]}}][::-1]
    ledger.record_plan(Plan(workers=1, reason="old style"), 1.0)
    ledger.record_plan(Plan(workers=2, reason="it pays"), 2.0, body={"cards": [{"gpu": "GPU-1"}], "reasons": []})
    assert [row["body"] for row in ledger.last_plans()] == [{"cards": [{"gpu": "GPU-1"}], "reasons": []}, None]
    for state in STATES:
        bring_to(ledger, inbox, state, state.encode())
    rows = ledger.arrivals(0.0)
    assert [row["state"] for row in rows] == ["ready", "running", "transcribed", "done", "failed", "cancelled"]
    assert not any(isinstance(value, bytes) for row in rows for value in row.values())
    assert {row["model"] for row in rows} == {"auto"}
    assert [row["state"] for row in ledger.arrivals(1e6)] == ["ready", "running", "transcribed"]


def test_unpublished(ledger: Ledger, inbox: int) -> None:
    """Work for the outboxes: transcripts that are not out yet, and failures whose error file is not; oldest first."""
    jobs = {state: bring_to(ledger, inbox, state, state.encode()) for state in STATES}
    waiting = [row["id"] for row in ledger.unpublished()]
    assert waiting == [jobs["transcribed"], jobs["failed"]]
    ledger.report(jobs["failed"], b"/out", [], 9.0)
    ledger.publish(jobs["transcribed"], b"/out", [(b"t.txt", "txt", "ab")], 9.0)
    assert ledger.unpublished() == []
    ledger.retry(jobs["failed"], 10.0)
    ledger.claim(jobs["failed"], "anna", 11.0, lease_s=60)
    ledger.fail(jobs["failed"], "anna", BAD, 12.0)
    assert [row["id"] for row in ledger.unpublished()] == [jobs["failed"]], "a second failure is reported again"


def test_an_outbox_that_is_away_hides_no_other(ledger: Ledger, inbox: int) -> None:
    """However many wait for it and however long: what another outbox can have is told all the same."""
    for number in range(20):
        bring_to(ledger, inbox, "transcribed", b"away %d" % number)
    other = ledger.register_inbox(b"/other", b"/other out", 1.0)
    jobs = [bring_to(ledger, other, state, state.encode()) for state in ("transcribed", "failed")]
    assert [row["id"] for row in ledger.unpublished(2)] != jobs
    assert [row["id"] for row in ledger.unpublished(2, but=[b"/out"])] == jobs
    ledger.publish(jobs[0], b"/other out", [(b"t.txt", "txt", "ab")], 200.0, disposal="delete")
    assert [row["id"] for row in ledger.owed_disposals(2, but=[b"/out"])] == jobs[:1]
    assert ledger.unpublished(2, but=[b"/out", b"/other out"]) == ledger.owed_disposals(2, but=[b"/other out"]) == []


def test_what_a_job_has(ledger: Ledger, inbox: int) -> None:
    """Options, windows in order, events and publications of a job come back as the nouns they were."""
    options = JobOptions(language="cs", temperatures=(0.0,), formats=("txt",))
    job = ledger.see(inbox, sighting(b"a"), 1.0)
    ledger.settle(job, sighting(b"a"), options, 2.0)
    ledger.claim(job, "anna", 3.0, lease_s=60)
    for index in (2, 0, 1, 1):
        ledger.checkpoint(job, "anna", window(index), 4.0, lease_s=60)
    assert ledger.options(ledger.job(job)) == options
    assert ledger.windows(job) == [window(0), window(1), window(2)]
    assert [event["to_state"] for event in ledger.events(job)] == ["seen", "ready", "running"]
    ledger.finish(job, "anna", 5.0, transcript="t", sha256="ab", duration_s=90.0, language="cs", process_s=1.0, quality="good")
    assert ledger.windows(job) == []
    ledger.publish(job, b"/out", [(b"b.txt", "txt", "ab"), (b"a.srt", "srt", "cd")], 6.0)
    assert [row["path"] for row in ledger.publications(job)] == [b"a.srt", b"b.txt"]
    assert len(ledger.publications_of_source(inbox, b"a")) == 2
    assert (ledger.job(job)["inbox_path"], ledger.job(job)["outbox"]) == (b"/in", b"/out")
    assert ledger.outcomes_since(6.0) == {"done": 1, "failed": 0}
    assert ledger.outcomes_since(6.1) == {"done": 0, "failed": 0}


def test_only_the_last_window_has_a_front_end(ledger: Ledger, inbox: int) -> None:
    """The state to go on from is that of the last window kept; those before it have none, and a window told again changes nothing."""
    job = bring_to(ledger, inbox, "running", b"a")
    assert ledger.front_end(job) == b"state 0"
    ledger.checkpoint(job, "anna", window(1), 4.0, lease_s=60, made_by=MADE_BY, front_end=b"\x00\xff")
    ledger.checkpoint(job, "anna", window(0), 5.0, lease_s=60, made_by=MADE_BY, front_end=b"again")
    assert ledger.front_end(job) == b"\x00\xff"
    kept = ledger.db.conn.execute("SELECT window_index, front_end FROM checkpoint ORDER BY window_index")
    assert list(kept) == [(0, None), (1, b"\x00\xff")]
    ledger.checkpoint(job, "anna", window(2), 6.0, lease_s=60, made_by=MADE_BY)
    assert ledger.front_end(job) == b"", "not known, rather than an older one"
    assert ledger.front_end(bring_to(ledger, inbox, "ready", b"b")) == b""


def test_windows_of_another_make_are_dropped(ledger: Ledger, inbox: int) -> None:
    """What the same model and options made stays; with anything else all windows go, and the job stands at its beginning."""
    job = bring_to(ledger, inbox, "running", b"a")
    ledger.checkpoint(job, "anna", window(1), 4.0, lease_s=60, made_by=MADE_BY)
    assert ledger.drop_foreign_checkpoints(job, "anna", MADE_BY, 5.0) == 0
    assert len(ledger.windows(job)) == 2
    with pytest.raises(LeaseLost):
        ledger.drop_foreign_checkpoints(job, "bert", "another model", 5.0)
    assert ledger.drop_foreign_checkpoints(job, "anna", "another model", 5.0) == 2
    assert (ledger.windows(job), ledger.front_end(job), ledger.job(job)["position_s"]) == ([], b"", 0.0)
    assert ledger.drop_foreign_checkpoints(job, "anna", "another model", 6.0) == 0


def test_one_word_renews_all_leases_of_a_child(ledger: Ledger, inbox: int) -> None:
    """`renew` moves the leases of every job in a child's hands, and nobody else's; it leaves no event and no trace in the work."""
    mine = [bring_to(ledger, inbox, "running", b"%d" % number) for number in range(3)]
    other = bring_to(ledger, inbox, "ready", b"other")
    ledger.claim(other, "bert", 102.0, lease_s=60)
    before = [ledger.job(job) for job in (*mine, other)]
    events = [ledger.events(job) for job in mine]
    ledger.renew("anna", 500.0, lease_s=60)
    assert [ledger.job(job)["lease_until"] for job in (*mine, other)] == [560.0, 560.0, 560.0, 162.0]
    changed = ("lease_until", "updated_at", "verb", "note")
    after = [ledger.job(job) for job in (*mine, other)]
    assert [{**row, **dict.fromkeys(changed)} for row in after] == [{**row, **dict.fromkeys(changed)} for row in before]
    assert [ledger.events(job) for job in mine] == events


def test_verdicts_are_counted_and_listed(ledger: Ledger, inbox: int) -> None:
    """Every transcript keeps its verdict; only those that are out are counted; a list can be kept to one verdict."""
    assert ledger.qualities() == {"good": 0, "second_pass": 0, "doubtful": 0}
    good = bring_to(ledger, inbox, "done", b"good")
    doubtful = []
    for name in (b"bad", b"not out yet"):
        job = bring_to(ledger, inbox, "running", name)
        ledger.finish(job, "anna", 5.0, transcript="t", sha256="ab", duration_s=9.0, language="en", process_s=1.0, quality="doubtful")
        doubtful.append(job)
    ledger.publish(doubtful[0], b"/out", [(b"bad.txt", "txt", "ab")], 6.0)
    assert ledger.qualities() == {"good": 1, "second_pass": 0, "doubtful": 1}
    assert [row["id"] for row in ledger.jobs(quality="doubtful")] == doubtful
    assert [row["id"] for row in ledger.jobs(quality="doubtful", state="done")] == doubtful[:1]
    assert [row["id"] for row in ledger.jobs(quality="good", inbox=b"/in")] == [good]
    job = bring_to(ledger, inbox, "running", b"c")
    with pytest.raises(IllegalMove):
        ledger.finish(job, "anna", 5.0, transcript="t", sha256="ab", duration_s=9.0, language="en", process_s=1.0, quality="excellent")


def test_the_peak_of_a_batchs_shape_only_rises(ledger: Ledger) -> None:
    """The most memory seen with a shape is kept; another beam, length or model is another shape."""
    shape = {"gpu": "GPU-1", "driver": "570", "model": "small", "compute_type": "float16", "batch": 8, "beam": 5, "frames": 3000}
    for peak_mib, at in ((2000, 1.0), (2500, 2.0), (1900, 3.0)):
        ledger.record_vram_peak(**shape, peak_mib=peak_mib, now=at)
    ledger.record_vram_peak(**{**shape, "beam": 1}, peak_mib=900, now=4.0)
    kept = ledger.db.conn.execute("SELECT beam, peak_mib, measured_at FROM vram_peak ORDER BY beam")
    assert list(kept) == [(1, 900, 4.0), (5, 2500, 2.0)]


def test_lists_of_jobs(ledger: Ledger, inbox: int) -> None:
    """Jobs are listed by state, inbox, direction and number; the newest of a path is what is known of it."""
    other = ledger.register_inbox(b"/in2", b"/out", 1.0)
    first = bring_to(ledger, inbox, "done", b"a")
    second = ledger.see(inbox, sighting(b"a", size=2), 5.0)
    third = bring_to(ledger, other, "running", b"a")
    assert [row["id"] for row in ledger.jobs()] == [first, second, third]
    assert [row["id"] for row in ledger.jobs(newest=True, limit=2)] == [third, second]
    assert [row["id"] for row in ledger.jobs(inbox=b"/in")] == [first, second]
    assert [row["id"] for row in ledger.jobs(inbox=b"/in", state="done")] == [first]
    assert [(row["id"], row["size"], row["state"]) for row in ledger.latest_per_path(inbox)] == [(second, 2, "seen")]
    assert [row["id"] for row in ledger.running()] == [third]
    assert ledger.live_job(inbox, b"a")["id"] == second  # type: ignore[index]
    assert ledger.live_job(inbox, b"b") is None


def test_what_the_daemon_says_of_itself(ledger: Ledger, inbox: int) -> None:
    """Readings, plans, alerts and topics: the newest is what is asked for; unknown figures stay unknown."""
    unknown = Reading(gpu="GPU-1", status="ok", what="")
    ledger.record_readings([Reading(gpu="GPU-1", status="ok", what="", vram_used_mib=1)], 1.0)
    ledger.record_readings([unknown, Reading(gpu="GPU-2", status="lost", what="fell off the bus")], 2.0)
    assert [(row["gpu"], row["at"], row["vram_used_mib"]) for row in ledger.latest_readings()] == [
        ("GPU-1", 2.0, None),
        ("GPU-2", 2.0, None),
    ]
    for workers in (1, 2):
        ledger.record_plan(Plan(workers=workers, reason="because"), float(workers))
    assert [row["workers"] for row in ledger.last_plans()] == [2, 1]
    assert [ledger.raise_alert("heat", "86 °C", 1.0), ledger.raise_alert("heat", "87 °C", 2.0)] == [True, False]
    assert [row["what"] for row in ledger.open_alerts()] == ["86 °C"]
    assert [ledger.clear_alert("heat", 3.0), ledger.clear_alert("heat", 4.0)] == [True, False]
    assert ledger.raise_alert("heat", "again", 5.0)
    ledger.say("pulse", {"pid": 1}, 1.0)
    ledger.say("pulse", {"pid": 2}, 2.0)
    assert ledger.heard("pulse") == (2.0, {"pid": 2})
    assert ledger.heard("silence") is None
    job = bring_to(ledger, inbox, "ready", b"a")
    ledger.record_throughput(job, workers=1, audio_s=60.0, wall_s=2.0, now=5.0)
    assert ledger.throughput_since(5.0) == (60.0, 2.0)
    assert ledger.throughput_since(5.1) == (0.0, 0.0)
    assert ledger.oldest_ready_at() == 101.0


def test_prune_drops_only_what_is_old(ledger: Ledger, inbox: int) -> None:
    """Old readings, samples, plans and the history of jobs that ended go; jobs, live history and the last plan stay."""
    done = bring_to(ledger, inbox, "done", b"done", now=1.0)
    late = bring_to(ledger, inbox, "done", b"late", now=500.0)
    running = bring_to(ledger, inbox, "running", b"running", now=1.0)
    for at in (1.0, 500.0):
        ledger.record_readings([Reading(gpu="", status="no_gpu", what="none")], at)
        ledger.record_throughput(done, workers=1, audio_s=1.0, wall_s=1.0, now=at)
        ledger.record_minutes([CardMinute(gpu="cpu", at=at, samples=1)])
    ledger.learn([{**LESSON, "body": {}}], 1.0)
    ledger.record_plan(Plan(workers=1, reason="old"), 1.0)
    ledger.record_plan(Plan(workers=2, reason="old, and the last"), 2.0)
    events = len(ledger.events(done))
    assert ledger.prune(readings_before=100.0, events_before=100.0) == 1 + 1 + 1 + 1 + events
    assert (ledger.events(done), len(ledger.events(late)), len(ledger.events(running))) == ([], events, 3)
    assert ledger.counts()["done"] == 2
    assert [plan["workers"] for plan in ledger.last_plans()] == [2]
    assert [minute.at for minute in ledger.minutes(0.0)] == [500.0]
    assert len(ledger.learned()) == 1, "what was learned is kept for ever"


def test_inboxes_keep_their_numbers(ledger: Ledger) -> None:
    """An inbox that is named again has its old number and comes back into use; `since` is when it went up or down."""
    number = ledger.register_inbox(b"/in", b"/out", 1.0)
    ledger.retire_inboxes([])
    assert ledger.inboxes() == []
    assert [row["id"] for row in ledger.inboxes(active_only=False)] == [number]
    assert ledger.register_inbox(b"/in", b"/other", 2.0) == number
    ledger.inbox_down(number, "gone", 3.0)
    ledger.inbox_down(number, "still gone", 4.0)
    (row,) = ledger.inboxes()
    assert (row["state"], row["what"], row["since"], row["outbox"]) == ("down", "still gone", 3.0, b"/other")
    ledger.inbox_up(number, 5.0)
    ledger.inbox_up(number, 6.0)
    (row,) = ledger.inboxes()
    assert (row["state"], row["what"], row["since"], row["scanned_at"]) == ("up", "", 5.0, 6.0)


# --- released ledgers ------------------------------------------------------------------------------------------------------------

IN_EACH = {"seen": 1, "ready": 2, "running": 1, "transcribed": 1, "done": 2, "failed": 1, "cancelled": 1, "gone": 1}
NEWEST = "schema_4"
KEPT = ["schema_1", "schema_2", "schema_3", "schema_4"]


def write_newest(target: Path) -> None:
    """Write the ledger that whisperd with the newest schema leaves behind: jobs in all states, small, in one file."""
    scratch = target.parent / "scratch"
    scratch.mkdir()
    ledger = Ledger(str(scratch), epoch="the life that ended")
    inbox = ledger.register_inbox(b"/srv/whisperd/inbox", b"/srv/whisperd/outbox", 1.0)
    for state, count in IN_EACH.items():
        for number in range(count):
            job = bring_to(ledger, inbox, state, f"{state} {number}.wav".encode(), now=1_700_000_000.0)
            if state == "done":
                ledger.reserve_name(job, b"/srv/whisperd/outbox", [b"done %d" % number], "transcript")
    bring_to(ledger, inbox, "done", NAMES[2], now=1_700_000_100.0)
    ledger.record_plan(Plan(workers=2, reason="two fit"), 1_700_000_000.0, body={"cards": []})
    ledger.record_minutes([CardMinute(gpu="GPU-1", at=1_700_000_000.0, samples=60)])
    ledger.learn([{**LESSON, "body": {"speed": 1.5}}], 1_700_000_000.0)
    ledger.record_readings([Reading(gpu="GPU-1", status="ok", what="", vram_used_mib=1)], 1_700_000_000.0)
    ledger.say("pulse", {"pid": 1}, 1_700_000_000.0)
    ledger.close()
    with closing(sqlite3.connect(scratch / LEDGER_NAME, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = DELETE")
        connection.execute("PRAGMA page_size = 1024")
        connection.execute("VACUUM")
    os.replace(scratch / LEDGER_NAME, target)
    shutil.rmtree(scratch)


@pytest.mark.parametrize("name", KEPT)
def test_a_ledger_of_every_released_version_opens(state_dir: str, name: str) -> None:
    """A ledger file of every released version opens for ever, with all its jobs, and works on. What an older version does not know
    (who made its windows, how good its transcripts are) is unknown, never made up."""
    shutil.copy(RELEASED / f"{name}.sqlite3", file_of(state_dir))
    ledger = Ledger(state_dir, epoch="a new life")
    assert ledger.counts() == {**IN_EACH, "done": IN_EACH["done"] + 1}
    assert ledger.integrity() == "ok"
    assert b"\xff\xfe not utf-8.wav" in {row["path"] for row in ledger.jobs()}
    (running,) = ledger.running()
    assert ledger.windows(running["id"]) == [window(0)]
    assert ledger.options(running) == JobOptions()
    assert ledger.interrupt_other_epochs(1_700_001_000.0) == [running["id"]]
    (transcribed,) = ledger.jobs(state="transcribed")
    ledger.publish(transcribed["id"], transcribed["outbox"], [(b"t.txt", "txt", "ab")], 1_700_001_000.0)
    assert len(ledger.due_notices(1_700_001_000.0, 10)) == len(ledger.owed_disposals(10)) == (3 if name == "schema_4" else 0)
    assert (ledger.result("ab", "q") is not None) == (name == "schema_4")
    assert len({row[0] for row in ledger.identities(1)}) == len(list(ledger.jobs()))
    told = name != "schema_1"
    assert ledger.qualities()["good"] == (IN_EACH["done"] + 2 if told else 0)
    assert ledger.front_end(running["id"]) == (b"state 0" if told else b"")
    ledger.claim(running["id"], "anna", 1_700_001_001.0, lease_s=60)
    assert ledger.drop_foreign_checkpoints(running["id"], "anna", MADE_BY, 1_700_001_002.0) == (0 if told else 1)
    ledger.close()


@pytest.mark.parametrize("name", KEPT)
def test_an_old_ledger_is_as_strict_as_a_new_one(state_dir: str, tmp_path: Path, name: str) -> None:
    """A ledger that was brought up to date has every table, trigger, CHECK and index of one made today, to the letter."""
    made = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name"
    (tmp_path / "new").mkdir()
    new = Ledger(str(tmp_path / "new"), epoch="a")
    shutil.copy(RELEASED / f"{name}.sqlite3", file_of(state_dir))
    old = Ledger(state_dir, epoch="a")
    assert list(old.db.conn.execute(made)) == list(new.db.conn.execute(made))
    with pytest.raises(IllegalMove, match="illegal move"), old.transaction():
        old.db.conn.execute("UPDATE job SET state = 'done', verb = 'publish', ended_at = 1.0 WHERE state = 'ready'")
    with pytest.raises(IllegalMove), old.transaction():
        old.db.conn.execute("UPDATE job SET verb = 'report', quality = 'excellent' WHERE state = 'failed'")
    old.close()
    new.close()


def test_an_old_ledger_is_not_read_before_the_daemon_has_seen_it(state_dir: str) -> None:
    """The desk changes nothing: before the daemon has brought an older ledger up to date, it says so and what to do."""
    shutil.copy(RELEASED / "schema_1.sqlite3", file_of(state_dir))
    before = file_of(state_dir).read_bytes()
    with pytest.raises(StateDirError, match="older whisperd") as refusal:
        Queries.open(state_dir)
    assert "restart the daemon" in refusal.value.hint
    assert file_of(state_dir).read_bytes() == before
    Ledger(state_dir, epoch="a").close()
    Queries.open(state_dir).close()


def test_a_released_schema_is_not_edited(state_dir: str) -> None:
    """What the schemas make today is what they made when the file was kept: a change is a new migration.

    As long as no version with the newest schema is released, write the file anew: `python tests/rooms/test_ledger.py`.
    """
    db = open_for_writing(state_dir)
    made = "SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type, name"
    today = list(db.conn.execute(made))
    db.conn.close()
    assert MIGRATIONS._migrations[-1].name == NEWEST
    with closing(sqlite3.connect(RELEASED / f"{NEWEST}.sqlite3")) as connection:
        assert today == list(connection.execute(made))


if __name__ == "__main__":
    RELEASED.mkdir(parents=True, exist_ok=True)
    write_newest(RELEASED / f"{NEWEST}.sqlite3")
