"""scripted_engine: a real process that speaks the engine's wire and does with each file what is written in it.

A file is JSON. `windows` are reported at once; with `length_s` instead, windows of 30 s are decoded in batches, those of several files
together. `then` is what happens at the end ("finish", "crash", "hold"), `after` the path of a file to wait for first, `ticking` to tell
of progress until then, `batches` and `out_of_memory` frames to send, `poison` to die by SIGSEGV in the batch with the first window.

SCRIPTED is JSON as well:
  slots      jobs in hand until a SetBatch says otherwise (twice the batch when absent)
  revision   of the model
  log        a file to which every frame taken is appended
  echo       be the model, on the device, with the compute type that was asked for
  load_s     how long loading takes
  window_s   how long a batch takes
  boot       a file, JSON: what happens at a start, by "gpu/model/compute_type" (patterns; the first that fits): {"fail": {failure}},
             {"exit": status}, {"out_of_memory": true}, {"load_s": seconds}; of a list each start takes the first away
  vram       {"dir": where the fake libnvidia-ml looks for living processes, "gpus": {uuid: index}, "capacity_mib": of each GPU,
             "weights_mib": of a loaded model, "window_mib": more for each window of the largest batch so far}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import resource
import signal
import sys
import time
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from whisperd.engine.limit import Limit
from whisperd.vocabulary import Failure, FailureKind, Segment, Summary, Window
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

ME = json.loads(os.environ["SCRIPTED"])
WINDOW_S = 30.0
AHEAD_MAX = 4  # windows of one file that a batch may hold, as the real engine's front end offers them
LOOK_S = 0.01  # for files that others wait for
NO_ROOM = {"kind": "waiting", "code": "out_of_memory", "what": "no room for the model", "hint": "make room"}


class Died(Exception):
    """This start ends with a status."""


# --- the GPU's memory ------------------------------------------------------------------------------------------------------------


class Memory:
    """What this process holds of its GPU, shown to the fake libnvidia-ml; nothing on a CPU."""

    def __init__(self, gpu: str) -> None:
        given = ME.get("vram", {})
        self.index: int | None = given.get("gpus", {}).get(gpu)
        self.held_mib = 0
        if self.index is None:
            return
        self.weights_mib, self.window_mib, self.capacity_mib = (given[name] for name in ("weights_mib", "window_mib", "capacity_mib"))
        self.dir = given["dir"]
        self.path = os.path.join(self.dir, f"{self.index}.{os.getpid()}")
        self.file = os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o644)
        self.show(0)

    def take(self, windows: int) -> bool:
        """Hold what a batch of this size needs, if there is room. What was needed once is kept."""
        if self.index is None:
            return True
        need_mib = max(self.held_mib, self.weights_mib + windows * self.window_mib)
        if need_mib > self.held_mib and need_mib + self.others_mib() > self.capacity_mib:
            return False
        self.held_mib = need_mib
        return True

    def others_mib(self) -> int:
        names = set(os.listdir(self.dir)) - {os.path.basename(self.path)}
        return sum(self._of(name) for name in names if name.startswith(f"{self.index}."))

    def _of(self, name: str) -> int:
        try:
            os.kill(int(name.partition(".")[2]), 0)
            with open(os.path.join(self.dir, name), encoding="ascii") as file:
                return int(file.read().split()[0])
        except (OSError, ValueError, IndexError):  # gone, or not shown yet
            return 0

    def show(self, busy_percent: int) -> None:
        if self.index is not None:
            os.pwrite(self.file, b"%8d %3d\n" % (self.held_mib, busy_percent), 0)

    def told_mib(self) -> int | None:
        return None if self.index is None else self.held_mib

    def gone(self) -> None:
        if self.index is not None:
            os.unlink(self.path)


# --- files -----------------------------------------------------------------------------------------------------------------------


class Work:
    """One file in hand."""

    def __init__(self, order: Transcribe, descriptor: int) -> None:
        self.order = order
        with os.fdopen(descriptor, "rb") as file:
            content = file.read()
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.script: dict[str, Any] = json.loads(content)
        self.batched = "length_s" in self.script or "poison" in self.script
        self.length_s = float(self.script.get("length_s", WINDOW_S))
        self.windows = math.ceil(self.length_s / WINDOW_S) if self.batched else int(self.script.get("windows", 1))
        self.next = order.windows_done  # of a batched one
        self.told_s = 0.0

    @property
    def waits(self) -> bool:
        return "after" in self.script and not os.path.exists(self.script["after"])

    @property
    def left(self) -> int:
        """Windows to be decoded in batches."""
        return self.windows - self.next if self.batched else 0

    def window(self, index: int) -> Window:
        length_s = WINDOW_S if self.batched else 1.0
        start_s = length_s * index
        end_s = min(start_s + length_s, self.length_s) if self.batched else start_s + length_s
        return Window(
            index=index,
            start_s=start_s,
            end_s=end_s,
            language="en",
            language_probability=1.0,
            segments=(Segment(start_s=start_s, end_s=end_s, text=f"window {index}"),),
            tokens=(10 * index, 10 * index + 1),
            seek=round(100 * start_s),
        )

    def window_done(self, index: int) -> WindowDone:
        return WindowDone(
            job=self.order.job,
            window=self.window(index),
            duration_s=self.length_s if self.batched else None,
            front_end=b"state %d" % index,
        )


@dataclass
class Batch:
    """One call under way: how many windows of each job."""

    windows: dict[int, int]
    limit: int
    began: float

    @property
    def size(self) -> int:
        return sum(self.windows.values())


# --- the engine ------------------------------------------------------------------------------------------------------------------


class Engine:
    """One engine with its model."""

    def __init__(self, channel: Channel[EngineIn], request: LoadModel) -> None:
        self.channel = channel
        self.model, self.device, self.compute_type = "scripted", "cpu", "none"
        if ME.get("echo"):
            self.model, self.device, self.compute_type = request.model, request.device, request.compute_type
        self.limit = Limit(request.batch)
        self.memory = Memory(request.gpu)
        self.hands: dict[int, Work] = {}
        self.batch: Batch | None = None
        self.stopping = False

    def ready(self, load_s: float) -> None:
        self.memory.show(0)
        self.channel.send_all(
            EngineReady(
                model=self.model,
                revision=ME["revision"],
                device=self.device,
                compute_type=self.compute_type,
                encoder="none",
                slots=ME.get("slots", 2 * self.limit.asked),
                load_s=load_s,
                rss_mib=100,
                vram_mib=self.memory.told_mib(),
            )
        )

    def serve(self) -> None:
        """Until told to stop; a batch under way is finished first."""
        while not (self.stopping and self.batch is None):
            for frame in self.channel.wait(self.patience_s()):
                note(frame.message)
                self.obey(frame.message, frame.descriptors)
            self.step_batch()
            for job in [job for job, work in self.hands.items() if not work.left and self.conclude(work)]:
                del self.hands[job]
        for job in self.hands:
            self.channel.send_all(Abandoned(job=job))

    def patience_s(self) -> float | None:
        if self.batch is not None:
            return max(0.0, self.batch.began + ME.get("window_s", 0.0) - time.monotonic())
        if not self.hands:
            return None
        return 0.0 if any(work.left and not work.waits for work in self.hands.values()) else LOOK_S

    def obey(self, message: EngineIn, descriptors: list[int]) -> None:
        match message:
            case Transcribe():
                work = self.hands[message.job] = Work(message, descriptors[0])
                self.begin(work)
            case Abandon(job=job):
                if self.hands.pop(job, None):
                    self.channel.send_all(Abandoned(job=job))
            case SetBatch(batch=batch):
                self.limit.ask(batch)
                self.channel.send_all(BatchSet(batch=batch, slots=2 * batch))
            case Unload():
                self.channel.send_all(Unloaded(rss_mib=10))
            case Stop():
                self.stopping = True

    # --- files whose windows are told at once ---

    def begin(self, work: Work) -> None:
        if not work.batched:
            for index in range(work.order.windows_done, work.windows):
                self.channel.send_all(work.window_done(index))
        usual = {"windows": 1, "limit": 4, "beam": 5, "frames": 3000, "encoded": 1, "encoded_needed": 1, "took_s": 0.1, "rss_mib": 100}
        for batch in work.script.get("batches", []):
            self.channel.send_all(BatchDone(**{**usual, **batch}))
        for _ in range(work.script.get("out_of_memory", 0)):
            self.channel.send_all(OutOfMemory(windows=4, beam=5, frames=3000, limit=2, what="no room"))

    def conclude(self, work: Work) -> bool:
        """Do what the file says; True when it is out of our hands."""
        if work.waits:
            if work.script.get("ticking") and time.monotonic() - work.told_s > 0.1:
                work.told_s = time.monotonic()
                self.channel.send_all(Progress(job=work.order.job, position_s=1.0, duration_s=None))
            return False
        match work.script.get("then", "finish"):
            case "finish":
                self.channel.send_all(Finished(job=work.order.job, summary=self.summary(work)))
                return True
            case "crash":
                os.kill(os.getpid(), signal.SIGSEGV)
        return False

    def summary(self, work: Work) -> Summary:
        length_s = work.length_s if work.batched else 9.0
        return Summary(
            duration_s=length_s,
            speech_s=length_s,
            windows=work.windows,
            source_sha256=work.sha256,
            container="json",
            codec="json",
            model=self.model,
            model_revision=ME["revision"],
            device=self.device,
            compute_type=self.compute_type,
            engine_version="0",
        )

    # --- files whose windows are decoded in batches ---

    def step_batch(self) -> None:
        """Tell of a batch whose time is over, and begin the next one."""
        now = time.monotonic()
        if self.batch is not None and now >= self.batch.began + ME.get("window_s", 0.0):
            self.tell(self.batch, now)
            self.batch = None
        if self.batch is None and not self.stopping:
            self.batch = self.begin_batch(now)
            self.memory.show(95 if self.batch else 0)

    def begin_batch(self, now: float) -> Batch | None:
        """As many windows as may share a call; fewer, and at last none of a job, where memory does not allow them."""
        while taken := self.gathered():
            size = sum(taken.values())
            if self.memory.take(size):
                if any(self.hands[job].script.get("poison") for job in taken):
                    os.kill(os.getpid(), signal.SIGSEGV)
                return Batch(taken, self.limit.value, now)
            if size == 1:
                (job,) = taken
                del self.hands[job]
                failure = Failure(kind=FailureKind.TRANSIENT, code="out_of_memory", what="a window does not fit even alone")
                self.channel.send_all(JobFailed(job=job, failure=failure))
            else:
                self.limit.halve(size)
                self.channel.send_all(OutOfMemory(windows=size, beam=5, frames=3000, limit=self.limit.value, what="no room"))
        return None

    def gathered(self) -> dict[int, int]:
        """One window of each job in turn, until the limit."""
        ready = {job: min(work.left, AHEAD_MAX) for job, work in self.hands.items() if work.left and not work.waits}
        taken: dict[int, int] = {}
        for turn in range(AHEAD_MAX):
            for job, left in ready.items():
                if left > turn and sum(taken.values()) < self.limit.value:
                    taken[job] = turn + 1
        return taken

    def tell(self, batch: Batch, now: float) -> None:
        self.limit.calm()
        self.channel.send_all(
            BatchDone(
                windows=batch.size,
                limit=batch.limit,
                beam=5,
                frames=3000,
                encoded=batch.size,
                encoded_needed=batch.size,
                took_s=now - batch.began,
                rss_mib=100,
                vram_mib=self.memory.told_mib(),
            )
        )
        for job, count in batch.windows.items():
            work = self.hands.get(job)  # it may have been abandoned meanwhile
            for _ in range(count if work else 0):
                self.channel.send_all(work.window_done(work.next))
                work.next += 1


# --- starting --------------------------------------------------------------------------------------------------------------------


def outcome(request: LoadModel) -> dict[str, Any]:
    """What is to happen at this start; a list in the boot file is one start shorter then."""
    if "boot" not in ME:
        return {}
    kind = f"{request.gpu}/{request.model}/{request.compute_type}"
    try:
        file = open(ME["boot"], "r+", encoding="utf-8")  # noqa: SIM115
    except FileNotFoundError:
        return {}
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        starts = json.load(file)
        found = next((starts[pattern] for pattern in starts if fnmatchcase(kind, pattern)), {})
        if isinstance(found, list):
            found, listed = (found[0] if found else {}), found
            del listed[:1]
            file.seek(0)
            file.truncate()
            json.dump(starts, file)
    return found


def boot(channel: Channel[EngineIn], request: LoadModel) -> Engine | None:
    """An engine that is ready, or None when told to stop meanwhile. Raises Died."""
    wanted = outcome(request)
    load_s = float(wanted.get("load_s", ME.get("load_s", 0.0)))
    until = time.monotonic() + load_s
    while (left_s := until - time.monotonic()) > 0:
        for frame in channel.wait(left_s):
            note(frame.message)
            if isinstance(frame.message, Stop):
                return None
    if "exit" in wanted:
        raise Died(wanted["exit"])
    engine = Engine(channel, request)
    failure = wanted.get("fail")
    if wanted.get("out_of_memory") or not engine.memory.take(0):
        failure = NO_ROOM
    if failure:
        engine.memory.gone()
        channel.send_all(BootFailed(failure=Failure(**{"kind": "waiting", **failure})))
        raise Died(3)
    engine.ready(load_s)
    return engine


def note(message: EngineIn) -> None:
    if "log" not in ME:
        return
    told: dict[str, Any] = {"pid": os.getpid(), "kind": type(message).__name__}
    match message:
        case LoadModel():
            told |= {"gpu": message.gpu, "model": message.model, "compute_type": message.compute_type, "batch": message.batch}
        case SetBatch():
            told |= {"batch": message.batch}
        case Abandon():
            told |= {"job": message.job}
        case Transcribe():
            told |= {
                "job": message.job,
                "windows_done": message.windows_done,
                "position_s": message.position_s,
                "front_end": message.front_end.decode(),
            }
    with open(ME["log"], "a", encoding="utf-8") as log:
        log.write(json.dumps(told) + "\n")


def main() -> int:
    channel: Channel[EngineIn] = join_daemon(EngineIn)
    engine: Engine | None = None
    try:
        while engine is None:
            for frame in channel.wait(None):
                note(frame.message)
                if isinstance(frame.message, Stop):
                    return 0
                if isinstance(frame.message, LoadModel):
                    engine = boot(channel, frame.message)
                    if engine is None:
                        return 0
        engine.serve()
    except WireClosed:
        pass
    except Died as death:
        return int(death.args[0])
    finally:
        if engine is not None:
            engine.memory.gone()
    return 0


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.exit(main())
