"""Windows of speech from real recordings: the network in pieces, streams that are interrupted and go on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from recordings import SENTENCES, Studio, samples_of

from whisperd.engine import silero
from whisperd.engine.audio import RATE_HZ
from whisperd.engine.silero import Abreast, Original, Silero, network
from whisperd.engine.speech import FRAME, Held, SpeechStream, StreamState, WindowAudio, spoken_s

OPTIONS = {"threshold": 0.5, "min_silence_s": 0.3, "window_s": 8.0}


@pytest.fixture(scope="module")
def talk(studio: Studio) -> np.ndarray:
    """A minute of speech: pauses of all lengths, digital silence, noise, and a stretch without a pause."""
    said = [np.frombuffer(samples_of(studio.say(sentence)), dtype=np.int16) for sentence in SENTENCES[:14]]
    pauses = [np.zeros(int(RATE_HZ * seconds), dtype=np.int16) for seconds in (0.1, 0.4, 0.0, 3.5, 0.9, 0.0, 0.0)]
    pieces = [piece for number, sentence in enumerate(said) for piece in (sentence, pauses[number % len(pauses)])]
    pieces += [sentence[2000:-6000] for sentence in said]
    audio = np.concatenate(pieces).astype(np.float32) / 32768.0
    return audio + (np.random.default_rng(3).standard_normal(len(audio)) * 1e-4).astype(np.float32) * (
        np.arange(len(audio)) % 80_000 > 30_000
    )


def blocks_of(audio: np.ndarray, size: int) -> list[np.ndarray]:
    return [audio[place : place + size] for place in range(0, len(audio), size)]


# --- the network ---------------------------------------------------------------------------------------------------------------


def test_probabilities_are_those_of_faster_whisper(talk: np.ndarray) -> None:
    """In blocks of any size they are, bit for bit, what faster-whisper's network answers to the whole recording at once."""
    from faster_whisper.vad import get_vad_model

    audio = talk[: len(talk) // FRAME * FRAME]
    at_once = np.asarray(get_vad_model()(audio.copy()), dtype=np.float32).reshape(-1)
    chance = random.Random(5)
    for _ in range(3):
        stream, parts, place = Silero(), [], 0
        while place < len(audio):
            block = audio[place : place + FRAME * chance.choice([1, 2, 3, 4, 7, 31, 62, 200])]
            parts.append(stream.probabilities(block))
            place += len(block)
        assert np.array_equal(np.concatenate(parts), at_once)
    assert at_once.max() > 0.9 and at_once.min() < 0.1


def test_frames_abreast_answer_as_the_original(talk: np.ndarray) -> None:
    """Our layout of the network, if it runs at all on this machine, gives the original's bits, its memory included."""
    fast, original = Abreast(), Original()
    if not isinstance(network(), Abreast):
        pytest.skip("on this machine the sums come out otherwise: the original is used")
    memory = silero.Memory(*np.zeros((2, 1, 1, 128), dtype=np.float32), np.zeros(64, dtype=np.float32))
    for count in (1, 2, 3, 4, 61, 62, 63, 600):
        lines = silero.placed(talk[: count * FRAME].reshape(-1, FRAME), memory.context)
        for mine, its in zip(fast(lines, count, memory), original(lines, count, memory), strict=True):
            assert np.array_equal(mine, its), count


def test_where_the_bits_differ_the_original_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor or another network may not do the same sums: then nothing is gained, and nothing lost."""
    network.cache_clear()
    monkeypatch.setattr(silero, "_same", lambda one, other: False)
    assert isinstance(network(), Original)
    network.cache_clear()
    monkeypatch.setattr(silero, "abreast", lambda original: original[:1000])
    assert isinstance(network(), Original)
    network.cache_clear()


def test_the_network_is_loaded_once() -> None:
    """However many streams there are."""
    assert network() is network()


def test_seconds_of_speech_are_counted(talk: np.ndarray) -> None:
    """In a moment of any length; in silence and in nothing there are none."""
    assert 0.4 * len(talk) < spoken_s(talk) * RATE_HZ < len(talk)
    assert spoken_s(np.zeros(50_000, dtype=np.float32)) == spoken_s(np.zeros(100, dtype=np.float32)) == 0.0


# --- windows -------------------------------------------------------------------------------------------------------------------


def test_stretches_are_where_somebody_speaks(talk: np.ndarray) -> None:
    """Each lies in its window, one after the other; together they are the seconds of speech that are told, and nearly all sound."""
    stream = SpeechStream(**OPTIONS)
    windows = [window for block in blocks_of(talk, 32_000) for window in stream.feed(block)] + list(stream.end())
    assert len(windows) > 5
    loud = 0.0
    for window in windows:
        place = window.start_s
        for start_s, end_s in window.stretches_s:
            assert place <= start_s < end_s <= window.end_s
            place = end_s
            loud += float(np.square(talk[round(start_s * RATE_HZ) : round(end_s * RATE_HZ)]).sum())
        assert window.speech_s == pytest.approx(sum(end_s - start_s for start_s, end_s in window.stretches_s))
        assert len(window.samples) == round((window.end_s - window.start_s) * RATE_HZ)
    assert stream.speech_s == pytest.approx(sum(window.speech_s for window in windows))
    assert loud > 0.95 * float(np.square(talk).sum())


# --- going on ------------------------------------------------------------------------------------------------------------------


class Interrupted:
    """A stream that is fed whole blocks, with its state and the windows so far after each of them."""

    def __init__(self, blocks: list[np.ndarray]) -> None:
        stream = SpeechStream(**OPTIONS)
        self.windows: list[WindowAudio] = []
        self.places: list[tuple[bytes, int]] = [(stream.state(), 0)]
        for block in blocks:
            self.windows += stream.feed(block)
            self.places.append((stream.state(), len(self.windows)))
        self.windows += stream.end()
        self.speech_s = stream.speech_s


def same(mine: WindowAudio, its: WindowAudio) -> bool:
    return mine._replace(samples=None) == its._replace(samples=None) and mine.samples.tobytes() == its.samples.tobytes()


@pytest.mark.parametrize("size", [32_000, 33_333])
def test_a_stream_goes_on_from_any_block(size: int, talk: np.ndarray) -> None:
    """From the state after any block, fed from the beginning again: exactly the windows that were still to come."""
    blocks = blocks_of(talk, size)
    whole = Interrupted(blocks)
    assert len(whole.windows) > 5
    for state, done in whole.places:
        stream = SpeechStream.resumed(state, **OPTIONS)
        windows = [window for block in blocks for window in stream.feed(block)] + list(stream.end())
        assert len(windows) == len(whole.windows) - done
        assert all(same(mine, its) for mine, its in zip(windows, whole.windows[done:], strict=True))
        assert stream.speech_s == pytest.approx(whole.speech_s)


def test_a_stream_goes_on_more_than_once(talk: np.ndarray) -> None:
    """Interrupted after every single block: the windows are those of the undisturbed stream."""
    blocks = blocks_of(talk, 32_000)
    whole, windows, state = Interrupted(blocks), [], SpeechStream(**OPTIONS).state()
    for number in range(len(blocks)):
        stream = SpeechStream.resumed(state, **OPTIONS)
        for block in blocks[: number + 1]:
            windows += stream.feed(block)
        state = stream.state()
    windows += stream.end()
    assert len(windows) == len(whole.windows) and all(same(*pair) for pair in zip(windows, whole.windows, strict=True))


def test_what_was_judged_is_not_judged_again(talk: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network hears only what is new, and a stream holds nothing that it does not need."""
    blocks = blocks_of(talk, 32_000)
    state, _ = Interrupted(blocks).places[-2]
    frames = 0

    def counted(self: Silero, samples: np.ndarray) -> np.ndarray:
        nonlocal frames
        frames += len(samples) // FRAME
        return np.zeros(len(samples) // FRAME, dtype=np.float32)

    monkeypatch.setattr(Silero, "probabilities", counted)
    stream = SpeechStream.resumed(state, **OPTIONS)
    needed_from = stream.needed_from
    assert needed_from > 0
    for block in blocks[:-1]:
        assert list(stream.feed(block)) == []
        assert stream.needed_from == needed_from
    assert frames == 0
    list(stream.feed(blocks[-1]))
    assert 0 < frames <= len(blocks[-1]) // FRAME + 1


def test_a_state_is_small(talk: np.ndarray) -> None:
    """It goes into a ledger with every window: 4 kB at most, also in a long stretch without a pause."""
    assert max(len(state) for state, _ in Interrupted(blocks_of(talk, 32_000)).places) <= 4096
    endless = SpeechStream(threshold=0.01, min_silence_s=10.0, window_s=30.0)
    sizes = []
    for block in blocks_of(np.concatenate([talk] * 2), 32_000):
        list(endless.feed(block))
        sizes.append(len(endless.state()))
    assert max(sizes) <= 4096


def spoilt(state: bytes) -> Iterator[bytes]:
    kept = msgspec.msgpack.decode(state, type=StreamState)
    yield b""
    yield state[:-1]
    yield state + b"\0"
    yield b"nonsense"
    yield msgspec.msgpack.encode([*msgspec.msgpack.decode(state), 1])
    yield msgspec.msgpack.encode(msgspec.structs.replace(kept, silero=kept.silero[:-4]))
    yield msgspec.msgpack.encode(msgspec.structs.replace(kept, silero=kept.silero[:-1]))
    yield msgspec.msgpack.encode(msgspec.structs.replace(kept, silero=b""))
    yield msgspec.msgpack.encode(msgspec.structs.replace(kept, options=(0.5, 0.3, 8.1)))


def test_a_state_that_does_not_fit_is_refused(talk: np.ndarray) -> None:
    """Of other options, cut short, too long, or something else altogether: ValueError, never other windows."""
    state, _ = Interrupted(blocks_of(talk[:200_000], 32_000)).places[-1]
    SpeechStream.resumed(state, **OPTIONS)
    for wrong in spoilt(state):
        with pytest.raises(ValueError, match="state of a speech stream"):
            SpeechStream.resumed(wrong, **OPTIONS)
    for other in ({"threshold": 0.6}, {"min_silence_s": 0.31}, {"window_s": 9.0}):
        with pytest.raises(ValueError, match="other options"):
            SpeechStream.resumed(state, **{**OPTIONS, **other})


# --- samples in hand -----------------------------------------------------------------------------------------------------------


def test_held_samples_keep_their_places() -> None:
    """Whatever is appended and dropped, in whatever order."""
    chance = random.Random(11)
    everything = np.arange(3_000_000, dtype=np.float32)
    held = Held(0)
    while held.end < len(everything):
        held.append(everything[held.end : held.end + chance.choice([0, 1, 512, 32_000, 200_000])])
        start = chance.randint(held.start, held.end)
        assert np.array_equal(held.between(start, held.end), everything[start : held.end])
        if chance.random() < 0.6:
            held.drop(start)
    assert len(held._buffer) < len(everything)
