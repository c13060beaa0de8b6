"""share: a real FUSE share for a test: sshfs that speaks to a local sftp server over a socket pair, without any network.

Owns: `Share`, what is mounted where, and the two processes behind it. It can hang (its server is stopped: whoever asks it anything waits
in the kernel and cannot be killed), answer again, drop (its server is killed: sshfs unmounts and ends) and come back. However a test ends,
nothing is left hanging: `close` kills sshfs, and the kernel answers all who wait with an error. `missing` says why there can be none here.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")
UNCACHED = "dir_cache=no,attr_timeout=0,entry_timeout=0"
"""What is asked of the share is asked of its server, so that a hang is one at once."""
PATIENCE_S = 20.0


def missing() -> str:
    """Why no share can be mounted here; "" where one can."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "no FUSE here: /dev/fuse is absent or not ours"
    absent = [name for name in ("sshfs", "fusermount3") if shutil.which(name) is None]
    if absent:
        return f"no {' and no '.join(absent)} here (apt package sshfs)"
    return "" if _server() else "no sftp-server here (apt package openssh-sftp-server)"


def _server() -> str:
    return next((path for path in SERVERS if os.access(path, os.X_OK)), "")


class Share:
    """What lies in `served`, mounted at `point`."""

    def __init__(self, served: Path, point: Path) -> None:
        self.served = served
        self.point = point
        served.mkdir(parents=True, exist_ok=True)
        point.mkdir(parents=True, exist_ok=True)
        self._server: subprocess.Popen[bytes] | None = None
        self._sshfs: subprocess.Popen[bytes] | None = None
        self.mount()

    def __enter__(self) -> Share:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def mounted(self) -> bool:
        """By the table of mounts: a share that hangs is not asked."""
        point = os.fsencode(os.path.realpath(self.point.parent)) + b"/" + os.fsencode(self.point.name)
        with open("/proc/self/mountinfo", "rb") as mounts:
            return any(line.split(b" ")[4] == point for line in mounts)

    def mount(self) -> None:
        """Mount it (again)."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._server = subprocess.Popen([_server()], stdin=ours.fileno(), stdout=ours.fileno(), stderr=subprocess.DEVNULL)
            words = ["sshfs", "-f", "-o", f"passive,{UNCACHED}", f":{self.served}", str(self.point)]
            self._sshfs = subprocess.Popen(words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=subprocess.DEVNULL)
        self._until(lambda: self.mounted, "it is mounted")

    def hang(self) -> None:
        """From now on nothing is answered."""
        self._signal(signal.SIGSTOP)

    def answer(self) -> None:
        """Go on, with what was asked meanwhile first."""
        self._signal(signal.SIGCONT)

    def freeze(self) -> None:
        """sshfs itself stops: not even what needs no server is answered."""
        assert self._sshfs is not None
        self._sshfs.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._sshfs is not None
        self._sshfs.send_signal(signal.SIGCONT)

    def drop(self) -> None:
        """The server dies; sshfs ends, and leaves the bare mount point."""
        self._signal(signal.SIGKILL)
        self._until(lambda: not self.mounted, "it is unmounted")
        self._bury()

    def break_off(self) -> None:
        """sshfs itself dies: the mount stays, and all that is asked of it is an error (ENOTCONN)."""
        assert self._sshfs is not None
        self._sshfs.kill()
        self._bury()

    def unmount(self) -> None:
        """Lazily: for who comes now it is the bare mount point; who has it open goes on."""
        subprocess.run(["fusermount3", "-u", "-z", str(self.point)], check=False, capture_output=True)

    def close(self) -> None:
        """Nothing of it is left, and nobody waits for it."""
        for process in (self._sshfs, self._server):
            if process is not None:
                process.kill()
        self._bury()
        if self.mounted:
            self.unmount()

    def _bury(self) -> None:
        for process in (self._sshfs, self._server):
            if process is not None:
                if process is self._server:
                    process.kill()
                process.wait(PATIENCE_S)
        self._sshfs = self._server = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._server is not None
        self._server.send_signal(number)

    def _until(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + PATIENCE_S
        while not condition():
            assert time.monotonic() < until, f"not within {PATIENCE_S:g} s: {what}"
            time.sleep(0.01)
