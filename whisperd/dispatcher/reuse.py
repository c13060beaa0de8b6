"""reuse: one content, one transcript. Pure, but for reading what is staged.

Owns: what makes two questions the same (`question`), and the making of a second recording's transcript out of the first one's
(FEATURES F13, F14, F42). Fails with what `staging` raises.
"""

from __future__ import annotations

import hashlib
import os

import msgspec

from whisperd.dispatcher.staging import StagingFailed, open_staged
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
