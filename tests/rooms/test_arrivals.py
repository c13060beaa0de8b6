"""Ten ways in which files arrive in a folder, a hundred times each: none is taken before it is whole, none is missed (issue 5).

The ways are those of tests/tools/arrivals.py; how long it takes until a file is taken is measured by `bench/arrivals.py`.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_watcher import QUIET_S, Daemon

from tests.tools.arrivals import Way, carry, errands, ways_into
from whisperd.vocabulary import Sighting
from whisperd.wire import OpenSource, Sightings, SourceLost, SourceOpened, WatcherReady

EACH = 100
AT_ONCE = 6  # of each way
PATIENCE_S = 120.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path)
    yield daemon
    daemon.stop()
    for descriptor in daemon.descriptors:
        os.close(descriptor)
    daemon.ledger.close()


@pytest.fixture
def ways(daemon: Daemon) -> Iterator[dict[str, Way]]:
    with ways_into(daemon.inbox) as found:
        yield found


class Judge:
    """Opens whatever settles at once, and holds its content against what is meant to arrive."""

    def __init__(self, daemon: Daemon, meant: dict[bytes, str]) -> None:
        self._daemon = daemon
        self._meant = meant
        self._heard = 0
        self._asked: list[bytes] = []
        self.whole: Counter[bytes] = Counter()
        self.partial: list[bytes] = []

    def step(self) -> None:
        daemon = self._daemon
        assert daemon.child is not None
        daemon.child.channel.flush()  # of very many questions at once not all found room
        daemon.take_in(0.2)
        for frame in daemon.frames[self._heard :]:
            if isinstance(frame, Sightings):
                for sighting in frame.settled:
                    self._open(sighting)
            elif isinstance(frame, SourceOpened):
                self._judge(self._asked.pop(0), daemon.descriptors.pop(0))
            elif isinstance(frame, SourceLost):  # it has changed since: then it settles anew
                self._asked.pop(0)
        self._heard = len(daemon.frames)

    def _open(self, sighting: Sighting) -> None:
        assert self._daemon.child is not None
        self._asked.append(sighting.path)
        self._daemon.child.send(OpenSource(job=1, sighting=sighting))

    def _judge(self, path: bytes, descriptor: int) -> None:
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # it may only name the file
            os.close(descriptor)  # at once: a thousand of them, and those of the carriers, are too many
            sha256 = hashlib.sha256(file.read()).hexdigest()
        if sha256 == self._meant[path]:
            self.whole[path] += 1
        else:
            self.partial.append(path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("events", ["native", "polling"])
def test_none_is_taken_before_it_is_whole_and_none_is_missed(daemon: Daemon, ways: dict[str, Way], events: str) -> None:
    """A hundred files by each way, several at a time: whatever settles has its whole content when it is opened, and all of them settle;
    by events, and by polls alone."""
    with errands(ways, EACH, daemon.inbox, seed=5) as some:
        meant = {os.fsencode(errand.source.name): hashlib.sha256(errand.source.read_bytes()).hexdigest() for errand in some}
        judge = Judge(daemon, meant)
        daemon.watch(events=events)
        with carry(some, AT_ONCE * len(ways), QUIET_S):
            deadline = time.monotonic() + PATIENCE_S
            while judge.whole.keys() != meant.keys() and time.monotonic() < deadline:
                judge.step()
    assert daemon.frames[0] == WatcherReady(events=events)
    assert not judge.partial, f"taken before they were whole: {judge.partial}"
    assert meant.keys() == judge.whole.keys(), f"missed: {sorted(meant.keys() - judge.whole.keys())[:20]}"
    print(f"{len(meant)} files by {len(ways)} ways: {', '.join(ways)}")
