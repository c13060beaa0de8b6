"""installation: whisperd as its user has it: an inbox, an outbox, a state directory, a configuration file, and real processes.

Owns: `Installation` (one-time runs, desk commands), `Daemon` (a long-running one), and `assert_ledger_and_disk_agree`, the sentence that
must be true whenever the work is over. Tests wait for what the ledger or the daemon says, never for time to pass.
"""

from __future__ import annotations

import hashlib
import html
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from whisperd.errors import printable
from whisperd.ledger.queries import Queries, Row

FORMATS = ("txt", "srt", "vtt", "tsv", "json")
TERMINAL = ("done", "failed", "cancelled", "gone")
PATIENCE_S = 120.0
ERROR_SUFFIX = b".error.txt"


class Run(NamedTuple):
    """One command that ended."""

    code: int
    out: str
    err: str


def environment(**extra: str) -> dict[str, str]:
    """The environment without what would lead whisperd elsewhere: its own settings, the journal, a service manager."""
    foreign = ("JOURNAL_STREAM", "NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("WHISPERD_") and key not in foreign}
    return {**kept, "COLUMNS": "200", **extra}


def whisperd(*arguments: str | Path, timeout_s: float = PATIENCE_S, **extra: str) -> Run:
    """Run one whisperd command to its end."""
    done = subprocess.run(
        [sys.executable, "-m", "whisperd", *arguments],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=timeout_s,
        env=environment(**extra),
    )
    return Run(done.returncode, done.stdout, done.stderr)


class Installation:
    """One whisperd in a directory of its own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.inbox = home / "inbox"
        self.outbox = home / "outbox"
        self.state = home / "state"
        self.config = home / "whisperd.toml"
        self.inbox.mkdir(parents=True)
        self.settings: dict[str, Any] = {
            "state_dir": str(self.state),
            "cache_dir": str(home / "cache"),
            "engine": {"model": "demo"},
            "transcription": {"language": "en"},
            "watcher": {"quiet_s": 0.3},
            "outbox": {"formats": list(FORMATS)},
            "inbox": [{"path": str(self.inbox)}],
        }
        self.dropped: dict[bytes, Photograph] = {}
        self.write_config()

    def write_config(self, **sections: Any) -> Path:
        """Write the settings, each section given added to what it has; None removes a section."""
        for name, value in sections.items():
            if value is None:
                self.settings.pop(name, None)
            elif isinstance(value, dict):
                self.settings[name] = {**self.settings.get(name, {}), **value}
            else:
                self.settings[name] = value
        self.config.write_text(toml(self.settings))
        return self.config

    # --- files ---

    def drop(self, source: Path, name: str | bytes = b"") -> bytes:
        """Copy a recording into the inbox (times included) and remember it; its name there, relative to the inbox."""
        path = os.fsencode(name) or os.fsencode(source.name)
        target = os.path.join(os.fsencode(self.inbox), path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        shutil.copy2(source, target)
        self.dropped[path] = photograph(target)
        return path

    def published(self) -> dict[bytes, bytes]:
        """Every file below the outbox, with its content."""
        return {path: Path(os.fsdecode(full)).read_bytes() for path, full in walk(self.outbox)}

    def transcript(self, base: str | bytes) -> dict[str, Any]:
        """The JSON transcript of that name (without its extension)."""
        with open(os.path.join(os.fsencode(self.outbox), os.fsencode(base) + b".json"), encoding="utf-8") as file:
            return dict(json.load(file))

    def error_file(self, path: str | bytes) -> str:
        """The text of the error file of a source."""
        with open(os.path.join(os.fsencode(self.outbox), os.fsencode(path) + ERROR_SUFFIX), encoding="utf-8") as file:
            return file.read()

    # --- the ledger ---

    @contextmanager
    def ledger(self) -> Iterator[Queries]:
        queries = Queries.open(str(self.state))
        try:
            yield queries
        finally:
            queries.close()

    def jobs(self) -> dict[bytes, Row]:
        """The newest job of each path."""
        with self.ledger() as ledger:
            return {bytes(row["path"]): row for row in ledger.jobs()}

    def job(self, path: str | bytes) -> Row:
        return self.jobs()[os.fsencode(path)]

    # --- processes ---

    def desk(self, verb: str, *arguments: str, timeout_s: float = PATIENCE_S) -> Run:
        """One command of the operator, with this configuration."""
        words = verb.split()
        return whisperd(*words, "--config", self.config, *arguments, timeout_s=timeout_s)

    def run_once(self, timeout_s: float = PATIENCE_S) -> Run:
        return self.desk("run", "--once", timeout_s=timeout_s)

    @contextmanager
    def daemon(self, *, ready: bool = True) -> Iterator[Daemon]:
        """A daemon for the time of the block; killed at its end if the test did not stop it."""
        daemon = Daemon(self)
        try:
            if ready:
                daemon.wait_notified("READY=1")
            yield daemon
        finally:
            daemon.close()


def toml(settings: dict[str, Any]) -> str:
    """Settings as TOML: plain values, then tables, then arrays of tables."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items() if not _is_table(value)]
    for key, value in settings.items():
        for table in (value if isinstance(value, list) else [value]) if _is_table(value) else []:
            lines.append(f"[[{key}]]" if isinstance(value, list) else f"[{key}]")
            lines += [f"{name} = {json.dumps(item)}" for name, item in table.items()]
    return "\n".join(lines) + "\n"


def _is_table(value: object) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


class Daemon:
    """A long-running `whisperd run`, with its log and what it tells its service manager."""

    def __init__(self, place: Installation) -> None:
        self.place = place
        self.log_path = place.home / "whisperd.log"
        address = str(place.home / "notify")
        Path(address).unlink(missing_ok=True)
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notify.bind(address)
        self._notified: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "whisperd", "run", "--config", str(place.config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment(NOTIFY_SOCKET=address),
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text("utf-8", "replace")

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def stop(self, timeout_s: float = 30.0) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._notify.shutdown(socket.SHUT_RDWR)
        self._notify.close()

    def _listen(self) -> None:
        """Take in what the daemon tells, as a service manager does: always, or the daemon would wait for it."""
        try:
            while message := self._notify.recv(65536):
                for line in message.decode().splitlines():
                    self._notified.put(line)
        except OSError:  # closed
            pass

    # --- waiting ---

    def wait_notified(self, line: str, timeout_s: float = PATIENCE_S) -> None:
        """Wait until the daemon tells its service manager this (again, when it has done so before)."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            self._assert_alive(line)
            try:
                if self._notified.get(timeout=0.2) == line:
                    return
            except queue.Empty:
                continue
        raise AssertionError(f"not told within {timeout_s:g} s: {line}\n{self.log()[-4000:]}")

    def wait_until(self, condition: Callable[[Queries], Any], what: str, timeout_s: float = PATIENCE_S) -> Any:
        """Wait until the ledger says so; the answer. Fails at once when the daemon dies."""
        until = time.monotonic() + timeout_s
        with self.place.ledger() as ledger:
            while not (answer := condition(ledger)):
                self._assert_alive(what)
                assert time.monotonic() < until, f"not within {timeout_s:g} s: {what}; {ledger.counts()}\n{self.log()[-4000:]}"
                time.sleep(0.02)
        return answer

    def wait_ended(self, path: str | bytes, state: str = "done", *, after: int = 0, timeout_s: float = PATIENCE_S) -> Row:
        """Wait until the newest job of a path (one after job `after`) has ended and is told of in the outbox."""
        wanted = os.fsencode(path)

        def ended(ledger: Queries) -> Row | None:
            rows = [row for row in ledger.jobs() if row["path"] == wanted and row["id"] > after]
            if not rows or rows[-1]["state"] not in TERMINAL or (rows[-1]["state"] == "failed" and rows[-1]["reported_at"] is None):
                return None
            return rows[-1]

        row: Row = self.wait_until(ended, f"{printable(wanted)} has ended", timeout_s)
        assert row["state"] == state, (row["state"], row["failure_what"])
        return row

    def _assert_alive(self, what: str) -> None:
        code = self.process.poll()
        assert code is None, f"the daemon ended with {code} before: {what}\n{self.log()[-4000:]}"

    # --- children ---

    def children(self, module: str) -> list[int]:
        """Process ids of the living children that run this module."""
        found = []
        for pid in map(int, _read(f"/proc/{self.pid}/task/{self.pid}/children").split()):
            if module in _read(f"/proc/{pid}/cmdline").split("\0") and ") Z " not in _read(f"/proc/{pid}/stat"):
                found.append(pid)
        return found

    def child(self, module: str) -> int:
        """The one living child that runs this module; waits for it."""
        until = time.monotonic() + PATIENCE_S
        while len(found := self.children(module)) != 1:
            self._assert_alive(f"one child runs {module}")
            assert time.monotonic() < until, f"{len(found)} children run {module}\n{self.log()[-4000:]}"
            time.sleep(0.02)
        return found[0]


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


# --- the truth, once the work is over ------------------------------------------------------------------------------------------


class Photograph(NamedTuple):
    """All that may not change of a source."""

    mode: int
    inode: int
    mtime_ns: int
    sha256: str


def photograph(path: bytes) -> Photograph:
    found = os.stat(path, follow_symlinks=False)
    with open(path, "rb") as file:
        return Photograph(found.st_mode, found.st_ino, found.st_mtime_ns, hashlib.sha256(file.read()).hexdigest())


def walk(root: Path) -> Iterator[tuple[bytes, bytes]]:
    """Every file below, as (relative, full) names."""
    top = os.fsencode(root)
    for folder, _, names in os.walk(top):
        for name in names:
            full = os.path.join(folder, name)
            yield os.path.relpath(full, top), full


def assert_ledger_and_disk_agree(place: Installation, *, foreign: dict[bytes, bytes] | None = None) -> None:
    """Nothing lost, nothing twice, nothing half-written: what the ledger says is what lies in the outbox, and nothing else does,
    except for `foreign` files, which somebody else put there and which are as they were."""
    with place.ledger() as ledger:
        assert ledger.integrity() == "ok"
        assert not list(ledger.db.query("PRAGMA foreign_key_check"))
        rows = list(ledger.jobs())
        assert [row for row in rows if row["state"] not in TERMINAL] == [], "every job has ended"
        promised: dict[bytes, str] = {}
        for row in rows:
            _assert_told_once(ledger, row)
            promised |= {bytes(item["path"]): item["sha256"] for item in ledger.publications(row["id"])}
        files = place.published()
        assert {path: files.pop(path, None) for path in foreign or {}} == (foreign or {})
        assert {path: hashlib.sha256(content).hexdigest() for path, content in files.items()} == promised
        for row in {bytes(row["path"]): row for row in rows}.values():
            _assert_whole(ledger, row, files)
    assert {path: photograph(full) for path, full in walk(place.inbox)} == place.dropped, "nothing has changed in the inbox"
    assert not [path for path, _ in walk(place.home) if b".whisperd-" in path or path.endswith(b".partial")]


def _assert_told_once(ledger: Queries, row: Row) -> None:
    """One publish for each done job; one report for each failure that was final."""
    verbs = [event["verb"] for event in ledger.events(row["id"])]
    assert verbs.count("publish") == (row["state"] == "done"), verbs
    assert verbs.count("report") == verbs.count("fail") + verbs.count("reject"), verbs


def _assert_whole(ledger: Queries, row: Row, files: dict[bytes, bytes]) -> None:
    """The newest job of a source has everything in the outbox that it should have."""
    own = {item["format"]: files[bytes(item["path"])] for item in ledger.publications(row["id"])}
    if row["state"] == "done":
        assert set(own) == set(ledger.options(row).formats), (row["path"], set(own))
        assert_formats_agree(own)
        if "json" in own:
            source = json.loads(own["json"])["source"]
            assert (source["sha256"], source["size"]) == (row["sha256"], row["size"])
    elif row["state"] == "failed":
        text = own["error.txt"].decode()
        assert row["failure_what"] in text and f"Job {row['id']}" in text
        assert text.startswith(printable(os.path.basename(row["path"])))


def assert_formats_agree(files: dict[str, bytes]) -> None:
    """Every format parses by its own rules, and all of them say the same."""
    parsed = {name: PARSERS[name](content.decode()) for name, content in files.items()}
    texts = {name: "".join("".join(text.split()) for _, text in lines) for name, lines in parsed.items()}  # subtitles are cut elsewhere
    said = next(iter(texts.values()))
    assert all(text == said for text in texts.values()), texts
    for name, lines in parsed.items():
        starts = [start for start, _ in lines if start is not None]
        assert starts == sorted(starts), (name, starts)


Line = tuple[int | None, str]  # start in milliseconds, where the format has one; text

_SRT = re.compile(r"(\d+)\n(\d\d+):(\d\d):(\d\d),(\d{3}) --> (\d\d+):(\d\d):(\d\d),(\d{3})\n((?:[^\n]+\n)+)")
_VTT = re.compile(r"(\d\d+):(\d\d):(\d\d)\.(\d{3}) --> (\d\d+):(\d\d):(\d\d)\.(\d{3})\n((?:[^\n]+\n)+)")


def _txt(content: str) -> list[Line]:
    return [(None, line) for line in content.splitlines()]


def _srt(content: str) -> list[Line]:
    cues = [_SRT.fullmatch(block.rstrip("\n") + "\n") for block in content.split("\n\n") if block]
    assert all(cues), content
    assert [int(cue[1]) for cue in cues if cue] == list(range(1, len(cues) + 1))
    return [(_ms(*cue.groups()[1:5]), cue[10]) for cue in cues if cue]


def _vtt(content: str) -> list[Line]:
    head, *blocks = content.split("\n\n")
    assert head.strip() == "WEBVTT"
    cues = [_VTT.fullmatch(block.rstrip("\n") + "\n") for block in blocks if block]
    assert all(cues), content
    return [(_ms(*cue.groups()[:4]), html.unescape(cue[9])) for cue in cues if cue]


def _tsv(content: str) -> list[Line]:
    header, *rows = [line.split("\t") for line in content.splitlines()]
    assert header == ["start", "end", "text"]
    assert all(int(start) < int(end) for start, end, _ in rows)
    return [(int(start), text) for start, _, text in rows]


def _json(content: str) -> list[Line]:
    document = json.loads(content)
    assert document["schema"] == "whisperd.transcript/1"
    segments = [segment for segment in document["segments"] if segment["text"]]
    assert document["text"] == "\n".join(segment["text"] for segment in segments)
    assert all(segment["end"] <= document["source"]["duration_s"] + 0.1 for segment in segments)
    return [(round(1000 * segment["start"]), segment["text"]) for segment in segments]


PARSERS: dict[str, Callable[[str], list[Line]]] = {"txt": _txt, "srt": _srt, "vtt": _vtt, "tsv": _tsv, "json": _json}


def _ms(hours: str, minutes: str, seconds: str, ms: str) -> int:
    return ((int(hours) * 60 + int(minutes)) * 60 + int(seconds)) * 1000 + int(ms)
