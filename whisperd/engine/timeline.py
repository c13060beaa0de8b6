"""timeline: where the sound lies on the clock of its container: how late it begins, and the holes in it.

Owns: when a jump of a track's own times is silence that nobody stored (a microphone that was off, packets that were lost), and when it is
another clock. Pure: times in, lengths out. Does not fail.
"""

from __future__ import annotations

HOLE_MIN_S = 0.2  # less is the rounding of a container, or a frame that an encoder dropped
CLOCK_JUMP_S = 10.0  # of a broadcast: FFmpeg takes a longer jump for another clock, too (its -dts_delta_threshold)
OFFSET_MAX_S = 86_400.0


def start_offset_s(track_s: float | None, container_s: float | None) -> float:
    """How much later than its container's first moment a track begins, to the millisecond; 0.0 where that makes no sense."""
    if track_s is None or container_s is None:
        return 0.0
    offset_s = track_s - container_s
    return round(offset_s, 3) if 0.0 < offset_s < OFFSET_MAX_S else 0.0


class Timeline:
    """Follows the frames of a track. `filled_s` is the silence there was to be put between them."""

    def __init__(self, begin_s: float | None, hole_max_s: float) -> None:
        self._end_s = begin_s
        self._hole_max_s = hole_max_s
        self.filled_s = 0.0

    def hole_before(self, begin_s: float | None, length_s: float) -> float:
        """Seconds of silence in front of this frame, 0.0 for most. A frame without a time follows the one before it."""
        if begin_s is None:
            self._end_s = None if self._end_s is None else self._end_s + length_s
            return 0.0
        hole_s = 0.0 if self._end_s is None else begin_s - self._end_s
        self._end_s = begin_s + length_s
        if not HOLE_MIN_S < hole_s <= self._hole_max_s:
            return 0.0
        self.filled_s += hole_s
        return hole_s
