"""mel: what Whisper hears of a recording: log-mel features of a window, or of a whole recording piece by piece.

Owns: the spectrogram: the bits of faster-whisper's `FeatureExtractor` at less of its cost, in chunks that stay in the processor's cache.
(An int8 encoder makes other words of a difference of 1e-7 now and then.) Memory is bounded by one call's samples. Does not fail. Safe to
share between threads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from whisperd.engine.audio import RATE_HZ

if TYPE_CHECKING:
    from numpy.typing import NDArray

HOP = 160  # samples from one frame to the next: 10 ms
FFT = 400  # samples that a frame covers, half of them before its place
FLOOR = 1e-10  # power below which is silence
RANGE = 8.0  # decades under the loudest point that are kept
_HALF = FFT // 2
_CHUNK = 256  # frames computed at a time: 1 MB of temporaries


class LogMel:
    """Samples in, features out: float32 [n_mels, samples // 160 + 1], as `FeatureExtractor.__call__` of faster-whisper gives them."""

    def __init__(self, n_mels: int) -> None:
        self.n_mels = n_mels
        self._filters = mel_filters(n_mels)

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """Normalised features of a whole recording or window."""
        log_mel = self.frames(_padded(samples), len(samples) // HOP + 1)
        return normalised(log_mel, float(log_mel.max()))

    def frames(self, padded: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        """log10 of the mel power, not normalised, [n_mels, count]: frame i covers padded[160 i : 160 i + 400]."""
        log_mel = np.empty((self.n_mels, count), dtype=np.float32)
        for start in range(0, count, _CHUNK):
            rows = min(_CHUNK, count - start)
            spectrum = np.fft.rfft(_overlapping(padded[start * HOP :], rows) * _WINDOW, axis=1).T
            np.matmul(self._filters, np.abs(spectrum) ** 2, out=log_mel[:, start : start + rows])
        np.maximum(log_mel, FLOOR, out=log_mel)
        return np.log10(log_mel, out=log_mel)


class MelStream:
    """Blocks of samples in, unnormalised log10-mel frames out; all frames together are those of the whole recording.

    For features that do not depend on how the recording is cut, their `peak` is needed first: read the recording twice, and give each
    piece of the second reading to `normalised` with the peak of the first.
    """

    def __init__(self, log_mel: LogMel) -> None:
        self.n_mels = log_mel.n_mels
        self._log_mel = log_mel
        self._held = np.zeros(0, dtype=np.float32)
        self._received = 0
        self._given = 0  # frames
        self.peak = float(np.log10(FLOOR))

    def feed(self, block: NDArray[np.float32]) -> NDArray[np.float32]:
        """Frames that are complete with this block, float32 [n_mels, how many]; there may be none."""
        begun = self._received > _HALF
        self._received += len(block)
        self._held = np.concatenate([self._held, block])
        if self._received <= _HALF:  # the frame at 0 reaches back over the beginning, where the samples behind it are mirrored
            return self._take(0)
        if not begun:
            self._held = np.concatenate([_mirrored(self._held), self._held])
        return self._take(max(0, (len(self._held) - FFT) // HOP + 1))

    def end(self) -> NDArray[np.float32]:
        """The last frames."""
        if self._received > _HALF:
            self._held = np.concatenate([self._held, np.zeros(FFT, dtype=np.float32)])
        else:
            self._held = _padded(self._held)
        return self._take(self._received // HOP + 1 - self._given)

    def _take(self, count: int) -> NDArray[np.float32]:
        frames = self._log_mel.frames(self._held, count)
        self._held = self._held[count * HOP :].copy()
        self._given += count
        if count:
            self.peak = max(self.peak, float(frames.max()))
        return frames


def normalised(log_mel: NDArray[np.float32], peak: float) -> NDArray[np.float32]:
    """Features from log10-mel frames and the largest value of the whole recording they are from. The frames are overwritten."""
    np.maximum(log_mel, np.float32(peak) - np.float32(RANGE), out=log_mel)
    log_mel += np.float32(4.0)
    log_mel *= np.float32(0.25)
    return log_mel


def mel_filters(n_mels: int) -> NDArray[np.float32]:
    """Weights of the spectrum's bins for each mel filter, [n_mels, 201]: faster-whisper's own."""
    from faster_whisper import feature_extractor

    extractor: Any = feature_extractor.FeatureExtractor
    return np.asarray(extractor.get_mel_filters(RATE_HZ, FFT, n_mels), dtype=np.float32)


_WINDOW: NDArray[np.float32] = np.hanning(FFT + 1)[:-1].astype(np.float32)


def _padded(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half a frame mirrored in front, silence behind: the 160 zeros that are put there and their mirror image."""
    padded = np.zeros(len(samples) + 2 * _HALF + 1, dtype=np.float32)
    padded[_HALF : _HALF + len(samples)] = samples
    padded[:_HALF] = _mirrored(padded[_HALF:])
    return padded


def _mirrored(samples: NDArray[np.float32]) -> NDArray[np.float32]:
    return samples[_HALF:0:-1]


def _overlapping(padded: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    return np.lib.stride_tricks.as_strided(padded, (count, FFT), (HOP * padded.itemsize, padded.itemsize), writeable=False)
