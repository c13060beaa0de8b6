"""Read the weights of a Whisper model back out of a CTranslate2 ``model.bin``.

For going on with the training of a model of which only the exported, quantised form is left. Owns the binary layout
(written by ``ctranslate2.specs.model_spec``) and the way back from CTranslate2's names to those of Hugging Face.
Eight-bit weights come back with their rounding, float16 weights as they were.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TYPES = ("float32", "int8", "int16", "int32", "float16")
_NORMS = {"gamma": "weight", "beta": "bias"}


def _number(file: BinaryIO, kind: str) -> int:
    value: int = struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0]
    return value


def _text(file: BinaryIO) -> str:
    return file.read(_number(file, "H"))[:-1].decode()


def read_variables(path: Path) -> dict[str, NDArray[np.float32]]:
    """All variables of the file by name, int8 ones multiplied by their scales."""
    raw: dict[str, NDArray[np.float32]] = {}
    with open(path, "rb") as file:
        version, name, _revision = _number(file, "I"), _text(file), _number(file, "I")
        if version != 6 or name != "WhisperSpec":
            raise ValueError(f"cannot read {path}: {name} in format {version}, expected WhisperSpec in format 6")
        for _ in range(_number(file, "I")):
            variable = _text(file)
            shape = [_number(file, "I") for _ in range(_number(file, "B"))]
            kind = _TYPES[_number(file, "B")]
            data = np.frombuffer(file.read(_number(file, "I")), kind)
            raw[variable] = data.reshape(shape).astype(np.float32)
    for variable in [name for name in raw if f"{name}_scale" in raw]:
        scale = raw.pop(f"{variable}_scale")
        raw[variable] = raw[variable] / scale.reshape(-1, *[1] * (raw[variable].ndim - 1))
    return raw


def _attention(prefix: str, variables: dict[str, NDArray[np.float32]], fused: list[list[str]]) -> dict[str, Tensor]:
    """Split the fused linear layers of one attention: ``fused`` says which projections each of them holds."""
    weights = {}
    for index, names in enumerate(fused):
        weight = np.split(variables[f"{prefix}/linear_{index}/weight"], len(names))
        bias = np.split(variables[f"{prefix}/linear_{index}/bias"], len(names))
        for name, part, offset in zip(names, weight, bias, strict=True):
            weights[f"{name}_proj.weight"] = torch.tensor(part)
            if name != "k":
                weights[f"{name}_proj.bias"] = torch.tensor(offset)
    return weights


def _norm(prefix: str, variables: dict[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    return {ours: torch.tensor(variables[f"{prefix}/{theirs}"]) for theirs, ours in _NORMS.items()}


def _layer(prefix: str, variables: dict[str, NDArray[np.float32]]) -> dict[str, Tensor]:
    found: dict[str, dict[str, Tensor]] = {
        "self_attn": _attention(f"{prefix}/self_attention", variables, [["q", "k", "v"], ["out"]]),
        "self_attn_layer_norm": _norm(f"{prefix}/self_attention/layer_norm", variables),
        "final_layer_norm": _norm(f"{prefix}/ffn/layer_norm", variables),
    }
    if f"{prefix}/attention/linear_0/weight" in variables:
        found["encoder_attn"] = _attention(f"{prefix}/attention", variables, [["q"], ["k", "v"], ["out"]])
        found["encoder_attn_layer_norm"] = _norm(f"{prefix}/attention/layer_norm", variables)
    for ours, theirs in (("fc1", "linear_0"), ("fc2", "linear_1")):
        found[ours] = {part: torch.tensor(variables[f"{prefix}/ffn/{theirs}/{part}"]) for part in ("weight", "bias")}
    return {f"{module}.{name}": value for module, weights in found.items() for name, value in weights.items()}


def read_weights(directory: Path) -> dict[str, Tensor]:
    """The weights under the names of model.Whisper, from a directory that faster-whisper loads."""
    variables = read_variables(directory / "model.bin")
    weights = {"decoder.embed_tokens.weight": torch.tensor(variables["decoder/embeddings/weight"])}
    for side in ("encoder", "decoder"):
        positions = variables[f"{side}/position_encodings/encodings"]
        weights[f"{side}.embed_positions.weight"] = torch.tensor(positions)
        last_norm = _norm(f"{side}/layer_norm", variables)
        weights |= {f"{side}.layer_norm.{name}": value for name, value in last_norm.items()}
        layer = 0
        while f"{side}/layer_{layer}/ffn/layer_norm/beta" in variables:
            found = _layer(f"{side}/layer_{layer}", variables)
            weights |= {f"{side}.layers.{layer}.{name}": value for name, value in found.items()}
            layer += 1
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            weights[f"encoder.{conv}.{part}"] = torch.tensor(variables[f"encoder/{conv}/{part}"])
    return weights
