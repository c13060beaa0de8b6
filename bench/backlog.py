"""backlog: bars 1 and 2: clips of mixed formats, language detected, beam 5: our engine against a faster-whisper loop.

Same model, same clips, same number of threads. CPU-seconds are judged without the load of the model (as the loop's user would amortise
it) and told with it. With 64 clips or more also: how full the batches were, and whether the text is that of batch 1. The embedded model
(--size demo) is so small that it costs less than what surrounds it: of that one only the text is judged.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench import clips, measure
from bench.engine import demo_directory, model_of
from bench.measure import Bar, Cost, Report, median, run_tree

FULL_LIMIT, FULL_LIMIT_AMX, SHORT_LIMIT = 0.50, 0.40, 0.18
BACKLOG_FOR_BATCH = 64


def contender(python: str, name: str, *arguments: str) -> Callable[[], Cost]:
    """A script of bench.peers as something to measure."""
    return lambda: run_tree([python, "-m", f"bench.peers.{name}", *arguments])


def run_cpu_s(cost: Cost) -> float:
    """CPU time without the load of the model, as the script itself accounts for it."""
    return float(cost.said["run_cpu_s"])


def ratio(ours: Sequence[Cost], theirs: Sequence[Cost], what: Callable[[Cost], float]) -> float:
    return round(median(ours, what) / median(theirs, what), 4)


def same(ours: Sequence[str], theirs: Sequence[str]) -> int:
    """How many texts are equal, apart from the space around them."""
    return sum(mine.split() == other.split() for mine, other in zip(ours, theirs, strict=True))


def counted(cost: Cost, clip_count: int) -> list[Bar]:
    """What the engine's own counters say: no noise in these."""
    found: dict[str, Any] = cost.said["about"]["counters"]
    bars = [Bar("encoder windows run / needed", round(found["encoded"] / max(1, found["encoded_needed"]), 4), 1.0)]
    filled = round(found["windows"] / max(1, found["room"]), 4)
    judged = clip_count >= BACKLOG_FOR_BATCH
    return [*bars, Bar("mean batch / limit", filled, 0.9 if judged else None, at_most=False)]


def main() -> int:
    parser = measure.arguments("backlog", __doc__)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--short-windows", action="store_true", help="bar 2: our opt-in mode without padding to 30 s")
    parser.add_argument("--encoder", default="auto", choices=("auto", "ctranslate2", "torch"))
    args = parser.parse_args()
    mode, limit = ("short_windows", SHORT_LIMIT) if args.short_windows else ("batched", FULL_LIMIT)
    if limit == FULL_LIMIT and "amx_bf16" in measure.machine_of()["flags"]:
        limit = FULL_LIMIT_AMX
    trained, model = args.size == "demo", model_of(args.size, args.home)
    paths = clips.sentences(args.home, args.clips) if trained else clips.backlog(args.home, args.clips)
    loop_model = demo_directory() if trained else model
    engine = ["--mode", mode, "--encoder", args.encoder]
    sides = {
        f"whisperd engine, {mode}": contender(sys.executable, "whisperd_engine", *engine, model, str(args.threads), *paths),
        "faster-whisper loop": contender(sys.executable, "faster_whisper_loop", loop_model, str(args.threads), *paths),
    }
    kind = "clips of whole sentences" if trained else "clips of 5 to 15 s"
    report = Report("backlog", f"{args.clips} {kind}, language detected, beam 5, {args.size}, {mode}")
    report.runs = measure.alternated(sides, args.runs)
    ours, theirs = report.runs.values()
    equal = same(ours[0].said["texts"], theirs[0].said["texts"])
    report.bars = [
        Bar("CPU against the loop, model loaded", ratio(ours, theirs, run_cpu_s), None if trained else limit),
        Bar("CPU against the loop, start and load included", ratio(ours, theirs, lambda cost: cost.cpu_s), None),
        Bar("wall against the loop, start and load included", ratio(ours, theirs, lambda cost: cost.wall_s), None),
        Bar("peak memory against the loop", ratio(ours, theirs, lambda cost: cost.peak_mib), None),
        Bar("texts equal to the loop's", equal, None if args.short_windows else args.clips, f"of {args.clips}", at_most=False),
        *counted(ours[0], args.clips),
    ]
    report.details = {
        "ours": ours[0].said["about"],
        "run_cpu_s": {name: [run_cpu_s(cost) for cost in costs] for name, costs in report.runs.items()},
    }
    report.notes.append(f"our encoder: {ours[0].said['about']['encoder']}; quality verdicts: {ours[0].said['about']['verdicts']}")
    if args.clips >= BACKLOG_FOR_BATCH:
        single = contender(sys.executable, "whisperd_engine", *engine, "--batch", "1", model, str(args.threads), *paths)()
        equal = same(ours[0].said["texts"], single.said["texts"])
        report.bars.append(Bar("texts equal to batch 1", equal, args.clips, f"of {args.clips}", at_most=False))
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
