"""Compose training windows: several utterances of the corpus with pauses, as a recording would have them.

Owns what a window may be: where utterances lie, which pauses, levels, noises, telephone and band limits they get, and
which tokens a Whisper decoder should say for it. All of it follows from the seed of the composer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from . import speech
from .features import HOP, log_mel
from .tokenizer import Ids, ids_of

NO_TARGET = -100


@dataclass(frozen=True)
class Placed:
    """An utterance in a window, in seconds."""

    start: float
    end: float
    tokens: list[int]
    letters: list[int]


@dataclass
class Window:
    wave: speech.Waveform
    said: list[Placed]
    cut_start: float | None = None  # an utterance that starts here does not end within the window


@dataclass(frozen=True)
class Batch:
    mel: Tensor
    tokens: Tensor
    targets: Tensor
    letters: Tensor
    letter_counts: Tensor
    offset: int = 0


def letters_of(text: str) -> list[int]:
    return [26 if letter == " " else ord(letter) - ord("a") for letter in text] + [26]


class Composer:
    def __init__(self, corpus: Path, tokenizer: Tokenizer, seed: int) -> None:
        self.source = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.ids: Ids = ids_of(tokenizer)
        self.index = json.loads((corpus / "index.json").read_text())
        self.audio = np.memmap(corpus / "audio.i16", np.int16, "r")
        for entry in self.index:
            entry["tokens"] = tokenizer.encode(" " + entry["text"]).ids
            entry["letters"] = letters_of(entry["text"])
        self.shortest_first = sorted(range(len(self.index)), key=lambda row: int(self.index[row]["length"]))

    # -- where things lie

    def _pause(self) -> float:
        kind = self.source.random()
        if kind < 0.65:
            return self.source.uniform(0.2, 1.3)
        if kind < 0.88:
            return self.source.uniform(0.03, 0.3)
        return self.source.uniform(1.3, 3.0)

    def _lead(self) -> float:
        return self.source.uniform(0.5, 3.0) if self.source.random() < 0.12 else self.source.uniform(0.0, 0.5)

    def _wave_of(self, entry: dict[str, int]) -> speech.Waveform:
        samples = self.audio[entry["start"] : entry["start"] + entry["length"]]
        return np.asarray(samples, np.float32) / np.float32(32768)

    def _speech(self, longest: int) -> Window:
        """Utterances one after another, until ``longest`` samples are full; at least one."""
        draw = self.source
        limit = longest if draw.random() < 0.6 else draw.randint(3 * speech.RATE // 2, longest)
        wave = np.zeros(longest, np.float32)
        window = Window(wave, [])
        uneven = draw.random() < 0.5
        position = int(self._lead() * speech.RATE)
        while True:
            entry = draw.choice(self.index)
            if not window.said and position + entry["length"] > limit:
                position = 0
                entry = self.index[self.shortest_first[draw.randrange(len(self.index) // 8)]]
            level = 10 ** (draw.uniform(-9, 0) / 20) if uneven else 1.0
            sound = self._wave_of(entry)
            end = position + len(sound)
            if end > limit and window.said:
                self._maybe_cut(window, sound * level, position)
                break
            end = min(end, longest)
            wave[position:end] += sound[: end - position] * level
            rate = speech.RATE
            window.said.append(Placed(position / rate, end / rate, entry["tokens"], entry["letters"]))
            position = end + int(self._pause() * rate)
        tail = int(draw.uniform(0.05, 0.5) * speech.RATE)
        last = longest if window.cut_start is not None else round(window.said[-1].end * speech.RATE) + tail
        window.wave = wave[: min(last, longest)]
        return window

    def _maybe_cut(self, window: Window, sound: speech.Waveform, position: int) -> None:
        """Now and then let a long window end in the middle of an utterance, as a cut by the clock does."""
        room = len(window.wave) - position
        if len(window.wave) < 25 * speech.RATE or room < speech.RATE // 3 or room > len(sound):
            return
        if self.source.random() < 0.15:
            window.wave[position:] += sound[:room]
            window.cut_start = position / speech.RATE

    # -- what happens to the sound

    def _channel(self, wave: speech.Waveform) -> speech.Waveform:
        kind = self.source.random()
        if kind < 0.18:
            return speech.over_telephone(wave)
        if kind < 0.35:
            return speech.band_limited(wave, 0, self.source.uniform(2800, 7500))
        return wave

    def _noisy(self, wave: speech.Waveform) -> speech.Waveform:
        if self.source.random() < 0.4:
            return wave
        colour = self.source.choice([1, 1, 2, 4, 8])
        return speech.with_noise(wave, self.numbers, self.source.uniform(12, 50), colour)

    def _finished(self, wave: speech.Waveform) -> speech.Waveform:
        gain = 10 ** (self.source.uniform(-20, 0) / 20)
        return self._channel(self._noisy(wave)) * np.float32(gain)

    def _nothing(self, longest: int) -> Window:
        """No speech: digital silence, noise, a hum or a tone."""
        draw = self.source
        length = draw.randint(longest // 8, longest)
        kind, wave = draw.random(), np.zeros(length, np.float32)
        if kind > 0.3:
            wave += speech.noise(self.numbers, length, draw.choice([1, 1, 2, 4, 16])) * 10 ** draw.uniform(-4, -1)
        if kind > 0.7 or kind < 0.15:
            time = np.arange(length, dtype=np.float32) / speech.RATE
            wave += 10 ** draw.uniform(-3, -0.5) * np.sin(2 * np.pi * draw.uniform(50, 4000) * time)
        return Window(self._channel(wave) if draw.random() < 0.2 else wave, [])

    # -- what the decoder should say

    def _prompt(self, timed: bool) -> list[int]:
        """Text as it may stand before a window (``<|startofprev|>``), of at most 223 tokens."""
        length, tokens, time = self.source.choice([5, 20, 60, 200]), list[int](), 0.0
        while len(tokens) < length:
            entry = self.source.choice(self.index)
            words, seconds = entry["tokens"], entry["length"] / speech.RATE
            if timed:
                words = [self.ids.timestamp(time), *words, self.ids.timestamp(time + seconds)]
                time = (time + seconds + 0.5) % 27
            tokens += words
        return [self.ids.previous, *tokens[-length:]]

    def _tokens(self, window: Window, timed: bool) -> tuple[list[int], list[int]]:
        """Decoder input and targets."""
        ids = self.ids
        if not window.said:
            return ([ids.start, ids.timestamp(0) if timed else ids.no_timestamps], [ids.no_speech, ids.end])
        body = []
        for position, placed in enumerate(window.said):
            start = min(placed.start, 1.0) if position == 0 else placed.start
            before, after = [ids.timestamp(start)], [ids.timestamp(placed.end)]
            body += before + placed.tokens + after if timed else placed.tokens
        if timed and window.cut_start is not None:
            body.append(ids.timestamp(window.cut_start))
        head = self._prompt(self.source.random() < 0.8) if self.source.random() < 0.08 else []
        head += [ids.start] if timed else [ids.start, ids.no_timestamps]
        full = [*head, *body, ids.end]
        return full[:-1][:448], ([NO_TARGET] * (len(head) - 1) + full[len(head) :])[:448]

    # -- batches

    def window(self, longest: int) -> Window:
        if self.source.random() < 0.04:
            return self._nothing(longest)
        window = self._speech(longest)
        window.wave = self._finished(window.wave)
        return window

    def _batch(self, windows: list[Window], timed: list[bool], frames: int, offset: int = 0) -> Batch:
        waves = torch.zeros(len(windows), frames * HOP)
        for row, window in enumerate(windows):
            waves[row, : len(window.wave)] = torch.from_numpy(window.wave)
        pairs = [self._tokens(window, flag) for window, flag in zip(windows, timed, strict=True)]
        length = max(len(tokens) for tokens, _ in pairs)
        tokens = torch.full((len(windows), length), self.ids.end)
        targets = torch.full((len(windows), length), NO_TARGET)
        for row, (inputs, wanted) in enumerate(pairs):
            tokens[row, : len(inputs)] = torch.tensor(inputs)
            targets[row, : len(wanted)] = torch.tensor(wanted)
        letters = [[letter for placed in window.said for letter in placed.letters] for window in windows]
        return Batch(
            mel=log_mel(waves, [len(window.wave) for window in windows], frames),
            tokens=tokens,
            targets=targets,
            letters=torch.tensor([letter for row in letters for letter in row] or [0]),
            letter_counts=torch.tensor([len(row) for row in letters]),
            offset=offset,
        )

    def batch(self, size: int, seconds: float, timed_share: float = 0.85) -> Batch:
        """Windows of up to ``seconds``; most of them are to be decoded with timestamps."""
        longest = int(seconds * speech.RATE)
        windows = [self.window(longest) for _ in range(size)]
        timed = [self.source.random() < timed_share for _ in windows]
        return self._batch(windows, timed, int(seconds * 100))

    def short_batch(self, size: int) -> Batch:
        """For a network that knows nothing yet: one or two utterances, without timestamps at any of the positions."""
        seconds = self.source.choice([2, 3, 4])
        windows = [self.window(seconds * speech.RATE) for _ in range(size)]
        timed = self.source.random() < 0.5
        offset = 0 if timed else self.source.randint(0, 1500 - seconds * 50)
        return self._batch(windows, [timed] * size, seconds * 100, offset)
