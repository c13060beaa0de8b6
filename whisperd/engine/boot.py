"""boot: the wire while an engine has no model yet: an order to stop is obeyed at once, even in the middle of a load or a download.

Owns: the frames that come before the model is there. Loading blocks the main thread, and nothing is lost by ending it: so a thread reads
the wire meanwhile and ends the process. Fails with `WireClosed` before the load; during it the process ends then, too.
"""

from __future__ import annotations

import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from whisperd.errors import WhisperdError
from whisperd.wire import Channel, EngineIn, Frame, LoadModel, Stop


def first_frames(channel: Channel[EngineIn]) -> tuple[LoadModel, list[Frame[EngineIn]]] | None:
    """What to load, and what came together with that; None when told to stop."""
    while True:
        frames = channel.wait(None)
        if _stop(frames):
            return None
        for number, frame in enumerate(frames):
            if isinstance(frame.message, LoadModel):
                return frame.message, frames[number + 1 :]


@contextmanager
def watched(channel: Channel[EngineIn]) -> Iterator[list[Frame[EngineIn]]]:
    """Meanwhile a stop, or the end of the daemon, ends this process. What else comes is in the list, complete after the block."""
    frames: list[Frame[EngineIn]] = []
    over = os.eventfd(0)
    watch = threading.Thread(target=_watch, args=(channel, over, frames), name="boot watch", daemon=True)
    watch.start()
    try:
        yield frames
    finally:
        os.eventfd_write(over, 1)
        watch.join()
        os.close(over)


def _watch(channel: Channel[EngineIn], over: int, frames: list[Frame[EngineIn]]) -> None:
    while over not in select.select([channel.fileno(), over], [], [])[0]:
        try:
            came = channel.wait(0)
        except WhisperdError:  # the daemon is gone, or speaks nonsense: nobody waits for this model
            _end()
        if _stop(came):
            _end()
        frames += came


def _stop(frames: list[Frame[EngineIn]]) -> bool:
    return any(isinstance(frame.message, Stop) for frame in frames)


def _end() -> None:
    sys.stderr.flush()
    os._exit(0)
