"""installation: bar 3: a folder through the whole installed daemon against the command lines people call once for each file.

Ours: `whisperd run --once` on an inbox, from its start to its end: watcher, ledger, engine, outbox, formats. Peers:
`whisper-ctranslate2` and openai-whisper's `whisper`, one call a file (on some of the files: they cost about the same each).
All costs are told per file, start and load included.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Sequence

from bench import clips, clock_model, measure
from bench.house import House
from bench.measure import Bar, Cost, Report, median, run_tree


def ours(home: str, model: str, threads: int, mode: str, paths: Sequence[str]) -> Callable[[], Cost]:
    def run() -> Cost:
        house = House(os.path.join(home, "houses"), model, threads=threads, mode=mode)
        try:
            house.drop(paths)
            cost = run_tree(house.once, env=threads_env(threads))
            house.assert_all_done(len(paths))
            return each(cost, len(paths))
        finally:
            house.close()

    return run


def one_call_a_file(command: Sequence[str], threads: int, paths: Sequence[str]) -> Callable[[], Cost]:
    """The command line once for every file, one after the other."""

    def run() -> Cost:
        with tempfile.TemporaryDirectory() as out:
            told = ["--threads", str(threads), "--output_dir", out, "--output_format", "json", "--verbose", "False"]
            costs = [run_tree([*command, *told, path], env=threads_env(threads)) for path in paths]
            if len(os.listdir(out)) != len(paths):
                raise measure.Failed(f"{command[0]} wrote {len(os.listdir(out))} transcripts of {len(paths)} files")
        total = Cost(sum(cost.cpu_s for cost in costs), sum(cost.wall_s for cost in costs), max(cost.peak_mib for cost in costs), {})
        return each(total, len(paths))

    return run


def threads_env(threads: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


def each(cost: Cost, count: int) -> Cost:
    return cost._replace(cpu_s=round(cost.cpu_s / count, 4), wall_s=round(cost.wall_s / count, 4))


def evenly(paths: Sequence[str], count: int) -> list[str]:
    """Some of the files, spread over all lengths."""
    return [paths[(2 * number + 1) * len(paths) // (2 * count)] for number in range(count)]


def main() -> int:
    parser = measure.arguments("installation", __doc__)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument("--mode", default="batched", choices=("batched", "short_windows"))
    parser.add_argument("--ctranslate2-files", type=int, default=5, help="files given to whisper-ctranslate2 in each run; 0: leave it out")
    parser.add_argument("--openai-files", type=int, default=2, help="files given to openai-whisper in each run; 0: leave it out")
    args = parser.parse_args()
    paths = clips.backlog(args.home, args.clips)
    model = clock_model.made(args.home, args.size)
    scripts = os.path.dirname(os.path.abspath(args.peers))
    sides = {"whisperd run --once": ours(args.home, model, args.threads, args.mode, paths)}
    if args.ctranslate2_files:
        command = [os.path.join(scripts, "whisper-ctranslate2"), "--model_directory", model, "--device", "cpu", "--compute_type", "int8"]
        sides["whisper-ctranslate2 per file"] = one_call_a_file(command, args.threads, evenly(paths, args.ctranslate2_files))
    if args.openai_files:
        checkpoint = clock_model.made(args.home, args.size, kind="openai")
        command = [os.path.join(scripts, "whisper"), "--model", checkpoint, "--device", "cpu", "--fp16", "False"]
        sides["openai-whisper per file"] = one_call_a_file(command, args.threads, evenly(paths, args.openai_files))
    report = Report("installation", f"{args.clips} clips through the whole installation, costs per file, {args.size}, {args.mode}")
    report.runs = measure.alternated(sides, args.runs)
    mine = report.runs["whisperd run --once"]
    for name, limit, wall_limit in (("whisper-ctranslate2 per file", 1 / 3, 1 / 3), ("openai-whisper per file", 1 / 10, None)):
        if name in report.runs:
            theirs = report.runs[name]
            report.bars.append(Bar(f"CPU against {name}", round(median(mine) / median(theirs), 4), round(limit, 4)))
            wall = round(median(mine, lambda cost: cost.wall_s) / median(theirs, lambda cost: cost.wall_s), 4)
            report.bars.append(Bar(f"wall against {name}", wall, wall_limit and round(wall_limit, 4)))
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
