"""scan: an inbox with very many files: how long until the ledger knows them, and what looking again costs.

A tree of empty files (kept for the next run) below --tree, a real watcher process, a ledger in this process. Cold: from the start of the
watcher until the ledger has a row of every file. Idle: the same tree with every file done, listed once more; the memory of the watcher over
both of its lives; the processor time of a polled inbox at rest; the verbs `status` and `jobs` on that ledger.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator

from bench import measure
from bench.measure import Bar, Failed, Report, cpu_s
from whisperd import cli
from whisperd.child import Child
from whisperd.config import toml_value
from whisperd.ledger.ledger import Ledger
from whisperd.watcher.folders import COARSE_S
from whisperd.watcher.pace import IDLE_PER_COST
from whisperd.wire import Scanned, ScanNow, Sightings, WatcherOut, WatchInbox

COLD_LIMIT_S, IDLE_LIMIT_S, RSS_LIMIT_MIB, BUSY_LIMIT_PERCENT, VERB_LIMIT_MS = 12.0, 6.0, 250.0, 1.0, 100.0
FILES_IN_FOLDER = 1000
PATIENCE_S = 600.0
RESCAN_S, POLL_S = 300.0, 5.0  # the defaults
TRIGGERS = "SELECT name, sql FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'job'"


class Watched:
    """One life of a watcher; this process is its daemon."""

    def __init__(self, ledger: Ledger, inbox: str) -> None:
        self._ledger = ledger
        self.stored_s = 0.0
        self._inbox = ledger.register_inbox(os.fsencode(inbox), os.fsencode(inbox + ".out"), time.time())
        self.child: Child[WatcherOut] = Child(name="watcher", module="whisperd.watcher", receives=WatcherOut, now=time.monotonic())
        self.child.send(
            WatchInbox(
                inbox=self._inbox,
                path=os.fsencode(inbox),
                ledger=ledger.state_dir,
                exclude=(),
                include=("*.mp3", "*.wav"),
                ignore=(),
                recursive=True,
                events="polling",
                quiet_s=3600.0,
                rescan_s=RESCAN_S,
                poll_s=POLL_S,
            )
        )

    def look(self) -> None:
        """Ask for everything to be listed."""
        self.child.send(ScanNow())

    def serve(self, until: float, *, or_scanned: bool = True) -> Scanned | None:
        """Take what it says into the ledger; until it has scanned, or until that time."""
        while (left_s := until - time.monotonic()) > 0:
            for frame in self.child.channel.wait(left_s):
                if isinstance(frame.message, Sightings):
                    began = time.monotonic()
                    self._ledger.see_all(self._inbox, frame.message.seen, time.time())
                    self.stored_s += time.monotonic() - began
                elif isinstance(frame.message, Scanned) and or_scanned:
                    return frame.message
        return None

    def scanned(self) -> Scanned:
        said = self.serve(time.monotonic() + PATIENCE_S)
        if said is None:
            raise Failed(f"no scan within {PATIENCE_S:g} s: {self.child.read_stderr()}")
        return said

    def peak_mib(self) -> float:
        with open(f"/proc/{self.child.pid}/status", encoding="ascii") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) / 1024

    def close(self) -> None:
        self.child.drain(time.monotonic())
        self.child.gone(time.monotonic())


def tree(place: str, files: int) -> str:
    """A directory with so many empty files, made where it is not there."""
    top = os.path.join(place, f"scan-{files}")
    whole = top + ".whole"
    if not os.path.exists(whole):
        shutil.rmtree(top, ignore_errors=True)
        for number in range(files):
            folder, position = divmod(number, FILES_IN_FOLDER)
            if position == 0:
                os.makedirs(f"{top}/station-{folder % 10}/tape-{folder:05}")
            os.close(os.open(f"{top}/station-{folder % 10}/tape-{folder:05}/recording-{number:07}.mp3", os.O_CREAT | os.O_WRONLY, 0o644))
        os.close(os.open(whole, os.O_CREAT))
    return top


@contextlib.contextmanager
def watched(ledger: Ledger, inbox: str) -> Iterator[Watched]:
    watcher = Watched(ledger, inbox)
    try:
        yield watcher
    finally:
        watcher.close()


def finish_all(ledger: Ledger) -> None:
    """As if every job were done, one in each second until now. What guards the moves is set aside meanwhile."""
    connection = ledger.db.conn
    guards = connection.execute(TRIGGERS).fetchall()
    with ledger.transaction():
        for name, _ in guards:
            connection.execute(f"DROP TRIGGER {name}")
        connection.execute("UPDATE job SET state = 'done', verb = 'publish', options = '{}', transcript = 'x', ended_at = seen_at - id")
        for _, made_by in guards:
            connection.execute(made_by)


def verb_ms(state_dir: str, *words: str) -> float:
    """The least of three runs of a verb in this process: no start of an interpreter."""
    config = os.path.join(state_dir, "whisperd.toml")
    with open(config, "w", encoding="utf-8") as file:
        file.write(f"state_dir = {toml_value(state_dir)}\n[[inbox]]\npath = {toml_value(os.path.join(state_dir, 'inbox'))}\n")
    took: list[float] = []
    for _ in range(3):
        began = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            code = cli.main([*words, "--config", config])
        took.append(1000 * (time.monotonic() - began))
        if code != 0:
            raise Failed(f"whisperd {' '.join(words)} ended with {code}")
    return min(took)


def run(report: Report, inbox: str, state_dir: str, files: int, rest_s: float) -> None:
    """All of it, into the report."""
    millions = files / 1e6
    ledger = Ledger(state_dir, epoch="bench")
    began = time.monotonic()
    with watched(ledger, inbox) as watcher:
        said = watcher.scanned()
        cold_s, cold_mib = time.monotonic() - began, watcher.peak_mib()
        report.details |= {"stored_s": round(watcher.stored_s, 2), "cold_cpu_s": round(cpu_s(watcher.child.pid), 2)}
    known = sum(ledger.counts().values())
    if not said.files == known == files:
        raise Failed(f"{files} files, {said.files} found, {known} in the ledger")
    finish_all(ledger)
    ledger.truncate_wal()
    began = time.monotonic()
    with watched(ledger, inbox) as watcher:
        watcher.scanned()
        first_s = time.monotonic() - began
        watcher.look()
        idle = watcher.scanned()
        watcher.serve(time.monotonic() + COARSE_S, or_scanned=False)  # the next listing is the one it relies on
        listing_s = cpu_s(watcher.child.pid)
        watcher.look()
        watcher.scanned()
        listing_s = cpu_s(watcher.child.pid) - listing_s
        watcher.serve(time.monotonic() + POLL_S, or_scanned=False)
        busy_s = cpu_s(watcher.child.pid)
        watcher.serve(time.monotonic() + rest_s, or_scanned=False)
        busy_s = cpu_s(watcher.child.pid) - busy_s
        idle_mib = watcher.peak_mib()
    percent = 100 * busy_s / rest_s
    report.details |= {"files": files, "rows": known, "listing_cpu_s": round(listing_s, 3), "polls_percent": round(percent, 3)}
    stored_s, cold_cpu_s = (report.details[name] for name in ("stored_s", "cold_cpu_s"))
    report.notes.append(f"cold: {stored_s} s in the ledger's see_all; {cold_cpu_s} s of the watcher's processor time")
    rest_percent = percent + 100 * listing_s / max(RESCAN_S, IDLE_PER_COST * listing_s)
    million = f"of {files} files"
    report.bars += [
        Bar(f"cold scan {million} into the ledger", round(cold_s, 2), COLD_LIMIT_S * max(millions, 0.1), "s"),
        Bar(f"a new watcher's first scan {million}, all known", round(first_s, 2), None, "s"),
        Bar(f"idle rescan {million}", round(idle.took_s, 2), IDLE_LIMIT_S * max(millions, 0.1), "s"),
        Bar("most memory of the watcher, cold", round(cold_mib, 1), RSS_LIMIT_MIB, "MiB"),
        Bar("most memory of the watcher, all known", round(idle_mib, 1), RSS_LIMIT_MIB, "MiB"),
        Bar(
            "polled inbox at rest: polls and rescans, of one core",
            round(rest_percent, 3),
            BUSY_LIMIT_PERCENT,
            "%",
        ),
        Bar("whisperd status", round(verb_ms(state_dir, "status"), 1), VERB_LIMIT_MS, "ms"),
        Bar("whisperd jobs", round(verb_ms(state_dir, "jobs"), 1), VERB_LIMIT_MS, "ms"),
        Bar("whisperd jobs --state done", round(verb_ms(state_dir, "jobs", "--state", "done"), 1), VERB_LIMIT_MS, "ms"),
    ]
    ledger.close()


def main() -> int:
    parser = measure.arguments("scan", __doc__)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--tree", metavar="DIR", help="where the files are made and kept (default: in --home)")
    parser.add_argument("--rest", type=float, default=20.0, help="seconds of the inbox at rest")
    args = parser.parse_args()
    os.makedirs(args.home, exist_ok=True)
    report = Report("scan", f"an inbox with {args.files} files")
    with tempfile.TemporaryDirectory(prefix="scan-", dir=args.home) as state_dir:
        run(report, tree(args.tree or args.home, args.files), state_dir, args.files, args.rest)
    return report.finish(args)


if __name__ == "__main__":
    sys.exit(measure.ending(main))
