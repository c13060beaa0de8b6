"""One window through the model: the same text as faster-whisper's own, for half the encoding."""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from typing import Any

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from faster_whisper import WhisperModel
from faster_whisper.audio import decode_audio

from whisperd.engine.speech import WindowAudio
from whisperd.engine.transcript import Language, WindowDecoding
from whisperd.vocabulary import JobOptions

CLIPS = ("meeting.wav", "stereo.wav", "memory.opus", "call.mp3", "price.ogg")


@pytest.fixture(scope="module")
def whisper() -> Any:
    with as_file(files("whisperd").joinpath("share", "demo_model")) as path:
        return WhisperModel(str(path), device="cpu", compute_type="int8", cpu_threads=1)


def window(name: str) -> WindowAudio:
    with as_file(files("whisperd").joinpath("share", "clips", name)) as path:
        samples = decode_audio(str(path))
    return WindowAudio(number=0, start_s=0.0, end_s=len(samples) / 16000, samples=samples)


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("words", [False, True])
def test_a_window_equals_faster_whisper(whisper: Any, name: str, words: bool) -> None:
    """Text, times and figures of a window are those of `WhisperModel.transcribe` on the same samples with the same options."""
    audio = window(name)
    options = JobOptions(language="en", word_timestamps=words, temperatures=(0.0,))
    ours = list(WindowDecoding(whisper, audio, options, None))
    theirs, _ = whisper.transcribe(
        audio.samples, language="en", temperature=[0.0], word_timestamps=words, condition_on_previous_text=False, vad_filter=False
    )
    expected = [(segment.text.strip(), round(segment.start, 3), round(segment.avg_logprob, 4)) for segment in theirs]
    assert [(segment.text, segment.start_s, segment.avg_logprob) for segment in ours] == expected
    assert all(bool(segment.words) == words for segment in ours)


def test_a_window_is_encoded_once(whisper: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the language comes about, one window that ends with its speech costs one run of the encoder."""
    runs: list[int] = []
    encode = whisper.encode

    def counted(features: Any) -> Any:
        runs.append(features.shape[-1])
        return encode(features)

    monkeypatch.setattr(whisper, "encode", counted)
    for known in (None, Language("en", 0.9)):
        runs.clear()
        decoding = WindowDecoding(whisper, window("meeting.wav"), JobOptions(language="auto", temperatures=(0.0,)), known)
        assert list(decoding)
        assert runs == [3000]
        assert decoding.language == (known or Language("en", 1.0))
