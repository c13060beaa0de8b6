"""speech: where somebody speaks, and windows of at most 30 s cut there.

Owns: Silero with its state carried from block to block (so its answers equal one run over the whole file), and `WindowCutter`,
which is pure. Memory is bounded by one window.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from whisperd.engine.audio import RATE_HZ

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAME = 512  # samples for one speech probability: 32 ms
_CONTEXT = 64
PAD_S = 0.3  # kept around speech: onsets are softer than the threshold
GAP_MAX_S = 2.5  # a longer silence closes the window: Whisper makes up text in silences


class Silero:
    """Speech probabilities, one for each 512 samples; the network's memory is carried over blocks."""

    def __init__(self) -> None:
        from faster_whisper.vad import get_vad_model

        self._session: Any = get_vad_model().session
        self._h = np.zeros((1, 1, 128), dtype=np.float32)
        self._c = np.zeros((1, 1, 128), dtype=np.float32)
        self._context = np.zeros(_CONTEXT, dtype=np.float32)

    def probabilities(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """One probability for each frame; the number of samples must be a multiple of FRAME."""
        frames = samples.reshape(-1, FRAME)
        before = np.concatenate([self._context[None], frames[:-1, -_CONTEXT:]])
        self._context = frames[-1, -_CONTEXT:].copy()
        batch = np.concatenate([before, frames], axis=1)
        output, self._h, self._c = self._session.run(None, {"input": batch, "h": self._h, "c": self._c})
        return np.asarray(output, dtype=np.float32).reshape(-1)


class Cut(NamedTuple):
    """A window in samples of the recording; `speech` is how much of it is speech."""

    start: int
    end: int
    speech: int


class WindowCutter:
    """Turns speech probabilities into windows. Pure: frames in, cuts out.

    A stretch of speech begins at `threshold` and ends when the probability stays below `threshold - 0.15` for `min_silence_s`.
    Stretches are collected while they fit into `window_s`; speech without a pause is cut where it is least likely speech.
    """

    def __init__(self, *, threshold: float, min_silence_s: float, window_s: float) -> None:
        self._threshold = threshold
        self._release = max(threshold - 0.15, 0.01)
        self._silence_frames = max(1, _frames(min_silence_s))
        self._gap_frames = max(self._silence_frames, _frames(GAP_MAX_S))
        self._pad = _frames(PAD_S)
        self._limit = int(window_s * RATE_HZ / FRAME) - 2 * self._pad
        self._now = 0  # frames fed so far
        self._floor = 0  # end of the last window: the next may not begin before
        self._begin: int | None = None  # first frame of speech in the open window
        self._end: int | None = None  # end of the last closed stretch in the open window
        self._speech = 0
        self._stretch: int | None = None  # first frame of the open stretch
        self._quiet_since: int | None = None
        self._probabilities: list[float] = []  # of the open stretch

    @property
    def needed_from(self) -> int:
        """First sample that a coming window may still contain."""
        begin = self._now if self._begin is None else self._begin
        return max(begin - self._pad, self._floor) * FRAME

    def feed(self, probability: float) -> Iterator[Cut]:
        """One more frame; the windows that are complete with it."""
        if self._stretch is not None:
            self._continue_stretch(self._stretch, probability)
        elif probability >= self._threshold:
            self._open_stretch(probability)
        self._now += 1
        if self._begin is not None:
            yield from self._full_window(self._begin)

    def end(self, samples: int) -> Iterator[Cut]:
        """The recording is over, at this many samples."""
        if self._stretch is not None:
            self._close_stretch(self._stretch, self._now if self._quiet_since is None else self._quiet_since)
        if self._begin is not None and self._end is not None:
            cut = self._window(self._begin, self._end + self._pad)
            yield cut._replace(end=min(cut.end, samples))

    def _open_stretch(self, probability: float) -> None:
        self._stretch = self._now
        self._quiet_since = None
        self._probabilities = [probability]
        if self._begin is None:
            self._begin = self._now

    def _continue_stretch(self, stretch: int, probability: float) -> None:
        self._probabilities.append(probability)
        if probability >= self._threshold:
            self._quiet_since = None
        elif probability < self._release and self._quiet_since is None:
            self._quiet_since = self._now
        if self._quiet_since is not None and self._now - self._quiet_since >= self._silence_frames:
            self._close_stretch(stretch, self._quiet_since)

    def _close_stretch(self, stretch: int, end: int) -> None:
        self._speech += end - stretch
        self._end = end
        self._stretch = None

    def _full_window(self, begin: int) -> Iterator[Cut]:
        full = self._now - begin >= self._limit
        if self._stretch is None:
            end = begin if self._end is None else self._end
            if full or self._now - end >= self._gap_frames:
                yield self._window(begin, end + self._pad)
        elif full and self._end is not None:  # the open stretch does not fit any more: it begins the next window
            stretch = self._stretch
            yield self._window(begin, min(self._end + self._pad, (self._end + stretch) // 2))
            self._begin = stretch
        elif full:  # one stretch fills the window
            yield self._cut_inside(begin, self._stretch)

    def _cut_inside(self, begin: int, stretch: int) -> Cut:
        half = len(self._probabilities) // 2
        offset = max(1, half + int(np.argmin(self._probabilities[half:])))
        self._speech += offset
        cut = self._window(begin, stretch + offset)
        self._begin = self._stretch = stretch + offset
        self._probabilities = self._probabilities[offset:]
        self._quiet_since = None
        return cut

    def _window(self, begin: int, end: int) -> Cut:
        """Close the open window; `begin` and `end` are frames, the padding at the end is in `end` already."""
        start = max(begin - self._pad, self._floor)
        end = min(end, self._now)
        cut = Cut(start * FRAME, end * FRAME, self._speech * FRAME)
        self._floor = end
        self._begin = self._end = None
        self._speech = 0
        return cut


def _frames(seconds: float) -> int:
    return round(seconds * RATE_HZ / FRAME)


class WindowAudio(NamedTuple):
    """A window with its samples."""

    number: int
    start_s: float
    end_s: float
    samples: NDArray[np.float32]


class SpeechStream:
    """Blocks in, windows of speech out, holding no more audio than the open window needs."""

    def __init__(self, *, threshold: float, min_silence_s: float, window_s: float) -> None:
        self._silero = Silero()
        self._cutter = WindowCutter(threshold=threshold, min_silence_s=min_silence_s, window_s=window_s)
        self._held = np.zeros(0, dtype=np.float32)
        self._held_from = 0  # sample number of _held[0]
        self._judged = 0  # samples the network has seen
        self._received = 0
        self._ready: list[Cut] = []
        self._count = 0
        self.speech_s = 0.0

    def feed(self, block: NDArray[np.float32]) -> Iterator[WindowAudio]:
        """Windows that this block completed."""
        self._held = np.concatenate([self._held, block])
        self._received += len(block)
        whole = (self._received - self._judged) // FRAME * FRAME
        if whole:
            self._judge(self._slice(self._judged, self._judged + whole))
            self._judged += whole
        yield from self._take()

    def end(self) -> Iterator[WindowAudio]:
        """The last windows."""
        rest = self._received - self._judged
        if rest:
            self._judge(np.pad(self._slice(self._judged, self._received), (0, FRAME - rest)))
            self._judged = self._received
        self._ready += self._cutter.end(self._received)
        yield from self._take()

    def _judge(self, samples: NDArray[np.float32]) -> None:
        for probability in self._silero.probabilities(samples):
            self._ready += self._cutter.feed(float(probability))

    def _take(self) -> Iterator[WindowAudio]:
        ready, self._ready = self._ready, []
        for cut in ready:
            self.speech_s += cut.speech / RATE_HZ
            yield WindowAudio(self._count, cut.start / RATE_HZ, cut.end / RATE_HZ, self._slice(cut.start, cut.end))
            self._count += 1
        self._drop(self._cutter.needed_from)

    def _slice(self, start: int, end: int) -> NDArray[np.float32]:
        return self._held[start - self._held_from : end - self._held_from]

    def _drop(self, before: int) -> None:
        before = min(before, self._judged)
        if before > self._held_from:
            self._held = self._held[before - self._held_from :].copy()
            self._held_from = before
