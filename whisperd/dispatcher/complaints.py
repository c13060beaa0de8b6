"""complaints: error files of profiles, beside the transcripts (DESIGN §5.8).

Owns: which of them should stand in each outbox and which do, kept in the ledger as what the daemon says of itself: they belong to no job.
One of an outbox is on its way at a time; whatever is refused (its name is somebody's, the share is away) is tried again later.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from whisperd.ledger.ledger import Ledger
from whisperd.wire import OwnFile, PublishedFile, PublishError, Withdraw

TOPIC = "complaints"
SUFFIX = b".error.txt"
JOB = 0
"""Complaints are published under this number; jobs begin with 1."""
AGAIN_S = 300.0


@dataclass
class Wanted:
    """One outbox: what should stand there (by name without suffix), what does (by path, with its sha256), and what is on its way."""

    texts: dict[bytes, str] = field(default_factory=dict)
    standing: dict[bytes, str] = field(default_factory=dict)
    heard: bool = False  # what should stand there is known in this life
    under_way: bytes | None = None
    not_before: dict[bytes, float] = field(default_factory=dict)  # monotonic


class Complaints:
    """All of them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._outboxes: dict[bytes, Wanted] = {}
        told = ledger.heard(TOPIC)
        for outbox, standing in (told[1] if told else {}).items():
            self._outboxes[bytes.fromhex(outbox)] = Wanted(standing={bytes.fromhex(path): sha256 for path, sha256 in standing.items()})

    def want(self, outbox: bytes, texts: dict[bytes, str]) -> None:
        """From now on exactly these should stand there."""
        known = self._outboxes.setdefault(outbox, Wanted())
        known.texts, known.heard = texts, True

    def next(self, outbox: bytes, now: float) -> PublishError | Withdraw | None:
        """What to do next in an outbox, if nothing is on its way there."""
        known = self._outboxes.get(outbox)
        if known is None or not known.heard or known.under_way is not None:
            return None
        for base, text in known.texts.items():
            path = base + SUFFIX
            if known.standing.get(path) != _sha256(text) and now >= known.not_before.get(path, 0.0):
                known.under_way = path
                own = (OwnFile(path=path, sha256=known.standing[path]),) if path in known.standing else ()
                return PublishError(job=JOB, base=base, text=text, own=own)
        for path, sha256 in known.standing.items():
            if path.removesuffix(SUFFIX) not in known.texts and now >= known.not_before.get(path, 0.0):
                known.under_way = path
                return Withdraw(job=JOB, file=OwnFile(path=path, sha256=sha256))
        return None

    def done(self, outbox: bytes, files: Sequence[PublishedFile]) -> None:
        """What was on its way stands there now, or does not any more."""
        known = self._outboxes[outbox]
        if known.under_way is not None:
            known.standing.pop(known.under_way, None)
        known.standing |= {file.path: file.sha256 for file in files}
        known.under_way = None
        body = {path.hex(): {name.hex(): sha256 for name, sha256 in own.standing.items()} for path, own in self._outboxes.items()}
        self._ledger.say(TOPIC, body, time.time())

    def failed(self, outbox: bytes, now: float) -> None:
        """It could not be done now (`now` is monotonic); or whoever had it in hand is gone."""
        known = self._outboxes.get(outbox)
        if known is not None and known.under_way is not None:
            known.not_before[known.under_way] = now + AGAIN_S
            known.under_way = None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
