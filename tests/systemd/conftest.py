"""Machines for tests. Where none can be booted (not root, no overlayfs, no cgroup v2, no namespaces, no systemd) tests skip and say why."""

from __future__ import annotations

import os
import subprocess
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from machine import CLIPS, COMMAND, LONG_SENTENCES, TOOLS, Sandbox, Service


@pytest.fixture(scope="session")
def sandboxes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Sandbox]:
    """Boots a sandbox, where that is possible."""
    looked = subprocess.run([TOOLS / "can.sh", tmp_path_factory.mktemp("probe")], capture_output=True, text=True, check=False)
    if looked.returncode != 0:
        pytest.skip(f"no real systemd for tests here: {looked.stdout.strip() or looked.stderr.strip()}")
    if not os.path.exists(COMMAND):
        pytest.skip("no real systemd for tests here: whisperd is not installed in this Python environment")
    return lambda: Sandbox(tmp_path_factory.mktemp("sandbox"))


@pytest.fixture
def service(sandboxes: Callable[[], Sandbox]) -> Iterator[Service]:
    """A machine of its own, whisperd installed and not started."""
    sandbox = sandboxes()
    try:
        yield Service(sandbox)
    finally:
        sandbox.end()


@pytest.fixture(scope="module")
def running(sandboxes: Callable[[], Sandbox]) -> Iterator[Service]:
    """A machine on which whisperd runs, shared by the tests of one module: each has its own file names and puts back what it changed."""
    sandbox = sandboxes()
    try:
        service = Service(sandbox)
        service.start()
        yield service
    finally:
        sandbox.end()


@pytest.fixture(scope="session")
def long_recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sentence many times with pauses between: minutes of audio, a window of the engine for each."""
    path = tmp_path_factory.mktemp("recordings") / "long.wav"
    with wave.open(str(CLIPS / "meeting.wav")) as clip, wave.open(str(path), "wb") as out:
        out.setparams(clip.getparams())
        spoken = clip.readframes(clip.getnframes()) + bytes(clip.getframerate() * clip.getsampwidth() * clip.getnchannels())
        for _ in range(LONG_SENTENCES):
            out.writeframes(spoken)
    return path
