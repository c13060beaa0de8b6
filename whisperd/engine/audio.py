"""audio: a recording as a stream of 16 kHz blocks, from an open descriptor.

Owns: what media may be: which containers are read at all, which track of them, how long, how many channels. Memory does not grow with
the length. Fails with `MediaRefused` (caps, no audio, not media) and `MediaDamaged` (truncated, corrupt): both are the file's own
fault. What only may be a fault is in `Recording.doubts`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.audio.fifo import AudioFifo
from av.audio.resampler import AudioResampler
from av.error import FFmpegError
from av.stream import Discard, Disposition

from whisperd.engine import choice, container
from whisperd.engine.choice import Track
from whisperd.engine.whole import Promised, Reach, gap_of, loss_of, promise
from whisperd.errors import WhisperdError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE_HZ = 16_000
BLOCK_SAMPLES = RATE_HZ * 2
CHANNELS_SPLIT = range(2, 9)  # as many voices as a recording may keep apart
SAME_CHANNEL = 1e-3  # largest difference between two channels that are one
LISTEN_S = 10.0  # at each of LISTEN_PLACES of a recording, to learn which track somebody speaks on
LISTEN_PLACES = 6
LISTEN_PACKETS_MAX = 20_000

DEMUXERS = (
    "wav,w64,aiff,caf,au,voc,mp3,aac,flac,ogg,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,asf,avi,flv,mpeg,mpegts,amr,amrnb,amrwb,"
    "ac3,eac3,ape,wv,tta,mpc,mpc8,gsm,dsf,nistsphere"
)
"""Containers that hold recordings. Playlists, network and scripting demuxers (hls, concat, sdp, image2 …) are not among them."""

Listen = Callable[["NDArray[np.float32]"], float]
"""How many seconds of 16 kHz samples are speech."""


class MediaRefused(WhisperdError):
    """The file is whole, but there is nothing to transcribe in it, or more than we allow."""

    code = "media_refused"


class MediaDamaged(WhisperdError):
    """Part of the recording is missing or unreadable: a short transcript of it must not be called good."""

    code = "media_damaged"


class Caps(NamedTuple):
    """What a recording may ask of us."""

    duration_max_s: float
    channels_max: int
    rate_max_hz: int


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
        if os.fstat(descriptor).st_size == 0:
            raise MediaRefused("the file is empty (0 bytes)", hint="copy the recording again")
        self._caps = caps
        self._file = Source(descriptor, "rb", closefd=False)
        check_promised_size(descriptor)
        self._container = self._open()
        self.track = self._choose_track(track, language, listen).number
        self._stream = self._audio()[self.track - 1]
        context = self._stream.codec_context
        self.tracks = len(self._audio())
        self.channels: int = context.channels if split_channels and context.channels in CHANNELS_SPLIT else 1
        self.container_name = str(self._container.format.name)
        self.codec_name = str(context.name)
        self.declared_s = self._declared_s()
        self.decoded_samples = 0
        self.doubts: tuple[str, ...] = ()
        self._promised = self._promise()
        self._reach = Reach()
        self._check_caps()

    @property
    def duration_s(self) -> float:
        return self.decoded_samples / RATE_HZ

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Blocks of float32 samples in -1..1, 16 kHz, [channels, n], about 2 s each. Raises MediaDamaged, MediaRefused."""
        resampled = Resampled("mono" if self.channels == 1 else self._stream.codec_context.layout)
        pending: list[NDArray[np.int16]] = []
        held = 0
        for frame in self._frames():
            pieces = resampled.feed(frame)
            if not pieces:
                continue
            pending += pieces
            held += sum(piece.shape[1] for piece in pieces)
            if held >= BLOCK_SAMPLES:
                yield self._block(pending)
                pending, held = [], 0
        pending += resampled.end()
        if pending:
            yield self._block(pending)
        self._check_whole()
        self.doubts = tuple(self._doubts())

    def close(self) -> None:
        with contextlib.suppress(FFmpegError):
            self._container.close()
        self._file.close()

    # --- opening ---

    def _open(self) -> Any:
        self._file.seek(0)
        try:
            return av.open(
                self._file,
                mode="r",
                metadata_errors="ignore",
                options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
            )
        except (FFmpegError, ValueError) as error:
            what = container.looks_like(os.pread(self._file.fileno(), 512, 0))
            raise MediaRefused(
                f"the file is not audio or video that can be read ({what or _reason(error)})",
                hint="open it in a media player; if it plays there, convert it to WAV, FLAC or MP3 and drop it again",
            ) from error

    def _audio(self) -> list[Any]:
        return [stream for stream in self._container.streams.audio if stream.codec_context is not None]

    def _choose_track(self, wanted: str, language: str, listen: Listen | None) -> Track:
        found = [track_of(number, stream) for number, stream in enumerate(self._audio(), 1)]
        if not found:
            kinds = sorted({stream.type for stream in self._container.streams}) or ["nothing"]
            raise MediaRefused(
                f"there is no sound in the file (it holds {', '.join(kinds)})", hint="check that the recording has an audio track"
            )
        try:
            meant = choice.candidates(found, wanted, language)
        except LookupError:
            raise MediaRefused(
                f"the recording has no audio track {wanted} (it has {len(found)})", hint='choose another track, or "auto"'
            ) from None
        if len(meant) == 1 or listen is None:
            return choice.choose(meant, [0.0] * len(meant))
        streams = self._audio()
        spoken_s = spoken(self._container, [streams[track.number - 1] for track in meant], listen)
        self._container.close()
        self._container = self._open()  # not every container can be sought back to its very beginning
        return choice.choose(meant, spoken_s)

    def _declared_s(self) -> float | None:
        """The length the container itself promises, over all its streams."""
        if self._container.duration:
            return float(self._container.duration) / 1_000_000
        return _length_s(self._stream)

    def _promise(self) -> Promised | None:
        """What must be there, by the container's own words."""
        if self.container_name == "mp3" and not container.has_mp3_header(self._file.fileno()):
            return None
        return promise(self.container_name, self.declared_s, _length_s(self._stream))

    def _check_caps(self) -> None:
        context, promised = self._stream.codec_context, self._promised
        if promised is not None and promised.length_s > self._caps.duration_max_s:
            self._refuse_length(promised.length_s)
        if context.channels > self._caps.channels_max:
            raise MediaRefused(f"the recording has {context.channels} channels, more than the {self._caps.channels_max} allowed")
        if context.sample_rate > self._caps.rate_max_hz:
            raise MediaRefused(f"the recording has {context.sample_rate} samples a second, more than the {self._caps.rate_max_hz} allowed")

    def _refuse_length(self, length_s: float) -> None:
        raise MediaRefused(
            f"the recording is longer ({length_s:.0f} s) than the {self._caps.duration_max_s:.0f} s allowed",
            hint="raise engine.duration_max_s or split the recording",
        )

    # --- streaming ---

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
                f"the recording cannot be read past {self.duration_s:.1f} s ({_reason(error)})", hint="copy the recording again"
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
            self._refuse_length(self.duration_s)
        return heard_once(samples)

    # --- the end ---

    def _check_whole(self) -> None:
        """Silent loss is damage: a container that promises more than it holds, a codec that could not read its own packets."""
        if self._reach.unreadable:
            raise MediaDamaged(f"{self._reach.told_bad} cannot be decoded", hint="copy the recording again")
        if self.decoded_samples == 0:
            raise MediaRefused("the file has an audio track, but no sound in it (0.0 s)", hint="check the recording")
        loss = loss_of(self._promised, self._reach, self.duration_s)
        if loss:
            raise MediaDamaged(loss, hint="the copy was probably interrupted; copy the recording again")

    def _doubts(self) -> Iterator[str]:
        if self._reach.bad:
            yield f"{self._reach.told_bad} cannot be decoded"
        gap = gap_of(self._promised, self.duration_s)
        if gap:
            yield gap
        last = self._reach.last
        doubt = container.doubt_about_end(self._file.fileno(), self.container_name, b"" if last is None else bytes(last))
        if doubt:
            yield doubt


class Source(io.FileIO):
    """The file under a demuxer, which a spoilt header may send to places that no file has: to that the answer is no, not an exception."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EINVAL)


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
    return MediaDamaged(f"the sound cannot be converted ({_reason(error)})", hint="convert it to WAV, FLAC or MP3")


def _channels(frame: Any) -> NDArray[np.int16]:
    """The samples of an interleaved frame, [channels, n]. (PyAV crashes on frames of 8 channels that lie one behind the other.)"""
    samples: NDArray[np.int16] = frame.to_ndarray()
    return samples.reshape(-1, frame.layout.nb_channels).T


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


def spoken(media: Any, streams: Sequence[Any], listen: Listen) -> list[float]:
    """Seconds of speech on each of these tracks of a container, in a minute of it, whatever its length."""
    length_s = float(media.duration or 0) / 1_000_000
    all_s = LISTEN_PLACES * LISTEN_S
    places = [(place + 0.5) / LISTEN_PLACES * length_s - LISTEN_S / 2 for place in range(LISTEN_PLACES)] if length_s > all_s else []
    excerpts = [excerpt(media, streams, place_s, LISTEN_S) for place_s in places]
    if not any(len(samples) for found in excerpts for samples in found):  # short, of unknown length, or it cannot be sought
        excerpts = [excerpt(media, streams, 0.0, all_s)]
    return [sum(map(listen, samples)) for samples in zip(*excerpts, strict=True)]


def excerpt(media: Any, streams: Sequence[Any], begin_s: float, length_s: float) -> list[NDArray[np.float32]]:
    """What can be read of these tracks from this place on, at most so much of each."""
    sound: dict[int, list[NDArray[np.int16]]] = {stream.index: [] for stream in streams}
    resampled = {stream.index: Resampled("mono") for stream in streams}
    end_s = begin_s + length_s + float(media.start_time or 0) / 1_000_000
    try:
        media.seek(round(begin_s * 1_000_000) + (media.start_time or 0))
        for count, packet in enumerate(media.demux(streams)):
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


def check_promised_size(descriptor: int) -> None:
    """Some containers say in their first bytes how large they are; FFmpeg believes the file instead. Raises MediaDamaged when cut off."""
    promise, there = container.promise_of(descriptor), os.fstat(descriptor).st_size
    if promise is not None and promise.size - there > promise.slack:
        raise MediaDamaged(
            f"the recording is cut off: {there} of the {promise.size} bytes it promises are there",
            hint="the copy was probably interrupted; copy the recording again",
        )


def _length_s(stream: Any) -> float | None:
    return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None


def _reason(error: Exception) -> str:
    if isinstance(error, FFmpegError) and error.errno == errno.EINVAL:  # FFmpeg's EINVAL: the demuxer is not in our list
        return "a kind of file that holds no recording"
    text = error.strerror if isinstance(error, FFmpegError) else str(error)
    return (text or type(error).__name__).lower()


def sha256_of(descriptor: int) -> str:
    """SHA-256 of the whole file, read by position so that nobody's offset moves."""
    digest = hashlib.sha256()
    offset = 0
    while chunk := os.pread(descriptor, 1 << 20, offset):
        digest.update(chunk)
        offset += len(chunk)
    return digest.hexdigest()
