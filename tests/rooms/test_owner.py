"""owner: to whom what is published is given, where whisperd may not give it: the real writer process as a user without privileges."""

from __future__ import annotations

import grp
import os
import pwd
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from whisperd.outbox import place
from whisperd.vocabulary import JobOptions, Summary, Transcript
from whisperd.wire import ServeOutbox

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

STRANGER = 54321
PUBLISH_TWICE = """
import os, sys
import msgspec
from whisperd.log import to_parent
from whisperd.outbox.__main__ import answer, prepare
from whisperd.wire import Publish, Published, ServeOutbox

path, uid, gid, *groups = sys.argv[1:]
os.setgroups([int(group) for group in groups])
os.setgid(54321)
os.setuid(54321)
to_parent()
desk = prepare(ServeOutbox(path=os.fsencode(path), file_mode=0o664, directory_mode=0o775, like=b"/", uid=int(uid), gid=int(gid)))
for number in (1, 2):
    with open(0, "rb", closefd=False) as staged:
        base = b"folder %d/talk" % number
        found = answer(desk, Publish(job=number, base=base, formats=("txt", "json"), own=(), stale=()), [staged.fileno()])
        assert isinstance(found, Published), found
"""


@pytest.fixture
def outbox() -> Iterator[Path]:
    """An outbox that a stranger can reach, unlike those of other tests."""
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        found = Path(place, "outbox")
        found.mkdir()
        yield found


def publish_as_a_stranger(outbox: Path, *, uid: int = -1, gid: int = -1, groups: tuple[int, ...] = ()) -> list[str]:
    """What the writer says while it publishes four files in two folders, as somebody without any capability."""
    os.chown(outbox, STRANGER, STRANGER)
    summary = Summary(
        duration_s=1.0,
        speech_s=0.0,
        windows=1,
        source_sha256="cd" * 32,
        container="wav",
        codec="pcm_s16le",
        model="demo",
        model_revision="1",
        device="cpu",
        compute_type="int8",
        engine_version="1",
    )
    transcript = Transcript(
        source="talk.wav", size=1, mtime_ns=1, language="en", language_probability=0.9, segments=(), options=JobOptions(), summary=summary
    )
    with tempfile.TemporaryFile() as file:
        file.write(msgspec.json.encode(transcript))
        file.flush()
        command = [sys.executable, "-c", PUBLISH_TWICE, str(outbox), str(uid), str(gid), *map(str, groups)]
        done = subprocess.run(command, stdin=file, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert len([path for path in outbox.rglob("*") if path.is_file()]) == 4
    return done.stderr.splitlines()


@needs_root
def test_an_owner_that_cannot_be_given_is_said_once_by_name(outbox: Path) -> None:
    """All is published, as our own and with the mode that was asked for; the log names the outbox, the user, the group and what to do."""
    daemon = pwd.getpwnam("daemon")
    (said,) = publish_as_a_stranger(outbox, uid=daemon.pw_uid, gid=daemon.pw_gid)
    assert "WARNING" in said and str(outbox) in said
    assert "to user daemon and to group daemon" in said and "CAP_CHOWN" in said and "remove `owner` and `group` from [outbox]" in said
    for path in outbox.rglob("*"):
        found = path.stat()
        assert (found.st_uid, found.st_gid) == (STRANGER, STRANGER)
        assert stat.S_IMODE(found.st_mode) == (0o664 if path.is_file() else 0o775)


@needs_root
def test_what_can_be_had_of_an_owner_is(outbox: Path) -> None:
    """A group that we are a member of is given though the user cannot be; only the user is complained of."""
    games = grp.getgrnam("games").gr_gid
    (said,) = publish_as_a_stranger(outbox, uid=pwd.getpwnam("daemon").pw_uid, gid=games, groups=(games,))
    assert "to user daemon:" in said and "games" not in said
    assert {path.stat().st_gid for path in outbox.rglob("*")} == {games}


@needs_root
def test_an_owner_that_nobody_named_is_a_courtesy(outbox: Path) -> None:
    """The inbox's group (here root's) cannot be given either, and nothing is said of it."""
    assert publish_as_a_stranger(outbox) == []


@needs_root
def test_the_mode_is_there_before_a_file_is_given_away(outbox: Path) -> None:
    """Whoever may change owners and nothing else (CAP_CHOWN without CAP_FOWNER) cannot change the mode any more afterwards."""

    def not_ours(descriptor: int, mode: int) -> None:
        if os.fstat(descriptor).st_uid != 0:
            raise PermissionError(1, "Operation not permitted")
        real(descriptor, mode)

    real = os.fchmod
    terms = ServeOutbox(path=os.fsencode(outbox), file_mode=0o664, directory_mode=0o775, like=b"/", uid=STRANGER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "fchmod", not_ours)
        with place.Outbox(terms).folder((b"folder",)) as folder:
            folder.write(b"talk.txt", b"text", meant_for=b"talk.txt")
    found = (outbox / "folder" / "talk.txt").stat()
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (STRANGER, 0o664)
    assert stat.S_IMODE((outbox / "folder").stat().st_mode) == 0o775
