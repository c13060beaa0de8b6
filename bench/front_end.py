"""front_end: bars 4 and 5: all that comes before the model: decoding, voice activity, windows, log-mel; and that it does not grow.

Ours is `Recording`, `SpeechStream` and `LogMel` of each window; faster-whisper's is what `WhisperModel.transcribe(vad_filter=True)` does
before it encodes: `decode_audio`, `get_speech_timestamps`, `collect_chunks`, `FeatureExtractor`. Each run is a process of its own, its
imports counted. Peak memory is the process's own largest resident set.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable

from bench import clips, measure
from bench.measure import Bar, Cost, Report, median

COST_LIMIT = 0.45
GROWTH_LIMIT = 1.15  # peak memory of 3 h by that of 10 minutes
MEMORY_LIMIT = 1 / 15  # of faster-whisper's, at 3 h
LINEAR_LIMIT = 6.3  # CPU time of 3 h by that of 30 minutes
TEN_MINUTES, HALF_HOUR, HOUR, THREE_HOURS = 600.0, 1800.0, 3600.0, 10_800.0


def ours(path: str) -> dict[str, float]:
    from whisperd.engine.audio import Caps
    from whisperd.engine.mel import LogMel
    from whisperd.engine.speech import SpeechStream
    from whisperd.engine.tracks import open_recording

    descriptor = os.open(path, os.O_RDONLY)
    recording = open_recording(descriptor, Caps(duration_max_s=86_400.0, channels_max=8, rate_max_hz=192_000))
    stream, log_mel = SpeechStream(threshold=0.5, min_silence_s=0.5, window_s=30.0), LogMel(80)
    windows = frames = 0
    for block in recording.blocks():
        for audio in stream.feed(block[0]):
            windows, frames = windows + 1, frames + log_mel(audio.samples).shape[1]
    for audio in stream.end():
        windows, frames = windows + 1, frames + log_mel(audio.samples).shape[1]
    recording.close()
    os.close(descriptor)
    return {"duration_s": recording.duration_s, "windows": windows, "frames": frames}


def theirs(path: str) -> dict[str, float]:
    import numpy as np
    from faster_whisper.audio import decode_audio
    from faster_whisper.feature_extractor import FeatureExtractor
    from faster_whisper.vad import VadOptions, collect_chunks, get_speech_timestamps

    audio = decode_audio(path, sampling_rate=16_000)
    duration_s = len(audio) / 16_000
    speech = get_speech_timestamps(audio, VadOptions())
    chunks, _ = collect_chunks(audio, speech)
    audio = np.concatenate(chunks, axis=0)
    return {"duration_s": duration_s, "windows": len(speech), "frames": FeatureExtractor()(audio).shape[1]}


SIDES: dict[str, Callable[[str], dict[str, float]]] = {"whisperd": ours, "faster-whisper": theirs}


def one_run(python: str, side: str, path: str) -> Cost:
    return measure.run_tree([python, "-m", "bench.front_end", "--side", side, path])


def _peak_mib(costs: list[Cost]) -> float:
    return median(costs, lambda cost: float(cost.said["peak_mib"]))


def figures(report: Report) -> list[Bar]:
    """The bars, from the runs: "side, minutes"."""
    runs = report.runs
    hours = median(runs["whisperd, 180 min"]) / median(runs["whisperd, 30 min"])
    bars = [
        Bar(
            "CPU time of 1 h of MP3, by faster-whisper's",
            median(runs["whisperd, 60 min"]) / median(runs["faster-whisper, 60 min"]),
            COST_LIMIT,
        ),
        Bar(
            "peak memory of 3 h, by that of 10 min",
            _peak_mib(runs["whisperd, 180 min"]) / _peak_mib(runs["whisperd, 10 min"]),
            GROWTH_LIMIT,
        ),
        Bar("CPU time of 3 h, by that of 30 min", hours, LINEAR_LIMIT),
    ]
    if "faster-whisper, 180 min" in runs:
        share = _peak_mib(runs["whisperd, 180 min"]) / _peak_mib(runs["faster-whisper, 180 min"])
        bars.append(Bar("peak memory of 3 h, by faster-whisper's", share, MEMORY_LIMIT))
        theirs_hours = median(runs["faster-whisper, 180 min"]) / median(runs["faster-whisper, 60 min"])
        bars.append(Bar("faster-whisper: CPU time of 3 h, by that of 1 h", theirs_hours, None))
    bars += [Bar(f"peak memory, {name}", _peak_mib(costs), None, "MiB") for name, costs in runs.items()]
    return [Bar(bar.name, round(bar.figure, 4), bar.limit, bar.unit) for bar in bars]


def main() -> int:
    parser = measure.arguments("front_end", __doc__)
    parser.add_argument("--side", choices=SIDES, help="run one side on the file PATH and tell its cost (what this script starts)")
    parser.add_argument("--no-long-peer", action="store_true", help="leave out faster-whisper on 3 h (10 GiB of memory)")
    parser.add_argument("path", nargs="?")
    args = parser.parse_args()
    if args.side:
        said = SIDES[args.side](args.path)
        print(json.dumps({**said, "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)}))
        return 0
    paths = {length_s: clips.long(args.home, length_s) for length_s in (TEN_MINUTES, HALF_HOUR, HOUR, THREE_HOURS)}

    def run(side: str, length_s: float) -> Callable[[], Cost]:
        python = args.peers if side == "faster-whisper" else sys.executable
        return lambda: one_run(python, side, paths[length_s])

    def named(side: str, length_s: float) -> tuple[str, Callable[[], Cost]]:
        return f"{side}, {length_s / 60:g} min", run(side, length_s)

    report = Report("front_end", "Before the model: decoding, voice activity, windows, log-mel of a long MP3")
    hour = [named("whisperd", HOUR), named("faster-whisper", HOUR)]
    growth = [named("whisperd", length_s) for length_s in (TEN_MINUTES, HALF_HOUR, THREE_HOURS)]
    report.runs = measure.alternated(dict(hour), args.runs) | measure.alternated(dict(growth), args.runs)
    if not args.no_long_peer:
        report.runs |= measure.alternated(dict([named("faster-whisper", THREE_HOURS)]), 1)
    report.bars = figures(report)
    report.details = {name: [cost.said for cost in costs] for name, costs in report.runs.items()}
    status = report.finish(args)
    print(json.dumps(report.document(), ensure_ascii=False))
    return status


if __name__ == "__main__":
    sys.exit(measure.ending(main))
