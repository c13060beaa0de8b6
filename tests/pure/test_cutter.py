"""Where recordings are cut: what must be true of the windows whatever the speech probabilities are. No network, no audio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from whisperd.engine import speech
from whisperd.engine.audio import RATE_HZ
from whisperd.engine.speech import FRAME, GAP_MAX_S, PAD_S, Cut, CutterState, SpeechStream, WindowAudio, WindowCutter

THRESHOLD = 0.5
FRAMES_A_SECOND = RATE_HZ / FRAME

levels = st.sampled_from([0.0, 0.05, 0.2, 0.34, 0.36, 0.49, 0.5, 0.51, 0.8, 1.0])
stretches = st.lists(st.tuples(levels, st.integers(1, 400)), max_size=25)
"""Stretches of one probability each, up to 13 s long: speech, pauses, and what lies between."""

window_lengths = st.sampled_from([5.0, 7.3, 12.0, 30.0])
min_silences = st.sampled_from([0.1, 0.5, 2.0, 10.0])


def frames_of(pieces: Iterable[tuple[float, int]]) -> list[float]:
    return [level for level, length in pieces for _ in range(length)]


def cuts_of(probabilities: Sequence[float], *, window_s: float, min_silence_s: float, samples: int | None = None) -> list[Cut]:
    cutter = WindowCutter(threshold=THRESHOLD, min_silence_s=min_silence_s, window_s=window_s)
    made = [cut for probability in probabilities for cut in cutter.feed(probability)]
    return made + list(cutter.end(len(probabilities) * FRAME if samples is None else samples))


@given(stretches, window_lengths, min_silences)
@example([(1.0, 400)] * 25, 30.0, 10.0)
@example([(1.0, 1), (0.0, 400)] * 12, 5.0, 10.0)
@example([(0.51, 150), (0.0, 4), (1.0, 150), (0.0, 5)] * 4, 5.0, 0.1)
def test_windows_are_in_order_apart_and_short_enough(pieces: list[tuple[float, int]], window_s: float, min_silence_s: float) -> None:
    """Each window begins where the one before has ended or later, is not empty, not longer than allowed, and inside the recording."""
    probabilities = frames_of(pieces)
    cuts = cuts_of(probabilities, window_s=window_s, min_silence_s=min_silence_s)
    ended = 0
    for cut in cuts:
        assert ended <= cut.start < cut.end
        assert cut.end - cut.start <= window_s * RATE_HZ
        assert 0 < cut.speech <= cut.end - cut.start
        assert cut.speech == sum(end - start for start, end in cut.stretches)
        times = [time for stretch in cut.stretches for time in stretch]
        assert times == sorted(times) and cut.start <= times[0] and times[-1] <= cut.end
        assert all(start < end for start, end in cut.stretches)
        ended = cut.end
    assert ended <= len(probabilities) * FRAME


@given(stretches, window_lengths, min_silences)
@example([(1.0, 400)] * 25, 30.0, 10.0)
@example([(0.5, 1), (0.0, 80)] * 12, 5.0, 0.1)
def test_every_frame_of_speech_is_in_a_window(pieces: list[tuple[float, int]], window_s: float, min_silence_s: float) -> None:
    """What the network calls speech is in a window, and so is the moment before it, where words begin too softly to be noticed."""
    probabilities = frames_of(pieces)
    cuts = cuts_of(probabilities, window_s=window_s, min_silence_s=min_silence_s)
    spoken = {number for number, probability in enumerate(probabilities) if probability >= THRESHOLD}
    covered = {number for cut in cuts for number in range(cut.start // FRAME, cut.end // FRAME)}
    assert spoken <= covered
    told = {number for cut in cuts for start, end in cut.stretches for number in range(start // FRAME, end // FRAME)}
    assert spoken <= told
    pad = round(PAD_S * FRAMES_A_SECOND)
    onsets = {number for number in spoken if number - 1 not in spoken}
    assert {before for onset in onsets for before in range(max(0, onset - pad), onset)} <= covered


@given(st.lists(st.tuples(st.sampled_from([0.0, 0.2, 0.49]), st.integers(1, 2000)), max_size=10), window_lengths, min_silences)
def test_silence_yields_no_window(pieces: list[tuple[float, int]], window_s: float, min_silence_s: float) -> None:
    """Below the threshold nothing is speech, however long it lasts."""
    assert cuts_of(frames_of(pieces), window_s=window_s, min_silence_s=min_silence_s) == []


@given(stretches, window_lengths, st.integers(0, FRAME - 1))
def test_the_last_window_ends_with_the_recording(pieces: list[tuple[float, int]], window_s: float, missing: int) -> None:
    """The last frame may be filled up with silence; no window reaches past the true end."""
    probabilities = frames_of(pieces)
    samples = max(0, len(probabilities) * FRAME - missing)
    cuts = cuts_of(probabilities, window_s=window_s, min_silence_s=0.5, samples=samples)
    assert all(cut.end <= samples and cut.stretches[-1][1] <= cut.end for cut in cuts)


@given(stretches)
def test_a_long_silence_is_in_no_window(pieces: list[tuple[float, int]]) -> None:
    """Whisper makes up text in silences: no window holds a pause much longer than GAP_MAX_S."""
    probabilities = frames_of(pieces)
    longest = 0
    for cut in cuts_of(probabilities, window_s=30.0, min_silence_s=0.5):
        quiet = 0
        for probability in probabilities[cut.start // FRAME : cut.end // FRAME]:
            quiet = quiet + 1 if probability < THRESHOLD - 0.15 else 0
            longest = max(longest, quiet)
    assert longest <= (GAP_MAX_S + 2 * PAD_S + 0.1) * FRAMES_A_SECOND


def test_speech_without_a_pause_is_cut_where_it_is_least_likely_speech() -> None:
    """A dip in a stretch that does not fit into one window is where it is cut."""
    probabilities = [0.9] * 120 + [0.45] + [0.9] * 200
    first, *_ = cuts_of(probabilities, window_s=5.0, min_silence_s=0.5)
    assert first.end == 120 * FRAME


def test_sentences_share_a_window_while_they_fit() -> None:
    """Ten short sentences with short pauses need one window of 30 s, not ten: the model is paid by the window."""
    probabilities = ([0.9] * 60 + [0.1] * 25) * 10
    (only,) = cuts_of(probabilities, window_s=30.0, min_silence_s=0.5)
    assert only.end - only.start > 25 * RATE_HZ


@settings(deadline=None)
@given(stretches, window_lengths, min_silences, st.data())
@example([(0.9, 120), (0.45, 1), (1.0, 400)], 5.0, 0.5, None)
def test_a_cutter_goes_on_where_another_was(
    pieces: list[tuple[float, int]], window_s: float, min_silence_s: float, data: st.DataObject | None
) -> None:
    """Interrupted anywhere, again and again: what one cutter knows is enough for the next, and the windows are the same."""
    probabilities = frames_of(pieces)
    options = {"threshold": THRESHOLD, "min_silence_s": min_silence_s, "window_s": window_s}
    places = st.sets(st.integers(0, len(probabilities)), max_size=8)
    interruptions = set(range(len(probabilities))) if data is None else data.draw(places)
    cutter, made = WindowCutter(**options), []
    for number, probability in enumerate(probabilities):
        if number in interruptions:
            kept = msgspec.msgpack.encode(cutter.state())
            needed_from, cutter = cutter.needed_from, WindowCutter(**options, state=msgspec.msgpack.decode(kept, type=CutterState))
            assert cutter.needed_from == needed_from
        made += cutter.feed(float(np.float32(probability)))
    made += cutter.end(len(probabilities) * FRAME)
    exact = [float(np.float32(probability)) for probability in probabilities]
    assert made == cuts_of(exact, window_s=window_s, min_silence_s=min_silence_s)


# --- blocks of any size --------------------------------------------------------------------------------------------------------


class Told:
    """Stands in for the network: the probability of a frame is written in its first sample, the frame's number in its second."""

    def probabilities(self, samples: np.ndarray) -> np.ndarray:
        return samples.reshape(-1, FRAME)[:, 0].copy()


def told(probabilities: Sequence[float], tail: int) -> np.ndarray:
    """Audio that says of itself what it is."""
    audio = np.zeros((len(probabilities), FRAME), dtype=np.float32)
    audio[:, 0] = probabilities
    audio[:, 1] = np.arange(len(probabilities))
    return np.concatenate([audio.reshape(-1), np.zeros(tail, dtype=np.float32)])


def streamed(audio: np.ndarray, sizes: Sequence[int]) -> list[WindowAudio]:
    stream = SpeechStream(threshold=THRESHOLD, min_silence_s=0.5, window_s=7.3)
    windows: list[WindowAudio] = []
    position, turn = 0, 0
    while position < len(audio):
        block = audio[position : position + sizes[turn % len(sizes)]]
        windows += stream.feed(block)
        position, turn = position + len(block), turn + 1
    return windows + list(stream.end())


@settings(max_examples=40, deadline=None)
@given(stretches, st.integers(0, FRAME - 1), st.lists(st.integers(1, 40_000), min_size=1, max_size=6))
def test_windows_are_the_same_whatever_the_blocks(pieces: list[tuple[float, int]], tail: int, sizes: list[int]) -> None:
    """A recording that comes in blocks of any size gives the windows of the whole, and each holds the very samples of its place."""
    audio = told(frames_of(pieces), tail)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speech, "Silero", Told)
        whole, blocks = streamed(audio, [max(1, len(audio))]), streamed(audio, sizes)
    assert [window._replace(samples=None) for window in blocks] == [window._replace(samples=None) for window in whole]
    for window in blocks:
        place = slice(round(window.start_s * RATE_HZ), round(window.end_s * RATE_HZ))
        assert np.array_equal(window.samples, audio[place])
    assert [window.number for window in blocks] == list(range(len(blocks)))
