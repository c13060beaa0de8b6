"""The house stands as drawn: floors and doors of docs/design.md §3."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_floors_and_doors() -> None:
    """import-linter's contracts hold: nobody imports upwards, siblings never meet, processes are started and not imported."""
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_one_door_for_each_dependency() -> None:
    """Each outside package is imported by its one room only."""
    doors = {
        "pynvml": {"dispatcher/probe.py"},
        "sdnotify": {"daemon.py"},
        "apscheduler": {"health/health.py"},
        "watchdog": {"watcher/hints.py"},
        "faster_whisper": {"engine/model.py", "engine/mel.py", "engine/silero.py", "engine/transcript.py"},
        "ctranslate2": {"engine/model.py", "engine/torch_encoder.py", "engine/transcript.py"},
        "torch": {"engine/torch_encoder.py"},
        "tokenizers": {"engine/model.py"},
        "av": {"engine/audio.py", "engine/media.py"},
        "sqlite_utils": {"ledger/reader.py", "ledger/connection.py", "ledger/migrations.py"},
        "pydantic_settings": {"config.py"},
        "urllib3": {"notifier/webhook.py"},
        "subprocess": {"child.py", "cli/config.py", "cli/demo.py", "cli/scan.py", "notifier/hook.py"},
    }
    package = ROOT / "whisperd"
    for name, allowed in doors.items():
        found = {
            str(path.relative_to(package))
            for path in package.rglob("*.py")
            for line in path.read_text("utf-8").splitlines()
            if line.strip().startswith((f"import {name}", f"from {name}"))
        }
        assert found <= allowed, f"{name} is imported by {sorted(found - allowed)}"
