"""delivery: staged transcripts and failures → outbox writers. One writer process for each outbox; a share that hangs stops only its own.

Owns: which names are offered, when a refused publication is tried again, and what is done with a source whose transcript is out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from loguru import logger

from whisperd.child import Child
from whisperd.config import InboxSettings, Settings, group_number, user_number
from whisperd.dispatcher import notices
from whisperd.dispatcher.complaints import JOB, Complaints
from whisperd.dispatcher.notices import PublishedRow
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.dispatcher.retry import Backoff
from whisperd.dispatcher.staging import StagingFailed, open_staged
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, Ledger, NoSuchJob
from whisperd.ledger.store import sighting_of
from whisperd.vocabulary import Failure, FailureKind, SubtitleShape
from whisperd.wire import (
    Dispose,
    Disposed,
    DisposeFailed,
    Frame,
    OutboxOut,
    OutboxReady,
    OwnFile,
    Publish,
    Published,
    PublishedFile,
    PublishError,
    PublishFailed,
    ServeOutbox,
)

IN_FLIGHT_MAX = 4
ROWS_AT_ONCE = 50  # of the ledger, besides those that are in hand or postponed
ANSWER_S = 120.0
SLOW_BYTES_PER_S = 2 << 20  # a copy to an archive on another filesystem is at least so fast
POSTPONE_S = 300.0
DEFAULT_NAME = "{stem}"
HOW = {
    "archived": "is in the archive now",
    "deleted": "is deleted, as the settings say",
    "gone": "was gone already",
    "changed": "stays: it is another content by now",
}
PAUSE = Backoff(base_s=1.0, max_s=30.0)
ERROR_SUFFIX = b".error.txt"
NAMES_TRIED = 100


@dataclass
class Writer:
    """One outbox and its writer process."""

    path: bytes
    hello: ServeOutbox
    keeper: Keeper
    in_flight: dict[int, float] = field(default_factory=dict)  # job → sent at (monotonic)
    resume_at: float = 0.0  # monotonic: after a failure of the outbox, which is waited for
    postponed: dict[int, float] = field(default_factory=dict)  # job → not before (monotonic): after a failure of its own
    disposing: dict[int, float] = field(default_factory=dict)  # job → answered by then (monotonic)
    failures: int = 0
    down: str = ""


class Delivery:
    """All outboxes."""

    def __init__(self, nursery: Nursery, ledger: Ledger, *, on_news: Callable[[], None]) -> None:
        self._nursery = nursery
        self._ledger = ledger
        self._on_news = on_news
        self._settings: Settings | None = None
        self._inboxes: dict[bytes, InboxSettings] = {}
        self._count = 0
        self.complaints = Complaints(ledger)
        self.writers: dict[bytes, Writer] = {}

    def apply(self, settings: Settings) -> None:
        """Serve exactly the configured outboxes."""
        self._settings = settings
        self._inboxes = {os.fsencode(inbox.path): inbox for inbox in settings.inbox}
        hellos = {os.fsencode(inbox.outbox_path): _hello(inbox, settings) for inbox in settings.inbox}
        for path in list(self.writers):
            if hellos.get(path) != self.writers[path].hello:
                self.writers.pop(path).keeper.stop()
        for path, hello in hellos.items():
            if path not in self.writers:
                self._count += 1
                self.writers[path] = self._begin(self._count, path, hello)

    def _begin(self, number: int, path: bytes, hello: ServeOutbox) -> Writer:
        keeper = Keeper(
            self._nursery,
            name=f"outbox-{number}",
            module="whisperd.outbox",
            receives=OutboxOut,
            hello=hello,
            on_frame=lambda child, frame: self._frame(path, child, frame),
            place=path,
        )
        return Writer(path=path, hello=hello, keeper=keeper)

    def tick(self, now: float) -> None:
        for writer in self.writers.values():
            if writer.keeper.child is None:  # before another takes its place, which knows nothing of what this one had in hand
                self._forget(writer, now)
            writer.keeper.tick(now)
            overdue_at = min([*(sent + ANSWER_S for sent in writer.in_flight.values()), *writer.disposing.values()], default=now)
            if now > max([overdue_at, *writer.disposing.values()]):  # what is asked is done in turn: a copy to an archive takes its time
                writer.keeper.kill(f"the share of {printable(writer.path)} does not answer")
                writer.down = writer.keeper.down
                self._forget(writer, now)
        self._send_out(now)
        self._dispose(now)

    def _forget(self, writer: Writer, now: float) -> None:
        """Whoever had this in hand is gone."""
        if writer.in_flight or writer.disposing:
            self.complaints.failed(writer.path, now)
        writer.in_flight.clear()
        writer.disposing.clear()

    def idle(self) -> bool:
        """Whether nothing is on its way to an outbox."""
        return not any(writer.in_flight or writer.disposing for writer in self.writers.values())

    def stuck(self, failures: int) -> list[str]:
        """Outboxes that refused so many times in a row, with the reason."""
        refused = [writer.down for writer in self.writers.values() if writer.failures >= failures and writer.down]
        return refused + [f"job {job} cannot be published (see the log)" for w in self.writers.values() for job in w.postponed]

    def stop(self) -> None:
        for writer in self.writers.values():
            writer.keeper.stop()

    # --- sending ---

    def _send_out(self, now: float) -> None:
        open_writers = [w for w in self.writers.values() if w.keeper.usable and now >= w.resume_at and len(w.in_flight) < IN_FLIGHT_MAX]
        if not open_writers:
            return
        closed = [path for path, writer in self.writers.items() if writer not in open_writers]
        aside = sum(len(writer.in_flight) + len(writer.postponed) for writer in open_writers)
        for row in self._ledger.unpublished(ROWS_AT_ONCE + aside, but=closed):
            writer = self.writers.get(row["outbox"])
            if writer is None or row["id"] in writer.in_flight:
                continue
            if writer.postponed.get(row["id"], 0.0) > now:
                continue
            if len(writer.in_flight) < IN_FLIGHT_MAX:
                self._send(writer, row, now)
        for writer in open_writers:
            complaint = self.complaints.next(writer.path, now)
            if complaint is not None:
                writer.keeper.send(complaint)
                writer.in_flight[JOB] = now

    def _send(self, writer: Writer, row: dict[str, Any], now: float) -> None:
        known = self._ledger.publications_of_source(row["inbox_id"], row["path"])
        own = tuple(OwnFile(path=item["path"], sha256=item["sha256"]) for item in known)
        try:
            self._send_error(writer, row, own) if row["state"] == "failed" else self._send_transcript(writer, row, own)
        except StagingFailed as error:  # this one's own trouble: the others go on
            writer.postponed[row["id"]] = now + POSTPONE_S
            logger.bind(job=row["id"], event="not_published").error(f"job {row['id']} cannot be published: {error}")
        else:
            writer.in_flight[row["id"]] = now

    def _send_error(self, writer: Writer, row: dict[str, Any], own: tuple[OwnFile, ...]) -> None:
        base = self._ledger.reserve_name(row["id"], writer.path, [name + ERROR_SUFFIX for name in _numbered(row["path"])], "error")
        writer.keeper.send(PublishError(job=row["id"], base=base.removesuffix(ERROR_SUFFIX), text=error_text(row), own=own))

    def _send_transcript(self, writer: Writer, row: dict[str, Any], own: tuple[OwnFile, ...]) -> None:
        """Raises StagingFailed."""
        template = self._settings.outbox.name if self._settings else DEFAULT_NAME
        base = self._ledger.reserve_name(row["id"], writer.path, list(names(row, template)), "transcript")
        errors = tuple(item for item in own if item.path.endswith(ERROR_SUFFIX))
        staged = open_staged(self._ledger.state_dir, row["transcript"])
        formats = self._ledger.options(row).formats
        writer.keeper.send(Publish(job=row["id"], base=base, formats=formats, own=own, stale=errors), (staged,))

    # --- sources whose transcripts are out ---

    def _dispose(self, now: float) -> None:
        """Archive or delete what was owed when its transcript became durable, whatever the settings have become since."""
        closed = [path for path, w in self.writers.items() if not w.keeper.usable or len(w.disposing) >= IN_FLIGHT_MAX]
        aside = sum(len(writer.disposing) + len(writer.postponed) for writer in self.writers.values())
        for row in self._ledger.owed_disposals(ROWS_AT_ONCE + aside, but=closed):
            writer, inbox = self.writers.get(row["outbox"]), self._inboxes.get(row["inbox_path"])
            if writer is None or inbox is None or row["id"] in writer.disposing or len(writer.disposing) >= IN_FLIGHT_MAX:
                continue
            if now < writer.postponed.get(row["id"], 0.0):
                continue
            archive = os.fsencode(inbox.archive_path) if row["disposal"] == "archive" else b""
            sighting, sha256 = sighting_of(row), row["sha256"] or ""
            writer.keeper.send(Dispose(job=row["id"], inbox=row["inbox_path"], sighting=sighting, sha256=sha256, archive=archive))
            writer.disposing[row["id"]] = now + ANSWER_S + row["size"] / SLOW_BYTES_PER_S

    def _afterwards(self, inbox: InboxSettings | None) -> str:
        """What becomes of a source of this inbox."""
        if inbox is None or self._settings is None:
            return "keep"
        return inbox.source or self._settings.outbox.source

    def _disposed(self, writer: Writer, job: int, how: str) -> None:
        writer.disposing.pop(job, None)
        self._ledger.disposed(job, how, time.time())
        row = self._ledger.job(job)
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event=how).info(
            f"job {job}: {printable(row['path'])} {HOW.get(how, how)}"
        )

    def _not_disposed(self, writer: Writer, job: int, failure: Failure) -> None:
        """It stays where it is, for now or for good."""
        writer.disposing.pop(job, None)
        if failure.kind is FailureKind.PERMANENT:
            logger.bind(job=job, event="not_disposed").error(f"the source of job {job} stays for good: {failure.what}; {failure.hint}")
            self._ledger.disposed(job, "changed", time.time())
            return
        writer.postponed[job] = time.monotonic() + POSTPONE_S
        logger.bind(job=job, event="not_disposed").warning(f"the source of job {job} stays: {failure.what}; {failure.hint}")

    # --- what writers say ---

    def _frame(self, path: bytes, child: Child[Any], frame: Frame[Any]) -> None:
        writer = self.writers.get(path)
        if writer is None or writer.keeper.child is not child:
            return
        match frame.message:
            case OutboxReady():
                child.ready(time.monotonic())
            case Published(job=job, files=files):
                self._published(writer, job, files)
            case PublishFailed(job=job, failure=failure):
                self._refused(writer, job, failure)
            case Disposed(job=job, how=how):
                self._disposed(writer, job, how)
            case DisposeFailed(job=job, failure=failure):
                self._not_disposed(writer, job, failure)
        self._on_news()

    def _published(self, writer: Writer, job: int, files: Sequence[PublishedFile]) -> None:
        writer.in_flight.pop(job, None)
        writer.postponed.pop(job, None)
        writer.failures, writer.down = 0, ""
        if job == JOB:
            self.complaints.done(writer.path, files)
            return
        now = time.time()
        row = self._ledger.job(job)
        stored = [(file.path, file.format, file.sha256) for file in files]
        try:
            if row["state"] == "failed":
                self._ledger.report(job, writer.path, stored, now, notices=self._notices(row, stored, "failed", now))
            else:
                self._publish(writer, row, stored, now)
        except (IllegalMove, NoSuchJob) as error:  # the operator moved the job meanwhile; what stands in the outbox is whole all the same
            logger.bind(job=job).warning(f"job {job} was published, but {error}")
            return
        log = logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]))
        shown = ", ".join(printable(file.path) for file in files)
        if row["state"] == "failed":
            log.bind(event="reported").info(f"job {job} error file written: {shown}")
        else:
            log.bind(event="done").success(f"job {job} done: {printable(row['path'])} → {shown}")

    def _publish(self, writer: Writer, row: dict[str, Any], stored: list[PublishedRow], now: float) -> None:
        """The transcript is out, and the error file of an earlier attempt is not any more. What is still owed is noted with it."""
        afterwards = self._afterwards(self._inboxes.get(row["inbox_path"]))
        with self._ledger.transaction():
            known = self._ledger.publications_of_source(row["inbox_id"], row["path"])
            self._ledger.publish(
                row["id"],
                writer.path,
                stored,
                now,
                disposal="" if afterwards == "keep" else afterwards,
                notices=self._notices(row, stored, "done", now),
            )
            self._ledger.withdraw(writer.path, [item["path"] for item in known if item["path"].endswith(ERROR_SUFFIX)])

    def _notices(self, row: dict[str, Any], stored: list[PublishedRow], event: str, now: float) -> list[notices.Told]:
        return notices.bodies(row, stored, self._settings, event, now) if self._settings is not None else []

    def _refused(self, writer: Writer, job: int, failure: Failure) -> None:
        writer.in_flight.pop(job, None)
        if job == JOB:
            self.complaints.failed(writer.path, time.monotonic())
        elif failure.code == "name_taken":
            self._avoid(writer, job, failure)
        if job == JOB or failure.code == "name_taken":
            return
        if failure.kind is not FailureKind.WAITING:  # this one's own trouble: the others go on
            writer.postponed[job] = time.monotonic() + POSTPONE_S
            logger.bind(job=job, event="not_published").error(f"job {job} cannot be published: {failure.what}; {failure.hint}")
            return
        writer.failures += 1
        writer.down = f"{failure.what} ({failure.hint})"
        writer.resume_at = time.monotonic() + PAUSE.pause_s(writer.failures)
        logger.bind(job=job, event="outbox_waits").warning(f"job {job} cannot be published yet: {failure.what}; {failure.hint}")

    def _avoid(self, writer: Writer, job: int, failure: Failure) -> None:
        row = self._ledger.job(job)
        kind = "error" if row["state"] == "failed" else "transcript"
        base = self._ledger.reserve_name(job, writer.path, [], kind)
        self._ledger.avoid_name(job, writer.path, base)
        logger.bind(job=job).info(f"job {job}: {failure.what}; taking another name")


def _hello(inbox: InboxSettings, settings: Settings) -> ServeOutbox:
    outbox = settings.outbox
    return ServeOutbox(
        path=os.fsencode(inbox.outbox_path),
        file_mode=int(outbox.file_mode, 8),
        directory_mode=int(outbox.directory_mode, 8),
        like=os.fsencode(inbox.path),
        uid=user_number(outbox.owner),
        gid=group_number(outbox.group),
        subtitles=SubtitleShape(**outbox.subtitles.model_dump()),
    )


def names(row: dict[str, Any], template: str) -> Iterator[bytes]:
    """Names of a transcript without extension, best first: the template, the whole file name, the whole file name with a number."""
    directory, _, name = row["path"].rpartition(b"/")
    stem = name.rpartition(b".")[0] or name
    shown = template.format(
        stem=os.fsdecode(stem),
        name=os.fsdecode(name),
        language=row["language"] or "und",
        model=os.path.basename(row.get("model") or ""),
        date=time.strftime("%Y-%m-%d", time.gmtime(row["mtime_ns"] / 1e9)),
        duration=f"{row['duration_s'] or 0:.0f}",
    )
    before = directory + b"/" if directory else b""
    yield before + os.fsencode(shown)
    yield from _numbered(row["path"])


def _numbered(path: bytes) -> Iterator[bytes]:
    yield path
    for number in range(2, NAMES_TRIED):
        yield path + b".%d" % number


def error_text(row: dict[str, Any]) -> str:
    """The error file: what happened, what to do, whether it will be tried again. For people who only see the share."""
    lines = [
        f"{printable(os.path.basename(row['path']))} could not be transcribed.",
        "",
        f"What happened: {row['failure_what']}",
    ]
    if row["failure_hint"]:
        lines.append(f"What to do:    {row['failure_hint']}")
    if row["failure_kind"] == "permanent":
        lines.append("It will not be tried again unless the file changes.")
    else:
        attempts = f"{row['attempts']} attempts were" if row["attempts"] != 1 else "1 attempt was"
        lines.append(f"{attempts} made. It will be tried again when the file changes or an operator asks for it.")
    lines += ["", f"Job {row['id']}, reason code {row['failure_code']}, {row['size']} bytes."]
    if row["failure_tail"]:
        lines += ["", "Last lines of the worker:", *("  " + line for line in row["failure_tail"].splitlines())]
    return "\n".join(lines) + "\n"
