"""frontend: recordings become windows, in a thread of their own, while the model works on others.

Owns: `Feed`, one job's way from descriptor to windows as a generator that gives up its turn after every block; and `FrontEnd`, the
thread that keeps a few windows of every job ready. Decoding, Silero and log-mel release the GIL. Memory: `AHEAD` windows a job.
Fails, for one job at a time, with what audio.py raises; SourceChanged when the file moved under its reader.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Collection, Generator, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from whisperd.engine.audio import Caps, Recording, sha256_of
from whisperd.engine.mel import LogMel, MelStream, normalised
from whisperd.engine.speech import SpeechStream, WindowAudio
from whisperd.engine.tracks import open_recording
from whisperd.engine.transcript import FRAME_S, RESET_ABOVE
from whisperd.engine.work import FRAMES, WindowWork
from whisperd.errors import WhisperdError
from whisperd.vocabulary import JobOptions

if TYPE_CHECKING:
    from numpy.typing import NDArray

AHEAD = 4  # windows of one job that are ready and not taken
TURN_BLOCKS = 16  # blocks (2 s each) after which another job without windows has its turn


class SourceChanged(WhisperdError):
    """What was read is not one file: its size or time moved meanwhile."""

    code = "changed_while_read"
    recoverable = True


class Heard(NamedTuple):
    """What the front end knows of a recording after its last block."""

    duration_s: float
    speech_s: float
    windows: int
    sha256: str
    container: str
    codec: str
    track: int
    tracks: int
    channels: int
    doubts: tuple[str, ...]
    start_offset_s: float


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where a front end was, from which it finds the next windows again (kept with a checkpoint)."""

    number: int  # windows that came before
    streams: tuple[bytes, ...] = ()  # of each channel, at a boundary of blocks
    seek: int = 0  # sequential mode: the next pass, in frames
    previous: tuple[int, ...] = ()  # sequential mode: the text before it
    prompted: bool = True
    last_speech_s: float = 0.0


class Feed:
    """One job in the front end. `windows()` yields a window, or None where another job may have its turn."""

    def __init__(
        self, job: int, descriptor: int, options: JobOptions, caps: Caps, log_mel: LogMel, *, place: Place | None, votes: int
    ) -> None:
        self.job = job
        self.options = options
        self.ready: deque[WindowWork] = deque()
        self.reached_s = 0.0
        self.declared_s: float | None = None
        self.over = False
        self.heard: Heard | None = None
        self.error: Exception | None = None
        self.voted = False  # as many windows as the choice of the language may wait for are there
        self.resting = False  # in sequential mode: until the pass under way is written
        self._votes = votes
        self._descriptor = descriptor
        self._caps = caps
        self._log_mel = log_mel
        self._place = place or Place(number=0)
        self._written: Place | None = None
        self._content = content_of(descriptor)
        self._steps = self._sequential() if options.mode == "sequential" else self._batched()

    def step(self) -> bool:
        """One block further; whether that made news. Never raises: how it ended is in `heard` or `error`, once `over`."""
        voted = self.voted
        try:
            work = next(self._steps)
            if work is not None:
                self.ready.append(work)
            return work is not None or self.voted != voted
        except StopIteration:
            pass
        except Exception as error:  # noqa: BLE001 - codecs raise anything; the engine says what it means
            self.heard, self.error = None, error
        self.over = True
        return True

    def written(self, work: WindowWork) -> None:
        """Sequential mode: the text of a pass is there, so the next one can be prepared."""
        chosen, options = work.chosen, self.options
        reset = not options.previous_text or work.attempts[-1].way.temperature > RESET_ABOVE
        self._written = msgspec.structs.replace(
            self._place,
            number=work.number + 1,
            seek=self._place.seek + chosen.seek,
            previous=() if reset else (work.previous + tuple(chosen.tokens))[-448:],
            prompted=work.prompted and not reset,
            last_speech_s=work.start_s + chosen.last_speech_s,
        )
        work.state = encode_place(self._written)
        self.resting = False

    def close(self) -> None:
        self._steps.close()
        os.close(self._descriptor)

    def changed(self) -> SourceChanged | None:
        """Good or bad, what was read of a file that changed meanwhile is about no file that ever was."""
        if content_of(self._descriptor) == self._content:
            return None
        return SourceChanged("the file changed while it was read", hint="it will be taken again once it is settled")

    def _open(self, *, split: bool = False) -> Recording:
        recording = open_recording(
            self._descriptor,
            self._caps,
            track=self.options.audio_track,
            language=self.options.language,
            split_channels=split,
        )
        self.declared_s = recording.declared_s
        return recording

    # --- batched: windows of speech ---

    def _batched(self) -> Generator[WindowWork | None, None, None]:
        recording = self._open(split=self.options.channels == "speakers")
        try:
            streams = self._streams(recording.channels)
            number = self._place.number
            for block in recording.blocks():
                place = Place(number=number, streams=tuple(stream.state() for stream in streams))
                for channel, stream in enumerate(streams):
                    for audio in stream.feed(block[channel]):
                        yield self._window(audio, number, channel, place)
                        number += 1
                self.reached_s = recording.duration_s
                yield None
            place = Place(number=number, streams=tuple(stream.state() for stream in streams))
            for channel, stream in enumerate(streams):
                for audio in stream.end():
                    yield self._window(audio, number, channel, place)
                    number += 1
            self.heard = self._summary(recording, sum(stream.speech_s for stream in streams), number)
        finally:
            recording.close()

    def _streams(self, channels: int) -> list[SpeechStream]:
        options = self.options
        kwargs = {"threshold": options.vad_threshold, "min_silence_s": options.vad_min_silence_s, "window_s": options.window_s}
        states = self._place.streams
        if len(states) == channels:
            return [SpeechStream.resumed(state, **kwargs) for state in states]
        return [SpeechStream(**kwargs) for _ in range(channels)]

    def _window(self, audio: WindowAudio, number: int, channel: int, place: Place) -> WindowWork:
        return WindowWork(
            job=self.job,
            number=number,
            options=self.options,
            start_s=audio.start_s,
            end_s=audio.end_s,
            features=self._log_mel(audio.samples)[:, :-1],
            stretches_s=audio.stretches_s,
            channel=channel,
            state=encode_place(place),
        )

    def _summary(self, recording: Recording, speech_s: float, windows: int) -> Heard:
        return Heard(
            duration_s=round(recording.duration_s, 3),
            speech_s=round(speech_s, 3),
            windows=windows,
            sha256=sha256_of(self._descriptor),
            container=recording.container_name,
            codec=recording.codec_name,
            track=recording.track,
            tracks=recording.tracks,
            channels=recording.channels,
            doubts=recording.doubts,
            start_offset_s=recording.start_offset_s,
        )

    # --- sequential: one pass after the other over the whole recording, as faster-whisper goes ---

    def _sequential(self) -> Generator[WindowWork | None, None, None]:
        """Twice over the recording: features are normalised by the loudest moment of all of it, which must be known first."""
        survey = _Survey()
        yield from self._survey(survey)
        recording = self._open()
        try:
            frames = _Frames(recording, MelStream(self._log_mel), survey)
            while self._place.seek < survey.content:
                yield from self._voters(frames) if self._votes and not self.voted else self._next(frames)
                self.reached_s = self._place.seek * FRAME_S
                self._place = self._written or self._place
                frames.drop(self._place.seek)
        finally:
            recording.close()
        self.heard = survey.heard._replace(windows=self._place.number) if survey.heard else None

    def _survey(self, survey: _Survey) -> Iterator[None]:
        recording, mel = self._open(), MelStream(self._log_mel)
        options = self.options
        speech = SpeechStream(threshold=options.vad_threshold, min_silence_s=options.vad_min_silence_s, window_s=options.window_s)
        try:
            for block in recording.blocks():
                survey.take(mel.feed(block[0]), speech.feed(block[0]))
                yield None
            survey.take(mel.end(), speech.end())
            survey.heard = self._summary(recording, speech.speech_s, 0)
        finally:
            recording.close()

    def _next(self, frames: _Frames) -> Iterator[WindowWork | None]:
        """The next pass; the one after it has to wait for its text."""
        yield from frames.until(self._place.seek + FRAMES)
        self.resting = True
        yield self._pass(frames, self._place.seek)

    def _voters(self, frames: _Frames) -> Iterator[WindowWork | None]:
        """The first pass, and later ones that are only heard for their language."""
        seeks = range(0, min(self._votes * FRAMES, frames.survey.content), FRAMES)
        for seek in seeks:
            yield from frames.until(seek + FRAMES)
            work = self._pass(frames, seek)
            work.only_vote = seek > 0
            self.voted = self.resting = seek == seeks[-1]
            yield work

    def _pass(self, frames: _Frames, seek: int) -> WindowWork:
        place = self._place
        end = min(seek + FRAMES, frames.survey.content)
        return WindowWork(
            job=self.job,
            number=place.number,
            options=self.options,
            start_s=seek * FRAME_S,
            end_s=end * FRAME_S,
            features=frames.between(seek, end),
            stretches_s=tuple(
                (max(start_s, seek * FRAME_S), min(end_s, end * FRAME_S))
                for start_s, end_s in frames.survey.stretches_s
                if end_s > seek * FRAME_S and start_s < end * FRAME_S
            ),
            previous=place.previous,
            prompted=place.prompted,
            last_speech_s=place.last_speech_s - seek * FRAME_S,
        )


class _Survey:
    """What the first walk over a recording finds: the loudest moment, the number of frames, where somebody speaks."""

    def __init__(self) -> None:
        self.peak = -np.inf
        self.n_mels = 0
        self.content = -1  # faster-whisper leaves the last frame out
        self.stretches_s: list[tuple[float, float]] = []
        self.heard: Heard | None = None

    def take(self, frames: NDArray[np.float32], windows: Iterator[WindowAudio]) -> None:
        self.n_mels = frames.shape[0]
        if frames.size:
            self.peak = max(self.peak, float(frames.max()))
        self.content += frames.shape[1]
        for audio in windows:
            self.stretches_s += audio.stretches_s


class _Frames:
    """Log-mel frames of a recording, read as far as needed and dropped behind."""

    def __init__(self, recording: Recording, mel: MelStream, survey: _Survey) -> None:
        self.survey = survey
        self._blocks = recording.blocks()
        self._mel = mel
        self._held = np.zeros((survey.n_mels, 0), dtype=np.float32)
        self._base = 0
        self._ended = False

    def until(self, end: int) -> Iterator[None]:
        """Read until the frames before `end` are there, or all there are."""
        while not self._ended and self._base + self._held.shape[1] < end:
            block = next(self._blocks, None)
            self._ended = block is None
            frames = self._mel.end() if block is None else self._mel.feed(block[0])
            self._held = np.concatenate([self._held, normalised(frames, self.survey.peak)], axis=1)
            yield None

    def between(self, start: int, end: int) -> NDArray[np.float32]:
        return self._held[:, start - self._base : end - self._base].copy()

    def drop(self, before: int) -> None:
        before = min(before, self._base + self._held.shape[1])
        self._held = self._held[:, before - self._base :].copy()
        self._base = before


class FrontEnd:
    """The preparing thread and its feeds. `fileno()` is readable when there is news."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._feeds: dict[int, Feed] = {}  # in order of arrival
        self._served: dict[int, int] = {}
        self._turns: dict[int, int] = {}
        self._stepping: Feed | None = None
        self._count = 0
        self._stopping = False
        self._news = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._work, name="front-end", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._news

    def add(self, feed: Feed) -> None:
        with self._changed:
            self._feeds[feed.job] = feed
            self._changed.notify()

    def drop(self, job: int) -> None:
        """This job is not wanted any more; its descriptor is closed."""
        with self._changed:
            feed = self._feeds.pop(job, None)
            self._served.pop(job, None)
            self._turns.pop(job, None)
            if feed is not None and feed is not self._stepping:
                feed.close()

    def written(self, work: WindowWork) -> None:
        """A pass of a sequential job has its text."""
        with self._changed:
            if work.job in self._feeds:
                self._feeds[work.job].written(work)
                self._changed.notify()

    def next(self, barred: Collection[int]) -> WindowWork | None:
        """The window to work on next, not taken yet: of the job served longest ago, and of new jobs the first come."""
        with self._changed:
            feed = self._next(barred)
            return feed.ready[0] if feed else None

    def take(self, barred: Collection[int]) -> WindowWork | None:
        """Take that window."""
        with self._changed:
            feed = self._next(barred)
            if feed is None:
                return None
            self._count += 1
            self._served[feed.job] = self._count
            self._changed.notify()
            return feed.ready.popleft()

    def look(self) -> list[Feed]:
        """All feeds, to see how far they are. Clears the news."""
        try:
            os.eventfd_read(self._news)
        except BlockingIOError:
            pass
        with self._changed:
            return list(self._feeds.values())

    @property
    def busy(self) -> bool:
        """Whether more windows are being prepared."""
        with self._changed:
            return self._hungriest() is not None

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout=1.0)  # a read from a dead share does not come back; the process ends all the same

    def _next(self, barred: Collection[int]) -> Feed | None:
        waiting = [feed for feed in self._feeds.values() if feed.ready and feed.job not in barred]
        return min(waiting, key=lambda feed: self._served.get(feed.job, 0), default=None)

    def _hungriest(self) -> Feed | None:
        hungry = [feed for feed in self._feeds.values() if not feed.over and not feed.resting and len(feed.ready) < AHEAD]
        return min(hungry, key=lambda feed: (len(feed.ready), self._turns.get(feed.job, 0) // TURN_BLOCKS), default=None)

    def _work(self) -> None:
        while (feed := self._choose()) is not None:
            news = feed.step()
            with self._changed:
                self._stepping = None
                if self._feeds.get(feed.job) is not feed:
                    feed.close()
                else:
                    turns = self._turns[feed.job] = self._turns.get(feed.job, 0) + 1
                    news = news or turns % TURN_BLOCKS == 0
            if news:
                os.eventfd_write(self._news, 1)

    def _choose(self) -> Feed | None:
        with self._changed:
            while not self._stopping:
                self._stepping = self._hungriest()
                if self._stepping is not None:
                    return self._stepping
                self._changed.wait()
            return None


def content_of(descriptor: int) -> tuple[int, int]:
    """What tells one content of a file from another."""
    found = os.fstat(descriptor)
    return found.st_size, found.st_mtime_ns


def encode_place(place: Place) -> bytes:
    return msgspec.msgpack.encode(place)


def decode_place(state: bytes) -> Place:
    """Raises msgspec.DecodeError."""
    return msgspec.msgpack.decode(state, type=Place)
