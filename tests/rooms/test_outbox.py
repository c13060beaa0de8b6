"""outbox: the real writer process over the real wire, on a real disk; and its effects cut off at every single system call."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import select
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tools.mounts import tmpfs

from whisperd.child import Child
from whisperd.outbox import place
from whisperd.outbox.failures import NameTaken, Unpublished
from whisperd.outbox.place import Outbox
from whisperd.outbox.publish import publish
from whisperd.outbox.render import FORMATS, render
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Segment, SubtitleShape, Summary, Transcript
from whisperd.wire import (
    Message,
    OutboxOut,
    OutboxReady,
    OwnFile,
    Publish,
    Published,
    PublishedFile,
    PublishError,
    PublishFailed,
    ServeOutbox,
    Stop,
)

ALL = tuple(FORMATS)
SUMMARY = Summary(
    duration_s=2.0,
    speech_s=1.5,
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


def transcript(text: str = "hello", segments: int = 1) -> Transcript:
    return Transcript(
        source="talk.wav",
        size=1,
        mtime_ns=1,
        language="en",
        language_probability=0.9,
        segments=tuple(Segment(start_s=n, end_s=n + 1, text=f" {text} {n}") for n in range(segments)),
        options=JobOptions(),
        summary=SUMMARY,
    )


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Writer:
    """The daemon's side of one outbox writer."""

    def __init__(self) -> None:
        self.child: Child[OutboxOut] = Child(name="outbox", module="whisperd.outbox", receives=OutboxOut, now=0.0)
        self.root = Path()

    def serve(self, root: Path, **terms: Any) -> None:
        """Say where to publish, and wait until it is ready."""
        self.root = root
        defaults = {"file_mode": 0o640, "directory_mode": 0o750, "like": os.fsencode(root.parent / "inbox")}
        self.child.send(ServeOutbox(path=os.fsencode(root), **{**defaults, **terms}))
        assert isinstance(self.hear(), OutboxReady)

    def send(self, message: Message, staged: bytes | None) -> None:
        if staged is None:
            self.child.send(message)
            return
        descriptor = os.memfd_create("staged")
        os.write(descriptor, staged)
        self.child.send(message, (descriptor,))

    def hear(self) -> OutboxOut:
        frames = self.child.channel.wait(20)
        assert len(frames) == 1
        return frames[0].message

    def ask(self, message: Message, staged: bytes | None = None) -> OutboxOut:
        self.send(message, staged)
        return self.hear()

    def publish(
        self, base: bytes = b"talk", text: str = "hello", *, formats: tuple[str, ...] = ALL, job: int = 1, own: Any = (), stale: Any = ()
    ) -> tuple[PublishedFile, ...]:
        """Publish, and insist that it worked and that the files are what was said of them."""
        message = Publish(job=job, base=base, formats=formats, own=tuple(own), stale=tuple(stale))
        answer = self.ask(message, msgspec.json.encode(transcript(text)))
        assert isinstance(answer, Published), answer
        assert answer.job == job
        for file in answer.files:
            content = (self.root / os.fsdecode(file.path)).read_bytes()
            assert content == render(transcript(text), file.format)
            assert file.sha256 == sha256(content)
        return answer.files

    def fail(
        self, base: bytes = b"talk", text: str = "hello", *, formats: tuple[str, ...] = ALL, staged: bytes | None = None, own: Any = ()
    ) -> Failure:
        """Ask for a publication that must not work."""
        staged = msgspec.json.encode(transcript(text)) if staged is None else staged
        answer = self.ask(Publish(job=1, base=base, formats=formats, own=tuple(own), stale=()), staged)
        assert isinstance(answer, PublishFailed), answer
        return answer.failure

    def end(self) -> str:
        self.child.kill(0.0, "test over")
        return self.child.gone(0.0)


@pytest.fixture(scope="module")
def process() -> Iterator[Writer]:
    writer = Writer()
    yield writer
    writer.end()


@pytest.fixture
def writer(process: Writer, tmp_path: Path) -> Writer:
    """The one process of this module, told to serve an outbox of this test's own (as after a reload)."""
    (tmp_path / "inbox").mkdir()
    process.serve(tmp_path / "outbox")
    return process


def names(root: Path) -> list[str]:
    """Everything below a directory that is not one itself."""
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir())


def own(files: tuple[PublishedFile, ...]) -> list[OwnFile]:
    return [OwnFile(path=file.path, sha256=file.sha256) for file in files]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away or mount")


# --- publishing ----------------------------------------------------------------------------------------------------------------


def test_all_five_formats_appear(writer: Writer) -> None:
    """Each format stands in the outbox, whole, under the name that was reported, and nothing else."""
    files = writer.publish()
    assert [(file.path, file.format) for file in files] == [(b"talk." + name.encode(), name) for name in ALL]
    assert names(writer.root) == sorted(f"talk.{name}" for name in ALL)


def test_the_subtree_is_mirrored(writer: Writer) -> None:
    """Folders of the inbox are made in the outbox, with the mode that was asked for."""
    writer.publish(b"2024/May/talk", formats=("txt", "json"))
    assert names(writer.root) == ["2024/May/talk.json", "2024/May/talk.txt"]
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in [writer.root, *writer.root.rglob("*")]}
    assert modes == {"outbox": 0o750, "2024": 0o750, "May": 0o750, "talk.txt": 0o640, "talk.json": 0o640}


@needs_root
def test_owner_and_group_follow_the_inbox(process: Writer, tmp_path: Path) -> None:
    """As root, everything made belongs to the owner and the group of the inbox (F99)."""
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    os.chown(inbox, 4321, 8765)
    process.serve(tmp_path / "outbox")
    process.publish(b"sub/talk", formats=("txt",))
    for path in [process.root, *process.root.rglob("*")]:
        assert (path.stat().st_uid, path.stat().st_gid) == (4321, 8765)


@needs_root
def test_a_setgid_folder_hands_down_its_group(writer: Writer) -> None:
    """Below a setgid folder the group is that folder's, and sub-folders stay setgid."""
    os.chown(writer.root, 0, 8765)
    writer.root.chmod(0o2770)
    writer.serve(writer.root, directory_mode=0o770)
    writer.publish(b"sub/talk", formats=("txt",))
    assert stat.S_IMODE((writer.root / "sub").stat().st_mode) == 0o2770
    assert (writer.root / "sub" / "talk.txt").stat().st_gid == 8765


@needs_root
def test_a_named_owner_and_group_come_first(process: Writer, tmp_path: Path) -> None:
    """What the settings name is neither the inbox's nor a setgid folder's; what they leave open is, and the setgid bit stays."""
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    os.chown(inbox, 4321, 8765)
    outbox.mkdir()
    os.chown(outbox, 0, 1111)
    outbox.chmod(0o2770)
    wanted = {"both": (5555, 6666, 5555, 6666), "owner": (5555, -1, 5555, 1111), "group": (-1, 6666, 4321, 6666)}
    for name, (uid, gid, *given) in wanted.items():
        process.serve(outbox, uid=uid, gid=gid, directory_mode=0o770)
        process.publish(name.encode() + b"/talk", formats=("txt",))
        for path in (outbox / name, outbox / name / "talk.txt"):
            assert [path.stat().st_uid, path.stat().st_gid] == given
        assert stat.S_IMODE((outbox / name).stat().st_mode) == 0o2770


def test_subtitles_have_the_shape_that_was_asked_for(writer: Writer) -> None:
    """The shape travels with the terms, and may change with a reload."""
    text = "one two three four five six seven eight nine ten"
    widths = []
    for chars in (42, 12):
        writer.serve(writer.root, subtitles=SubtitleShape(line_chars=chars))
        request = Publish(job=1, base=b"talk %d" % chars, formats=("srt", "vtt"), own=(), stale=())
        assert isinstance(writer.ask(request, msgspec.json.encode(transcript(text))), Published)
        shown = (writer.root / f"talk {chars}.srt").read_text().splitlines()
        widths.append(max(len(line) for line in shown if "-->" not in line))
    assert 12 < widths[0] <= 42
    assert widths[1] <= 12


def test_a_users_file_is_never_overwritten(writer: Writer) -> None:
    """One taken name refuses the whole publication: nothing is written, nothing is left behind, the user's file is as it was."""
    (writer.root / "talk.srt").write_text("mine")
    failure = writer.fail()
    assert (failure.code, failure.kind) == ("name_taken", FailureKind.TRANSIENT)
    assert str(writer.root / "talk.srt") in failure.what
    assert names(writer.root) == ["talk.srt"]
    assert (writer.root / "talk.srt").read_text() == "mine"


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo"])
def test_whatever_stands_at_the_name_is_left_alone(writer: Writer, kind: str) -> None:
    """Links, directories and pipes are somebody else's too, are not followed, and do not block."""
    target = writer.root / "talk.txt"
    if kind == "directory":
        target.mkdir()
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        elsewhere = writer.root.parent / "elsewhere"
        if kind == "link":
            elsewhere.write_bytes(render(transcript(), "txt"))
        target.symlink_to(elsewhere)
    known = OwnFile(path=b"talk.txt", sha256=sha256(render(transcript(), "txt")))
    assert writer.fail(formats=("txt",), own=[known]).code == "name_taken"
    assert os.listdir(writer.root) == ["talk.txt"]


def test_what_is_there_already_is_published(writer: Writer) -> None:
    """After a crash between publishing and the ledger, the same work again finds its own files by their bytes and keeps them,
    even when a record says that one of them is stale."""
    first = writer.publish()
    before = {name: (writer.root / name).stat().st_ino for name in names(writer.root)}
    assert writer.publish(stale=own(first)) == first
    assert {name: (writer.root / name).stat().st_ino for name in names(writer.root)} == before


def test_a_new_version_replaces_the_old_one(writer: Writer) -> None:
    """New content of the same source takes the place of the old transcript, if that is still what we wrote."""
    files = writer.publish(text="first")
    writer.publish(text="second", own=own(files))
    assert len(names(writer.root)) == len(ALL)


def test_an_edited_transcript_is_the_users(writer: Writer) -> None:
    """Once a user has corrected a transcript, no new version takes its place."""
    files = writer.publish(text="first")
    (writer.root / "talk.txt").write_text("corrected by hand")
    assert writer.fail(text="second", own=own(files)).code == "name_taken"
    assert (writer.root / "talk.txt").read_text() == "corrected by hand"
    assert (writer.root / "talk.srt").read_bytes() == render(transcript("first"), "srt")
    assert len(names(writer.root)) == len(ALL)


def test_a_damaged_own_record_owns_nothing(writer: Writer) -> None:
    """A record without a digest never makes somebody else's file ours, neither to replace nor to remove."""
    (writer.root / "talk.txt").symlink_to("elsewhere")
    record = OwnFile(path=b"talk.txt", sha256="")
    assert writer.fail(formats=("txt",), own=[record]).code == "name_taken"
    writer.publish(b"other", formats=("txt",), stale=[record])
    assert names(writer.root) == ["other.txt", "talk.txt"]


# --- error files ---------------------------------------------------------------------------------------------------------------


def error_file(writer: Writer, text: str, *, base: bytes = b"talk.wav", known: Any = ()) -> OutboxOut:
    return writer.ask(PublishError(job=7, base=base, text=text, own=tuple(known)))


def test_an_error_file_comes_and_goes(writer: Writer) -> None:
    """A failed source gets its error file, a later failure replaces it, and the transcript at last removes it (F101)."""
    first = error_file(writer, "no audio\n")
    assert isinstance(first, Published)
    assert [(file.path, file.format) for file in first.files] == [(b"talk.wav.error.txt", "error.txt")]
    second = error_file(writer, "still no audio\n", known=own(first.files))
    assert isinstance(second, Published)
    assert (writer.root / "talk.wav.error.txt").read_text() == "still no audio\n"
    writer.publish(formats=("txt",), stale=own(second.files))
    assert names(writer.root) == ["talk.txt"]


def test_a_note_in_the_error_file_is_kept(writer: Writer) -> None:
    """An error file that somebody wrote into is no longer ours to remove; one that is gone already, or whose folder is, is no trouble."""
    answer = error_file(writer, "no audio\n")
    assert isinstance(answer, Published)
    (writer.root / "talk.wav.error.txt").write_text("asked Anna to record it again")
    absent = [OwnFile(path=path, sha256="0" * 64) for path in (b"absent", b"absent/absent")]
    writer.publish(formats=("txt",), stale=own(answer.files) + absent)
    assert names(writer.root) == ["talk.txt", "talk.wav.error.txt"]


# --- names ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        b"x" * 251,
        b"trailing dot.",
        b"trailing space ",
        b" ",
        b"con.aux:stream",
        b"line\nbreak\r",
        b"\xff\xfe not utf-8",
        b"-rf",
        "\u202egpj.txt שלום".encode(),
        "👩‍👩‍👧‍👦 🎙".encode(),
        b"~$ ' \" \\ * ?",
        b"...",
        b"folder -->/\xff/-n",
    ],
)
def test_any_name_that_linux_allows(writer: Writer, name: bytes) -> None:
    """Names are bytes: whatever the source is called, its transcript is called."""
    (file,) = writer.publish(name, formats=("txt",))
    assert file.path == name + b".txt"
    assert os.path.exists(os.path.join(os.fsencode(writer.root), name + b".txt"))


def test_a_name_too_long_is_cut_and_reported(writer: Writer) -> None:
    """A source's name of 255 bytes gives names that fit, the same for every format and every run, different for different sources."""
    files = writer.publish("ä".encode() * 127 + b"1")
    assert {file.path.rpartition(b".")[0] for file in files} == {files[0].path.rpartition(b".")[0]}
    assert max(len(file.path) for file in files) <= 255
    assert writer.publish("ä".encode() * 127 + b"1") == files
    writer.publish("ä".encode() * 127 + b"2", text="other")
    assert len(names(writer.root)) == 2 * len(ALL)


@pytest.mark.parametrize("base", [b"../talk", b"/tmp/talk", b"a/../../talk", b"", b"sub/"])
def test_no_name_leads_out_of_the_outbox(writer: Writer, base: bytes) -> None:
    """A base that is absolute or leads upwards is refused for good."""
    failure = writer.fail(base)
    assert (failure.code, failure.kind) == ("bad_name", FailureKind.PERMANENT)
    assert names(writer.root.parent) == []


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_linked_subdirectory_is_refused(writer: Writer, kind: str) -> None:
    """No symbolic link inside the outbox is followed, so nobody can send a transcript elsewhere; the job waits until it is moved."""
    elsewhere = writer.root.parent / "elsewhere"
    elsewhere.mkdir()
    blocked = writer.root / "sub"
    blocked.symlink_to(elsewhere) if kind == "link" else blocked.write_text("a file")
    failure = writer.fail(b"sub/talk")
    assert (failure.code, failure.kind) == ("outbox_blocked", FailureKind.WAITING)
    assert os.listdir(elsewhere) == []
    blocked.unlink()
    writer.publish(b"sub/talk")


# --- requests that make no sense -----------------------------------------------------------------------------------------------


def test_a_bad_request_hurts_only_itself(writer: Writer) -> None:
    """Broken staged transcripts and unknown formats are answered by name; the process goes on and keeps no descriptor."""
    whole = msgspec.json.encode(transcript())
    count = len(os.listdir(f"/proc/{writer.child.pid}/fd"))
    bad = [b"", b"{}", whole[:-5], whole.replace(b"transcript/1", b"transcript/9"), whole.replace(b'"size":1', b'"size":"1"'), b"\xff"]
    for staged in bad:
        failure = writer.fail(staged=staged)
        assert (failure.code, failure.kind) == ("staged_broken", FailureKind.PERMANENT)
    without = writer.ask(Publish(job=1, base=b"talk", formats=ALL, own=(), stale=()))
    assert isinstance(without, PublishFailed)
    assert without.failure.code == "staged_broken"
    for formats in (("txt", "docx"), ("../x",), ()):
        assert writer.fail(formats=formats).code == "unknown_format"
    assert names(writer.root) == []
    writer.publish()
    assert len(os.listdir(f"/proc/{writer.child.pid}/fd")) == count


def test_it_ends_when_told_and_when_left_alone(tmp_path: Path) -> None:
    """Stop and a closed wire are both a normal end."""
    told, left = Writer(), Writer()
    told.child.send(Stop())
    left.child.channel.close()
    for writer in (told, left):
        assert select.select([writer.child.pidfd], [], [], 10)[0]
        assert writer.child.gone(0.0) == "ended normally"


# --- an outbox that is full, read-only, absent ---------------------------------------------------------------------------------


@needs_root
def test_a_full_disk_is_waited_for(process: Writer, tmp_path: Path) -> None:
    """On a full disk nothing half-written stays, the failure says what to do, and after space is freed the same request works."""
    (tmp_path / "inbox").mkdir()
    with tmpfs(tmp_path / "outbox"):
        process.serve(tmp_path / "outbox")
        filler = process.root / "filler"
        filler.write_bytes(b"x" * 250 * 1024)
        text = "long " * 2000
        failure = process.fail(text=text)
        assert (failure.code, failure.kind) == ("outbox_full", FailureKind.WAITING)
        assert "talk." in failure.what and failure.hint
        assert names(process.root) == ["filler"]
        filler.unlink()
        process.publish(text=text)


@needs_root
def test_a_read_only_outbox_is_waited_for(process: Writer, tmp_path: Path) -> None:
    """A share that became read-only is waited for and named."""
    (tmp_path / "inbox").mkdir()
    with tmpfs(tmp_path / "outbox") as root:
        process.serve(root)
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        failure = process.fail()
        assert (failure.code, failure.kind) == ("outbox_read_only", FailureKind.WAITING)
        subprocess.run(["mount", "-o", "remount,rw", str(root)], check=True)
        process.publish()


def test_an_absent_share_is_waited_for(writer: Writer) -> None:
    """When inbox and outbox are gone together, their share is: nothing is made in their place, and work goes on when they are back."""
    share = writer.root.parent
    away = share.with_name("away")
    share.rename(away)
    share.mkdir()
    failure = writer.fail()
    assert (failure.code, failure.kind) == ("outbox_absent", FailureKind.WAITING)
    assert os.listdir(share) == []
    share.rmdir()
    away.rename(share)
    writer.publish()


@needs_root
def test_nothing_is_published_below_a_lost_mount(process: Writer, tmp_path: Path) -> None:
    """An outbox that was a mount point and is none any more is absent, though a directory of that name is still there."""
    (tmp_path / "inbox").mkdir()
    with tmpfs(tmp_path / "outbox") as root:
        process.serve(root)
        subprocess.run(["umount", str(root)], check=True)
        assert process.fail().code == "outbox_absent"
    with tmpfs(tmp_path / "share") as share:
        process.serve(share / "outbox", like=os.fsencode(tmp_path / "inbox"))
        subprocess.run(["umount", str(share)], check=True)
        assert process.fail().code == "outbox_absent"
        assert names(tmp_path) == []


def test_an_outbox_removed_by_hand_is_made_again(writer: Writer) -> None:
    """With the inbox still there, a removed outbox is no reason to wait."""
    writer.root.rmdir()
    writer.publish()


# --- killed, and cut off at every system call ----------------------------------------------------------------------------------


def wait_for(*paths: Path) -> float:
    """When one of the files was there first."""
    deadline = time.monotonic() + 20
    while not any(path.exists() for path in paths):
        assert time.monotonic() < deadline
        time.sleep(0.0002)
    return time.monotonic()


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """A dozen writers killed with SIGKILL while they publish: no file is ever half there, and one more run makes everything whole."""
    (tmp_path / "inbox").mkdir()
    staged = msgspec.json.encode(transcript("a sentence of some length", segments=1500))
    expected = {name: render(transcript("a sentence of some length", segments=1500), name) for name in ALL}
    chance = random.Random(5)

    def request(job: int) -> Publish:
        return Publish(job=job, base=b"sub/talk %d" % job, formats=ALL, own=(), stale=())

    writing_s = 0.0
    for job in range(13):
        writer = Writer()
        writer.serve(tmp_path / "outbox")
        writer.send(request(job), staged)
        began = wait_for(tmp_path / "outbox" / "sub" / f".whisperd-{job}.txt.tmp", tmp_path / "outbox" / "sub" / f"talk {job}.txt")
        if job == 0:  # an unhurt one first: how long it writes
            assert isinstance(writer.hear(), Published)
            writing_s = time.monotonic() - began
        else:
            time.sleep(writing_s * chance.uniform(0, 1.1))
        writer.end()
        for path in (tmp_path / "outbox").rglob("talk*"):
            assert path.read_bytes() == expected[path.suffix[1:]]
    last = Writer()
    last.serve(tmp_path / "outbox")
    for job in range(13):
        assert isinstance(last.ask(request(job), staged), Published)
    last.end()
    assert names(tmp_path / "outbox") == sorted(f"sub/talk {job}.{name}" for job in range(13) for name in ALL)
    assert all(path.read_bytes() == expected[path.suffix[1:]] for path in (tmp_path / "outbox" / "sub").iterdir())


CALLS = ("open", "mkdir", "write", "fsync", "fchown", "fchmod", "link", "rename", "unlink")
CONTENTS = {"txt": b"new text\n" * 50, "json": b"{}\n" * 50, "srt": b"new cue\n" * 50}
OLD = b"old cue\n"
STALE = b"it failed\n"


class Scene:
    """One publication that does everything: makes folders, creates, keeps, replaces, and removes a stale file."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.inbox = root / "inbox"
        self.outbox = root / "outbox"
        self.folder = self.outbox / "new" / "sub"
        self.inbox.mkdir(parents=True)

    def older(self) -> None:
        """What earlier attempts left: an old srt of ours, an error file."""
        self.outbox.mkdir(exist_ok=True)
        (self.outbox / "talk.wav.error.txt").write_bytes(STALE)
        self.folder.mkdir(parents=True)
        (self.folder / "talk.srt").write_bytes(OLD)

    def served(self) -> Outbox:
        return Outbox(ServeOutbox(path=os.fsencode(self.outbox), file_mode=0o644, directory_mode=0o755, like=os.fsencode(self.inbox)))

    def publish(self, outbox: Outbox | None = None) -> None:
        publish(
            outbox or self.served(),
            job=3,
            base=b"new/sub/talk",
            contents=CONTENTS,
            own=[OwnFile(path=b"new/sub/talk.srt", sha256=sha256(OLD))],
            stale=[OwnFile(path=b"talk.wav.error.txt", sha256=sha256(STALE))],
        )

    def check_nothing_half(self) -> None:
        for name, content in CONTENTS.items():
            path = self.folder / f"talk.{name}"
            if path.exists():
                assert path.read_bytes() in (content, OLD if name == "srt" else content)

    def check_whole(self) -> None:
        assert names(self.outbox) == sorted(f"new/sub/talk.{name}" for name in CONTENTS)
        for name, content in CONTENTS.items():
            assert (self.folder / f"talk.{name}").read_bytes() == content


Strike = Callable[[str, Callable[..., Any], tuple[Any, ...]], None]


def strike_call(patch: pytest.MonkeyPatch, number: int, strike: Strike, log: list[str]) -> None:
    """Let the `number`-th system call of the outbox meet a misfortune; log them all."""

    def wrapped(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            log.append(name)
            if len(log) == number:
                strike(name, real, arguments)
            return real(*arguments, **options)

        return call

    for name in CALLS:
        patch.setattr(place.os, name, wrapped(name, getattr(os, name)))


def kill_here(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if name == "write":
        real(arguments[0], arguments[1][: len(arguments[1]) // 2])
    os.kill(os.getpid(), signal.SIGKILL)


def run_killed_at(scene: Scene, number: int) -> bool:
    """Publish in a forked process that is killed just before its `number`-th call; whether it got that far."""
    child = os.fork()
    if child == 0:
        try:
            strike_call(pytest.MonkeyPatch(), number, kill_here, [])
            scene.publish()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.parametrize("older", [False, True], ids=["first time", "new version"])
def test_killed_before_every_system_call(tmp_path: Path, older: bool) -> None:
    """Wherever the writer is killed, every name holds a whole file or none, and the same request again makes everything whole."""
    number = 0
    killed = True
    while killed:
        number += 1
        scene = Scene(tmp_path / str(number))
        if older:
            scene.older()
        killed = run_killed_at(scene, number)
        scene.check_nothing_half()
        scene.publish()
        scene.check_whole()
    assert number > 30


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.ESTALE, errno.EDQUOT, errno.ETIMEDOUT])
def test_an_error_at_every_system_call(tmp_path: Path, number: int) -> None:
    """Whatever call fails, the job waits with a named reason, no temporary file stays, and the same request works afterwards."""

    def fail(name: str, real: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        raise OSError(number, os.strerror(number))

    position = 0
    struck = True
    while struck:
        position += 1
        log: list[str] = []
        scene = Scene(tmp_path / str(position))
        scene.older()
        with pytest.MonkeyPatch.context() as patch:
            strike_call(patch, position, fail, log)
            try:
                scene.publish()
            except Unpublished as error:
                assert error.failure().kind is FailureKind.WAITING
                assert str(tmp_path) in error.what
        struck = len(log) >= position
        if log[position - 1 : position] != ["unlink"]:
            assert not [name for name in names(scene.outbox) if ".whisperd-" in name]
        scene.check_nothing_half()
        scene.publish()
        scene.check_whole()
    assert position > 30


def test_every_file_is_durable_before_it_has_its_name(tmp_path: Path) -> None:
    """All contents are synced before the first name is given, and the folder is synced after the last,
    and again once the stale file is gone."""
    log: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        scene = Scene(tmp_path / "scene")
        scene.outbox.mkdir()
        (scene.outbox / "talk.wav.error.txt").write_bytes(STALE)
        strike_call(patch, 0, kill_here, log)
        scene.publish()
    order = [name for name in log if name in ("mkdir", "write", "fsync", "link")]
    assert order == ["mkdir", "fsync"] * 2 + ["write", "fsync"] * len(CONTENTS) + ["link"] * len(CONTENTS) + ["fsync", "fsync"]


@pytest.mark.parametrize("number", place.CANNOT_LINK)
def test_filesystems_without_hard_links(tmp_path: Path, number: int) -> None:
    """Where hard links cannot be had, files are renamed into place, and still never over another one."""

    def no_links(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    scene = Scene(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "link", no_links)
        scene.publish()
        scene.check_whole()


@pytest.mark.parametrize("number", place.CANNOT_SYNC)
def test_filesystems_that_cannot_sync_or_own(tmp_path: Path, number: int) -> None:
    """Where a filesystem keeps no owners or modes and cannot sync, publishing works as far as it can."""

    def cannot(*arguments: Any, **options: Any) -> None:
        raise OSError(number, os.strerror(number))

    scene = Scene(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "fchown", "fchmod"):
            patch.setattr(place.os, name, cannot)
        scene.publish()
    scene.check_whole()


@contextmanager
def struck(writer: Writer, call: str, error: str) -> Iterator[None]:
    """Let a system call of the real process fail."""
    if shutil.which("strace") is None:
        pytest.skip("no strace here")
    status = Path(f"/proc/{writer.child.pid}/status")
    command = ["strace", "-qq", "-o", os.devnull, "-e", f"trace={call}", "-e", f"inject={call}:error={error}"]
    tracer = subprocess.Popen([*command, "-p", str(writer.child.pid)], stderr=subprocess.PIPE, text=True)
    try:
        while "TracerPid:\t0\n" in status.read_text():
            if tracer.poll() is not None:
                assert tracer.stderr is not None
                pytest.skip(f"cannot trace here: {tracer.stderr.read().strip()}")
            time.sleep(0.002)
        yield
    finally:
        tracer.terminate()
        tracer.communicate()


@pytest.mark.parametrize("error", ["EINVAL", "EOPNOTSUPP", "ENOSYS"])
def test_the_process_on_a_filesystem_that_cannot_sync(writer: Writer, error: str) -> None:
    """The kernel itself says that fsync cannot be had: published all the same, folders, files and removals."""
    answer = error_file(writer, "no audio\n")
    assert isinstance(answer, Published)
    with struck(writer, "fsync", error):
        writer.publish(b"sub/talk", stale=own(answer.files))
    assert names(writer.root) == sorted(f"sub/talk.{name}" for name in ALL)


def test_a_file_that_could_not_be_synced_is_written_anew(writer: Writer) -> None:
    """EIO from fsync is no transcript: nothing stands in the outbox, nothing is left, and the next try writes new files (the pages of the
    old ones may be clean and gone, and a second fsync say that all is well)."""
    with struck(writer, "fsync", "EIO"):
        failure = writer.fail()
        assert (failure.code, failure.kind) == ("outbox_io", FailureKind.WAITING)
        assert names(writer.root) == []
    writer.publish()


def test_a_folder_that_could_not_be_synced_gets_its_files_anew(tmp_path: Path) -> None:
    """EIO from the fsync of the folder comes when the files have their names already: they are replaced by new ones before they count."""
    scene = Scene(tmp_path)
    outbox = scene.served()
    real, syncs = os.fsync, 0

    def broken(descriptor: int) -> None:
        nonlocal syncs
        if (scene.folder / "talk.srt").exists():
            syncs += 1
            raise OSError(errno.EIO, "the disk lost it")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "fsync", broken)
        with pytest.raises(Unpublished):
            scene.publish(outbox)
    assert syncs == 1
    before = {path.name: path.stat().st_ino for path in scene.folder.iterdir()}
    kept = [os.open(path, os.O_RDONLY) for path in scene.folder.iterdir()]  # so that no number is used again
    scene.publish(outbox)
    scene.check_whole()
    after = {path.name: path.stat().st_ino for path in scene.folder.iterdir()}
    assert all(before[name] != after[name] for name in after)
    scene.publish(outbox)
    assert {path.name: path.stat().st_ino for path in scene.folder.iterdir()} == after
    for descriptor in kept:
        os.close(descriptor)


@pytest.mark.parametrize("links", [True, False])
def test_a_user_who_is_faster(tmp_path: Path, links: bool) -> None:
    """A file that appears while ours is being written is not overwritten, with hard links or without."""
    scene = Scene(tmp_path)
    mine = scene.folder / "talk.json"
    real = os.link

    def slow_link(*arguments: Any, **options: Any) -> None:
        mine.write_text("mine") if not mine.exists() else None
        if not links:
            raise OSError(errno.EPERM, "no links here")
        real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "link", slow_link)
        with pytest.raises(NameTaken):
            scene.publish()
    assert mine.read_text() == "mine"
    assert not [name for name in names(scene.outbox) if ".whisperd-" in name]


def test_a_user_who_edits_meanwhile(tmp_path: Path) -> None:
    """An old transcript that is corrected while the new version is being written is the user's."""
    scene = Scene(tmp_path)
    scene.older()
    real = os.write

    def slow_write(*arguments: Any) -> int:
        (scene.folder / "talk.srt").write_text("corrected")
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "write", slow_write)
        with pytest.raises(NameTaken):
            scene.publish()
    assert (scene.folder / "talk.srt").read_text() == "corrected"


def test_a_link_that_worked_though_it_says_otherwise(tmp_path: Path) -> None:
    """NFS may repeat a request whose answer was lost and then report that the name exists: it does, and it is ours."""
    scene = Scene(tmp_path)
    real = os.link

    def lost_answer(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise FileExistsError(errno.EEXIST, "the answer was lost")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place.os, "link", lost_answer)
        scene.publish()
    scene.check_whole()


def test_a_left_over_second_name_is_never_written_to(tmp_path: Path) -> None:
    """A crash between link and unlink leaves the temporary name on the published file; a new version must not write through it."""
    scene = Scene(tmp_path)
    scene.publish()
    published = scene.folder / "talk.txt"
    os.link(published, scene.folder / ".whisperd-3.txt.tmp")
    kept = scene.root / "kept"
    os.link(published, kept)
    published.unlink()
    scene.publish()
    scene.check_whole()
    assert kept.read_bytes() == CONTENTS["txt"]
    assert kept.stat().st_ino != published.stat().st_ino
