"""Turn a checkpoint of train.py into a directory that ``faster_whisper.WhisperModel`` loads.

    python -m scripts.demo_model.export --checkpoint DIR/checkpoint.pt --out whisperd/share/demo_model

Goes by way of a Hugging Face model and CTranslate2's converter; weights are stored as int8 (float16 where int8 is not
possible), which compute_type "int8" reads on any CPU. Each file is renamed into place, the weights last.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ctranslate2
import torch
from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration

from .model import DECODER_POSITIONS, ENCODER_POSITIONS, MEL_BANDS, Shape
from .tokenizer import Ids, build, ids_of

FILES = ["preprocessor_config.json", "tokenizer.json", "vocabulary.json", "config.json", "model.bin"]
PREPROCESSOR = {"feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}
QUANTIZATION = "int8_float16"


def whisper_config(shape: Shape, ids: Ids) -> WhisperConfig:
    return WhisperConfig(
        vocab_size=shape.vocabulary,
        d_model=shape.width,
        encoder_layers=shape.encoder_layers,
        decoder_layers=shape.decoder_layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.inner,
        decoder_ffn_dim=shape.inner,
        num_mel_bins=MEL_BANDS,
        max_source_positions=ENCODER_POSITIONS,
        max_target_positions=DECODER_POSITIONS,
        pad_token_id=ids.end,
        bos_token_id=ids.end,
        eos_token_id=ids.end,
        decoder_start_token_id=ids.start,
    )


def hugging_face(checkpoint: dict[str, Any], ids: Ids) -> WhisperForConditionalGeneration:
    shape = Shape(**checkpoint["shape"])
    network = WhisperForConditionalGeneration(whisper_config(shape, ids))
    network.model.load_state_dict(checkpoint["average"])
    network.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        suppress_tokens=[],
        begin_suppress_tokens=[ids.space, ids.end],
        decoder_start_token_id=ids.start,
        eos_token_id=ids.end,
        pad_token_id=ids.end,
    )
    return network


def convert(checkpoint: dict[str, Any], out: Path) -> None:
    """Write the five files; ``out`` may be in use."""
    tokenizer = build()
    with tempfile.TemporaryDirectory() as directory:
        face, made = Path(directory) / "face", Path(directory) / "made"
        hugging_face(checkpoint, ids_of(tokenizer)).save_pretrained(face)
        tokenizer.save(str(face / "tokenizer.json"))
        names = {"eos_token": "<|endoftext|>", "bos_token": "<|startoftranscript|>", "unk_token": "<|endoftext|>"}
        (face / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **names}))
        ctranslate2.converters.TransformersConverter(str(face)).convert(str(made), quantization=QUANTIZATION)
        tokenizer.save(str(made / "tokenizer.json"))
        (made / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        publish(made, out)


def publish(made: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        part = out / f".{name}.part"
        shutil.copyfile(made / name, part)
        os.replace(part, out / name)
    size = sum((out / name).stat().st_size for name in FILES)
    print(f"{out}: {size / 1e6:.2f} MB in {len(FILES)} files")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    convert(torch.load(arguments.checkpoint), arguments.out)


if __name__ == "__main__":
    main()
