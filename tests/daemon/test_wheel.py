"""What is shipped is what is tested: the wheel carries model, schema, unit, example configuration and clips."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", target, ROOT],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(target.glob("whisperd-*.whl"))


def test_the_wheel_carries_its_data(wheel: Path) -> None:
    """Model, schema, unit, configuration and clips are in the wheel, and nothing of the tests is."""
    names = set(zipfile.ZipFile(wheel).namelist())
    for name in (
        "whisperd/share/demo_model/model.bin",
        "whisperd/share/clips/clips.csv",
        "whisperd/share/systemd/whisperd.service",
        "whisperd/share/etc/whisperd.toml",
        "whisperd/ledger/schema.sql",
        "whisperd/ledger/schema_2.sql",
        "whisperd/ledger/schema_3.sql",
        "whisperd/py.typed",
    ):
        assert name in names
    assert not [name for name in names if name.startswith(("tests/", "scripts/", "docs/"))]


def test_the_wheel_runs_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed into a clean environment, far from the checkout, `whisperd demo` transcribes its clips, and the unit names that place."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    site = next(environment.glob("lib/python3*/site-packages"))
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The dependencies are borrowed as a plain path: its .pth files, and so the editable checkout, are not followed.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = environment / "bin/python"
    where = subprocess.run(
        [python, "-c", "import whisperd; print(whisperd.__file__)"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert where.stdout.startswith(str(site))

    done = subprocess.run(
        [python, "-m", "whisperd", "demo", "--keep", tmp_path / "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the meeting is on" in done.stdout
    unit = subprocess.run([python, "-m", "whisperd", "config", "unit"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert f"ExecStart={environment}/bin/whisperd run" in unit
    example = subprocess.run(
        [python, "-m", "whisperd", "config", "example"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    assert "[[inbox]]" in example
