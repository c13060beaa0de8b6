"""arrivals: the ten ways in which files come into a folder, and a thousand errands over them.

Owns: the ways (the real tools write: rsync, a local smbd with smbclient, sftp's server; one whose tool is absent is left out), `Errand`,
one file to be brought, and `carry`, which brings many of them at once. Their pauses are told in quiet periods, so that they try the
settling and nothing else.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

SFTP_SERVER = "/usr/lib/openssh/sftp-server"
BYTES_MAX = 200_000
SMBD_PATIENCE_S = 20.0

Way = Callable[[Path, Path, float], object]
"""Brings the content of the first file to the second, a name in the inbox, whose quiet period is the third."""


class Errand(NamedTuple):
    """One file to be brought."""

    way: Way
    source: Path
    target: Path


# --- the ways ------------------------------------------------------------------------------------------------------------------


def slow_copy(source: Path, target: Path, quiet_s: float) -> None:
    """In parts, with pauses."""
    with target.open("wb") as file:
        for part in _parts(source.read_bytes(), 4):
            file.write(part)
            file.flush()
            time.sleep(0.8 * quiet_s)


def stalled(source: Path, target: Path, quiet_s: float) -> None:
    """Half of it, nothing for several quiet periods with the file held open, the rest."""
    first, second = _parts(source.read_bytes(), 2)
    with target.open("wb") as file:
        file.write(first)
        file.flush()
        time.sleep(4 * quiet_s)
        file.write(second)


def preallocated(source: Path, target: Path, quiet_s: float) -> None:
    """Its whole size at once, filled from the beginning."""
    content = source.read_bytes()
    with target.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, len(content))
        for part in _parts(content, 4):
            file.write(part)
            file.flush()
            time.sleep(0.5 * quiet_s)


def part_then_rename(source: Path, target: Path, quiet_s: float) -> None:
    part = target.with_name(target.name + ".part")
    slow_copy(source, part, quiet_s)
    time.sleep(2 * quiet_s)
    part.rename(target)


def moved_across(source: Path, target: Path, quiet_s: float) -> None:
    """mv from another filesystem: a copy, then its times and mode, then the source goes."""
    aside = Path(shutil.copy(source, source.with_name(f"{source.name} aside")))
    subprocess.run(["mv", str(aside), str(target)], check=True)


def hard_link(source: Path, target: Path, quiet_s: float) -> None:
    """From a folder of the same filesystem, outside the inbox."""
    aside = target.parent.parent / f"aside {target.name}"
    shutil.copy(source, aside)
    os.link(aside, target)


def rsync(source: Path, target: Path, quiet_s: float) -> None:
    subprocess.run(["rsync", "--times", "--bwlimit=4m", str(source), str(target)], check=True)


def rsync_inplace(source: Path, target: Path, quiet_s: float) -> None:
    subprocess.run(["rsync", "--times", "--inplace", "--bwlimit=4m", str(source), str(target)], check=True)


def sftp(source: Path, target: Path, quiet_s: float) -> None:
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
            start_new_session=True,  # when it ends it ends its whole group
        )

    def put(self, source: Path, target: Path, quiet_s: float) -> None:
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


@contextmanager
def ways_into(inbox: Path) -> Iterator[dict[str, Way]]:
    """Every way there is here, by name; a smbd serves the inbox meanwhile."""
    found: dict[str, Way] = {way.__name__: way for way in (slow_copy, stalled, preallocated, part_then_rename, moved_across, hard_link)}
    if shutil.which("rsync"):
        found |= {way.__name__: way for way in (rsync, rsync_inplace)}
    if shutil.which("sftp") and os.path.exists(SFTP_SERVER):
        found["sftp"] = sftp
    if not (shutil.which("smbd") and shutil.which("smbclient") and os.geteuid() == 0):
        yield found
        return
    samba = Samba(inbox)
    try:
        deadline = time.monotonic() + SMBD_PATIENCE_S
        while not samba.answers() and time.monotonic() < deadline:
            time.sleep(0.05)
        yield {**found, "smbclient": samba.put}
    finally:
        samba.end()


# --- very many of them ---------------------------------------------------------------------------------------------------------


@contextmanager
def errands(ways: Mapping[str, Way], each: int, inbox: Path, *, seed: int) -> Iterator[list[Errand]]:
    """So many files for each way, no two alike, in an order by chance; on another filesystem than the inbox, where there is one."""
    chance = random.Random(seed)
    shelf = Path(tempfile.mkdtemp(prefix="whisperd-arrivals-", dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    try:
        found = []
        for name, way in ways.items():
            for number in range(each):
                source = shelf / f"{name} {number}.wav"
                source.write_bytes(chance.randbytes(chance.randint(2, BYTES_MAX)))
                found.append(Errand(way, source, inbox / source.name))
        chance.shuffle(found)
        yield found
    finally:
        shutil.rmtree(shelf)


@contextmanager
def carry(some: Sequence[Errand], at_once: int, quiet_s: float) -> Iterator[list[Future[object]]]:
    """Run the errands beside the caller, so many at a time. Raises what one of them raised when the caller's part is over."""
    with ThreadPoolExecutor(at_once) as carriers:
        under_way = [carriers.submit(errand.way, errand.source, errand.target, quiet_s) for errand in some]
        yield under_way
    for errand in under_way:
        errand.result()
