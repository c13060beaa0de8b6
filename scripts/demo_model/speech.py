"""Speech that the demo model learns from and is measured on: espeak-ng's voices, and what telephones and codecs do.

Owns the lists of voices and every change made to a waveform. Waveforms are float32, mono, 16 kHz, in [-1, 1].
Needs the programs ``espeak-ng`` and ``ffmpeg``; a failure of either raises ``subprocess.CalledProcessError``.
"""

from __future__ import annotations

import random
import subprocess
import tempfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import resample_poly  # type: ignore[import-untyped]

Waveform = NDArray[np.float32]

RATE = 16000
MAIN_LANGUAGES = ["en-us", "en-gb", "en-gb-x-rp"]
MAIN_VARIANTS = ["", *(f"+f{number}" for number in range(1, 6)), *(f"+m{number}" for number in range(1, 9))]
OTHER_LANGUAGES = ["en-gb-scotland", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029"]
# Heard in training, rarely:
OTHER_VARIANTS = ["+klatt", "+klatt2", "+klatt4", "+croak", "+linda", "+steph", "+adam", "+michael", "+victor", "+paul"]
# Never used in training:
UNHEARD_VARIANTS = ["+Mario", "+anika", "+travis", "+rob", "+belinda"]

CODECS: dict[str, list[str]] = {  # the encoder and the container, which remembers how much of the start is padding
    "opus": ["-c:a", "libopus", "-f", "ogg"],
    "mp3": ["-c:a", "libmp3lame", "-f", "mp3"],
    "vorbis": ["-c:a", "libvorbis", "-f", "ogg"],
    "aac": ["-c:a", "aac", "-f", "mp4"],
}


@dataclass(frozen=True)
class Voice:
    """How espeak-ng is to speak: its voice name, words a minute and pitch (0 to 99)."""

    name: str
    speed: int
    pitch: int


def main_voice(source: random.Random) -> Voice:
    name = source.choice(MAIN_LANGUAGES) + source.choice(MAIN_VARIANTS)
    return Voice(name, source.randint(115, 210), source.randint(20, 80))


def other_voice(source: random.Random) -> Voice:
    """Any accent with any variant that training may hear."""
    name = source.choice(MAIN_LANGUAGES + OTHER_LANGUAGES) + source.choice(MAIN_VARIANTS + OTHER_VARIANTS)
    return Voice(name, source.randint(115, 210), source.randint(20, 80))


def unheard_voice(source: random.Random) -> Voice:
    name = source.choice(MAIN_LANGUAGES + OTHER_LANGUAGES) + source.choice(UNHEARD_VARIANTS)
    return Voice(name, source.randint(115, 210), source.randint(20, 80))


def say(text: str, voice: Voice) -> Waveform:
    """The spoken text, cut to where the sound starts and ends, at a peak of 0.9; empty if espeak-ng said nothing."""
    command = ["espeak-ng", "-v", voice.name, "-s", str(voice.speed), "-p", str(voice.pitch), "--stdout", text]
    output = subprocess.run(command, capture_output=True, check=True).stdout
    samples = np.frombuffer(output[44 : len(output) - len(output) % 2], dtype="<i2").astype(np.float32) / 32768
    wave: Waveform = resample_poly(samples, 320, 441).astype(np.float32)  # 22,050 Hz to 16,000 Hz
    loud = np.flatnonzero(np.abs(wave) > 0.01)
    if not len(loud):
        return np.zeros(0, np.float32)
    wave = wave[loud[0] : loud[-1] + 1]
    return np.asarray(wave * (0.9 / np.abs(wave).max()), np.float32)


def silence(seconds: float) -> Waveform:
    return np.zeros(int(seconds * RATE), np.float32)


def noise(source: np.random.Generator, length: int, colour: int = 1) -> Waveform:
    """Noise of unit power; ``colour`` 1 is white, larger values take more of the treble away."""
    white = source.standard_normal(length + colour, dtype=np.float32)
    total = np.cumsum(white, dtype=np.float64)
    smooth = (total[colour:] - total[:-colour])[:length] if colour > 1 else white[:length]
    return np.asarray(smooth / (smooth.std() + 1e-9), np.float32)


def with_noise(wave: Waveform, source: np.random.Generator, snr: float, colour: int = 1) -> Waveform:
    """The wave with noise under it, ``snr`` decibels below the level of what is not silent in it."""
    heard = wave[np.abs(wave) > 0.003]
    level = float(np.sqrt((heard**2).mean())) if len(heard) else 0.1
    return (wave + noise(source, len(wave), colour) * level * 10 ** (-snr / 20)).astype(np.float32)


def band_limited(wave: Waveform, lowest: float, highest: float) -> Waveform:
    """The wave without what lies outside two frequencies (soft edges of a tenth of the frequency)."""
    size = len(wave)
    spectrum = np.fft.rfft(wave)
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    keep = np.clip((highest * 1.05 - frequency) / (highest * 0.1), 0, 1)
    if lowest > 0:
        keep *= np.clip((frequency - lowest * 0.9) / (lowest * 0.2), 0, 1)
    return np.fft.irfft(spectrum * keep, size).astype(np.float32)


def mu_law(wave: Waveform) -> Waveform:
    """Eight bits a sample, as on a telephone line (G.711)."""
    clipped = np.clip(wave, -1, 1)
    steps = np.round(np.sign(clipped) * np.log1p(255 * np.abs(clipped)) / np.log(256) * 127) / 127
    return np.asarray(np.sign(steps) * np.expm1(np.abs(steps) * np.log(256)) / 255, np.float32)


def over_telephone(wave: Waveform) -> Waveform:
    """300 to 3400 Hz, 8 kHz, mu-law, and back to 16 kHz."""
    narrow = mu_law(band_limited(wave, 300, 3400)[::2].copy())
    spectrum = np.zeros(len(wave) // 2 + 1, np.complex64)
    narrow_spectrum = np.fft.rfft(narrow)[: len(spectrum)]
    spectrum[: len(narrow_spectrum)] = narrow_spectrum * (len(wave) / len(narrow))
    return np.fft.irfft(spectrum, len(wave)).astype(np.float32)


def through_codec(wave: Waveform, codec: str, kilobits: int, rate: int = RATE) -> Waveform:
    """Encoded and decoded again by ffmpeg, cut or padded to the old length."""
    raw = ["-f", "f32le", "-ac", "1"]
    quiet = ["ffmpeg", "-v", "error", "-y"]
    with tempfile.NamedTemporaryFile() as packed:
        encode = [*quiet, *raw, "-ar", str(RATE), "-i", "-", "-ar", str(rate), "-b:a", f"{kilobits}k"]
        subprocess.run([*encode, *CODECS[codec], packed.name], input=wave.tobytes(), capture_output=True, check=True)
        decode = [*quiet, "-i", packed.name, *raw, "-ar", str(RATE), "-"]
        result = np.frombuffer(subprocess.run(decode, capture_output=True, check=True).stdout, np.float32)
    return np.pad(result, (0, max(0, len(wave) - len(result))))[: len(wave)].astype(np.float32)
