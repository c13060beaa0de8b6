"""Make the training corpus: spoken sentences as one flat file of samples and an index.

    python -m scripts.demo_model.corpus --out /tmp/demo_model/corpus --utterances 30000

Owns ``audio.i16`` (16 kHz samples, one utterance after another) and ``index.json`` (text, voice, start, length,
codec). Four fifths of the utterances are in the main voices; a third has been through a codec or a narrow mp3/opus
before being stored. Sentences of the held-out share never get in (grammar.py).
A run that is broken off leaves nothing: both files are renamed into place at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import speech
from .grammar import training_sentence

GROUP = 40  # utterances that go through one codec together


@dataclass
class Utterance:
    text: str
    voice: str
    speed: int
    pitch: int
    codec: str
    start: int = 0
    length: int = 0


def _voice(source: random.Random) -> speech.Voice:
    return speech.main_voice(source) if source.random() < 0.8 else speech.other_voice(source)


def _through_one_codec(waves: list[speech.Waveform], source: random.Random) -> tuple[list[speech.Waveform], str]:
    """All waves through one encoder in one go, with pauses between them so that they do not smear."""
    codec = source.choice(["mp3", "mp3", "opus", "opus", "vorbis", "aac"])
    kilobits = source.choice([16, 24, 24, 32] if codec in ("mp3", "opus") else [32, 48])
    rate = source.choice([16000, 22050]) if codec == "mp3" else 16000
    pause = speech.silence(0.1)
    joined = np.concatenate([part for wave in waves for part in (wave, pause)])
    coded = speech.through_codec(joined, codec, kilobits, rate)
    parts: list[speech.Waveform] = []
    position = 0
    for wave in waves:
        parts.append(coded[position : position + len(wave)])
        position += len(wave) + len(pause)
    return parts, f"{codec}-{kilobits}-{rate}"


def spoken_group(seed: int) -> list[tuple[Utterance, NDArray[np.int16]]]:
    source = random.Random(seed)
    utterances: list[Utterance] = []
    waves: list[speech.Waveform] = []
    while len(waves) < GROUP:
        text, voice = training_sentence(source), _voice(source)
        wave = speech.say(text, voice)
        if len(wave) > speech.RATE // 10:
            utterances.append(Utterance(text, voice.name, voice.speed, voice.pitch, ""))
            waves.append(wave)
    if source.random() < 1 / 3:
        waves, label = _through_one_codec(waves, source)
        for utterance in utterances:
            utterance.codec = label
    return [(utterance, (np.clip(wave, -1, 1) * 32767).astype(np.int16)) for utterance, wave in zip(utterances, waves, strict=True)]


def _groups(utterances: int, seed: int, processes: int) -> Iterator[list[tuple[Utterance, NDArray[np.int16]]]]:
    seeds = range(seed * 1_000_000, seed * 1_000_000 + -(-utterances // GROUP))
    with Pool(processes) as pool:
        yield from pool.imap(spoken_group, seeds, chunksize=4)


def make(out: Path, utterances: int, seed: int, processes: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    index, position, began = [], 0, time.monotonic()
    with open(out / "audio.i16.part", "wb") as audio:
        for group in _groups(utterances, seed, processes):
            for utterance, samples in group:
                utterance.start, utterance.length = position, len(samples)
                position += len(samples)
                audio.write(samples.tobytes())
                index.append(asdict(utterance))
    (out / "index.json.part").write_text(json.dumps(index))
    for name in ("audio.i16", "index.json"):
        os.replace(out / f"{name}.part", out / name)
    hours = position / speech.RATE / 3600
    print(f"{len(index)} utterances, {hours:.1f} h of speech, made in {time.monotonic() - began:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--utterances", type=int, default=30000)
    parser.add_argument("--seed", type=int, default=31)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    make(arguments.out, arguments.utterances, arguments.seed, arguments.processes)


if __name__ == "__main__":
    main()
