"""engine process: load one model, then transcribe what is sent until told to stop.

The wire is standard input. One frame in (`Transcribe` with the source's descriptor), many out (`Progress`, `WindowDone`), then
`Finished`, `JobFailed` or `Abandoned`. Between segments the wire is looked at, so that a stop is obeyed at a window boundary.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime phones home otherwise; must stand before it is imported
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import resource
import sys
from collections import deque
from collections.abc import Iterable

from loguru import logger

from whisperd import __version__
from whisperd.engine import model
from whisperd.engine.audio import Caps, MediaDamaged, MediaRefused, Recording, sha256_of
from whisperd.engine.model import ModelAbsent, ModelUnusable
from whisperd.engine.speech import SpeechStream, WindowAudio
from whisperd.engine.transcript import Language, WindowDecoding
from whisperd.errors import WhisperdError
from whisperd.log import to_parent
from whisperd.vocabulary import Failure, FailureKind, Segment, Summary, Window
from whisperd.wire import (
    Abandon,
    Abandoned,
    BootFailed,
    Channel,
    EngineIn,
    EngineReady,
    Finished,
    Frame,
    JobFailed,
    LoadModel,
    Progress,
    Stop,
    Transcribe,
    WindowDone,
    WireClosed,
    join_daemon,
)

PROGRESS_EVERY_S = 10.0  # of audio


class Interrupted(Exception):
    """The job in hand is to be dropped at this boundary."""


class Engine:
    """The loop of one engine process."""

    def __init__(self, channel: Channel[EngineIn], request: LoadModel, frames: Iterable[Frame[EngineIn]] = ()) -> None:
        self._channel = channel
        self._loaded = model.load(request)
        self._caps = Caps(request.duration_max_s, request.channels_max, request.rate_max_hz)
        self._inbox: deque[Frame[EngineIn]] = deque(frames)
        self._stopping = False
        self._told_s = 0.0  # position of the job in hand that was told last

    def serve(self) -> None:
        loaded = self._loaded
        self._channel.send_all(
            EngineReady(model=loaded.name, device=loaded.device, compute_type=loaded.compute_type, slots=1, load_s=round(loaded.load_s, 3))
        )
        while not self._stopping:
            if not self._inbox:
                self._inbox.extend(self._channel.wait(None))
                continue
            frame = self._inbox.popleft()
            match frame.message:
                case Stop():
                    self._stopping = True
                case Transcribe() as job:
                    self._run(job, frame.descriptors[0])
                case _:  # Abandon for a job that is over already; LoadModel comes only once
                    pass

    def _run(self, job: Transcribe, descriptor: int) -> None:
        before = content_of(descriptor)
        answer: Finished | Abandoned | JobFailed
        try:
            answer = Finished(job=job.job, summary=self._transcribe(job, descriptor))
        except Interrupted:
            answer = Abandoned(job=job.job)
        except WireClosed:
            raise
        except Exception as error:  # noqa: BLE001 - the model and the codecs raise anything; the daemon decides what it means
            answer = JobFailed(job=job.job, failure=failure_of(error))
        if not isinstance(answer, Abandoned) and content_of(descriptor) != before:  # good or bad, it is about no file that ever was
            changed = SourceChanged("the file changed while it was read", hint="it will be taken again once it is settled")
            answer = JobFailed(job=job.job, failure=failure_of(changed))
        os.close(descriptor)
        self._channel.send_all(answer)

    def _transcribe(self, job: Transcribe, descriptor: int) -> Summary:
        options = job.options
        recording = Recording(descriptor, self._caps)
        speech = SpeechStream(threshold=options.vad_threshold, min_silence_s=options.vad_min_silence_s, window_s=options.window_s)
        language = Language(job.language, job.language_probability) if job.language else None
        windows = 0
        self._told_s = job.position_s
        try:
            for block in recording.blocks():
                for audio in speech.feed(block):
                    language = self._window(job, audio, language, recording.declared_s)
                    windows += 1
                self._progress(job, recording.duration_s, recording.declared_s, step_s=PROGRESS_EVERY_S)
            for audio in speech.end():
                language = self._window(job, audio, language, recording.declared_s)
                windows += 1
        finally:
            recording.close()
        return Summary(
            duration_s=round(recording.duration_s, 3),
            speech_s=round(speech.speech_s, 3),
            windows=windows,
            source_sha256=sha256_of(descriptor),
            container=recording.container_name,
            codec=recording.codec_name,
            model=self._loaded.name,
            model_revision=self._loaded.revision,
            device=self._loaded.device,
            compute_type=self._loaded.compute_type,
            engine_version=__version__,
        )

    def _window(self, job: Transcribe, audio: WindowAudio, language: Language | None, declared_s: float | None) -> Language | None:
        """Decode one window and report it; windows that the ledger has already are passed over."""
        if audio.number < job.windows_done:
            return language
        decoding = WindowDecoding(self._loaded.whisper, audio, job.options, language)
        segments: list[Segment] = []
        for segment in decoding:
            segments.append(segment)
            self._progress(job, segment.end_s, declared_s)
        window = Window(
            index=audio.number,
            start_s=round(audio.start_s, 3),
            end_s=round(audio.end_s, 3),
            language=decoding.language.code,
            language_probability=decoding.language.probability,
            segments=tuple(segments),
        )
        self._channel.send_all(WindowDone(job=job.job, window=window, duration_s=declared_s))
        self._obey(job.job)
        return decoding.language

    def _progress(self, job: Transcribe, position_s: float, declared_s: float | None, *, step_s: float = 0.0) -> None:
        """Tell how far the recording was read, if that is news, and see what the daemon wants."""
        if position_s > self._told_s + step_s:
            self._told_s = position_s
            self._channel.send_all(Progress(job=job.job, position_s=round(position_s, 3), duration_s=declared_s))
        self._obey(job.job)

    def _obey(self, job: int) -> None:
        """Look at the wire; raise Interrupted when this job is not wanted any more."""
        self._inbox.extend(self._channel.wait(0))
        waiting = [frame.message for frame in self._inbox]
        self._stopping = self._stopping or Stop() in waiting
        if self._stopping or Abandon(job=job) in waiting:
            raise Interrupted


class SourceChanged(WhisperdError):
    """What was read is not one file: its size or time moved meanwhile."""

    code = "changed_while_read"
    recoverable = True


def content_of(descriptor: int) -> tuple[int, int]:
    """What tells one content of a file from another."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def failure_of(error: Exception) -> Failure:
    """What an exception means for the job. Ours carry their own code; memory and the unknown may pass."""
    match error:
        case MediaDamaged() | MediaRefused():
            return Failure(kind=FailureKind.PERMANENT, code=error.code, what=error.what, hint=error.hint)
        case WhisperdError():
            return Failure(kind=FailureKind.TRANSIENT, code=error.code, what=error.what, hint=error.hint)
        case MemoryError() | RuntimeError() if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
            return _out_of_memory(str(error) or "the engine ran out of memory")
        case OSError(strerror=why):
            return Failure(
                kind=FailureKind.TRANSIENT,
                code="source_unreadable",
                what=f"the file cannot be read: {why or type(error).__name__}",
                hint="is the share or the disk that holds it all right? See the kernel log",
            )
        case ValueError() if "language" in str(error).lower():
            return Failure(kind=FailureKind.PERMANENT, code="language_unknown", what=str(error), hint="correct the language setting")
        case _:
            logger.opt(exception=error).error("unexpected error in the engine")
            return Failure(kind=FailureKind.TRANSIENT, code="engine_error", what=f"unexpected {type(error).__name__}: {error}")


def _out_of_memory(what: str) -> Failure:
    return Failure(
        kind=FailureKind.TRANSIENT, code="out_of_memory", what=what, hint="use fewer workers, a lighter compute type or a smaller model"
    )


def limit_resources() -> None:
    """No core dumps of other people's recordings; a bounded number of open files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


def main() -> int:
    to_parent()
    limit_resources()
    channel: Channel[EngineIn] = join_daemon(EngineIn)
    try:
        frames = first_frames(channel)
        if frames is None:
            return 0
        try:
            engine = Engine(channel, *frames)
        except (ModelAbsent, ModelUnusable) as error:
            channel.send_all(BootFailed(failure=Failure(kind=FailureKind.WAITING, code=error.code, what=error.what, hint=error.hint)))
            return 3
        engine.serve()
    except WireClosed:  # the daemon is gone, and so is our work
        return 0
    return 0


def first_frames(channel: Channel[EngineIn]) -> tuple[LoadModel, list[Frame[EngineIn]]] | None:
    """What to load, and what came together with that; None when told to stop."""
    while True:
        frames = channel.wait(None)
        if any(isinstance(frame.message, Stop) for frame in frames):
            return None
        for number, frame in enumerate(frames):
            if isinstance(frame.message, LoadModel):
                return frame.message, frames[number + 1 :]


if __name__ == "__main__":
    sys.exit(main())
