"""torch_encoder: Whisper's encoder in bfloat16, for CPUs with AMX, where it takes a third of CTranslate2's time.

Owns: when it is worth trying, the network itself, and the measurement that decides. Its output goes to CTranslate2's decoder. PyTorch
is imported only here, only when it is tried: that costs some CPU seconds and hundreds of MiB. Fails with `WeightsUnreadable`.

A CPU with AVX-512 bfloat16 alone is not worth trying: there CTranslate2 in int8 is as fast or faster (docs/performance.md).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from whisperd.engine import weights
from whisperd.engine.weights import WeightsUnreadable

if TYPE_CHECKING:
    from numpy.typing import NDArray

ROUNDS = 3
CLEARLY = 0.8  # of CTranslate2's CPU time: below, the choice is the same at every start, and the cost of PyTorch is earned back


class Measured(NamedTuple):
    """CPU time of one window through each encoder; `pays` when PyTorch is clearly ahead."""

    ctranslate2_s: float
    torch_s: float
    pays: bool


class _Layer(NamedTuple):
    """The tensors of one layer; weight and bias of each step, in order."""

    norm: tuple[Any, Any]
    query_key_value: tuple[Any, Any]
    out: tuple[Any, Any]
    ffn_norm: tuple[Any, Any]
    widen: tuple[Any, Any]
    narrow: tuple[Any, Any]


class TorchEncoder:
    """The encoder of one model. One thread at a time."""

    def __init__(self, directory: str, threads: int) -> None:
        """`threads` is of the whole process; 0 leaves it to PyTorch. Raises WeightsUnreadable."""
        import torch

        if threads:
            torch.set_num_threads(threads)
        read = weights.read(directory, "encoder")
        try:
            self._heads = int(read["num_heads"])
            tensors = {name: torch.from_numpy(values).to(torch.bfloat16) for name, values in read.items() if values.ndim}
            self._convolutions = [_pair(tensors, "conv1"), _pair(tensors, "conv2")]
            self._positions = tensors["position_encodings/encodings"]
            self._layers = [_layer(tensors, f"layer_{number}") for number in range(_layers_in(tensors))]
            self._norm = _norm(tensors, "layer_norm")
        except KeyError as error:
            raise WeightsUnreadable(f"cannot use the weights in {directory}: there is no {error} in the encoder") from error

    def encode(self, features: NDArray[np.float32]) -> Any:
        """Log-mel [n, n_mels, frames] to encoder output, a float32 StorageView [n, frames / 2, d]."""
        import torch
        from ctranslate2 import StorageView  # type: ignore[attr-defined]

        with torch.inference_mode():
            output = self._forward(torch.from_numpy(features).to(torch.bfloat16))
            return StorageView.from_array(output.float().numpy())

    def _forward(self, features: Any) -> Any:
        from torch.nn import functional

        hidden = features
        for stride, (weight, bias) in enumerate(self._convolutions, start=1):
            hidden = functional.gelu(functional.conv1d(hidden, weight, bias, stride=stride, padding=1))
        hidden = hidden.transpose(1, 2)
        hidden = hidden + self._positions[: hidden.shape[1]]
        for layer in self._layers:
            hidden = hidden + self._attention(functional, layer, _normal(functional, hidden, layer.norm))
            wide = functional.gelu(functional.linear(_normal(functional, hidden, layer.ffn_norm), *layer.widen))
            hidden = hidden + functional.linear(wide, *layer.narrow)
        return _normal(functional, hidden, self._norm)

    def _attention(self, functional: Any, layer: _Layer, hidden: Any) -> Any:
        count, length, width = hidden.shape
        parts = functional.linear(hidden, *layer.query_key_value).view(count, length, 3, self._heads, width // self._heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return functional.linear(mixed.transpose(1, 2).reshape(count, length, width), *layer.out)


def _normal(functional: Any, hidden: Any, norm: tuple[Any, Any]) -> Any:
    return functional.layer_norm(hidden, hidden.shape[-1:], *norm)


def _pair(tensors: dict[str, Any], name: str) -> tuple[Any, Any]:
    return tensors[f"{name}/weight"], tensors[f"{name}/bias"]


def _norm(tensors: dict[str, Any], name: str) -> tuple[Any, Any]:
    return tensors[f"{name}/gamma"], tensors[f"{name}/beta"]


def _layers_in(tensors: dict[str, Any]) -> int:
    return len({name.split("/")[0] for name in tensors if name.startswith("layer_") and not name.startswith("layer_norm")})


def _layer(tensors: dict[str, Any], name: str) -> _Layer:
    return _Layer(
        norm=_norm(tensors, f"{name}/self_attention/layer_norm"),
        query_key_value=_pair(tensors, f"{name}/self_attention/linear_0"),
        out=_pair(tensors, f"{name}/self_attention/linear_1"),
        ffn_norm=_norm(tensors, f"{name}/ffn/layer_norm"),
        widen=_pair(tensors, f"{name}/ffn/linear_0"),
        narrow=_pair(tensors, f"{name}/ffn/linear_1"),
    )


def worth_trying(cpu_flags: frozenset[str]) -> bool:
    """Whether this CPU has instructions with which it may pay. `cpu_flags` as in /proc/cpuinfo."""
    return "amx_bf16" in cpu_flags


def cpu_flags() -> frozenset[str]:
    """What the first processor can do (empty where the kernel does not say)."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as processors:
            return next((frozenset(line.split(":", 1)[1].split()) for line in processors if line.startswith("flags")), frozenset())
    except OSError:  # hidden by a sandbox
        return frozenset()


def pays(ctranslate2_model: Any, encoder: TorchEncoder, features: NDArray[np.float32]) -> Measured:
    """Encode one window with each in turn, after one that does not count, and compare the medians of their CPU times."""
    from ctranslate2 import StorageView  # type: ignore[attr-defined]

    view = StorageView.from_array(features)
    return compare(lambda: ctranslate2_model.encode(view), lambda: encoder.encode(features), time.process_time)


def compare(ctranslate2_encode: Callable[[], object], torch_encode: Callable[[], object], clock: Callable[[], float]) -> Measured:
    """The measurement itself, alternated; `clock` is in seconds."""
    taken_s: dict[bool, list[float]] = {False: [], True: []}
    for number in range(ROUNDS + 1):
        for is_torch, encode in ((False, ctranslate2_encode), (True, torch_encode)):
            began_s = clock()
            encode()
            if number:  # the first one prepares
                taken_s[is_torch].append(clock() - began_s)
    ctranslate2_s, torch_s = statistics.median(taken_s[False]), statistics.median(taken_s[True])
    return Measured(ctranslate2_s, torch_s, torch_s < CLEARLY * ctranslate2_s)
