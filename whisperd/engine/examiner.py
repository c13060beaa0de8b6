"""python -m whisperd.engine.examiner: one process for each inbox, which looks at recordings before an engine does (decision 0012).

Owns: the life of the process. Its main thread serves the wire and looks at containers, a second one reads contents (taking.py): a header is
not to wait for a long copy. Nothing is decoded, no model is loaded. Hostile media may end the process, by a crash or by the memory they
ask for, and blame nobody; a share that hangs, hangs this process only.
"""

from __future__ import annotations

import os
import resource
import select
import sys
import time
from collections.abc import Callable

from loguru import logger

from whisperd.engine.taking import Errand, Outcome, Taker, remove, unreadable
from whisperd.errors import WhisperdError
from whisperd.log import to_parent
from whisperd.vocabulary import Failure, FailureKind
from whisperd.wire import (
    Channel,
    Drop,
    Examine,
    Examined,
    ExamineFailed,
    ExaminerIn,
    ExaminerReady,
    Frame,
    ServeInbox,
    Stop,
    Take,
    TakeFailed,
    Taken,
    Taking,
    WireBroken,
    WireClosed,
    join_daemon,
)

SIGN_OF_LIFE_S = 2.0
MEMORY_MAX_BYTES = 2 << 30  # the index of a film of a day is a tenth of it
OPEN_FILES_MAX = 256


class Examiner:
    """The loop of one examiner process."""

    def __init__(self, channel: Channel[ExaminerIn], terms: ServeInbox, taker: Taker) -> None:
        self._channel = channel
        self._terms = terms
        self._taker = taker
        self._told: tuple[int, int] | None = None
        self._told_at = 0.0
        self._stopping = False

    def serve(self, frames: list[Frame[ExaminerIn]]) -> None:
        """Answer until told to stop. Raises WireClosed, WireBroken, and whatever a file makes of the demuxer."""
        self._channel.send_all(ExaminerReady())
        while not self._stopping:
            for frame in frames:
                self._obey(frame)
                self._tell_outcomes()
                if self._stopping:
                    return
            self._tell_progress()
            select.select([self._channel.fileno(), self._taker.fileno()], [], [], SIGN_OF_LIFE_S if self._taker.progress() else None)
            self._tell_outcomes()
            frames = self._channel.wait(0)

    # --- orders ---

    def _obey(self, frame: Frame[ExaminerIn]) -> None:
        match frame.message:
            case Stop():
                self._stopping = True
            case Examine(job=job):
                self._channel.send_all(look(job, only_descriptor(frame), self._terms, on_read=self._teller(job)))
            case Take() as order:
                self._take(order, only_descriptor(frame))
            case Drop(job=job):
                self._taker.drop(job)
                if self._terms.spool:
                    remove(self._copy_of(job))
            case ServeInbox():
                raise WireBroken("told twice what to serve")

    def _take(self, order: Take, descriptor: int) -> None:
        if order.spool and not self._terms.spool:
            os.close(descriptor)
            raise WireBroken("asked for a copy without being told where")
        copy = self._copy_of(order.job) if order.spool else ""
        self._taker.add(Errand(order.job, descriptor, copy, order.free_min_mib))

    def _copy_of(self, job: int) -> str:
        return os.path.join(self._terms.spool, str(job))

    # --- answers ---

    def _tell_progress(self) -> None:
        progress = self._taker.progress()
        if progress is not None:
            self._tell(progress)

    def _tell(self, progress: tuple[int, int]) -> None:
        """A sign of life, now and then, and only where there is some: a read that hangs is none."""
        now = time.monotonic()
        if progress != self._told and now - self._told_at >= SIGN_OF_LIFE_S:
            self._told, self._told_at = progress, now
            self._channel.send_all(Taking(job=progress[0], done_bytes=progress[1]))

    def _teller(self, job: int) -> Callable[[int], None]:
        """Tells how much the demuxer has read of a job's file."""
        done_bytes = 0

        def on_read(count: int) -> None:
            nonlocal done_bytes
            done_bytes += count
            self._tell((job, done_bytes))

        return on_read

    def _tell_outcomes(self) -> None:
        for outcome in self._taker.outcomes():
            self._channel.send_all(answer(outcome))


def look(job: int, descriptor: int, terms: ServeInbox, *, on_read: Callable[[int], None] = lambda count: None) -> Examined | ExamineFailed:
    """What the container of a recording says; the descriptor is closed. `on_read` is called with the bytes of each read."""
    from whisperd.engine.media import Caps, MediaDamaged, MediaRefused, examine  # FFmpeg is large: not before it is needed

    try:
        media = examine(descriptor, Caps(terms.duration_max_s, terms.channels_max, terms.rate_max_hz), on_read=on_read)
        return Examined(job=job, media=media)
    except (MediaRefused, MediaDamaged) as error:
        failure = Failure(kind=FailureKind.PERMANENT, code=error.code, what=error.what, hint=error.hint)
        return ExamineFailed(job=job, failure=failure)
    except OSError as error:
        return ExamineFailed(job=job, failure=unreadable(error).failure())
    finally:
        os.close(descriptor)


def answer(outcome: Outcome) -> Taken | TakeFailed:
    errand = outcome.errand
    if outcome.error is not None:
        return TakeFailed(job=errand.job, failure=outcome.error.failure())
    return Taken(job=errand.job, sha256=outcome.sha256, spooled=bool(errand.copy))


def only_descriptor(frame: Frame[ExaminerIn]) -> int:
    """The one descriptor that came along; the caller owns it. Raises WireBroken."""
    if len(frame.descriptors) != 1:
        raise WireBroken(f"{len(frame.descriptors)} descriptors came along instead of one")
    return frame.descriptors[0]


def first_frames(channel: Channel[ExaminerIn]) -> tuple[ServeInbox, list[Frame[ExaminerIn]]] | None:
    """What to serve, and what came together with that; None when told to stop. Raises WireClosed, WireBroken."""
    while True:
        for number, frame in enumerate(frames := channel.wait(None)):
            if isinstance(frame.message, Stop):
                return None
            if not isinstance(frame.message, ServeInbox):
                raise WireBroken("asked to look at a file before being told what to serve")
            return frame.message, frames[number + 1 :]


def limit_resources() -> None:
    """No core dumps of other people's recordings; bounded open files; and bounded memory, so that a spoilt index ends this process and not
    an engine, which holds more."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_MAX_BYTES, MEMORY_MAX_BYTES))


def main() -> int:
    to_parent()
    limit_resources()
    channel: Channel[ExaminerIn] = join_daemon(ExaminerIn)
    taker: Taker | None = None
    try:
        first = first_frames(channel)
        if first is None:
            return 0
        taker = Taker()
        Examiner(channel, first[0], taker).serve(first[1])
    except WireClosed:  # the daemon is gone, and so is our work
        return 0
    except WhisperdError as error:
        logger.error("{}", error)
        return 1
    except Exception as error:  # noqa: BLE001 - codecs raise anything; the daemon then lets the engines find out
        logger.opt(exception=error).error("unexpected error in the examiner")
        return 1
    finally:
        if taker is not None:
            taker.stop()
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the second thread may be inside a read from a share that never comes back
