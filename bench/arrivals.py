"""arrivals: how long after a file is whole a watcher says so: a thousand files by the ten ways of tests/tools/arrivals.py.

A real watcher process with the default times of polling, once with native events and once polled; this process is its daemon and keeps
what it is told in a ledger. Latency: from the last change of the file (its ctime: the last write, rename, link or setting of times) until
the frame that calls it settled is here, less the quiet period. First all files, many at a time; then some one by one into an inbox at
rest, which is polled most rarely. A file that settles before its last change, or not at all, is a failure of the run.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from bench import measure
from bench.measure import Bar, Failed, Report, percentile
from tests.tools.arrivals import Errand, Way, carry, errands, hard_link, ways_into
from whisperd.child import Child
from whisperd.config import WatcherSettings
from whisperd.ledger.ledger import Ledger, Settling
from whisperd.vocabulary import JobOptions, Sighting
from whisperd.wire import Scanned, Sightings, WatcherOut, WatchInbox

LIMITS_S = {"native": 2.0, "polling": 10.0}
PATIENCE_S = 120.0
SHARE = 0.95
APART_S = (6.0, 12.0)  # between two single files: polls have become rare again
OPTIONS = JobOptions()


class Watched:
    """A watcher and its ledger; when each file was last said to be settled."""

    def __init__(self, home: Path, events: str, quiet_s: float) -> None:
        self.inbox = home / "inbox"
        self.inbox.mkdir()
        (home / "state").mkdir()
        self._ledger = Ledger(str(home / "state"), epoch="bench")
        self._number = self._ledger.register_inbox(os.fsencode(self.inbox), os.fsencode(home / "outbox"), time.time())
        self.settled: dict[bytes, tuple[Sighting, float]] = {}
        self.scans = 0
        defaults = WatcherSettings()
        self.child: Child[WatcherOut] = Child(name="watcher", module="whisperd.watcher", receives=WatcherOut, now=time.monotonic())
        self.child.send(
            WatchInbox(
                inbox=self._number,
                path=os.fsencode(self.inbox),
                ledger=self._ledger.state_dir,
                exclude=(),
                include=("*.wav",),
                ignore=(),
                recursive=True,
                events=events,
                quiet_s=quiet_s,
                rescan_s=defaults.rescan_s,
                poll_s=defaults.poll_s,
            )
        )

    def serve(self, until: Callable[[], bool], patience_s: float) -> bool:
        """Take in what it says until it is so; False when it is not so in time."""
        deadline = time.monotonic() + patience_s
        while not until():
            if (left_s := deadline - time.monotonic()) <= 0:
                return False
            for frame in self.child.channel.wait(min(left_s, 0.1)):
                if isinstance(frame.message, Sightings):
                    self._keep(frame.message, time.time())
                elif isinstance(frame.message, Scanned):
                    self.scans += 1
        return True

    def _keep(self, news: Sightings, at: float) -> None:
        self.settled |= {sighting.path: (sighting, at) for sighting in news.settled}
        with self._ledger.transaction():
            self._ledger.see_all(self._number, news.seen, at)
            self._ledger.settle_all(self._number, [Settling(sighting, OPTIONS) for sighting in news.settled], at)

    def is_final(self, errand: Errand) -> bool:
        """Whether it was called settled as it is now."""
        told = self.settled.get(os.fsencode(errand.target.name))
        return told is not None and told[0].ctime_ns == errand.target.stat().st_ctime_ns

    def latency_s(self, errand: Errand, quiet_s: float) -> float:
        sighting, at = self.settled[os.fsencode(errand.target.name)]
        return at - sighting.ctime_ns / 1e9 - quiet_s

    def close(self) -> None:
        self.child.drain(time.monotonic())
        self.child.gone(time.monotonic())
        self._ledger.close()


def flood(watched: Watched, some: list[Errand], at_once: int, quiet_s: float) -> list[float]:
    """All of them, so many at a time. Raises Failed."""
    with carry(some, at_once, quiet_s) as under_way:
        if not watched.serve(lambda: all(errand.done() for errand in under_way), 10 * PATIENCE_S):
            raise Failed("the files are not brought in time")
    waiting = list(some)

    def whole() -> bool:
        waiting[:] = [errand for errand in waiting if not watched.is_final(errand)]
        return not waiting

    if not watched.serve(whole, PATIENCE_S):
        raise Failed(f"missed {len(waiting)} of {len(some)} files: {[errand.target.name for errand in waiting[:5]]}")
    return [watched.latency_s(errand, quiet_s) for errand in some]


def one_by_one(watched: Watched, some: list[Errand], quiet_s: float, chance: random.Random) -> list[float]:
    """Each into an inbox that has been at rest for a while. Raises Failed."""
    found: list[float] = []
    for errand in some:
        watched.serve(lambda: False, chance.uniform(*APART_S))
        errand.way(errand.source, errand.target, quiet_s)
        if not watched.serve(lambda errand=errand: watched.is_final(errand), PATIENCE_S):  # type: ignore[misc]
            raise Failed(f"missed {errand.target.name}")
        found.append(watched.latency_s(errand, quiet_s))
    return found


def one_life(args: argparse.Namespace, events: str) -> Mapping[str, list[float]]:
    """The latencies of one watcher: under the flood, and at rest. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="arrivals-", dir=args.home) as place:
        home = Path(place)
        watched = Watched(home, events, args.quiet)
        try:
            with ways_into(watched.inbox) as ways:
                args.ways = list(ways)
                single: dict[str, Way] = {"single": hard_link}
                with (
                    errands(ways, args.each, watched.inbox, seed=5) as many,
                    errands(single, args.apart, watched.inbox, seed=6) as few,
                ):
                    found = {"flood": flood(watched, many, args.at_once * len(ways), args.quiet)}
                    return found | {"rest": one_by_one(watched, few, args.quiet, random.Random(7))}
        finally:
            watched.close()


def main() -> int:
    parser = measure.arguments("arrivals", __doc__)
    parser.add_argument("--each", type=int, default=100, help="files by each way")
    parser.add_argument("--at-once", type=int, default=10, help="of each way")
    parser.add_argument("--apart", type=int, default=10, help="single files into an inbox at rest")
    parser.add_argument("--quiet", type=float, default=1.0, help="the quiet period; the ways pause for parts and multiples of it")
    args = parser.parse_args()
    os.makedirs(args.home, exist_ok=True)
    report = Report("arrivals", "from the last write to a file until its watcher calls it settled, less the quiet period")
    for events, limit_s in LIMITS_S.items():
        for when, latencies in one_life(args, events).items():
            if not latencies:
                continue
            name = f"{events}, {len(latencies)} files {'many at a time' if when == 'flood' else 'one by one, at rest'}"
            report.bars += [
                Bar(f"{name}: p50", round(percentile(latencies, 0.5), 3), None, "s"),
                Bar(f"{name}: p95", round(percentile(latencies, SHARE), 3), limit_s, "s"),
                Bar(f"{name}: most", round(max(latencies), 3), None, "s"),
            ]
    defaults = WatcherSettings()
    report.notes.append(
        f"by {', '.join(args.ways)}; quiet_s = {args.quiet:g}, poll_s = {defaults.poll_s:g}, rescan_s = {defaults.rescan_s:g}"
    )
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
