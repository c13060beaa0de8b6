"""tracks: opens a recording with the track on which somebody speaks.

Owns: nothing; brings together the recording and the ear. Costs nothing where there is one track. Fails with what audio.py raises.
"""

from __future__ import annotations

from whisperd.engine.audio import Caps, Recording
from whisperd.engine.speech import spoken_s


def open_recording(descriptor: int, caps: Caps, *, track: str = "auto", language: str = "auto", split_channels: bool = False) -> Recording:
    """A recording whose track is the one asked for or, of those in `language`, the one with most speech.

    Raises MediaRefused, MediaDamaged.
    """
    return Recording(descriptor, caps, track=track, language=language, split_channels=split_channels, listen=spoken_s)
