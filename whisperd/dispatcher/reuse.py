"""reuse: one content, one transcript.

Owns: what makes two questions the same (`question`, pure), and the making of a second recording's transcript out of the first one's
(FEATURES F13, F14, F42). Fails with what `staging` and the ledger raise.
"""

from __future__ import annotations

import hashlib
import os
import time

import msgspec

from whisperd.dispatcher.staging import StagingFailed, open_staged, stage
from whisperd.errors import printable
from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Row
from whisperd.vocabulary import JobOptions, Transcript

_decoder = msgspec.json.Decoder(Transcript)


def question(options: JobOptions, model: str) -> str:
    """What was asked of a recording, but for its content: same options and same model, same text. Formats make no other text."""
    asked = msgspec.structs.replace(options, model=model, formats=())
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()[:32]


def read(state_dir: str, name: str) -> Transcript | None:
    """A staged transcript; None when it is not there any more, or not whole."""
    try:
        with os.fdopen(open_staged(state_dir, name), "rb") as file:
            return _decoder.decode(file.read())
    except (StagingFailed, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def of_another(transcript: Transcript, row: Row, options: JobOptions, *, source: str) -> Transcript:
    """The same text as the transcript of another file of the same content: its own name, time and formats."""
    return msgspec.structs.replace(transcript, source=source, size=row["size"], mtime_ns=row["mtime_ns"], options=options)


def publish_again(ledger: Ledger, row: Row, known: Row) -> bool:
    """Let a ready job have the stored result `known` of the same content; False when that is not there any more, or not whole.

    Raises StagingFailed, IllegalMove.
    """
    transcript = read(ledger.state_dir, known["transcript"])
    if transcript is None:
        return False
    name, source = f"{row['id']}.json", printable(os.path.basename(row["path"]))
    stage(ledger.state_dir, name, of_another(transcript, row, ledger.options(row), source=source))
    ledger.reuse(row["id"], time.time(), transcript=name, result=known)
    return True
