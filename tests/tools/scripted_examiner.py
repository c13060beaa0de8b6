"""scripted_examiner: a real process that speaks the examiner's wire, for files that are scripts and no media.

Contents are really hashed (and copied, where a copy is wanted); of a container nothing is known.
"""

from __future__ import annotations

import hashlib
import os
import sys

from whisperd.vocabulary import Media, Track
from whisperd.wire import (
    Channel,
    Examine,
    Examined,
    ExaminerIn,
    ExaminerReady,
    Frame,
    ServeInbox,
    Stop,
    Take,
    Taken,
    WireClosed,
    join_daemon,
)

MEDIA = Media(container="script", tracks=(Track(number=1, codec="script"),))


def main() -> int:
    channel: Channel[ExaminerIn] = join_daemon(ExaminerIn)
    spool = ""
    try:
        while True:
            for frame in channel.wait(None):
                if isinstance(frame.message, Stop):
                    return 0
                if isinstance(frame.message, ServeInbox):
                    spool = frame.message.spool
                    channel.send_all(ExaminerReady())
                else:
                    answer(channel, frame, spool)
    except WireClosed:
        return 0


def answer(channel: Channel[ExaminerIn], frame: Frame[ExaminerIn], spool: str) -> None:
    match frame.message:
        case Examine(job=job):
            channel.send_all(Examined(job=job, media=MEDIA))
        case Take(job=job, spool=wanted):
            content = os.pread(frame.descriptors[0], 1 << 24, 0)
            if wanted:
                with open(os.path.join(spool, str(job)), "wb") as copy:
                    copy.write(content)
            channel.send_all(Taken(job=job, sha256=hashlib.sha256(content).hexdigest(), spooled=wanted))
    for descriptor in frame.descriptors:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
