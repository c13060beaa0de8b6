"""python -m whisperd.outbox: one outbox, served for the daemon.

Owns: the life of the process. It is told where to publish, says that it is ready, and answers each request one after the other:
Published or PublishFailed, Disposed or DisposeFailed. It ends on Stop or when the wire closes; nothing that is wrong with one request
ends it. What SIGKILL cut off is finished by sending the same request again.
"""

from __future__ import annotations

import os
import sys
from typing import NamedTuple

import msgspec
from loguru import logger

from whisperd.log import to_parent
from whisperd.outbox.disposal import Disposal
from whisperd.outbox.failures import StagedBroken, Unpublished, explain
from whisperd.outbox.place import Outbox
from whisperd.outbox.publish import publish, remove_own
from whisperd.outbox.render import render
from whisperd.vocabulary import Failure, FailureKind, SubtitleShape, Transcript
from whisperd.wire import (
    Channel,
    Dispose,
    Disposed,
    DisposeFailed,
    Frame,
    OutboxIn,
    OutboxOut,
    OutboxReady,
    Publish,
    Published,
    PublishedFile,
    PublishError,
    PublishFailed,
    ServeOutbox,
    Stop,
    WireBroken,
    WireClosed,
    Withdraw,
    join_daemon,
)

ERROR_FORMAT = "error.txt"
SCHEMA = "whisperd.transcript/1"
_READ_BYTES = 1 << 20
_decoder = msgspec.json.Decoder(Transcript)


class Desk(NamedTuple):
    """What one process serves."""

    outbox: Outbox
    disposal: Disposal
    shape: SubtitleShape


def main() -> int:
    to_parent()
    channel: Channel[OutboxIn] = join_daemon(OutboxIn)
    try:
        serve(channel)
    except WireClosed:
        return 0
    except WireBroken as error:
        logger.error("the daemon did not keep to the protocol: {}", error)
        return 1
    return 0


def serve(channel: Channel[OutboxIn]) -> None:
    """Answer requests until Stop. Raises WireClosed, WireBroken."""
    desk: Desk | None = None
    while True:
        for frame in channel.wait(None):
            if isinstance(frame.message, Stop):
                return
            if isinstance(frame.message, ServeOutbox):
                desk = prepare(frame.message)
                _close(frame)
                channel.send_all(OutboxReady())
            elif desk is None:
                raise WireBroken("asked to publish before being told where")
            else:
                reply = answer(desk, frame.message, frame.descriptors)
                _close(frame)
                channel.send_all(reply)


def _close(frame: Frame[OutboxIn]) -> None:
    for descriptor in frame.descriptors:
        os.close(descriptor)


def prepare(terms: ServeOutbox) -> Desk:
    """Make the outbox if it is absent. One that cannot be made now is tried again with every request, which will say why."""
    outbox = Outbox(terms)
    try:
        with outbox.folder():
            pass
    except Unpublished as error:
        logger.warning("{}", error)
    return Desk(outbox, Disposal(terms), terms.subtitles)


def answer(desk: Desk, request: Publish | PublishError | Withdraw | Dispose, descriptors: list[int]) -> OutboxOut:
    """Do what one request asks, and say how it went."""
    failed = DisposeFailed if isinstance(request, Dispose) else PublishFailed
    try:
        if isinstance(request, Dispose):
            return Disposed(job=request.job, how=desk.disposal.dispose(request))
        return Published(job=request.job, files=_obey(desk, request, descriptors))
    except Unpublished as error:
        return failed(job=request.job, failure=error.failure())
    except OSError as error:
        deed, path = ("put away from", request.inbox) if isinstance(request, Dispose) else ("publish in", desk.outbox.path)
        return failed(job=request.job, failure=explain(error, deed, path).failure())
    except Exception as error:  # noqa: BLE001 - a fault of ours met by one transcript must not stop the publishing of all others
        logger.opt(exception=error).error("cannot finish job {}", request.job)
        what = f"cannot finish: {type(error).__name__} in the outbox writer"
        failure = Failure(kind=FailureKind.TRANSIENT, code="internal", what=what, hint="the journal has the details; please report it")
        return failed(job=request.job, failure=failure)


def _obey(desk: Desk, request: Publish | PublishError | Withdraw, descriptors: list[int]) -> tuple[PublishedFile, ...]:
    if isinstance(request, Withdraw):
        remove_own(desk.outbox, request.file)
        return ()
    if isinstance(request, PublishError):
        text = request.text.encode("utf-8", "replace")
        return publish(desk.outbox, job=request.job, base=request.base, contents={ERROR_FORMAT: text}, own=request.own)
    transcript = read_staged(descriptors)
    contents = {name: render(transcript, name, desk.shape) for name in request.formats}
    return publish(desk.outbox, job=request.job, base=request.base, contents=contents, own=request.own, stale=request.stale)


def read_staged(descriptors: list[int]) -> Transcript:
    """The staged transcript, decoded strictly. Raises StagedBroken."""
    if len(descriptors) != 1:
        raise StagedBroken(f"cannot read the staged transcript: {len(descriptors)} descriptors came along instead of one")
    try:
        transcript = _decoder.decode(_read_all(descriptors[0]))
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StagedBroken(f"cannot read the staged transcript: {error}") from error
    if transcript.schema != SCHEMA:
        raise StagedBroken(f"cannot read the staged transcript: its schema is {transcript.schema!r}, not {SCHEMA!r}")
    return transcript


def _read_all(descriptor: int) -> bytes:
    """From the first byte, wherever an earlier reader of the same open file stopped."""
    parts: list[bytes] = []
    position = 0
    while data := os.pread(descriptor, _READ_BYTES, position):
        parts.append(data)
        position += len(data)
    return b"".join(parts)


if __name__ == "__main__":
    sys.exit(main())
