"""`whisperd plan` on a real ledger: the last plans as sentences, history into a file, that file through a policy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from whisperd.cli import main
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import CardMinute, JobOptions, Plan, Sighting

BEGIN = 1_700_000_000.0
CARD = {"gpu": "GPU-1", "model": "small", "compute_type": "float16", "batch": 8, "workers": 2}
REASON = {"gpu": "GPU-1", "code": "trial_kept", "text": "2 workers instead of 1: it brought 40 % more", "facts": [["gain", 0.4]]}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """An installation that has worked for two hours: 120 recordings, one GPU, two workers with batch 8 at 50 times real time."""
    (tmp_path / "state").mkdir()
    (tmp_path / "in").mkdir()
    (tmp_path / "c.toml").write_text(f'state_dir = "{tmp_path}/state"\n[[inbox]]\npath = "{tmp_path}/in"\n')
    ledger = Ledger(str(tmp_path / "state"), epoch="first life")
    inbox = ledger.register_inbox(str(tmp_path / "in").encode(), b"/out", BEGIN)
    for number in range(120):
        seen = Sighting(path=b"secret-%d.wav" % number, dev=1, inode=number, size=32_000 * 3000, mtime_ns=3, ctime_ns=4)
        job = ledger.see(inbox, seen, BEGIN)
        ledger.settle(job, seen, JobOptions(model="small"), BEGIN + 60.0 * number)
    ledger.record_plan(Plan(workers=1, reason="of an earlier release"), BEGIN - 10)
    ledger.record_plan(Plan(workers=2, reason="as it was"), BEGIN, body={"cards": [CARD], "reasons": [REASON]})
    minute = {"gpu": "GPU-1", "samples": 60, "memory_total_mib": 16384, "workers": 2.0, "batch": 8, "audio_s": 3000.0}
    used = {"memory_used_min_mib": 4400, "memory_used_max_mib": 4400, "own_max_mib": 4000, "utilisation_mean_percent": 70.0}
    ledger.record_minutes([CardMinute(at=BEGIN + 60.0 * step, **minute, **used) for step in range(1, 121)])
    ledger.close()
    yield tmp_path


def said(home: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["plan", "--config", f"{home}/c.toml", *words]) == 0
    return capsys.readouterr().out


def test_the_last_plans_are_told_as_sentences(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """When, what should run, and why; the newest last; what an earlier release kept is shown as it is."""
    lines = said(home, capsys).splitlines()
    assert lines[0].endswith("1 worker")
    assert lines[1].strip() == "of an earlier release"
    assert lines[2].endswith("2 workers with batch 8 for small (float16) on GPU-1")
    assert lines[3].strip() == "GPU-1: 2 workers instead of 1: it brought 40 % more [trial_kept]"
    assert len(said(home, capsys, "--limit", "1").splitlines()) == 2
    shown: dict[str, Any] = json.loads(said(home, capsys, "--json"))
    assert shown["schema"] == "whisperd.plan/1"
    assert shown["plans"][1]["reasons"][0]["code"] == "trial_kept"


def test_history_is_exported_without_names_and_replayed(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file holds recordings, minutes and plans, and no name; the policy's figures stand beside what happened."""
    file = home / "trace.jsonl"
    assert "120 recordings, 120 minutes, 1 plans" in said(home, capsys, "export", str(file), "--days", "100000")
    assert b"secret" not in file.read_bytes()
    assert str(home).encode() not in file.read_bytes()
    table = said(home, capsys, "simulate", str(file), "--policy", "fixed-2x8")
    assert "policy fixed-2x8" in table
    shown = json.loads(said(home, capsys, "simulate", str(file), "--policy", "current", "--json"))
    assert shown["schema"] == "whisperd.replay/1"
    assert shown["happened"]["speed"] == pytest.approx(50, rel=0.01)
    assert shown["replayed"]["speed"] > 0


def test_what_cannot_be_done_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that exists is not written over; a file that is no trace, an unknown policy: a sentence and exit code 3."""
    file = home / "trace.jsonl"
    said(home, capsys, "export", str(file), "--days", "100000")
    config = ["plan", "--config", f"{home}/c.toml"]
    for words, what in (
        (["export", str(file)], "cannot write"),
        (["simulate", str(file), "--policy", "fixed-2x"], "no policy"),
        (["simulate", str(home / "absent")], "cannot read"),
        (["simulate", str(home / "c.toml")], "line 1 is no line of a trace"),
        (["simulate", str(file), "--policy", "guess"], "no policy 'guess'"),
        (["simulate", str(file), "--policy", "fixed-x"], "no policy 'fixed-x'"),
    ):
        assert main([*config, *words]) == 3
        assert what in capsys.readouterr().err
