"""wire: typed frames between the daemon and its children, with descriptor passing.

Owns: every message (a tagged msgspec struct) and `Channel`, one end of a Unix stream socket.
Descriptors of sources only name their file (O_PATH) while they are on their way: closing one asks a share nothing, so that whoever passes
it on can neither hang nor fail at that; `Channel` opens them for reading where they arrive (`reopens`).
A frame is a 4-byte big-endian length, a 1-byte count of descriptors that ride with it, and JSON. No pickle: a child that parsed
hostile media is not trusted, so whatever it sends is decoded strictly into the few types the daemon expects of it.
Fails with `WireClosed` when the other side is gone and `WireBroken` when it does not keep to the protocol.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import struct
from collections import deque
from collections.abc import Iterable, Iterator
from typing import ClassVar, Generic, TypeVar

import msgspec

from whisperd.errors import WhisperdError
from whisperd.vocabulary import Failure, JobOptions, Media, Reading, Sighting, SubtitleShape, Summary, Window

FRAME_BYTES_MAX = 64 * 1024 * 1024
DESCRIPTORS_MAX = 8
_HEADER = struct.Struct("!IB")


class WireClosed(WhisperdError):
    """The other side closed its end: a child ended, or the daemon did."""

    code = "wire_closed"
    recoverable = True


class WireBroken(WhisperdError):
    """The other side sent what no honest side would send."""

    code = "wire_broken"


class Message(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every frame."""


# --- daemon → any child --------------------------------------------------------------------------------------------------------


class Stop(Message, frozen=True):
    """Finish what must not be left half done, then end."""


# --- watcher -------------------------------------------------------------------------------------------------------------------


class WatchInbox(Message, frozen=True):
    """daemon → watcher: the inbox to watch, and how."""

    inbox: int
    path: bytes
    ledger: str
    exclude: tuple[bytes, ...]  # absolute directories below the inbox that are not part of it (an outbox)
    include: tuple[str, ...]
    ignore: tuple[str, ...]
    recursive: bool
    events: str  # "auto", "native", "polling"
    quiet_s: float
    rescan_s: float
    poll_s: float


class OpenSource(Message, frozen=True):
    """daemon → watcher: open this file, if it is still the one that settled."""

    job: int
    sighting: Sighting


class ScanNow(Message, frozen=True):
    """daemon → watcher: look now, do not wait for the next scan."""


class AskShare(Message, frozen=True):
    """daemon → watcher: come back with an answer of the share's, whichever."""


class ShareAnswered(Message, frozen=True):
    """watcher → daemon: it did not hang when it was asked."""


class WatcherReady(Message, frozen=True):
    """watcher → daemon: the first scan may begin."""

    events: str


class Renamed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file that was known under another name of the same inbox, and is not there any more."""

    before: bytes
    sighting: Sighting


class Sightings(Message, frozen=True):
    """watcher → daemon: what changed since the last report.

    `doubted` were finished once, and have kept their size and time, but not their inode or the time of their last change: only their
    content can tell whether they are new work.
    """

    seen: tuple[Sighting, ...] = ()
    settled: tuple[Sighting, ...] = ()
    vanished: tuple[bytes, ...] = ()
    renamed: tuple[Renamed, ...] = ()
    doubted: tuple[Sighting, ...] = ()


class ProfileFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A `.whisperd.toml` of a folder or a `name.whisperd.toml` of a file. `text` None: it is not there any more, `fault`: unreadable."""

    path: bytes
    text: str | None = None
    fault: str = ""


class Profiles(Message, frozen=True):
    """watcher → daemon: profiles that are new or changed, always ahead of the sightings they speak of. `whole`: there are no others."""

    files: tuple[ProfileFile, ...]
    whole: bool = False


class Scanned(Message, frozen=True):
    """watcher → daemon: one scan is over; `unsettled` files are still waited for, `left_out` are not recordings by their name."""

    files: int
    unsettled: int
    left_out: int
    took_s: float
    network: bool = False  # the inbox lies on a share


class InboxDown(Message, frozen=True):
    """watcher → daemon: the inbox cannot be listed; its jobs wait."""

    what: str
    hint: str


class SourceOpened(Message, frozen=True):
    """watcher → daemon, with one descriptor that names the file."""

    job: int


class SourceLost(Message, frozen=True):
    """watcher → daemon: the file cannot be opened. `reason`: gone, changed, denied, down."""

    job: int
    reason: str
    what: str


WatcherIn = WatchInbox | OpenSource | ScanNow | AskShare | Stop
WatcherOut = WatcherReady | Profiles | Sightings | Scanned | InboxDown | SourceOpened | SourceLost | ShareAnswered


# --- examiner ------------------------------------------------------------------------------------------------------------------


class ServeInbox(Message, frozen=True):
    """daemon → examiner: the caps on what media may ask of it, and the local directory for copies."""

    spool: str
    duration_max_s: float
    channels_max: int
    rate_max_hz: int


class ExaminerReady(Message, frozen=True):
    """examiner → daemon."""


class Examine(Message, frozen=True):
    """daemon → examiner, with the source's descriptor: what does its container say?"""

    job: int


class Examined(Message, frozen=True):
    """examiner → daemon."""

    job: int
    media: Media


class ExamineFailed(Message, frozen=True):
    """examiner → daemon: permanent (it is no recording, or refused) or waiting (it cannot be read now)."""

    job: int
    failure: Failure


class Take(Message, frozen=True):
    """daemon → examiner, with the source's descriptor: hash the content; with `spool` copy it to the local disk on the way, under the
    job's number, as long as `free_min_mib` stay free there."""

    job: int
    spool: bool
    free_min_mib: int


class Taking(Message, frozen=True):
    """examiner → daemon: so much has been read, of its content or by its demuxer; sent every two seconds while it goes on."""

    job: int
    done_bytes: int


class Taken(Message, frozen=True):
    """examiner → daemon: the whole content. Size, times and inode were the same before and after it was read."""

    job: int
    sha256: str
    spooled: bool


class TakeFailed(Message, frozen=True):
    """examiner → daemon. Codes: changed_while_read, dropped; source_unreadable, spool_full, spool_unusable (waiting)."""

    job: int
    failure: Failure


class Drop(Message, frozen=True):
    """daemon → examiner: this job is no longer wanted; what was copied of it is removed."""

    job: int


ExaminerIn = ServeInbox | Examine | Take | Drop | Stop
ExaminerOut = ExaminerReady | Examined | ExamineFailed | Taking | Taken | TakeFailed


# --- engine --------------------------------------------------------------------------------------------------------------------


class LoadModel(Message, frozen=True):
    """daemon → engine: the one model of this child's life, and the caps on what media may ask of it.

    The GPU is the only one the child can see (its environment names it); `gpu` is its UUID, "" on a CPU.
    """

    model: str
    device: str
    compute_type: str
    gpu: str
    cpu_threads: int
    batch: int  # windows decoded together at most
    encoder: str  # "auto", "ctranslate2", "torch"
    cache_dir: str
    offline: bool
    duration_max_s: float
    channels_max: int
    rate_max_hz: int


class EngineReady(Message, frozen=True):
    """engine → daemon: the model is loaded and `slots` jobs may be sent."""

    model: str
    revision: str
    device: str
    compute_type: str
    encoder: str
    slots: int
    load_s: float
    rss_mib: int
    vram_mib: int | None = None  # what loading took of the GPU's memory; None on a CPU or where the driver does not say


class BootFailed(Message, frozen=True):
    """engine → daemon: no model, so no work; no job is to blame."""

    failure: Failure


class Transcribe(Message, frozen=True):
    """daemon → engine, with the source's descriptor: one job, from its first window or from the one after its last checkpoint.

    `windows_done` windows up to `position_s` were done before; `front_end` is the engine's own state that came with the last of them.
    """

    job: int
    options: JobOptions
    windows_done: int = 0
    position_s: float = 0.0
    front_end: bytes = b""


class SetBatch(Message, frozen=True):
    """daemon → engine: from the next call on, decode at most so many windows together. No model is loaded anew."""

    batch: int


class BatchSet(Message, frozen=True):
    """engine → daemon: so it is; `slots` jobs may be in hand from now on (what is in hand beyond them goes on)."""

    batch: int
    slots: int


class Unload(Message, frozen=True):
    """daemon → engine: give the model's memory back; the next job loads it again."""


class Abandon(Message, frozen=True):
    """daemon → engine: this job is no longer wanted."""

    job: int


class Progress(Message, frozen=True):
    """engine → daemon: the recording was read up to here. Sent only when the position advanced."""

    job: int
    position_s: float
    duration_s: float | None


class WindowDone(Message, frozen=True):
    """engine → daemon: one window of text, to be kept; with the front end's state from which the next window can be found again."""

    job: int
    window: Window
    duration_s: float | None
    front_end: bytes = b""


class BatchDone(Message, frozen=True):
    """engine → daemon: one call of the decoder. Counts since the last such frame; `frames` is the mel frames of a window."""

    windows: int
    limit: int
    beam: int
    frames: int
    encoded: int
    encoded_needed: int
    took_s: float
    rss_mib: int
    vram_used_mib: int | None = None  # of the whole GPU, everybody's
    vram_mib: int | None = None  # the most that this process held of it since the last such frame, context included


class OutOfMemory(Message, frozen=True):
    """engine → daemon: a batch of this shape did not fit; the engine goes on with at most `limit` windows."""

    windows: int
    beam: int
    frames: int
    limit: int
    what: str


class Finished(Message, frozen=True):
    """engine → daemon: every window was sent."""

    job: int
    summary: Summary


class JobFailed(Message, frozen=True):
    """engine → daemon: this file has no transcript, and why."""

    job: int
    failure: Failure


class Abandoned(Message, frozen=True):
    """engine → daemon: the job was dropped as asked; the slot is free."""

    job: int


class Unloaded(Message, frozen=True):
    """engine → daemon: the model is out of memory."""

    rss_mib: int


EngineIn = LoadModel | Transcribe | Abandon | SetBatch | Unload | Stop
EngineOut = (
    EngineReady | BootFailed | Progress | WindowDone | BatchDone | BatchSet | OutOfMemory | Finished | JobFailed | Abandoned | Unloaded
)


# --- outbox --------------------------------------------------------------------------------------------------------------------


class OwnFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file this source has published before: it may be replaced while its content is still what we wrote."""

    path: bytes
    sha256: str


class ServeOutbox(Message, frozen=True):
    """daemon → outbox: the directory to publish into (made when absent), and the mode of files (octal)."""

    path: bytes
    file_mode: int
    directory_mode: int
    like: bytes  # owner and group follow this directory, the inbox, where they are not named
    uid: int = -1
    gid: int = -1
    subtitles: SubtitleShape = SubtitleShape()


class Publish(Message, frozen=True):
    """daemon → outbox, with the staged transcript's descriptor: render and publish as `base`.format for each format."""

    job: int
    base: bytes
    formats: tuple[str, ...]
    own: tuple[OwnFile, ...]
    stale: tuple[OwnFile, ...]  # an error file of an earlier attempt: removed once the transcript is there


class PublishError(Message, frozen=True):
    """daemon → outbox: publish the error file of a failed source (or, with job 0, of a profile)."""

    job: int
    base: bytes
    text: str
    own: tuple[OwnFile, ...]


class Withdraw(Message, frozen=True):
    """daemon → outbox: remove a file of ours, if it still is as we wrote it; answered by Published without files."""

    job: int
    file: OwnFile


class Dispose(Message, frozen=True):
    """daemon → outbox: the transcript of this source is out: move the source into `archive` (keeping its sub-tree), or delete it when
    that is empty, and its own profile after it. Only if it still is the file of the sighting, or of the same content by its sha256
    ("": unknown)."""

    job: int
    inbox: bytes
    sighting: Sighting
    archive: bytes
    sha256: str = ""


class OutboxReady(Message, frozen=True):
    """outbox → daemon."""


class PublishedFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One file as it stands in the outbox. `path` is relative to the outbox."""

    path: bytes
    format: str
    sha256: str


class Published(Message, frozen=True):
    """outbox → daemon: durable in the outbox."""

    job: int
    files: tuple[PublishedFile, ...]


class PublishFailed(Message, frozen=True):
    """outbox → daemon. code `name_taken`: somebody else's file stands at that name; choose another."""

    job: int
    failure: Failure


class Disposed(Message, frozen=True):
    """outbox → daemon. `how`: archived, deleted, gone (somebody was faster), changed (another content lies there now, and stays)."""

    job: int
    how: str


class DisposeFailed(Message, frozen=True):
    """outbox → daemon: the source is where it was."""

    job: int
    failure: Failure


OutboxIn = ServeOutbox | Publish | PublishError | Withdraw | Dispose | Stop
OutboxOut = OutboxReady | Published | PublishFailed | Disposed | DisposeFailed


# --- notifier ------------------------------------------------------------------------------------------------------------------


class ServeNotifier(Message, frozen=True):
    """daemon → notifier."""


class NotifierReady(Message, frozen=True):
    """notifier → daemon."""


class CallWebhook(Message, frozen=True):
    """daemon → notifier: POST `body`, signed as https://www.standardwebhooks.com says. `delivery` stays the same when it is tried again.

    An address that is not public is only called when it lies in one of the networks `allow`.
    """

    notice: int
    url: str
    secret: str
    delivery: str
    body: bytes
    allow: tuple[str, ...]
    timeout_s: float


class RunHook(Message, frozen=True):
    """daemon → notifier: run a command without a shell; the environment carries the job's facts (WHISPERD_*)."""

    notice: int
    command: tuple[str, ...]
    environment: dict[str, str]
    timeout_s: float


class Notified(Message, frozen=True):
    """notifier → daemon: told."""

    notice: int


class NotifyFailed(Message, frozen=True):
    """notifier → daemon. Permanent: never try again (refused address, no such program). `again_in_s`: the receiver asks not to be called
    before that."""

    notice: int
    failure: Failure
    again_in_s: float = 0.0


NotifierIn = ServeNotifier | CallWebhook | RunHook | Stop
NotifierOut = NotifierReady | Notified | NotifyFailed


# --- probe ---------------------------------------------------------------------------------------------------------------------


class StartProbe(Message, frozen=True):
    """daemon → probe."""

    interval_s: float


class Readings(Message, frozen=True):
    """probe → daemon: one reading for each GPU, or one that says why there is none."""

    readings: tuple[Reading, ...]
    took_s: float = 0.0  # what the look cost


ProbeIn = StartProbe | Stop
ProbeOut = Readings


# --- the channel ---------------------------------------------------------------------------------------------------------------

In = TypeVar("In")


class Frame(msgspec.Struct, Generic[In]):
    """A received message with the descriptors that came along; the receiver owns them."""

    message: In
    descriptors: list[int]


class Channel(Generic[In]):
    """One end of the wire. Never blocks on its own: `send` queues, `flush` writes what fits, `receive` takes what is there."""

    _encoder: ClassVar = msgspec.json.Encoder()

    def __init__(self, sock: socket.socket, receives: object, *, reopens: bool = False) -> None:
        """`reopens`: what comes with a frame is for reading here, not for passing on."""
        sock.setblocking(False)
        self._reopens = reopens
        self._socket = sock
        self._decoder = msgspec.json.Decoder(receives)
        self._out: deque[tuple[memoryview, list[int]]] = deque()
        self._in = bytearray()
        self._descriptors: deque[int] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def wants_write(self) -> bool:
        """Whether frames wait for room in the socket."""
        return bool(self._out)

    def send(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Queue a frame and write what fits. The channel owns (and closes) the descriptors from here on."""
        try:
            body = self._encoder.encode(message)
            if len(body) > FRAME_BYTES_MAX or len(descriptors) > DESCRIPTORS_MAX:
                raise WireBroken(f"cannot send a frame of {len(body)} bytes with {len(descriptors)} descriptors")
        except BaseException:
            _close(descriptors)
            raise
        self._out.append((memoryview(_HEADER.pack(len(body), len(descriptors)) + body), list(descriptors)))
        self.flush()

    def flush(self) -> None:
        """Write what fits now. Raises WireClosed."""
        while self._out:
            data, descriptors = self._out[0]
            try:
                sent = self._socket.sendmsg([data], _ancillary(descriptors))
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                raise WireClosed(f"cannot write to the other side: {error.strerror}") from error
            _close(descriptors)
            if sent == len(data):
                self._out.popleft()
            else:
                self._out[0] = (data[sent:], [])

    def send_all(self, message: Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send and wait until the frame is with the kernel (for children, which have nothing better to do). Raises WireClosed."""
        self.send(message, descriptors)
        while self._out:
            select.select([], [self], [])
            self.flush()

    def receive(self) -> Iterator[Frame[In]]:
        """Frames that are complete now, after one read from the socket. Raises WireClosed at the end, WireBroken on nonsense."""
        try:
            data, ancillary, flags, _ = self._socket.recvmsg(1 << 18, socket.CMSG_SPACE(DESCRIPTORS_MAX * 4), socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise WireClosed(f"cannot read from the other side: {error.strerror}") from error
        self._descriptors.extend(_received(ancillary))
        if flags & socket.MSG_CTRUNC:
            raise WireBroken("more descriptors than a frame may carry")
        if not data:
            raise WireClosed("the other side closed the wire")
        self._in += data
        yield from self._complete_frames()
        if len(self._descriptors) > DESCRIPTORS_MAX:  # an honest side has one frame under way at most
            raise WireBroken("descriptors came without their frames")

    def wait(self, timeout_s: float | None) -> list[Frame[In]]:
        """Wait for frames at most `timeout_s` (None: for ever). Raises WireClosed, WireBroken."""
        readable, _, _ = select.select([self], [], [], timeout_s)
        frames: list[Frame[In]] = []
        try:
            if readable:
                frames.extend(self.receive())
        except WhisperdError:
            for frame in frames:
                _close(frame.descriptors)
            raise
        return frames

    def close(self) -> None:
        _close(self._descriptors)
        self._descriptors.clear()
        for _, descriptors in self._out:
            _close(descriptors)
        self._out.clear()
        self._socket.close()

    def _complete_frames(self) -> Iterator[Frame[In]]:
        while len(self._in) >= _HEADER.size:
            length, count = _HEADER.unpack_from(self._in)
            if length > FRAME_BYTES_MAX or count > DESCRIPTORS_MAX:
                raise WireBroken(f"a frame of {length} bytes with {count} descriptors")
            end = _HEADER.size + length
            if len(self._in) < end:
                return
            body = bytes(memoryview(self._in)[_HEADER.size : end])
            del self._in[:end]
            if count > len(self._descriptors):
                raise WireBroken("a frame came without its descriptors")
            message = self._decode(body)
            descriptors = [self._descriptors.popleft() for _ in range(count)]
            yield Frame(message, [_for_reading(descriptor) for descriptor in descriptors] if self._reopens else descriptors)

    def _decode(self, body: bytes) -> In:
        try:
            return self._decoder.decode(body)  # type: ignore[no-any-return]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WireBroken(f"a frame that is none of ours: {error}") from error


def _close(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # Linux has closed it all the same; a share that broke off says so once more
            os.close(descriptor)


def name_only(descriptor: int) -> int:
    """The same file by a descriptor that cannot be read (O_PATH); the given one is closed. Raises OSError."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_PATH | os.O_CLOEXEC)
    finally:
        _close([descriptor])


def _for_reading(descriptor: int) -> int:
    """Open what only names its file. Where that fails every read will, and say so."""
    if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_PATH:
        return descriptor
    try:
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return descriptor
    os.close(descriptor)
    return opened


def _ancillary(descriptors: list[int]) -> list[tuple[int, int, array.array[int]]]:
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []


def _received(ancillary: list[tuple[int, int, bytes]]) -> Iterator[int]:
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(data) - len(data) % 4
            yield from array.array("i", data[:whole])


# --- a child's side ------------------------------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG = 1


def join_daemon(receives: object) -> Channel[In]:
    """Take the wire out of standard input; a child calls this first.

    From here the child dies with the daemon, ignores the terminal's Ctrl-C (the daemon decides who stops), is the first to go
    when memory runs out, and nothing it or its libraries print can reach the wire.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sock = socket.socket(fileno=os.dup(0))
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.close(null)
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("500")
    except OSError:  # a sandbox may hide /proc; then the kernel's own choice stands
        pass
    return Channel(sock, receives, reopens=True)
