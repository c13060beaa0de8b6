"""audio: a recording as a stream of 16 kHz mono blocks, from an open descriptor.

Owns: what media may be: which containers are read at all, how long, how many channels. Memory does not grow with the length.
Fails with `MediaRefused` (caps, no audio, not media) and `MediaDamaged` (truncated, corrupt): both are the file's own fault.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import av
import numpy as np
from av.audio.resampler import AudioResampler
from av.error import FFmpegError

from whisperd.errors import WhisperdError

if TYPE_CHECKING:
    from numpy.typing import NDArray

RATE_HZ = 16_000
BLOCK_SAMPLES = RATE_HZ * 2
LOSS_MAX_S = 1.0
LOSS_MAX_SHARE = 0.03
LOSS_MAX_BYTES = 65_536  # where a container tells its size to the byte; some writers count their own header wrong
BAD_PACKETS_MAX_SHARE = 0.05
GUESSED_LENGTH = ("mp3", "aac", "ac3", "eac3", "amr", "amrnb", "amrwb")
"""Bare streams: FFmpeg guesses their length from the size and the first moments' bit rate, unless an MP3 has a header that tells it."""
MP3_HEADERS = (b"Xing", b"Info", b"VBRI")
W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")

DEMUXERS = (
    "wav,w64,aiff,caf,au,voc,mp3,aac,flac,ogg,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,asf,avi,flv,mpeg,mpegts,amr,amrnb,amrwb,"
    "ac3,eac3,ape,wv,tta,mpc,mpc8,gsm,dsf,nistsphere"
)
"""Containers that hold recordings. Playlists, network and scripting demuxers (hls, concat, sdp, image2 …) are not among them."""


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
    """One open recording. `blocks()` streams it once; afterwards `duration_s` is the decoded length."""

    def __init__(self, descriptor: int, caps: Caps) -> None:
        if os.fstat(descriptor).st_size == 0:
            raise MediaRefused("the file is empty (0 bytes)", hint="copy the recording again")
        self._caps = caps
        self._file = Source(descriptor, "rb", closefd=False)
        self._file.seek(0)
        check_promised_size(descriptor)
        self._container = self._open()
        self._stream = self._choose_stream()
        self.container_name = str(self._container.format.name)
        self.codec_name = str(self._stream.codec_context.name)
        self.declared_s = self._declared_s()
        self._promised_s = None if self._is_guess() else self.declared_s
        self.decoded_samples = 0
        self._demuxed_end_s = 0.0
        self._packets = 0
        self._bad_packets = 0
        self._check_caps()

    @property
    def duration_s(self) -> float:
        return self.decoded_samples / RATE_HZ

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Blocks of float32 samples in -1..1, 16 kHz, mono, about 2 s each. Raises MediaDamaged, MediaRefused."""
        mono = Mono()
        pending: list[NDArray[np.int16]] = []
        held = 0
        for frame in self._frames():
            pieces = mono.feed(frame)
            pending += pieces
            held += sum(map(len, pieces))
            if held >= BLOCK_SAMPLES:
                yield self._block(pending)
                pending, held = [], 0
        pending += mono.end()
        if pending:
            yield self._block(pending)
        self._check_whole()

    def close(self) -> None:
        with contextlib.suppress(FFmpegError):
            self._container.close()
        self._file.close()

    # --- opening ---

    def _open(self) -> Any:
        try:
            return av.open(
                self._file,
                mode="r",
                metadata_errors="ignore",
                options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
            )
        except (FFmpegError, ValueError) as error:
            what = looks_like(os.pread(self._file.fileno(), 512, 0))
            raise MediaRefused(
                f"the file is not audio or video that can be read ({what or _reason(error)})",
                hint="open it in a media player; if it plays there, convert it to WAV, FLAC or MP3 and drop it again",
            ) from error

    def _choose_stream(self) -> Any:
        streams = [stream for stream in self._container.streams.audio if stream.codec_context is not None]
        if not streams:
            kinds = sorted({stream.type for stream in self._container.streams}) or ["nothing"]
            raise MediaRefused(
                f"there is no sound in the file (it holds {', '.join(kinds)})", hint="check that the recording has an audio track"
            )
        return streams[0]

    def _declared_s(self) -> float | None:
        """The length the container itself promises, over all its streams."""
        if self._container.duration:
            return float(self._container.duration) / 1_000_000
        if self._stream.duration and self._stream.time_base:
            return float(self._stream.duration * self._stream.time_base)
        return None

    def _is_guess(self) -> bool:
        """Whether the declared length is FFmpeg's own estimate: then nobody promised it."""
        if self.container_name not in GUESSED_LENGTH:
            return False
        beginning = behind_id3(self._file.fileno(), 4096)
        return not any(header in beginning for header in MP3_HEADERS)

    def _check_caps(self) -> None:
        context = self._stream.codec_context
        if self._promised_s is not None and self._promised_s > self._caps.duration_max_s:
            self._refuse_length(self._promised_s)
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
        """Decoded frames of the chosen stream. All streams are demuxed, to know where the container really ends."""
        try:
            for packet in self._demuxed():
                self._note_end(packet)
                if packet.stream_index == self._stream.index:
                    yield from self._decode(packet)
        except FFmpegError as error:
            raise MediaDamaged(
                f"the recording cannot be read past {self.duration_s:.1f} s ({_reason(error)})", hint="copy the recording again"
            ) from error

    def _demuxed(self) -> Iterator[Any]:
        try:
            yield from self._container.demux()
        except IndexError:  # PyAV cannot flush a stream that appeared midway; ours was there before, and is flushed already
            return

    def _decode(self, packet: Any) -> Iterator[Any]:
        whole = bool(packet.size)  # the last one only asks the decoder for what it still holds
        self._packets += whole
        try:
            yield from packet.decode()
        except FFmpegError:  # one bad packet is a click in the sound, not the end of it; too many are judged in _check_whole
            self._bad_packets += whole

    def _note_end(self, packet: Any) -> None:
        if packet.pts is None or packet.time_base is None:
            return
        end_s = float((packet.pts + (packet.duration or 0)) * Fraction(packet.time_base))
        self._demuxed_end_s = max(self._demuxed_end_s, end_s)

    def _block(self, pieces: list[NDArray[np.int16]]) -> NDArray[np.float32]:
        samples = np.concatenate(pieces).astype(np.float32) / 32768.0
        self.decoded_samples += len(samples)
        if self.duration_s > self._caps.duration_max_s:
            self._refuse_length(self.duration_s)
        return samples

    def _check_whole(self) -> None:
        """Silent loss is damage: a container that promises more than it holds, a codec that could not read its own packets."""
        if self._packets and self._bad_packets > max(1, self._packets * BAD_PACKETS_MAX_SHARE):
            raise MediaDamaged(
                f"{self._bad_packets} of {self._packets} packets of sound cannot be decoded", hint="copy the recording again"
            )
        if self.decoded_samples == 0:
            raise MediaRefused("the file has an audio track, but no sound in it (0.0 s)", hint="check the recording")
        reached_s = max(self.duration_s, self._demuxed_end_s)
        if self._promised_s is not None and self._promised_s - reached_s > max(LOSS_MAX_S, LOSS_MAX_SHARE * self._promised_s):
            raise MediaDamaged(
                f"the recording is cut off: {reached_s:.1f} s of the {self._promised_s:.1f} s it promises are there",
                hint="the copy was probably interrupted; copy the recording again",
            )


class Source(io.FileIO):
    """The file under a demuxer, which a spoilt header may send to places that no file has: to that the answer is no, not an exception."""

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError as error:
            return -(error.errno or errno.EINVAL)


class Mono:
    """Decoded frames in, 16 kHz mono samples out. Rate and channels may change midway: joined files and broadcasts do that."""

    def __init__(self) -> None:
        self._resampler: AudioResampler | None = None
        self._shape: tuple[str, str, int] | None = None

    def feed(self, frame: Any) -> list[NDArray[np.int16]]:
        """Samples that this frame completed. Raises MediaDamaged."""
        shape = (frame.format.name, frame.layout.name, frame.sample_rate)
        before = self.end() if shape != self._shape else []
        if self._resampler is None:
            self._resampler, self._shape = AudioResampler(format="s16", layout="mono", rate=RATE_HZ), shape
        return before + self._resample(self._resampler, frame)

    def end(self) -> list[NDArray[np.int16]]:
        """What is still held back. Raises MediaDamaged."""
        resampler, self._resampler = self._resampler, None
        return [] if resampler is None else self._resample(resampler, None)

    def _resample(self, resampler: AudioResampler, frame: Any) -> list[NDArray[np.int16]]:
        try:
            return [piece.to_ndarray()[0] for piece in resampler.resample(frame)]
        except (FFmpegError, ValueError) as error:
            raise MediaDamaged(f"the sound cannot be converted ({_reason(error)})", hint="convert it to WAV, FLAC or MP3") from error


def check_promised_size(descriptor: int) -> None:
    """Some containers say in their first bytes how large they are; FFmpeg believes the file instead. Raises MediaDamaged when cut off."""
    promised = promised_bytes(os.pread(descriptor, 4096, 0))
    there = os.fstat(descriptor).st_size
    if promised is not None and promised - there > min(max(4096, LOSS_MAX_SHARE * promised), LOSS_MAX_BYTES):
        raise MediaDamaged(
            f"the recording is cut off: {there} of the {promised} bytes it promises are there",
            hint="the copy was probably interrupted; copy the recording again",
        )


def promised_bytes(head: bytes) -> int | None:
    """The size of a WAV, AVI, RF64, W64 or ASF (WMA) by its own words; None for others, and for those that cannot know it."""
    if head[:4] == b"RIFF" and head[8:12] in (b"WAVE", b"AVI "):
        return _unless_piped(_number(head, 4, 4) + 8)
    if head[:4] in (b"RF64", b"BW64") and head[12:16] == b"ds64":
        return _unless_piped(_number(head, 20, 8) + 8)
    if head.startswith(W64_RIFF):
        return _unless_piped(_number(head, 16, 8))
    properties = head.find(ASF_PROPERTIES) if head.startswith(ASF_HEADER) else -1
    broadcast = properties >= 0 and _number(head, properties + 88, 1) & 1
    return _number(head, properties + 40, 8) if properties >= 0 and not broadcast else None


def _number(head: bytes, place: int, width: int) -> int:
    return int.from_bytes(head[place : place + width], "little")


def _unless_piped(size: int) -> int | None:
    """Who writes into a pipe cannot know the size: 0, 2 GiB (arecord, sox) or 4 GiB (FFmpeg), less or more a little, and absurd ones
    say nothing."""
    return None if size <= 8 or size >= 1 << 62 or any(abs(size - (1 << power)) <= 8192 for power in (31, 32)) else size


def behind_id3(descriptor: int, length: int) -> bytes:
    """The first bytes behind the ID3 tag, which may hold pictures of megabytes."""
    head = os.pread(descriptor, 10, 0)
    tag = 0
    if head[:3] == b"ID3" and len(head) == 10:
        tag = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return os.pread(descriptor, length, tag)


def looks_like(head: bytes) -> str:
    """What a file that is no recording probably is, from its first bytes; "" when they say nothing."""
    for magic, kind in (
        (b"\x89PNG", "a picture"),
        (b"\xff\xd8\xff", "a picture"),
        (b"GIF8", "a picture"),
        (b"%PDF", "a PDF document"),
        (b"PK\x03\x04", "a ZIP archive or an office document"),
    ):
        if head.startswith(magic):
            return f"it is {kind}"
    if head[4:8] == b"ftyp":
        return "it is an MP4 whose index is missing or damaged: the recording or its copy was cut off"
    return "it is a text file" if _is_text(head) else ""


def _is_text(head: bytes) -> bool:
    """Whether this is UTF-8 that people could read (bare samples are neither, most of the time)."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut in two
    except UnicodeDecodeError:
        return False
    return bool(text) and all(char.isprintable() or char in "\t\n\r\f\ufeff" for char in text)


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
