"""passages: further stretches of the way, each disturbed by itself, from a point that was reached in peace.

Owns: `Life`, the daemon's steps beyond those of the corridor (examined, taken with a copy, published again for a second copy, failed and
mended, put away, told), what happens before each `Passage`, and the invariants of both (`faults_of_a_passage`). The rooms' own functions do
every step, as in the corridor; a receiver of notices is memory that outlives the process.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from corridor import (
    ENGINE,
    LEASE_S,
    OPTIONS,
    SOURCE_MTIME_S,
    Acknowledge,
    Broken,
    Content,
    Home,
    Published,
    content_of,
    discover,
    faults_after_a_cut,
    faults_of_ledger,
    is_lost,
    recording,
    standing,
    transcribe,
    transcripts_of,
)

from whisperd.config import Settings
from whisperd.dispatcher.delivery import ERROR_SUFFIX, error_text, names
from whisperd.dispatcher.notices import bodies
from whisperd.dispatcher.reuse import publish_again, question
from whisperd.dispatcher.spool import Spool
from whisperd.dispatcher.staging import DIRECTORY, StagingFailed, open_staged
from whisperd.engine.examiner import look
from whisperd.engine.taking import Errand, Taker
from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Queries
from whisperd.ledger.store import sighting_of
from whisperd.outbox import disposal
from whisperd.outbox.__main__ import answer, prepare
from whisperd.vocabulary import Failure, FailureKind, Sighting
from whisperd.watcher.source import CannotOpen, open_source
from whisperd.wire import Dispose, DisposeFailed, Examined, OwnFile, Publish, PublishError, PublishFailed, ServeInbox

SOURCE, SECOND = b"lecture.wav", b"the same again.wav"
PROFILE = SOURCE + b".whisperd.toml"
SETTINGS = Settings(inbox=({"path": "/inbox"},), hook=({"command": ["/bin/true"]},))  # type: ignore[arg-type]
TOLD = b"told "
ONE_MOUNT = disposal._one_mount
DAMAGED = Failure(kind=FailureKind.PERMANENT, code="damaged", what="it cannot be decoded", hint="convert it")


class Terms(NamedTuple):
    """How a life goes: whether sources are copied, whether the first attempt fails, what becomes of a source afterwards."""

    spool: bool = False
    fails_first: bool = False
    afterwards: str = ""
    far: bool = False  # the archive is on another filesystem


class Passage(NamedTuple):
    """Steps of a life in peace, then those that are disturbed."""

    name: str
    terms: Terms
    before: tuple[str, ...]
    disturbed: tuple[str, ...]


TAKEN = ("discover", "examine", "take")
PUBLISHED = (*TAKEN, "transcribe", "publish")
PASSAGES = (
    Passage("examine", Terms(), TAKEN[:1], TAKEN[1:2]),
    Passage("take with a copy", Terms(spool=True), TAKEN[:2], ("take",)),
    Passage("work from the copy", Terms(spool=True), TAKEN, ("transcribe", "tidy")),
    Passage("publish again", Terms(), (*PUBLISHED, "drop_second", *TAKEN), ("transcribe", "publish")),
    Passage("fail", Terms(fails_first=True), TAKEN, ("transcribe", "publish")),
    Passage("mend", Terms(fails_first=True), (*PUBLISHED, "mend", "transcribe"), ("publish",)),
    Passage("archive", Terms(afterwards="archive"), PUBLISHED, ("dispose",)),
    Passage("archive far away", Terms(afterwards="archive", far=True), PUBLISHED, ("dispose",)),
    Passage("delete", Terms(afterwards="delete"), PUBLISHED, ("dispose",)),
    Passage("tell", Terms(), PUBLISHED, ("tell",)),
)


# --- one life ------------------------------------------------------------------------------------------------------------------


class Life:
    """A life of the daemon, whose steps are called by their names. Fails as the corridor does."""

    def __init__(self, home: Home, terms: Terms, acknowledge: Acknowledge, *, later_s: float = 0.0) -> None:
        self.home, self.terms, self.acknowledge, self.later_s = home, terms, acknowledge, later_s
        self.ledger = Ledger(str(home.state_dir), epoch=uuid.uuid4().hex)
        self.ledger.interrupt_other_epochs(time.time())
        self.inbox = self.ledger.register_inbox(os.fsencode(home.inbox), os.fsencode(home.outbox), time.time())
        self.desk = prepare(home.terms())
        self.spool = Spool(str(home.state_dir))
        self.taker = Taker()
        self.settled: list[tuple[Sighting, int]] = []

    def end(self) -> None:
        self.taker.stop()
        self.ledger.close()

    def go(self, *steps: str) -> None:
        disposal._one_mount = _on_two_mounts if self.terms.far else ONE_MOUNT
        for step in steps:
            getattr(self, step)()

    def whole(self) -> None:
        """All that a daemon does until nothing is left to do."""
        self.go(*PUBLISHED, "mend", "transcribe", "publish", "dispose", "tell", "tidy")
        self.ledger.truncate_wal()

    # --- the steps ---

    def discover(self) -> None:
        self.settled = []
        doubted = discover(self.ledger, self.home, self.inbox, self.settled.extend)
        for sighting in doubted:  # its change time is another: it was taken away and given back
            row = self.ledger.latest_job(self.inbox, sighting.path)
            if row is not None and isinstance(content := content_of({**row, **_facts_of(sighting)}, self.home), bytes):
                assert hashlib.sha256(content).hexdigest() == row["sha256"], "another content, though nobody wrote any"
                self.ledger.recognise(row["id"], sighting, time.time())

    def examine(self) -> None:
        """What the container says; a source that cannot be opened or read now is looked at again in the next life."""
        for sighting, job in self.settled:
            try:
                descriptor = open_source(os.fsencode(self.home.inbox), sighting)
            except CannotOpen:
                continue
            found = look(job, descriptor, ServeInbox(spool=self.spool.path, duration_max_s=3600.0, channels_max=8, rate_max_hz=192_000))
            if isinstance(found, Examined):
                self.ledger.settle(job, sighting, OPTIONS, time.time(), media=found.media)
            elif found.failure.kind is FailureKind.PERMANENT:
                self.ledger.reject(job, found.failure, OPTIONS, time.time())

    def take(self) -> None:
        for row in self._ready():
            if row["sha256"] is None:
                self._take(row)

    def _take(self, row: dict[str, Any]) -> None:
        job = row["id"]
        try:
            descriptor = open_source(os.fsencode(self.home.inbox), sighting_of(row))
        except CannotOpen as error:
            self._put_off(job, error)
            return
        copy = os.path.join(self.spool.path, str(job)) if self.terms.spool else ""
        outcome = self.taker.outcome(Errand(job, descriptor, copy, 0))
        os.close(descriptor)
        if outcome.error is None:
            asked = question(OPTIONS, OPTIONS.model)
            self.ledger.take(job, outcome.sha256, time.time(), spooled=bool(copy), asked=asked)
        elif outcome.error.kind is FailureKind.WAITING:
            self.ledger.postpone(job, outcome.error.failure(), time.time(), not_before=time.time())
        else:
            raise Broken(f"nobody touched the source: {outcome.error}")

    def _put_off(self, job: int, error: Exception) -> None:
        if is_lost(error):
            self.ledger.vanish(job, time.time(), note=str(error))
        else:
            down = Failure(kind=FailureKind.WAITING, code="source_down", what=str(error))
            self.ledger.postpone(job, down, time.time(), not_before=time.time())

    def transcribe(self) -> None:
        """What is known by its content is published again; anything else costs an engine."""
        for row in self._ready():
            if row["sha256"] is not None and not self._is_known(row):
                if self.terms.fails_first and not row["reported_at"] and not self._was_mended(row["id"]):
                    self.ledger.claim(row["id"], ENGINE, time.time(), lease_s=LEASE_S)
                    self.ledger.fail(row["id"], ENGINE, DAMAGED, time.time())
                else:
                    transcribe(self.ledger, row, partial(self._content, row))

    def _is_known(self, row: dict[str, Any]) -> bool:
        known = self.ledger.result(row["sha256"], row["asked"])
        try:
            return known is not None and publish_again(self.ledger, row, known)
        except StagingFailed:
            return False

    def _was_mended(self, job: int) -> bool:
        return any(event["verb"] == "retry" for event in self.ledger.events(job))

    def _content(self, row: dict[str, Any]) -> Content:
        copy = self.spool.open(row["id"]) if row["spooled"] else None
        if copy is None:
            return content_of(row, self.home)
        try:
            return b"".join(iter(lambda: os.read(copy, 1 << 20), b""))
        except OSError as error:
            return error
        finally:
            os.close(copy)

    def publish(self) -> None:
        for row in self.ledger.unpublished():
            known = self.ledger.publications_of_source(row["inbox_id"], row["path"])
            own = tuple(OwnFile(path=item["path"], sha256=item["sha256"]) for item in known)
            (self._report if row["state"] == "failed" else self._publish)(row, own)

    def _report(self, row: dict[str, Any], own: tuple[OwnFile, ...]) -> None:
        path = bytes(row["outbox"])
        base = self.ledger.reserve_name(row["id"], path, [row["path"] + ERROR_SUFFIX], "error")
        reply = answer(self.desk, PublishError(job=row["id"], base=base.removesuffix(ERROR_SUFFIX), text=error_text(row), own=own), [])
        if isinstance(reply, PublishFailed):
            _insist_on_waiting(reply.failure)
            return
        stored = [(file.path, file.format, file.sha256) for file in reply.files]
        now = time.time()
        self.ledger.report(row["id"], path, stored, now, notices=bodies(row, stored, SETTINGS, "failed", now))

    def _publish(self, row: dict[str, Any], own: tuple[OwnFile, ...]) -> None:
        path, errors = bytes(row["outbox"]), tuple(file for file in own if file.path.endswith(ERROR_SUFFIX))
        base = self.ledger.reserve_name(row["id"], path, list(names(row, "{stem}")), "transcript")
        staged = open_staged(self.ledger.state_dir, row["transcript"])
        try:
            request = Publish(job=row["id"], base=base, formats=OPTIONS.formats, own=own, stale=errors)
            reply = answer(self.desk, request, [staged])
        finally:
            os.close(staged)
        if isinstance(reply, PublishFailed):
            _insist_on_waiting(reply.failure)
            return
        stored = [(file.path, file.format, file.sha256) for file in reply.files]
        now = time.time()
        with self.ledger.transaction():
            told = bodies(row, stored, SETTINGS, "done", now)
            self.ledger.publish(row["id"], path, stored, now, disposal=self.terms.afterwards, notices=told)
            self.ledger.withdraw(path, [file.path for file in errors])
        self.acknowledge(bytes(row["path"]))

    def mend(self) -> None:
        """The operator asks for what failed once more."""
        for row in self.ledger.jobs():
            if row["state"] == "failed" and row["reported_at"] is not None:
                self.ledger.retry(row["id"], time.time())

    def dispose(self) -> None:
        archive = os.fsencode(archive_of(self.home))
        for row in self.ledger.owed_disposals(10):
            request = Dispose(
                job=row["id"],
                inbox=row["inbox_path"],
                sighting=sighting_of(row),
                sha256=row["sha256"] or "",
                archive=archive if row["disposal"] == "archive" else b"",
            )
            reply = answer(self.desk, request, [])
            if isinstance(reply, DisposeFailed):
                _insist_on_waiting(reply.failure)
            else:
                self.ledger.disposed(row["id"], reply.how, time.time())

    def tell(self) -> None:
        for row in self.ledger.due_notices(time.time() + self.later_s, 10):
            self.acknowledge(TOLD + row["delivery"].encode())
            self.ledger.notice_sent(row["id"], time.time())

    def tidy(self) -> None:
        self.spool.sweep(lambda job: self.ledger.exists(job) and self.ledger.job(job)["state"] in ("ready", "running"))

    def drop_second(self) -> None:
        """The same recording comes under another name."""
        shutil.copy2(self.home.inbox / os.fsdecode(SOURCE), self.home.inbox / os.fsdecode(SECOND))

    def _ready(self) -> list[dict[str, Any]]:
        return self.ledger.ready(time.time() + self.later_s)


def _on_two_mounts(one: int, other: int) -> bool:
    return False


def _facts_of(sighting: Sighting) -> dict[str, int]:
    return {name: getattr(sighting, name) for name in ("dev", "inode", "size", "mtime_ns", "ctime_ns")}


def _insist_on_waiting(failure: Failure) -> None:
    if failure.code == "internal":
        raise Broken(f"{failure.code}: {failure.what}")


# --- where it goes -------------------------------------------------------------------------------------------------------------


def archive_of(home: Home) -> Path:
    return home.inbox.parent / "archive"


def begin(home: Home, pristine: Home) -> None:
    """An inbox with one recording and its profile, and nothing else but an empty ledger."""
    home.begin_anew_like(pristine)
    for place in (home.inbox, archive_of(home)):
        shutil.rmtree(place, ignore_errors=True)
    home.inbox.mkdir()
    for name, content in ((SOURCE, recording(7)), (PROFILE, b'language = "en"\n')):
        path = home.inbox / os.fsdecode(name)
        path.write_bytes(content)
        os.utime(path, (SOURCE_MTIME_S, SOURCE_MTIME_S))


def stretch_of(passage: Passage) -> Callable[[Home, Acknowledge], Callable[[], None]]:
    """The passage, for a child: everything before it in peace, then what is disturbed."""

    def stretch(home: Home, acknowledge: Acknowledge) -> Callable[[], None]:
        life = Life(home, passage.terms, acknowledge)
        life.go(*passage.before)
        return partial(life.go, *passage.disturbed)

    return stretch


class Undisturbed(NamedTuple):
    """What stands in the outbox at some time when nothing goes wrong, and in the end."""

    ever: Published
    last: Published


def in_peace(home: Home, passage: Passage) -> Undisturbed:
    """Walk a passage and all that follows it."""
    ever: Published = {}
    life = Life(home, passage.terms, lambda _: None)
    for step in (*passage.before, *passage.disturbed):
        life.go(step)
        ever |= standing(home.outbox)
    life.whole()
    life.end()
    last = standing(home.outbox)
    return Undisturbed(ever | last, last)


def recover(home: Home, passage: Passage, acknowledge: Acknowledge, later_s: float) -> None:
    """The next life, to the end of all work."""
    life = Life(home, passage.terms, acknowledge, later_s=later_s)
    try:
        life.whole()
    finally:
        life.end()


# --- the invariants ------------------------------------------------------------------------------------------------------------


def faults_after(home: Home, passage: Passage, whole: Undisturbed, told: set[bytes]) -> Iterator[str]:
    """What is wrong right after a cut."""
    acknowledged = {what for what in told if not what.startswith(TOLD)}
    yield from faults_after_a_cut(home, whole.ever, acknowledged)
    places = _places(home)
    there = standing(home.outbox)
    written = {name for name in transcripts_of(SOURCE) if name in there}
    may_be_gone = passage.terms.afterwards == "delete" and written == transcripts_of(SOURCE)
    if not places and not may_be_gone:
        yield "the source is nowhere"
    if len(places) > 1 and not passage.terms.far:
        yield f"the source is at {len(places)} places: {places}"


def _places(home: Home) -> list[str]:
    """Where the content of the source stands, whole, in inbox and archive; its second copy is another file."""
    found = [*home.inbox.rglob("*"), *archive_of(home).rglob("*")]
    sources = (path for path in found if path.is_file() and path.name != os.fsdecode(SECOND) and path.read_bytes() == recording(7))
    return sorted(str(path.relative_to(home.inbox.parent)) for path in sources)


def faults_in_the_end(home: Home, passage: Passage, whole: Undisturbed, told: Sequence[bytes]) -> Iterator[str]:
    """What is wrong after a life that nothing disturbed."""
    there = standing(home.outbox)
    for name in sorted(there.keys() | whole.last.keys()):
        if there.get(name) != whole.last.get(name):
            yield f"{name} is {'missing' if name not in there else 'left over' if name not in whole.last else 'torn'}"
    yield from (f"left in the spool: {name}" for name in os.listdir(home.state_dir / "spool"))
    yield from (f"left in staging: {name}" for name in os.listdir(home.state_dir / DIRECTORY) if name.endswith(".partial"))
    yield from _misplaced(home, passage)
    sources = {SOURCE, SECOND} if "drop_second" in passage.before else {SOURCE}
    yield from faults_of_ledger(home, sources)
    ledger = Queries.open(str(home.state_dir))
    try:
        yield from _misnoted(ledger, passage, sources)
        yield from _untold(ledger, passage, told, len(sources))
    finally:
        ledger.close()


def _misplaced(home: Home, passage: Passage) -> Iterator[str]:
    """Inbox and archive hold exactly what they should."""
    kept, put_away = {SOURCE: recording(7), PROFILE: b'language = "en"\n'}, dict[bytes, bytes]()
    if passage.terms.afterwards:
        kept, put_away = {}, kept if passage.terms.afterwards == "archive" else {}
    if "drop_second" in passage.before:
        kept[SECOND] = recording(7)
    for place, wanted in ((home.inbox, kept), (archive_of(home), put_away)):
        found = {os.fsencode(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()}
        if found != wanted:
            yield f"{place.name} holds {sorted(found)}, not {sorted(wanted)}" if found.keys() != wanted.keys() else f"{place.name}: torn"


def _misnoted(ledger: Queries, passage: Passage, sources: set[bytes]) -> Iterator[str]:
    """Each source was finished once (by an engine or again) and published once; what was owed to it is done."""
    jobs = [job for job in ledger.jobs() if job["state"] != "gone"]
    if sorted(bytes(job["path"]) for job in jobs) != sorted(sources):
        yield f"not one job for each source: {[(job['path'], job['state']) for job in jobs]}"
    for job in jobs:
        verbs = Counter(event["verb"] for event in ledger.events(job["id"]))
        if (verbs["publish"], verbs["finish"] + verbs["reuse"]) != (1, 1) or verbs["fail"] != verbs["report"]:
            yield f"job {job['id']} was not finished and published once: {dict(verbs)}"
        said = {"archive": ("archived",), "delete": ("deleted", "gone"), "": (None,)}[passage.terms.afterwards]
        if job["disposal"] not in said or verbs["dispose"] != bool(passage.terms.afterwards):
            yield f"job {job['id']}: its source is said to be {job['disposal']}"


def _untold(ledger: Queries, passage: Passage, told: Sequence[bytes], sources: int) -> Iterator[str]:
    """Each event is one notice under one delivery id, and was told at least once."""
    rows = list(ledger.db.query("SELECT * FROM notice"))
    wanted = {"done": sources, "failed": sources if passage.terms.fails_first else 0}
    found = Counter(row["event"] for row in rows)
    if any(found[event] != number for event, number in wanted.items()):
        yield f"notices of {dict(found)}, not of {wanted}"
    yield from (f"notice {row['id']} is {row['state']}" for row in rows if row["state"] != "sent")
    deliveries = {TOLD + row["delivery"].encode() for row in rows}
    heard = {what for what in told if what.startswith(TOLD)}
    if heard != deliveries:
        yield f"told {sorted(heard)}, not {sorted(deliveries)}"
