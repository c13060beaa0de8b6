"""resume: where a job goes on. Pure: what is kept of it in, the order to the engine out.

Windows are gone on from only where they would come out the same again: `fingerprint` names all that a window's text depends on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec

from whisperd import __version__
from whisperd.vocabulary import JobOptions, Window
from whisperd.wire import EngineReady, Transcribe


def fingerprint(engine: EngineReady, options: JobOptions, row: dict[str, Any]) -> str:
    """What makes the windows of this job on this engine: model, precision, encoder, options, the source's content, our version."""
    model = (engine.model, engine.revision, engine.device, engine.compute_type, engine.encoder)
    source = (row["size"], row["mtime_ns"])
    return hashlib.sha256(msgspec.json.encode((__version__, model, options, source))).hexdigest()[:16]


def transcribe(job: int, options: JobOptions, windows: Sequence[Window], front_end: bytes) -> Transcribe:
    """The job from the window after the last of `windows`."""
    if not windows:
        return Transcribe(job=job, options=options)
    return Transcribe(job=job, options=options, windows_done=len(windows), position_s=windows[-1].end_s, front_end=front_end)
