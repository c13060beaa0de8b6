"""Make the sample recordings in whisperd/share/clips: ten short files in ten formats, and their texts.

    python -m scripts.demo_model.clips --out whisperd/share/clips

The sentences are held out of training and were chosen because they read well; they show what a folder of recordings
may hold and measure nothing. Owns the ten files and clips.csv. Needs espeak-ng and ffmpeg.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from . import speech
from .grammar import is_held_out

_VIDEO = ["-f", "lavfi", "-i", "testsrc=size=96x64:rate=5"]


@dataclass(frozen=True)
class Clip:
    """One file: its sentences are spoken one after another, with a pause between them."""

    file: str
    sentences: tuple[str, ...]
    voice: speech.Voice
    options: tuple[str, ...]  # for ffmpeg: how it is encoded
    describe: str

    @property
    def has_video(self) -> bool:
        return self.file.endswith((".mkv", ".mp4"))


_STEREO = ("-af", "pan=stereo|c0=c0|c1=0.5*c0")
_TELEPHONE = ("-af", "highpass=f=300,lowpass=f=3400", "-ar", "8000", "-c:a", "pcm_mulaw")
_AAC = ("-c:a", "aac", "-b:a", "48k")

CLIPS = [
    Clip(
        "meeting.wav",
        ("the meeting is on tuesday the twenty of november at ten fifteen",),
        speech.Voice("en-us", 150, 50),
        ("-c:a", "pcm_s16le"),
        "WAV, 16 kHz, 16 bit",
    ),
    Clip(
        "call.mp3",
        ("please call sarah at five fifteen on sunday",),
        speech.Voice("en-gb+m3", 155, 45),
        ("-c:a", "libmp3lame", "-b:a", "48k", "-ar", "22050"),
        "MP3, 48 kb/s, 22.05 kHz",
    ),
    Clip(
        "backup.flac",
        ("the backup is in the small folder", "send the backup to david on thursday"),
        speech.Voice("en-gb-x-rp+f2", 150, 50),
        ("-c:a", "flac"),
        "FLAC, 16 kHz",
    ),
    Clip(
        "job.m4a",
        ("job two hundred and thirty nine started after sixteen hours",),
        speech.Voice("en-us+m1", 150, 50),
        _AAC,
        "M4A (AAC, 48 kb/s)",
    ),
    Clip(
        "memory.opus",
        ("server five is using twelve gigabytes of memory", "device six is using twenty gigabytes of memory"),
        speech.Voice("en-gb+m7", 155, 50),
        ("-c:a", "libopus", "-b:a", "24k"),
        "Opus, 24 kb/s",
    ),
    Clip(
        "spelling.webm",
        ("yankee kilo delta oscar charlie four three one",),
        speech.Voice("en-us+m2", 140, 45),
        ("-c:a", "libopus", "-b:a", "32k"),
        "WebM (Opus, 32 kb/s)",
    ),
    Clip(
        "inbox.mkv",
        ("move the small invoice from the inbox to the outbox",),
        speech.Voice("en-gb+f5", 150, 50),
        (*_AAC, "-c:v", "mpeg4", "-b:v", "20k"),
        "Matroska (AAC) with a video track",
    ),
    Clip(
        "price.ogg",
        ("the price is three hundred and twenty five dollars",),
        speech.Voice("en-gb-x-rp+m4", 150, 55),
        ("-c:a", "libvorbis", "-b:a", "48k"),
        "Ogg Vorbis, 48 kb/s",
    ),
    Clip(
        "telephone.wav",
        ("please call laura at six fifteen on monday", "you have fifty four new files"),
        speech.Voice("en-us+m6", 150, 50),
        _TELEPHONE,
        "WAV, telephone: 8 kHz, mu-law",
    ),
    Clip(
        "stereo.wav",
        ("restart the camera number three", "server eleven is waiting"),
        speech.Voice("en-gb", 150, 50),
        (*_STEREO, "-c:a", "pcm_s16le"),
        "WAV, 16 kHz, stereo",
    ),
]


def recording(clip: Clip) -> speech.Waveform:
    parts = [speech.silence(0.3)]
    for sentence in clip.sentences:
        parts += [speech.say(sentence, clip.voice) * np.float32(0.6), speech.silence(0.6)]
    return np.concatenate(parts)


def write(clip: Clip, out: Path) -> None:
    wave = recording(clip)
    command = ["ffmpeg", "-v", "error", "-y", "-bitexact"]
    command += ["-f", "f32le", "-ar", str(speech.RATE), "-ac", "1", "-i", "-"]
    if clip.has_video:
        command += [*_VIDEO, "-map", "0:a", "-map", "1:v", "-shortest"]
    command += ["-map_metadata", "-1", "-fflags", "+bitexact", "-flags:a", "+bitexact"]
    command += [*clip.options, str(out / clip.file)]
    subprocess.run(command, input=wave.tobytes(), check=True, capture_output=True)


def check(clip: Clip) -> None:
    for sentence in clip.sentences:
        if not is_held_out(sentence):
            raise ValueError(f"cannot use {sentence!r}: training may have heard it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "clips.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file", "text", "voice", "speed", "pitch", "format"])
        for clip in CLIPS:
            check(clip)
            write(clip, out)
            voice = clip.voice
            table.writerow([clip.file, " ".join(clip.sentences), voice.name, voice.speed, voice.pitch, clip.describe])


if __name__ == "__main__":
    main()
