"""What people read: names that cannot fool anybody, errors that say what to do, journal entries that cannot be forged."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import example, given
from loguru import logger

from whisperd import log
from whisperd.child import ChildMove
from whisperd.errors import ConfigError, StateDirError, WhisperdError, printable
from whisperd.ledger.connection import LedgerBroken, LedgerBusy, LedgerStuck
from whisperd.ledger.ledger import IllegalMove, LeaseLost, NoSuchJob
from whisperd.log import journal_datagram
from whisperd.wire import WireBroken, WireClosed

# --- names -----------------------------------------------------------------------------------------------------------------------

NAMES = st.binary(max_size=40) | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogateescape"))
ESCAPE = re.compile(r"\\(?:(\\)|x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8}))")


def unprintable(shown: str) -> bytes:
    """Read a shown name back, by the rules that `printable` gives."""

    def one(escape: re.Match[str]) -> str:
        backslash, byte, short, long = escape.groups()
        if backslash:
            return "\\"
        if byte:
            return os.fsdecode(bytes([int(byte, 16)]))
        return chr(int(short or long, 16))

    return os.fsencode(ESCAPE.sub(one, shown))


@given(name=NAMES)
@example(name=b"line\nbreak")
@example(name=b"\x1b[2J\x07\x00\x7f")
@example(name="\u202egnp.exe\u2028\u00a0\u0085\ufeff".encode())
@example(name=b"\x80 and \xc2\x80")
@example(name=b"\\n \\x41 \\")
@example(name="\U000e0001 \ue0001".encode())
@example(name=b"\xed\xa0\x80")
def test_a_shown_name_is_one_harmless_line(name: bytes) -> None:
    """No control byte, line break, hidden or direction-changing character of a name gets through; it stays one line that any log takes."""
    shown = printable(name)
    assert shown.isprintable()
    assert len(shown.splitlines()) <= 1
    shown.encode()


@given(name=NAMES)
@example(name=b"\x80 and \xc2\x80")
@example(name="\u00ad\xad".encode() + b"\xad")
@example(name="\U000e0001 \ue0001".encode())
@example(name=b"\\x80")
def test_different_names_never_look_the_same(name: bytes) -> None:
    """A shown name can be read back to the very bytes, so no two files are ever shown alike."""
    assert unprintable(printable(name)) == name


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"talk one.wav", "talk one.wav"),
        ("žluťoučký kůň 🎤.wav".encode(), "žluťoučký kůň 🎤.wav"),
        (b"a\nb", r"a\x0ab"),
        (b"\xff.wav", r"\xff.wav"),
        (b"\xc2\x80", r"\u0080"),
        (b"back\\slash", r"back\\slash"),
        ("\u202e", r"\u202e"),
        ("\U000e0001", r"\U000e0001"),
        (b"", ""),
    ],
)
def test_how_names_are_shown(name: bytes | str, shown: str) -> None:
    """Ordinary names of any language are shown as they are; the rest as `\\xNN`, `\\uNNNN` or `\\UNNNNNNNN`."""
    assert printable(name) == shown


# --- errors ----------------------------------------------------------------------------------------------------------------------


def test_an_error_says_what_and_what_to_do() -> None:
    """The text of an error is what happened and, in brackets, what to do."""
    assert str(WhisperdError("cannot do it", hint="do this")) == "cannot do it (do this)"
    assert str(WhisperdError("cannot do it")) == "cannot do it"
    assert WhisperdError("cannot do it").args == ("cannot do it",)


def test_codes_are_stable() -> None:
    """The codes people search for and scripts compare are these, each of one error only."""
    codes = {
        WhisperdError: ("internal", False),
        ConfigError: ("config", False),
        StateDirError: ("state_dir", False),
        LedgerBroken: ("ledger_broken", False),
        LedgerBusy: ("ledger_busy", True),
        LedgerStuck: ("ledger_stuck", True),
        NoSuchJob: ("no_such_job", False),
        IllegalMove: ("illegal_move", False),
        LeaseLost: ("lease_lost", False),
        WireClosed: ("wire_closed", True),
        WireBroken: ("wire_broken", False),
        ChildMove: ("child_move", False),
    }
    assert {kind: (kind.code, kind.recoverable) for kind in codes} == codes
    assert len({code for code, _ in codes.values()}) == len(codes)


# --- the journal -----------------------------------------------------------------------------------------------------------------


def read_datagram(data: bytes) -> list[tuple[str, bytes]]:
    """The fields of an entry, as systemd.io/JOURNAL_NATIVE_PROTOCOL says that journald reads them."""
    fields = []
    while data:
        line, newline, rest = data.partition(b"\n")
        assert newline, "a field without an end"
        if b"=" in line:
            name, _, value = line.partition(b"=")
            data = rest
        else:
            name, length = line, int.from_bytes(rest[:8], "little")
            assert len(rest) >= 8 + length + 1, "a length beyond the entry"
            value, data = rest[8 : 8 + length], rest[8 + length :]
            assert data[:1] == b"\n"
            data = data[1:]
        assert re.fullmatch(rb"[A-Z][A-Z0-9_]{0,63}", name), f"journald drops a field named {name!r}"
        fields.append((name.decode(), value))
    return fields


HOSTILE = st.text(max_size=30) | st.lists(
    st.sampled_from(["\n", "=", "PRIORITY=0", "MESSAGE", "\x00", "\x08\x00\x00\x00\x00\x00\x00\x00", "_UID=0", "\r", "\udcff", "ž"]),
    max_size=8,
).map("".join)


@given(message=HOSTILE, values=st.lists(HOSTILE, min_size=5, max_size=5))
@example(message="done\nPRIORITY=0\nWHISPERD_JOB=1", values=["\n", "a\n", "", "=\n=", "\n\n"])
@example(message="", values=["", "", "", "", ""])
def test_a_journal_entry_cannot_be_forged(message: str, values: list[str]) -> None:
    """Whatever stands in a message or a name, journald reads exactly the fields that were written, each once, byte for byte."""
    names = ("PRIORITY", "WHISPERD_JOB", "WHISPERD_INBOX", "WHISPERD_EVENT", "WHISPERD_CHILD")
    fields = dict(zip(names, values, strict=True))
    expected = [(name, value.encode("utf-8", "backslashreplace")) for name, value in {"MESSAGE": message, **fields}.items()]
    assert read_datagram(journal_datagram(message, fields)) == expected


@pytest.fixture
def quiet_logger() -> Iterator[None]:
    """The one logger of the process, put back afterwards."""
    logger.remove()
    yield
    logger.remove()
    logger.add(sys.stderr)


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quiet_logger: None) -> Iterator[socket.socket]:
    """A socket where journald's would be."""
    path = str(tmp_path / "journal")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journald:
        journald.bind(path)
        journald.settimeout(10)
        monkeypatch.setattr(log, "JOURNAL_SOCKET", path)
        monkeypatch.setenv("JOURNAL_STREAM", f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}")
        yield journald
        logger.remove()


def test_the_journal_gets_structured_fields(journal: socket.socket) -> None:
    """`journalctl WHISPERD_JOB=42` finds a file's life: job, inbox, event and child are fields; other extras stay out; levels map to
    syslog's."""
    log.to_journal_or_stderr("DEBUG")
    logger.bind(job=42, inbox="/srv/in", event="settled", secret="s").info("job 42 settled: {curly} <red>braces</red>")
    fields = dict(read_datagram(journal.recv(65536)))
    assert fields == {
        "MESSAGE": b"job 42 settled: {curly} <red>braces</red>",
        "PRIORITY": b"6",
        "SYSLOG_IDENTIFIER": b"whisperd",
        "WHISPERD_JOB": b"42",
        "WHISPERD_INBOX": b"/srv/in",
        "WHISPERD_EVENT": b"settled",
    }
    told = {}
    for level in ("DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR", "CRITICAL"):
        logger.log(level, level)
        told[level] = int(dict(read_datagram(journal.recv(65536)))["PRIORITY"])
    assert told == {"DEBUG": 7, "INFO": 6, "SUCCESS": 5, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


def test_a_traceback_is_one_entry_and_tells_no_values(journal: socket.socket) -> None:
    """An exception is one entry with its traceback; the values of variables (a secret among them) are not in it."""
    log.to_journal_or_stderr("DEBUG")

    def fail(password: str) -> float:
        return len(password) / 0

    try:
        fail("hunter2")
    except ZeroDivisionError:
        logger.exception("it went wrong")
    fields = dict(read_datagram(journal.recv(65536)))
    assert fields["MESSAGE"].startswith(b"it went wrong\nTraceback")
    assert fields["MESSAGE"].endswith(b"ZeroDivisionError: division by zero")
    assert b"hunter2" not in fields["MESSAGE"].replace(b'fail("hunter2")', b"")


@pytest.mark.parametrize("how", ["absent", "nobody listens", "closes later"])
def test_without_a_journal_standard_error_serves(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet_logger: None
) -> None:
    """A journal that is not there, refuses, or goes away later costs no line and no life: standard error has it."""
    path = str(tmp_path / "journal")
    monkeypatch.setattr(log, "JOURNAL_SOCKET", path)
    monkeypatch.setenv("JOURNAL_STREAM", f"{os.fstat(2).st_dev}:{os.fstat(2).st_ino}")
    journald = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if how != "absent":
        journald.bind(path)
    if how == "nobody listens":
        journald.close()
    log.to_journal_or_stderr("INFO")
    journald.close()
    logger.info("still here")
    logger.debug("not asked for")
    told = capsys.readouterr().err
    assert "still here" in told
    assert "not asked for" not in told


def test_a_childs_log_is_plain_lines() -> None:
    """A child's log is `LEVEL message` on standard error, without colours or times: the daemon adds those."""
    script = "from whisperd.log import to_parent; to_parent(); from loguru import logger; logger.debug('a'); logger.error('b {} c')"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (ran.stderr, ran.stdout) == ("DEBUG a\nERROR b {} c\n", "")
