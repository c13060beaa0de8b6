"""events: what the batcher tells of its work.

Owns: nothing but these values.
"""

from __future__ import annotations

from typing import NamedTuple

from whisperd.engine.model import ModelUnusable
from whisperd.engine.work import WindowWork


class Counts(NamedTuple):
    """What the model did. `needed` are distinct stretches of audio, `encoded` runs of the encoder: equal, or work was wasted."""

    encoded: int = 0
    needed: int = 0


class Call(NamedTuple):
    """One call of the decoder."""

    windows: int
    limit: int
    beam: int
    frames: int
    took_s: float


class Shrunk(NamedTuple):
    """A batch did not fit into memory; `limit` holds from now on, and the same windows are tried again."""

    windows: int
    beam: int
    frames: int
    limit: int
    what: str


class Refused(NamedTuple):
    """A job that the model cannot do, and why."""

    job: int
    error: Exception


class Lost(NamedTuple):
    """The model had to be loaded anew, and was not: nothing more can be done here."""

    error: ModelUnusable


Event = WindowWork | Call | Shrunk | Refused | Lost
