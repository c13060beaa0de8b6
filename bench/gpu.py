"""gpu: the bars of a machine with a GPU, on random weights of real size (large-v3-turbo unless told otherwise).

Throughput of our engine on a backlog of short clips against a faster-whisper loop, and whether the text is that of batch 1; how idle the
GPU is meanwhile; one batched process against four single-clip ones; VRAM predicted from small batches; the start of a second worker; what
unload and exit leave behind. The sweep over batches and beams is kept in the saved figures. Ends with status 2 where there is no GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from bench import clips, clock_model, measure
from bench.backlog import same
from bench.engine import Engine, Job, options_of
from bench.measure import Bar, Failed, Report, run_tree

SPEED_LIMIT, SAME_LIMIT, IDLE_LIMIT_PERCENT, CROWD_SPEED_LIMIT, CROWD_VRAM_LIMIT = 8.0, 0.99, 5.0, 3.0, 0.334
VRAM_LIMIT_PERCENT, START_LIMIT_S = 5.0, 2.0
LOOK_EVERY_S = 0.05
CROWD = 4
SWEEP_BATCHES, SWEEP_BEAMS = (1, 4, 8, 16, 32), (1, 5)


class Card:
    """One GPU as NVML sees it."""

    def __init__(self, index: int) -> None:
        try:
            import pynvml

            pynvml.nvmlInit()
            self._nvml = pynvml
            self._handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            self.name = str(pynvml.nvmlDeviceGetName(self._handle))
        except Exception as error:
            raise Failed(f"there is no usable NVIDIA GPU here ({error}); this script needs one") from error

    def used_mib(self) -> float:
        return float(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used) / 2**20

    def busy_percent(self) -> float:
        return float(self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu)


class CardWatch:
    """Peak memory above what was used at the start, and utilisation, sampled until the block ends."""

    def __init__(self, card: Card) -> None:
        self._card = card
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_mib = 0.0
        self.busy: list[float] = []

    def __enter__(self) -> CardWatch:
        self._before_mib = self._card.used_mib()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    @property
    def idle_percent(self) -> float:
        return round(100 - statistics.fmean(self.busy), 2) if self.busy else 100.0

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self.peak_mib = max(self.peak_mib, self._card.used_mib() - self._before_mib)
            self.busy.append(self._card.busy_percent())


class Run(NamedTuple):
    """A backlog through one engine, the first clips left out as a warm-up."""

    wall_s: float
    windows_a_s: float
    texts: list[str]
    filled: float
    vram_mib: float
    idle_percent: float


class Place(NamedTuple):
    """What all measurements share."""

    card: Card
    model: str
    compute_type: str
    state_dir: str

    def engine(self, batch: int) -> Engine:
        return Engine(self.model, batch=batch, device="cuda", compute_type=self.compute_type, state_dir=self.state_dir)


def backlog(place: Place, paths: Sequence[str], *, batch: int, beam: int = 5) -> Run:
    """All clips through one engine."""
    options = options_of(place.model, beam_size=beam)
    with CardWatch(place.card) as whole:
        engine = place.engine(batch)
        engine.work([Job(path, options) for path in paths[: 2 * batch]])
        engine.counters = type(engine.counters)()
        jobs = [Job(path, options) for path in paths]
        with CardWatch(place.card) as working:
            began = time.monotonic()
            engine.work(jobs)
            wall_s = time.monotonic() - began
        engine.stop()
    windows = sum(len(job.windows) for job in jobs)
    filled = engine.counters.windows / max(1, engine.counters.room)
    return Run(wall_s, windows / wall_s, [job.text for job in jobs], round(filled, 3), round(whole.peak_mib), working.idle_percent)


def loop_windows_a_s(place: Place, paths: Sequence[str]) -> float:
    """A faster-whisper loop over clips of one window each."""
    command = [sys.executable, "-m", "bench.peers.faster_whisper_loop", "--device", "cuda", "--compute-type", place.compute_type]
    said = run_tree([*command, place.model, "0", *paths[:2], *paths]).said
    ended_s = said["about"]["ended_s"]
    return len(paths) / (ended_s[-1] - ended_s[1])


def crowd(place: Place, paths: Sequence[str]) -> tuple[float, float]:
    """Four engines with batches of one, side by side: windows a second, VRAM in MiB."""
    with CardWatch(place.card) as watch:
        engines = [place.engine(1) for _ in range(CROWD)]
        shares = [[Job(path, options_of(place.model)) for path in paths[number::CROWD]] for number in range(CROWD)]
        threads = [threading.Thread(target=engine.work, args=(jobs,)) for engine, jobs in zip(engines, shares, strict=True)]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall_s = time.monotonic() - began
        for engine in engines:
            engine.stop()
    return sum(len(job.windows) for jobs in shares for job in jobs) / wall_s, watch.peak_mib


def sweep(place: Place, paths: Sequence[str]) -> list[dict[str, Any]]:
    """Windows a second and peak VRAM for each batch and beam."""
    rows = []
    for beam in SWEEP_BEAMS:
        for batch in SWEEP_BATCHES:
            run = backlog(place, paths, batch=batch, beam=beam)
            row = {"batch": batch, "beam": beam, "windows_a_s": round(run.windows_a_s, 2), "vram_mib": run.vram_mib, "filled": run.filled}
            rows.append({**row, "idle_percent": run.idle_percent})
            print(f"  {rows[-1]}", flush=True)
    return rows


def vram_error_percent(rows: Sequence[dict[str, Any]]) -> float:
    """The peak at the largest batch, foretold by a straight line through the two before it, against what was measured."""
    low, high, last = sorted((row for row in rows if row["beam"] == SWEEP_BEAMS[-1]), key=lambda row: int(row["batch"]))[-3:]
    slope = (high["vram_mib"] - low["vram_mib"]) / (high["batch"] - low["batch"])
    foretold = high["vram_mib"] + slope * (last["batch"] - high["batch"])
    return round(100 * abs(foretold - last["vram_mib"]) / max(1.0, last["vram_mib"]), 2)


def left_behind(place: Place, path: str) -> tuple[float, float, float]:
    """Seconds until a second worker is ready; MiB used after unload, and after exit."""
    before_mib = place.card.used_mib()
    first, second = place.engine(1), place.engine(1)
    ready_s = second.ready_s
    first.stop()
    second.work([Job(path, options_of(place.model))])
    second.unload()
    unloaded_mib = place.card.used_mib() - before_mib
    second.stop()
    time.sleep(1.0)  # the driver frees a dead process's memory a moment later
    return ready_s, unloaded_mib, place.card.used_mib() - before_mib


def main() -> int:
    parser = measure.arguments("gpu", __doc__, runs=1, size="large-v3-turbo")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--compute-type", default="float16")
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--context-mib", type=float, default=600.0, help="what a bare CUDA context of this card takes")
    args = parser.parse_args()
    card = Card(args.gpu)
    place = Place(card, clock_model.made(args.home, args.size), args.compute_type, os.path.join(args.home, "state"))
    os.makedirs(place.state_dir, exist_ok=True)
    paths = clips.backlog(args.home, args.clips)
    batched, single = backlog(place, paths, batch=args.batch), backlog(place, paths, batch=1)
    loop = loop_windows_a_s(place, paths)
    crowd_windows_a_s, crowd_mib = crowd(place, paths)
    rows = sweep(place, paths)
    ready_s, unloaded_mib, exited_mib = left_behind(place, paths[0])
    report = Report("gpu", f"{args.clips} clips of 5 to 15 s, {args.size}, {args.compute_type}, batch {args.batch}, on {card.name}")
    report.bars = [
        Bar("windows a second against the faster-whisper loop", round(batched.windows_a_s / loop, 2), SPEED_LIMIT, at_most=False),
        Bar("texts equal to batch 1", round(same(batched.texts, single.texts) / len(paths), 4), SAME_LIMIT, "", at_most=False),
        Bar("GPU idle during the backlog", batched.idle_percent, IDLE_LIMIT_PERCENT, "%"),
        Bar("windows a second against four processes", round(batched.windows_a_s / crowd_windows_a_s, 2), CROWD_SPEED_LIMIT, at_most=False),
        Bar("VRAM against four processes", round(batched.vram_mib / max(1.0, crowd_mib), 3), CROWD_VRAM_LIMIT),
        Bar("VRAM foretold for the largest batch, off by", vram_error_percent(rows), VRAM_LIMIT_PERCENT, "%"),
        Bar("second worker ready", round(ready_s, 2), START_LIMIT_S, "s"),
        Bar("VRAM after unload", round(unloaded_mib), args.context_mib, "MiB"),
        Bar("VRAM after exit", round(exited_mib), 16, "MiB"),
        Bar("mean batch / limit", batched.filled, 0.9, "", at_most=False),
    ]
    report.details = {"gpu": card.name, "windows_a_s": round(batched.windows_a_s, 2), "loop_windows_a_s": round(loop, 2), "sweep": rows}
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
