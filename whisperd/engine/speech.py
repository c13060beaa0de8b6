"""speech: where somebody speaks, and windows of at most 30 s cut there.

Owns: `WindowCutter`, which is pure, and `SpeechStream`, which holds no more audio than one window. A stream's state can be kept, and
another stream goes on from it.
Fails with ValueError when a kept state is not one of these options.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import numpy as np

from whisperd.engine.audio import RATE_HZ
from whisperd.engine.silero import FRAME, Silero

if TYPE_CHECKING:
    from numpy.typing import NDArray

PAD_S = 0.3  # kept around speech: onsets are softer than the threshold
GAP_MAX_S = 2.5  # a longer silence closes the window: Whisper makes up text in silences


class Cut(NamedTuple):
    """A window in samples of the recording; `speech` is how much of it is speech, `stretches` where that begins and ends."""

    start: int
    end: int
    speech: int
    stretches: tuple[tuple[int, int], ...] = ()


class CutterState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All that a `WindowCutter` knows, in frames."""

    now: int = 0  # fed so far
    floor: int = 0  # end of the last window: the next may not begin before
    begin: int | None = None  # first frame of speech in the open window
    stretches: tuple[tuple[int, int], ...] = ()  # closed ones in the open window
    stretch: int | None = None  # first frame of the open stretch
    quiet_since: int | None = None
    likely: bytes = b""  # float32: how likely the frames of the open stretch are speech, those where it may be cut


class WindowCutter:
    """Turns speech probabilities into windows. Pure: frames in, cuts out.

    A stretch of speech begins at `threshold` and ends when the probability stays below `threshold - 0.15` for `min_silence_s`.
    Stretches are collected while they fit into `window_s`; speech without a pause is cut where it is least likely speech.
    """

    def __init__(self, *, threshold: float, min_silence_s: float, window_s: float, state: CutterState | None = None) -> None:
        state = state or CutterState()
        self._threshold = threshold
        self._release = max(threshold - 0.15, 0.01)
        self._silence_frames = max(1, _frames(min_silence_s))
        self._gap_frames = max(self._silence_frames, _frames(GAP_MAX_S))
        self._pad = _frames(PAD_S)
        self._limit = int(window_s * RATE_HZ / FRAME) - 2 * self._pad
        self._now = state.now
        self._floor = state.floor
        self._begin = state.begin
        self._stretches = list(state.stretches)
        self._stretch = state.stretch
        self._quiet_since = state.quiet_since
        self._probabilities: list[float] = []  # of the open stretch
        if self._stretch is not None:
            likely = np.frombuffer(state.likely, dtype=np.float32).tolist()
            self._probabilities = [1.0] * (self._now - self._stretch - len(likely)) + likely

    @property
    def needed_from(self) -> int:
        """First sample that a coming window may still contain."""
        begin = self._now if self._begin is None else self._begin
        return max(begin - self._pad, self._floor) * FRAME

    def state(self) -> CutterState:
        """From which another cutter with the same options goes on."""
        likely = self._probabilities[self._limit // 2 :] if self._stretch is not None else []
        return CutterState(
            now=self._now,
            floor=self._floor,
            begin=self._begin,
            stretches=tuple(self._stretches),
            stretch=self._stretch,
            quiet_since=self._quiet_since,
            likely=np.asarray(likely, dtype=np.float32).tobytes(),
        )

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
        if self._begin is not None and self._stretches:
            yield _clipped(self._window(self._begin, self._stretches[-1][1] + self._pad), samples)

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
        self._stretches.append((stretch, end))
        self._stretch = None

    def _full_window(self, begin: int) -> Iterator[Cut]:
        full = self._now - begin >= self._limit
        end = self._stretches[-1][1] if self._stretches else None
        if self._stretch is None:
            end = begin if end is None else end
            if full or self._now - end >= self._gap_frames:
                yield self._window(begin, end + self._pad)
        elif full and end is not None:  # the open stretch does not fit any more: it begins the next window
            stretch = self._stretch
            yield self._window(begin, min(end + self._pad, (end + stretch) // 2))
            self._begin = stretch
        elif full:  # one stretch fills the window
            yield self._cut_inside(begin, self._stretch)

    def _cut_inside(self, begin: int, stretch: int) -> Cut:
        half = len(self._probabilities) // 2
        offset = max(1, half + int(np.argmin(self._probabilities[half:])))
        self._stretches.append((stretch, stretch + offset))
        cut = self._window(begin, stretch + offset)
        self._begin = self._stretch = stretch + offset
        self._probabilities = self._probabilities[offset:]
        self._quiet_since = None
        return cut

    def _window(self, begin: int, end: int) -> Cut:
        """Close the open window; `begin` and `end` are frames, the padding at the end is in `end` already."""
        start = max(begin - self._pad, self._floor)
        end = min(end, self._now)
        stretches = tuple((first * FRAME, last * FRAME) for first, last in self._stretches)
        self._floor = end
        self._begin = None
        self._stretches = []
        return Cut(start * FRAME, end * FRAME, _total(stretches), stretches)


def _frames(seconds: float) -> int:
    return round(seconds * RATE_HZ / FRAME)


def _total(stretches: tuple[tuple[int, int], ...]) -> int:
    return sum(end - start for start, end in stretches)


def _clipped(cut: Cut, samples: int) -> Cut:
    """The last frame of a recording is filled up with silence, which is not of it."""
    stretches = tuple((start, min(end, samples)) for start, end in cut.stretches)
    return Cut(cut.start, min(cut.end, samples), _total(stretches), stretches)


class WindowAudio(NamedTuple):
    """A window with its samples; `stretches_s` is where in the recording somebody speaks in it, `speech_s` how long together."""

    number: int
    start_s: float
    end_s: float
    samples: NDArray[np.float32]
    stretches_s: tuple[tuple[float, float], ...] = ()
    speech_s: float = 0.0


class Held:
    """The last samples of a stream, by their number in the recording. Appending and dropping cost what they move, never all."""

    def __init__(self, start: int) -> None:
        self.start = self.end = start
        self._base = start  # number of _buffer[0]
        self._buffer = np.empty(8 * RATE_HZ, dtype=np.float32)

    def append(self, samples: NDArray[np.float32]) -> None:
        if self.end - self._base + len(samples) > len(self._buffer):
            kept = self.between(self.start, self.end)
            need = 2 * (len(kept) + len(samples))  # as much room again: the next move comes only when that is used up
            buffer = np.empty(need, dtype=np.float32) if need > len(self._buffer) else self._buffer
            buffer[: len(kept)] = kept
            self._buffer, self._base = buffer, self.start
        place = self.end - self._base
        self._buffer[place : place + len(samples)] = samples
        self.end += len(samples)

    def between(self, start: int, end: int) -> NDArray[np.float32]:
        """A view, valid until the next `append`."""
        return self._buffer[start - self._base : end - self._base]

    def drop(self, before: int) -> None:
        self.start = max(self.start, min(before, self.end))


class StreamState(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """All that a `SpeechStream` knows, but for the audio it holds."""

    options: tuple[float, float, float]
    needed_from: int
    judged: int
    count: int
    speech: int
    silero: bytes
    cutter: CutterState


class SpeechStream:
    """Blocks in, windows of speech out, holding no more audio than the open window needs."""

    def __init__(self, *, threshold: float, min_silence_s: float, window_s: float) -> None:
        self._options = (float(threshold), float(min_silence_s), float(window_s))
        self._silero = Silero()
        self._cutter = WindowCutter(threshold=threshold, min_silence_s=min_silence_s, window_s=window_s)
        self._held = Held(0)
        self._judged = 0  # samples the network has seen
        self._received = 0
        self._ready: list[Cut] = []
        self._count = 0
        self._speech = 0

    @classmethod
    def resumed(cls, state: bytes, *, threshold: float, min_silence_s: float, window_s: float) -> SpeechStream:
        """A stream that goes on from `state`: it is fed the recording from its beginning, passes over what lies before `needed_from`,
        and then gives the windows that the first stream would have given. Raises ValueError when the state is not of these options.
        """
        stream = cls(threshold=threshold, min_silence_s=min_silence_s, window_s=window_s)
        try:
            kept = msgspec.msgpack.decode(state, type=StreamState)
            if kept.options != stream._options:
                raise ValueError("it was kept with other options")
            stream._silero = Silero(kept.silero)
            stream._cutter = WindowCutter(threshold=threshold, min_silence_s=min_silence_s, window_s=window_s, state=kept.cutter)
        except (msgspec.MsgspecError, ValueError) as error:
            raise ValueError(f"the state of a speech stream cannot be used: {error}") from error
        stream._held = Held(kept.needed_from)
        stream._judged, stream._count, stream._speech = kept.judged, kept.count, kept.speech
        return stream

    @property
    def needed_from(self) -> int:
        """The first sample that is still needed."""
        return self._held.start

    @property
    def speech_s(self) -> float:
        """Seconds of speech in the windows given so far."""
        return self._speech / RATE_HZ

    def state(self) -> bytes:
        """What another stream needs to go on from here; call it between blocks, when all windows of the last one are taken."""
        return msgspec.msgpack.encode(
            StreamState(
                options=self._options,
                needed_from=self._held.start,
                judged=self._judged,
                count=self._count,
                speech=self._speech,
                silero=self._silero.memory(),
                cutter=self._cutter.state(),
            )
        )

    def feed(self, block: NDArray[np.float32]) -> Iterator[WindowAudio]:
        """Windows that this block completed."""
        self._held.append(block[max(0, self._held.end - self._received) :])
        self._received += len(block)
        whole = (self._received - self._judged) // FRAME * FRAME
        if whole > 0:
            self._judge(self._held.between(self._judged, self._judged + whole))
            self._judged += whole
        yield from self._take()

    def end(self) -> Iterator[WindowAudio]:
        """The last windows."""
        rest = self._received - self._judged
        if rest > 0:
            self._judge(np.pad(self._held.between(self._judged, self._received), (0, FRAME - rest)))
            self._judged = self._received
        self._ready += self._cutter.end(self._received)
        yield from self._take()

    def _judge(self, samples: NDArray[np.float32]) -> None:
        for probability in self._silero.probabilities(samples).tolist():
            self._ready += self._cutter.feed(probability)

    def _take(self) -> Iterator[WindowAudio]:
        ready, self._ready = self._ready, []
        for cut in ready:
            self._speech += cut.speech
            yield WindowAudio(
                number=self._count,
                start_s=cut.start / RATE_HZ,
                end_s=cut.end / RATE_HZ,
                samples=self._held.between(cut.start, cut.end).copy(),
                stretches_s=tuple((start / RATE_HZ, end / RATE_HZ) for start, end in cut.stretches),
                speech_s=cut.speech / RATE_HZ,
            )
            self._count += 1
        self._held.drop(min(self._cutter.needed_from, self._judged))


def spoken_s(samples: NDArray[np.float32]) -> float:
    """Seconds of speech in 16 kHz samples."""
    whole = samples[: len(samples) // FRAME * FRAME]
    return float((Silero().probabilities(whole) >= 0.5).sum()) * FRAME / RATE_HZ if len(whole) else 0.0
