"""Log-mel features: those of faster-whisper, whole and in pieces."""

from __future__ import annotations

import random

import numpy as np
import pytest
from faster_whisper.feature_extractor import FeatureExtractor
from recordings import SENTENCES, Studio, samples_of

from whisperd.engine.audio import RATE_HZ
from whisperd.engine.mel import FLOOR, LogMel, MelStream, normalised

CLOSE = 1e-6  # a few frames at the end may go through another kernel of the BLAS


@pytest.fixture(scope="module")
def talk(studio: Studio) -> np.ndarray:
    """Twenty-odd seconds of speech with pauses of digital silence."""
    return np.frombuffer(samples_of(studio.long(SENTENCES[:8])), dtype=np.int16).astype(np.float32) / 32768.0


def noise(seconds: float) -> np.ndarray:
    return (np.random.default_rng(7).standard_normal(int(seconds * RATE_HZ)) * 0.1).astype(np.float32)


@pytest.mark.parametrize("n_mels", [80, 128])
@pytest.mark.parametrize("length", [0, 1, 39, 40, 41, 160, 199, 200, 201, 401, 8000, 8001, 16_159, 16_160, 300_000])
def test_features_are_those_of_faster_whisper(n_mels: int, length: int, talk: np.ndarray) -> None:
    """For any length, down to nothing, and for both widths that models have: same shape, same values."""
    samples = talk[3000 : 3000 + length]
    expected = FeatureExtractor(n_mels)(samples)
    found = LogMel(n_mels)(samples)
    assert found.dtype == np.float32 and found.shape == expected.shape and found.flags.c_contiguous
    assert np.abs(found - expected).max() <= CLOSE


def test_a_window_has_the_same_bits(talk: np.ndarray) -> None:
    """An int8 encoder now and then makes another word of a difference of 1e-7, so there is none."""
    samples = talk[: 20 * RATE_HZ + 37]
    found, expected = LogMel(80)(samples), FeatureExtractor(80)(samples)
    assert np.mean(found != expected) < 1e-3


@pytest.mark.parametrize("loudness", [1.0, 1e-4])
def test_loud_and_faint_sounds_are_alike(loudness: float, talk: np.ndarray) -> None:
    """Noise on top of speech, as loud as it gets and hardly there."""
    samples = np.clip(talk * loudness + loudness * noise(len(talk) / RATE_HZ)[: len(talk)], -1, 1)
    assert np.abs(LogMel(80)(samples) - FeatureExtractor(80)(samples)).max() <= CLOSE


@pytest.mark.parametrize("seed", range(4))
def test_pieces_are_the_whole(seed: int, talk: np.ndarray) -> None:
    """A recording in blocks of any size: the frames of all, normalised by the peak of all, are the features of the whole."""
    chance = random.Random(seed)
    samples = talk[: chance.randrange(len(talk))]
    log_mel = LogMel(80)
    stream, pieces, place = MelStream(log_mel), [], 0
    while place < len(samples):
        block = samples[place : place + chance.choice([0, 1, 37, 160, 399, 5000, 40_000])]
        pieces.append(stream.feed(block))
        place += len(block)
    found = np.concatenate([*pieces, stream.end()], axis=1)
    expected = FeatureExtractor(80)(samples)
    assert found.shape == expected.shape and stream.peak == found.max()
    assert np.abs(normalised(found, stream.peak) - expected).max() <= CLOSE


@pytest.mark.parametrize("length", [0, 1, 150, 200, 201, 399, 400, 401, 800])
def test_a_moment_in_pieces_is_a_moment(length: int, talk: np.ndarray) -> None:
    """Where the mirrored beginning and the end meet in one frame."""
    samples = talk[4000 : 4000 + length]
    stream = MelStream(LogMel(80))
    pieces = [stream.feed(samples[place : place + 37]) for place in range(0, length, 37)]
    found = np.concatenate([*pieces, stream.end()], axis=1)
    expected = FeatureExtractor(80)(samples)
    assert found.shape == expected.shape
    assert np.abs(normalised(found, stream.peak) - expected).max() <= CLOSE


def test_a_stream_holds_next_to_nothing() -> None:
    """What was given out is not kept: half an hour goes through with less than a block in hand."""
    stream, block = MelStream(LogMel(80)), noise(2.0)
    frames = 0
    for _ in range(900):
        frames += stream.feed(block).shape[1]
        assert len(stream._held) < 600
    assert frames + stream.end().shape[1] == 1800 * 100 + 1


def test_silence_is_the_floor() -> None:
    """Nothing is not minus infinity."""
    stream = MelStream(LogMel(80))
    assert stream.feed(np.zeros(16_000, dtype=np.float32)).max() == pytest.approx(np.log10(FLOOR)) == pytest.approx(stream.peak)
