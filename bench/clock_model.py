"""clock_model: Whisper models of exact architecture and random weights whose output length is set by a clock.

Real weights cannot be shipped, and random ones decode for ever or not at all, so costs would mean nothing. Here the decoder's
position embeddings act as a clock: text until a set position, then an end timestamp, then end of text. The language is English, the
log-probability and the compression ratio are those of clean speech, so no peer falls back to higher temperatures. The text is made of
made-up words and does not depend on the audio: these models measure time, the embedded trained model measures text.

Owns: `weights` (numpy, float32, openai-whisper's names) and its writers: a CTranslate2 directory (float16, as published ones are), an
openai-whisper checkpoint, a whisper.cpp file. Needs no network and no transformers. Fails with OSError when the disk does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import struct
import sys
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Weights = dict[str, Array]

LANGUAGES = (  # in the order of their tokens
    "en zh de es ru ko fr ja pt tr pl ca nl ar sv it id hi fi vi he uk el ms cs ro da hu ta no th ur hr bg lt la mi ml cy sk "
    "te fa lv bn sr az sl kn et mk br eu is hy ne mn bs kk sq sw gl mr pa si km sn yo so af oc ka be tg sd gu am yi lo uz fo "
    "ht ps tk nn mt sa lb my bo tl mg as tt haw ln ha ba jw su"
)
TEXT_TOKENS = 50_257
END_OF_TEXT = TEXT_TOKENS
ENGLISH = END_OF_TEXT + 2
TIMESTAMPS = 1501
AUDIO_CONTEXT = 1500
TEXT_CONTEXT = 448
PROMPT = 3  # start of transcript, language, task
CLOCK_DIRECTIONS = 6  # the first dimensions carry the clock, the others random words


class Size(NamedTuple):
    """Dimensions of one published size."""

    width: int
    layers: int
    heads: int
    mels: int = 80
    languages: int = 99
    decoder_layers: int = 0  # as many as the encoder's when 0

    @property
    def first_timestamp(self) -> int:
        return END_OF_TEXT + 2 + self.languages + 6

    @property
    def vocabulary(self) -> int:
        return self.first_timestamp + TIMESTAMPS

    @property
    def text_layers(self) -> int:
        return self.decoder_layers or self.layers


SIZES = {
    "tiny": Size(384, 4, 6),
    "base": Size(512, 6, 8),
    "small": Size(768, 12, 12),
    "large-v3-turbo": Size(1280, 32, 20, mels=128, languages=100, decoder_layers=4),
}
DEFAULT_TOKENS = 24  # more in the shortest clip would be faster than anybody speaks, and be decoded again
"""Text tokens a window: about three for each second of a ten-second clip."""


# --- the vocabulary ------------------------------------------------------------------------------------------------------------


class Vocabulary(NamedTuple):
    """A byte-level BPE of Whisper's shape: 256 bytes, 50,000 merges into made-up words, the empty token, specials, timestamps."""

    text: list[str]
    merges: list[tuple[str, str]]
    special: list[str]
    timestamps: list[str]
    first_word: int  # text tokens from here on begin with a space

    @property
    def all(self) -> list[str]:
        return self.text + self.special + self.timestamps


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte in a byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(rest)}
    return [symbols[byte] for byte in range(256)]


def vocabulary(size: Size) -> Vocabulary:
    """Words of one to three syllables; every one is a merge of two earlier tokens, as in a trained vocabulary."""
    alphabet = byte_symbols()
    space = alphabet[ord(" ")]
    syllables = [consonant + vowel for consonant in "bcdfghjklmnpqrstvwxz" for vowel in "aeiou"]
    merges = [(syllable[0], syllable[1]) for syllable in syllables]
    merges += list(itertools.product(syllables, syllables))
    first_word = len(alphabet) + len(merges)
    merges += [(space, syllable) for syllable in syllables]
    merges += [(space + first, second) for first, second in itertools.product(syllables, syllables)]
    missing = TEXT_TOKENS - 1 - len(alphabet) - len(merges)
    long_words = ((space + first + second, third) for first, second, third in itertools.product(syllables, syllables, syllables))
    merges += list(itertools.islice(long_words, 0, missing * 7, 7))  # spread over the alphabet
    languages = [*LANGUAGES.split(), "yue"][: size.languages]
    return Vocabulary(
        text=[*alphabet, *(first + second for first, second in merges), ""],  # CTranslate2 knows multilingual models by the empty token
        merges=merges,
        special=[
            "<|endoftext|>",
            "<|startoftranscript|>",
            *(f"<|{language}|>" for language in languages),
            *(f"<|{name}|>" for name in ("translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps")),
        ],
        timestamps=[f"<|{number * 0.02:.2f}|>" for number in range(TIMESTAMPS)],
        first_word=first_word,
    )


# --- the weights ---------------------------------------------------------------------------------------------------------------


def weights(size: Size, tokens: int) -> Weights:
    """Random weights of this size that decode to `tokens` text tokens in every window."""
    random = np.random.default_rng(0)

    def draw(*shape: int, scale: float = 0.02) -> Array:
        return (random.standard_normal(shape, dtype=np.float32) * scale).astype(np.float32)

    width = size.width
    found: Weights = {
        "encoder.conv1.weight": draw(width, size.mels, 3, scale=1 / np.sqrt(3 * size.mels)),
        "encoder.conv1.bias": np.zeros(width, np.float32),
        "encoder.conv2.weight": draw(width, width, 3, scale=1 / np.sqrt(3 * width)),
        "encoder.conv2.bias": np.zeros(width, np.float32),
        "encoder.positional_embedding": sinusoids(AUDIO_CONTEXT, width),
        "decoder.positional_embedding": clock(size, tokens, draw(TEXT_CONTEXT, width, scale=6.0)),
        "decoder.token_embedding.weight": readings(size, draw(size.vocabulary, width, scale=0.6)),
    }
    for side, layers in (("encoder", size.layers), ("decoder", size.text_layers)):
        quiet = 0.002 if side == "decoder" else 0.02  # what the decoder's layers add must not drown the clock
        for number in range(layers):
            block = f"{side}.blocks.{number}"
            for attention in ("attn", "cross_attn") if side == "decoder" else ("attn",):
                found |= norm(f"{block}.{attention}_ln", width)
                for part in ("query", "key", "value", "out"):
                    scale = quiet if part == "out" else 0.02
                    found[f"{block}.{attention}.{part}.weight"] = draw(width, width, scale=scale)
                    if part != "key":
                        found[f"{block}.{attention}.{part}.bias"] = np.zeros(width, np.float32)
            found |= norm(f"{block}.mlp_ln", width)
            for name, rows, columns in (("mlp.0", 4 * width, width), ("mlp.2", width, 4 * width)):
                found[f"{block}.{name}.weight"] = draw(rows, columns, scale=quiet if name == "mlp.2" else 0.02)
                found[f"{block}.{name}.bias"] = np.zeros(rows, np.float32)
    return found | norm("encoder.ln_post", width) | norm("decoder.ln", width)


def clock(size: Size, tokens: int, positions: Array) -> Array:
    """Position embeddings that tell the time: a constant, the end timestamp's phase, the end of text's, the language's."""
    end = PROMPT + tokens  # the position at which the end timestamp is said
    positions[:, :CLOCK_DIRECTIONS] = 0
    positions[:, 0] = 60
    positions[end:, 1] = 60
    positions[end + 1 :, 2] = 120
    positions[0, 3] = 60
    return positions


def readings(size: Size, embeddings: Array) -> Array:
    """Token embeddings that read the clock; words that begin with a space are the likely text."""
    first_word = vocabulary(size).first_word
    embeddings[:, :CLOCK_DIRECTIONS] = 0
    embeddings[:first_word, 0] = -4
    embeddings[TEXT_TOKENS - 1 :, 0] = -4
    embeddings[size.first_timestamp, 0] = 0
    embeddings[size.first_timestamp + TIMESTAMPS - 1, 1] = 30  # <|30.00|>: one pass takes the whole window, whatever it holds
    embeddings[END_OF_TEXT, 2] = 30
    embeddings[ENGLISH, 3] = 10
    return embeddings


def norm(name: str, width: int) -> Weights:
    return {f"{name}.weight": np.ones(width, np.float32), f"{name}.bias": np.zeros(width, np.float32)}


def sinusoids(length: int, width: int) -> Array:
    """The encoder's fixed position embeddings."""
    rates = np.exp(-np.log(10_000) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(length)[:, None] * rates[None, :]
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


# --- writers -------------------------------------------------------------------------------------------------------------------


def write_ctranslate2(directory: str, size: Size, found: Weights) -> None:
    """A directory that faster-whisper, and so whisperd, loads: model.bin, config, vocabulary, tokenizer, preprocessor."""
    from ctranslate2.specs.whisper_spec import WhisperSpec

    words = vocabulary(size)
    spec: Any = WhisperSpec(size.layers, size.heads, size.text_layers, size.heads)
    _fill(spec, found)
    spec.register_vocabulary(words.all)
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [words.text.index(byte_symbols()[ord(" ")]), END_OF_TEXT]
    spec.config.lang_ids = [ENGLISH + number for number in range(size.languages)]
    spec.config.alignment_heads = [[size.text_layers - 1, head] for head in range(size.heads)]
    spec.validate()
    spec.optimize("float16")
    os.makedirs(directory)
    spec.save(directory)
    tokenizer(size).save(os.path.join(directory, "tokenizer.json"))
    with open(os.path.join(directory, "preprocessor_config.json"), "w", encoding="utf-8") as file:
        json.dump({"feature_size": size.mels, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}, file)


def _fill(spec: Any, found: Weights) -> None:
    for conv in ("conv1", "conv2"):
        _linear(getattr(spec.encoder, conv), found, [f"encoder.{conv}"])
    spec.encoder.position_encodings.encodings = found["encoder.positional_embedding"]
    spec.decoder.position_encodings.encodings = found["decoder.positional_embedding"]
    spec.decoder.embeddings.weight = found["decoder.token_embedding.weight"]
    spec.decoder.projection.weight = found["decoder.token_embedding.weight"]
    _norm(spec.encoder.layer_norm, found, "encoder.ln_post")
    _norm(spec.decoder.layer_norm, found, "decoder.ln")
    for side, layers in (("encoder", spec.encoder.layer), ("decoder", spec.decoder.layer)):
        for number, layer in enumerate(layers):
            block = f"{side}.blocks.{number}"
            _attention(layer.self_attention, found, f"{block}.attn", fused=[["query", "key", "value"]])
            if side == "decoder":
                _attention(layer.attention, found, f"{block}.cross_attn", fused=[["query"], ["key", "value"]])
            _norm(layer.ffn.layer_norm, found, f"{block}.mlp_ln")
            _linear(layer.ffn.linear_0, found, [f"{block}.mlp.0"])
            _linear(layer.ffn.linear_1, found, [f"{block}.mlp.2"])


def _attention(spec: Any, found: Weights, name: str, *, fused: list[list[str]]) -> None:
    _norm(spec.layer_norm, found, f"{name}_ln")
    for linear, parts in zip(spec.linear, [*fused, ["out"]], strict=True):
        _linear(linear, found, [f"{name}.{part}" for part in parts])


def _linear(spec: Any, found: Weights, names: list[str]) -> None:
    """Several layers as one; a layer without a bias (keys) counts as zeros."""
    parts = [found[f"{name}.weight"] for name in names]
    spec.weight = np.concatenate(parts)
    spec.bias = np.concatenate(
        [found.get(f"{name}.bias", np.zeros(len(part), np.float32)) for name, part in zip(names, parts, strict=True)]
    )


def _norm(spec: Any, found: Weights, name: str) -> None:
    spec.gamma, spec.beta = found[f"{name}.weight"], found[f"{name}.bias"]


def tokenizer(size: Size) -> Any:
    """The vocabulary as a `tokenizers.Tokenizer`."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    words = vocabulary(size)
    made = Tokenizer(BPE(vocab={word: number for number, word in enumerate(words.text)}, merges=words.merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in words.special])
    made.add_tokens([AddedToken(token, special=False, normalized=False) for token in words.timestamps])
    return made


def dimensions(size: Size) -> dict[str, int]:
    """The header of openai-whisper's and whisper.cpp's files, in whisper.cpp's order."""
    return {
        "n_vocab": size.vocabulary,
        "n_audio_ctx": AUDIO_CONTEXT,
        "n_audio_state": size.width,
        "n_audio_head": size.heads,
        "n_audio_layer": size.layers,
        "n_text_ctx": TEXT_CONTEXT,
        "n_text_state": size.width,
        "n_text_head": size.heads,
        "n_text_layer": size.text_layers,
        "n_mels": size.mels,
    }


def write_openai(path: str, size: Size, found: Weights) -> None:
    """A checkpoint for openai-whisper."""
    import torch

    torch.save(
        {"dims": dimensions(size), "model_state_dict": {name: torch.from_numpy(value).half() for name, value in found.items()}}, path
    )


def write_ggml(path: str, size: Size, found: Weights) -> None:
    """A float16 file for whisper.cpp."""
    from faster_whisper.feature_extractor import FeatureExtractor

    filters = FeatureExtractor.get_mel_filters(16_000, 400, n_mels=size.mels).astype(np.float32)
    byte_of = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    kept_whole = ("encoder.conv1.bias", "encoder.conv2.bias", "encoder.positional_embedding", "decoder.positional_embedding")
    with open(path, "wb") as file:
        file.write(struct.pack("<i", 0x67676D6C))
        file.write(struct.pack("<11i", *dimensions(size).values(), 1))
        file.write(struct.pack("<2i", *filters.shape) + filters.tobytes())
        words = vocabulary(size).text
        file.write(struct.pack("<i", len(words)))
        for word in words:
            data = bytes(byte_of[symbol] for symbol in word)
            file.write(struct.pack("<i", len(data)) + data)
        for name, value in found.items():
            shaped = value[:, None] if name in kept_whole[:2] else value
            half = shaped.ndim > 1 and name not in kept_whole
            file.write(struct.pack("<3i", shaped.ndim, len(name), int(half)))
            file.write(struct.pack(f"<{shaped.ndim}i", *reversed(shaped.shape)) + name.encode())
            file.write(shaped.astype(np.float16 if half else np.float32).tobytes())


WRITERS = {"ctranslate2": write_ctranslate2, "openai": write_openai, "ggml": write_ggml}
SUFFIX = {"ctranslate2": "", "openai": ".pt", "ggml": ".bin"}


def made(home: str, size: str, *, tokens: int = DEFAULT_TOKENS, kind: str = "ctranslate2") -> str:
    """The path of such a model below `home`; it is made when it is not there."""
    path = os.path.join(home, "models", f"clock-{size}-{tokens}-{kind}{SUFFIX[kind]}")
    if not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        unfinished = path + ".unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        WRITERS[kind](unfinished, SIZES[size], weights(SIZES[size], tokens))
        os.rename(unfinished, path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.clock_model", description=__doc__.splitlines()[0])
    parser.add_argument("home", help="directory; models go into its sub-directory models")
    parser.add_argument("--size", choices=sorted(SIZES), default="tiny")
    parser.add_argument("--tokens", type=int, default=DEFAULT_TOKENS, help="text tokens a window")
    parser.add_argument("--kind", choices=sorted(WRITERS), default="ctranslate2")
    args = parser.parse_args()
    print(made(args.home, args.size, tokens=args.tokens, kind=args.kind))
    return 0


if __name__ == "__main__":
    sys.exit(main())
