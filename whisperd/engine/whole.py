"""whole: whether a recording is all there, by what its container promises and what was found in it.

Owns: how exact each container is, and how much may be missing before that means anything. Pure: figures in, sentences out.
Does not fail.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LOSS_MAX_S = 1.0
LOSS_MAX_SHARE = 0.01
ROUNDING_S = 0.01
EDGE_S = 0.25  # what an encoder's own delay, a padded last frame, or a header that counts as a frame may come to
MOV = "mov,mp4,m4a,3gp,3g2,mj2"
EXACT_LOSS_MAX_S = {
    **dict.fromkeys(("flac", "tta", "wv", "ape", "dsf"), ROUNDING_S),
    **dict.fromkeys(("wav", "w64", "aiff", "caf", "au", "mp3", MOV), EDGE_S),
}
"""Containers that tell the length of the track itself, to the sample or to the frame, and what may be missing of it."""
GUESSED_LENGTH = ("aac", "ac3", "eac3", "amr", "amrnb", "amrwb")
"""Bare streams, whose length FFmpeg guesses from the size and the first moments' bit rate (as that of an MP3 without a header)."""
SPOILT_MAX_SHARE = 0.05
GAP_MAX_S = 1.0  # a gap in the middle; a longer one, and more than the share above, is damage


class Promised(NamedTuple):
    """A length that a container promises, of the track or of its longest stream, and what may be missing at its end.

    gapless: sound must fill all of it. (In an MP4 a frame may be said to last for minutes, where a microphone was off.)
    """

    length_s: float
    loss_max_s: float
    of_track: bool
    gapless: bool


def promise(container: str, declared_s: float | None, track_s: float | None) -> Promised | None:
    """What a container promises that tells these lengths, of all and of the track. None where that is FFmpeg's own estimate, or none."""
    if declared_s is None or container in GUESSED_LENGTH:
        return None
    if container in EXACT_LOSS_MAX_S and track_s is not None:
        return Promised(track_s, EXACT_LOSS_MAX_S[container], of_track=True, gapless=container != MOV)
    return Promised(declared_s, max(LOSS_MAX_S, LOSS_MAX_SHARE * declared_s), of_track=False, gapless=False)


def loss_of(promised: Promised | None, reach: Reach, heard_s: float) -> str:
    """A sentence when so much is missing that the recording is damaged, else ""."""
    if promised is None:
        return ""
    track_s = reach.track_s()
    reached_s = max(heard_s, track_s if promised.of_track else reach.all_s())
    if promised.length_s - reached_s > promised.loss_max_s:
        return f"the recording is cut off: {reached_s:.2f} s of the {promised.length_s:.2f} s it promises are there"
    if promised.gapless and track_s - heard_s > max(GAP_MAX_S, promised.length_s * SPOILT_MAX_SHARE):
        return f"{track_s - heard_s:.1f} s of {track_s:.1f} s of sound are missing"
    return ""


def gap_of(promised: Promised | None, heard_s: float) -> str:
    """A sentence when less was heard than decoders leave out at either end, else ""."""
    if promised is None or not promised.gapless or promised.length_s - heard_s <= 1.5 * promised.loss_max_s:
        return ""
    return f"{promised.length_s - heard_s:.2f} s of the sound are missing"


class Reach:
    """How far the packets go, by their own times: of the track only those that could be decoded. Cheap: called for each of them."""

    def __init__(self) -> None:
        self.packets = 0
        self.bad = 0
        self.last: Any = None  # packet of the track
        self._track_begin: int | None = None
        self._track_end = 0
        self._others: dict[int, tuple[int, int, Any]] = {}

    @property
    def unreadable(self) -> bool:
        """Whether more packets are spoilt than a click here and there."""
        return self.bad > max(1, self.packets * SPOILT_MAX_SHARE)

    @property
    def told_bad(self) -> str:
        return f"{self.bad} of {self.packets} packets of sound"

    def note_good(self, packet: Any) -> None:
        """A packet of the track."""
        if not packet.size:  # it only asks the decoder for what it still holds
            return
        self.packets += 1
        self.last = packet
        place = packet.pts
        if place is not None and not packet.is_corrupt:
            if self._track_begin is None:
                self._track_begin = place
            self._track_end = max(self._track_end, place + (packet.duration or 0))

    def note_bad(self, packet: Any) -> None:
        """A packet of the track that cannot be decoded."""
        if packet.size:
            self.packets += 1
            self.bad += 1
            self.last = packet

    def note(self, packet: Any) -> None:
        """A packet of another stream."""
        place = packet.pts
        if place is not None:
            begin, end, _ = self._others.get(packet.stream_index, (place, place, None))
            self._others[packet.stream_index] = min(begin, place), max(end, place + (packet.duration or 0)), packet.time_base

    def track_s(self) -> float:
        """From the beginning of the track to its end."""
        begin, end = self._track_times()
        return end - begin

    def all_s(self) -> float:
        """From where the first stream begins to where the last one ends."""
        times = [self._track_times()] if self._track_begin is not None else []
        times += [(float(begin * base), float(end * base)) for begin, end, base in self._others.values() if base is not None]
        return max(end for _, end in times) - min(begin for begin, _ in times) if times else 0.0

    def _track_times(self) -> tuple[float, float]:
        if self._track_begin is None or self.last is None or self.last.time_base is None:
            return 0.0, 0.0
        return float(self._track_begin * self.last.time_base), float(self._track_end * self.last.time_base)
