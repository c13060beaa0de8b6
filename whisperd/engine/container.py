"""container: what a media file says of itself in its own bytes, where FFmpeg reads to an early end without a word.

Owns: the sizes that headers promise, marks of the end, and what a file that is no recording probably is. Reads a few kilobytes by
position, whatever the file's length. Does not fail: what is not understood says nothing.
"""

from __future__ import annotations

import codecs
import os
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
ASF_HEADER = bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")
ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
MP3_HEADERS = (b"Xing", b"Info", b"VBRI")
CHUNKS_MAX = 64  # in front of the samples
ZEROS_BYTES = 1 << 16
TAIL_BYTES = 1 << 17  # two Ogg pages of the largest size
TS_PACKETS = (188, 192, 204)  # bytes: plain, with time codes (Blu-ray), with error correction


class Promise(NamedTuple):
    """How many bytes there are by the file's own words, and how many may be missing: some writers count their own headers wrong."""

    size: int
    slack: int


def promise_of(descriptor: int) -> Promise | None:
    """What a WAV, RF64, W64, CAF, AVI or ASF (WMA) says of its size; None for others, and for those that cannot know it."""
    head = os.pread(descriptor, 4096, 0)
    if head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE":
        return _wave(descriptor, head)
    if head.startswith(b"caff"):
        return _caf(descriptor)
    if head.startswith(W64_RIFF):
        return _promise(_unless_piped(_number(head, 16, 8)), slack=256)
    size = _unless_piped(_number(head, 4, 4) + 8) if head[:4] == b"RIFF" and head[8:12] == b"AVI " else _asf(head)
    return _roughly(size)


def zeros_from(descriptor: int) -> int | None:
    """Where the sound of a WAV ends, when so many zeros follow that nothing else will: a recorder took the room and never gave it back."""
    promised = promise_of(descriptor) if os.pread(descriptor, 12, 0)[8:] == b"WAVE" else None
    behind = os.pread(descriptor, ZEROS_BYTES, promised.size) if promised is not None else b""
    return promised.size if promised is not None and len(behind) == ZEROS_BYTES and not any(behind) else None


def _wave(descriptor: int, head: bytes) -> Promise | None:
    """Where the samples end. A quarter of a second may be missing, if that is little."""
    a_second = 0  # bytes
    for name, place, size in _chunks(descriptor, 12, 4, "little"):
        if name == b"fmt ":
            a_second = _number(os.pread(descriptor, 16, place), 8, 4)
        if name == b"data":
            samples = _unless_piped(_number(head, 28, 8) if head[12:16] == b"ds64" else size)
            return None if samples is None else Promise(place + samples, slack=min(4096, max(64, a_second // 4)))
    return _roughly(_unless_piped(_number(head, 4, 4) + 8))  # cut off before its samples


def _caf(descriptor: int) -> Promise | None:
    for name, place, size in _chunks(descriptor, 8, 8, "big"):
        if name == b"data":
            return _promise(_unless_piped(place + size), slack=64)
    return None


def _chunks(descriptor: int, place: int, width: int, order: Literal["little", "big"]) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and size of each chunk. RIFF (little) fills them up to even sizes, CAF (big) does not."""
    for _ in range(CHUNKS_MAX):
        head = os.pread(descriptor, 4 + width, place) if place < 1 << 62 else b""
        if len(head) < 4 + width:
            return
        size = int.from_bytes(head[4:], order)
        place += 4 + width
        yield head[:4], place, size
        place += size + (size & 1 if order == "little" else 0)


def _asf(head: bytes) -> int | None:
    properties = head.find(ASF_PROPERTIES) if head.startswith(ASF_HEADER) else -1
    broadcast = properties >= 0 and _number(head, properties + 88, 1) & 1
    return _number(head, properties + 40, 8) if properties >= 0 and not broadcast else None


def _roughly(size: int | None) -> Promise | None:
    """The size of the whole file, which writers count less well than that of the samples."""
    return _promise(size, slack=min(max(4096, (size or 0) // 33), 65_536))


def _promise(size: int | None, *, slack: int) -> Promise | None:
    return None if size is None else Promise(size, slack)


def _number(head: bytes, place: int, width: int) -> int:
    return int.from_bytes(head[place : place + width], "little")


def _unless_piped(size: int) -> int | None:
    """Who writes into a pipe cannot know the size: 0, 2 GiB (arecord, sox) or 4 GiB (FFmpeg), less or more a little, and absurd ones
    say nothing."""
    return None if size <= 8 or size >= 1 << 62 or any(abs(size - (1 << power)) <= 8192 for power in (31, 32)) else size


# --- MP3 -----------------------------------------------------------------------------------------------------------------------


def has_mp3_header(descriptor: int) -> bool:
    """Whether an MP3 begins with a header that tells how many frames it has."""
    beginning = behind_id3(descriptor, 4096)
    return any(header in beginning for header in MP3_HEADERS)


def behind_id3(descriptor: int, length: int) -> bytes:
    """The first bytes behind the ID3 tag, which may hold pictures of megabytes."""
    head = os.pread(descriptor, 10, 0)
    tag = 0
    if head[:3] == b"ID3" and len(head) == 10:
        tag = 10 + sum(byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return os.pread(descriptor, length, tag)


# --- the end -------------------------------------------------------------------------------------------------------------------


def doubt_about_end(descriptor: int, container: str, last_packet: bytes) -> str:
    """A sentence when the file seems to end too early, in a container that promises no length; "" when nothing speaks for that."""
    if container == "ogg" and not _ogg_has_ended(descriptor):
        return "the Ogg stream has no end mark: the copy may be cut off"
    if container == "mpegts" and all(os.fstat(descriptor).st_size % size for size in TS_PACKETS):
        return "the transport stream ends within a packet: the copy may be cut off"
    if container in ("mp3", "aac") and len(last_packet) < frame_bytes(last_packet):
        return "the last frame of sound is incomplete: the copy may be cut off"
    return ""


def _ogg_has_ended(descriptor: int) -> bool:
    """Whether the last page of an Ogg file is whole and has the mark of the end."""
    size = os.fstat(descriptor).st_size
    tail = os.pread(descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))
    page = tail[max(tail.rfind(b"OggS\0"), 0) :]
    if len(page) < 27 or len(page) < 27 + page[26]:
        return False
    return bool(page[5] & 4) and len(page) >= 27 + page[26] + sum(page[27 : 27 + page[26]])


_MPEG1_KBITS = (
    (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
    (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
)
_MPEG2_KBITS = (
    (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
_MPEG_HZ = (44_100, 48_000, 32_000)


def frame_bytes(frame: bytes) -> int:
    """How long an MPEG audio or ADTS frame is by its own header; 0 when it has none that says so."""
    if len(frame) < 7 or frame[0] != 0xFF or frame[1] & 0xE0 != 0xE0:
        return 0
    if frame[1] & 0xF6 == 0xF0:  # ADTS
        return (frame[3] & 3) << 11 | frame[4] << 3 | frame[5] >> 5
    version, layer, bits, rate, padding = frame[1] >> 3 & 3, 4 - (frame[1] >> 1 & 3), frame[2] >> 4, frame[2] >> 2 & 3, frame[2] >> 1 & 1
    if version == 1 or layer == 4 or bits in (0, 15) or rate == 3:  # reserved, or of no fixed bit rate
        return 0
    kbits = _MPEG1_KBITS[layer - 1] if version == 3 else _MPEG2_KBITS[min(layer - 1, 1)]
    hz = _MPEG_HZ[rate] >> {3: 0, 2: 1, 0: 2}[version]
    if layer == 1:
        return (12_000 * kbits[bits - 1] // hz + padding) * 4
    return (72_000 if layer == 3 and version != 3 else 144_000) * kbits[bits - 1] // hz + padding


# --- what it is instead --------------------------------------------------------------------------------------------------------


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
