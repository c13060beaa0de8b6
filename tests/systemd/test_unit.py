"""The unit file itself, held against systemd's own opinion and against the defaults of the configuration."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from machine import CHECKOUT, COMMAND, unit

from whisperd.config import DEFAULT_PATH, InboxSettings, Settings

EXPOSURE_MAX = 2.0

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze (Debian package: systemd)")


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The unit as it would be installed from here."""
    path = tmp_path / "whisperd.service"
    path.write_text(unit())
    return path


def lines(name: str) -> list[str]:
    """The values of one setting, in order."""
    return [line.partition("=")[2] for line in unit().splitlines() if line.startswith(name + "=")]


@needs_systemd
def test_systemd_has_nothing_to_complain_about(installed: Path) -> None:
    """`systemd-analyze verify` accepts the unit, as printed for this installation, without a word."""
    if not os.path.exists(COMMAND):
        pytest.skip("whisperd is not installed in this Python environment")
    verified = subprocess.run(["systemd-analyze", "verify", "--man=no", installed], capture_output=True, text=True, check=False)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")


@needs_systemd
def test_little_is_exposed(installed: Path) -> None:
    """`systemd-analyze security` sees an exposure of at most 2.0 of 10 (which is what systemd 252 says)."""
    command = ["systemd-analyze", "security", "--offline=yes", "--no-pager", installed]
    judged = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    found = re.search(r"Overall exposure level for whisperd\.service: ([0-9.]+)", judged)
    assert found, judged
    assert float(found[1]) <= EXPOSURE_MAX, judged


def test_the_unit_is_of_this_installation() -> None:
    """`config unit` names the installation that printed it, in every command, and leaves none of the placeholder's path."""
    assert lines("ExecStart") == [f"{COMMAND} run --config {DEFAULT_PATH}"]
    assert lines("ExecReload") == [f"{COMMAND} config check --config {DEFAULT_PATH}", "/bin/kill -HUP $MAINPID"]
    assert "/opt/whisperd" not in unit()


def test_directories_are_those_of_the_configuration() -> None:
    """What systemd makes for whisperd is what the configuration expects when nobody says otherwise."""
    settings = Settings(inbox=(InboxSettings(path="/srv/whisperd/inbox"),))
    assert settings.state_dir == f"/var/lib/{lines('StateDirectory')[0]}"
    assert settings.cache_dir == f"/var/cache/{lines('CacheDirectory')[0]}"
    assert os.path.dirname(DEFAULT_PATH) == f"/etc/{lines('ConfigurationDirectory')[0]}"


def test_the_daemon_ends_before_systemd_loses_patience() -> None:
    """An orderly stop with the default settings is shorter than TimeoutStopSec, after which systemd would kill."""
    from whisperd import daemon

    settings = Settings(inbox=(InboxSettings(path="/srv/whisperd/inbox"),))
    longest_s = settings.dispatcher.stop_grace_s + daemon.ENGINES_TERM_S + daemon.DELIVERY_S + daemon.CHILDREN_S
    assert longest_s + 10 < float(lines("TimeoutStopSec")[0])


def test_the_first_inbox_is_the_one_of_the_example() -> None:
    """tmpfiles.d makes the inbox and the outbox of the configuration that ships with whisperd."""
    made = [line.split()[1] for line in (CHECKOUT / "systemd/whisperd.tmpfiles.conf").read_text().splitlines() if line.startswith("d ")]
    inbox = InboxSettings(path="/srv/whisperd/inbox")
    assert inbox.path in made
    assert inbox.outbox_path in made
    assert f'path = "{inbox.path}"' in (CHECKOUT / "etc/whisperd.toml").read_text()
