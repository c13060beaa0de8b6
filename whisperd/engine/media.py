"""media: a container opened from a descriptor, and what it says of itself before anything is decoded.

Owns: which containers are read at all, the caps on what they may ask of us, their tracks. Needs no numpy: the examiner is a small process.
Fails with `MediaRefused` (caps, no audio, not media) and `MediaDamaged` (cut off by its own words): both are the file's own fault; with
OSError when the file cannot be read, with MemoryError when there is no memory for its index.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import av
from av.error import FFmpegError
from av.format import Flags
from av.stream import Disposition

from whisperd.engine import container
from whisperd.engine.timeline import CLOCK_JUMP_S, start_offset_s
from whisperd.engine.whole import Promised, promise
from whisperd.errors import WhisperdError
from whisperd.vocabulary import Media, Track

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


class Source(io.FileIO):
    """The file under a demuxer, which a spoilt header may send to places that no file has: to that the answer is no, not an exception.

    Where only zeros follow the sound the file ends: FFmpeg looks for a name in every eight bytes of them, for minutes. `on_read` is called
    with the bytes of each read. The descriptor stays open.
    """

    def __init__(self, descriptor: int, *, on_read: Callable[[int], None] = lambda count: None) -> None:
        super().__init__(descriptor, "rb", closefd=False)
        self._end = container.zeros_from(descriptor)
        self._on_read = on_read

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self._end is not None and whence == os.SEEK_END:
            offset, whence = self._end + offset, os.SEEK_SET
        try:
            return super().seek(offset, whence)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOVERFLOW):  # the disk's or the share's fault, not the header's
                raise
            return -error.errno

    def read(self, size: int | None = -1, /) -> bytes:
        if self._end is not None:
            left = max(0, self._end - self.tell())
            size = left if size is None or size < 0 else min(size, left)
        data = super().read(-1 if size is None else size) or b""
        self._on_read(len(data))
        return data


# --- opening -------------------------------------------------------------------------------------------------------------------


def check_file(descriptor: int) -> None:
    """Whether this may be a recording, and all of it, before FFmpeg sees it. Raises MediaRefused, MediaDamaged, OSError."""
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        raise MediaRefused("this is no file, but a pipe, a device or a directory", hint="drop the recording itself")
    if found.st_size == 0:
        raise MediaRefused("the file is empty (0 bytes)", hint="copy the recording again")
    check_promised_size(descriptor)


def check_promised_size(descriptor: int) -> None:
    """Some containers say in their first bytes how large they are; FFmpeg believes the file instead. Raises MediaDamaged when cut off."""
    promised, there = container.promise_of(descriptor), os.fstat(descriptor).st_size
    if promised is not None and promised.size - there > promised.slack:
        raise MediaDamaged(
            f"the recording is cut off: {there} of the {promised.size} bytes it promises are there",
            hint="the copy was probably interrupted; copy the recording again",
        )


def open_media(file: Source) -> Any:
    """FFmpeg's container, from the file's beginning. Raises MediaRefused, OSError, MemoryError."""
    file.seek(0)
    try:
        return av.open(file, mode="r", metadata_errors="ignore", options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"})
    except (FFmpegError, ValueError) as error:
        if getattr(error, "errno", None) == errno.ENOMEM:
            raise MemoryError("no memory for the index of the file") from error
        what = container.looks_like(os.pread(file.fileno(), 512, 0))
        raise MediaRefused(
            f"the file is not audio or video that can be read ({what or reason_of(error)})",
            hint="open it in a media player; if it plays there, convert it to WAV, FLAC or MP3 and drop it again",
        ) from error


def audio_of(media: Any) -> list[Any]:
    """The audio streams. Raises MediaRefused when there is none."""
    found = [stream for stream in media.streams.audio if stream.codec_context is not None]
    if not found:
        kinds = sorted({stream.type for stream in media.streams}) or ["nothing"]
        raise MediaRefused(
            f"there is no sound in the file (it holds {', '.join(kinds)})", hint="check that the recording has an audio track"
        )
    return found


def reason_of(error: Exception) -> str:
    """What FFmpeg says, in words."""
    if isinstance(error, FFmpegError) and error.errno == errno.EINVAL:  # FFmpeg's EINVAL: the demuxer is not in our list
        return "a kind of file that holds no recording"
    text = error.strerror if isinstance(error, FFmpegError) else str(error)
    return (text or type(error).__name__).lower()


# --- lengths and caps ----------------------------------------------------------------------------------------------------------


def declared_s(media: Any, stream: Any) -> float | None:
    """The length the container itself promises, over all its streams."""
    return float(media.duration) / 1_000_000 if media.duration else _length_s(stream)


def promise_of(descriptor: int, media: Any, stream: Any) -> Promised | None:
    """What must be there, by the container's own words."""
    if media.format.name == "mp3" and not container.has_mp3_header(descriptor):
        return None
    return promise(str(media.format.name), declared_s(media, stream), _length_s(stream))


def check_caps(stream: Any, promised: Promised | None, caps: Caps) -> None:
    """Raises MediaRefused."""
    context = stream.codec_context
    if promised is not None and promised.length_s > caps.duration_max_s:
        raise too_long(promised.length_s, caps)
    if context.channels > caps.channels_max:
        raise MediaRefused(f"the recording has {context.channels} channels, more than the {caps.channels_max} allowed")
    if context.sample_rate > caps.rate_max_hz:
        raise MediaRefused(f"the recording has {context.sample_rate} samples a second, more than the {caps.rate_max_hz} allowed")


def too_long(length_s: float, caps: Caps) -> MediaRefused:
    return MediaRefused(
        f"the recording is longer ({length_s:.0f} s) than the {caps.duration_max_s:.0f} s allowed",
        hint="raise engine.duration_max_s or split the recording",
    )


def _length_s(stream: Any) -> float | None:
    return float(stream.duration * stream.time_base) if stream.duration and stream.time_base else None


# --- the clock -----------------------------------------------------------------------------------------------------------------


def begin_s(stream: Any) -> float | None:
    """When a stream begins, on its container's clock."""
    return None if stream.start_time is None or stream.time_base is None else float(stream.start_time * stream.time_base)


def late_s(media: Any, stream: Any) -> float:
    """How much later than the container's own first moment (its picture's, in a film) a stream begins."""
    return start_offset_s(begin_s(stream), None if media.start_time is None else media.start_time / 1_000_000)


def hole_max_s(media: Any, stream: Any, caps: Caps) -> float:
    """How long a hole in the times of a stream may be, to be silence: in containers whose clock may change, not long."""
    if media.format.flags & Flags.ts_discont.value:
        return CLOCK_JUMP_S
    return min(declared_s(media, stream) or caps.duration_max_s, caps.duration_max_s)


# --- the whole of it -----------------------------------------------------------------------------------------------------------


def examine(descriptor: int, caps: Caps, *, on_read: Callable[[int], None] = lambda count: None) -> Media:
    """What a container says; `on_read` is called with the bytes of each read.

    Raises MediaRefused, MediaDamaged as the engine would of any of its tracks; OSError, MemoryError.
    """
    check_file(descriptor)
    with _opened(Source(descriptor, on_read=on_read)) as media:
        streams = audio_of(media)
        _check_any(descriptor, media, streams, caps)
        first = next((stream for stream in streams if stream.disposition & Disposition.default), streams[0])
        length_s = declared_s(media, first)
        return Media(
            container=str(media.format.name),
            tracks=tuple(_track(number, stream) for number, stream in enumerate(streams, 1)),
            duration_s=None if length_s is None else round(length_s, 3),
            start_offset_s=late_s(media, first),
            video=any(not stream.disposition & Disposition.attached_pic for stream in media.streams.video),
        )


@contextmanager
def _opened(source: Source) -> Iterator[Any]:
    with source as file:
        media = open_media(file)
        try:
            yield media
        finally:
            with contextlib.suppress(FFmpegError):
                media.close()


def _check_any(descriptor: int, media: Any, streams: list[Any], caps: Caps) -> None:
    """Which track is meant is the job's business: only when none of them is allowed, the file is refused."""
    refusals: list[MediaRefused] = []
    for stream in streams:
        try:
            check_caps(stream, promise_of(descriptor, media, stream), caps)
        except MediaRefused as refusal:
            refusals.append(refusal)
    if len(refusals) == len(streams):
        raise refusals[0]


def _track(number: int, stream: Any) -> Track:
    context = stream.codec_context
    return Track(
        number=number,
        codec=str(context.name),
        language=stream.language or "",
        channels=context.channels,
        rate_hz=context.sample_rate,
    )
