"""The ledger against a plain model of it: any verbs in any order, by anybody, and SQL that goes around the verbs.

`Book` says in ordinary Python what DESIGN §4 promises. Every step is done to both; then what came of it (a value or the code of a
refusal) and every stored row must be equal. A refusal is always one of the ledger's own errors and changes nothing.
"""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import wraps
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from whisperd.errors import WhisperdError, printable
from whisperd.ledger.connection import LEDGER_NAME
from whisperd.ledger.ledger import Ledger, Settling
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Media, Segment, Sighting, Track, Window

SEQUENCES = 10_000
SEQUENCES_A_FILE = 100
STEPS = (4, 13)

STATES = ("seen", "ready", "running", "transcribed", "done", "failed", "cancelled", "gone")
LIVE = ("seen", "ready", "running")
ENDED = ("done", "failed", "cancelled", "gone")

ARROWS = {  # DESIGN §4, the diagram, written down a second time: (verb, from) → to
    ("see", ""): "seen",
    ("see", "seen"): "seen",
    ("settle", "seen"): "ready",
    ("claim", "ready"): "running",
    ("checkpoint", "running"): "running",
    ("progress", "running"): "running",
    ("release", "running"): "ready",
    ("interrupt", "running"): "ready",
    ("wait", "running"): "ready",
    ("finish", "running"): "transcribed",
    ("fail", "running"): "failed",
    ("publish", "transcribed"): "done",
    ("report", "failed"): "failed",
    ("reuse", "ready"): "transcribed",
    ("retry", "failed"): "ready",
    ("retry", "cancelled"): "ready",
    ("cancel", "ready"): "cancelled",
    ("cancel", "running"): "cancelled",
    ("vanish", "seen"): "gone",
    ("vanish", "ready"): "gone",
    ("vanish", "running"): "gone",
    ("hold", "seen"): "seen",
    ("hold", "ready"): "ready",
    ("hold", "running"): "ready",
    ("unhold", "seen"): "seen",
    ("unhold", "ready"): "ready",
    ("prioritise", "seen"): "seen",
    ("prioritise", "ready"): "ready",
    ("prioritise", "running"): "running",
    ("cancel", "seen"): "cancelled",
    ("reject", "seen"): "failed",
    ("take", "ready"): "ready",
    ("postpone", "ready"): "ready",
    ("wake", "ready"): "ready",
    ("rename", "seen"): "seen",
    ("rename", "ready"): "ready",
    ("rename", "running"): "running",
    ("recognise", "transcribed"): "transcribed",
    ("recognise", "done"): "done",
    ("recognise", "failed"): "failed",
    ("recognise", "cancelled"): "cancelled",
    ("dispose", "done"): "done",
}
SILENT = {("see", "seen"), ("checkpoint", "running"), ("progress", "running"), ("take", "ready"), ("postpone", "ready")}
VERBS = sorted({verb for verb, _ in ARROWS})
VERB_OF = {"disposed": "dispose", "wake_waiting": "wake"}
"""Where a method is not called as its arrow is."""

OF_NO_JOB = ("see", "see_all", "see_anew", "settle_all", "rename", "wake_waiting", "drop_results", "register_inbox", "renew")
"""Verbs that do not begin with the number of a job."""

NO_LEASE = {"lease_child": None, "lease_epoch": None, "lease_until": None}
NO_FAILURE = {"failure_kind": None, "failure_code": None, "failure_what": None, "failure_hint": None, "failure_tail": ""}

Row = dict[str, Any]


def memory_dir() -> str | None:
    """Where a file system costs nothing to sync."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# --- the model -------------------------------------------------------------------------------------------------------------------


class Refused(Exception):
    """What the model says when a verb is not legal: the code of the error that the ledger must raise."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


def whole(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A verb that is refused has changed nothing."""

    @wraps(verb)
    def tried(book: Book, *args: Any, **kwargs: Any) -> Any:
        before = book.snapshot()
        try:
            return verb(book, *args, **kwargs)
        except Refused:
            book.restore(before)
            raise

    return tried


def identity(sighting: Sighting) -> Row:
    inode = sighting.inode - (1 << 64) if sighting.inode >= 1 << 63 else sighting.inode
    return {"dev": sighting.dev, "inode": inode, "size": sighting.size, "mtime_ns": sighting.mtime_ns, "ctime_ns": sighting.ctime_ns}


def known(duration_s: float | None) -> Row:
    """An unknown duration does not wipe a known one."""
    return {} if duration_s is None else {"duration_s": duration_s}


def failing(failure: Failure, tail: str) -> Row:
    return {
        "failure_kind": failure.kind.value,
        "failure_code": failure.code,
        "failure_what": failure.what,
        "failure_hint": failure.hint,
        "failure_tail": tail,
    }


def json(value: object) -> str:
    return msgspec.json.encode(value).decode()


class Book:
    """The model: the same verbs as the ledger, kept in dictionaries. Rows are replaced, never changed in place."""

    PARTS = ("jobs", "events", "windows", "names", "publications", "inboxes", "results", "notices")

    def __init__(self, epoch: str) -> None:
        self.epoch = epoch
        self.last = 0
        self.jobs: dict[int, Row] = {}
        self.events: dict[int, tuple[tuple[Any, ...], ...]] = {}
        self.windows: dict[tuple[int, int], tuple[float, str, str, bytes | None]] = {}
        self.names: dict[tuple[bytes, bytes], tuple[int, bytes, str]] = {}
        self.publications: dict[tuple[bytes, bytes], tuple[int, str, str, float]] = {}
        self.inboxes: dict[int, tuple[bytes, bytes]] = {}
        self.results: dict[tuple[str, str], Row] = {}
        self.notices: dict[int, tuple[Any, ...]] = {}  # job, event, target, delivery, body, attempts, not before, state, what, made
        self.published: dict[int, list[tuple[bytes, bytes]]] = {}  # names a job ever had; another job may have them now

    def snapshot(self) -> list[Any]:
        return [self.last, *(dict(getattr(self, part)) for part in self.PARTS)]

    def restore(self, snapshot: list[Any]) -> None:
        self.last = snapshot[0]
        for part, kept in zip(self.PARTS, snapshot[1:], strict=True):
            setattr(self, part, kept)

    def _live(self, inbox: int, path: bytes) -> Row | None:
        return next((row for row in self.jobs.values() if (row["inbox_id"], row["path"]) == (inbox, path) and row["state"] in LIVE), None)

    def _latest(self, inbox: int, path: bytes) -> Row | None:
        known = [row for row in self.jobs.values() if (row["inbox_id"], row["path"]) == (inbox, path)]
        return max(known, key=lambda row: row["id"], default=None)

    def _require(self, job: int) -> Row:
        if job not in self.jobs:
            raise Refused("no_such_job")
        return self.jobs[job]

    def _move(self, verb: str, job: int, now: float, *, child: str | None = None, note: str = "", **changes: Any) -> None:
        old = self._require(job)
        to = ARROWS.get((verb, old["state"]))
        if to is None:
            raise Refused("illegal_move")
        if child is not None and (old["lease_child"], old["lease_epoch"]) != (child, self.epoch):
            raise Refused("lease_lost")
        self._keep({**old, "verb": verb, "note": note, "updated_at": now, "state": to, **changes})
        if (verb, old["state"]) not in SILENT:
            attempt = max(old["attempts"], self.jobs[job]["attempts"])
            left = old["path"] if self.jobs[job]["path"] != old["path"] else None
            self.events[job] = (*self.events[job], (now, verb, old["state"], to, attempt, note, left))

    def _keep(self, row: Row) -> None:
        live = self._live(row["inbox_id"], row["path"]) if row["state"] in LIVE else None
        if broken_laws(row) or row["inbox_id"] not in self.inboxes or (live is not None and live["id"] != row["id"]):
            raise Refused("illegal_move")
        self.jobs[row["id"]] = row

    def _forget_windows(self, job: int) -> None:
        for key in [key for key in self.windows if key[0] == job]:
            del self.windows[key]

    # --- verbs, as the ledger has them ---

    def register_inbox(self, path: bytes, outbox: bytes, now: float) -> int:
        number = next((number for number, known in self.inboxes.items() if known[0] == path), len(self.inboxes) + 1)
        self.inboxes[number] = (path, outbox)
        return number

    @whole
    def see(self, inbox: int, sighting: Sighting, now: float) -> int:
        def same(row: Row) -> bool:
            return (row["size"], row["mtime_ns"]) == (sighting.size, sighting.mtime_ns)

        live = self._live(inbox, sighting.path)
        if live is not None and live["state"] == "seen":
            self._move("see", live["id"], now, **identity(sighting))
            return int(live["id"])
        if live is not None and same(live):
            return int(live["id"])
        if live is not None:
            self.vanish(live["id"], now, note="the file was replaced")
        latest = self._latest(inbox, sighting.path)
        if latest is not None and latest["state"] != "gone" and same(latest):
            return int(latest["id"])
        return self._begin(inbox, sighting, now)

    def _begin(self, inbox: int, sighting: Sighting, now: float) -> int:
        self.last += 1
        row = new_row(self.last, inbox, sighting, now)
        self._keep(row)
        self.events[self.last] = ((now, "see", "", "seen", 0, "", None),)
        return self.last

    @whole
    def see_all(self, inbox: int, sightings: tuple[Sighting, ...], now: float) -> list[int]:
        return [self.see(inbox, sighting, now) for sighting in sightings]

    @whole
    def see_anew(self, inbox: int, sighting: Sighting, now: float) -> int:
        live = self._live(inbox, sighting.path)
        return self.see(inbox, sighting, now) if live is not None else self._begin(inbox, sighting, now)

    def settle(self, job: int, sighting: Sighting, options: JobOptions, now: float, *, priority: int, media: Media | None = None) -> None:
        if any(verb == "prioritise" for _, verb, *_ in self.events.get(job, ())):
            priority = self.jobs[job]["priority"]
        found = {} if media is None else {"media": json(media), **known(media.duration_s)}
        asked = {"options": json(options), "priority": priority}
        self._move("settle", job, now, ready_at=now, not_before=now, **asked, **identity(sighting), **found)

    @whole
    def settle_all(self, inbox: int, settled: tuple[Settling, ...], now: float) -> list[int]:
        jobs = [self.see(inbox, one.sighting, now) if one.job is None else one.job for one in settled]
        ready = []
        for job, one in zip(jobs, settled, strict=True):
            row, file = self.jobs.get(job), one.sighting
            if row and (row["state"], row["path"], row["size"], row["mtime_ns"]) == ("seen", file.path, file.size, file.mtime_ns):
                self.settle(job, file, one.options, now, priority=one.priority, media=one.media)
                ready.append(job)
        return ready

    def reject(self, job: int, failure: Failure, options: JobOptions, now: float) -> None:
        if failure.kind is not FailureKind.PERMANENT:
            raise Refused("illegal_move")
        self._move("reject", job, now, note=failure.what, ended_at=now, held=0, options=json(options), **failing(failure, ""))

    def take(self, job: int, sha256: str, now: float, *, spooled: bool, asked: str) -> None:
        past = NO_FAILURE if self._require(job)["failure_kind"] == "waiting" else {}
        self._move("take", job, now, sha256=sha256, spooled=int(spooled), asked=asked, **past)

    def postpone(self, job: int, failure: Failure, now: float, *, not_before: float) -> None:
        if failure.kind is not FailureKind.WAITING:
            raise Refused("illegal_move")
        self._move("postpone", job, now, not_before=not_before, **failing(failure, ""))

    def wake_waiting(self, codes: tuple[str, ...], now: float) -> int:
        waiting = [row for row in self.jobs.values() if (row["state"], row["failure_kind"]) == ("ready", "waiting")]
        late = [row["id"] for row in waiting if row["failure_code"] in codes and row["not_before"] > now]
        for job in late:
            self._move("wake", job, now, note="what it waited for is back", not_before=now)
        return len(late)

    @whole
    def rename(self, inbox: int, before: bytes, sighting: Sighting, now: float) -> int | None:
        live = self._live(inbox, before)
        if live is None or before == sighting.path:
            return live and int(live["id"])
        if live["state"] != "seen" and (live["size"], live["mtime_ns"]) != (sighting.size, sighting.mtime_ns):
            self.vanish(live["id"], now, note="the file was replaced")
            return None
        there = self._live(inbox, sighting.path)
        if there is not None:
            self.vanish(there["id"], now, note="the file was replaced")
        owners = {row["id"] for row in self.jobs.values() if (row["inbox_id"], row["path"]) == (inbox, before)}
        used = [name for name, publication in self.publications.items() if publication[0] in owners]
        for (outbox, base), (owner, path, kind) in list(self.names.items()):
            stands = (outbox, base + b".txt") in used
            if (owner, path) == (inbox, before) and kind != "avoided" and not stands:
                del self.names[outbox, base]
        self._move("rename", live["id"], now, note=f"it was {printable(before)}", path=sighting.path, **identity(sighting))
        return int(live["id"])

    def recognise(self, job: int, sighting: Sighting, now: float) -> None:
        row = self._require(job)
        if (row["size"], row["mtime_ns"]) != (sighting.size, sighting.mtime_ns):
            raise Refused("illegal_move")
        self._move("recognise", job, now, **identity(sighting))

    @whole
    def vanish(self, job: int, now: float, *, note: str = "the file is gone from the inbox") -> None:
        self._move("vanish", job, now, note=note, ended_at=now, **NO_LEASE)
        self._forget_windows(job)

    def claim(self, job: int, child: str, now: float, *, lease_s: float) -> None:
        attempts = self._require(job)["attempts"] + 1
        if self.jobs[job]["held"] and self.jobs[job]["state"] == "ready":
            raise Refused("illegal_move")
        lease = {"lease_child": child, "lease_epoch": self.epoch, "lease_until": now + lease_s}
        self._move("claim", job, now, note=child, started_at=now, attempts=attempts, **lease, **NO_FAILURE)

    @whole
    def checkpoint(
        self,
        job: int,
        child: str,
        window: Window,
        now: float,
        *,
        lease_s: float,
        duration_s: float | None,
        made_by: str,
        front_end: bytes,
    ) -> None:
        kept = {"lease_until": now + lease_s, "position_s": window.end_s, **known(duration_s)}
        self._move("checkpoint", job, now, child=child, interruptions=0, **kept)  # it got on: earlier deaths are forgotten
        if window.index < 0:
            raise Refused("illegal_move")
        self.windows.setdefault((job, window.index), (window.end_s, json(window), made_by, front_end or None))
        before = (job, window.index - 1)
        if before in self.windows:
            self.windows[before] = (*self.windows[before][:3], None)

    @whole
    def drop_foreign_checkpoints(self, job: int, child: str, made_by: str, now: float) -> int:
        self._require(job)
        kept = [window for (owner, _), window in self.windows.items() if owner == job]
        if all(window[2] == made_by for window in kept):
            return 0
        self._move("progress", job, now, child=child, position_s=0.0)
        self._forget_windows(job)
        return len(kept)

    def renew(self, child: str, now: float, *, lease_s: float) -> None:
        for row in [row for row in self.jobs.values() if (row["lease_child"], row["lease_epoch"]) == (child, self.epoch)]:
            self._move("progress", row["id"], now, lease_until=now + lease_s)

    def progress(self, job: int, child: str, position_s: float, duration_s: float | None, now: float, *, lease_s: float) -> None:
        self._move("progress", job, now, child=child, lease_until=now + lease_s, position_s=position_s, **known(duration_s))

    def release(self, job: int, child: str, failure: Failure, now: float, *, not_before: float, tail: str, needs_mib: int | None) -> None:
        known = {} if needs_mib is None else {"needs_mib": needs_mib}
        self._move(
            "release", job, now, child=child, note=failure.what, not_before=not_before, **known, **NO_LEASE, **failing(failure, tail)
        )

    def interrupt(self, job: int, child: str, why: str, now: float) -> None:
        row = self._require(job)
        back = {"attempts": max(0, row["attempts"] - 1), "interruptions": row["interruptions"] + 1, "not_before": now}
        self._move("interrupt", job, now, child=child, note=why, **back, **NO_LEASE)

    def wait(self, job: int, child: str, failure: Failure, now: float, *, not_before: float) -> None:
        back = {"attempts": max(0, self._require(job)["attempts"] - 1), "not_before": not_before}
        self._move("wait", job, now, child=child, note=failure.what, **back, **NO_LEASE, **failing(failure, ""))

    def interrupt_other_epochs(self, now: float) -> list[int]:
        stale = [row for row in self.jobs.values() if row["state"] == "running" and row["lease_epoch"] != self.epoch]
        for row in stale:
            back = {"attempts": max(0, row["attempts"] - 1), "interruptions": row["interruptions"] + 1, "not_before": now}
            self._move("interrupt", row["id"], now, note="the daemon ended while it ran", **back, **NO_LEASE)
        return sorted(row["id"] for row in stale)

    @whole
    def finish(self, job: int, child: str, now: float, *, duration_s: float, asked: str, revision: str, size: int, **result: Any) -> None:
        question = {"asked": asked} if asked else {}
        self._move("finish", job, now, child=child, duration_s=duration_s, position_s=duration_s, **question, **result, **NO_LEASE)
        self._forget_windows(job)
        if asked:
            if size < 0:
                raise Refused("illegal_move")
            kept = {"sha256": result["sha256"], "asked": asked, "transcript": result["transcript"], "revision": revision}
            self.results[result["sha256"], asked] = {**kept, "bytes": size, "used_at": now, "job_id": job}

    @whole
    def reuse(self, job: int, now: float, *, transcript: str, result: Row) -> None:
        row = self._require(job)
        kept = self.results.get((result["sha256"], result["asked"]))
        if kept is None or kept["job_id"] != result["job_id"] or (row["held"] and row["state"] == "ready"):
            raise Refused("illegal_move")
        if row["sha256"] not in (None, kept["sha256"]) or row["asked"] not in (None, kept["asked"]):
            raise Refused("illegal_move")
        maker = self.jobs[kept["job_id"]]
        copied = {name: maker[name] for name in ("duration_s", "language", "quality")}
        told = {"sha256": kept["sha256"], "asked": kept["asked"], "origin": maker["id"], "transcript": transcript}
        note = f"its content is that of job {maker['id']}"
        self._move("reuse", job, now, note=note, position_s=maker["duration_s"], **told, **copied, **NO_FAILURE)
        self._forget_windows(job)
        self.results[kept["sha256"], kept["asked"]] = {**kept, "used_at": max(kept["used_at"], now)}

    def drop_results(self, max_bytes: int, before: float) -> list[str]:
        with_newer, dropped = 0, []
        for key, kept in sorted(self.results.items(), key=lambda item: (-item[1]["used_at"], -item[1]["job_id"], item[0][1])):
            with_newer += kept["bytes"]
            if kept["used_at"] < before or with_newer > max_bytes:
                dropped.append(self.results.pop(key)["transcript"])
        needed = {kept["transcript"] for kept in self.results.values()}
        needed |= {row["transcript"] for row in self.jobs.values() if row["state"] == "transcribed"}
        return sorted(set(dropped) - needed)

    def fail(self, job: int, child: str, failure: Failure, now: float, *, tail: str) -> None:
        if failure.kind is FailureKind.WAITING:
            raise Refused("illegal_move")
        self._move("fail", job, now, child=child, note=failure.what, ended_at=now, **NO_LEASE, **failing(failure, tail))

    def reserve_name(self, job: int, outbox: bytes, candidates: tuple[bytes, ...], kind: str) -> bytes:
        row = self._require(job)
        source = (row["inbox_id"], row["path"], kind)
        for (where, base), owner in self.names.items():
            if where == outbox and owner == source:
                return base
        for base in candidates:
            if kind in ("transcript", "error") and (outbox, base) not in self.names:
                self.names[outbox, base] = source
                return base
        raise Refused("illegal_move")

    def avoid_name(self, job: int, outbox: bytes, base: bytes) -> None:
        row = self._require(job)
        source = (row["inbox_id"], row["path"])
        if self.names.get((outbox, base), source)[:2] == source:
            self.names[outbox, base] = (*source, "avoided")

    @whole
    def publish(
        self, job: int, outbox: bytes, files: tuple[tuple[bytes, str, str], ...], now: float, *, disposal: str, notices: Any
    ) -> None:
        self._require(job)
        self._publications(job, outbox, files, now)
        if job not in {publication[0] for publication in self.publications.values()}:
            raise Refused("illegal_move")
        if disposal not in ("", "archive", "delete"):
            raise Refused("illegal_move")
        self._move("publish", job, now, ended_at=now, **({"disposal": disposal} if disposal else {}))
        self._owe(job, "done", notices, now)

    @whole
    def report(self, job: int, outbox: bytes, files: tuple[tuple[bytes, str, str], ...], now: float, *, notices: Any) -> None:
        self._move("report", job, now, reported_at=now)
        self._publications(job, outbox, files, now)
        self._owe(job, "failed", notices, now)

    def _owe(self, job: int, event: str, notices: Any, now: float) -> None:
        for target, delivery, body in notices:
            if delivery in {notice[3] for notice in self.notices.values()}:
                raise Refused("illegal_move")
            self.notices[max(self.notices, default=0) + 1] = (job, event, target, delivery, body, 0, now, "due", "", now)

    def disposed(self, job: int, how: str, now: float) -> None:
        row = self._require(job)
        if row["disposal"] not in ("archive", "delete") or how not in ("archived", "deleted", "gone", "changed"):
            raise Refused("illegal_move")
        self._move("dispose", job, now, note=how, disposal=how)

    def notice_sent(self, notice: int, now: float) -> None:
        self._strike(notice, "sent", "", now)

    def notice_postponed(self, notice: int, what: str, not_before: float, now: float) -> None:
        self._strike(notice, "due", what, not_before)

    def notice_given_up(self, notice: int, what: str, now: float) -> None:
        self._strike(notice, "given_up", what, now)

    def _strike(self, notice: int, state: str, what: str, not_before: float) -> None:
        kept = self.notices.get(notice)
        if kept is None or kept[7] != "due":
            raise Refused("illegal_move")
        self.notices[notice] = (*kept[:5], kept[5] + 1, not_before, state, what, kept[9])

    def _publications(self, job: int, outbox: bytes, files: tuple[tuple[bytes, str, str], ...], now: float) -> None:
        for path, kind, sha256 in files:
            self.publications[outbox, path] = (job, kind, sha256, now)
            self.published.setdefault(job, []).append((outbox, path))

    def retry(self, job: int, now: float) -> None:
        ready_at = now if self._require(job)["ready_at"] is None else self.jobs[job]["ready_at"]
        slate = {"attempts": 0, "interruptions": 0, "needs_mib": None, "spooled": 0, "ready_at": ready_at, "not_before": now}
        self._move("retry", job, now, note="asked for by the operator", ended_at=None, reported_at=None, **slate, **NO_FAILURE)

    def cancel(self, job: int, now: float, *, options: JobOptions | None) -> None:
        kept = self._require(job)["options"] or json(options or JobOptions())
        self._move("cancel", job, now, note="asked for by the operator", ended_at=now, held=0, options=kept, **NO_LEASE)

    def hold(self, job: int, now: float) -> None:
        row = self._require(job)
        if row["state"] in LIVE and row["held"]:
            raise Refused("illegal_move")
        attempts = max(0, row["attempts"] - 1) if row["state"] == "running" else row["attempts"]
        self._move("hold", job, now, note="asked for by the operator", held=1, attempts=attempts, **NO_LEASE)

    def unhold(self, job: int, now: float) -> None:
        row = self._require(job)
        if row["state"] in LIVE and not row["held"]:
            raise Refused("illegal_move")
        self._move("unhold", job, now, note="asked for by the operator", held=0)

    def prioritise(self, job: int, priority: int, now: float) -> None:
        self._move("prioritise", job, now, note=f"class {priority}, asked for by the operator", priority=priority)

    def truncate_wal(self) -> bool:
        return True


def new_row(job: int, inbox: int, sighting: Sighting, now: float) -> Row:
    empty = dict.fromkeys(
        ("ready_at", "started_at", "ended_at", "options", "duration_s", "position_s", "sha256", "transcript", "language", "process_s")
    )
    return {
        "id": job,
        "inbox_id": inbox,
        "path": sighting.path,
        **identity(sighting),
        "state": "seen",
        "verb": "see",
        "note": "",
        "updated_at": now,
        "seen_at": now,
        **empty,
        "priority": 1,
        "not_before": 0.0,
        "attempts": 0,
        "interruptions": 0,
        **NO_LEASE,
        **NO_FAILURE,
        "reported_at": None,
        "quality": None,
        "held": 0,
        "needs_mib": None,
        "media": None,
        "spooled": 0,
        "asked": None,
        "origin": None,
        "disposal": None,
    }


def broken_laws(row: Row) -> list[str]:
    """What DESIGN §4 says of the fields of every state, and this row does not keep."""
    state = row["state"]
    laws = {
        "a known state": state in STATES,
        "a name": len(row["path"]) > 0,
        "a size": row["size"] >= 0,
        "running has a lease, and nothing else has": (state == "running") == (row["lease_child"] is not None),
        "a lease is whole": len({row[part] is None for part in NO_LEASE}) == 1,
        "settled has options": state in ("seen", "gone") or row["options"] is not None,
        "transcribed has a staged transcript": state not in ("transcribed", "done") or row["transcript"] is not None,
        "failed says why": state != "failed" or None not in (row["failure_kind"], row["failure_code"], row["failure_what"]),
        "only a failure is reported": row["reported_at"] is None or state == "failed",
        "ended has an end": (state in ENDED) == (row["ended_at"] is not None),
        "a known priority": row["priority"] in (0, 1, 2),
        "a known verdict": row["quality"] in (None, "good", "second_pass", "doubtful"),
        "only what waits is held": not row["held"] or state in ("seen", "ready", "gone"),
        "a known need": row["needs_mib"] is None or row["needs_mib"] >= 0,
        "owed only of what is done": row["disposal"] is None or state == "done",
        "counts": row["attempts"] >= 0 and row["interruptions"] >= 0,
    }
    return [law for law, kept in laws.items() if not kept]


def attempts_told_by(events: list[tuple[Any, ...]]) -> int:
    """Attempts as history alone tells them: counted by a claim, given back by an interruption, a wait or a hold, forgotten by a retry."""
    attempts = 0
    for _, verb, begin, *_ in events:
        if verb == "claim":
            attempts += 1
        elif verb in ("interrupt", "wait") or (verb, begin) == ("hold", "running"):
            attempts -= 1
        elif verb == "retry":
            attempts = 0
    return attempts


def broken_history(row: Row, events: list[tuple[Any, ...]]) -> list[str]:
    """Where the events of a job are not one path through the diagram that ends where the job stands."""
    broken = []
    here = ""
    for _, verb, begin, end, *_ in events:
        if begin != here or ARROWS.get((verb, begin)) != end:
            broken.append(f"{verb} from {begin!r} to {end!r} after {here!r}")
        here = end
    if here != row["state"]:
        broken.append(f"it ends {here!r}, the job is {row['state']!r}")
    if attempts_told_by(events) != row["attempts"]:
        broken.append(f"it tells of {attempts_told_by(events)} attempts, the job of {row['attempts']}")
    return broken


# --- the world: both of them, and the hands that play with them ------------------------------------------------------------------

FAILURES = (
    Failure(kind=FailureKind.PERMANENT, code="no_audio", what="there is no audio in it", hint="send another"),
    Failure(kind=FailureKind.TRANSIENT, code="worker_died", what="the worker died"),
    Failure(kind=FailureKind.WAITING, code="no_gpu", what="no card"),
)
OPTIONS = (JobOptions(), JobOptions(language="cs", initial_prompt="quote ' and \x00 nul"))
MEDIA = (None, Media(container="wav", tracks=(Track(number=1, codec="pcm_s16le"),), duration_s=12.5))
STRANGERS = (0, -1, 999_999, 10**30)
BAD_SIGHTING = 3

DOMAINS: dict[str, tuple[Any, ...]] = {
    "job": (0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5, 6, 7),  # the last four are strangers
    "child": ("holder", "holder", "anna", "bert"),
    "inbox": (0, 0, 0, 1, 9),
    "outbox": (0, 0, 1),
    "path": (0, 0, 1, 2),  # the last one is empty
    "content": (0, 0, 1, 2, BAD_SIGHTING),
    "options": (0, 1),
    "priority": (0, 1, 2, 2, 7),
    "seconds": (0.0, 2.5, 600.0),
    "needs": (None, None, 4000, -1),
    "duration": (None, 60.0),
    "window": (0, 1, 2, -1),
    "take": (0, 1),
    "maker": ("demo int8", "demo int8", "demo float32"),
    "quality": ("good", "good", "second_pass", "doubtful", "excellent"),
    "failure": (0, 1, 2),
    "candidates": ((0,), (0, 1), (0, 1, 2), ()),
    "kind": ("transcript", "transcript", "error", "nonsense"),
    "base": (0, 1, 2),
    "files": ((0,), (0, 1), (1, 2), ()),
    "whether": (True, False),
    "choice": tuple(range(60)),
    "media": (0, 0, 1),
    "sha": ("cd", "cd", "ef"),
    "question": ("q", "q", "r", ""),
    "bytes": (0, 10, 300, 10_000),
    "size": (100, 50, -1),
    "disposal": ("", "", "archive", "delete", "burn"),
    "how": ("archived", "deleted", "gone", "changed", "archive"),
    "told": (0, 0, 1, 2),  # how many; the last one tells one twice
    "notice": (0, 0, 1, 2, 99),
    "codes": (("no_gpu",), ("no_gpu", "share"), ("share",), ()),
    "some": ((0,), (0, 1), (0, 0, 1), (1, 0, 1, 0), (0, 2), ()),
}
SHAPES: dict[str, tuple[str, ...]] = {
    "forward": ("job", "choice"),
    "complete": ("job", "disposal"),
    "register_inbox": ("path", "outbox"),
    "see": ("inbox", "path", "content"),
    "see_all": ("inbox", "some", "content", "content"),
    "see_anew": ("inbox", "path", "content"),
    "settle": ("job", "content", "options", "priority", "media"),
    "settle_all": ("inbox", "some", "content", "job", "priority", "media"),
    "reject": ("job", "failure", "options"),
    "take": ("job", "sha", "question", "whether"),
    "postpone": ("job", "failure", "seconds"),
    "wake_waiting": ("job", "codes"),
    "rename": ("job", "path", "content"),
    "recognise": ("job", "content"),
    "reuse": ("job", "sha", "question"),
    "drop_results": ("bytes", "seconds"),
    "disposed": ("job", "how"),
    "notice_sent": ("notice",),
    "notice_postponed": ("notice", "seconds"),
    "notice_given_up": ("notice",),
    "vanish": ("job",),
    "claim": ("job", "child", "seconds"),
    "checkpoint": ("job", "child", "window", "take", "maker", "seconds", "duration"),
    "drop_foreign_checkpoints": ("job", "child", "maker"),
    "renew": ("child", "seconds"),
    "progress": ("job", "child", "seconds", "duration", "seconds"),
    "release": ("job", "child", "failure", "seconds", "needs"),
    "interrupt": ("job", "child"),
    "wait": ("job", "child", "failure", "seconds"),
    "finish": ("job", "child", "seconds", "quality", "sha", "question", "size"),
    "fail": ("job", "child", "failure"),
    "reserve_name": ("job", "outbox", "candidates", "kind"),
    "avoid_name": ("job", "outbox", "base"),
    "publish": ("job", "outbox", "files", "disposal", "told"),
    "report": ("job", "outbox", "files", "told"),
    "retry": ("job",),
    "cancel": ("job", "options"),
    "hold": ("job",),
    "unhold": ("job",),
    "prioritise": ("job", "priority"),
    "interrupt_other_epochs": (),
    "truncate_wal": (),
    "reopen": ("whether",),
}
OFTEN = {"forward": 26, "complete": 4, "see": 2.5, "reopen": 0.3, "truncate_wal": 0.3, "interrupt_other_epochs": 0.5, "register_inbox": 0.5}
OUTSIDE = ("truncate_wal", "reopen")  # not within a transaction
WEIGHTS = tuple(OFTEN.get(verb, 1.0) for verb in SHAPES)

FORWARD: dict[str, tuple[tuple[Any, ...], ...]] = {  # from each state, the moves that lead on
    "seen": (
        ("settle", 0, 0, 1, 0),
        ("settle", 1, 1, 0, 1),
        ("settle", 0, 0, 2, 1),
        ("settle", 2, 0, 1, 0),
        ("settle", 0, 1, 1, 0),
        ("settle", 0, 1, 1, 1),
        ("vanish",),
        ("hold",),
        ("reject", 0, 1),
        ("rename", 1, 0),
        ("rename", 0, 1),
    ),
    "ready": (
        ("claim", "anna", 600.0),
        ("claim", "bert", 2.5),
        ("claim", "anna", 0.0),
        ("claim", "bert", 600.0),
        ("claim", "anna", 2.5),
        ("cancel", 0),
        ("vanish",),
        ("hold",),
        ("unhold",),
        ("prioritise", 0),
        ("take", "cd", "q", True),
        ("take", "cd", "q", False),
        ("reuse", "cd", "q"),
        ("reuse", "cd", "r"),
        ("postpone", 2, 600.0),
        ("rename", 1, 0),
        ("rename", 0, 0),
        *6 * (("claim", "anna", 600.0), ("claim", "bert", 600.0)),
        ("wake_waiting", ("no_gpu",)),
    ),
    "running": (
        ("checkpoint", "holder", 0, 0, "demo int8", 2.5, 60.0),
        ("checkpoint", "holder", 1, 1, "demo int8", 2.5, None),
        ("progress", "holder", 2.5, 60.0, 600.0),
        ("finish", "holder", 60.0, "good", "cd", "q", 100),
        ("finish", "holder", 2.5, "doubtful", "cd", "r", 50),
        ("finish", "anna", 0.0, "second_pass", "ef", "", 0),
        *8 * (("finish", "holder", 60.0, "good", "cd", "q", 100),),
        ("fail", "holder", 0),
        ("fail", "holder", 1),
        ("release", "holder", 1, 2.5, None),
        ("wait", "holder", 2, 600.0),
        ("interrupt", "holder"),
        ("cancel", 1),
        ("vanish",),
        ("hold",),
        ("rename", 1, 0),
        ("rename", 0, 0),
        ("rename", 1, 1),
    ),
    "transcribed": (
        ("reserve_name", 0, (0, 1), "transcript"),
        ("publish", 0, (0,), "", 1),
        ("publish", 0, (0, 1), "archive", 0),
        ("publish", 1, (1,), "delete", 1),
        ("publish", 0, (0,), "archive", 2),
        ("publish", 0, (0,), "archive", 1),
        ("avoid_name", 0, 0),
        ("recognise", 0),
    ),
    "done": (("reserve_name", 1, (0, 1, 2), "transcript"), ("recognise", 0), ("disposed", "archived"), ("disposed", "gone")),
    "failed": (("report", 0, (2,), 1), ("retry",), ("reserve_name", 0, (1, 2), "error"), ("recognise", 0)),
    "cancelled": (("retry",), ("recognise", 0)),
    "gone": (("retry",),),
}

Step = tuple[Any, ...]

_READY: tuple[Step, ...] = (("see", 0, 0, 0), ("settle", 0, 0, 0, 1, 0))
_RUNNING: tuple[Step, ...] = (*_READY, ("claim", 0, "anna", 600.0))
_TRANSCRIBED: tuple[Step, ...] = (*_RUNNING, ("finish", 0, "holder", 60.0, "good", "cd", "q", 100))
WAY_TO: dict[str, tuple[Step, ...]] = {  # how a sequence gets its first job into a state
    "seen": _READY[:1],
    "ready": _READY,
    "running": _RUNNING,
    "transcribed": _TRANSCRIBED,
    "done": (*_TRANSCRIBED, ("publish", 0, 0, (0,), "archive", 1)),
    "failed": (*_RUNNING, ("fail", 0, "holder", 0)),
    "cancelled": (*_READY, ("cancel", 0, 0)),
    "gone": (*_READY, ("vanish", 0)),
}


def draw_step(rng: random.Random, *, inside: bool = False) -> Step:
    """One random step; one of twelve is several verbs as one transaction."""
    if not inside and rng.random() < 1 / 12:
        return ("together", tuple(draw_step(rng, inside=True) for _ in range(rng.randint(1, 4))), rng.random() < 0.4)
    verb = rng.choices(tuple(SHAPES), WEIGHTS)[0]
    if inside and verb in OUTSIDE:
        verb = "forward"
    return (verb, *(rng.choice(DOMAINS[domain]) for domain in SHAPES[verb]))


class Undone(Exception):
    """Raised at the end of a transaction that is to be taken back."""


def outcome(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, Any]:
    """What came of a verb. Any other exception (sqlite3's, a KeyError) is a failure of the test."""
    try:
        value = call(*args, **kwargs)
    except (Refused, WhisperdError) as error:
        return "refused", error.code
    return "returned", sorted(value) if isinstance(value, list) else value


class World:
    """A real ledger and the model beside it. A sequence works on paths and names of its own; leases and epochs are shared by all."""

    def __init__(self, state_dir: str) -> None:
        self.state_dir = state_dir
        self.life = 0
        self.now = 1000.0
        self.ledger = Ledger(state_dir, epoch="life 0")
        self.book = Book("life 0")
        self.columns = [row[1] for row in self.sql("PRAGMA table_info (job)")]
        self.sequence = 0
        self.mine: list[int] = []
        self.log: list[Step] = []
        self.tried: set[tuple[str, str, str]] = set()  # (verb, state it met, what came of it)
        for number in (0, 1):
            self.both("register_inbox", b"/in/%d" % number, b"/out/%d" % number, self.now)

    def begin_sequence(self) -> None:
        self.sequence += 1
        self.mine = []
        self.log = []

    def sql(self, statement: str) -> list[tuple[Any, ...]]:
        return list(self.ledger.db.conn.execute(statement))

    def both(self, verb: str, *args: Any, **kwargs: Any) -> tuple[str, Any]:
        """Do it to the model and to the ledger: the same must come of it."""
        begin = self.book.jobs[args[0]]["state"] if args and verb not in OF_NO_JOB and args[0] in self.book.jobs else ""
        if verb == "rename" and (live := self.book._live(*args[:2])):
            begin = live["state"]
        elif verb == "wake_waiting" and any(row["not_before"] > self.now for row in self.book.jobs.values() if row["state"] == "ready"):
            begin = "ready"
        expected = outcome(getattr(self.book, verb), *args, **kwargs)
        got = outcome(getattr(self.ledger, verb), *args, **kwargs)
        assert got == expected, f"{verb}{args}: the ledger {got}, the model {expected}; sequence {self.log}"
        self.tried.add((VERB_OF.get(verb, verb), begin, expected[1] if expected[0] == "refused" else "done"))
        return got

    def step(self, step: Step) -> None:
        """Do one step and look at everything it may have touched."""
        self.log.append(step)
        self.now += (0.25, 0.25, 60.0, 0.0, -3600.0)[len(self.log) % 5]  # clocks also jump back
        getattr(self, "do_" + step[0])(*step[1:])
        self.look_at_mine()

    # --- steps ---

    def job(self, which: int) -> int:
        if which >= 4:
            return STRANGERS[which - 4]
        return self.mine[which % len(self.mine)] if self.mine else STRANGERS[which]

    def child(self, name: str, job: int) -> str:
        holder = self.book.jobs[job]["lease_child"] if job in self.book.jobs else None
        return (holder or "anna") if name == "holder" else name

    def sighting(self, path: bytes, content: int) -> Sighting:
        size = -1 if content == BAD_SIGHTING else 100 + content
        return Sighting(path=path, dev=1, inode=(1 << 64) - 1 - content, size=size, mtime_ns=7, ctime_ns=8)

    def base(self, number: int) -> bytes:
        return b"%d/name %d" % (self.sequence, number)

    def files(self, numbers: tuple[int, ...]) -> tuple[tuple[bytes, str, str], ...]:
        return tuple((self.base(number) + b".txt", "txt", f"sha {number}") for number in numbers)

    def do_forward(self, which: int, choice: int) -> None:
        """A move that leads on from wherever that job stands, or a new file when there is none yet."""
        if not self.mine:
            self.do_see(0, which % 2, 0)
            return
        which %= min(4, len(self.mine))
        job = self.job(which)
        moves = FORWARD[self.book.jobs[job]["state"]]
        verb, *rest = moves[choice % len(moves)]
        getattr(self, "do_" + verb)(which, *rest)

    def do_complete(self, which: int, disposal: str) -> None:
        """A job goes the whole way, from wherever it stands."""
        if not self.mine:
            self.do_see(0, which % 2, 0)
        which %= min(4, len(self.mine))
        self.do_settle(which, 0, 0, 1, 0)
        self.do_claim(which, "anna", 600.0)
        self.do_finish(which, "holder", 60.0, "good", "cd", "q", 100)
        self.do_publish(which, 0, (0,), disposal, 1)

    def do_register_inbox(self, path: int, outbox: int) -> None:
        self.both("register_inbox", b"/in/%d" % path, b"/out/%d" % outbox, self.now)

    def do_see(self, inbox: int, path: int, content: int) -> None:
        how, job = self.both("see", inbox + 1, self.sighting(self.path(path), content), self.now)
        self.keep(how, [job])

    def path(self, number: int) -> bytes:
        return b"" if number == 2 else b"%d/\xff\n%d" % (self.sequence, number)

    def keep(self, how: str, jobs: list[int]) -> None:
        if how == "returned":
            self.mine += [job for job in dict.fromkeys(jobs) if job not in self.mine]

    def do_see_all(self, inbox: int, some: tuple[int, ...], content: int, other: int) -> None:
        """Several files at once, some of them twice: what comes of it is what comes of them one by one."""
        sightings = tuple(self.sighting(self.path(path), (content, other)[number % 2]) for number, path in enumerate(some))
        self.keep(*self.both("see_all", inbox + 1, sightings, self.now))

    def do_see_anew(self, inbox: int, path: int, content: int) -> None:
        how, job = self.both("see_anew", inbox + 1, self.sighting(self.path(path), content), self.now)
        self.keep(how, [job])

    def do_settle(self, which: int, content: int, options: int, priority: int, media: int) -> None:
        rest = {"priority": priority, "media": MEDIA[media]}
        self.both("settle", self.job(which), self.sighting(b"any", content), OPTIONS[options], self.now, **rest)

    def do_settle_all(self, inbox: int, some: tuple[int, ...], content: int, which: int, *rest: int) -> None:
        """Some files, and one that is known by its number."""
        priority, media = rest
        settled = [Settling(self.sighting(self.path(path), content), OPTIONS[0], priority, MEDIA[media]) for path in some]
        if self.mine and which < 4:
            row = self.book.jobs[self.job(which)]
            settled.append(Settling(self.sighting(row["path"], content), OPTIONS[1], priority, MEDIA[media], row["id"]))
        before = set(self.book.jobs)
        how, _ = self.both("settle_all", inbox + 1, tuple(settled), self.now)
        self.keep(how, sorted(set(self.book.jobs) - before))

    def do_reject(self, which: int, failure: int, options: int) -> None:
        self.both("reject", self.job(which), FAILURES[failure], OPTIONS[options], self.now)

    def do_take(self, which: int, sha256: str, asked: str, spooled: bool) -> None:
        self.both("take", self.job(which), sha256, self.now, spooled=spooled, asked=asked)

    def do_postpone(self, which: int, failure: int, pause_s: float) -> None:
        self.both("postpone", self.job(which), FAILURES[failure], self.now, not_before=self.now + pause_s)

    def do_wake_waiting(self, _: int, codes: tuple[str, ...]) -> None:
        self.both("wake_waiting", codes, self.now)

    def do_rename(self, which: int, path: int, content: int) -> None:
        """The file of a job (or of nobody) has another name of this sequence now."""
        row = self.book.jobs.get(self.job(which), {"inbox_id": 1, "path": b"nobody's"})
        self.both("rename", row["inbox_id"], row["path"], self.sighting(self.path(path), content), self.now)

    def do_recognise(self, which: int, content: int) -> None:
        self.both("recognise", self.job(which), self.sighting(b"any", content), self.now)

    def do_reuse(self, which: int, sha256: str, asked: str) -> None:
        nobodys = {"sha256": sha256, "asked": asked, "job_id": 1}
        result = self.ledger.result(sha256, asked)
        assert result == self.book.results.get((sha256, asked))
        self.both("reuse", self.job(which), self.now, transcript=f"{self.job(which)}.json", result=result or nobodys)

    def do_drop_results(self, max_bytes: int, age_s: float) -> None:
        self.both("drop_results", max_bytes, self.now - age_s)

    def do_disposed(self, which: int, how: str) -> None:
        self.both("disposed", self.job(which), how, self.now)

    def notice(self, which: int) -> int:
        return max(self.book.notices, default=0) - which

    def do_notice_sent(self, which: int) -> None:
        self.both("notice_sent", self.notice(which), self.now)

    def do_notice_postponed(self, which: int, pause_s: float) -> None:
        self.both("notice_postponed", self.notice(which), "no answer", self.now + pause_s, self.now)

    def do_notice_given_up(self, which: int) -> None:
        self.both("notice_given_up", self.notice(which), "too often", self.now)

    def do_vanish(self, which: int) -> None:
        self.both("vanish", self.job(which), self.now)

    def do_claim(self, which: int, child: str, lease_s: float) -> None:
        self.both("claim", self.job(which), self.child(child, self.job(which)), self.now, lease_s=lease_s)

    def do_checkpoint(self, which: int, child: str, index: int, take: int, made_by: str, *until: float | None) -> None:
        lease_s, duration_s = until
        said = Segment(start_s=0.0, end_s=1.5, text=f"žluťoučký\n\x00 {take}")
        window = Window(index=index, start_s=0.0, end_s=1.5 + index, language="cs", language_probability=0.9, segments=(said,))
        job = self.job(which)
        kept = {"made_by": made_by, "front_end": b"\xff\x00%d" % index if take else b""}
        self.both("checkpoint", job, self.child(child, job), window, self.now, lease_s=lease_s, duration_s=duration_s, **kept)

    def do_drop_foreign_checkpoints(self, which: int, child: str, made_by: str) -> None:
        job = self.job(which)
        self.both("drop_foreign_checkpoints", job, self.child(child, job), made_by, self.now)

    def do_renew(self, child: str, lease_s: float) -> None:
        self.both("renew", "anna" if child == "holder" else child, self.now, lease_s=lease_s)

    def do_progress(self, which: int, child: str, position_s: float, duration_s: float | None, lease_s: float) -> None:
        job = self.job(which)
        self.both("progress", job, self.child(child, job), position_s, duration_s, self.now, lease_s=lease_s)

    def do_release(self, which: int, child: str, failure: int, pause_s: float, needs_mib: int | None) -> None:
        job = self.job(which)
        rest = {"not_before": self.now + pause_s, "tail": "last\nwords", "needs_mib": needs_mib}
        self.both("release", job, self.child(child, job), FAILURES[failure], self.now, **rest)

    def do_interrupt(self, which: int, child: str) -> None:
        self.both("interrupt", self.job(which), self.child(child, self.job(which)), "a power cut", self.now)

    def do_wait(self, which: int, child: str, failure: int, pause_s: float) -> None:
        job = self.job(which)
        self.both("wait", job, self.child(child, job), FAILURES[failure], self.now, not_before=self.now + pause_s)

    def do_finish(self, which: int, child: str, duration_s: float, quality: str, *kept: Any) -> None:
        job, (sha256, asked, size) = self.job(which), kept
        result = {"transcript": f"{job}.json", "sha256": sha256, "language": "cs", "process_s": 1.5, "quality": quality}
        result |= {"asked": asked, "revision": "main", "size": size}
        self.both("finish", job, self.child(child, job), self.now, duration_s=duration_s, **result)

    def do_fail(self, which: int, child: str, failure: int) -> None:
        job = self.job(which)
        self.both("fail", job, self.child(child, job), FAILURES[failure], self.now, tail="last\nwords")

    def do_reserve_name(self, which: int, outbox: int, candidates: tuple[int, ...], kind: str) -> None:
        bases = tuple(self.base(number) for number in candidates)
        self.both("reserve_name", self.job(which), b"/out/%d" % outbox, bases, kind)

    def do_avoid_name(self, which: int, outbox: int, base: int) -> None:
        self.both("avoid_name", self.job(which), b"/out/%d" % outbox, self.base(base))

    def notices(self, job: int, told: int) -> list[tuple[str, str, str]]:
        """The second of two has the delivery of the first."""
        delivery = f"{job} {self.now} {len(self.book.notices)}"
        return [("https://example.org", delivery, '{"text": "žluťoučký"}')] * told

    def do_publish(self, which: int, outbox: int, files: tuple[int, ...], disposal: str, told: int) -> None:
        job = self.job(which)
        owed = {"disposal": disposal, "notices": self.notices(job, told)}
        self.both("publish", job, b"/out/%d" % outbox, self.files(files), self.now, **owed)

    def do_report(self, which: int, outbox: int, files: tuple[int, ...], told: int) -> None:
        job = self.job(which)
        self.both("report", job, b"/out/%d" % outbox, self.files(files), self.now, notices=self.notices(job, told))

    def do_retry(self, which: int) -> None:
        self.both("retry", self.job(which), self.now)

    def do_cancel(self, which: int, options: int) -> None:
        self.both("cancel", self.job(which), self.now, options=OPTIONS[options])

    def do_hold(self, which: int) -> None:
        self.both("hold", self.job(which), self.now)

    def do_unhold(self, which: int) -> None:
        self.both("unhold", self.job(which), self.now)

    def do_prioritise(self, which: int, priority: int) -> None:
        self.both("prioritise", self.job(which), priority, self.now)

    def do_interrupt_other_epochs(self) -> None:
        self.both("interrupt_other_epochs", self.now)

    def do_truncate_wal(self) -> None:
        self.both("truncate_wal")

    def do_reopen(self, reborn: bool) -> None:
        """The daemon ends and begins again, as itself or as its next life."""
        self.ledger.close()
        self.life += reborn
        self.ledger = Ledger(self.state_dir, epoch=f"life {self.life}")
        self.book.epoch = f"life {self.life}"

    def do_together(self, steps: tuple[Step, ...], undo: bool) -> None:
        """Several verbs as one. What is refused within is caught and the rest goes on; at the end all stays or nothing."""
        before, mine = self.book.snapshot(), list(self.mine)
        try:
            with self.ledger.transaction():
                for step in steps:
                    getattr(self, "do_" + step[0])(*step[1:])
                if undo:
                    raise Undone
        except Undone:
            self.book.restore(before)
            self.mine = mine

    # --- looking ---

    def look_at_mine(self) -> None:
        """The jobs of this sequence are as the model says, field by field, and keep the laws; their history is one path."""
        self._compare(self.mine)

    def look_at_all(self) -> None:
        """The whole store is as the model says; no row that the model does not know."""
        self._compare(sorted(self.book.jobs))
        assert [row[0] for row in self.sql("SELECT id FROM job ORDER BY id")] == sorted(self.book.jobs)
        assert {row[0]: row[1:] for row in self.sql("SELECT id, path, outbox FROM inbox")} == self.book.inboxes
        names = {(row[0], row[1]): row[2:] for row in self.sql("SELECT outbox, base, inbox_id, path, kind FROM name")}
        assert names == self.book.names
        publications = self.sql("SELECT outbox, path, job_id, format, sha256, published_at FROM publication")
        assert {(row[0], row[1]): row[2:] for row in publications} == self.book.publications
        once = self.sql("SELECT count(*) FROM job WHERE state IN ('seen', 'ready', 'running') GROUP BY inbox_id, path")
        assert all(row == (1,) for row in once), "two live jobs of one path"
        assert self.ledger.counts() == {state: sum(row["state"] == state for row in self.book.jobs.values()) for state in STATES}
        assert {(row["sha256"], row["asked"]): row for row in self.ledger.db.query("SELECT * FROM result")} == self.book.results
        assert {row[0]: row[1:] for row in self.sql("SELECT * FROM notice")} == self.book.notices
        self._look_at_paths()
        owners = {publication[0] for publication in self.book.publications.values()}
        for job, row in self.book.jobs.items():
            if row["state"] == "done" and job not in owners:
                taken = [self.book.publications[name][0] for name in self.book.published[job] if name in self.book.publications]
                assert taken and job not in taken, f"job {job} is done without a published name, and nobody has replaced it"
        assert self.ledger.integrity() == "ok"

    def _look_at_paths(self) -> None:
        """What the watcher is told: of every path that a job stood at or left, the newest job; nothing where there is none."""
        for inbox in self.book.inboxes:
            newest: dict[bytes, tuple[Any, ...]] = {}
            left: set[bytes] = set()
            for job, row in sorted(self.book.jobs.items()):
                if row["inbox_id"] == inbox:
                    newest[row["path"]] = tuple(row[name] for name in ("dev", "inode", "size", "mtime_ns", "ctime_ns", "state"))
                    left |= {event[6] for event in self.book.events[job] if event[6] is not None}
            assert {row[0]: row[1:] for row in self.ledger.identities(inbox)} == newest
            told = {row[0]: row[1:] for row in self.ledger.moved_since(0, inbox)}
            assert told == newest | dict.fromkeys(left - newest.keys(), (0, 0, 0, 0, 0, "gone"))
            assert not list(self.ledger.moved_since(self.ledger.newest_event(), inbox))

    def _compare(self, jobs: list[int]) -> None:
        among = ",".join(map(str, jobs))
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.sql(f"SELECT * FROM job WHERE id IN ({among}) ORDER BY id")]
        expected = [self.book.jobs[job] for job in sorted(jobs)]
        assert rows == expected, (differences(rows, expected), self.log)
        history: dict[int, list[tuple[Any, ...]]] = {job: [] for job in jobs}
        chosen = "job_id, at, verb, from_state, to_state, attempt, note, path"
        for job, *event in self.sql(f"SELECT {chosen} FROM event WHERE job_id IN ({among}) ORDER BY job_id, id"):
            history[job].append(tuple(event))
        assert history == {job: list(self.book.events[job]) for job in jobs}, self.log
        windows = self.sql(f"SELECT job_id, window_index, end_s, body, made_by, front_end FROM checkpoint WHERE job_id IN ({among})")
        kept = {key: window for key, window in self.book.windows.items() if key[0] in history}
        assert {row[:2]: row[2:] for row in windows} == kept, self.log
        for row in rows:
            assert not (broken := broken_laws(row) + broken_history(row, history[row["id"]])), (broken, row, self.log)


def differences(rows: list[Row], expected: list[Row]) -> list[tuple[Any, ...]]:
    """(job, column, stored, expected), for a reader."""
    pairs = zip(rows, expected, strict=False)
    return [(row["id"], name, row[name], told[name]) for row, told in pairs for name in row if row[name] != told[name]]


@pytest.fixture(scope="module")
def template() -> Iterator[str]:
    """An empty ledger, to be copied: making one costs more than playing a sequence."""
    with tempfile.TemporaryDirectory(prefix="whisperd-ledger-", dir=memory_dir()) as home:
        os.mkdir(os.path.join(home, "template"))
        Ledger(os.path.join(home, "template"), epoch="none").close()
        yield home


def new_world(home: str) -> World:
    state_dir = tempfile.mkdtemp(dir=home)
    shutil.copy(os.path.join(home, "template", LEDGER_NAME), state_dir)
    return World(state_dir)


def end_world(world: World) -> None:
    world.ledger.close()
    shutil.rmtree(world.state_dir)


# --- claims ----------------------------------------------------------------------------------------------------------------------


def test_ten_thousand_random_sequences_of_verbs(template: str) -> None:
    """No sequence of verbs, of 10,000 random ones, leaves the store in a state that the model does not know or that breaks a law."""
    played = steps = 0
    tried: set[tuple[str, str, str]] = set()

    @settings(
        max_examples=SEQUENCES // SEQUENCES_A_FILE,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**64 - 1))
    def play_a_file(seed: int) -> None:
        nonlocal played, steps
        rng = random.Random(seed)
        world = new_world(template)
        for _ in range(SEQUENCES_A_FILE):
            world.begin_sequence()
            for _ in range(rng.randint(*STEPS)):
                world.step(draw_step(rng))
            played += 1
            steps += len(world.log)
        world.look_at_all()
        tried.update(world.tried)
        end_world(world)

    world = new_world(template)
    for state in STATES:  # every verb meets every state at least once, whatever chance does
        for verb in (verb for verb, shape in SHAPES.items() if shape[:1] == ("job",)):
            world.begin_sequence()
            for step in WAY_TO[state]:
                world.step(step)
            assert world.book.jobs[world.mine[0]]["state"] == state
            world.step((verb, 0, *(DOMAINS[domain][0] for domain in SHAPES[verb][1:])))
    tried.update(world.tried)
    end_world(world)
    while played < SEQUENCES:  # hypothesis may try a seed or two less than it was asked for
        play_a_file()
    assert played >= SEQUENCES
    assert steps >= played * STEPS[0]
    came_to_pass = {(verb, begin) for verb, begin, came in tried if came == "done"}
    assert came_to_pass >= {arrow for arrow in ARROWS if arrow[0] != "see"}, "an arrow that no sequence took"
    wanted = {(verb, state) for verb in VERBS if verb not in ("see", "rename", "wake") for state in (*STATES, "")}
    assert {(verb, begin) for verb, begin, _ in tried} >= wanted, "a verb that never met some state"
    assert {came for _, _, came in tried} == {"done", "no_such_job", "illegal_move", "lease_lost"}


class LedgerMachine(RuleBasedStateMachine):
    """The same steps, chosen by hypothesis one by one: slower, but a failure shrinks to the shortest sequence that shows it."""

    home = ""

    def __init__(self) -> None:
        super().__init__()
        self.world = new_world(self.home)
        self.world.begin_sequence()

    @staticmethod
    def steps(verbs: tuple[str, ...]) -> st.SearchStrategy[Step]:
        return st.sampled_from(verbs).flatmap(
            lambda verb: st.tuples(st.just(verb), *(st.sampled_from(DOMAINS[domain]) for domain in SHAPES[verb]))
        )

    @rule(path=st.sampled_from((0, 1)), content=st.sampled_from((0, 1)))
    def see(self, path: int, content: int) -> None:
        self.world.step(("see", 0, path, content))

    @precondition(lambda self: self.world.mine)
    @rule(job=st.integers(0, 3), choice=st.integers(0, 59))
    def forward(self, job: int, choice: int) -> None:
        self.world.step(("forward", job, choice))

    @precondition(lambda self: self.world.mine)
    @rule(job=st.integers(0, 3), choice=st.integers(0, 59), again=st.integers(0, 59))
    def forward_twice(self, job: int, choice: int, again: int) -> None:
        self.world.step(("forward", job, choice))
        self.world.step(("forward", job, again))

    @rule(data=st.data())
    def anything(self, data: st.DataObject) -> None:
        self.world.step(data.draw(self.steps(tuple(SHAPES))))

    @rule(data=st.data(), undo=st.booleans())
    def together(self, data: st.DataObject, undo: bool) -> None:
        inside = tuple(verb for verb in SHAPES if verb not in OUTSIDE)
        self.world.step(("together", tuple(data.draw(st.lists(self.steps(inside), min_size=1, max_size=4))), undo))

    @invariant()
    def everything_is_as_the_model_says(self) -> None:
        self.world.look_at_all()

    def teardown(self) -> None:
        end_world(self.world)


@pytest.mark.timeout(900)  # three seconds when all is well; shrinking a failure takes minutes
def test_ledger_machine(template: str) -> None:
    """The same claim with hypothesis choosing (and, on failure, shrinking) every step; the whole store is compared after each."""
    from hypothesis.stateful import run_state_machine_as_test

    LedgerMachine.home = template
    run_state_machine_as_test(
        LedgerMachine,
        settings=settings(max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)),
    )


def test_the_stores_arrows_are_the_designs(template: str) -> None:
    """The table `transition` holds the arrows of DESIGN §4, no more and no fewer, and only repeated looks leave no event."""
    with closing(sqlite3.connect(os.path.join(template, "template", LEDGER_NAME))) as connection:
        rows = list(connection.execute("SELECT verb, from_state, to_state, logged FROM transition"))
    assert {(verb, begin): end for verb, begin, end, _ in rows} == ARROWS
    assert {(verb, begin) for verb, begin, _, logged in rows if not logged} == SILENT


# --- SQL that goes around the verbs ----------------------------------------------------------------------------------------------

FAILURE = FAILURES[0]


def bring_to(ledger: Ledger, state: str, path: bytes) -> int:
    """A job in that state, by legal verbs."""
    sighting = Sighting(path=path, dev=1, inode=1, size=1, mtime_ns=1, ctime_ns=1)
    job = ledger.see(ledger.register_inbox(b"/in", b"/out", 1.0), sighting, 1.0)
    if state == "seen":
        return job
    if state == "gone":
        ledger.vanish(job, 2.0)
        return job
    ledger.settle(job, sighting, JobOptions(), 2.0)
    if state == "ready":
        return job
    if state == "cancelled":
        ledger.cancel(job, 3.0)
        return job
    ledger.claim(job, "anna", 3.0, lease_s=60)
    if state == "failed":
        ledger.fail(job, "anna", FAILURE, 4.0)
    if state in ("transcribed", "done"):
        ledger.finish(job, "anna", 4.0, transcript="t.json", sha256="ab", duration_s=1.0, language="en", process_s=1.0, quality="good")
    if state == "done":
        ledger.publish(job, b"/out", [(path + b".txt", "txt", "ab")], 5.0)
    return job


@pytest.fixture(scope="module")
def attacked(template: str) -> Iterator[tuple[Ledger, dict[str, int]]]:
    """A ledger with one job in every state."""
    state_dir = os.path.join(template, "attacked")
    os.mkdir(state_dir)
    ledger = Ledger(state_dir, epoch="e")
    yield ledger, {state: bring_to(ledger, state, state.encode()) for state in STATES}
    ledger.close()


def try_it(ledger: Ledger, statement: str, values: Row | None = None) -> str:
    """Run a statement and take it back; returns why the store refused it, "" when it did not."""
    connection = ledger.db.conn
    connection.execute("BEGIN IMMEDIATE")
    try:
        connection.execute(statement, values or {})
    except sqlite3.IntegrityError as error:
        return str(error)
    finally:
        connection.execute("ROLLBACK")
    return ""


def fitting(state: str, verb: str) -> str:
    """SET clauses that satisfy every CHECK of a state, so that nothing but the arrow can be wrong."""
    lease = "'anna', lease_epoch = 'e', lease_until = 9.0" if state == "running" else "NULL, lease_epoch = NULL, lease_until = NULL"
    ended = "9.0" if state in ENDED else "NULL"
    return (
        f"state = '{state}', verb = '{verb}', lease_child = {lease}, ended_at = {ended}, reported_at = NULL, options = '{{}}',"
        f" transcript = 't.json', failure_kind = 'permanent', failure_code = 'c', failure_what = 'w',"
        f" attempts = attempts + {verb == 'claim'}, held = {int(verb == 'hold')}"
    )


@pytest.mark.parametrize("to", STATES)
@pytest.mark.parametrize("begin", STATES)
def test_raw_updates_follow_the_arrows_or_are_refused(attacked: tuple[Ledger, dict[str, int]], begin: str, to: str) -> None:
    """An UPDATE that names any verb goes through exactly when there is such an arrow, whatever conflict clause it carries."""
    ledger, jobs = attacked
    published = to != "done" or bool(ledger.publications(jobs[begin]))
    for verb in VERBS:
        for conflict in ("", "OR IGNORE", "OR REPLACE", "OR FAIL"):
            why = try_it(ledger, f"UPDATE {conflict} job SET {fitting(to, verb)} WHERE id = {jobs[begin]}")
            legal = ARROWS.get((verb, begin)) == to and published
            assert ("" if legal else "illegal move") in why and bool(why) != legal, (verb, conflict, why)
    why = try_it(ledger, f"UPDATE job SET state = '{to}' WHERE id = {jobs[begin]}")
    assert why or begin == to, "a state changed without a verb"


@pytest.mark.parametrize("state", STATES)
def test_raw_inserts_begin_as_seen_or_are_refused(attacked: tuple[Ledger, dict[str, int]], state: str) -> None:
    """A row can only be born as `seen` by `see`."""
    ledger, _ = attacked
    ended = 9.0 if state in ENDED else None
    lease = ("anna", "e", 9.0) if state == "running" else (None, None, None)
    columns = "inbox_id, path, dev, inode, size, mtime_ns, ctime_ns, state, verb, updated_at, seen_at, options, transcript, ended_at"
    columns += ", failure_kind, failure_code, failure_what, lease_child, lease_epoch, lease_until"
    for verb in VERBS:
        for conflict in ("", "OR IGNORE", "OR REPLACE"):
            values = [1, b"new", 1, 1, 1, 1, 1, state, verb, 1.0, 1.0, "{}", "t", ended, "permanent", "c", "w", *lease]
            named = {f"v{number}": value for number, value in enumerate(values)}
            why = try_it(ledger, f"INSERT {conflict} INTO job ({columns}) VALUES ({', '.join(':' + name for name in named)})", named)
            legal = (verb, state) == ("see", "seen")
            assert ("" if legal else "illegal move") in why and bool(why) != legal, (verb, conflict, why)


@pytest.mark.parametrize(
    ("state", "change"),
    [
        ("running", "verb = 'progress', lease_child = NULL, lease_epoch = NULL, lease_until = NULL"),
        ("running", "verb = 'progress', lease_until = NULL"),
        ("running", "verb = 'release', state = 'ready'"),
        ("running", "verb = 'finish', state = 'transcribed', lease_child = NULL, lease_epoch = NULL, lease_until = NULL"),
        (
            "running",
            "verb = 'fail', state = 'failed', failure_kind = 'permanent', ended_at = 1.0,"
            " lease_child = NULL, lease_epoch = NULL, lease_until = NULL",
        ),
        ("ready", "verb = 'claim', state = 'running', attempts = attempts + 1"),
        ("ready", "verb = 'claim', state = 'running', lease_child = 'a', lease_epoch = 'e', lease_until = 1.0"),
        ("ready", "verb = 'claim', state = 'running', lease_child = 'a', lease_epoch = 'e', lease_until = 1.0, attempts = attempts + 2"),
        ("ready", "verb = 'cancel', state = 'cancelled'"),
        ("ready", "verb = 'reuse', state = 'done', ended_at = 1.0, transcript = 't'"),
        ("ready", "verb = 'reuse', state = 'transcribed'"),
        ("ready", "verb = 'take', path = X'41'"),
        ("ready", "verb = 'take', spooled = 2"),
        ("ready", "verb = 'take', media = 'no json'"),
        ("ready", "verb = 'take', disposal = 'archive'"),
        ("ready", "verb = 'take', origin = 4711"),
        ("done", "verb = 'dispose', disposal = 'archived'"),
        ("done", "verb = 'recognise', disposal = 'archive'"),
        ("done", "verb = 'dispose', disposal = 'burnt'"),
        ("ready", "lease_child = 'a', lease_epoch = 'e', lease_until = 1.0"),
        ("ready", "options = NULL"),
        ("ready", "verb = 'prioritise', held = 1"),
        ("ready", "verb = 'hold', held = 2"),
        ("ready", "verb = 'unhold', held = 1"),
        ("ready", "verb = 'prioritise', priority = 3"),
        ("ready", "verb = 'prioritise', needs_mib = -1"),
        ("running", "verb = 'hold', held = 1"),
        ("running", "verb = 'prioritise', held = 1"),
        ("seen", "verb = 'settle', state = 'ready'"),
        ("seen", "verb = 'see', ended_at = 1.0"),
        ("seen", "verb = 'see', path = X'41'"),
        ("seen", "verb = 'see', seen_at = 99.0"),
        ("seen", "verb = 'see', id = 4711"),
        ("seen", "verb = 'see', size = -1"),
        ("transcribed", "verb = 'publish', state = 'done', ended_at = 1.0"),
        ("transcribed", "transcript = NULL"),
        ("done", "transcript = NULL"),
        ("transcribed", "quality = 'excellent'"),
        ("failed", "failure_kind = NULL"),
        ("failed", "verb = 'report', failure_kind = 'bad luck'"),
        ("failed", "verb = 'retry', state = 'ready'"),
        ("done", "verb = 'report', reported_at = 1.0"),
    ],
)
def test_a_state_carries_its_own_fields(attacked: tuple[Ledger, dict[str, int]], state: str, change: str) -> None:
    """An UPDATE along a legal arrow, or along none, that leaves a field where it cannot be is refused by the schema itself."""
    ledger, jobs = attacked
    assert try_it(ledger, f"UPDATE job SET {change} WHERE id = {jobs[state]}")


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE event SET note = 'it never happened'",
        "UPDATE event SET to_state = 'done' WHERE id = 1",
        "UPDATE OR IGNORE event SET at = 0",
        "UPDATE OR REPLACE event SET id = id + 1000",
        "INSERT INTO event (job_id, at, verb, from_state, to_state, attempt, note) VALUES (4711, 1.0, 'see', '', 'seen', 0, '')",
        "UPDATE name SET kind = 'other'",
        "INSERT INTO checkpoint SELECT id, 0, 1.0, '{}', '', NULL FROM job WHERE state = 'ready'",
        "INSERT OR IGNORE INTO checkpoint SELECT id, 0, 1.0, '{}', '', NULL FROM job WHERE state = 'done'",
        "INSERT INTO checkpoint SELECT id, 0, 1.0, 'no json', '', NULL FROM job WHERE state = 'running'",
        "INSERT INTO vram_peak VALUES ('GPU-1', '570', 'small', 'float16', 8, 5, 3000, -1, 1.0)",
        "INSERT INTO publication VALUES (X'2F', X'41', 4711, 'txt', 'ab', 1.0)",
        "INSERT INTO plan (at, workers, reason) VALUES (1.0, 1, '')",
        "INSERT INTO plan (at, workers, reason, body) VALUES (1.0, 1, 'why not', 'no json')",
        "INSERT INTO learned VALUES ('GPU-1', '570', 'small', 'float16', 8, 'no json', 1.0)",
        "DELETE FROM inbox",
        "INSERT INTO result VALUES ('ab', 'q', 't.json', 'main', -1, 1.0, 1)",
        "INSERT INTO result VALUES ('ab', 'q', 't.json', 'main', 1, 1.0, 4711)",
        "INSERT INTO notice VALUES (1, 1, 'done', 't', 'd', 'no json', 0, 1.0, 'due', '', 1.0)",
        "INSERT INTO notice VALUES (1, 1, 'begun', 't', 'd', '{}', 0, 1.0, 'due', '', 1.0)",
        "INSERT INTO notice VALUES (1, 1, 'done', 't', 'd', '{}', 0, 1.0, 'forgotten', '', 1.0)",
        "INSERT INTO notice VALUES (1, 4711, 'done', 't', 'd', '{}', 0, 1.0, 'due', '', 1.0)",
        "UPDATE tally SET jobs = -1",
    ],
)
def test_history_and_the_rest_cannot_be_bent(attacked: tuple[Ledger, dict[str, int]], statement: str) -> None:
    """Events are never rewritten; windows belong to running jobs; publications and events to jobs that exist; a plan has a reason."""
    ledger, _ = attacked
    ledger.reserve_name(1, b"/out", [b"held"], "transcript")
    assert try_it(ledger, statement)


def test_one_live_job_for_a_path(attacked: tuple[Ledger, dict[str, int]]) -> None:
    """A second live job of a path is refused by an index, also when somebody goes around `see`."""
    ledger, jobs = attacked
    born = "'seen', 'see', 1.0, 1.0 FROM job WHERE id ="
    columns = "inbox_id, path, dev, inode, size, mtime_ns, ctime_ns"
    for state in LIVE:
        why = try_it(ledger, f"INSERT INTO job ({columns}, state, verb, updated_at, seen_at) SELECT {columns}, {born} {jobs[state]}")
        assert "UNIQUE" in why
    assert not try_it(ledger, f"INSERT INTO job ({columns}, state, verb, updated_at, seen_at) SELECT {columns}, {born} {jobs['done']}")
