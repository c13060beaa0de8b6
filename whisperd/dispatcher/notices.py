"""notices: what is owed to webhooks and hooks → notifier. One child for all of them, started only where some are configured.

Owns: the words of a notice (schema whisperd.notice/1), which targets are told of what, and when a notice is told again or given up.
The ledger holds what is owed, from the same transaction as the publication; it is struck off once the receiver took it, so each is told
at least once, with a delivery id that stays. No secret gets into the ledger: a target is kept by a name that tells nothing.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from loguru import logger

from whisperd.child import Child
from whisperd.config import HookSettings, Settings, WebhookSettings
from whisperd.dispatcher.nursery import Keeper, Nursery
from whisperd.dispatcher.retry import Backoff
from whisperd.errors import printable
from whisperd.ledger.ledger import IllegalMove, Ledger
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import (
    CallWebhook,
    Frame,
    Notified,
    NotifierOut,
    NotifierReady,
    NotifyFailed,
    RunHook,
    ServeNotifier,
)

if TYPE_CHECKING:
    from loguru import Logger

SCHEMA = "whisperd.notice/1"
IN_FLIGHT_MAX = 4  # as many as the notifier does at once
IN_FLIGHT_OF_ONE_MAX = 2  # a receiver that answers slowly, or not at all, keeps the others waiting no longer
LOOK_S = 0.5  # while nothing came to an end
LOOK_AT_MAX = 200
LOOK_DEEP_S = 10.0  # when all of these are of targets that rest, to find those of others behind them
LOOK_DEEP_AT_MAX = 20_000
ANSWER_MARGIN_S = 90.0
"""Beyond a notice's own time limit: resolving a name and ending a hook take their time."""
PAUSE = Backoff(base_s=10.0, max_s=3600.0)
"""Of one notice. A receiver that asks for a longer pause gets it, up to the longest of these."""
REST = Backoff(base_s=1.0, max_s=60.0)
REST_AFTER = 3
"""So many failures in a row, whatever the notices, and a target rests as a whole: then one notice tries whether it is back."""
TEXT_CHARS_MAX = 2000

Row = dict[str, Any]
PublishedRow = tuple[bytes, str, str]
"""Path below the outbox, format, sha256."""


# --- what is told (pure) ---


class Told(NamedTuple):
    """One notice as the ledger keeps it."""

    target: str
    delivery: str
    body: bytes


def bodies(row: Row, files: Sequence[PublishedRow], settings: Settings, event: str, now: float) -> list[Told]:
    """Who is told what of a job that ended. `row` has the paths of its inbox, `event` is "done" or "failed", `files` are in the outbox."""
    body = json.dumps(_notice(row, files, event, now), ensure_ascii=False, separators=(",", ":")).encode()
    return [Told(target, _delivery(target, body), body) for target in targets(settings, event)]


def targets(settings: Settings, event: str) -> list[str]:
    """The names of those that want to hear of an event."""
    wanted = [webhook_target(webhook) for webhook in settings.webhook if event in webhook.events]
    wanted += [hook_target(hook) for hook in settings.hook if event in hook.events]
    return list(dict.fromkeys(wanted))


def webhook_target(webhook: WebhookSettings) -> str:
    """A name that stays across reloads and shows the host only: paths and queries of webhooks are often secrets."""
    parts = urlsplit(webhook.url)
    return f"webhook:{parts.scheme}://{parts.netloc.rpartition('@')[2]}#{_short(webhook.url.encode())}"


def hook_target(hook: HookSettings) -> str:
    return f"hook:{hook.command[0]}#{_short(chr(0).join(hook.command).encode('utf-8', 'surrogateescape'))}"


def _short(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]


def _delivery(target: str, body: bytes) -> str:
    """Made of what is told to whom: the body holds the moment, so no two deliveries share one."""
    return "msg_" + hashlib.sha256(target.encode("utf-8", "surrogateescape") + b"\0" + body).hexdigest()[:32]


def _notice(row: Row, files: Sequence[PublishedRow], event: str, now: float) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "event": event,
        "at": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "job": row["id"],
        **_named("inbox", row["inbox_path"]),
        **_named("path", row["path"]),
        **_named("outbox", row["outbox"]),
        "size": row["size"],
        "modified_at": datetime.fromtimestamp(row["mtime_ns"] / 1e9, UTC).isoformat(timespec="milliseconds"),
        "sha256": row["sha256"],
        "duration_s": row["duration_s"],
        "language": row["language"],
        "quality": row["quality"],
        "files": [_file(row["outbox"], *file) for file in files],
        "failure": _failure(row) if event == "failed" else None,
    }


def _file(outbox: bytes, path: bytes, form: str, sha256: str) -> dict[str, Any]:
    return {"format": form, **_named("path", path), **_named("absolute", os.path.join(outbox, path)), "sha256": sha256}


def _failure(row: Row) -> dict[str, Any]:
    return {
        "kind": row["failure_kind"],
        "code": row["failure_code"],
        "what": (row["failure_what"] or "")[:TEXT_CHARS_MAX],
        "hint": (row["failure_hint"] or "")[:TEXT_CHARS_MAX],
        "attempts": row["attempts"],
    }


def _named(key: str, name: bytes) -> dict[str, str]:
    """A file name for people, and its bytes as well where that is not the name as it is (escaped, not UTF-8)."""
    shown = printable(name)
    if shown.encode() == name:
        return {key: shown}
    return {key: shown, f"{key}_base64": base64.b64encode(name).decode()}


def facts(body: bytes) -> dict[str, str]:
    """The environment of a hook, from the body of its notice. Each character of a value stands for one byte (ISO 8859-1), so that every
    name arrives as it is. WHISPERD_FILES has a path a line, escaped (`printf %b` gives the name); WHISPERD_FILE_TXT … have each as it is.
    """
    notice = json.loads(body)
    inbox, outbox = _bytes_of(notice, "inbox"), _bytes_of(notice, "outbox")
    files = {file["format"]: _bytes_of(file, "absolute") for file in notice["files"]}
    failure = notice["failure"] or {}
    given = {
        "JOB": notice["job"],
        "EVENT": notice["event"],
        "PATH": os.path.join(inbox, _bytes_of(notice, "path")),
        "INBOX_PATH": inbox,  # WHISPERD_INBOX would be read as a setting by a whisperd that the hook runs
        "OUTBOX_PATH": outbox,
        "FILES": "\n".join(printable(path) for path in files.values()),
        **{f"FILE_{_variable(form)}": path for form, path in files.items()},
        "LANGUAGE": notice["language"],
        "DURATION_S": notice["duration_s"],
        "QUALITY": notice["quality"],
        "FAILURE": failure.get("code"),
        "FAILURE_WHAT": failure.get("what"),
        "NOTICE": body,
    }
    return {f"WHISPERD_{name}": _carried(value) for name, value in given.items()}


def _variable(form: str) -> str:
    return "".join(char if char.isascii() and char.isalnum() else "_" for char in form.upper())


def _bytes_of(entry: dict[str, Any], key: str) -> bytes:
    coded = entry.get(f"{key}_base64")
    return base64.b64decode(coded) if coded is not None else str(entry[key]).encode()


def _carried(value: object) -> str:
    content = value if isinstance(value, bytes) else b"" if value is None else str(value).encode()
    return content.replace(b"\0", b"").decode("latin-1")


# --- who tells it ---


@dataclass
class Trouble:
    """What a target did to the last notices."""

    failures: int = 0  # in a row
    resume_at: float = 0.0  # monotonic

    def failed(self, now: float, again_in_s: float) -> None:
        """`again_in_s`: it asked for that pause, whatever is to be told."""
        self.failures += 1
        rest_s = REST.pause_s(self.failures - REST_AFTER + 1) if self.failures >= REST_AFTER else 0.0
        self.resume_at = max(self.resume_at, now + max(rest_s, again_in_s))

    def room(self, now: float) -> int:
        """How many notices it may have in hand at once."""
        if now < self.resume_at:
            return 0
        return 1 if self.failures >= REST_AFTER else IN_FLIGHT_OF_ONE_MAX


@dataclass(frozen=True)
class Sent:
    """One notice in the notifier's hands."""

    row: Row
    attempts_max: int
    overdue_at: float  # monotonic


class Notices:
    """All notices that are owed, and the notifier."""

    def __init__(self, nursery: Nursery, ledger: Ledger, *, on_news: Callable[[], None]) -> None:
        self._nursery = nursery
        self._ledger = ledger
        self._on_news = on_news
        self._targets: dict[str, WebhookSettings | HookSettings] = {}
        self._keeper: Keeper | None = None
        self._in_flight: dict[int, Sent] = {}
        self._trouble: dict[str, Trouble] = {}
        self._look_at = self._look_deep_at = 0.0  # monotonic
        self._stopping = False

    def apply(self, settings: Settings) -> None:
        """Tell exactly the configured targets; without any there is no notifier."""
        self._targets = {webhook_target(webhook): webhook for webhook in reversed(settings.webhook)}
        self._targets |= {hook_target(hook): hook for hook in reversed(settings.hook)}
        self._trouble = {name: Trouble() for name in self._targets}  # who changed something wants to see what it did
        self._look_at = 0.0
        if self._targets and self._keeper is None:
            self._keeper = Keeper(
                self._nursery,
                name="notifier",
                module="whisperd.notifier",
                receives=NotifierOut,
                hello=ServeNotifier(),
                on_frame=self._frame,
            )
        elif not self._targets and self._keeper is not None:
            self._keeper.stop()
            self._keeper = None
            self._in_flight.clear()

    def tick(self, now: float) -> None:
        """Keep the notifier alive, and hand it what is due. `now` is monotonic."""
        if self._stopping:
            return
        if self._keeper is not None:
            if self._keeper.child is None:  # before another takes its place, which knows nothing of what this one had in hand
                self._in_flight.clear()
            self._keeper.tick(now)
            if any(now > sent.overdue_at for sent in self._in_flight.values()):
                self._keeper.kill("the notifier does not answer")
                self._in_flight.clear()
        self._send_out(now, time.time())

    def idle(self, wall: float) -> bool:
        """Whether nothing is on its way, and nothing due (what is told again later is not)."""
        return not self._in_flight and not self._ledger.due_notices(wall, 1)

    def stop(self) -> None:
        """What the notifier has in hand may end; what it does not get done is told by the next one."""
        self._stopping = True
        if self._keeper is not None:
            self._keeper.stop()

    # --- sending ---

    def _send_out(self, now: float, wall: float) -> None:
        if len(self._in_flight) >= IN_FLIGHT_MAX or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        for row in self._due(now, wall):
            target = self._targets.get(row["target"])
            if target is None:
                self._give_up(row, "it is not configured any more", wall)
            elif self._has_room(row["target"], now):
                self._send(row, target, now)

    def _due(self, now: float, wall: float) -> list[Row]:
        """What is due and not in hand, the oldest first."""
        rows = self._ledger.due_notices(wall, LOOK_AT_MAX)
        usable = self._keeper is not None and self._keeper.usable
        if usable and len(rows) == LOOK_AT_MAX and now >= self._look_deep_at and not any(self._is_for_now(row, now) for row in rows):
            self._look_deep_at = now + LOOK_DEEP_S
            rows = self._ledger.due_notices(wall, LOOK_DEEP_AT_MAX)
        return [row for row in rows if row["id"] not in self._in_flight]

    def _is_for_now(self, row: Row, now: float) -> bool:
        return row["target"] not in self._targets or self._has_room(row["target"], now)

    def _has_room(self, target: str, now: float) -> bool:
        if self._keeper is None or not self._keeper.usable or len(self._in_flight) >= IN_FLIGHT_MAX:
            return False
        in_hand = [sent for sent in self._in_flight.values() if sent.row["target"] == target]
        return len(in_hand) < self._trouble[target].room(now)

    def _send(self, row: Row, target: WebhookSettings | HookSettings, now: float) -> None:
        if self._keeper is None:
            return
        self._in_flight[row["id"]] = Sent(row, target.attempts_max, now + target.timeout_s + ANSWER_MARGIN_S)
        if isinstance(target, HookSettings):
            order = RunHook(notice=row["id"], command=target.command, environment=facts(row["body"]), timeout_s=target.timeout_s)
            self._keeper.send(order)
        else:
            self._keeper.send(_call(row, target))

    # --- what the notifier says ---

    def _frame(self, child: Child[Any], frame: Frame[Any]) -> None:
        for descriptor in frame.descriptors:  # it has none to send
            os.close(descriptor)
        if self._keeper is None or self._keeper.child is not child:
            return
        match frame.message:
            case NotifierReady():
                child.ready(time.monotonic())
            case Notified(notice=notice):
                self._told(notice, time.time())
            case NotifyFailed(notice=notice, failure=failure, again_in_s=again_in_s):
                self._failed(notice, failure, min(again_in_s, PAUSE.max_s), time.time())
        self._look_at = 0.0
        self._on_news()

    def _told(self, notice: int, wall: float) -> None:
        sent = self._in_flight.pop(notice, None)
        if sent is None:
            return
        self._trouble[sent.row["target"]] = Trouble()
        if self._struck(self._ledger.notice_sent, notice, wall):
            self._log(sent.row, "notified").info(f"{_about(sent.row)}: told {printable(sent.row['target'])}")

    def _failed(self, notice: int, failure: Failure, again_in_s: float, wall: float) -> None:
        sent = self._in_flight.pop(notice, None)
        if sent is None or failure.kind is FailureKind.WAITING:  # ended with us: it stays due, and no attempt is counted
            return
        self._trouble.setdefault(sent.row["target"], Trouble()).failed(time.monotonic(), again_in_s)
        attempt = sent.row["attempts"] + 1
        if failure.kind is FailureKind.PERMANENT or attempt >= sent.attempts_max:
            self._give_up(sent.row, f"{failure.what}; {failure.hint}", wall)
            return
        pause_s = max(PAUSE.pause_s(attempt, random.random()), again_in_s)
        if self._struck(self._ledger.notice_postponed, notice, failure.what, wall + pause_s, wall):
            again = f"told again in {pause_s:.0f} s (attempt {attempt} of {sent.attempts_max}); {failure.hint}"
            self._log(sent.row, "notice_postponed").info(f"{_about(sent.row)}: {failure.what}; {again}")

    def _give_up(self, row: Row, why: str, wall: float) -> None:
        if self._struck(self._ledger.notice_given_up, row["id"], why, wall):
            target = printable(row["target"])
            self._log(row, "notice_given_up").warning(f"{_about(row)}: {target} is not told, for good: {why}")

    def _struck(self, verb: Callable[..., None], *words: Any) -> bool:
        """Whether it was still owed: its job may have been forgotten meanwhile."""
        try:
            verb(*words)
        except IllegalMove:
            return False
        return True

    def _log(self, row: Row, event: str) -> Logger:
        return logger.bind(job=row["job_id"], event=event)


def _about(row: Row) -> str:
    return f"job {row['job_id']} {row['event']}"


def _call(row: Row, webhook: WebhookSettings) -> CallWebhook:
    return CallWebhook(
        notice=row["id"],
        url=webhook.url,
        secret=webhook.secret.get_secret_value(),
        delivery=row["delivery"],
        body=row["body"],
        allow=webhook.allow,
        timeout_s=webhook.timeout_s,
    )
