"""python -m whisperd.outbox: one outbox, served for the daemon.

Owns: the life of the process. It is told where to publish, says that it is ready, and answers each request with Published or
PublishFailed, one after the other. It ends on Stop or when the wire closes; nothing that is wrong with one request ends it.
A publication cut off by SIGKILL is finished by sending the same request again.
"""

from __future__ import annotations

import os
import sys

import msgspec
from loguru import logger

from whisperd.log import to_parent
from whisperd.outbox.failures import StagedBroken, Unpublished, explain
from whisperd.outbox.place import Outbox
from whisperd.outbox.publish import publish
from whisperd.outbox.render import render
from whisperd.vocabulary import Failure, FailureKind, Transcript
from whisperd.wire import (
    Channel,
    Frame,
    OutboxIn,
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
    join_daemon,
)

ERROR_FORMAT = "error.txt"
SCHEMA = "whisperd.transcript/1"
_READ_BYTES = 1 << 20
_decoder = msgspec.json.Decoder(Transcript)


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
    outbox: Outbox | None = None
    while True:
        for frame in channel.wait(None):
            if isinstance(frame.message, Stop):
                return
            if isinstance(frame.message, ServeOutbox):
                outbox = prepare(frame.message)
                _close(frame)
                channel.send_all(OutboxReady())
            elif outbox is None:
                raise WireBroken("asked to publish before being told where")
            else:
                reply = answer(outbox, frame.message, frame.descriptors)
                _close(frame)
                channel.send_all(reply)


def _close(frame: Frame[OutboxIn]) -> None:
    for descriptor in frame.descriptors:
        os.close(descriptor)


def prepare(terms: ServeOutbox) -> Outbox:
    """Make the outbox if it is absent. One that cannot be made now is tried again with every request, which will say why."""
    outbox = Outbox(terms)
    try:
        with outbox.folder():
            pass
    except Unpublished as error:
        logger.warning("{}", error)
    return outbox


def answer(outbox: Outbox, request: Publish | PublishError, descriptors: list[int]) -> Published | PublishFailed:
    """Do what one request asks, and say how it went."""
    try:
        return Published(job=request.job, files=_obey(outbox, request, descriptors))
    except Unpublished as error:
        return PublishFailed(job=request.job, failure=error.failure())
    except OSError as error:
        return PublishFailed(job=request.job, failure=explain(error, "publish in", outbox.path).failure())
    except Exception as error:  # noqa: BLE001 - a fault of ours met by one transcript must not stop the publishing of all others
        logger.opt(exception=error).error("cannot publish job {}", request.job)
        what = f"cannot publish: {type(error).__name__} in the outbox writer"
        failure = Failure(kind=FailureKind.TRANSIENT, code="internal", what=what, hint="the journal has the details; please report it")
        return PublishFailed(job=request.job, failure=failure)


def _obey(outbox: Outbox, request: Publish | PublishError, descriptors: list[int]) -> tuple[PublishedFile, ...]:
    if isinstance(request, PublishError):
        text = request.text.encode("utf-8", "replace")
        return publish(outbox, job=request.job, base=request.base, contents={ERROR_FORMAT: text}, own=request.own)
    transcript = read_staged(descriptors)
    contents = {name: render(transcript, name) for name in request.formats}
    return publish(outbox, job=request.job, base=request.base, contents=contents, own=request.own, stale=request.stale)


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
