"""rivals: bar 7: every contender that runs here, loaded once, on the same clips and weights; CPU-seconds per file without the load.

WhisperS2T detects no language and writes no time stamps, so it is given English and does less; whisper.cpp and openai-whisper have no
int8 (whisper.cpp: float16, openai-whisper: float32). A contender that is not installed is left out and named.
"""

from __future__ import annotations

import sys

from bench import clips, clock_model, measure
from bench.backlog import contender, run_cpu_s
from bench.measure import Bar, Cost, Failed, Report, median


def main() -> int:
    parser = measure.arguments("rivals", __doc__)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--only", help="names, separated by commas")
    args = parser.parse_args()
    paths, threads = clips.backlog(args.home, args.clips), str(args.threads)
    model = clock_model.made(args.home, args.size)
    ggml, checkpoint = (clock_model.made(args.home, args.size, kind=kind) for kind in ("ggml", "openai"))
    sides = {
        "whisperd engine": contender(sys.executable, "whisperd_engine", model, threads, *paths),
        "whisperd engine (short windows)": contender(sys.executable, "whisperd_engine", "--mode", "short_windows", model, threads, *paths),
        "whisperd engine (English)": contender(sys.executable, "whisperd_engine", "--language", "en", model, threads, *paths),
        "faster-whisper loop": contender(sys.executable, "faster_whisper_loop", model, threads, *paths),
        "faster-whisper batched by 8": contender(sys.executable, "faster_whisper_loop", "--batch", "8", model, threads, *paths),
        "WhisperS2T (English)": contender(args.peers, "whisper_s2t", model, threads, *paths),
        "whisper.cpp": contender(args.peers, "whisper_cpp", ggml, threads, *paths),
        "openai-whisper": contender(args.peers, "openai_whisper", checkpoint, threads, *paths),
    }
    chosen = args.only.split(",") if args.only else list(sides)
    report = Report("rivals", f"{args.clips} clips of 5 to 15 s, beam 5, {args.size}, {args.threads} thread: each contender loaded once")
    for name in chosen:
        try:
            sides[name]()  # once to warm up, and to see that it runs at all
        except Failed as error:
            report.notes.append(f"{name} does not run here: {str(error).strip().splitlines()[-1][-160:]}")
            chosen = [other for other in chosen if other != name]
    report.runs = measure.alternated({name: sides[name] for name in chosen}, args.runs)

    def each_s(costs: list[Cost]) -> float:
        return round(median(costs, run_cpu_s) / args.clips, 4)

    for name, costs in report.runs.items():
        report.bars.append(Bar(name, each_s(costs), None, "CPU-s a file"))
    report.details = {"cpu_s_a_file": {name: each_s(costs) for name, costs in report.runs.items()}}
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
