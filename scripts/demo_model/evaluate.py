"""Measure the demo model: word error rates by voice, on long recordings, through codecs, and on silence.

    python -m scripts.demo_model.evaluate --model whisperd/share/demo_model            # about 5 minutes on two cores
    python -m scripts.demo_model.evaluate --model DIR --quick                          # a tenth of it
    python -m scripts.demo_model.evaluate --model DIR --json figures.json

Sentences are held out of training (grammar.py), drawn by seed, never picked. Words are compared in lower case without
punctuation. Everything goes through faster-whisper as the daemon uses it: int8 on the CPU, beam 5, windows of at most
30 s cut where Silero hears no speech. Owns nothing but what it prints.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import numpy as np
from faster_whisper import WhisperModel
from faster_whisper.vad import VadOptions, get_speech_timestamps

from . import speech
from .grammar import held_out_sentence

RATE = speech.RATE
Transcriber = Callable[[speech.Waveform], list["Heard"]]


@dataclass(frozen=True)
class Heard:
    start: float
    end: float
    text: str


@dataclass(frozen=True)
class Item:
    """One utterance to measure, with the time at which its sound starts and ends."""

    wave: speech.Waveform
    text: str
    voice: speech.Voice
    start: float
    end: float


@dataclass
class Score:
    """Words wrong, words said; adds up over utterances."""

    errors: int = 0
    words: int = 0
    exact: int = 0
    items: int = 0

    def add(self, said: str, heard: str) -> None:
        reference, found = normal(said), normal(heard)
        wrong = edits(reference, found)
        self.errors += wrong
        self.words += len(reference)
        self.exact += wrong == 0
        self.items += 1

    @property
    def rate(self) -> float:
        return self.errors / max(1, self.words)

    def __str__(self) -> str:
        return f"WER {self.rate:6.2%}  ({self.errors} of {self.words} words, {self.exact} of {self.items} items exact)"


def normal(text: str) -> list[str]:
    return re.sub(r"[^a-z0-9' ]+", " ", text.lower()).split()


def edits(reference: list[str], found: list[str]) -> int:
    """Fewest insertions, deletions and substitutions (Levenshtein) from one list of words to the other."""
    row = list(range(len(found) + 1))
    for number, word in enumerate(reference, 1):
        above, row[0] = row[0], number
        for column, other in enumerate(found, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (word != other))
    return row[-1]


# -- what is measured


def item(text: str, voice: speech.Voice, source: random.Random) -> Item:
    """The sentence as a small recording: short silence around it, some level, in three of five cases some noise."""
    sound = speech.say(text, voice)
    lead, tail = speech.silence(source.uniform(0, 0.3)), speech.silence(source.uniform(0.05, 0.4))
    wave = np.concatenate([lead, sound, tail]) * np.float32(source.uniform(0.17, 1.0))
    if source.random() < 0.6:
        numbers = np.random.default_rng(source.randrange(1 << 30))
        wave = speech.with_noise(wave, numbers, source.uniform(12, 45), source.choice([1, 1, 2, 4, 8]))
    return Item(wave, text, voice, len(lead) / RATE, (len(lead) + len(sound)) / RATE)


def items(count: int, seed: int, voice: Callable[[random.Random], speech.Voice]) -> list[Item]:
    source = random.Random(seed)
    return [item(held_out_sentence(source), voice(source), source) for _ in range(count)]


def joined(parts: list[Item], seed: int) -> tuple[speech.Waveform, list[tuple[float, float]]]:
    """All of them in one recording with pauses of 0.3 to 1.2 s, and where each of them lies in it."""
    source = random.Random(seed)
    pieces: list[speech.Waveform] = []
    times, position = [], 0
    for part in parts:
        gap = speech.silence(source.uniform(0.3, 1.2))
        position += len(gap)
        times.append((position / RATE + part.start, position / RATE + part.end))
        pieces += [gap, part.wave]
        position += len(part.wave)
    return np.concatenate(pieces), times


# -- how it is transcribed


def whole(model: WhisperModel) -> Transcriber:
    def transcribe(wave: speech.Waveform) -> list[Heard]:
        segments, _ = model.transcribe(wave, language="en", beam_size=5, condition_on_previous_text=False, vad_filter=False)
        return [Heard(segment.start, segment.end, segment.text.strip()) for segment in segments]

    return transcribe


def windows(wave: speech.Waveform, longest: float, pad: float = 0.3) -> Iterator[tuple[int, int]]:
    """Stretches of at most ``longest`` seconds from the start of a speech chunk to the end of the last that fits."""
    options = VadOptions(min_silence_duration_ms=300, speech_pad_ms=0, max_speech_duration_s=longest - 2 * pad)
    chunks = [(chunk["start"], chunk["end"]) for chunk in get_speech_timestamps(wave, options)]
    padding, first = int(pad * RATE), 0
    while first < len(chunks):
        last = first
        while last + 1 < len(chunks) and chunks[last + 1][1] - chunks[first][0] + 2 * padding <= longest * RATE:
            last += 1
        yield max(0, chunks[first][0] - padding), min(len(wave), chunks[last][1] + padding)
        first = last + 1


def windowed(model: WhisperModel, longest: float) -> Transcriber:
    inner = whole(model)

    def transcribe(wave: speech.Waveform) -> list[Heard]:
        heard = []
        for start, end in windows(wave, longest):
            offset = start / RATE
            heard += [Heard(h.start + offset, h.end + offset, h.text) for h in inner(wave[start:end])]
        return heard

    return transcribe


# -- the measures


class Report:
    """Prints each figure as it comes and keeps it for --json."""

    def __init__(self) -> None:
        self.figures: dict[str, float | int | str] = {}

    def line(self, name: str, score: Score, note: str = "") -> None:
        self.figures[name] = round(score.rate, 5)
        print(f"{name:44} {score}{note}", flush=True)

    def fact(self, name: str, value: float | int | str) -> None:
        self.figures[name] = value
        print(f"{name:44} {value}", flush=True)


def score_of(parts: list[Item], transcribe: Transcriber, change: Callable[[speech.Waveform], speech.Waveform]) -> Score:
    score = Score()
    for part in parts:
        score.add(part.text, " ".join(heard.text for heard in transcribe(change(part.wave))))
    return score


def same(wave: speech.Waveform) -> speech.Waveform:
    return wave


def main_voices(model: WhisperModel, report: Report, count: int, seed: int, verbose: bool) -> None:
    """By accent and by variant, and how far the first and last time stamps are off."""
    transcribe, total = whole(model), Score()
    groups: dict[str, Score] = {}
    starts, ends = [], []
    for part in items(count, seed + 101, speech.main_voice):
        heard = transcribe(part.wave)
        text = " ".join(each.text for each in heard)
        accent, _, variant = part.voice.name.partition("+")
        size = "four words and more" if len(part.text.split()) > 3 else "up to three words (may be in training)"
        total.add(part.text, text)
        for name in (accent, f"variant {variant or 'none'}", size):
            groups.setdefault(name, Score()).add(part.text, text)
        if heard:
            starts.append(abs(heard[0].start - part.start))
            ends.append(abs(heard[-1].end - part.end))
        if verbose and normal(text) != part.text.split():
            print(f"    {part.voice.name} said: {part.text} | heard: {text}")
    report.line("main voices", total)
    for name in sorted(groups):
        report.line(f"  {name}", groups[name])
    report.fact("start of the text off by, median s", round(statistics.median(starts), 3))
    report.fact("end of the text off by, median s", round(statistics.median(ends), 3))


def long_recordings(model: WhisperModel, report: Report, recordings: int, first_seed: int) -> None:
    """Forty utterances with pauses, in windows of 30, 20 and 15 s; then with noise under all of it, and in codecs."""
    made = []
    for seed in range(first_seed, first_seed + recordings):
        parts = items(40, 200 + seed, speech.main_voice)
        wave, times = joined(parts, 300 + seed)
        made.append((wave, times, " ".join(part.text for part in parts)))
    report.fact("long recordings, s each", str([round(len(wave) / RATE) for wave, _, _ in made]))
    for longest in (30, 20, 15):
        score, off = Score(), list[float]()
        for wave, times, text in made:
            heard = windowed(model, longest)(wave)
            score.add(text, " ".join(each.text for each in heard))
            off += [min(abs(each.start - start) for start, _ in times) for each in heard]
        nearest = f"  starts off by {statistics.median(off or [99]):.2f} s (median)"
        report.line(f"long, windows of {longest} s", score, nearest)
    changes: dict[str, Callable[[speech.Waveform], speech.Waveform]] = {
        "white noise 25 dB below": lambda wave: speech.with_noise(wave, np.random.default_rng(5), 25),
        "opus 16 kb/s": lambda wave: speech.through_codec(wave, "opus", 16),
        "mp3 24 kb/s": lambda wave: speech.through_codec(wave, "mp3", 24),
        "telephone": speech.over_telephone,
    }
    for name, change in changes.items():
        score = Score()
        for wave, _, text in made:
            score.add(text, " ".join(each.text for each in windowed(model, 30)(change(wave))))
        report.line(f"long, windows of 30 s, {name}", score)


def codecs(model: WhisperModel, report: Report, count: int, seed: int) -> None:
    parts, transcribe = items(count, seed + 104, speech.main_voice), whole(model)
    report.line("through nothing", score_of(parts, transcribe, same))
    report.line("through opus 16 kb/s", score_of(parts, transcribe, lambda w: speech.through_codec(w, "opus", 16)))
    report.line("through mp3 24 kb/s", score_of(parts, transcribe, lambda w: speech.through_codec(w, "mp3", 24)))
    report.line("through telephone (mu-law, 300-3400 Hz)", score_of(parts, transcribe, speech.over_telephone))


def quiet_sounds() -> dict[str, speech.Waveform]:
    numbers = np.random.default_rng(0)
    clock = np.arange(10 * RATE, dtype=np.float32) / RATE
    return {
        "digital silence 10 s": speech.silence(10),
        "digital silence 60 s": speech.silence(60),
        "white noise 0.02": 0.02 * speech.noise(numbers, 10 * RATE),
        "soft noise 0.05": 0.05 * speech.noise(numbers, 10 * RATE, 8),
        "tone 440 Hz": (0.2 * np.sin(2 * np.pi * 440 * clock)).astype(np.float32),
        "hum 50 Hz": (0.1 * np.sin(2 * np.pi * 50 * clock)).astype(np.float32),
    }


def nothing_said(model: WhisperModel, report: Report) -> None:
    for name, wave in quiet_sounds().items():
        report.fact(f"segments in {name}", len(whole(model)(wave)))


def measure(model: WhisperModel, report: Report, scale: float, seed: int, verbose: bool) -> None:
    def count(full: int) -> int:
        return max(10, round(full * scale))

    main_voices(model, report, count(500), seed, verbose)
    others = (
        items(count(100), seed + 102, speech.other_voice),
        items(count(100), seed + 103, speech.unheard_voice),
    )
    report.line("other accents and variants, rare in training", score_of(others[0], whole(model), same))
    report.line("variants never trained on", score_of(others[1], whole(model), same))
    codecs(model, report, count(100), seed)
    long_recordings(model, report, max(1, round(3 * scale)), seed)
    nothing_said(model, report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a tenth of the utterances, one long recording")
    parser.add_argument("--verbose", action="store_true", help="show each wrong utterance of the main voices")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other sentences, voices and noises")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    model = WhisperModel(str(arguments.model), device="cpu", compute_type="int8", cpu_threads=arguments.threads)
    report, began = Report(), time.monotonic()
    size = sum(path.stat().st_size for path in arguments.model.glob("*.*") if path.suffix in (".bin", ".json"))
    report.fact("size, MB", round(size / 1e6, 2))
    measure(model, report, 0.1 if arguments.quick else 1.0, arguments.seed, arguments.verbose)
    report.fact("measured in, s", round(time.monotonic() - began))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
