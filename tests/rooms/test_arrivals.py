"""Ten ways in which files arrive in a folder, a hundred times each: none is taken before it is whole, none is missed (issue 5).

The real tools write (rsync, a local smbd with smbclient, sftp's server); a way whose tool is absent is left out.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from test_watcher import QUIET_S, Daemon

from whisperd.vocabulary import Sighting
from whisperd.wire import OpenSource, Sightings, SourceLost, SourceOpened

EACH = 100
AT_ONCE = 3  # of each way
PATIENCE_S = 120.0
SFTP_SERVER = "/usr/lib/openssh/sftp-server"

Way = Callable[[Path, Path], None]
"""Brings the content of the first file to the second, a name in the inbox."""


# --- the ways --------------------------------------------------------------------------------------------------------------------


def slow_copy(source: Path, target: Path) -> None:
    """In parts, with pauses."""
    with target.open("wb") as file:
        for part in _parts(source.read_bytes(), 4):
            file.write(part)
            file.flush()
            time.sleep(0.8 * QUIET_S)


def stalled(source: Path, target: Path) -> None:
    """Half of it, nothing for several quiet periods with the file held open, the rest."""
    first, second = _parts(source.read_bytes(), 2)
    with target.open("wb") as file:
        file.write(first)
        file.flush()
        time.sleep(4 * QUIET_S)
        file.write(second)


def preallocated(source: Path, target: Path) -> None:
    """Its whole size at once, filled from the beginning."""
    content = source.read_bytes()
    with target.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        for part in _parts(content, 4):
            file.write(part)
            file.flush()
            time.sleep(0.5 * QUIET_S)


def part_then_rename(source: Path, target: Path) -> None:
    part = target.with_name(target.name + ".part")
    slow_copy(source, part)
    time.sleep(2 * QUIET_S)
    part.rename(target)


def moved_across(source: Path, target: Path) -> None:
    """mv from another filesystem: a copy, then its times and mode, then the source goes."""
    aside = Path(shutil.copy(source, source.with_name(f"{source.name} aside")))
    subprocess.run(["mv", str(aside), str(target)], check=True)


def hard_link(source: Path, target: Path) -> None:
    """From a folder of the same filesystem, outside the inbox."""
    aside = target.parent.parent / f"aside {target.name}"
    shutil.copy(source, aside)
    os.link(aside, target)


def rsync(source: Path, target: Path) -> None:
    subprocess.run(["rsync", "--times", "--bwlimit=4m", str(source), str(target)], check=True)


def rsync_inplace(source: Path, target: Path) -> None:
    subprocess.run(["rsync", "--times", "--inplace", "--bwlimit=4m", str(source), str(target)], check=True)


def sftp(source: Path, target: Path) -> None:
    batch = f'put "{source}" "{target}"\n'
    subprocess.run(["sftp", "-q", "-b", "-", "-D", SFTP_SERVER], input=batch, text=True, check=True, capture_output=True)


def _parts(content: bytes, number: int) -> Iterator[bytes]:
    size = -(-len(content) // number)
    for at in range(0, len(content), size):
        yield content[at : at + size]


class Samba:
    """A local smbd that shares one directory with everybody."""

    def __init__(self, share: Path) -> None:
        self.place = Path(tempfile.mkdtemp(prefix="whisperd-smbd-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        places = "".join(
            f"{name} = {self.place}\n" for name in ("private dir", "lock dir", "state directory", "cache directory", "pid directory")
        )
        self.config = self.place / "smb.conf"
        self.config.write_text(
            f"[global]\nmap to guest = Bad User\nguest account = root\nlog file = {self.place}/log\nncalrpc dir = {self.place}/rpc\n"
            f"interfaces = 127.0.0.1\nbind interfaces only = yes\nsmb ports = {self.port}\ndisable spoolss = yes\n{places}"
            f"[inbox]\npath = {share}\nguest ok = yes\nread only = no\n"
        )
        self.process = subprocess.Popen(
            ["smbd", "--foreground", "--no-process-group", "--configfile", str(self.config)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def put(self, source: Path, target: Path) -> None:
        subprocess.run(
            ["smbclient", "//127.0.0.1/inbox", "-p", str(self.port), "-N", "-s", str(self.config), "-c", f'put "{source}" "{target.name}"'],
            check=True,
            capture_output=True,
        )

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.place, ignore_errors=True)


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
    found: dict[str, Way] = {way.__name__: way for way in (slow_copy, stalled, preallocated, part_then_rename, moved_across, hard_link)}
    if shutil.which("rsync"):
        found |= {way.__name__: way for way in (rsync, rsync_inplace)}
    if shutil.which("sftp") and os.path.exists(SFTP_SERVER):
        found["sftp"] = sftp
    if not (shutil.which("smbd") and shutil.which("smbclient") and os.geteuid() == 0):
        yield found
        return
    samba = Samba(daemon.inbox)
    try:
        deadline = time.monotonic() + 20
        while not samba.answers() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield {**found, "smbclient": samba.put}
    finally:
        samba.end()


# --- what is made of them --------------------------------------------------------------------------------------------------------


class Judge:
    """Opens whatever settles at once, and holds its content against what is meant to arrive."""

    def __init__(self, daemon: Daemon, meant: dict[bytes, str]) -> None:
        self._daemon = daemon
        self._meant = meant
        self._heard = self._read = 0
        self._asked: list[bytes] = []
        self.whole: Counter[bytes] = Counter()
        self.partial: list[bytes] = []

    def step(self) -> None:
        daemon = self._daemon
        daemon.take_in(0.2)
        for frame in daemon.frames[self._heard :]:
            if isinstance(frame, Sightings):
                for sighting in frame.settled:
                    self._open(sighting)
            elif isinstance(frame, SourceOpened):
                self._judge(self._asked.pop(0), daemon.descriptors[self._read])
                self._read += 1
            elif isinstance(frame, SourceLost):  # it has changed since: then it settles anew
                self._asked.pop(0)
        self._heard = len(daemon.frames)

    def _open(self, sighting: Sighting) -> None:
        assert self._daemon.child is not None
        self._asked.append(sighting.path)
        self._daemon.child.send(OpenSource(job=1, sighting=sighting))

    def _judge(self, path: bytes, descriptor: int) -> None:
        with open(descriptor, "rb", closefd=False) as file:
            sha256 = hashlib.sha256(file.read()).hexdigest()
        if sha256 == self._meant[path]:
            self.whole[path] += 1
        else:
            self.partial.append(path)


@pytest.mark.timeout(300)
def test_none_is_taken_before_it_is_whole_and_none_is_missed(daemon: Daemon, ways: dict[str, Way]) -> None:
    """A hundred files by each way, several at a time: whatever settles has its whole content when it is opened, and all of them settle."""
    chance = random.Random(5)
    shelf = Path(tempfile.mkdtemp(prefix="whisperd-arrivals-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    meant: dict[bytes, str] = {}
    errands: list[tuple[Way, Path, Path]] = []
    try:
        for name, way in ways.items():
            for number in range(EACH):
                source = shelf / f"{name} {number}.wav"
                source.write_bytes(chance.randbytes(chance.randint(1, 200_000)))
                meant[os.fsencode(source.name)] = hashlib.sha256(source.read_bytes()).hexdigest()
                errands.append((way, source, daemon.inbox / source.name))
        chance.shuffle(errands)
        judge = Judge(daemon, meant)
        daemon.watch()
        with ThreadPoolExecutor(AT_ONCE * len(ways)) as carriers:
            under_way = [carriers.submit(way, source, target) for way, source, target in errands]
            deadline = time.monotonic() + PATIENCE_S
            while judge.whole.keys() != meant.keys() and time.monotonic() < deadline:
                judge.step()
        for errand in under_way:
            errand.result()
    finally:
        shutil.rmtree(shelf)
    assert not judge.partial, f"taken before they were whole: {judge.partial}"
    assert meant.keys() == judge.whole.keys(), f"missed: {sorted(meant.keys() - judge.whole.keys())[:20]}"
    print(f"{len(meant)} files by {len(ways)} ways: {', '.join(ways)}")
