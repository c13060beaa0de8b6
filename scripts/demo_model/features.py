"""Log-mel features in PyTorch, equal to those of faster-whisper's ``FeatureExtractor``, for many windows at once."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from faster_whisper.feature_extractor import FeatureExtractor
from torch import Tensor

HOP = 160


@cache
def _filters_and_window() -> tuple[Tensor, Tensor]:
    filters = torch.from_numpy(np.asarray(FeatureExtractor().mel_filters, np.float32))  # type: ignore[no-untyped-call]
    return filters, torch.from_numpy(np.hanning(401)[:-1].astype(np.float32))


def log_mel(waves: Tensor, lengths: list[int], frames: int) -> Tensor:
    """Batch x 80 x ``frames`` from batch x samples (zeros behind each wave's length); zeros behind each wave's end."""
    filters, window = _filters_and_window()
    padded = torch.nn.functional.pad(waves, (0, frames * HOP - waves.shape[1]))
    spectrum = torch.stft(padded, 400, HOP, window=window, center=True, pad_mode="reflect", return_complex=True)
    power = filters @ spectrum[..., :frames].abs().square()
    log = power.clamp(min=1e-10).log10()
    log = torch.maximum(log, log.amax((1, 2), keepdim=True) - 8)
    mel = (log + 4) / 4
    for row, length in enumerate(lengths):
        mel[row, :, length // HOP + 1 :] = 0
    return mel
