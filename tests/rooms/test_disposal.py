"""disposal: sources archived and deleted by the real writer process, and its effects cut off at every single system call."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tools.mounts import tmpfs

from whisperd.child import Child
from whisperd.outbox import archive as archive_of
from whisperd.outbox import disposal, place
from whisperd.outbox.disposal import Disposal, hidden_name
from whisperd.outbox.failures import Unpublished
from whisperd.vocabulary import Failure, FailureKind, Sighting
from whisperd.wire import Dispose, Disposed, DisposeFailed, OutboxOut, OutboxReady, ServeOutbox

SOUND = b"a recording" * 50
NEWER = b"another recording that came later"
MTIME_NS = 1_600_000_000_123_456_789

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount, or become somebody else")


def sighting(inbox: Path, path: bytes) -> Sighting:
    found = os.stat(os.path.join(os.fsencode(inbox), path), follow_symlinks=False)
    return Sighting(
        path=path,
        dev=inbox.stat().st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def files(root: Path) -> dict[bytes, bytes]:
    """Everything below a directory that is not one itself, hidden or not, with its content."""
    found = {}
    for folder, _, here in os.walk(os.fsencode(root)):
        for name in here:
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, os.fsencode(root))] = file.read()
    return found


class Scene:
    """An inbox with one recording in it, an archive beside it, and a disposal in this process."""

    def __init__(self, root: Path, path: bytes = b"May/talk.wav") -> None:
        self.inbox, self.archive, self.path = root / "inbox", root / "archive", path
        self.sha256 = ""
        self.inbox.mkdir(parents=True)
        self.full = os.path.join(os.fsencode(self.inbox), path)
        os.makedirs(os.path.dirname(self.full), exist_ok=True)
        self.drop(SOUND)
        os.chmod(self.full, 0o640)
        os.utime(self.full, ns=(MTIME_NS, MTIME_NS))
        self.sighting = sighting(self.inbox, path)
        terms = ServeOutbox(path=os.fsencode(root / "outbox"), file_mode=0o644, directory_mode=0o755, like=os.fsencode(self.inbox))
        self.disposal = Disposal(terms)

    def drop(self, content: bytes) -> None:
        with open(self.full, "wb") as file:
            file.write(content)

    def request(self, *, archive: bool = True, job: int = 3) -> Dispose:
        to = os.fsencode(self.archive) if archive else b""
        return Dispose(job=job, inbox=os.fsencode(self.inbox), sighting=self.sighting, archive=to, sha256=self.sha256)

    def dispose(self, *, archive: bool = True) -> str:
        return self.disposal.dispose(self.request(archive=archive))

    @property
    def hidden(self) -> bytes:
        return os.path.join(os.path.dirname(self.full), hidden_name(self.request()))

    def archived(self) -> bool:
        """Exactly the recording, exactly once, and no trace of it in the inbox."""
        return files(self.inbox) == {} and files(self.archive) == {self.path: SOUND}

    def lost(self) -> bool:
        everywhere = [content for root in (self.inbox, self.archive) if root.exists() for content in files(root).values()]
        return SOUND not in everywhere


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


class Writer:
    """The daemon's side of one real writer process."""

    def __init__(self) -> None:
        self.child: Child[OutboxOut] = Child(name="outbox", module="whisperd.outbox", receives=OutboxOut, now=0.0)

    def ask(self, message: Any) -> OutboxOut:
        self.child.send(message)
        frames = self.child.channel.wait(20)
        assert len(frames) == 1
        return frames[0].message

    def dispose(self, scene: Scene, *, archive: bool = True) -> str:
        answer = self.ask(scene.request(archive=archive))
        assert isinstance(answer, Disposed), answer
        assert answer.job == 3
        return answer.how

    def fail(self, scene: Scene, *, archive: bool = True) -> Failure:
        answer = self.ask(scene.request(archive=archive))
        assert isinstance(answer, DisposeFailed), answer
        assert answer.failure.kind is FailureKind.WAITING
        return answer.failure


@pytest.fixture(scope="module")
def process() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    writer.child.kill(0.0, "test over")
    writer.child.gone(0.0)


@pytest.fixture
def writer(process: Writer, tmp_path: Path) -> Writer:
    """The one process of this module, told to serve an outbox of this test's own."""
    (tmp_path / "outbox").mkdir()
    terms = ServeOutbox(path=os.fsencode(tmp_path / "outbox"), file_mode=0o644, directory_mode=0o750, like=os.fsencode(tmp_path))
    assert isinstance(process.ask(terms), OutboxReady)
    return process


# --- the two ways --------------------------------------------------------------------------------------------------------------


def test_an_archived_source_keeps_its_place_mode_and_time(writer: Writer, scene: Scene) -> None:
    """The archive mirrors the sub-tree; the recording keeps its bytes, mode and time, and asking again changes nothing."""
    assert writer.dispose(scene) == "archived"
    assert scene.archived()
    kept = scene.archive / "May" / "talk.wav"
    assert (stat.S_IMODE(kept.stat().st_mode), kept.stat().st_mtime_ns, kept.stat().st_ino) == (0o640, MTIME_NS, scene.sighting.inode)
    assert stat.S_IMODE((scene.archive / "May").stat().st_mode) == 0o750
    assert writer.dispose(scene) == "archived"
    assert scene.archived()


@needs_root
def test_an_archive_on_another_filesystem(writer: Writer, scene: Scene) -> None:
    """Across filesystems it is copied with its mode, time and owner, and only then taken away; nothing else is left behind."""
    os.chown(scene.full, 4321, 8765)
    scene.sighting = sighting(scene.inbox, scene.path)
    with tmpfs(scene.archive):
        assert writer.dispose(scene) == "archived"
        assert scene.archived()
        kept = (scene.archive / "May" / "talk.wav").stat()
        assert (stat.S_IMODE(kept.st_mode), kept.st_mtime_ns, kept.st_uid, kept.st_gid) == (0o640, MTIME_NS, 4321, 8765)


@needs_root
def test_two_mounts_of_one_filesystem_are_two(writer: Writer, scene: Scene) -> None:
    """A bind mount, as ReadWritePaths= of the unit makes them, has the same device and yet allows no rename."""
    behind = scene.archive.with_name("behind")
    behind.mkdir()
    scene.archive.mkdir()
    if subprocess.run(["mount", "--bind", behind, scene.archive], check=False).returncode != 0:
        pytest.skip("cannot mount here")
    try:
        assert writer.dispose(scene) == "archived"
        assert scene.archived()
    finally:
        subprocess.run(["umount", "-l", scene.archive], check=True)


def test_a_deleted_source_is_deleted(writer: Writer, scene: Scene) -> None:
    """Deleted means deleted, its folder stays, and asking again finds nothing."""
    assert writer.dispose(scene, archive=False) == "deleted"
    assert files(scene.inbox) == {}
    assert os.path.isdir(os.path.dirname(scene.full))
    assert writer.dispose(scene, archive=False) == "gone"


@pytest.mark.parametrize("archive", [True, False])
def test_a_source_that_is_not_there(writer: Writer, scene: Scene, archive: bool) -> None:
    """Somebody was faster: the file, or its whole folder, is gone."""
    os.unlink(scene.full)
    assert writer.dispose(scene, archive=archive) == "gone"
    os.rmdir(os.path.dirname(scene.full))
    assert writer.dispose(scene, archive=archive) == "gone"


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 255,
        b"line\nbreak\r",
        b"\xff\xfe not utf-8",
        b"-rf",
        "\u202evaw.txt שלום".encode(),
        b"trailing dot.",
        b"trailing space ",
        b"...",
        b"folder -->/\xff/-n",
    ],
)
def test_any_name_that_linux_allows(writer: Writer, tmp_path: Path, name: bytes) -> None:
    """Names are bytes, in the archive as well; where one is taken, the next is numbered, and a long one cut for it."""
    for number in (1, 2):
        scene = Scene(tmp_path / str(number), name)
        scene.archive = tmp_path / "archive"
        assert writer.dispose(scene) == "archived"
        assert files(scene.inbox) == {}
        first = tmp_path / "archive" / os.fsdecode(name)
        assert first.read_bytes() == SOUND
        if number == 1:
            first.write_bytes(SOUND)  # the same bytes at another time: a recording of its own
    names = {path.rpartition(b"/")[2] for path in files(tmp_path / "archive")}
    assert len(names) == 2
    assert all(len(part) <= 255 for part in names)


def test_nothing_in_the_archive_is_overwritten(writer: Writer, scene: Scene) -> None:
    """What stands in the archive stays: files, links and folders of that name."""
    shelf = scene.archive / "May"
    shelf.mkdir(parents=True)
    (shelf / "talk.wav").write_bytes(NEWER)
    (shelf / "talk.wav.2").symlink_to("elsewhere")
    (shelf / "talk.wav.3").mkdir()
    assert writer.dispose(scene) == "archived"
    assert (shelf / "talk.wav").read_bytes() == NEWER
    assert (shelf / "talk.wav.4").read_bytes() == SOUND


def test_the_same_recording_twice_is_kept_once(writer: Writer, scene: Scene) -> None:
    """A copy with the same time and bytes, dropped again under the same name, is in the archive already."""
    shutil.copy2(scene.full, scene.inbox / "copy")
    assert writer.dispose(scene) == "archived"
    os.rename(scene.inbox / "copy", scene.full)
    scene.sighting = sighting(scene.inbox, scene.path)
    assert writer.dispose(scene) == "archived"
    assert scene.archived()


# --- only the file of the sighting ---------------------------------------------------------------------------------------------


def rewritten(scene: Scene) -> None:
    scene.drop(NEWER)


def restored(scene: Scene) -> None:
    """The same size and time, rewritten in place: only the ctime tells."""
    scene.drop(SOUND.upper())
    os.utime(scene.full, ns=(MTIME_NS, MTIME_NS))


def replaced(scene: Scene) -> None:
    other = scene.full + b"2"
    shutil.copy2(scene.full, other)
    os.replace(other, scene.full)


def linked(scene: Scene) -> None:
    os.rename(scene.full, scene.full + b"2")
    os.symlink(scene.full + b"2", scene.full)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("change", [rewritten, restored, replaced, linked])
def test_what_changed_stays(writer: Writer, scene: Scene, change: Callable[[Scene], None], archive: bool) -> None:
    """Whatever is not certainly the transcribed recording stays as it is."""
    change(scene)
    before = files(scene.inbox)
    assert writer.dispose(scene, archive=archive) == "changed"
    assert files(scene.inbox) == before


def touched(scene: Scene) -> None:
    os.chmod(scene.full, 0o600)


@pytest.mark.parametrize("archive", [True, False])
@pytest.mark.parametrize("change", [touched, replaced])
def test_the_same_content_is_the_same_recording(writer: Writer, scene: Scene, change: Callable[[Scene], None], archive: bool) -> None:
    """After a chmod, or on a share whose inodes are made up, the content decides; without its digest the source stays."""
    change(scene)
    assert writer.dispose(scene, archive=archive) == "changed"
    scene.sha256 = hashlib.sha256(SOUND.upper()).hexdigest()
    assert writer.dispose(scene, archive=archive) == "changed"
    scene.sha256 = hashlib.sha256(SOUND).hexdigest()
    assert writer.dispose(scene, archive=archive) == ("archived" if archive else "deleted")
    assert files(scene.inbox) == {}
    assert not archive or scene.archived()


@pytest.mark.parametrize("archive", [True, False])
def test_a_file_that_slips_in_between_is_given_back(scene: Scene, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    """A newer recording put at the name after the last look is taken away, recognised, and given back, untouched."""
    real = place.move

    def late(*arguments: Any) -> bool:
        if not os.path.exists(scene.hidden) and files(scene.inbox) == {scene.path: SOUND}:
            os.unlink(scene.full)
            scene.drop(NEWER)
        return real(*arguments)

    monkeypatch.setattr(archive_of, "move", late)
    assert scene.dispose(archive=archive) == "changed"
    assert files(scene.inbox) == {scene.path: NEWER}
    assert not scene.archive.exists() or files(scene.archive) == {}


def test_a_strange_file_under_the_private_name_is_given_back(scene: Scene) -> None:
    """A run that was killed with a newer recording in its hands: the next one gives it back, beside what came after it."""
    os.rename(scene.full, scene.inbox / "away")
    scene.drop(NEWER)
    os.rename(scene.full, scene.hidden)
    scene.drop(b"the newest")
    assert scene.dispose() == "changed"
    assert files(scene.inbox) == {scene.path: b"the newest", scene.path + b".2": NEWER, b"away": SOUND}


@pytest.mark.parametrize("archive", [True, False])
def test_a_newer_file_stays_while_the_older_is_put_away(scene: Scene, archive: bool) -> None:
    """A run that was killed with the right recording in its hands: the next one finishes it and leaves the name to what came after."""
    os.rename(scene.full, scene.hidden)
    scene.drop(NEWER)
    assert scene.dispose(archive=archive) == ("archived" if archive else "deleted")
    assert files(scene.inbox) == {scene.path: NEWER}
    assert not archive or files(scene.archive) == {scene.path: SOUND}


def test_no_link_is_followed_out_of_the_inbox(writer: Writer, scene: Scene) -> None:
    """A folder that became a symbolic link leads nowhere; in the archive it is waited for."""
    folder = scene.inbox / "May"
    folder.rename(scene.inbox.parent / "elsewhere")
    folder.symlink_to(scene.inbox.parent / "elsewhere")
    assert writer.dispose(scene, archive=False) == "gone"
    folder.unlink()
    (scene.inbox.parent / "elsewhere").rename(folder)
    scene.archive.mkdir()
    (scene.archive / "May").symlink_to(scene.inbox.parent)
    assert writer.fail(scene).code == "archive_blocked"
    assert files(scene.inbox) == {scene.path: SOUND}
    (scene.archive / "May").unlink()
    assert writer.dispose(scene) == "archived"


@needs_root
def test_no_other_filesystem_is_entered(writer: Writer, scene: Scene) -> None:
    """What is mounted over the folder of a source is not the inbox."""
    with tmpfs(scene.inbox / "May"):
        shutil.copyfile(os.devnull, scene.full)
        assert writer.dispose(scene, archive=False) == "gone"
        assert os.path.exists(scene.full)


@pytest.mark.parametrize("path", [b"../talk.wav", b"/etc/passwd", b"", b"May/"])
def test_no_name_leads_out_of_the_inbox(writer: Writer, scene: Scene, path: bytes) -> None:
    """A path that leads elsewhere is refused for good."""
    request = msgspec.structs.replace(scene.request(), sighting=msgspec.structs.replace(scene.sighting, path=path))
    answer = writer.ask(request)
    assert isinstance(answer, DisposeFailed)
    assert (answer.failure.code, answer.failure.kind) == ("bad_name", FailureKind.PERMANENT)


# --- what is waited for --------------------------------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("archive", [True, False])
def test_a_read_only_inbox_is_waited_for(writer: Writer, tmp_path: Path, archive: bool) -> None:
    """The operator is told to name the inbox in ReadWritePaths=; before anything is copied; and it goes on by itself."""
    with tmpfs(tmp_path / "share"):
        scene = Scene(tmp_path / "share" / "x")
        scene.archive = tmp_path / "archive"
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "share"], check=True)
        failure = writer.fail(scene, archive=archive)
        assert failure.code == "inbox_read_only"
        assert "ReadWritePaths=" in failure.hint and str(scene.inbox) in failure.what
        assert not scene.archive.exists()
        subprocess.run(["mount", "-o", "remount,rw", tmp_path / "share"], check=True)
        assert writer.dispose(scene, archive=archive) == ("archived" if archive else "deleted")


@needs_root
def test_an_inbox_that_we_may_not_write_is_waited_for() -> None:
    """The operator is told to permit it."""
    with tempfile.TemporaryDirectory() as root:
        os.chmod(root, 0o755)
        scene = Scene(Path(root) / "x")
        os.chmod(scene.full, 0o644)
        scene.sighting = sighting(scene.inbox, scene.path)
        child = os.fork()
        if child == 0:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            try:
                scene.dispose(archive=False)
            except Unpublished as error:
                failure = error.failure()
                os._exit(0 if failure.code == "inbox_denied" and "allow the user" in failure.hint else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert files(scene.inbox) == {scene.path: SOUND}


@needs_root
def test_a_full_archive_is_waited_for(writer: Writer, scene: Scene) -> None:
    """No room in the archive: the source was not even touched, nothing half is left, and it goes on when there is room."""
    with tmpfs(scene.archive):
        (scene.archive / "filler").write_bytes(b"x" * 250 * 1024)
        scene.drop(SOUND * 100)
        scene.sighting = sighting(scene.inbox, scene.path)
        assert writer.fail(scene).code == "archive_full"
        assert sighting(scene.inbox, scene.path) == scene.sighting
        assert list(files(scene.archive)) == [b"filler"]
        (scene.archive / "filler").unlink()
        assert writer.dispose(scene) == "archived"


@needs_root
def test_shares_that_are_away_are_waited_for(writer: Writer, tmp_path: Path) -> None:
    """An inbox that is no longer mounted is not one without the source, and nothing is archived below a lost mount."""
    with tmpfs(tmp_path / "share"):
        scene = Scene(tmp_path / "share" / "x")
        scene.inbox.rename(tmp_path / "share" / "inbox")
        scene.inbox = tmp_path / "share"
        scene.sighting = sighting(tmp_path / "share", b"inbox/May/talk.wav")
        scene.archive = tmp_path / "archive"
        subprocess.run(["umount", "-l", tmp_path / "share"], check=True)
        assert writer.fail(scene, archive=False).code == "inbox_absent"
        (tmp_path / "share").rmdir()
        assert writer.fail(scene).code == "inbox_absent"
    two = Scene(tmp_path / "two")
    with tmpfs(two.archive):
        assert writer.dispose(two) == "archived"
    three = Scene(tmp_path / "three")
    three.archive = two.archive
    assert writer.fail(three).code == "archive_absent"
    assert files(three.inbox) == {three.path: SOUND}


# --- the profile of a recording ------------------------------------------------------------------------------------------------

TERMS = b'language = "de"\n'
BESIDE = b"May/talk.wav.whisperd.toml"
OF_FOLDERS = {b".whisperd.toml": b"", b"May/.whisperd.toml": TERMS, b"May/talk.whisperd.toml": b"", b"May/talk.wav.2.whisperd.toml": b""}


def with_profile(scene: Scene, content: bytes = TERMS) -> Scene:
    """The same scene, with a profile beside the recording, and files of like names that are none of its."""
    for path, text in {**OF_FOLDERS, BESIDE: content}.items():
        with open(os.path.join(os.fsencode(scene.inbox), path), "wb") as file:
            file.write(text)
    return scene


@pytest.mark.parametrize("archive", [True, False])
def test_a_profile_goes_with_its_recording(writer: Writer, scene: Scene, archive: bool) -> None:
    """Archived beside it or deleted with it; the profiles of folders and of other files stay, and asking again changes nothing."""
    with_profile(scene)
    for how in ("archived", "archived") if archive else ("deleted", "gone"):
        assert writer.dispose(scene, archive=archive) == how
        assert files(scene.inbox) == OF_FOLDERS
        assert not archive or files(scene.archive) == {scene.path: SOUND, BESIDE: TERMS}


@needs_root
def test_a_profile_goes_to_an_archive_on_another_filesystem(writer: Writer, scene: Scene) -> None:
    """Copied with its mode and owner, as the recording is."""
    with_profile(scene)
    full = os.path.join(os.fsencode(scene.inbox), BESIDE)
    os.chown(full, 4321, 8765)
    os.chmod(full, 0o604)
    with tmpfs(scene.archive):
        assert writer.dispose(scene) == "archived"
        assert files(scene.archive) == {scene.path: SOUND, BESIDE: TERMS}
        kept = (scene.archive / os.fsdecode(BESIDE)).stat()
        assert (kept.st_uid, kept.st_gid, stat.S_IMODE(kept.st_mode)) == (4321, 8765, 0o604)
    assert files(scene.inbox) == OF_FOLDERS


def test_a_profile_stands_beside_the_name_that_its_recording_got(writer: Writer, scene: Scene) -> None:
    """The archive has another recording of that name, with a profile of its own: neither is overwritten, and who belongs to whom shows."""
    (scene.archive / "May").mkdir(parents=True)
    (scene.archive / "May" / "talk.wav").write_bytes(NEWER)
    (scene.archive / os.fsdecode(BESIDE)).write_bytes(b"older")
    assert writer.dispose(with_profile(scene)) == "archived"
    second = {scene.path + b".2": SOUND, scene.path + b".2.whisperd.toml": TERMS}
    assert files(scene.archive) == {scene.path: NEWER, BESIDE: b"older", **second}


@pytest.mark.parametrize("change", [rewritten, restored, replaced])
@pytest.mark.parametrize("archive", [True, False])
def test_the_profile_of_what_stays_stays(writer: Writer, scene: Scene, change: Callable[[Scene], None], archive: bool) -> None:
    """A recording that is another one by now keeps its profile; one that somebody else took away leaves it to him."""
    change(with_profile(scene))
    before = files(scene.inbox)
    assert writer.dispose(scene, archive=archive) == "changed"
    assert files(scene.inbox) == before and before[BESIDE] == TERMS
    os.unlink(scene.full)
    assert writer.dispose(scene, archive=archive) == "gone"
    assert files(scene.inbox)[BESIDE] == TERMS


@pytest.mark.parametrize("archive", [True, False])
def test_a_profile_that_a_newer_recording_needs_stays(scene: Scene, archive: bool) -> None:
    """The recording is put away, one of its name came meanwhile: the profile is that one's."""
    with_profile(scene)
    os.rename(scene.full, scene.hidden)
    scene.drop(NEWER)
    assert scene.dispose(archive=archive) == ("archived" if archive else "deleted")
    assert files(scene.inbox) == {**OF_FOLDERS, scene.path: NEWER, BESIDE: TERMS}
    assert not archive or files(scene.archive) == {scene.path: SOUND}


@pytest.mark.parametrize("archive", [True, False])
def test_a_profile_that_is_replaced_meanwhile_is_given_back(scene: Scene, monkeypatch: pytest.MonkeyPatch, archive: bool) -> None:
    """Another text is put at its name after the last look: it stays where it is; the recording is put away all the same."""
    with_profile(scene)
    full = os.path.join(os.fsencode(scene.inbox), BESIDE)
    real = place.move

    def late(source: int, name: bytes, target: int, new: bytes) -> bool:
        if full.endswith(b"/" + name):
            with open(full + b".new", "wb") as file:
                file.write(b'language = "fr"\n')
            os.rename(full + b".new", full)
        return real(source, name, target, new)

    monkeypatch.setattr(archive_of, "move", late)
    assert scene.dispose(archive=archive) == ("archived" if archive else "deleted")
    assert files(scene.inbox) == {**OF_FOLDERS, BESIDE: b'language = "fr"\n'}


@pytest.mark.parametrize("archive", [True, False])
def test_what_is_no_profile_stays(writer: Writer, tmp_path: Path, archive: bool) -> None:
    """A symbolic link or a folder of that name is nobody's profile; a name of 255 bytes cannot have one."""
    link = Scene(tmp_path / "link")
    os.symlink("/etc/passwd", os.path.join(os.fsencode(link.inbox), BESIDE))
    folder = Scene(tmp_path / "folder")
    os.mkdir(os.path.join(os.fsencode(folder.inbox), BESIDE))
    for scene in (link, folder, Scene(tmp_path / "long", b"x" * 251 + b".wav")):
        assert writer.dispose(scene, archive=archive) == ("archived" if archive else "deleted")
        assert not archive or files(scene.archive) == {scene.path: SOUND}
    assert os.path.islink(os.path.join(os.fsencode(link.inbox), BESIDE))
    assert os.path.isdir(os.path.join(os.fsencode(folder.inbox), BESIDE))


@pytest.mark.parametrize("archive", [True, False])
def test_the_profile_of_one_put_away_is_put_away_though_another_came(scene: Scene, archive: bool) -> None:
    """A run that was killed between the two: the next one finishes the profile, and leaves what came at the name alone."""
    with_profile(scene)
    request = scene.request()
    os.rename(os.path.join(os.fsencode(scene.inbox), BESIDE), scene.hidden.replace(b"source-", b"profile-"))
    if archive:
        (scene.archive / "May").mkdir(parents=True)
        os.rename(scene.full, scene.archive / "May" / "talk.wav")
    else:
        os.unlink(scene.full)
    scene.drop(NEWER)
    assert scene.dispose(archive=archive) == "changed"
    assert files(scene.inbox) == {**OF_FOLDERS, scene.path: NEWER}
    assert not archive or files(scene.archive) == {scene.path: SOUND, BESIDE: TERMS}
    assert hidden_name(request) not in b" ".join(files(scene.inbox))


# --- cut off at every system call ----------------------------------------------------------------------------------------------

CALLS = ("open", "stat", "mkdir", "pread", "write", "fsync", "fchown", "fchmod", "utime", "link", "rename", "unlink")
WAYS = ["delete", "rename", "copy", "link", "copy, link"]
"""How the source leaves: taken by a rename that never replaces, or where there is none (NFS) by link and unlink; archived on its own mount
or copied to another."""

ERRORS = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT)

Strike = Callable[[], None]


def equip(patch: pytest.MonkeyPatch, way: str) -> None:
    """Make the filesystems what the way needs."""
    if "copy" in way:
        patch.setattr(disposal, "_one_mount", lambda one, other: False)
    if "link" in way:
        patch.setattr(place, "_rename_noreplace", no_such_rename)


def no_such_rename(*arguments: Any) -> None:
    raise OSError(errno.EINVAL, "no such rename here")


def strike_call(patch: pytest.MonkeyPatch, number: int, strike: Strike, log: list[str]) -> None:
    """Let the `number`-th system call meet a misfortune; log them all."""

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(name)
            if len(log) == number:
                strike()
            return real(*arguments, **options)

        return call

    for name in CALLS:
        patch.setattr(os, name, wrapped(name, getattr(os, name)))
    patch.setattr(place, "_rename_noreplace", wrapped("renameat2", place._rename_noreplace))


def run_killed_at(scene: Scene, way: str, number: int) -> bool:
    """Dispose in a forked process that is killed just before its `number`-th call; whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            patch = pytest.MonkeyPatch()
            equip(patch, way)
            strike_call(patch, number, lambda: os.kill(os.getpid(), signal.SIGKILL), [])
            scene.dispose(archive=way != "delete")
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("way", WAYS)
def test_killed_before_every_system_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    """Wherever it is killed, the source is whole somewhere (unless it was deleted on purpose), and the same request again leaves it in
    exactly one place."""
    equip(monkeypatch, way)
    number, killed = 0, True
    while killed:
        number += 1
        scene = with_profile(Scene(tmp_path / str(number)))
        killed = run_killed_at(scene, way, number)
        left = files(scene.inbox)
        if way == "delete":
            assert set(left.values()) <= {SOUND, TERMS, b""}
            assert scene.dispose(archive=False) == ("deleted" if SOUND in left.values() else "gone")
        else:
            assert not scene.lost()
            assert scene.dispose() == "archived"
            assert files(scene.archive) == {scene.path: SOUND, BESIDE: TERMS}
        assert files(scene.inbox) == OF_FOLDERS
    assert number > 15


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", range(3))
def test_an_error_at_every_system_call(tmp_path: Path, first: int, way: str) -> None:
    """Whatever call fails, with one error or another, the source stands at its own name unless it is archived (or deleted), its profile
    with it, and the same request again finishes both: what had to be given back is known again."""
    archive = way != "delete"
    position, struck = 0, True
    while struck:
        position += 1
        number = ERRORS[(first + position) % len(ERRORS)]

        def fail(number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        log: list[str] = []
        scene = with_profile(Scene(tmp_path / str(position)))
        with pytest.MonkeyPatch.context() as patch:
            equip(patch, way)
            with pytest.MonkeyPatch.context() as stricken:
                strike_call(stricken, position, fail, log)
                try:
                    scene.dispose(archive=archive)
                except Unpublished as error:
                    assert error.failure().kind is FailureKind.WAITING
                    assert str(tmp_path) in error.what
            struck = len(log) >= position
            left = files(scene.inbox)
            assert scene.path in left or (SOUND in files(scene.archive).values() if archive else SOUND not in left.values())
            assert BESIDE in left or scene.path not in left
            assert scene.dispose(archive=archive) in (("archived",) if archive else ("deleted", "gone"))
        assert files(scene.inbox) == OF_FOLDERS
        assert not archive or files(scene.archive) == {scene.path: SOUND, BESIDE: TERMS}
    assert position > 15


def test_a_copy_is_durable_before_the_source_is_taken_away(tmp_path: Path) -> None:
    """The copy is synced before anything is moved, the archive before the source is unlinked, and the inbox last."""
    scene = Scene(tmp_path)
    (scene.archive / "May").mkdir(parents=True)
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        equip(patch, "copy")
        strike_call(patch, 0, lambda: None, log)
        scene.dispose()
    order = [name for name in log if name in ("write", "fsync", "link", "renameat2", "unlink")]
    # the copy, the source taken to its private name, the copy gets its name and loses the temporary one (twice is once too often, and
    # harmless), the archive, the source, the inbox
    assert order == ["write", "fsync", "renameat2", "link", "unlink", "fsync", "unlink", "unlink", "fsync"]


def test_an_archive_that_cannot_be_made_durable_is_no_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an error of fsync on the archive the copy is made anew: a second fsync may say that all is well when it is not."""
    scene = Scene(tmp_path)
    equip(monkeypatch, "copy")
    real = os.fsync

    def broken(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) and (scene.archive / "May" / "talk.wav").exists():
            raise OSError(errno.EIO, "the disk lost it")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(Unpublished) as caught:
            scene.dispose()
    assert caught.value.failure().code == "archive_io"
    assert files(scene.inbox) == {scene.path: SOUND}
    assert files(scene.archive) == {}
    assert scene.dispose() == "archived"
    assert scene.archived()
