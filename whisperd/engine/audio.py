"""audio: a recording as a stream of 16 kHz blocks, from an open descriptor.

Owns: which track of a container is decoded, and that all of it is: with silence where its own times leave a hole. Memory does not grow with
the length. Fails with `MediaRefused` (caps, no audio, not media) and `MediaDamaged` (truncated, corrupt): both are the file's own
fault. What only may be a fault is in `Recording.doubts`.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from av.audio.fifo import AudioFifo
from av.audio.resampler import AudioResampler
from av.error import FFmpegError
from av.stream import Discard, Disposition

from whisperd.engine import choice, container, media
from whisperd.engine.choice import Track
from whisperd.engine.media import Caps, MediaDamaged, MediaRefused, Source
from whisperd.engine.timeline import Timeline
from whisperd.engine.whole import Reach, gap_of, loss_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RATE_HZ", "Caps", "MediaDamaged", "MediaRefused", "Recording", "Source", "sha256_of"]

RATE_HZ = 16_000
BLOCK_SAMPLES = RATE_HZ * 2
CHANNELS_SPLIT = range(2, 9)  # as many voices as a recording may keep apart
SAME_CHANNEL = 1e-3  # largest difference between two channels that are one
LISTEN_S = 10.0  # at each of LISTEN_PLACES of a recording, to learn which track somebody speaks on
LISTEN_PLACES = 6
LISTEN_PACKETS_MAX = 20_000

Listen = Callable[["NDArray[np.float32]"], float]
"""How many seconds of 16 kHz samples are speech."""


class Recording:
    """One open recording. `blocks()` streams it once; afterwards `duration_s` is the decoded length and `doubts` what may be wrong.

    track: "auto", or the number of an audio track from 1. Among several, "auto" takes those tagged with `language` if there are any, and
    of these the one with most speech, by `listen`. With `split_channels`, a track of 2 to 8 channels keeps them apart.
    """

    def __init__(
        self,
        descriptor: int,
        caps: Caps,
        *,
        track: str = "auto",
        language: str = "auto",
        split_channels: bool = False,
        listen: Listen | None = None,
    ) -> None:
        media.check_file(descriptor)
        self._caps = caps
        self._file = Source(descriptor)
        self._container = media.open_media(self._file)
        self.track = self._choose_track(track, language, listen).number
        self._stream = media.audio_of(self._container)[self.track - 1]
        context = self._stream.codec_context
        self.tracks = len(media.audio_of(self._container))
        self.channels: int = context.channels if split_channels and context.channels in CHANNELS_SPLIT else 1
        self.container_name = str(self._container.format.name)
        self.codec_name = str(context.name)
        self.declared_s = media.declared_s(self._container, self._stream)
        self.start_offset_s = media.late_s(self._container, self._stream)
        self.decoded_samples = 0
        self.doubts: tuple[str, ...] = ()
        self._promised = media.promise_of(descriptor, self._container, self._stream)
        self._reach = Reach()
        self._timeline = Timeline(media.begin_s(self._stream), media.hole_max_s(self._container, self._stream, caps))
        media.check_caps(self._stream, self._promised, caps)

    @property
    def duration_s(self) -> float:
        return self.decoded_samples / RATE_HZ

    @property
    def heard_s(self) -> float:
        """What was really there, without the silence put into holes."""
        return self.duration_s - self._timeline.filled_s

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Blocks of float32 samples in -1..1, 16 kHz, [channels, n], about 2 s each. Raises MediaDamaged, MediaRefused."""
        pending: list[NDArray[np.int16]] = []
        held = 0
        for piece in self._pieces():
            pending.append(piece)
            held += piece.shape[1]
            if held >= BLOCK_SAMPLES:
                yield self._block(pending)
                pending, held = [], 0
        if pending:
            yield self._block(pending)
        self._check_whole()
        self.doubts = tuple(self._doubts())

    def close(self) -> None:
        with contextlib.suppress(FFmpegError):
            self._container.close()
        self._file.close()

    def _choose_track(self, wanted: str, language: str, listen: Listen | None) -> Track:
        found = [track_of(number, stream) for number, stream in enumerate(media.audio_of(self._container), 1)]
        try:
            meant = choice.candidates(found, wanted, language)
        except LookupError:
            raise MediaRefused(
                f"the recording has no audio track {wanted} (it has {len(found)})", hint='choose another track, or "auto"'
            ) from None
        if len(meant) == 1 or listen is None:
            return choice.choose(meant, [0.0] * len(meant))
        streams = media.audio_of(self._container)
        spoken_s = spoken(self._container, [streams[track.number - 1] for track in meant], listen)
        self._container.close()
        self._container = media.open_media(self._file)  # not every container can be sought back to its very beginning
        return choice.choose(meant, spoken_s)

    # --- streaming ---

    def _pieces(self) -> Iterator[NDArray[np.int16]]:
        """16 kHz samples [channels, n] without a hole, at most about a second each."""
        resampled = Resampled("mono" if self.channels == 1 else self._stream.codec_context.layout)
        for frame in self._frames():
            hole_s = self._timeline.hole_before(frame.time, frame.samples / frame.sample_rate)
            if hole_s:
                yield from resampled.end()
                yield from silence(self.channels, round(hole_s * RATE_HZ))
            yield from resampled.feed(frame)
        yield from resampled.end()

    def _frames(self) -> Iterator[Any]:
        """Decoded frames of the track. Where the container's end is not the track's own, all streams are demuxed to know it."""
        if self._promised is not None and self._promised.of_track:
            for stream in self._container.streams:
                if stream.index != self._stream.index:
                    stream.discard = Discard.all
        wanted, reach = self._stream.index, self._reach
        try:
            for packet in self._demuxed():
                if packet.stream_index == wanted:
                    yield from self._decode(packet)
                else:
                    reach.note(packet)
        except FFmpegError as error:
            raise MediaDamaged(
                f"the recording cannot be read past {self.duration_s:.1f} s ({media.reason_of(error)})", hint="copy the recording again"
            ) from error

    def _demuxed(self) -> Iterator[Any]:
        try:
            yield from self._container.demux()
        except IndexError:  # PyAV cannot flush a stream that appeared midway; ours was there before, and is flushed already
            return

    def _decode(self, packet: Any) -> Sequence[Any]:
        try:
            frames: Sequence[Any] = packet.decode()
        except FFmpegError:  # one bad packet is a click in the sound, not the end of it; too many are judged in `_check_whole`
            self._reach.note_bad(packet)
            return ()
        self._reach.note_good(packet)
        return frames

    def _block(self, pieces: list[NDArray[np.int16]]) -> NDArray[np.float32]:
        samples = _floats(pieces)
        self.decoded_samples += samples.shape[1]
        if self.duration_s > self._caps.duration_max_s:
            raise media.too_long(self.duration_s, self._caps)
        return heard_once(samples)

    # --- the end ---

    def _check_whole(self) -> None:
        """Silent loss is damage: a container that promises more than it holds, a codec that could not read its own packets."""
        if self._reach.unreadable:
            raise MediaDamaged(f"{self._reach.told_bad} cannot be decoded", hint="copy the recording again")
        if self.decoded_samples == 0:
            raise MediaRefused("the file has an audio track, but no sound in it (0.0 s)", hint="check the recording")
        loss = loss_of(self._promised, self._reach, self.heard_s)
        if loss:
            raise MediaDamaged(loss, hint="the copy was probably interrupted; copy the recording again")

    def _doubts(self) -> Iterator[str]:
        if self._reach.bad:
            yield f"{self._reach.told_bad} cannot be decoded"
        gap = gap_of(self._promised, self.heard_s)
        if gap:
            yield gap
        last = self._reach.last
        doubt = container.doubt_about_end(self._file.fileno(), self.container_name, b"" if last is None else bytes(last))
        if doubt:
            yield doubt


class Resampled:
    """Decoded frames in, 16 kHz samples out, int16 [channels, n], the very ones that faster-whisper's own decoder gives.

    layout: what the channels are: "mono" mixes them. Rate and channels may change midway: joined files and broadcasts do that.
    """

    def __init__(self, layout: Any) -> None:
        self._layout = layout
        self._shape: tuple[str, int, int] | None = None
        self._resampler: AudioResampler | None = None
        self._waiting = AudioFifo()  # a second of frames is resampled at a time: one by one they cost more than their samples

    def feed(self, frame: Any) -> list[NDArray[np.int16]]:
        """Samples that this frame completed. Raises MediaDamaged."""
        rate: int = frame.sample_rate
        shape = (frame.format.name, frame.layout.nb_channels, rate)
        done = self.end() if shape != self._shape else []
        if self._resampler is None:
            self._shape = shape
            self._resampler = AudioResampler(format="s16", layout=self._layout, rate=RATE_HZ)
            self._waiting = AudioFifo()
        frame.pts = None  # the queue would complain about gaps
        try:
            self._waiting.write(frame)
        except ValueError as error:
            raise unconvertible(error) from error
        while self._waiting.samples >= rate:
            done += self._resample(self._resampler, self._waiting.read(rate))
        return done

    def end(self) -> list[NDArray[np.int16]]:
        """What is still held back. Raises MediaDamaged."""
        resampler, self._resampler = self._resampler, None
        if resampler is None:
            return []
        rest = self._waiting.read()
        return (self._resample(resampler, rest) if rest is not None else []) + self._resample(resampler, None)

    def _resample(self, resampler: AudioResampler, frame: Any) -> list[NDArray[np.int16]]:
        try:
            return [_channels(piece) for piece in resampler.resample(frame)]
        except (FFmpegError, ValueError) as error:
            raise unconvertible(error) from error


def unconvertible(error: Exception) -> MediaDamaged:
    return MediaDamaged(f"the sound cannot be converted ({media.reason_of(error)})", hint="convert it to WAV, FLAC or MP3")


def _channels(frame: Any) -> NDArray[np.int16]:
    """The samples of an interleaved frame, [channels, n]. (PyAV crashes on frames of 8 channels that lie one behind the other.)"""
    samples: NDArray[np.int16] = frame.to_ndarray()
    return samples.reshape(-1, frame.layout.nb_channels).T


def silence(channels: int, samples: int) -> Iterator[NDArray[np.int16]]:
    """So many samples of silence, a second at a time."""
    for begin in range(0, samples, RATE_HZ):
        yield np.zeros((channels, min(RATE_HZ, samples - begin)), np.int16)


def heard_once(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """The channels [c, n], silence in those that repeat an earlier one: "stereo" is often one voice twice. Overwrites them."""
    repeats = [
        number
        for number in range(1, len(samples))
        if any(np.abs(samples[number] - samples[earlier]).max(initial=0.0) < SAME_CHANNEL for earlier in range(number))
    ]
    samples[repeats] = 0.0
    return samples


# --- which track ---------------------------------------------------------------------------------------------------------------


def track_of(number: int, stream: Any) -> Track:
    return Track(number, stream.language or "", bool(stream.disposition & Disposition.default))


def spoken(film: Any, streams: Sequence[Any], listen: Listen) -> list[float]:
    """Seconds of speech on each of these tracks of a container, in a minute of it, whatever its length."""
    length_s = float(film.duration or 0) / 1_000_000
    all_s = LISTEN_PLACES * LISTEN_S
    places = [(place + 0.5) / LISTEN_PLACES * length_s - LISTEN_S / 2 for place in range(LISTEN_PLACES)] if length_s > all_s else []
    excerpts = [excerpt(film, streams, place_s, LISTEN_S) for place_s in places]
    if not any(len(samples) for found in excerpts for samples in found):  # short, of unknown length, or it cannot be sought
        excerpts = [excerpt(film, streams, 0.0, all_s)]
    return [sum(map(listen, samples)) for samples in zip(*excerpts, strict=True)]


def excerpt(film: Any, streams: Sequence[Any], begin_s: float, length_s: float) -> list[NDArray[np.float32]]:
    """What can be read of these tracks from this place on, at most so much of each."""
    sound: dict[int, list[NDArray[np.int16]]] = {stream.index: [] for stream in streams}
    resampled = {stream.index: Resampled("mono") for stream in streams}
    end_s = begin_s + length_s + float(film.start_time or 0) / 1_000_000
    try:
        film.seek(round(begin_s * 1_000_000) + (film.start_time or 0))
        for count, packet in enumerate(film.demux(streams)):
            if count > LISTEN_PACKETS_MAX or (packet.pts is not None and packet.pts * packet.time_base > end_s):
                break
            with contextlib.suppress(FFmpegError):
                for frame in packet.decode():
                    sound[packet.stream_index] += resampled[packet.stream_index].feed(frame)
        for index, rest in resampled.items():
            sound[index] += rest.end()
    except (FFmpegError, MediaDamaged, IndexError):  # what was heard until here must do; reading it all will say what is wrong
        pass
    limit = round(length_s * RATE_HZ)
    return [_floats(sound[stream.index])[0, :limit] if sound[stream.index] else np.zeros(0, np.float32) for stream in streams]


def _floats(pieces: list[NDArray[np.int16]]) -> NDArray[np.float32]:
    """The pieces one after the other, [channels, n], in -1..1."""
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
    return np.asarray(np.multiply(joined, np.float32(1 / 32768), dtype=np.float32, order="C"))


# --- the file ------------------------------------------------------------------------------------------------------------------


def sha256_of(descriptor: int) -> str:
    """SHA-256 of the whole file, read by position so that nobody's offset moves."""
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(descriptor, 1 << 20, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
