"""taking ahead: which contents are read, and copied, before their turn. A real ledger and spool; examiners that are never started."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from whisperd.config import Settings
from whisperd.dispatcher.acceptance import Acceptance
from whisperd.dispatcher.examination import Errand
from whisperd.dispatcher.nursery import Nursery
from whisperd.dispatcher.spool import MIB
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Sighting

FULL = Failure(kind=FailureKind.WAITING, code="spool_full", what="there is no room", hint="free some")
NEVER_MIB = 1 << 40


class Front:
    """The daemon's side of a share and of a local inbox; `spool_max_mib` is 100."""

    def __init__(self, place: Path) -> None:
        self.place = place
        for name in ("state", "share", "local"):
            (place / name).mkdir()
        self.loop = asyncio.new_event_loop()
        self.ledger = Ledger(str(place / "state"), epoch="e")
        self.acceptance = Acceptance(
            Nursery(self.loop, on_end=lambda: None),
            self.ledger,
            self.settings(),
            model_of=lambda row: "demo",
            revision_of=lambda model: "",
            on_faults=lambda outbox, faults: None,
            on_news=lambda: None,
            examiner_module="whisperd.engine.examiner",
        )
        self.configure()
        self._count = 0

    def settings(self, **intake: object) -> Settings:
        inboxes = ({"path": str(self.place / "share")}, {"path": str(self.place / "local")})
        given = {"spool": "always", "spool_max_mib": 100, "free_min_mib": 0, "ahead": 4, **intake}
        return Settings(state_dir=str(self.place / "state"), inbox=inboxes, intake=given)  # type: ignore[arg-type]

    def configure(self, **intake: object) -> None:
        self.acceptance.apply(self.settings(**intake))
        inboxes = {os.path.basename(inbox.settings.path): inbox for inbox in self.acceptance.intake.inboxes.values()}
        inboxes["share"].network = True
        self.share, self.local = inboxes["share"].number, inboxes["local"].number
        with self.ledger.transaction():
            self.ledger.db.conn.execute("UPDATE inbox SET state = 'up'")

    def drop(self, inbox: int, mib: int) -> int:
        """A job that is ready, of so many MiB."""
        self._count += 1
        path = b"%d.wav" % self._count
        sighting = Sighting(path=path, dev=1, inode=self._count, size=mib * MIB, mtime_ns=1, ctime_ns=1)
        job = self.ledger.see(inbox, sighting, float(self._count))
        self.ledger.settle(job, sighting, JobOptions(model="demo"), float(self._count))
        return job

    def errands(self) -> dict[int, bool]:
        """What examiners are asked to take after one more look, and whether into the spool."""
        self.acceptance.take_ahead(sorted(self.ledger.ready(time.time()), key=lambda row: row["id"]))
        found = [errand for desk in self.acceptance.examination.desks.values() for errand in desk.waiting.values()]
        return {errand.job: errand.spool for errand in found if errand.deed == "take"}

    def answered(self, inbox: int, job: int) -> Errand:
        """The examiner has answered this one."""
        return self.acceptance.examination.desks[inbox].waiting.pop(job)

    def copied(self, job: int, mib: int) -> Path:
        """A copy that lies in the spool."""
        copy = Path(self.acceptance.spool.path, str(job))
        with copy.open("wb") as file:
            file.truncate(mib * MIB)
        return copy


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    found = Front(tmp_path)
    yield found
    found.ledger.close()
    found.loop.close()


def test_a_local_file_is_read_where_it_lies_when_the_spool_is_full(front: Front) -> None:
    """Copies of others take what `spool_max_mib` allows; there is always another way to a local file, so nothing waits."""
    front.copied(front.drop(front.share, 80), 80)
    small, large, huge = front.drop(front.local, 20), front.drop(front.local, 50), front.drop(front.local, 110)
    found = front.errands()
    assert (found[small], found[large], found[huge]) == (True, False, False)


@pytest.mark.parametrize("code", ["spool_full", "spool_unusable"])
def test_a_local_file_is_read_where_it_lies_when_the_disk_takes_no_copy(front: Front, code: str) -> None:
    """The examiner found no room: the same file is asked for again at once, without a copy, and no attempt or pause is spent."""
    job = front.drop(front.local, 20)
    assert front.errands() == {job: True}
    failure = Failure(kind=FailureKind.WAITING, code=code, what="no room")
    front.acceptance.refused(front.local, front.answered(front.local, job), failure)
    assert front.errands() == {job: False}
    assert front.ledger.job(job)["failure_code"] is None


def test_a_file_of_a_share_waits_for_room_and_is_copied_then(front: Front) -> None:
    """Those behind it wait as well, however small, or it would wait for ever; once a copy is gone, and at the next look, it goes on."""
    lies = front.copied(front.drop(front.share, 80), 80)
    with front.ledger.transaction():
        front.ledger.db.conn.execute("UPDATE job SET verb = 'take', sha256 = 'x', spooled = 1")
    large, small = front.drop(front.share, 50), front.drop(front.share, 10)
    assert front.errands() == {}
    lies.unlink()
    assert front.errands() == {large: True, small: True}


def test_a_share_without_room_keeps_no_other_inbox_waiting(front: Front) -> None:
    """More of its files wait than are read ahead; a local one behind them all is read all the same."""
    front.copied(front.drop(front.share, 90), 90)
    for _ in range(6):
        front.drop(front.share, 50)
    local = front.drop(front.local, 30)
    assert front.errands() == {local: False}


def test_a_disk_without_room_is_asked_again_soon(front: Front) -> None:
    """A file of a share waits with the reason, spends no attempt, and is due again within 30 s."""
    job = front.drop(front.share, 50)
    assert front.errands() == {job: True}
    front.acceptance.refused(front.share, front.answered(front.share, job), FULL)
    row = front.ledger.job(job)
    assert (row["state"], row["attempts"], row["failure_code"]) == ("ready", 0, "spool_full")
    assert 0 < row["not_before"] - time.time() <= 30.0 and front.errands() == {}


def test_what_can_never_be_copied_is_read_where_it_lies(front: Front) -> None:
    """Larger than `spool_max_mib`, or more than the whole disk of the spool may give: also from a share."""
    job = front.drop(front.share, 110)
    assert front.errands() == {job: False}
    front.configure(free_min_mib=NEVER_MIB)
    other = front.drop(front.share, 10)
    assert front.errands()[other] is False


def test_a_spool_that_fails_stops_nobody(front: Front) -> None:
    """A copy that is gone before it is swept; a directory that is gone altogether: then files are read where they lie."""
    first, second = front.drop(front.local, 20), front.drop(front.share, 20)
    copies = {job: front.copied(job, 1) for job in (first, second)}

    def faster(job: int) -> bool:
        copies[job].unlink()
        return False

    assert front.acceptance.spool.sweep(faster) == 0
    os.rmdir(front.acceptance.spool.path)
    assert front.acceptance.spool.sweep(lambda job: False) == 0
    assert front.errands() == {first: False, second: False}
