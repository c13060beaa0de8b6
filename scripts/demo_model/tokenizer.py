"""The tokenizer of the demo model: byte-level BPE in which every word of the grammar is one token.

Owns the layout of the token ids that faster-whisper and CTranslate2 expect: text below ``<|endoftext|>``, then the
special tokens, then ``<|notimestamps|>`` and straight after it the 1501 timestamps from 0 to 30 s.
The order of ids follows from ``grammar.VOCABULARY`` alone, so building it again gives the same file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .grammar import VOCABULARY

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|en|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
TIMESTAMPS = 1501
TIMESTAMP_STEP = 0.02


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=5000,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator([f" {word}" for word in VOCABULARY], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    timestamps = [f"<|{index * TIMESTAMP_STEP:.2f}|>" for index in range(TIMESTAMPS)]
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in timestamps])
    return tokenizer


@dataclass(frozen=True)
class Ids:
    """The ids that training and export need by name."""

    end: int
    start: int
    previous: int
    no_speech: int
    no_timestamps: int
    space: int
    size: int

    def timestamp(self, seconds: float) -> int:
        return self.no_timestamps + 1 + round(min(max(seconds, 0.0), 30.0) / TIMESTAMP_STEP)


def ids_of(tokenizer: Tokenizer) -> Ids:
    ids = tokenizer.get_vocab()
    return Ids(
        end=ids["<|endoftext|>"],
        start=ids["<|startoftranscript|>"],
        previous=ids["<|startofprev|>"],
        no_speech=ids["<|nospeech|>"],
        no_timestamps=ids["<|notimestamps|>"],
        space=ids["Ġ"],
        size=tokenizer.get_vocab_size(),
    )


def load(path: Path) -> Tokenizer:
    return Tokenizer.from_file(str(path))
