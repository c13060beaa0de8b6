"""recordings: spoken sentences made by espeak-ng, in every shape that ffmpeg can write. Nothing is stored: tests make their own audio.

Owns: `Studio`, which makes each recording once and keeps it for the whole run, and the ways to break one. The sentences are of the
small language that the demo model knows, so a transcript can be held against what was said.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from pathlib import Path

import pytest

TOOLS = ("espeak-ng", "ffmpeg")
RATE_HZ = 16_000
FLAGS = ("-hide_banner", "-loglevel", "error", "-nostdin", "-y", "-fflags", "+bitexact")

SENTENCES = (
    "turn on the kitchen light",
    "send the invoice to maria on friday",
    "the backup is in the small folder",
    "server five is ready",
    "please call thomas at ten fifteen on sunday",
    "close the garden door",
    "the price is three hundred dollars",
    "yankee kilo delta oscar",
    "restart the camera number three",
    "how many red cars are there",
    "worker two is using twelve gigabytes of memory",
    "delete this message tomorrow",
    "job ninety finished after six minutes",
    "good morning",
    "the blue box is open",
    "set an alarm for seven hours",
    "the meeting is on monday the second of march",
    "anna and james are in the office",
    "we want twenty new reports",
    "move the last recording to the archive",
    "printer eight is waiting",
    "one two three four five",
    "turn off the bedroom heating",
    "where are the green windows",
    "rename the first file",
    "stop the service number nine",
    "set a timer for forty seconds",
    "the orange car is small",
    "laura and peter are in the hall",
    "hello world",
    "zulu victor tango",
    "print your transcript now",
    "device eleven is down",
    "you have sixty final messages",
)


def need_tools() -> None:
    """Skip, with the plain reason, where audio cannot be made."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: the tests make their audio with {' and '.join(TOOLS)}")


def run(*command: str | Path, stdout: Path | None = None) -> None:
    """Run a tool; what it writes into a pipe goes to `stdout`."""
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0, f"{command[0]}: {done.stderr.decode(errors='replace')[-2000:]}"
    if stdout is not None:
        stdout.write_bytes(done.stdout)


class Studio:
    """Makes recordings in its own directory, each once."""

    def __init__(self, home: Path) -> None:
        need_tools()
        self.home = home
        home.mkdir(parents=True, exist_ok=True)

    def say(self, text: str) -> Path:
        """The sentence as a WAV, 16 kHz, mono, 16 bit, with a breath of silence around it."""
        made = self._place(".wav", "say", text)
        if not made.exists():
            spoken = made.with_suffix(".raw.wav")
            run("espeak-ng", "-v", "en-us", "-s", "150", "-w", spoken, text)
            self._ffmpeg(made, "-i", str(spoken), "-af", "adelay=200:all=1,apad=pad_dur=0.3", "-ar", str(RATE_HZ), "-ac", "1")
            spoken.unlink()
        return made

    def encode(self, text: str, suffix: str, options: Sequence[str] = (), *, video: Sequence[str] = ()) -> Path:
        """The sentence in another format; with `video`, as the sound of a film (the options of its picture)."""
        made = self._place(suffix, "encode", text, *options, "video", *video)
        if not made.exists():
            picture = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=5:duration=60"] if video else []
            mapping = ["-map", "1:v", "-map", "0:a", "-shortest", *video] if video else []
            self._ffmpeg(made, "-i", str(self.say(text)), *picture, *mapping, *options)
        return made

    def silence(self, seconds: float) -> Path:
        made = self._place(".wav", "silence", str(seconds))
        if not made.exists():
            self._ffmpeg(made, "-f", "lavfi", "-i", f"anullsrc=r={RATE_HZ}:cl=mono", "-t", str(seconds))
        return made

    def film_without_sound(self) -> Path:
        made = self._place(".mp4", "mute film")
        if not made.exists():
            self._ffmpeg(made, "-f", "lavfi", "-i", "testsrc=size=96x64:rate=5:duration=2", "-c:v", "mpeg4")
        return made

    def with_cover(self, text: str) -> Path:
        """An MP3 with a picture inside, as music shops sell it."""
        made = self._place(".mp3", "cover", text)
        if not made.exists():
            picture = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=1:duration=1"]
            order = ["-map", "0:a", "-map", "1:v", "-frames:v", "1", "-c:v", "mjpeg", "-disposition:v", "attached_pic"]
            self._ffmpeg(made, "-i", str(self.say(text)), *picture, *order, "-id3v2_version", "3", "-b:a", "48k")
        return made

    def long(self, sentences: Iterable[str], pause_s: float = 0.8) -> Path:
        """Many sentences with pauses between them, as one WAV."""
        parts = list(sentences)
        made = self._place(".wav", "long", str(pause_s), *parts)
        if not made.exists():
            pause = bytes(2 * int(RATE_HZ * pause_s))
            write_wav(made, pause.join(samples_of(self.say(part)) for part in parts))
        return made

    def _place(self, suffix: str, *what: str) -> Path:
        return self.home / (hashlib.sha256("\0".join(what).encode()).hexdigest()[:16] + suffix)

    def _ffmpeg(self, made: Path, *options: str) -> None:
        """Whole or not at all: a run that was interrupted leaves nothing under the name."""
        partial = made.with_name("partial-" + made.name)
        run("ffmpeg", *FLAGS, *options, "-flags:a", "+bitexact", partial)
        partial.rename(made)


# --- samples -------------------------------------------------------------------------------------------------------------------


def samples_of(wav: Path) -> bytes:
    """The bare 16-bit samples of a WAV of ours."""
    data = wav.read_bytes()
    return data[data.index(b"data") + 8 :]


def wav_header(samples_bytes: int, *, rate: int = RATE_HZ, channels: int = 1, promised: int | None = None) -> bytes:
    """44 bytes that promise `promised` bytes of samples (what there is, unless said otherwise)."""
    size = samples_bytes if promised is None else promised
    block = 2 * channels

    def number(value: int, width: int) -> bytes:
        return (value & (256**width - 1)).to_bytes(width, "little")

    shape = number(1, 2) + number(channels, 2) + number(rate, 4) + number(rate * block, 4) + number(block, 2) + number(16, 2)
    return b"RIFF" + number(size + 36, 4) + b"WAVEfmt " + number(16, 4) + shape + b"data" + number(size, 4)


def write_wav(path: Path, samples: bytes, **header: int) -> Path:
    path.write_bytes(wav_header(len(samples), **header) + samples)
    return path


def cut(source: Path, target: Path, share: float) -> Path:
    """The first part of a file, as an interrupted copy leaves it."""
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * share)])
    return target


# --- what was said, and what was heard -----------------------------------------------------------------------------------------


def likeness(said: str, heard: str) -> float:
    """How much of one text is in the other, word by word: 0 to 1."""
    return SequenceMatcher(None, said.lower().split(), heard.lower().split(), autojunk=False).ratio()


def nearest(heard: str, sentences: Iterable[str]) -> str:
    """The sentence that a text resembles most."""
    return max(sentences, key=lambda said: likeness(said, heard))
