"""The wire over real socket pairs: every message there and back, in any pieces, with descriptors; and nothing that is not one of ours."""

from __future__ import annotations

import contextlib
import enum
import fcntl
import os
import random
import socket
import struct
import threading
import time
import types
import typing
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings

from whisperd import wire
from whisperd.vocabulary import JobOptions, Reading, Segment, Window
from whisperd.wire import DESCRIPTORS_MAX, FRAME_BYTES_MAX, Abandoned, Channel, Frame, Progress, Readings, Stop, WireBroken, WireClosed

UNIONS = (
    wire.WatcherIn,
    wire.WatcherOut,
    wire.EngineIn,
    wire.EngineOut,
    wire.OutboxIn,
    wire.OutboxOut,
    wire.ExaminerIn,
    wire.ExaminerOut,
    wire.NotifierIn,
    wire.NotifierOut,
    wire.ProbeIn,
    wire.ProbeOut,
)


def members(union: object) -> tuple[type, ...]:
    return typing.get_args(union) or (typing.cast("type", union),)


MESSAGES = [(union, message) for union in UNIONS for message in members(union)]


def open_files() -> set[tuple[str, str]]:
    """Every open descriptor and what it is open on (garbage of earlier tests may go meanwhile: only what is new can be a leak)."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor that lists them
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
    return found


@contextmanager
def ends(receives: object) -> Iterator[tuple[Channel[Any], Channel[Any]]]:
    """Two ends of a wire; no descriptor may be left when both are closed."""
    before = open_files()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one, other = Channel[Any](ours, receives), Channel[Any](theirs, receives)
    try:
        yield one, other
    finally:
        one.close()
        other.close()
    assert not open_files() - before, "a descriptor leaked"


@contextmanager
def raw_end(receives: object) -> Iterator[tuple[socket.socket, Channel[Any]]]:
    """A wire with a bare socket at the other end, for a side that does not keep to the protocol."""
    before = open_files()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel = Channel[Any](theirs, receives)
    try:
        with closing(ours):
            yield ours, channel
    finally:
        channel.close()
    assert not open_files() - before, "a descriptor leaked"


def framed(body: bytes, descriptors: int = 0) -> bytes:
    return struct.pack("!IB", len(body), descriptors) + body


def note(number: int) -> int:
    """A descriptor that can be told from others: an open file that holds this number."""
    descriptor = os.memfd_create("note")
    os.write(descriptor, b"%d" % number)
    return descriptor


def read_note(descriptor: int) -> int:
    try:
        return int(os.pread(descriptor, 20, 0))
    finally:
        os.close(descriptor)


# --- every message ---------------------------------------------------------------------------------------------------------------


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    """Values of a type as the messages use them."""
    plain: dict[Any, st.SearchStrategy[Any]] = {
        int: st.integers(-(2**63), 2**64 - 1),
        float: st.floats(allow_nan=False, allow_infinity=False),
        str: st.text(max_size=30),
        bytes: st.binary(max_size=30),
        bool: st.booleans(),
        type(None): st.none(),
    }
    if kind in plain:
        return plain[kind]
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return st.sampled_from(kind)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return structs(kind)
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, arguments))
    if typing.get_origin(kind) is dict:
        return st.dictionaries(*map(values_of, arguments), max_size=3)
    assert typing.get_origin(kind) is tuple and arguments[1] is Ellipsis, f"a type the wire has not used before: {kind}"
    return st.lists(values_of(arguments[0]), max_size=3).map(tuple)


def structs(kind: type) -> st.SearchStrategy[Any]:
    hints = {name: hint for name, hint in typing.get_type_hints(kind).items() if name in kind.__struct_fields__}  # type: ignore[attr-defined]
    return st.fixed_dictionaries({name: values_of(hint) for name, hint in hints.items()}).map(lambda fields: kind(**fields))


@pytest.mark.parametrize(("union", "message"), MESSAGES, ids=lambda value: getattr(value, "__name__", "in"))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_every_message_comes_back_as_it_was(union: object, message: type, data: st.DataObject) -> None:
    """Any message of any direction, with any values of its types, arrives equal to what was sent."""
    sent = data.draw(structs(message))
    with ends(union) as (one, other):
        one.send(sent)
        frames = other.wait(10)
    assert frames == [Frame(sent, [])]
    assert type(frames[0].message) is message


def test_every_message_has_a_direction() -> None:
    """No message type is defined that nobody could receive, and tags are unique."""
    defined = {kind for kind in vars(wire).values() if isinstance(kind, type) and issubclass(kind, wire.Message)} - {wire.Message}
    assert defined == {message for _, message in MESSAGES}
    tags = [kind.__struct_config__.tag for kind in defined]  # type: ignore[attr-defined]
    assert len(set(tags)) == len(tags)


# --- pieces ----------------------------------------------------------------------------------------------------------------------


def window(text: str) -> Window:
    said = Segment(start_s=0.0, end_s=1.0, text=text)
    return Window(index=0, start_s=0.0, end_s=1.0, language="en", language_probability=1.0, segments=(said,))


def test_partial_reads_at_every_byte() -> None:
    """Frames that come byte by byte, two of them with descriptors, are complete exactly at their last byte, and in order."""
    sent = [Abandoned(job=1), Progress(job=2, position_s=1.5, duration_s=None), Abandoned(job=3)]
    carried = [[], [20, 21], [30]]
    got: list[Frame[Any]] = []
    complete_at: list[int] = []
    with raw_end(wire.EngineOut) as (raw, channel):
        position = 0
        for message, notes in zip(sent, carried, strict=True):
            data = framed(msgspec.json.encode(message), len(notes))
            for index in range(len(data)):
                descriptors = [note(number) for number in notes] if index == 0 else []
                socket.send_fds(raw, [data[index : index + 1]], descriptors)
                for descriptor in descriptors:
                    os.close(descriptor)
                frames = list(channel.receive())
                got += frames
                position += 1
                if frames:
                    complete_at.append(position)
            assert complete_at[-1] == position
        assert [frame.message for frame in got] == sent
        assert [[read_note(descriptor) for descriptor in frame.descriptors] for frame in got] == carried


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 1000])
def test_many_frames_in_one_read(cut: int) -> None:
    """Frames that come glued together, cut anywhere, come out one by one."""
    sent = [Abandoned(job=job) for job in range(20)]
    data = b"".join(framed(msgspec.json.encode(message)) for message in sent)
    with raw_end(wire.EngineOut) as (raw, channel):
        got = []
        for begin in range(0, len(data), cut):
            raw.sendall(data[begin : begin + cut])
            got += [frame.message for frame in channel.receive()]
        assert got == sent
        assert list(channel.receive()) == []


def test_big_frames_through_ends_that_never_block() -> None:
    """5 MB frames, one after the other and with a descriptor each, get through by `flush` and `receive` alone; neither ever blocks."""
    sent = [wire.WindowDone(job=job, window=window(chr(97 + job) * 5_000_000), duration_s=None) for job in range(3)]
    with ends(wire.EngineOut) as (one, other):
        for message in sent:
            one.send(message, (note(message.job),))
        assert one.wants_write
        got: list[Frame[Any]] = []
        while len(got) < len(sent):
            got += other.receive()
            one.flush()
        assert not one.wants_write
        assert [frame.message for frame in got] == sent
        assert [read_note(frame.descriptors[0]) for frame in got] == [0, 1, 2]


def test_send_all_waits_for_the_reader() -> None:
    """`send_all` returns once the whole frame is with the kernel, however slowly the other side reads."""
    sent = wire.WindowDone(job=1, window=window("x" * 3_000_000), duration_s=None)
    with ends(wire.EngineOut) as (one, other):
        got: list[Frame[Any]] = []

        def read() -> None:
            time.sleep(0.02)
            while not got:
                got.extend(other.wait(10))

        reader = threading.Thread(target=read)
        reader.start()
        one.send_all(sent)
        assert not one.wants_write
        reader.join()
        assert [frame.message for frame in got] == [sent]


def test_wait_has_an_end() -> None:
    """`wait` returns after its time when nothing comes, at once when something is there."""
    with ends(wire.EngineOut) as (one, other):
        before = time.monotonic()
        assert other.wait(0.05) == []
        assert 0.04 < time.monotonic() - before < 5
        one.send(Abandoned(job=1))
        assert [frame.message for frame in other.wait(None)] == [Abandoned(job=1)]
        assert list(other.receive()) == []


def test_both_directions_at_once() -> None:
    """Each end sends and receives independently, with both sockets full."""
    text = "y" * 500_000
    with ends(wire.EngineOut) as (one, other):
        for channel in (one, other):
            for job in range(4):
                channel.send(wire.WindowDone(job=job, window=window(text), duration_s=None))
        got: dict[int, list[int]] = {0: [], 1: []}
        while len(got[0]) + len(got[1]) < 8:
            for index, channel in enumerate((one, other)):
                channel.flush()
                got[index] += [frame.message.job for frame in channel.receive()]
        assert got == {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]}


# --- descriptors -----------------------------------------------------------------------------------------------------------------


def test_many_descriptors_stay_with_their_frames() -> None:
    """Frames with 0 to 8 descriptors each, sent before anybody reads, arrive with theirs, in order, closed on exec."""
    rng = random.Random(8)
    carried = [[rng.randrange(10**9) for _ in range(rng.choice((0, 0, 1, 2, DESCRIPTORS_MAX)))] for _ in range(60)]
    with ends(wire.EngineOut) as (one, other):
        for job, notes in enumerate(carried):
            one.send(wire.WindowDone(job=job, window=window("z" * rng.randrange(20_000)), duration_s=None), tuple(map(note, notes)))
        got: list[Frame[Any]] = []
        while len(got) < len(carried):
            got += other.receive()
            one.flush()
        assert [frame.message.job for frame in got] == list(range(60))
        assert all(fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for frame in got for descriptor in frame.descriptors)
        assert [[read_note(descriptor) for descriptor in frame.descriptors] for frame in got] == carried


def test_descriptors_are_closed_by_whoever_owns_them() -> None:
    """The sender's copies are closed once sent; those never sent, and those never fetched, when the channel closes."""
    with ends(wire.EngineOut) as (one, other):
        sent = note(1)
        one.send(Abandoned(job=1), (sent,))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(sent)
        one.send(wire.WindowDone(job=1, window=window("x" * 2_000_000), duration_s=None), (note(2),))
        one.send(Abandoned(job=2), (note(3), note(4)))
        assert one.wants_write
        frames = other.wait(10)
        assert read_note(frames[0].descriptors[0]) == 1


def test_a_frame_that_cannot_be_sent_is_refused_here() -> None:
    """Too many descriptors, too long a frame, or text no JSON can carry is refused by `send`, which closes the descriptors all the same."""
    with ends(wire.EngineOut) as (one, other):
        with pytest.raises(WireBroken):
            one.send(Abandoned(job=1), tuple(note(number) for number in range(DESCRIPTORS_MAX + 1)))
        with pytest.raises(WireBroken):
            one.send(wire.WindowDone(job=1, window=window("x" * FRAME_BYTES_MAX), duration_s=None), (note(1),))
        with pytest.raises(UnicodeEncodeError):
            one.send(wire.WindowDone(job=1, window=window("\udcff"), duration_s=None), (note(1),))
        assert not one.wants_write
        one.send(Abandoned(job=2))
        assert [frame.message for frame in other.wait(10)] == [Abandoned(job=2)], "the wire is as good as before"


# --- nonsense --------------------------------------------------------------------------------------------------------------------

NONSENSE: dict[str, bytes] = {
    "no JSON": framed(b"{"),
    "nothing": framed(b""),
    "JSON, not an object": framed(b"[1]"),
    "no tag": framed(b'{"job":1}'),
    "unknown tag": framed(b'{"type":"Shutdown","job":1}'),
    "a tag of the other direction": framed(b'{"type":"Stop"}'),
    "a tag that is no text": framed(b'{"type":1,"job":1}'),
    "unknown field": framed(b'{"type":"Abandoned","job":1,"extra":2}'),
    "missing field": framed(b'{"type":"Abandoned"}'),
    "wrong type": framed(b'{"type":"Abandoned","job":"1"}'),
    "a fraction for a number": framed(b'{"type":"Abandoned","job":1.5}'),
    "two messages": framed(b'{"type":"Abandoned","job":1}{"type":"Abandoned","job":2}'),
    "not UTF-8": framed(b'{"type":"Abandoned","job":1,"\xff":1}'),
    "not UTF-8 in a text": framed(b'{"type":"JobFailed","job":1,"failure":{"kind":"permanent","code":"\xff","what":""}}'),
    "half a surrogate pair": framed(b'{"type":"JobFailed","job":1,"failure":{"kind":"permanent","code":"\\ud800","what":""}}'),
    "an unknown kind of failure": framed(b'{"type":"JobFailed","job":1,"failure":{"kind":"curious","code":"","what":""}}'),
    "infinity": framed(b'{"type":"Progress","job":1,"position_s":1e999,"duration_s":null}'),
    "not a number": framed(b'{"type":"Progress","job":1,"position_s":NaN,"duration_s":null}'),
    "a pickle": framed(b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."),
    "nested too deep": framed(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b',"type":"Abandoned","job":1}'),
    "too long": struct.pack("!IB", FRAME_BYTES_MAX + 1, 0),
    "longest": b"\xff\xff\xff\xff\x00",
    "too many descriptors announced": struct.pack("!IB", 2, DESCRIPTORS_MAX + 1),
    "a descriptor announced that did not come": framed(b'{"type":"Abandoned","job":1}', 1),
    "a request": b"GET / HTTP/1.1\r\nHost: whisperd\r\n\r\n",
}


@pytest.mark.parametrize("kind", NONSENSE)
def test_nonsense_breaks_the_wire(kind: str) -> None:
    """Whatever an honest side would not send is `wire_broken`, whether it comes first or after a good frame with a descriptor."""
    good = framed(msgspec.json.encode(Abandoned(job=7)), 1)
    with raw_end(wire.EngineOut) as (raw, channel):
        raw.sendall(NONSENSE[kind])
        with pytest.raises(WireBroken) as broken:
            while True:
                channel.wait(1)
        assert broken.value.code == "wire_broken"
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptor = note(1)
        socket.send_fds(raw, [good + NONSENSE[kind]], [descriptor])
        os.close(descriptor)
        with pytest.raises(WireBroken):
            while True:
                for frame in channel.wait(1):
                    assert [read_note(fetched) for fetched in frame.descriptors] == [1]


def test_what_came_before_the_nonsense_is_handed_out() -> None:
    """`receive` hands out good frames with their descriptors before it meets a broken one; whoever took them owns them."""
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptor = note(5)
        socket.send_fds(raw, [framed(msgspec.json.encode(Abandoned(job=7)), 1) + NONSENSE["no JSON"]], [descriptor])
        os.close(descriptor)
        frames = channel.receive()
        first = next(frames)
        assert (first.message, [read_note(fetched) for fetched in first.descriptors]) == (Abandoned(job=7), [5])
        with pytest.raises(WireBroken):
            next(frames)


def test_a_broken_frame_takes_its_descriptors_with_it() -> None:
    """Descriptors of a frame that is nonsense are closed with the channel, not lost (`raw_end` counts them)."""
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptors = [note(number) for number in range(DESCRIPTORS_MAX)]
        socket.send_fds(raw, [framed(b"{", DESCRIPTORS_MAX)], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with pytest.raises(WireBroken):
            channel.wait(1)


def test_more_descriptors_than_a_frame_may_carry() -> None:
    """Nine descriptors at once are cut by the kernel and break the wire."""
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptors = [note(number) for number in range(DESCRIPTORS_MAX + 1)]
        socket.send_fds(raw, [framed(msgspec.json.encode(Abandoned(job=1)), DESCRIPTORS_MAX)], descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        with pytest.raises(WireBroken):
            channel.wait(1)


@pytest.mark.parametrize("announced", [False, True])
def test_a_flood_of_descriptors_is_refused(announced: bool) -> None:
    """A child cannot fill the daemon's table of open files: descriptors that no frame announced are refused after one frame's worth."""
    data = framed(msgspec.json.encode(Abandoned(job=1))) if announced else b"\x00\x00\x01\x00\x00" + b" " * 100
    held = open_files()
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptor = note(1)
        with pytest.raises(WireBroken):
            for index in range(200):
                piece = data if announced else data[index : index + 1]
                socket.send_fds(raw, [piece], [descriptor] * DESCRIPTORS_MAX)
                list(channel.receive())
        os.close(descriptor)
        assert len(open_files() - held) < 40


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=200), close=st.booleans())
def test_random_bytes_never_do_more_than_break_the_wire(data: bytes, close: bool) -> None:
    """Any bytes at all lead to frames, to `wire_broken` or to `wire_closed`; never to another exception, never to a leak."""
    with raw_end(wire.EngineOut) as (raw, channel):
        raw.sendall(data)
        if close:
            raw.shutdown(socket.SHUT_WR)
        try:
            list(channel.receive())
            list(channel.receive())
        except (WireBroken, WireClosed):
            pass


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_message_is_none_or_a_proper_one(data: st.DataObject) -> None:
    """A real message with some bytes changed either breaks the wire or is again a message of the expected types, to the last field."""
    _, kind = data.draw(st.sampled_from([pair for pair in MESSAGES if pair[0] is wire.EngineOut]))
    body = bytearray(msgspec.json.encode(data.draw(structs(kind))))
    for _ in range(data.draw(st.integers(1, 3))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with raw_end(wire.EngineOut) as (raw, channel):
        raw.sendall(framed(bytes(body)))
        try:
            (frame,) = channel.wait(10)
        except WireBroken:
            return
        again = msgspec.json.decode(msgspec.json.encode(frame.message), type=wire.EngineOut)
        assert again == frame.message


# --- closed ----------------------------------------------------------------------------------------------------------------------


def test_a_closed_wire_is_told() -> None:
    """When the other side is gone: what it sent is still delivered, then `wire_closed`, for reading and for writing."""
    with ends(wire.EngineOut) as (one, other):
        one.send(Abandoned(job=1))
        one.close()
        assert [frame.message for frame in other.wait(10)] == [Abandoned(job=1)]
        with pytest.raises(WireClosed) as closed:
            other.wait(10)
        assert closed.value.recoverable
        with pytest.raises(WireClosed):
            other.send(Abandoned(job=2), (note(1),))
        with pytest.raises(WireClosed):
            other.flush()


def test_a_wire_that_closes_within_a_frame() -> None:
    """Half a frame, with its descriptors, and then the end: `wire_closed`, and nothing leaks."""
    with raw_end(wire.EngineOut) as (raw, channel):
        descriptor = note(1)
        socket.send_fds(raw, [framed(msgspec.json.encode(Abandoned(job=1)), 1)[:-3]], [descriptor])
        os.close(descriptor)
        raw.shutdown(socket.SHUT_WR)
        assert channel.wait(10) == []
        with pytest.raises(WireClosed):
            channel.wait(10)


def test_a_wire_closed_with_unread_data() -> None:
    """The other side closes without having read what we sent (ECONNRESET): also `wire_closed`."""
    with ends(wire.EngineOut) as (one, other):
        one.send(Abandoned(job=1))
        other.close()
        with pytest.raises(WireClosed):
            one.wait(10)
            one.wait(10)


def test_closing_twice_is_harmless() -> None:
    """`close` may come from two places."""
    with ends(wire.EngineOut) as (one, _):
        one.close()
        one.close()


def test_only_what_a_side_expects_is_understood() -> None:
    """A probe's readings are nonsense on an outbox's wire; an order is nonsense to the daemon."""
    orders: list[tuple[object, wire.Message]] = [
        (wire.OutboxOut, Readings(readings=(Reading(gpu="", status="no_gpu", what=""),))),
        (wire.EngineOut, Stop()),
        (wire.ProbeOut, wire.Transcribe(job=1, options=JobOptions())),
    ]
    for receives, message in orders:
        with ends(receives) as (one, other):
            one.send(message)
            with pytest.raises(WireBroken):
                other.wait(10)
