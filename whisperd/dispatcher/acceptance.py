"""acceptance: from a report of a watcher to a job whose turn may come (docs/decisions/0012).

Owns: what is made of sightings, profiles and examinations; which contents are read ahead of their turn; what needs no engine because its
transcript is there already. Fails loudly, as the loop that calls it does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from loguru import logger

from whisperd.config import Settings
from whisperd.dispatcher import queueing, retry, reuse
from whisperd.dispatcher.examination import Errand, Examination
from whisperd.dispatcher.intake import Inbox, Intake
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.profiles import PRIORITY, Asked, error_base, error_text
from whisperd.dispatcher.profiles import Profiles as FolderProfiles
from whisperd.dispatcher.spool import MIB, Spool
from whisperd.dispatcher.staging import StagingFailed
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, Ledger, Settling
from whisperd.ledger.queries import Row
from whisperd.ledger.store import sighting_of
from whisperd.vocabulary import Failure, FailureKind, Media, Sighting, State
from whisperd.wire import Profiles, Sightings

SHARE_CODES = ("source_down", "source_denied", "source_unreadable")
SPOOL_CODES = ("spool_full", "spool_unusable")
AGAIN_S = 15.0
"""What could not be read is tried again after that."""
SWEEP_S = 10.0
SETTLED_AT_ONCE = 500


class Finding(NamedTuple):
    """A settled file and what its container says; not stored yet."""

    inbox: int
    errand: Errand
    media: Media | None
    failure: Failure | None = None


class Acceptance:
    """All files between their watcher and their turn."""

    def __init__(
        self,
        nursery: Nursery,
        ledger: Ledger,
        settings: Settings,
        *,
        model_of: Callable[[queueing.Row], str],
        revision_of: Callable[[str], str],
        on_faults: Callable[[bytes, dict[bytes, str]], None],
        on_news: Callable[[], None],
        examiner_module: str,
    ) -> None:
        """`model_of` names the model that a job would run with now, `revision_of` the revision of a model that is loaded ("": none is),
        `on_faults` hears which error files of profiles should stand in an outbox (by name without suffix)."""
        self._ledger = ledger
        self._model_of = model_of
        self._revision_of = revision_of
        self.settings = settings
        self.spool = Spool(ledger.state_dir)
        self.intake = Intake(nursery, ledger, on_report=self, on_news=on_news)
        self.examination = Examination(
            nursery, self.spool.path, self, open_source=self.intake.open, on_news=on_news, module=examiner_module
        )
        self._on_faults = on_faults
        self.profiles: dict[int, FolderProfiles] = {}
        self._faults: dict[int, dict[bytes, str]] = {}  # of each inbox, as they were told
        self._found: list[Finding] = []
        self._again: list[tuple[float, int, Errand]] = []  # not before (monotonic)
        self._swept_at = 0.0
        self._full: set[int] = set()  # inboxes of which some settled files found no place in the list

    def apply(self, settings: Settings) -> None:
        self.settings = settings
        for profiles in self.profiles.values():
            profiles.settings_changed()
        self.intake.apply(settings)
        self.examination.apply(settings, {number: inbox.settings.path for number, inbox in self.intake.inboxes.items()})

    def tick(self, now: float) -> None:
        self.intake.tick(now)
        self.examination.tick(now, self.intake.usable())
        self._store_found()
        due = [item for item in self._again if item[0] <= now]
        self._again = [item for item in self._again if item[0] > now]
        for _, inbox, errand in due:
            self.examination.ask(inbox, errand)
        if now - self._swept_at >= SWEEP_S:
            self._swept_at = now
            self.spool.sweep(self._needs_copy)

    def stop(self) -> None:
        self.intake.stop()
        self.examination.stop()

    def idle(self) -> bool:
        """Whether every file that settled is in the queue (or refused)."""
        return self.examination.idle() and not (self._found or self._again or self._full)

    def down(self) -> list[str]:
        """Inboxes that cannot be read, each as a sentence."""
        silent = (desk.down for desk in self.examination.desks.values())
        return [what for what in (*(inbox.down for inbox in self.intake.inboxes.values()), *silent) if what]

    # --- what watchers report ---

    def profiles_of(self, inbox: int) -> FolderProfiles:
        return self.profiles.setdefault(inbox, FolderProfiles())

    def profiles_found(self, inbox: Inbox, found: Profiles) -> None:
        """Profiles of folders and files, always ahead of the files they speak of."""
        self.profiles_of(inbox.number).update(found.files, whole=found.whole)
        self._tell_faults(inbox)

    def _tell_faults(self, inbox: Inbox) -> None:
        """Say once, beside the transcripts and in the log, which profiles are not used."""
        faults = dict(self.profiles_of(inbox.number).faults())
        known = self._faults.get(inbox.number)
        if faults == known:
            return
        for path in faults.keys() - (known or {}).keys():
            logger.bind(inbox=inbox.settings.path, event="profile_refused").warning(f"{printable(path)} is not used: {faults[path]}")
        self._faults[inbox.number] = faults
        self._on_faults(
            os.fsencode(inbox.settings.outbox_path), {error_base(path): error_text(path, what) for path, what in faults.items()}
        )

    def sightings(self, inbox: Inbox, report: Sightings) -> None:
        now = time.time()
        with self._ledger.transaction():
            self._ledger.see_all(inbox.number, report.seen, now)
            for renamed in report.renamed:
                self._ledger.rename(inbox.number, renamed.before, renamed.sighting, now)
            settled = list(zip(report.settled, self._ledger.see_all(inbox.number, report.settled, now), strict=True))
            gone = [(job, path) for path in report.vanished if (job := self._vanish(inbox.number, path, now)) is not None]
        self._examine(inbox.number, [(sighting, job) for sighting, job in settled if self._ledger.job(job)["state"] == State.SEEN])
        self._tell_faults(inbox)  # that two profiles clash shows when a file asks for both
        for sighting in report.doubted:
            self._verify(inbox, sighting)
        for job, path in gone:
            logger.bind(inbox=inbox.settings.path, job=job, event="gone").info(
                f"job {job} gone: {printable(path)} is not in the inbox any more"
            )

    def back(self, inbox: Inbox) -> None:
        """An inbox is up again: what waited for it goes on at once."""
        self._ledger.wake_waiting(SHARE_CODES, time.time())

    def _vanish(self, inbox: int, path: bytes, now: float) -> int | None:
        live = self._ledger.live_job(inbox, path)
        if live is None or live["state"] not in (State.SEEN, State.READY):
            return None
        self._ledger.vanish(live["id"], now)
        self.examination.drop(live["id"])
        return int(live["id"])

    def _examine(self, inbox: int, settled: Iterable[tuple[Sighting, int]]) -> None:
        """Settled files, unless they are to be left alone, or the queue is full: the watcher tells of those again."""
        full = False
        room = self.settings.intake.queue_max - self._ledger.counts()[State.READY]
        for sighting, job in settled:
            if self.asked(inbox, sighting.path).skip:
                continue
            if room <= 0 or not (self.examination.busy_with(inbox, job) or self.examination.ask(inbox, Errand("examine", job, sighting))):
                full = True
            room -= 1
        (self._full.add if full else self._full.discard)(inbox)

    def _verify(self, inbox: Inbox, sighting: Sighting) -> None:
        """A finished file that may be another one by now."""
        row = self._ledger.latest_job(inbox.number, sighting.path)
        if row is None or row["state"] in (State.SEEN, State.READY, State.RUNNING):
            return
        if row["sha256"] is None:  # nothing to hold it against: it is new work
            self._ledger.see_anew(inbox.number, sighting, time.time())
        else:
            self.examination.ask(inbox.number, Errand("verify", row["id"], sighting))

    def asked(self, inbox: int, path: bytes) -> Asked:
        """Options and class of a file, by its inbox and by the profiles above and beside it."""
        own = self.intake.inboxes[inbox].settings
        return self.profiles_of(inbox).asked(path, self.settings.options(own), PRIORITY[own.priority])

    # --- what examiners find ---

    def examined(self, inbox: int, errand: Errand, media: Media | None) -> None:
        self._found.append(Finding(inbox, errand, media))

    def refused(self, inbox: int, errand: Errand, failure: Failure) -> None:
        if failure.kind is FailureKind.PERMANENT and errand.deed == "examine":
            self._found.append(Finding(inbox, errand, None, failure))
        elif failure.code == "dropped":
            pass
        elif failure.code == "changed_while_read":
            self.intake.scan_now(inbox)
        elif errand.spool and failure.code in SPOOL_CODES and not self._is_share(inbox):
            logger.bind(job=errand.job).info(f"job {errand.job} is read where it lies: {failure.what}")
            self.examination.ask(inbox, errand._replace(spool=False))
        elif errand.deed == "take":
            self._postpone(errand, failure)
        else:
            self._later(inbox, errand)

    def lost(self, inbox: int, errand: Errand, reason: str, what: str) -> None:
        """There was no descriptor, or its reader died."""
        if reason in ("gone", "changed"):
            if errand.deed == "take":
                self._ledger.vanish(errand.job, time.time(), note=what)
            self.intake.scan_now(inbox)
        elif reason == "denied" and errand.deed == "examine":  # the job will say why it cannot be read
            self.examined(inbox, errand, None)
        elif reason in ("denied", "down") and errand.deed == "take":
            self._postpone(errand, Failure(kind=FailureKind.WAITING, code=f"source_{reason}", what=what))
        else:
            self._later(inbox, errand)

    def _later(self, inbox: int, errand: Errand) -> None:
        self._again.append((time.monotonic() + AGAIN_S, inbox, errand))

    def _postpone(self, errand: Errand, failure: Failure) -> None:
        now = time.time()
        try:
            self._ledger.postpone(errand.job, failure, now, not_before=now + retry.WAITING_PAUSE_S)
        except IllegalMove:  # it vanished or was cancelled meanwhile
            return
        logger.bind(job=errand.job, event="waits").warning(f"job {errand.job} waits: {failure.what}; {failure.hint}")

    def _store_found(self) -> None:
        """Many in one transaction: a cold start finds thousands in a second."""
        while self._found:
            now, part = time.time(), self._found[:SETTLED_AT_ONCE]
            del self._found[:SETTLED_AT_ONCE]
            for number in {finding.inbox for finding in part} & self.intake.inboxes.keys():
                self._store(number, [finding for finding in part if finding.inbox == number], now)

    def _store(self, number: int, found: list[Finding], now: float) -> None:
        """What was found out of one inbox's files. Those that vanished, or were replaced or cancelled meanwhile, are passed over."""
        log = logger.bind(inbox=self.intake.inboxes[number].settings.path)
        settling = []
        for finding in found:
            job, sighting = finding.errand.job, finding.errand.sighting
            asked = self.asked(number, sighting.path)
            if finding.failure is None:
                settling.append(Settling(sighting, asked.options, asked.priority, finding.media, job))
                continue
            try:
                self._ledger.reject(job, finding.failure, asked.options, now)
                log.bind(job=job, event="failed").error(f"job {job} refused: {printable(sighting.path)}: {finding.failure.what}")
            except IllegalMove as error:
                log.bind(job=job).info(f"job {job}: {error}")
        settled = set(self._ledger.settle_all(number, settling, now))
        for item in settling:
            if item.job in settled:
                path, size = item.sighting.path, item.sighting.size
                log.bind(job=item.job, event="settled").info(f"job {item.job} settled: {printable(path)} ({size} bytes)")

    # --- ahead of the turn ---

    def take_ahead(self, in_order: Iterable[queueing.Row]) -> None:
        """Have the contents of those read whose turn comes next. `in_order` are ready jobs, the next one first."""
        settings, used, ahead, waits = self.settings.intake, -1, 0, False
        for row in in_order:
            if ahead >= settings.ahead:
                return
            job, inbox = row["id"], row["inbox_id"]
            if row["sha256"] is not None or self.examination.busy_with(inbox, job) or inbox not in self.intake.inboxes:
                ahead += 1
                continue
            spool = self._wants_copy(inbox, row["size"])
            if spool:
                used = self.spool.used_bytes() if used < 0 else used
                fits = used + row["size"] <= settings.spool_max_mib * MIB
                if self._is_share(inbox) and (waits or not fits):  # until another copy is not needed any more, and so do those behind it
                    waits = True
                    continue
                spool = fits
                used += row["size"] if spool else 0
            self.examination.ask(inbox, Errand("take", job, sighting_of(row), spool))
            ahead += 1

    def _wants_copy(self, inbox: int, size: int) -> bool:
        """Whether a recording is copied before its turn; one for which there can never be room is read where it lies."""
        settings = self.settings.intake
        if settings.spool == "never" or size > settings.spool_max_mib * MIB:
            return False
        return (settings.spool == "always" or self._is_share(inbox)) and self.spool.could_hold(size, settings.free_min_mib)

    def _is_share(self, inbox: int) -> bool:
        found = self.intake.inboxes.get(inbox)
        return found is not None and found.network

    def _needs_copy(self, job: int) -> bool:
        return self._ledger.exists(job) and self._ledger.job(job)["state"] in (State.READY, State.RUNNING)

    def taken(self, inbox: int, errand: Errand, sha256: str, spooled: bool) -> None:
        row = self._ledger.job(errand.job)
        if errand.deed == "verify":
            self._verified(inbox, row, errand.sighting, sha256)
            return
        asked = reuse.question(self._ledger.options(row), self._model_of(row))
        try:
            self._ledger.take(errand.job, sha256, time.time(), spooled=spooled, asked=asked)
        except IllegalMove:  # it vanished or was cancelled meanwhile
            return
        self.reuse({**row, "sha256": sha256, "asked": asked})

    def _verified(self, inbox: int, row: Row, sighting: Sighting, sha256: str) -> None:
        now = time.time()
        if row["sha256"] == sha256:
            self._ledger.recognise(row["id"], sighting, now)
            return
        job = self._ledger.see_anew(inbox, sighting, now)
        logger.bind(job=job, event="replaced").info(f"job {job}: {printable(sighting.path)} has another content than job {row['id']} had")
        self.intake.scan_now(inbox)

    def reuse(self, row: Row) -> bool:
        """Publish what is there already, if this content was asked the same before; False when an engine has to do it."""
        known = self._ledger.result(row["sha256"], row["asked"])
        if known is None or self._revision_of(self._model_of(row)) not in ("", known["revision"]):
            return False
        job = row["id"]
        try:
            if not reuse.publish_again(self._ledger, row, known):
                return False
        except (StagingFailed, IllegalMove) as error:  # then an engine does it
            logger.bind(job=job).info(f"job {job}: {error}")
            return False
        logger.bind(job=job, inbox=os.fsdecode(row["inbox_path"]), event="reused").info(
            f"job {job} has the content of job {known['job_id']}: its transcript is published again"
        )
        return True
