"""The engine as a process, over the real wire, with the model that ships; and its front end, whose memory must not grow."""

from __future__ import annotations

import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import SENTENCES, Studio, likeness, samples_of, write_wav

from whisperd.child import Child
from whisperd.engine.audio import MediaDamaged
from whisperd.engine.failure import failure_of
from whisperd.engine.model import ModelAbsent
from whisperd.vocabulary import JobOptions, Window
from whisperd.wire import (
    Abandon,
    Abandoned,
    BatchDone,
    BatchSet,
    BootFailed,
    EngineOut,
    EngineReady,
    Finished,
    JobFailed,
    LoadModel,
    Message,
    Progress,
    SetBatch,
    Transcribe,
    Unload,
    Unloaded,
    WindowDone,
)

PATIENCE_S = 60.0
OPTIONS = JobOptions(model="demo", language="en", window_s=5.0, temperatures=(0.0,))
LONG = SENTENCES[:10]


def load_request(**changes: Any) -> LoadModel:
    usual = {
        "model": "demo",
        "device": "cpu",
        "compute_type": "int8",
        "gpu": "",
        "cpu_threads": 1,
        "batch": 4,
        "encoder": "auto",
        "cache_dir": "/nonexistent/cache",
        "offline": True,
        "duration_max_s": 3600.0,
        "channels_max": 8,
        "rate_max_hz": 192_000,
    }
    return LoadModel(**{**usual, **changes})


class Engine:
    """One engine process; the test plays the daemon."""

    def __init__(self, request: LoadModel) -> None:
        self.child: Child[Any] = Child(name="engine", module="whisperd.engine", receives=EngineOut, now=time.monotonic())
        self.frames: list[Any] = []
        self.places: list[bytes] = []  # that came with the windows of the last whole job
        self.child.send(request)

    def send(self, message: Message, source: Path | None = None) -> None:
        self.child.send(message, () if source is None else (os.open(source, os.O_RDONLY),))

    def transcribe(self, job: int, source: Path, **begun: Any) -> None:
        self.send(Transcribe(job=job, options=begun.pop("options", OPTIONS), **begun), source)

    def until(self, *kinds: type[Message]) -> Any:
        """Read frames until one of these kinds; that frame."""
        until = time.monotonic() + PATIENCE_S
        while True:
            for number, message in enumerate(self.frames):
                if isinstance(message, kinds):
                    self.heard, self.frames = self.frames[: number + 1], self.frames[number + 1 :]
                    return message
            assert time.monotonic() < until, (kinds, self.frames, list(self.child.last_lines))
            self.frames += [frame.message for frame in self.child.channel.wait(1.0)]

    def whole(self, job: int, source: Path, **begun: Any) -> tuple[list[Window], Finished]:
        """One job to its good end."""
        self.transcribe(job, source, **begun)
        windows: list[Window] = []
        self.places = []
        while True:
            message = self.until(WindowDone, Finished, JobFailed)
            assert message.job == job
            if isinstance(message, WindowDone):
                windows.append(message.window)
                self.places.append(message.front_end)
            else:
                assert isinstance(message, Finished), message
                return windows, message

    def ended(self) -> str:
        """Wait for the end of the process; how it ended."""
        readable, _, _ = select.select([self.child.pidfd], [], [], PATIENCE_S)
        assert readable, "the engine does not end"
        return self.child.gone(time.monotonic())

    def close(self) -> None:
        if self.child.life != "gone":
            self.child.process.kill()
            self.ended()


@pytest.fixture(scope="module")
def long_talk(studio: Studio) -> Path:
    return studio.long(LONG)


@pytest.fixture
def fresh() -> Iterator[Engine]:
    """An engine of this test alone, its model loaded."""
    engine = Engine(load_request())
    engine.until(EngineReady)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """An engine that several tests use one after the other, which it must stand."""
    engine = Engine(load_request())
    ready = engine.until(EngineReady)
    assert (ready.model, ready.device, ready.slots >= 1) == ("demo", "cpu", True)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def calm(engine: Engine, long_talk: Path) -> tuple[list[Window], Finished]:
    """The windows of an undisturbed run."""
    return engine.whole(1, long_talk)


@pytest.fixture(scope="module")
def places(calm: tuple[list[Window], Finished], engine: Engine, long_talk: Path) -> list[bytes]:
    """What the front end said with each of those windows."""
    engine.whole(1, long_talk)
    return engine.places


# --- jobs in, windows out ------------------------------------------------------------------------------------------------------


def test_windows_come_in_order_and_hold_what_was_said(calm: tuple[list[Window], Finished]) -> None:
    """Numbered from 0, apart, within the length, all told before the summary; together they hold the sentences."""
    windows, finished = calm
    assert [window.index for window in windows] == list(range(len(windows))) and len(windows) >= 5
    assert finished.summary.windows == len(windows)
    for before, after in pairwise(windows):
        assert before.start_s < before.end_s <= after.start_s
    for window in windows:
        assert window.end_s - window.start_s <= 5.0 + 0.001
        assert all(window.start_s <= segment.start_s <= segment.end_s <= window.end_s + 0.001 for segment in window.segments)
    heard = " ".join(segment.text for window in windows for segment in window.segments)
    assert likeness(" ".join(LONG), heard) > 0.8, heard


def test_the_summary_says_what_was_read(calm: tuple[list[Window], Finished], long_talk: Path) -> None:
    """Length, amount of speech, digest of the very bytes, container, codec, model and its revision."""
    import hashlib

    summary = calm[1].summary
    assert summary.source_sha256 == hashlib.sha256(long_talk.read_bytes()).hexdigest()
    assert summary.duration_s == pytest.approx(len(samples_of(long_talk)) / 32_000, abs=0.01)
    assert 0 < summary.speech_s < summary.duration_s
    assert (summary.container, summary.codec, summary.model, summary.device) == ("wav", "pcm_s16le", "demo", "cpu")
    assert summary.model_revision


@pytest.mark.parametrize("done", [1, 4, 7, "all"])
@pytest.mark.parametrize("place", [True, False])
def test_resume_gives_the_windows_that_are_missing(  # noqa: PLR0917 - fixtures
    done: int | str, place: bool, engine: Engine, long_talk: Path, calm: tuple[list[Window], Finished], places: list[bytes]
) -> None:
    """From a checkpoint on, with the front end's place or without it, the windows are those of an undisturbed run, byte for byte."""
    windows, finished = calm
    kept = len(windows) if done == "all" else int(done)
    begun = {"windows_done": kept, "position_s": windows[kept - 1].end_s, "front_end": places[kept - 1] if place else b""}
    again, summary = engine.whole(2, long_talk, **begun)
    assert again == windows[kept:]
    assert summary.summary == finished.summary


def test_what_else_the_engine_has_done_changes_nothing(
    engine: Engine, studio: Studio, long_talk: Path, calm: tuple[list[Window], Finished]
) -> None:
    """Same audio, same options, same model: same windows, though other files were between."""
    engine.whole(3, studio.say(SENTENCES[12]))
    assert engine.whole(4, long_talk) == (calm[0], Finished(job=4, summary=calm[1].summary))


def test_progress_is_told_and_only_advances(engine: Engine, long_talk: Path, tmp_path: Path) -> None:
    """In a silence, too, the position is told; it never goes back, and the length of the recording is known."""
    source = write_wav(tmp_path / "quiet.wav", bytes(600 * 32_000) + samples_of(long_talk))
    engine.transcribe(5, source)
    engine.frames, told = [], []
    while not isinstance(message := engine.until(Progress, Finished), Finished):
        told.append(message)
    assert told and all(message.duration_s == pytest.approx(len(samples_of(long_talk)) / 32_000 + 600, abs=0.1) for message in told)
    positions = [message.position_s for message in told]
    assert positions == sorted(positions)


def test_a_job_can_be_abandoned_while_it_catches_up(engine: Engine, studio: Studio, long_talk: Path, tmp_path: Path) -> None:
    """A resumed job passes over what is done already; it hears the daemon meanwhile, too."""
    source = write_wav(tmp_path / "longer.wav", samples_of(long_talk) * 12)
    engine.transcribe(16, source, windows_done=10_000, position_s=3600.0)
    engine.send(Abandon(job=16))
    assert engine.until(Abandoned, Finished) == Abandoned(job=16)
    assert engine.whole(17, studio.say(SENTENCES[0]))[0]


def test_a_job_can_be_abandoned(fresh: Engine, studio: Studio, long_talk: Path) -> None:
    """Abandon in the middle of a file is answered before its end, and the slot is free for the next file."""
    fresh.transcribe(6, long_talk)
    first = fresh.until(WindowDone)
    fresh.send(Abandon(job=6))
    assert fresh.until(Abandoned, Finished) == Abandoned(job=6)
    assert first.window.index == 0
    windows, _ = fresh.whole(7, studio.say(SENTENCES[0]))
    assert windows
    fresh.send(Abandon(job=7))  # over already: nothing happens
    assert fresh.whole(8, studio.say(SENTENCES[1]))[1].job == 8


def test_stop_is_obeyed_at_a_boundary(fresh: Engine, long_talk: Path, calm: tuple[list[Window], Finished]) -> None:
    """Stop in the middle of a file: the windows told so far are whole and good, the job is abandoned, the process ends normally."""
    fresh.transcribe(9, long_talk)
    windows = [fresh.until(WindowDone).window]
    fresh.child.drain(time.monotonic())
    while isinstance(message := fresh.until(WindowDone, Abandoned, Finished), WindowDone):
        windows.append(message.window)
    assert message == Abandoned(job=9)
    assert windows == calm[0][: len(windows)] and len(windows) < len(calm[0])
    assert fresh.ended() == "ended normally"


def test_stop_without_work(fresh: Engine) -> None:
    """An idle engine ends at once, and normally."""
    fresh.child.drain(time.monotonic())
    assert fresh.ended() == "ended normally"


def test_a_stop_that_comes_before_the_model_is_loaded() -> None:
    """Stop right behind the order to load: the process ends at once, and normally, without a word."""
    engine = Engine(load_request())
    try:
        engine.child.drain(time.monotonic())
        assert engine.ended() == "ended normally"
    finally:
        engine.close()


def test_the_engine_ends_with_the_daemon(fresh: Engine, long_talk: Path) -> None:
    """The wire closes in the middle of a file: the process does not work on for nobody."""
    fresh.transcribe(10, long_talk)
    fresh.until(WindowDone)
    fresh.child.channel._socket.shutdown(socket.SHUT_RDWR)
    assert fresh.ended() == "ended normally"


@pytest.mark.parametrize("ending", ["told to stop", "left alone"])
def test_a_download_is_not_finished_first(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stop, or the daemon's end, while the model is being fetched from a hub that does not answer: the process ends normally."""
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        engine = Engine(load_request(model="somebody/large", cache_dir=str(tmp_path), offline=False))
        try:
            hub.settimeout(PATIENCE_S)
            with hub.accept()[0]:
                if ending == "told to stop":
                    engine.child.drain(time.monotonic())
                else:
                    engine.child.channel._socket.shutdown(socket.SHUT_RDWR)
                assert engine.ended() == "ended normally"
        finally:
            engine.close()


# --- the batch -----------------------------------------------------------------------------------------------------------------


def test_the_batch_is_set_in_the_middle_of_work(fresh: Engine, studio: Studio) -> None:
    """Up, down and up again while more jobs are in hand than there are slots: each answer has the new slots, the calls after it keep to
    the new limit and fill it, and every job has the text that it has alone."""
    sources = [studio.say(text) for text in SENTENCES[:12]]
    alone = [fresh.whole(number, source)[0] for number, source in enumerate(sources)]
    fresh.frames = []
    for batch in (1, 8, 2):
        for number, source in enumerate(sources):
            fresh.transcribe(number, source)
        fresh.until(WindowDone)
        first, told = fresh.heard[-1], fresh.frames
        fresh.send(SetBatch(batch=batch))
        fresh.frames = [first, *told]
        answer, windows, finished = None, dict[int, list[Window]](), 0
        calls: list[BatchDone] = []
        while finished < len(sources):
            message = fresh.until(BatchSet, BatchDone, WindowDone, Finished, JobFailed)
            assert not isinstance(message, JobFailed), message
            finished += isinstance(message, Finished)
            if isinstance(message, BatchSet):
                answer = message
            elif isinstance(message, BatchDone) and answer is not None:
                calls.append(message)
            elif isinstance(message, WindowDone):
                windows.setdefault(message.job, []).append(message.window)
        assert answer == BatchSet(batch=batch, slots=2 * batch)
        assert calls and {call.limit for call in calls} == {batch} and max(call.windows for call in calls) <= batch
        assert [windows[number] for number in range(len(sources))] == alone


# --- what is wrong with a file, or with the model ------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"Dear Maria,\n", bytes(70_000)], ids=["empty", "text", "zeros"])
def test_a_bad_file_is_answered_and_the_next_one_is_good(content: bytes, engine: Engine, studio: Studio, tmp_path: Path) -> None:
    """A failure with a code, a sentence and a hint; the engine goes on."""
    bad = tmp_path / "bad.wav"
    bad.write_bytes(content)
    engine.transcribe(11, bad)
    failure = engine.until(JobFailed, Finished).failure
    assert (failure.kind, failure.code) == ("permanent", "media_refused")
    assert failure.what and failure.hint
    assert engine.whole(12, studio.say(SENTENCES[0]))[0]


def test_caps_travel_with_the_model(studio: Studio) -> None:
    """A recording longer than allowed is refused by the engine, with the setting that allows more."""
    engine = Engine(load_request(duration_max_s=1.0))
    try:
        engine.transcribe(13, studio.say(SENTENCES[0]))
        failure = engine.until(JobFailed, Finished).failure
        assert "longer" in failure.what and "engine.duration_max_s" in failure.hint
    finally:
        engine.close()


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (MemoryError(), "transient", "out_of_memory"),
        (RuntimeError("CUDA failed with error out of memory"), "transient", "out_of_memory"),
        (ValueError("'xx' is not a valid language code (accepted language codes: af, am)"), "permanent", "language_unknown"),
        (OSError(5, "Input/output error"), "transient", "source_unreadable"),
        (MediaDamaged("cut off"), "permanent", "media_damaged"),
        (ModelAbsent("no model"), "transient", "model_absent"),
        (ZeroDivisionError("float division by zero"), "transient", "engine_error"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_an_exception_means(error: Exception, kind: str, code: str) -> None:
    """The file's own fault is permanent; memory and the unknown may pass; each has its code and a sentence."""
    failure = failure_of(error)
    assert (failure.kind, failure.code) == (kind, code)
    assert failure.what


@pytest.mark.parametrize("moment", ["touched", "cut short"])
def test_a_file_that_changes_while_it_is_read_has_no_result(moment: str, engine: Engine, long_talk: Path, tmp_path: Path) -> None:
    """Whether what was read looks whole or damaged: it is about no file that ever was, and is said so."""
    source = tmp_path / "talk.wav"
    source.write_bytes(long_talk.read_bytes())
    engine.transcribe(15, source)
    engine.until(WindowDone)
    if moment == "touched":
        os.utime(source, (1, 1))
    else:
        os.truncate(source, source.stat().st_size // 2)
    failure = engine.until(JobFailed, Finished).failure
    assert (failure.kind, failure.code) == ("transient", "changed_while_read")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "/nonexistent/model"}, "no model.bin"),
        ({"model": "small"}, "engine.offline is set"),
        ({"compute_type": "float16"}, "float16"),
        ({"device": "cuda"}, "GPU"),
    ],
    ids=["no directory", "not fetched", "precision", "device"],
)
def test_a_model_that_cannot_be_loaded(changes: dict[str, Any], words: str) -> None:
    """It is said in a sentence, as something that is waited for, and the process ends; no file is to blame."""
    engine = Engine(load_request(**changes))
    try:
        failure = engine.until(BootFailed, EngineReady).failure
        assert failure.kind == "waiting" and failure.code in ("model_absent", "model_unusable", "cuda_unusable")
        assert words in failure.what and failure.hint
        assert engine.ended() == "ended with status 3"
    finally:
        engine.close()


# --- the front end -------------------------------------------------------------------------------------------------------------


def test_streamed_voice_activity_equals_one_run(long_talk: Path) -> None:
    """The network fed in blocks of random size answers, bit for bit, what it answers to the whole recording at once."""
    from faster_whisper.vad import get_vad_model

    from whisperd.engine.speech import FRAME, Silero

    audio = np.frombuffer(samples_of(long_talk), dtype=np.int16).astype(np.float32) / 32768.0
    audio = audio[: len(audio) // FRAME * FRAME]
    at_once = np.asarray(get_vad_model()(audio.copy()), dtype=np.float32).reshape(-1)
    chance = random.Random(20261121)
    for _ in range(3):
        silero, parts, position = Silero(), [], 0
        while position < len(audio):
            length = FRAME * chance.choice([1, 2, 3, 7, 31, 62, 200])
            parts.append(silero.probabilities(audio[position : position + length]))
            position += length
        assert np.array_equal(np.concatenate(parts), at_once)
    assert at_once.max() > 0.9 and at_once.min() < 0.1


def two_channels(left: bytes, right: bytes) -> bytes:
    """Samples of both, side by side, the shorter filled up with silence."""
    sides = [np.frombuffer(side, dtype=np.int16) for side in (left, right)]
    both = np.zeros((max(map(len, sides)), 2), dtype=np.int16)
    for number, side in enumerate(sides):
        both[: len(side), number] = side
    return both.tobytes()


def test_each_channel_is_a_speaker(engine: Engine, studio: Studio, tmp_path: Path) -> None:
    """Two people on two channels, speaking at the same time: each has their own text, under their name, though mixed it would be noise."""
    said = SENTENCES[0], SENTENCES[5]
    source = write_wav(tmp_path / "call.wav", two_channels(*(samples_of(studio.say(text)) for text in said)), channels=2)
    options = JobOptions(model="demo", channels="speakers", speakers=("Anna",), temperatures=(0.0,))
    windows, finished = engine.whole(30, source, options=options)
    heard = {name: " ".join(s.text for w in windows for s in w.segments if s.speaker == name) for name in ("Anna", "Channel 2")}
    assert likeness(said[0], heard["Anna"]) > 0.8 and likeness(said[1], heard["Channel 2"]) > 0.8
    assert {window.channel for window in windows} == {0, 1} and finished.summary.channels == 2


def test_a_sequential_job_goes_on_after_any_window(engine: Engine, long_talk: Path) -> None:
    """In sequential mode a window depends on those before; from each checkpoint the rest is what an undisturbed run says."""
    options = JobOptions(model="demo", mode="sequential", language="en", word_timestamps=True)
    windows, finished = engine.whole(31, long_talk, options=options)
    places = engine.places
    assert len(windows) >= 2 and windows[0].seek == round(windows[1].start_s * 100)
    for kept in range(1, len(windows) + 1):
        begun = {"windows_done": kept, "position_s": windows[kept - 1].end_s, "front_end": places[kept - 1]}
        assert engine.whole(31 + kept, long_talk, options=options, **begun) == (
            windows[kept:],
            Finished(job=31 + kept, summary=finished.summary),
        )


def test_many_files_at_once(fresh: Engine, studio: Studio) -> None:
    """As many jobs as there are slots: each has the text it has alone, the batches are full, nothing is encoded twice."""
    sources = [studio.say(text) for text in SENTENCES[:8]]
    alone = [fresh.whole(number, source)[0] for number, source in enumerate(sources)]
    fresh.frames = []
    for number, source in enumerate(sources):
        fresh.transcribe(number, source)
    together: dict[int, list[Window]] = {number: [] for number in range(len(sources))}
    batches, finished = [], 0
    while finished < len(sources):
        message = fresh.until(WindowDone, Finished, BatchDone, JobFailed)
        assert not isinstance(message, JobFailed), message
        finished += isinstance(message, Finished)
        if isinstance(message, WindowDone):
            together[message.job].append(message.window)
        elif isinstance(message, BatchDone):
            batches.append(message)
    assert list(together.values()) == alone
    assert max(batch.windows for batch in batches) > 1
    assert sum(batch.encoded for batch in batches) == sum(batch.encoded_needed for batch in batches)


def test_the_model_is_given_back_and_loaded_again(fresh: Engine, studio: Studio) -> None:
    """Unload between two files: memory goes down, and the next file has the same text as before."""
    source = studio.say(SENTENCES[0])
    windows, _ = fresh.whole(40, source)
    fresh.send(Unload())
    assert fresh.until(Unloaded).rss_mib > 0
    assert fresh.whole(41, source)[0] == windows


FRONT_END = """
import os, sys
from whisperd.engine.audio import Caps, Recording
from whisperd.engine.speech import SpeechStream
recording = Recording(os.open(sys.argv[1], os.O_RDONLY), Caps(86400, 8, 192000))
speech = SpeechStream(threshold=0.5, min_silence_s=0.5, window_s=30.0)
windows = sum(1 for block in recording.blocks() for window in speech.feed(block[0])) + sum(1 for window in speech.end())
peak = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(windows, round(recording.duration_s), peak)
"""


def test_memory_does_not_grow_with_the_length(long_talk: Path, tmp_path: Path) -> None:
    """Sixty minutes need no more than 1.2 times the memory that ten minutes need: decoding, resampling, voice activity, windows."""
    speech = np.frombuffer(samples_of(long_talk), dtype=np.int16)[::2].tobytes()  # 8 kHz
    peaks = {}
    for minutes in (10, 60):
        path = tmp_path / f"{minutes}.wav"
        repeats = minutes * 60 * 16_000 // len(speech)
        write_wav(path, speech * repeats, rate=8_000)
        done = subprocess.run([sys.executable, "-c", FRONT_END, str(path)], capture_output=True, text=True, check=False)
        path.unlink()
        assert done.returncode == 0, done.stderr
        windows, seconds, peaks[minutes] = map(int, done.stdout.split())
        assert seconds == pytest.approx(minutes * 60, abs=60)
        assert windows >= minutes
    assert peaks[60] <= 1.2 * peaks[10], peaks
