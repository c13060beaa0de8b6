"""engine process: load one model, then transcribe what is sent until told to stop, several recordings at a time.

The wire is standard input. One frame in for each job (`Transcribe` with the source's descriptor), many out (`Progress`, `WindowDone`),
then `Finished`, `JobFailed` or `Abandoned`. Two threads: the front end prepares windows, this one runs the model and alone writes to
the wire. Between two steps of the model the wire is looked at, so that a stop is obeyed within one batch.
"""

from __future__ import annotations

import os

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime phones home otherwise; must stand before it is imported
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads spin, and the products here are small
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # CTranslate2's threads wait spinning: thrice the CPU on shared cores
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import resource
import select
import sys
import time
from collections.abc import Iterable

import msgspec
from loguru import logger

from whisperd import __version__
from whisperd.engine import model
from whisperd.engine.audio import Caps
from whisperd.engine.batching import Batcher
from whisperd.engine.boot import first_frames, watched
from whisperd.engine.cuda import CudaUnusable
from whisperd.engine.events import Call, Counts, Event, Lost, Refused, Shrunk
from whisperd.engine.failure import failure_of
from whisperd.engine.frontend import Feed, FrontEnd, Heard, decode_place
from whisperd.engine.mel import LogMel
from whisperd.engine.memory import memory_rss_mib
from whisperd.engine.model import Loaded, ModelAbsent, ModelUnusable
from whisperd.engine.work import Language, WindowWork
from whisperd.log import to_parent
from whisperd.vocabulary import Failure, FailureKind, Summary, Window
from whisperd.wire import (
    Abandon,
    Abandoned,
    BatchDone,
    BatchSet,
    BootFailed,
    Channel,
    EngineIn,
    EngineReady,
    Finished,
    Frame,
    JobFailed,
    LoadModel,
    OutOfMemory,
    Progress,
    SetBatch,
    Stop,
    Transcribe,
    Unload,
    Unloaded,
    WindowDone,
    WireClosed,
    join_daemon,
)

PROGRESS_EVERY_S = 10.0  # of audio
GATHER_S = 0.25  # for so long windows that are being prepared are waited for, to share a batch


class Beginning(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint remembers beside the text: the front end's place and the language that was chosen."""

    place: bytes
    language: str
    probability: float


class Task:
    """One job in hand: its feed, and its windows until they can be told in order."""

    def __init__(self, request: Transcribe, feed: Feed) -> None:
        self.request = request
        self.feed = feed
        self.next_number = request.windows_done
        self.taken = 0
        self.done: dict[int, WindowWork] = {}
        self.told_s = request.position_s

    @property
    def outstanding(self) -> int:
        """Windows taken from the front end and not told yet: what a death costs."""
        return self.taken - (self.next_number - self.request.windows_done)


class Engine:
    """The loop of one engine process: obey the wire, then take one bounded step of the model."""

    def __init__(self, channel: Channel[EngineIn], request: LoadModel, loaded: Loaded, frames: Iterable[Frame[EngineIn]]) -> None:
        self._channel = channel
        self._loaded = loaded
        self._caps = Caps(request.duration_max_s, request.channels_max, request.rate_max_hz)
        self._log_mel = LogMel(self._loaded.n_mels)
        self._front_end = FrontEnd()
        self._batcher = Batcher(self._loaded, request.batch)
        self._tasks: dict[int, Task] = {}
        self._first_frames = list(frames)
        self._stopping = False
        self._gather_until = 0.0
        self._retry_next = False
        self._counted = Counts()  # what BatchDone has told of encoder runs

    @property
    def _slots(self) -> int:
        return 2 * self._batcher.limit.asked

    def serve(self) -> None:
        loaded = self._loaded
        self._channel.send_all(
            EngineReady(
                model=loaded.name,
                revision=loaded.revision,
                device=loaded.device,
                compute_type=loaded.compute_type,
                encoder=loaded.encoder,
                slots=self._slots,
                load_s=round(loaded.load_s, 3),
                rss_mib=memory_rss_mib(),
                vram_mib=loaded.holding.loaded_mib if loaded.holding else None,
            )
        )
        for frame in self._first_frames:
            self._obey(frame)
        while not self._stopping:
            for frame in self._wait(None if self._nothing_to_do() else 0.0):
                self._obey(frame)
            for event in self._step():
                self._tell(event)
            self._follow_feeds()
        for job in list(self._tasks):
            self._end(job, Abandoned(job=job))
        self._front_end.stop()

    # --- the wire ---

    def _wait(self, timeout_s: float | None) -> list[Frame[EngineIn]]:
        """Frames from the daemon; returns early when the front end has news."""
        self._sleep(timeout_s)
        return self._channel.wait(0)

    def _sleep(self, timeout_s: float | None) -> None:
        """Until the daemon says something, or the front end has news."""
        select.select([self._channel.fileno(), self._front_end.fileno()], [], [], timeout_s)

    def _obey(self, frame: Frame[EngineIn]) -> None:
        match frame.message:
            case Stop():
                self._stopping = True
            case Transcribe() as request:
                self._begin(request, frame.descriptors[0])
            case Abandon(job=job) if job in self._tasks:
                self._end(job, Abandoned(job=job))
            case SetBatch(batch=batch):
                self._batcher.limit.ask(batch)
                self._channel.send_all(BatchSet(batch=self._batcher.limit.asked, slots=self._slots))
            case Unload() if not self._tasks:
                self._loaded.unload()
                self._channel.send_all(Unloaded(rss_mib=memory_rss_mib()))
            case _:  # Abandon for a job that is over already; LoadModel comes only once
                pass

    def _begin(self, request: Transcribe, descriptor: int) -> None:
        job = request.job
        try:
            self._loaded.reload()
            before = msgspec.msgpack.decode(request.front_end, type=Beginning) if request.front_end else None
            known = Language(before.language, before.probability) if before else None
            votes = self._batcher.begin(job, request.options, known)
            place = decode_place(before.place) if before else None
        except ModelUnusable as error:
            os.close(descriptor)
            self._lose(error)
            self._channel.send_all(Abandoned(job=job))
            return
        except (ValueError, msgspec.DecodeError) as error:
            os.close(descriptor)
            self._channel.send_all(JobFailed(job=job, failure=failure_of(error)))
            return
        feed = Feed(job, descriptor, request.options, caps=self._caps, log_mel=self._log_mel, place=place, votes=votes)
        self._tasks[job] = Task(request, feed)
        self._front_end.add(feed)

    def _lose(self, error: ModelUnusable) -> None:
        """The model cannot be had again here: a new engine is needed, and no job is to blame."""
        logger.warning(f"{error.what}; {error.hint}")
        self._stopping = True

    def _end(self, job: int, answer: Finished | JobFailed | Abandoned) -> None:
        """The last word on a job."""
        self._front_end.drop(job)
        self._batcher.forget(job)
        del self._tasks[job]
        self._channel.send_all(answer)

    # --- what next ---

    def _nothing_to_do(self) -> bool:
        batcher = self._batcher
        return not (batcher.to_encode or batcher.to_decode or batcher.to_retry or self._front_end.next(self._barred()))

    def _barred(self) -> set[int]:
        """Jobs that have as much under way as a death may cost."""
        batch = self._batcher.limit.asked
        return {job for job, task in self._tasks.items() if task.outstanding >= max(batch, task.request.options.language_windows)}

    def _step(self) -> list[Event]:
        """One bounded step: a full batch first, then what fills the next one."""
        batcher = self._batcher
        if batcher.full:
            return batcher.decode()
        if batcher.to_encode:
            return batcher.encode()
        self._retry_next = not self._retry_next  # a window that is hopeless holds up no other for longer than one pass
        if batcher.to_retry and self._retry_next:
            return batcher.retry()
        if self._may_fill():
            return []
        if batcher.to_decode:
            return batcher.decode()
        return batcher.retry() if batcher.to_retry else []

    def _may_fill(self) -> bool:
        """Take another window for the batch. A recording that is through waits for no window but the first ones of others."""
        coming = self._front_end.next(self._barred())
        waiting = self._batcher.jobs_waiting
        complete = any(self._tasks[job].feed.over and not self._tasks[job].feed.ready for job in waiting)
        if coming is not None and not (complete and self._tasks[coming.job].taken):
            work = self._front_end.take(self._barred())
            if work is not None:
                self._take(work)
            return True
        if not waiting or complete or coming is not None or self._batcher.to_retry or not self._front_end.busy:
            self._gather_until = 0.0
            return False
        self._gather_until = self._gather_until or time.monotonic() + GATHER_S
        left_s = self._gather_until - time.monotonic()
        if left_s <= 0:
            self._gather_until = 0.0
            return False
        self._sleep(left_s)
        return True

    def _take(self, work: WindowWork) -> None:
        task = self._tasks[work.job]
        if work.number < task.request.windows_done:
            return
        task.taken += not work.only_vote
        self._batcher.add(work)

    # --- what happened ---

    def _follow_feeds(self) -> None:
        for feed in self._front_end.look():
            task = self._tasks[feed.job]
            if (feed.over or feed.voted) and not feed.ready:
                self._batcher.heard_all(feed.job)
            if feed.error is not None or (feed.over and not feed.ready and not task.outstanding):
                self._conclude(feed)
            elif not task.outstanding and not feed.ready:
                self._progress(task, feed.reached_s, step_s=PROGRESS_EVERY_S)

    def _conclude(self, feed: Feed) -> None:
        """The front end is through, and so is the model, or there is nothing more for it."""
        error = feed.changed() or feed.error
        if error is not None:
            self._end(feed.job, JobFailed(job=feed.job, failure=failure_of(error)))
        elif feed.heard is not None:
            self._end(feed.job, Finished(job=feed.job, summary=self._summary(feed.heard)))

    def _tell(self, event: Event) -> None:
        match event:
            case WindowWork():
                self._window(event)
            case Call():
                self._batch_done(event)
            case Shrunk(windows=windows, beam=beam, frames=frames, limit=limit, what=what):
                self._channel.send_all(OutOfMemory(windows=windows, beam=beam, frames=frames, limit=limit, what=what))
            case Refused(job=job, error=error):
                self._end(job, JobFailed(job=job, failure=failure_of(error)))
            case Lost(error=error):
                self._lose(error)

    def _window(self, work: WindowWork) -> None:
        """A window has its text; tell it, and those after it that waited for it."""
        task = self._tasks.get(work.job)
        if task is None:
            return
        task.done[work.number] = work
        if work.options.mode == "sequential":
            self._front_end.written(work)
        while (ready := task.done.pop(task.next_number, None)) is not None:
            task.next_number += 1
            task.told_s = ready.end_s
            self._channel.send_all(
                WindowDone(job=work.job, window=window_of(ready), duration_s=task.feed.declared_s, front_end=self._beginning(ready))
            )

    def _beginning(self, work: WindowWork) -> bytes:
        common = self._batcher.language_of(work.job) or Language("", 0.0)
        return msgspec.msgpack.encode(Beginning(place=work.state, language=common.code, probability=common.probability))

    def _progress(self, task: Task, position_s: float, *, step_s: float) -> None:
        """Tell how far a recording was read where it has no speech."""
        if position_s >= task.told_s + step_s:
            task.told_s = position_s
            self._channel.send_all(Progress(job=task.request.job, position_s=round(position_s, 3), duration_s=task.feed.declared_s))

    def _batch_done(self, call: Call) -> None:
        counts = self._batcher.total
        self._channel.send_all(
            BatchDone(
                windows=call.windows,
                limit=call.limit,
                beam=call.beam,
                frames=call.frames,
                encoded=counts.encoded - self._counted.encoded,
                encoded_needed=counts.needed - self._counted.needed,
                took_s=round(call.took_s, 4),
                rss_mib=memory_rss_mib(),
                vram_used_mib=self._loaded.vram_used_mib(),
                vram_mib=self._loaded.vram_peak_mib(),
            )
        )
        self._counted = counts

    def _summary(self, heard: Heard) -> Summary:
        loaded = self._loaded
        return Summary(
            duration_s=heard.duration_s,
            speech_s=heard.speech_s,
            windows=heard.windows,
            source_sha256=heard.sha256,
            container=heard.container,
            codec=heard.codec,
            track=heard.track,
            tracks=heard.tracks,
            channels=heard.channels,
            doubts=heard.doubts,
            start_offset_s=heard.start_offset_s,
            model=loaded.name,
            model_revision=loaded.revision,
            device=loaded.device,
            compute_type=loaded.compute_type,
            encoder=loaded.encoder,
            engine_version=__version__,
        )


def window_of(work: WindowWork) -> Window:
    """A window as it goes into the ledger."""
    chosen, language = work.chosen, work.language
    return Window(
        index=work.number,
        start_s=round(work.start_s, 3),
        end_s=round(work.end_s, 3),
        language=language.code,
        language_probability=language.probability,
        segments=tuple(chosen.segments),
        channel=work.channel,
        tokens=tuple(chosen.tokens),
        seek=round(work.start_s * 100) + chosen.seek,
        verdict=work.verdict,
    )


def limit_resources() -> None:
    """No core dumps of other people's recordings; a bounded number of open files."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))


def main() -> int:
    to_parent()
    limit_resources()
    channel: Channel[EngineIn] = join_daemon(EngineIn)
    try:
        first = first_frames(channel)
        if first is None:
            return 0
        request, frames = first
        try:
            model.prepare(request)
            with watched(channel) as later:
                loaded = model.load(request)
        except (ModelAbsent, ModelUnusable, CudaUnusable) as error:
            channel.send_all(BootFailed(failure=Failure(kind=FailureKind.WAITING, code=error.code, what=error.what, hint=error.hint)))
            return 3
        Engine(channel, request, loaded, [*frames, *later]).serve()
    except WireClosed:  # the daemon is gone, and so is our work
        return 0
    return 0


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the front end may be inside a codec still, and the interpreter's own end would abort there
