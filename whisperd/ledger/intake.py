"""intake: verbs between an inbox and the queue. What a file is judged to be (`judged`) is pure; a thousand are judged as one is.

Fails as `store` does.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from whisperd.errors import printable
from whisperd.ledger.reader import IS_LIVE, IS_OVER, signed
from whisperd.ledger.store import NO_FAILURE, NO_LEASE, IllegalMove, Store, as_json, failing, identity, known, sighting_of
from whisperd.vocabulary import LIVE, Failure, FailureKind, JobOptions, Media, Sighting, State

REPLACED = "the file was replaced"
_SIGHTED = "path, dev, inode, size, mtime_ns, ctime_ns"
_NEW_IDENTITY = "dev = {0}.dev, inode = {0}.inode, size = {0}.size, mtime_ns = {0}.mtime_ns, ctime_ns = {0}.ctime_ns"
_LAY_OUT = (  # where many are laid out beside their jobs; in memory
    "CREATE TEMP TABLE IF NOT EXISTS sighted (number INTEGER PRIMARY KEY, path BLOB, dev INTEGER, inode INTEGER, size INTEGER,"
    " mtime_ns INTEGER, ctime_ns INTEGER, job INTEGER) STRICT",
    "CREATE TEMP TABLE IF NOT EXISTS settling (number INTEGER PRIMARY KEY, path BLOB, dev INTEGER, inode INTEGER, size INTEGER,"
    " mtime_ns INTEGER, ctime_ns INTEGER, job INTEGER UNIQUE, options TEXT, priority INTEGER, media TEXT, duration_s REAL) STRICT",
    "DELETE FROM sighted",
    "DELETE FROM settling",
)
_KNOWN = (
    "SELECT sighted.number, job.id, job.state, job.size, job.mtime_ns FROM sighted CROSS JOIN job INDEXED BY {index}"
    " ON job.inbox_id = :inbox AND job.path = sighted.path WHERE {condition}"
)
_ALL_KNOWN = (
    _KNOWN.format(index="job_one_live_per_path", condition=IS_LIVE)
    + " UNION ALL "
    + _KNOWN.format(index="job_over_per_path", condition=IS_OVER)
)
_SEE_AGAIN = (
    f"UPDATE job SET verb = 'see', note = '', updated_at = ?, {_NEW_IDENTITY.format('sighted')}"
    " FROM sighted WHERE job.id = +sighted.job AND job.state = 'seen'"
)
_SEE_ANEW = (
    f"INSERT INTO job (inbox_id, state, verb, updated_at, seen_at, {_SIGHTED})"
    f" SELECT :inbox, 'seen', 'see', :now, :now, {_SIGHTED} FROM sighted ORDER BY number"
)
_CAN_SETTLE = (
    "SELECT settling.job FROM settling CROSS JOIN job ON job.id = settling.job WHERE job.state = 'seen'"
    " AND job.path = settling.path AND job.size = settling.size AND job.mtime_ns = settling.mtime_ns ORDER BY number"
)
_SETTLE = (
    "UPDATE job SET verb = 'settle', note = '', updated_at = :now, state = 'ready', ready_at = :now, not_before = :now,"
    f" {_NEW_IDENTITY.format('settling')}, options = settling.options, media = coalesce(settling.media, job.media),"
    " duration_s = coalesce(settling.duration_s, job.duration_s), priority = CASE WHEN EXISTS (SELECT 1 FROM event"
    " WHERE job_id = job.id AND event.verb = 'prioritise') THEN job.priority ELSE settling.priority END FROM settling"
    " WHERE job.id = +settling.job AND job.state = 'seen' AND job.path = settling.path AND job.size = settling.size"
    " AND job.mtime_ns = settling.mtime_ns"
)


class Judged(NamedTuple):
    """What a sighting means. `job` None: it is new work. `replaced` is a live job whose content is not there any more."""

    job: int | None
    again: bool = False
    replaced: int | None = None


class Settling(NamedTuple):
    """A file that has settled, and what is asked of it. `job` None: whichever job its sighting is of."""

    sighting: Sighting
    options: JobOptions
    priority: int = 1
    media: Media | None = None
    job: int | None = None


def judged(size: int, mtime_ns: int, rows: Sequence[tuple[int, str, int, int]]) -> Judged:
    """What a file of that size and time is; `rows` are all jobs of its path as (id, state, size, mtime_ns).

    Content that is known under this path, whatever became of it, is not new work. A live job is not always the newest of its path: an
    older one may be retried. One that has not settled follows its file; one that waits or runs for another content is replaced.
    """
    live = next((row for row in rows if row[1] in LIVE), None)
    if live is not None and live[1] == State.SEEN:
        return Judged(live[0], again=True)
    if live is not None and live[2:] == (size, mtime_ns):
        return Judged(live[0])
    replaced = None if live is None else live[0]
    newest = max(rows, default=None)
    if newest is None or newest[0] == replaced or newest[1] == State.GONE or newest[2:] != (size, mtime_ns):
        return Judged(None, replaced=replaced)
    return Judged(newest[0], replaced=replaced)


class IntakeVerbs(Store):
    """Inboxes, and their files until they wait for an engine."""

    def register_inbox(self, path: bytes, outbox: bytes, now: float) -> int:
        """Know an inbox (again); its number stays the same for ever."""
        with self.transaction():
            self.db.conn.execute(
                "INSERT INTO inbox (path, outbox, since) VALUES (?, ?, ?)"
                " ON CONFLICT (path) DO UPDATE SET outbox = excluded.outbox, active = 1",
                [path, outbox, now],
            )
            return int(self.db.conn.execute("SELECT id FROM inbox WHERE path = ?", [path]).fetchone()[0])

    def retire_inboxes(self, keep: Sequence[int]) -> None:
        """Inboxes that the configuration no longer names; their jobs and history stay."""
        with self.transaction():
            marks = ",".join("?" * len(keep))
            self.db.conn.execute(f"UPDATE inbox SET active = id IN ({marks})", list(keep))

    def inbox_up(self, inbox: int, now: float) -> None:
        with self.transaction():
            self.db.conn.execute(
                "UPDATE inbox SET scanned_at = :now, since = CASE state WHEN 'up' THEN since ELSE :now END, state = 'up', what = ''"
                " WHERE id = :inbox",
                {"now": now, "inbox": inbox},
            )

    def inbox_down(self, inbox: int, what: str, now: float) -> None:
        with self.transaction():
            self.db.conn.execute(
                "UPDATE inbox SET since = CASE state WHEN 'down' THEN since ELSE :now END, state = 'down', what = :what WHERE id = :inbox",
                {"now": now, "inbox": inbox, "what": what},
            )

    # --- seen ---

    def see(self, inbox: int, sighting: Sighting, now: float) -> int:
        """A file was seen and is not settled; returns its job. See `judged`."""
        return self.see_all(inbox, [sighting], now)[0]

    def see_all(self, inbox: int, sightings: Iterable[Sighting], now: float) -> list[int]:
        """`see` of many in one transaction, in their order; returns the job of each."""
        jobs: list[int] = []
        with self.transaction():
            for part in _rounds(sightings):
                jobs += self._see_each(inbox, part, now)
        return jobs

    def _see_each(self, inbox: int, sightings: Sequence[Sighting], now: float) -> list[int]:
        """See files of different paths. Nearly always all are new: then this is a few statements, however many there are."""
        conn = self._lay_out()
        conn.executemany("INSERT INTO sighted VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", map(_laid_out, range(len(sightings)), sightings))
        rows: dict[int, list[tuple[int, str, int, int]]] = {}
        for number, *row in conn.execute(_ALL_KNOWN, {"inbox": inbox}):
            rows.setdefault(number, []).append((row[0], row[1], row[2], row[3]))
        found = {number: judged(sightings[number].size, sightings[number].mtime_ns, there) for number, there in rows.items()}
        for one in found.values():
            if one.replaced is not None:
                self.vanish(one.replaced, now, note=REPLACED)
        told = {number: one.job for number, one in found.items() if one.job is not None}
        if again := [(one.job, number) for number, one in found.items() if one.again]:
            conn.executemany("UPDATE sighted SET job = ? WHERE number = ?", again)
            conn.execute(_SEE_AGAIN, [now])
        if len(told) == len(sightings):
            return [told[number] for number in range(len(sightings))]
        conn.executemany("DELETE FROM sighted WHERE number = ?", ((number,) for number in told))
        newest = conn.execute(_SEE_ANEW, {"inbox": inbox, "now": now}).lastrowid or 0
        fresh = iter(range(newest - (len(sightings) - len(told)) + 1, newest + 1))
        return [told[number] if number in told else next(fresh) for number in range(len(sightings))]

    def _lay_out(self) -> sqlite3.Connection:
        for statement in _LAY_OUT:
            self.db.conn.execute(statement)
        return self.db.conn

    def see_anew(self, inbox: int, sighting: Sighting, now: float) -> int:
        """A file is new work though its size and time are known: its content is another. A live job of its path goes on as with `see`."""
        with self.transaction():
            if self.live_job(inbox, sighting.path) is not None:
                return self.see(inbox, sighting, now)
            self._lay_out().execute("INSERT INTO sighted VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", _laid_out(0, sighting))
            return int(self.db.conn.execute(_SEE_ANEW, {"inbox": inbox, "now": now}).lastrowid or 0)

    def rename(self, inbox: int, before: bytes, sighting: Sighting, now: float) -> int | None:
        """The live job of `before` goes on under the new path: same number, history and windows. None when nothing lives at `before`.

        A live job at the new path vanishes first: its file was replaced. So does that of `before` when the file has another content by
        now, unless it has not settled yet. Names that were reserved for `before` and never published are free again.
        """
        with self.transaction():
            live = self.live_job(inbox, before)
            if live is None or before == sighting.path:
                return None if live is None else int(live["id"])
            if live["state"] != State.SEEN and not sighting_of(live).same_content(sighting):
                self.vanish(live["id"], now, note=REPLACED)
                return None
            there = self.live_job(inbox, sighting.path)
            if there is not None:
                self.vanish(there["id"], now, note=REPLACED)
            self._free_names(inbox, before)
            self._move("rename", live["id"], now, note=f"it was {printable(before)}", path=sighting.path, **identity(sighting))
            return int(live["id"])

    def _free_names(self, inbox: int, path: bytes) -> None:
        """Reservations of a source under which nothing of it stands in the outbox. Those that are avoided stay so."""
        published = self.publications_of_source(inbox, path)
        stands = {(row["outbox"], row["path"]) for row in published}
        stands |= {(row["outbox"], row["path"].removesuffix(b"." + row["format"].encode())) for row in published}
        names = self.db.query("SELECT outbox, base FROM name WHERE inbox_id = ? AND path = ? AND kind <> 'avoided'", [inbox, path])
        free = [(row["outbox"], row["base"]) for row in names if (row["outbox"], row["base"]) not in stands]
        self.db.conn.executemany("DELETE FROM name WHERE outbox = ? AND base = ?", free)

    def recognise(self, job: int, sighting: Sighting, now: float) -> None:
        """A finished job's file is another one by inode or change time, but its content was found the same: nobody asks again."""
        with self.transaction():
            row = self._require("recognise", job)
            if not sighting_of(row).same_content(sighting):
                raise IllegalMove(f"cannot recognise the file of job {job}: its size or time is another")
            self._move("recognise", job, now, **identity(sighting))

    def vanish(self, job: int, now: float, *, note: str = "the file is gone from the inbox") -> None:
        """seen, ready, running → gone."""
        with self.transaction():
            self._move("vanish", job, now, note=note, ended_at=now, **NO_LEASE)
            self._forget_checkpoints(job)

    # --- settled ---

    def settle(
        self, job: int, sighting: Sighting, options: JobOptions, now: float, *, priority: int = 1, media: Media | None = None
    ) -> None:
        """seen → ready: the file has not changed for the quiet period. A class that the operator gave it meanwhile stays."""
        with self.transaction():
            if self.exists(job) and self.db.table("event").count_where("job_id = ? AND verb = 'prioritise'", [job]):
                priority = self.job(job)["priority"]
            found = _found(media)
            self._move(
                "settle",
                job,
                now,
                options=as_json(options),
                priority=priority,
                ready_at=now,
                not_before=now,
                **identity(sighting),
                **known(**found),
            )

    def settle_all(self, inbox: int, settled: Sequence[Settling], now: float) -> list[int]:
        """`settle` of many in one transaction; returns the jobs that became ready.

        One without a number is seen first. One that is not `seen` any more, or has another content by now, is left as it is.
        """
        texts: dict[int, str] = {}  # by the options' identity: mostly they are one value for thousands
        with self.transaction():
            seen = iter(self.see_all(inbox, [one.sighting for one in settled if one.job is None], now))
            jobs = [next(seen) if one.job is None else one.job for one in settled]
            for one in settled:
                if id(one.options) not in texts:
                    texts[id(one.options)] = as_json(one.options)
            conn = self._lay_out()
            conn.executemany(
                "INSERT OR IGNORE INTO settling VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    (*_laid_out(number, one.sighting), job, texts[id(one.options)], one.priority, *_found(one.media).values())
                    for number, (one, job) in enumerate(zip(settled, jobs, strict=True))
                ),
            )
            ready = [int(row[0]) for row in conn.execute(_CAN_SETTLE)]
            if ready:
                conn.execute(_SETTLE, {"now": now})
        return ready

    def reject(self, job: int, failure: Failure, options: JobOptions, now: float) -> None:
        """seen → failed: it is no recording, or is refused. No engine ever sees it; an error file will say so in the outbox."""
        if failure.kind is not FailureKind.PERMANENT:
            raise IllegalMove(f"cannot reject job {job} for something that may pass: {failure.what}")
        self._move("reject", job, now, note=failure.what, ended_at=now, held=0, options=as_json(options), **failing(failure, ""))

    def take(self, job: int, sha256: str, now: float, *, spooled: bool, asked: str) -> None:
        """ready → ready: its content is known, and perhaps copied to the local disk. What it waited for is there."""
        with self.transaction():
            waited = self._require("take", job)["failure_kind"] == FailureKind.WAITING
            past = NO_FAILURE if waited else {}
            self._move("take", job, now, sha256=sha256, spooled=int(spooled), asked=asked, **past)

    def postpone(self, job: int, failure: Failure, now: float, *, not_before: float) -> None:
        """ready → ready: something that is not the file is absent, and its turn comes later. No attempt was spent."""
        if failure.kind is not FailureKind.WAITING:
            raise IllegalMove(f"cannot postpone job {job} for something that nobody waits for: {failure.what}")
        self._move("postpone", job, now, not_before=not_before, **failing(failure, ""))

    def wake_waiting(self, codes: Sequence[str], now: float) -> int:
        """What they waited for is back: ready jobs that wait for one of these may run at once; returns how many."""
        if not codes:
            return 0
        with self.transaction():
            marks = ",".join("?" * len(codes))
            woken = self.db.conn.execute(
                "UPDATE job INDEXED BY job_postponed SET verb = 'wake', note = 'what it waited for is back', updated_at = ?, not_before = ?"
                f" WHERE state = 'ready' AND failure_kind = 'waiting' AND failure_code IN ({marks}) AND not_before > ?",
                [now, now, *codes, now],
            )
            return int(woken.rowcount)


def _rounds(sightings: Iterable[Sighting]) -> Iterator[list[Sighting]]:
    """Split where a path comes again: what was seen last counts, and is held against what was seen first."""
    part: list[Sighting] = []
    paths: set[bytes] = set()
    for sighting in sightings:
        if sighting.path in paths:
            yield part
            part, paths = [], set()
        part.append(sighting)
        paths.add(sighting.path)
    if part:
        yield part


def _laid_out(number: int, file: Sighting) -> tuple[Any, ...]:
    return number, file.path, signed(file.dev), signed(file.inode), file.size, file.mtime_ns, file.ctime_ns


def _found(media: Media | None) -> dict[str, Any]:
    return {"media": None if media is None else as_json(media), "duration_s": None if media is None else media.duration_s}
