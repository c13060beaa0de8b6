"""python -m whisperd.watcher: one process for each inbox; the wire is its standard input.

The first frame names the inbox. Ends with status 0 when told to stop or when the daemon is gone, with 1 when it cannot do its work at all
(no ledger to read); an absent inbox is no such case.
"""

from __future__ import annotations

import gc
import sys

from loguru import logger

from whisperd.errors import WhisperdError
from whisperd.log import to_parent
from whisperd.watcher.watch import Watch
from whisperd.watcher.writers import ignore_lease_signals
from whisperd.wire import Channel, Frame, WatcherIn, WatchInbox, WireClosed, join_daemon

OBJECTS_BETWEEN_SWEEPS = 100_000  # a scan makes very many objects and no cycles: sweeping after every few hundred costs a fifth of it


def main() -> int:
    to_parent()
    gc.set_threshold(OBJECTS_BETWEEN_SWEEPS)
    channel: Channel[WatcherIn] = join_daemon(WatcherIn)
    ignore_lease_signals()
    try:
        frames = _first_frames(channel)
        if frames and isinstance(frames[0].message, WatchInbox):
            Watch(channel, frames[0].message).run(frames[1:])
    except WhisperdError as error:
        logger.error("{}", error)
        return 1
    return 0


def _first_frames(channel: Channel[WatcherIn]) -> list[Frame[WatcherIn]]:
    """Wait for the daemon's first words; none when it is gone."""
    try:
        while True:
            if frames := channel.wait(None):
                return frames
    except WireClosed:
        return []


if __name__ == "__main__":
    sys.exit(main())
