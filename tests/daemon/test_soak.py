"""The pool re-sized five hundred times while jobs run: nothing is left over (issue 4). `python -m bench.soak` tells the figures."""

from __future__ import annotations

from pathlib import Path

import pytest
from floor import environment

from bench.soak import RSS_LIMIT_PERCENT, soak
from whisperd.dispatcher import machine


def test_five_hundred_resizes_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers, batches and models turn by a seeded sequence. Against the state after fifty resizes there is no process, descriptor,
    thread or shared memory more, and the memory has not grown by more than a fiftieth. All jobs are done."""
    for name, value in environment(tmp_path, window_s=0.01).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "cores", lambda: 8)
    found = soak(tmp_path, 500)
    assert found.end[:3] == found.warm[:3], "processes, descriptors, threads"
    assert found.end.shared_memory <= found.warm.shared_memory
    assert found.rss_growth_percent <= RSS_LIMIT_PERCENT
    assert found.starts >= 100, "engines did come and go"
