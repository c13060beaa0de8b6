"""The examiner as a process, over the real wire: what containers say of themselves, and contents read, hashed and copied."""

from __future__ import annotations

import hashlib
import os
import random
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from recordings import SENTENCES, Studio, cut, run, write_wav
from tools.mounts import tmpfs

from whisperd.child import Child
from whisperd.engine.audio import Recording
from whisperd.engine.failure import failure_of
from whisperd.engine.media import Caps, MediaDamaged, MediaRefused
from whisperd.vocabulary import FailureKind, Track
from whisperd.wire import (
    Drop,
    Examine,
    Examined,
    ExamineFailed,
    ExaminerOut,
    ExaminerReady,
    Message,
    ServeInbox,
    Stop,
    Take,
    TakeFailed,
    Taken,
    Taking,
)

PATIENCE_S = 30.0
TEXT = SENTENCES[2]
CAPS = Caps(duration_max_s=3600.0, channels_max=8, rate_max_hz=192_000)
GIB = 1 << 30


class Examiner:
    """One examiner process; the test plays the daemon."""

    def __init__(self, spool: Path, **caps: Any) -> None:
        self.child: Child[Any] = Child(name="examiner", module="whisperd.engine.examiner", receives=ExaminerOut, now=time.monotonic())
        self.spool = spool
        self.frames: list[Any] = []
        self.child.send(ServeInbox(spool=str(spool), **{**CAPS._asdict(), **caps}))
        assert isinstance(self.hear(), ExaminerReady)

    def send(self, message: Message, source: Path | int | None = None) -> None:
        given = (os.open(source, os.O_RDONLY),) if isinstance(source, Path) else () if source is None else (source,)
        self.child.send(message, given)

    def hear(self) -> Any:
        """The next frame."""
        until = time.monotonic() + PATIENCE_S
        while not self.frames:
            assert time.monotonic() < until, list(self.child.last_lines)
            self.frames += [frame.message for frame in self.child.channel.wait(1.0)]
        return self.frames.pop(0)

    def answer(self) -> Any:
        """The next frame that is no sign of life."""
        while isinstance(answer := self.hear(), Taking):
            pass
        return answer

    def examine(self, source: Path | int) -> Any:
        self.send(Examine(job=1), source)
        answer = self.answer()
        assert answer.job == 1
        return answer

    def take(self, source: Path | int, *, job: int = 1, spool: bool = True, free_min_mib: int = 0) -> Any:
        self.send(Take(job=job, spool=spool, free_min_mib=free_min_mib), source)
        answer = self.answer()
        assert answer.job == job
        return answer

    def spooled(self) -> list[str]:
        return sorted(os.listdir(self.spool))

    def read_bytes(self) -> int:
        """How much this process has read so far."""
        text = Path(f"/proc/{self.child.pid}/io").read_text("ascii")
        return int(text.split("rchar:")[1].split()[0])

    @contextmanager
    def held(self, *, once: Callable[[], bool]) -> Iterator[None]:
        """The process stands still in the block, somewhere behind the moment when this became true."""
        wait_for(once)
        os.kill(self.child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.child.pid, signal.SIGCONT)

    def rss_mib(self) -> float:
        return int(Path(f"/proc/{self.child.pid}/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def ended(self) -> str:
        readable, _, _ = select.select([self.child.pidfd], [], [], PATIENCE_S)
        assert readable, "the examiner does not end"
        return self.child.gone(time.monotonic())

    def close(self) -> None:
        if self.child.life != "gone":
            self.child.process.kill()
            self.ended()


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.fixture
def examiner(tmp_path: Path) -> Iterator[Examiner]:
    spool = tmp_path / "spool"
    spool.mkdir()
    one = Examiner(spool)
    yield one
    one.close()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sparse(path: Path, size: int) -> Path:
    """A file of zeros that takes no room."""
    path.touch()
    os.truncate(path, size)
    return path


def noise(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(size).randbytes(size))
    return path


# --- what containers say -------------------------------------------------------------------------------------------------------


def test_a_wav_tells_all_of_itself(examiner: Examiner, studio: Studio) -> None:
    """Container, codec, channels, rate, length; there is no picture, and the sound begins at once."""
    media = examiner.examine(studio.encode(TEXT, ".wav", ("-ar", "44100", "-ac", "2"))).media
    assert (media.container, media.video, media.start_offset_s) == ("wav", False, 0.0)
    assert media.tracks == (Track(number=1, codec="pcm_s16le", channels=2, rate_hz=44_100),)
    assert media.duration_s == pytest.approx(examiner.examine(studio.say(TEXT)).media.duration_s, abs=0.01)


def test_a_film_tells_its_tracks(examiner: Examiner, studio: Studio, tmp_path: Path) -> None:
    """Each with its language, as the container has it; the offset is that of the track that players start with."""
    film = tmp_path / "film.mkv"
    sounds = ("-i", studio.say(TEXT), "-itsoffset", "2", "-i", studio.say(TEXT))
    maps = ("-map", "0:v", "-map", "1:a", "-map", "2:a", "-metadata:s:a:0", "language=ger", "-metadata:s:a:1", "language=eng")
    order = (*maps, "-disposition:a:0", "0", "-disposition:a:1", "default", "-c:v", "mpeg4", "-c:a", "aac", "-ar", "16000")
    run("ffmpeg", "-loglevel", "error", "-f", "lavfi", "-i", "testsrc=size=96x64:rate=5:duration=6", *sounds, *order, film)
    media = examiner.examine(film).media
    assert [(track.number, track.language, track.codec) for track in media.tracks] == [(1, "ger", "aac"), (2, "eng", "aac")]
    assert media.video and media.start_offset_s == pytest.approx(2.0, abs=0.1)


def test_a_cover_is_no_film(examiner: Examiner, studio: Studio) -> None:
    """A picture in an MP3 is not one that moves."""
    assert not examiner.examine(studio.with_cover(TEXT)).media.video


def test_a_length_that_nobody_knows_is_none(examiner: Examiner, studio: Studio, tmp_path: Path) -> None:
    """What was written into a pipe does not tell it."""
    piped = tmp_path / "piped.flac"
    run("ffmpeg", "-loglevel", "error", "-i", studio.say(TEXT), "-f", "flac", "pipe:1", stdout=piped)
    assert examiner.examine(piped).media.duration_s is None


BAD = {
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(500),
    "pdf": b"%PDF-1.7\n" + bytes(500),
    "text": "Liebe Grüße, café\n".encode() * 40,
    "zeros": bytes(100_000),
    "nothing": b"",
    "playlist": b"#EXTM3U\n#EXTINF:3.0,\n/etc/passwd\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("kind", [*BAD, "mute film", "cut wav", "cut mp4", "long", "channels"])
def test_what_is_refused_is_refused_in_the_engines_words(kind: str, studio: Studio, tmp_path: Path) -> None:
    """For good, with the code, sentence and hint that opening it in an engine gives; and the process goes on."""
    path, caps = tmp_path / "bad", CAPS._replace(duration_max_s=50.0)
    made: dict[str, Callable[[], object]] = {
        "mute film": lambda: path.write_bytes(studio.film_without_sound().read_bytes()),
        "cut wav": lambda: cut(studio.say(TEXT), path, 0.5),
        "cut mp4": lambda: cut(studio.encode(TEXT, ".m4a", ("-c:a", "aac")), path, 0.5),
        "long": lambda: write_wav(path, bytes(200), rate=1),
        "channels": lambda: write_wav(path, bytes(18 * 500), channels=9),
    }
    made.get(kind, lambda: path.write_bytes(BAD[kind]))()
    examiner = Examiner(tmp_path, **caps._asdict())
    refused = examiner.examine(path)
    assert isinstance(refused, ExamineFailed), refused
    descriptor = os.open(path, os.O_RDONLY)
    with pytest.raises((MediaRefused, MediaDamaged)) as complaint:
        Recording(descriptor, caps)
    os.close(descriptor)
    assert refused.failure == failure_of(complaint.value) and refused.failure.kind is FailureKind.PERMANENT
    assert isinstance(examiner.examine(studio.say(TEXT)), Examined)
    examiner.close()


def test_one_track_within_the_caps_is_enough(examiner: Examiner, studio: Studio, tmp_path: Path) -> None:
    """Which track is meant, the job says: a file is refused when all of them ask too much."""
    film = tmp_path / "two.mkv"
    wide = write_wav(tmp_path / "wide.wav", bytes(18 * 16_000), channels=9)
    run("ffmpeg", "-loglevel", "error", "-i", wide, "-i", studio.say(TEXT), "-map", "0", "-map", "1", "-c", "copy", film)
    assert [track.channels for track in examiner.examine(film).media.tracks] == [9, 1]


def test_what_cannot_be_read_now_waits(examiner: Examiner, studio: Studio) -> None:
    """An error of the file system says nothing about the recording (here: a descriptor that may not be read from)."""
    unreadable = os.open(studio.say(TEXT), os.O_WRONLY)
    refused = examiner.examine(unreadable)
    assert (refused.failure.kind, refused.failure.code) == (FailureKind.WAITING, "source_unreadable")
    assert refused.failure.what and refused.failure.hint


def test_a_pipe_is_refused_at_once(examiner: Examiner, tmp_path: Path) -> None:
    """Who read from it would wait for ever."""
    fifo = tmp_path / "fifo.wav"
    os.mkfifo(fifo)
    refused = examiner.examine(os.open(fifo, os.O_RDWR))
    assert (refused.failure.kind, refused.failure.code) == (FailureKind.PERMANENT, "media_refused") and "pipe" in refused.failure.what
    failed = examiner.take(os.open(fifo, os.O_RDWR))
    assert failed.failure.code == "source_unreadable" and examiner.spooled() == []


def test_the_offset_of_a_shared_descriptor_does_not_matter(examiner: Examiner, studio: Studio) -> None:
    """The daemon's descriptor may stand anywhere."""
    for ask in (examiner.examine, examiner.take):
        descriptor = os.open(studio.say(TEXT), os.O_RDONLY)
        os.lseek(descriptor, 1000, os.SEEK_SET)
        assert isinstance(ask(descriptor), Examined | Taken)


def test_spoilt_headers_end_in_an_answer(examiner: Examiner, studio: Studio, tmp_path: Path) -> None:
    """A hundred and fifty recordings with bytes changed near their beginning: each is answered, by the same process."""
    chance = random.Random(5)
    sources = [
        studio.encode(TEXT, suffix, options).read_bytes() for suffix, options in ((".wav", ()), (".m4a", ("-c:a", "aac")), (".mp3", ()))
    ]
    spoilt = tmp_path / "spoilt"
    for number in range(150):
        data = bytearray(sources[number % 3])
        for _ in range(20):
            data[chance.randrange(min(len(data), 600))] = chance.randrange(256)
        spoilt.write_bytes(data)
        assert isinstance(examiner.examine(spoilt), Examined | ExamineFailed)


# --- contents ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, 5_000_001])
def test_the_digest_is_that_of_the_content(size: int, examiner: Examiner, tmp_path: Path) -> None:
    """With a copy and without one; the copy is the content, and nothing else is left in the spool."""
    source = noise(tmp_path / "source", size)
    assert examiner.take(source, spool=False) == Taken(job=1, sha256=sha256(source), spooled=False)
    assert examiner.spooled() == []
    assert examiner.take(source, job=7) == Taken(job=7, sha256=sha256(source), spooled=True)
    assert examiner.spooled() == ["7"] and (examiner.spool / "7").read_bytes() == source.read_bytes()


def test_one_after_the_other_while_headers_are_looked_at(examiner: Examiner, studio: Studio, tmp_path: Path) -> None:
    """Contents are taken in the order of the requests; a recording dropped meanwhile is examined before the long one is through."""
    examiner.examine(studio.say(TEXT))  # now the codecs are loaded
    examiner.send(Take(job=1, spool=False, free_min_mib=0), sparse(tmp_path / "long", GIB))
    examiner.send(Take(job=2, spool=False, free_min_mib=0), noise(tmp_path / "short", 10))
    with examiner.held(once=lambda: examiner.read_bytes() > 30 << 20):
        examiner.send(Examine(job=3), studio.say(TEXT))
    assert [examiner.answer().job for _ in range(3)] == [3, 1, 2]


def test_a_long_content_shows_signs_of_life(examiner: Examiner, tmp_path: Path) -> None:
    """While it is read, it is told how far; what is told grows, and goes no further than the file."""
    size = 6 * GIB
    examiner.send(Take(job=1, spool=False, free_min_mib=0), sparse(tmp_path / "long", size))
    first, second = examiner.hear(), examiner.hear()
    assert isinstance(first, Taking) and first.job == 1 and 0 <= first.done_bytes < size
    if isinstance(second, Taking):  # a fast machine may be through
        assert first.done_bytes < second.done_bytes <= size


def write_inside(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"another")
    os.utime(path, ns=(10**18, 10**18))


CHANGES: dict[str, Callable[[Path], None]] = {
    "longer": lambda path: os.truncate(path, GIB),
    "shorter": lambda path: os.truncate(path, 100),
    "touched": os.utime,
    "inside": write_inside,
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_a_source_that_changes_meanwhile_is_not_taken(changes: Callable[[Path], None], examiner: Examiner, tmp_path: Path) -> None:
    """Longer, shorter, or touched, also where its size and time are set back: the time of its last change is not."""
    size = 512 << 20
    source = sparse(tmp_path / "source", size)
    os.utime(source, ns=(10**18, 10**18))
    examiner.send(Take(job=1, spool=False, free_min_mib=0), source)
    with examiner.held(once=lambda: examiner.read_bytes() > 30 << 20):
        changes(source)
    failed = examiner.answer()
    assert isinstance(failed, TakeFailed), failed
    assert (failed.failure.kind, failed.failure.code) == (FailureKind.TRANSIENT, "changed_while_read") and failed.failure.hint


def test_a_source_that_fails_while_it_is_read_waits(examiner: Examiner) -> None:
    """An input/output error from the kernel (its own memory gives one at address 0): the job waits, no copy is left."""
    failed = examiner.take(os.open(f"/proc/{os.getpid()}/mem", os.O_RDONLY))
    assert (failed.failure.kind, failed.failure.code) == (FailureKind.WAITING, "source_unreadable")
    assert "Input/output error" in failed.failure.what and failed.failure.hint
    assert examiner.spooled() == []


def test_a_job_that_is_dropped_is_not_taken_further(examiner: Examiner, tmp_path: Path) -> None:
    """Not the one that is read, of 3 GB, not the one that waits for its turn; nothing of either is left, both are answered, and the next
    one has its turn."""
    examiner.send(Take(job=1, spool=True, free_min_mib=0), noise_then_hole(tmp_path / "long", 3 * GIB))
    examiner.send(Take(job=2, spool=True, free_min_mib=0), noise(tmp_path / "second", 10))
    wait_for(lambda: examiner.spooled() == ["1.partial"])
    examiner.send(Drop(job=2))
    examiner.send(Drop(job=1))
    told = [examiner.answer(), examiner.answer()]
    assert examiner.read_bytes() < 2 * GIB
    assert sorted((answer.job, answer.failure.code) for answer in told) == [(1, "dropped"), (2, "dropped")]
    assert examiner.spooled() == []
    assert isinstance(examiner.take(tmp_path / "second", job=3), Taken)


def noise_then_hole(path: Path, size: int) -> Path:
    noise(path, 1 << 20)
    os.truncate(path, size)
    return path


def test_a_copy_that_is_no_longer_wanted_is_removed(examiner: Examiner, tmp_path: Path) -> None:
    """Also when it was whole already; a job that nobody knows is no fault."""
    source = noise(tmp_path / "source", 1000)
    examiner.take(source, job=4)
    examiner.send(Drop(job=4))
    examiner.send(Drop(job=99))
    examiner.take(source, job=5)
    assert examiner.spooled() == ["5"]


def test_stopping_ends_at_once_and_leaves_nothing_half_done(examiner: Examiner, tmp_path: Path) -> None:
    """In the middle of a copy."""
    examiner.send(Take(job=1, spool=True, free_min_mib=0), noise_then_hole(tmp_path / "long", 3 * GIB))
    wait_for(lambda: examiner.spooled() == ["1.partial"])
    examiner.send(Stop())
    assert examiner.ended() == "ended normally"
    assert examiner.spooled() == []


def test_killed_at_any_moment_a_copy_is_whole_or_absent(tmp_path: Path) -> None:
    """By SIGKILL, wherever it was; the next one takes it again, over what was left."""
    spool = tmp_path / "spool"
    spool.mkdir()
    source = noise(tmp_path / "source", 24 << 20)
    digest, chance = sha256(source), random.Random(7)
    seen = set()
    for number in range(8):
        examiner = Examiner(spool)
        copied = chance.randrange(source.stat().st_size)
        examiner.send(Take(job=1, spool=True, free_min_mib=0), source)
        partial, whole = spool / "1.partial", spool / "1"
        if number:
            wait_for(lambda: whole.exists() or (partial.exists() and partial.stat().st_size >= copied))  # noqa: B023
        os.kill(examiner.child.pid, signal.SIGKILL)
        examiner.ended()
        seen.add((whole.exists(), partial.exists()))
        assert not whole.exists() or sha256(whole) == digest
        whole.unlink(missing_ok=True)
    assert (False, True) in seen, "it was never killed in the middle"
    last = Examiner(spool)
    assert last.take(source) == Taken(job=1, sha256=digest, spooled=True)
    assert last.spooled() == ["1"] and sha256(spool / "1") == digest
    last.close()


# --- no room -------------------------------------------------------------------------------------------------------------------


def test_a_full_spool_waits(tmp_path: Path) -> None:
    """A copy that would not leave the free space asked for is not begun; one that does not fit after all, because others filled the disk
    meanwhile, leaves nothing. With room again it is taken."""
    source = noise_then_hole(tmp_path / "source", 40 << 20)
    with tmpfs(tmp_path / "disk", "size=64m") as spool:
        examiner = Examiner(spool)
        refused = examiner.take(source, free_min_mib=30)
        assert (refused.failure.kind, refused.failure.code) == (FailureKind.WAITING, "spool_full") and refused.failure.hint
        other = noise(spool / "other", 40 << 20)
        assert examiner.take(source).failure.code == "spool_full"
        assert examiner.spooled() == ["other"]
        other.unlink()
        assert examiner.take(source, free_min_mib=20) == Taken(job=1, sha256=sha256(source), spooled=True)
        examiner.close()


def test_a_disk_that_fills_while_copying(tmp_path: Path) -> None:
    """Somebody else takes the room in the middle of it: the copy ends there, and gives back what it had."""
    source = noise_then_hole(tmp_path / "source", 250 << 20)
    with tmpfs(tmp_path / "disk", "size=270m") as spool:
        examiner = Examiner(spool)
        examiner.send(Take(job=1, spool=True, free_min_mib=2), source)
        with examiner.held(once=lambda: examiner.spooled() == ["1.partial"]), open(spool / "other", "wb") as other:
            os.posix_fallocate(other.fileno(), 0, 60 << 20)
        assert examiner.answer().failure.code == "spool_full"
        assert examiner.spooled() == ["other"]
        examiner.close()


def test_a_spool_that_is_gone_waits(examiner: Examiner, tmp_path: Path) -> None:
    """Another fault of the local disk is told by its own name, and is no fault of the recording."""
    examiner.spool.rmdir()
    failed = examiner.take(noise(tmp_path / "source", 10))
    assert (failed.failure.kind, failed.failure.code) == (FailureKind.WAITING, "spool_unusable")
    examiner.spool.mkdir()


# --- the process ---------------------------------------------------------------------------------------------------------------


def test_it_is_a_small_process(examiner: Examiner, studio: Studio) -> None:
    """No codec is loaded before the first recording comes, and numpy never."""

    def mapped(name: str) -> bool:
        return name in Path(f"/proc/{examiner.child.pid}/maps").read_text("utf-8")

    assert not mapped("libavformat") and examiner.rss_mib() < 60
    examiner.examine(studio.say(TEXT))
    assert mapped("libavformat") and not mapped("numpy") and examiner.rss_mib() < 100


def test_it_leaves_no_core_and_no_more_memory_than_allowed(examiner: Examiner) -> None:
    """Limits of the process, as the kernel has them."""
    limits = Path(f"/proc/{examiner.child.pid}/limits").read_text("ascii")
    assert [line.split()[4] for line in limits.splitlines() if line.startswith("Max core file size")] == ["0"]
    assert [line.split()[3] for line in limits.splitlines() if line.startswith("Max data size")] == [str(2 * GIB)]


def test_what_ends_it(examiner: Examiner) -> None:
    """A request without its descriptor breaks the protocol: it ends with a status, and says why."""
    examiner.send(Examine(job=1))
    assert examiner.ended() == "ended with status 1"
    assert any("descriptors" in line for line in examiner.child.last_lines)


def test_it_ends_with_the_daemon(examiner: Examiner) -> None:
    """When the wire closes."""
    examiner.child.channel._socket.shutdown(2)
    assert examiner.ended() == "ended normally"
