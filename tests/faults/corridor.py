"""corridor: the way of a file from its discovery to *done* in one process, and what must hold of it whenever it was cut off.

Owns: the order of the durable steps (`walk`), which is that of the daemon's rooms with a scripted engine in place of the real one, and
the invariants (`faults_after_a_cut`, `faults_at_the_end`). The rooms' own functions do every step; nothing is written here in their place.
What is acknowledged is told through memory that outlives the process, never by a system call: those are the ones that are counted.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import time
import uuid
import wave
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from whisperd.dispatcher.delivery import names
from whisperd.dispatcher.reuse import question
from whisperd.dispatcher.staging import DIRECTORY, StagingFailed, open_staged, stage
from whisperd.errors import printable
from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Queries
from whisperd.ledger.store import sighting_of
from whisperd.outbox.__main__ import Desk, answer, prepare
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Segment, Sighting, Summary, Window, assemble
from whisperd.watcher.names import Names
from whisperd.watcher.rows import Rows
from whisperd.watcher.scan import Entry, InboxAbsent, Rules, Walk
from whisperd.watcher.settle import Report, Settler
from whisperd.watcher.source import CannotOpen, open_source
from whisperd.watcher.writers import still_written
from whisperd.wire import OwnFile, Publish, PublishFailed, ServeOutbox

OPTIONS = JobOptions(model="demo", language="en", formats=("txt", "srt", "json"))
LEASE_S = 60.0
WINDOWS = 2
WINDOW_S = 30.0
SOURCE_BYTES = 20_000
SOURCE_MTIME_S = 1_700_000_000
ENGINE = "engine-1"

Accept = Callable[[Sequence[tuple[Sighting, int]]], None]
Content = bytes | CannotOpen | OSError
Acknowledge = Callable[[bytes], None]
"""Told the path of a source whose publication the ledger has taken down: from here on nothing may take its transcript away."""


class Broken(Exception):
    """A step failed in a way that no step may: an internal fault behind a polite answer."""


@dataclass(frozen=True)
class Home:
    """Where one corridor lies. The inbox is only read."""

    inbox: Path
    state_dir: Path
    outbox: Path

    def make(self, sources: int) -> None:
        """An inbox of that many recordings, half of them in a folder, and an empty ledger."""
        for number in range(sources):
            path = self.inbox / (f"talks/lecture {number}.wav" if number % 2 == 0 else f"meeting {number}.wav")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(recording(number))
            os.utime(path, (SOURCE_MTIME_S, SOURCE_MTIME_S))
        (self.state_dir / DIRECTORY).mkdir(parents=True)
        Ledger(str(self.state_dir), epoch="none").close()

    def sources(self) -> list[bytes]:
        return sorted(os.fsencode(path.relative_to(self.inbox)) for path in self.inbox.rglob("*.wav"))

    def terms(self) -> ServeOutbox:
        return ServeOutbox(path=os.fsencode(self.outbox), file_mode=0o640, directory_mode=0o750, like=os.fsencode(self.inbox))

    def begin_anew_like(self, other: Home) -> None:
        """The state as in another home, and no outbox."""
        for place in (self.state_dir, self.outbox):
            shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(other.state_dir, self.state_dir)


def recording(number: int) -> bytes:
    """The content of a recording: a real WAV, of a sound that nobody else has."""
    made = io.BytesIO()
    with wave.open(made, "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", "not compressed"))
        file.writeframes(hashlib.shake_128(bytes([number])).digest(SOURCE_BYTES))
    return made.getvalue()


# --- the steps -----------------------------------------------------------------------------------------------------------------


def walk(home: Home, acknowledge: Acknowledge, *, later_s: float = 0.0) -> None:
    """One life of the daemon: take up, discover, transcribe, publish, tidy up. `later_s` lets what waits be due.

    Raises WhisperdError as the rooms do; then the daemon ends, to be started again.
    """
    ledger = Ledger(str(home.state_dir), epoch=uuid.uuid4().hex)
    try:
        ledger.interrupt_other_epochs(time.time())
        inbox = ledger.register_inbox(os.fsencode(home.inbox), os.fsencode(home.outbox), time.time())
        desk = prepare(home.terms())
        discover(ledger, home, inbox, partial(_settle, ledger))
        for row in ledger.ready(time.time() + later_s):
            _take(ledger, row, home)
        for row in ledger.ready(time.time() + later_s):
            transcribe(ledger, row, partial(content_of, row, home))
        for row in ledger.unpublished():
            _publish(ledger, desk, row, acknowledge)
        ledger.truncate_wal()
    finally:
        ledger.close()


def discover(ledger: Ledger, home: Home, inbox: int, accept: Accept) -> list[Sighting]:
    """Two rounds of the watcher, over its own connection: each file is seen, then settled. None, when the inbox cannot be listed.

    `accept` is told what settled and is not in the queue. Returns what is doubted to be the file that it was.
    """
    doubted: list[Sighting] = []
    root = os.fsencode(home.inbox)
    rules = Rules.of(root, (os.fsencode(home.outbox),), Names((), ()), recursive=True)
    settler = Settler(0.0, lambda sighting: still_written(root, sighting, leases=True))
    rows = Rows(str(home.state_dir), inbox)
    try:
        for now in (0.0, 1.0):
            rows.catch_up(now)
            settler.ledger_moved(rows.known)
            rows.known.begin()
            settler.begin(everything=True)
            try:
                found = Walk(rules, partial(_hold, settler, rows, now)).over(root)
            except InboxAbsent:
                continue
            report = settler.finish(found, rows.known, now, rows.all, rows.twins)
            doubted += report.doubted
            _take_in(ledger, inbox, report, accept)
    finally:
        rows.close()
    return doubted


def _hold(settler: Settler, rows: Rows, now: float, entries: list[Entry], dev: int) -> None:
    settler.observe(entries, dev, rows.known, now, now)


def _take_in(ledger: Ledger, inbox: int, report: Report, accept: Accept) -> None:
    """What the daemon makes of a report: seen and gone in one transaction; what has settled is accepted."""
    now = time.time()
    with ledger.transaction():
        ledger.see_all(inbox, report.seen, now)
        for renamed in report.renamed:
            ledger.rename(inbox, renamed.before, renamed.sighting, now)
        settled = [(sighting, ledger.see(inbox, sighting, now)) for sighting in report.settled]
        for path in report.vanished:
            live = ledger.live_job(inbox, path)
            if live is not None and live["state"] in ("seen", "ready"):
                ledger.vanish(live["id"], now)
    accept([(sighting, job) for sighting, job in settled if ledger.job(job)["state"] == "seen"])


def _settle(ledger: Ledger, settled: Sequence[tuple[Sighting, int]]) -> None:
    """Ready, unexamined: what containers say is another passage."""
    with ledger.transaction():
        for sighting, job in settled:
            ledger.settle(job, sighting, OPTIONS, time.time())


def _take(ledger: Ledger, row: dict[str, Any], home: Home) -> None:
    """Ahead of its turn: the content is read and hashed."""
    content = content_of(row, home)
    if isinstance(content, bytes):
        digest = hashlib.sha256(content).hexdigest()
        ledger.take(row["id"], digest, time.time(), spooled=False, asked=question(OPTIONS, OPTIONS.model))
    elif not is_lost(content):
        ledger.postpone(row["id"], down(content), time.time(), not_before=time.time())
    else:
        ledger.vanish(row["id"], time.time(), note=str(content))


def transcribe(ledger: Ledger, row: dict[str, Any], read: Callable[[], Content]) -> None:
    """Claim, open, one checkpoint for each window, stage, finish."""
    job, now = row["id"], time.time()
    ledger.claim(job, ENGINE, now, lease_s=LEASE_S)
    content = read()
    if not isinstance(content, bytes):
        if is_lost(content):
            ledger.vanish(job, time.time(), note=str(content))
        else:
            ledger.wait(job, ENGINE, down(content), time.time(), not_before=time.time())
        return
    ledger.drop_foreign_checkpoints(job, ENGINE, "corridor", now)
    for window in _windows(content)[len(ledger.windows(job)) :]:
        ledger.checkpoint(job, ENGINE, window, now, lease_s=LEASE_S, duration_s=WINDOWS * WINDOW_S, made_by="corridor")
    _finish(ledger, job, content, now)


def is_lost(error: Exception) -> bool:
    """Gone and changed files begin anew; anything else is waited for."""
    return isinstance(error, CannotOpen) and error.reason in ("gone", "changed")


def down(error: Exception) -> Failure:
    return Failure(kind=FailureKind.WAITING, code="source_down", what=str(error))


def _finish(ledger: Ledger, job: int, content: bytes, now: float) -> None:
    row, name = ledger.job(job), f"{job}.json"
    summary = _summary(content)
    transcript = assemble(
        source=printable(os.path.basename(row["path"])),
        size=row["size"],
        mtime_ns=row["mtime_ns"],
        windows=ledger.windows(job),
        options=ledger.options(row),
        summary=summary,
    )
    try:
        size = stage(ledger.state_dir, name, transcript)
    except StagingFailed as error:
        failure = Failure(kind=FailureKind.WAITING, code=error.code, what=error.what, hint=error.hint)
        ledger.wait(job, ENGINE, failure, time.time(), not_before=time.time())
        return
    with ledger.transaction():
        ledger.finish(
            job,
            ENGINE,
            now,
            transcript=name,
            sha256=summary.source_sha256,
            duration_s=summary.duration_s,
            language=transcript.language,
            process_s=1.0,
            quality=transcript.quality.verdict,
            asked=question(OPTIONS, OPTIONS.model),
            revision=summary.model_revision,
            size=size,
        )
        ledger.record_throughput(job, workers=1, audio_s=summary.duration_s, wall_s=1.0, now=now)


def _publish(ledger: Ledger, desk: Desk, row: dict[str, Any], acknowledge: Acknowledge) -> None:
    """Name, hand over, take down; what the outbox refuses waits."""
    job, path = row["id"], bytes(row["outbox"])
    known = ledger.publications_of_source(row["inbox_id"], row["path"])
    base = ledger.reserve_name(job, path, list(names(row, "{stem}")), "transcript")
    own = tuple(OwnFile(path=item["path"], sha256=item["sha256"]) for item in known)
    staged = open_staged(ledger.state_dir, row["transcript"])
    try:
        reply = answer(desk, Publish(job=job, base=base, formats=OPTIONS.formats, own=own, stale=()), [staged])
    finally:
        os.close(staged)
    if isinstance(reply, PublishFailed):
        if reply.failure.code == "internal":
            raise Broken(f"{reply.failure.code}: {reply.failure.what}")
        return
    with ledger.transaction():
        ledger.publish(job, path, [(file.path, file.format, file.sha256) for file in reply.files], time.time())
        ledger.withdraw(path, [])
    acknowledge(bytes(row["path"]))


# --- the scripted engine -------------------------------------------------------------------------------------------------------


def content_of(row: dict[str, Any], home: Home) -> Content:
    """The whole source, or why it cannot be opened (the watcher's errors) or read (the engine's)."""
    try:
        descriptor = open_source(os.fsencode(home.inbox), sighting_of(row))
    except CannotOpen as error:
        return error
    try:
        return b"".join(iter(lambda: os.read(descriptor, 1 << 20), b""))
    except OSError as error:
        return error
    finally:
        os.close(descriptor)


def _windows(content: bytes) -> list[Window]:
    """A text that follows from the content alone."""
    digest = hashlib.sha256(content).hexdigest()
    return [
        Window(
            index=index,
            start_s=index * WINDOW_S,
            end_s=(index + 1) * WINDOW_S,
            language="en",
            language_probability=0.99,
            segments=(Segment(start_s=index * WINDOW_S, end_s=index * WINDOW_S + 4.0, text=f"Part {index} of {digest}."),),
        )
        for index in range(WINDOWS)
    ]


def _summary(content: bytes) -> Summary:
    return Summary(
        duration_s=WINDOWS * WINDOW_S,
        speech_s=8.0,
        windows=WINDOWS,
        source_sha256=hashlib.sha256(content).hexdigest(),
        container="wav",
        codec="pcm_s16le",
        model="demo",
        model_revision="corridor",
        device="cpu",
        compute_type="int8",
        engine_version="corridor",
    )


# --- the invariants ------------------------------------------------------------------------------------------------------------


Published = dict[str, str]
"""What stands in an outbox: relative name → sha256."""


def standing(outbox: Path) -> Published:
    """Every regular file of an outbox, hidden ones as well."""
    found = (path for path in outbox.rglob("*") if path.is_file())
    return {str(path.relative_to(outbox)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def transcripts_of(source: bytes) -> set[str]:
    """The names of all files that the publication of a source puts into an empty outbox."""
    return {os.fsdecode(source.rpartition(b".")[0]) + "." + name for name in OPTIONS.formats}


def faults_after_a_cut(home: Home, whole: Published, acknowledged: set[bytes]) -> Iterator[str]:
    """What is wrong right after a cut, in words: a torn or lost transcript, a broken ledger, an illegal history."""
    there = standing(home.outbox)
    for name, digest in there.items():
        if not os.path.basename(name).startswith(".") and whole.get(name) != digest:
            yield f"torn, or not ours: {name}"
    for source in acknowledged:
        for name in sorted(transcripts_of(source) - there.keys()):
            yield f"acknowledged, but not there: {name}"
    yield from faults_of_ledger(home, acknowledged)


def faults_of_ledger(home: Home, acknowledged: set[bytes]) -> Iterator[str]:
    ledger = Queries.open(str(home.state_dir))
    try:
        said = ledger.integrity()
        if said != "ok":
            yield f"ledger: {said}"
        arrows = {(row["verb"], row["from_state"], row["to_state"]) for row in ledger.db.table("transition").rows}
        for job in ledger.jobs():
            state = ""
            for event in ledger.events(job["id"]):
                if event["from_state"] != state or (event["verb"], event["from_state"], event["to_state"]) not in arrows:
                    yield f"illegal history of job {job['id']}: {event['verb']} from {event['from_state']} in state {state}"
                state = event["to_state"]
            if state != job["state"]:
                yield f"job {job['id']} is {job['state']}, its history says {state}"
            if bytes(job["path"]) in acknowledged and job["state"] != "done":
                yield f"acknowledged, but {job['state']}: job {job['id']}"
    finally:
        ledger.close()


def faults_at_the_end(home: Home, whole: Published) -> Iterator[str]:
    """What is wrong after a walk that nothing disturbed: all must be done, each once, and nothing be left over."""
    there = standing(home.outbox)
    for name in sorted(there.keys() | whole.keys()):
        if there.get(name) != whole.get(name):
            yield f"{name} is {'missing' if name not in there else 'left over' if name not in whole else 'torn'}"
    yield from (f"left in staging: {name}" for name in os.listdir(home.state_dir / DIRECTORY) if name.endswith(".partial"))
    yield from faults_of_ledger(home, set(home.sources()))
    ledger = Queries.open(str(home.state_dir))
    try:
        for source in home.sources():
            verbs = [event["verb"] for job in ledger.jobs() if bytes(job["path"]) == source for event in ledger.events(job["id"])]
            if verbs.count("publish") != 1 or verbs.count("finish") != 1:
                yield f"{os.fsdecode(source)} was not finished and published once: {verbs}"
    finally:
        ledger.close()
