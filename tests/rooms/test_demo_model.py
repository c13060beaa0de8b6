"""The shipped demo model: it loads, it is small, it keeps silent on silence and it hears its own language.

Real speech from espeak-ng, real faster-whisper, no fakes. The sentences are drawn by seed from the share that training
never saw (scripts/demo_model/grammar.py); the bounds leave room above the figures in the model card.
"""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from faster_whisper import WhisperModel

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "whisperd" / "share" / "demo_model"
CLIPS = ROOT / "whisperd" / "share" / "clips"

# Highest word error rates; the measured ones stand in the model card.
SENTENCES = 0.06
RECORDING = 0.10
CLIPS_TOGETHER = 0.02

needs_espeak = pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")


@pytest.fixture(scope="module")
def model() -> WhisperModel:
    faster_whisper = pytest.importorskip("faster_whisper", reason="faster-whisper is not installed")
    return faster_whisper.WhisperModel(str(MODEL), device="cpu", compute_type="int8", cpu_threads=2)


@pytest.fixture
def evaluate(monkeypatch: pytest.MonkeyPatch):
    """The measuring script; it lies outside the package."""
    pytest.importorskip("scipy", reason="scipy is not installed; the measuring script needs it")
    monkeypatch.syspath_prepend(str(ROOT))
    from scripts.demo_model import evaluate

    return evaluate


def test_it_is_small_enough_to_ship() -> None:
    files = [path for path in MODEL.iterdir() if path.suffix in {".bin", ".json"}]
    assert {path.name for path in files} == {
        "config.json",
        "model.bin",
        "preprocessor_config.json",
        "tokenizer.json",
        "vocabulary.json",
    }
    assert sum(path.stat().st_size for path in files) <= 6_000_000


def test_it_says_nothing_where_nobody_speaks(model: WhisperModel, evaluate) -> None:
    transcribe = evaluate.whole(model)
    heard = {name: transcribe(wave) for name, wave in evaluate.quiet_sounds().items()}
    assert {name: [] for name in heard} == heard


@needs_espeak
def test_held_out_sentences_in_the_main_voices(model: WhisperModel, evaluate) -> None:
    parts = evaluate.items(30, 7, evaluate.speech.main_voice)
    score = evaluate.score_of(parts, evaluate.whole(model), evaluate.same)
    assert score.rate <= SENTENCES, score


@needs_espeak
def test_time_stamps_lie_on_the_speech(model: WhisperModel, evaluate) -> None:
    parts = evaluate.items(8, 8, evaluate.speech.main_voice)
    transcribe = evaluate.whole(model)
    for part in parts:
        heard = transcribe(part.wave)
        assert heard, part.text
        assert abs(heard[0].start - part.start) <= 0.5, part.text
        assert abs(heard[-1].end - part.end) <= 0.5, part.text


@needs_espeak
def test_a_recording_of_many_utterances(model: WhisperModel, evaluate) -> None:
    parts = evaluate.items(20, 9, evaluate.speech.main_voice)
    recording, _ = evaluate.joined(parts, 9)
    heard = evaluate.windowed(model, 30)(recording)
    score = evaluate.Score()
    score.add(" ".join(part.text for part in parts), " ".join(each.text for each in heard))
    assert score.rate <= RECORDING, score


def test_the_sample_clips_say_what_their_list_says(model: WhisperModel, evaluate) -> None:
    from faster_whisper import decode_audio

    with open(CLIPS / "clips.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {path.name for path in CLIPS.iterdir() if path.suffix not in {".csv", ".md"}}
    score = evaluate.Score()
    for row in rows:
        heard = evaluate.whole(model)(decode_audio(str(CLIPS / row["file"])))
        score.add(row["text"], " ".join(each.text for each in heard))
    assert score.rate <= CLIPS_TOGETHER, score
