"""pipeline: word error rates of the demo model through the whole of whisperd, not through an emulation of it.

    python -m scripts.demo_model.pipeline [--seed N] [--recordings N] [--window-s S]

Makes recordings of about two minutes (40 utterances in main voices, as `evaluate` does) and passes each also through opus, mp3 and a
telephone, drops all of them into an inbox, runs `whisperd run --once`, and compares the published text files with what was said.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import wave
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from . import speech
from .evaluate import Score, items, joined

CONDITIONS: dict[str, Callable[[speech.Waveform], speech.Waveform]] = {
    "as spoken": lambda sound: sound,
    "opus 16 kb/s": lambda sound: speech.through_codec(sound, "opus", 16),
    "mp3 24 kb/s": lambda sound: speech.through_codec(sound, "mp3", 24),
    "telephone": speech.over_telephone,
}

CONFIG = """\
state_dir = "{home}/state"
cache_dir = "{home}/cache"
[engine]
model = "demo"
[transcription]
language = "en"
window_s = {window_s}
[watcher]
quiet_s = 0.5
[outbox]
formats = ["txt"]
[[inbox]]
path = "{home}/inbox"
"""


def write_wav(path: Path, sound: speech.Waveform) -> None:
    """16 kHz, mono, 16 bits."""
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(speech.RATE)
        out.writeframes((np.clip(sound, -1, 1) * 32767).astype("<i2").tobytes())


def drop(inbox: Path, recordings: int, first_seed: int, conditions: Sequence[str]) -> dict[str, str]:
    """Fill the inbox; name without suffix → what is said in it."""
    said: dict[str, str] = {}
    for seed in range(first_seed, first_seed + recordings):
        parts = items(40, 200 + seed, speech.main_voice)
        sound, _ = joined(parts, 300 + seed)
        for number, condition in enumerate(conditions):
            name = f"{number}-{seed}"
            write_wav(inbox / f"{name}.wav", CONDITIONS[condition](sound))
            said[name] = " ".join(part.text for part in parts)
    return said


def measure(
    home: Path, *, recordings: int, seed: int, window_s: float = 30.0, conditions: Sequence[str] = tuple(CONDITIONS)
) -> dict[str, Score]:
    """The score of each condition, of what the real daemon published. Raises CalledProcessError when a file failed."""
    (home / "inbox").mkdir()
    (home / "whisperd.toml").write_text(CONFIG.format(home=home, window_s=window_s), "utf-8")
    said = drop(home / "inbox", recordings, seed, conditions)
    command = [sys.executable, "-m", "whisperd", "run", "--once", "--config", str(home / "whisperd.toml")]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    scores: dict[str, Score] = {}
    for number, condition in enumerate(conditions):
        scores[condition] = Score()
        for name, text in said.items():
            if name.startswith(f"{number}-"):
                scores[condition].add(text, (home / "outbox" / f"{name}.txt").read_text("utf-8"))
    return scores


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seed", type=int, default=5000)
    arguments.add_argument("--recordings", type=int, default=3)
    arguments.add_argument("--window-s", type=float, default=30.0)
    chosen = arguments.parse_args()
    print(f"{chosen.recordings} recordings of about two minutes through whisperd, windows of at most {chosen.window_s:g} s")
    with tempfile.TemporaryDirectory(prefix="whisperd-wer-") as directory:
        for condition, score in measure(Path(directory), recordings=chosen.recordings, seed=chosen.seed, window_s=chosen.window_s).items():
            print(f"{condition:<14} {score}")


if __name__ == "__main__":
    main()
