"""log: loguru, to the journal when there is one, to stderr otherwise.

Owns: the one loguru set-up. Under systemd every record goes to journald by its native protocol with structured fields
(`WHISPERD_JOB`, `WHISPERD_INBOX`, `WHISPERD_EVENT`), so that `journalctl WHISPERD_JOB=42` is one file's life.
Fails softly: a journal that cannot be reached is replaced by stderr, since a daemon must not die of its log.
A traceback shows where, not the values there: those may be secrets.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import TYPE_CHECKING

from loguru import logger

if TYPE_CHECKING:
    from loguru import Message

JOURNAL_SOCKET = "/run/systemd/journal/socket"
FIELDS = ("job", "inbox", "event", "child")
_FORMAT = "<dim>{time:HH:mm:ss.SSS}</dim> <level>{level: <7}</level> {message}"
_CHILD_FORMAT = "{level} {message}"


def _priority(level_no: int) -> int:
    """syslog priority for a loguru level (systemd.journal-fields(7))."""
    for floor, priority in ((50, 2), (40, 3), (30, 4), (25, 5), (20, 6)):
        if level_no >= floor:
            return priority
    return 7


def journal_datagram(message: str, fields: dict[str, str]) -> bytes:
    """One entry in journald's native protocol: a value with a line break is sent with its length, so it cannot forge a field."""
    out = bytearray()
    for name, value in {"MESSAGE": message, **fields}.items():
        data = value.encode("utf-8", "backslashreplace")
        if b"\n" in data:
            out += name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            out += name.encode() + b"=" + data + b"\n"
    return bytes(out)


class _Journal:
    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self._socket.connect(JOURNAL_SOCKET)
        except OSError:
            self._socket.close()
            raise

    def __call__(self, message: Message) -> None:
        record = message.record
        fields = {"PRIORITY": str(_priority(record["level"].no)), "SYSLOG_IDENTIFIER": "whisperd"}
        for name in FIELDS:
            if name in record["extra"]:
                fields[f"WHISPERD_{name.upper()}"] = str(record["extra"][name])
        text = record["message"]
        if record["exception"] is not None:
            text = str(message).rstrip("\n")
        try:
            self._socket.send(journal_datagram(text, fields))
        except OSError as error:  # journald restarts; a lost line must not stop the daemon, stderr still reaches somebody
            sys.stderr.write(f"cannot reach the journal ({error}): {text}\n")


def stderr_is_the_journal() -> bool:
    """Whether systemd connected our standard error to the journal; a shell in a desktop session inherits only the variable."""
    stream = os.fstat(2)
    return os.environ.get("JOURNAL_STREAM") == f"{stream.st_dev}:{stream.st_ino}"


def to_journal_or_stderr(level: str) -> None:
    """Set up logging of the daemon and of the command line."""
    logger.remove()
    if stderr_is_the_journal():
        try:
            logger.add(_Journal(), level=level, format="{message}", diagnose=False)
            return
        except OSError:  # no journal there after all: standard error is always somewhere
            pass
    logger.add(sys.stderr, level=level, format=_FORMAT, diagnose=False)


def to_parent() -> None:
    """Set up logging of a child process: plain lines on stderr, which the daemon reads and puts into the journal."""
    logger.remove()
    logger.add(sys.stderr, level="DEBUG", format=_CHILD_FORMAT, colorize=False, backtrace=False, diagnose=False)
