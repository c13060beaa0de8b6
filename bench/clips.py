"""clips: the recordings that are measured, made by ffmpeg from the sample clips that ship with whisperd.

Owns: a backlog of mixed formats and lengths, many equal short clips, one long recording. Made once below the bench's home directory,
the same bytes for every side of a comparison. Fails with FileNotFoundError when there is no ffmpeg, CalledProcessError when it fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from importlib.resources import files

SAMPLES = ("backup.flac", "call.mp3", "inbox.mkv", "job.m4a", "meeting.wav", "memory.opus", "price.ogg", "spelling.webm", "telephone.wav")
FORMATS = {  # extension: what ffmpeg is asked for, as telephones, recorders and meeting rooms write them
    "wav": ["-ar", "16000", "-ac", "1"],
    "mp3": ["-ar", "44100", "-ac", "2", "-b:a", "96k"],
    "m4a": ["-ar", "44100", "-c:a", "aac", "-b:a", "96k"],
    "opus": ["-ar", "48000", "-c:a", "libopus", "-b:a", "24k"],
    "flac": ["-ar", "48000"],
    "ogg": ["-ar", "44100", "-c:a", "libvorbis"],
    "webm": ["-ar", "48000", "-c:a", "libopus", "-b:a", "32k"],
}


def backlog(home: str, count: int = 20, *, shortest_s: float = 5.0, longest_s: float = 15.0) -> list[str]:
    """Clips of 5 to 15 s, in seven formats, each of other sentences."""
    folder = os.path.join(home, "audio", f"backlog-{count}-{shortest_s:g}-{longest_s:g}")
    suffixes = list(FORMATS)
    wanted = [
        (os.path.join(folder, f"clip{number:03d}.{suffixes[number % len(suffixes)]}"), number, length_s)
        for number, length_s in enumerate(_spread(shortest_s, longest_s, count))
    ]
    for path, number, length_s in wanted:
        _make(path, _from(number), length_s)
    return [path for path, _, _ in wanted]


def equal(home: str, count: int, length_s: float = 10.0) -> list[str]:
    """Clips of one length, in seven formats. Their bytes differ, so that none counts as known."""
    return backlog(home, count, shortest_s=length_s, longest_s=length_s)


def sentences(home: str, count: int) -> list[str]:
    """Clips of one or two whole samples, in seven formats: no word is cut, so a trained model can be held to the text."""
    folder, suffixes = os.path.join(home, "audio", f"sentences-{count}"), list(FORMATS)
    wanted = [os.path.join(folder, f"clip{number:03d}.{suffixes[number % len(suffixes)]}") for number in range(count)]
    for number, path in enumerate(wanted):
        _make(path, _from(number)[: 1 + number % 2], None)
    return wanted


def long(home: str, length_s: float, *, turn: int = 0, suffix: str = "mp3") -> str:
    """One recording of this length: the samples with pauses, again and again, beginning with another one each `turn`."""
    path = os.path.join(home, "audio", f"long-{length_s:g}-{turn}.{suffix}")
    _make(path, _from(turn), length_s, pause_s=0.9)
    return path


def _spread(first: float, last: float, count: int) -> list[float]:
    return [round(first + (last - first) * number / max(1, count - 1), 2) for number in range(count)]


def _from(number: int) -> Sequence[str]:
    """The samples in another order for every clip."""
    turn, step = number % len(SAMPLES), 1 + number // len(SAMPLES) % 4 * 2 % 8
    order = [SAMPLES[(turn + step * place) % len(SAMPLES)] for place in range(len(SAMPLES))]
    return list(dict.fromkeys(order))


def _make(path: str, samples: Sequence[str], length_s: float | None, *, pause_s: float = 0.3) -> None:
    """These samples one after the other; again and again up to a length, when one is given."""
    if os.path.exists(path):
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if shutil.which("ffmpeg") is None:
        raise FileNotFoundError("cannot make recordings: ffmpeg is not installed (./scripts/debian-packages ffmpeg)")
    share = files("whisperd").joinpath("share", "clips")
    inputs = [argument for sample in samples for argument in ("-i", str(share.joinpath(sample)))]
    alike = ";".join(
        f"[{number}:a:0]aresample=48000,aformat=channel_layouts=mono,apad=pad_dur={pause_s}[p{number}]" for number in range(len(samples))
    )
    joined = "".join(f"[p{number}]" for number in range(len(samples)))
    again, until = ("", []) if length_s is None else (",aloop=loop=-1:size=20000000", ["-t", f"{length_s:g}"])
    graph = f"{alike};{joined}concat=n={len(samples)}:v=0:a=1{again}[out]"
    suffix = path.rpartition(".")[2]
    unfinished = f"{path[: -len(suffix)]}unfinished.{suffix}"
    command = ["ffmpeg", "-y", "-v", "error", *inputs, "-filter_complex", graph, "-map", "[out]", *until]
    subprocess.run([*command, "-bitexact", "-map_metadata", "-1", *FORMATS[suffix], unfinished], check=True, stdin=subprocess.DEVNULL)
    os.rename(unfinished, path)
