"""engine: the engine child as the daemon drives it, over the real wire, without the daemon.

Owns: one child, jobs in flight up to its slots, what came back and when, the counters of its batches.
Fails with `Failed` when the child does not start, ends, or fails a job.
"""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from bench import clock_model
from bench.measure import Failed, cpu_s
from whisperd.child import Child
from whisperd.dispatcher.optimiser.values import Policy
from whisperd.dispatcher.pool import environment
from whisperd.vocabulary import JobOptions, Window
from whisperd.wire import (
    BatchDone,
    BootFailed,
    EngineOut,
    EngineReady,
    Finished,
    JobFailed,
    LoadModel,
    Message,
    Transcribe,
    Unload,
    Unloaded,
    WindowDone,
    WireClosed,
)

PATIENCE_S = 60.0
GPU_BATCH = 16


@dataclass
class Job:
    """One recording in the engine's hands."""

    path: str
    options: JobOptions
    sent_at: float = 0.0  # monotonic
    ended_at: float = 0.0
    windows: list[Window] = field(default_factory=list)
    finished: Finished | None = None

    @property
    def text(self) -> str:
        return " ".join(segment.text.strip() for window in self.windows for segment in window.segments)

    @property
    def latency_s(self) -> float:
        return self.ended_at - self.sent_at


@dataclass
class Counters:
    """What the engine's batches add up to."""

    batches: int = 0
    windows: int = 0
    room: int = 0
    encoded: int = 0
    encoded_needed: int = 0

    def add(self, done: BatchDone) -> None:
        self.batches += 1
        self.windows += done.windows
        self.room += done.limit
        self.encoded += done.encoded
        self.encoded_needed += done.encoded_needed


def model_of(size: str, home: str, tokens: int = clock_model.DEFAULT_TOKENS) -> str:
    """What a `--size` means to the engine: the embedded model, a directory, or a clock model (made when absent)."""
    return size if size == "demo" or os.path.isabs(size) else clock_model.made(home, size, tokens=tokens)


def demo_directory() -> str:
    """Where the embedded model lies, for peers."""
    from importlib.resources import files

    return str(files("whisperd").joinpath("share", "demo_model"))


def options_of(model: str, *, mode: str = "batched", language: str = "auto", beam_size: int = 5) -> JobOptions:
    return JobOptions(model=model, mode=mode, language=language, beam_size=beam_size)


class Engine:
    """A living engine. `ready_s` and `boot_cpu_s` are the wall and CPU time until it was ready."""

    def __init__(
        self,
        model: str,
        *,
        threads: int = 1,
        batch: int = 0,
        encoder: str = "auto",
        device: str = "cpu",
        compute_type: str = "int8",
        state_dir: str = "",
        wait: bool = True,
    ) -> None:
        self.began = time.monotonic()
        usual = Policy()
        request = LoadModel(
            model=model,
            device=device,
            compute_type=compute_type,
            gpu="",
            cpu_threads=threads,
            batch=batch or (usual.cpu_batch_first if device == "cpu" else GPU_BATCH),
            encoder=encoder,
            cache_dir="/nonexistent",
            offline=True,
            duration_max_s=86_400.0,
            channels_max=32,
            rate_max_hz=768_000,
        )
        env = environment(state_dir, request)
        self.child: Child[Any] = Child(name="engine", module="whisperd.engine", receives=EngineOut, now=self.began, env=env)
        self.counters = Counters()
        self.flying: dict[int, Job] = {}
        self.listener: Callable[[Message], None] = lambda message: None  # hears every frame
        self.child.send(request)
        if not wait:  # only to be killed
            return
        self.ready = self._await_ready()
        self.ready_s = time.monotonic() - self.began
        self.boot_cpu_s = cpu_s(self.child.pid)

    def _await_ready(self) -> EngineReady:
        for message in self._frames():
            if isinstance(message, EngineReady):
                return message
            if isinstance(message, BootFailed):
                raise Failed(f"the engine cannot start: {message.failure.what}")
        raise Failed("the engine ended before it was ready")

    def _frames(self) -> Iterator[Any]:
        """Frames as they come. Raises Failed when the engine ends, or says nothing."""
        while True:
            try:
                heard = self.child.channel.wait(PATIENCE_S)
            except WireClosed as error:
                raise Failed(f"the engine {self._gone()}: {' | '.join(self.child.last_lines)}") from error
            self.child.read_stderr()
            if not heard:
                raise Failed(f"the engine says nothing for {PATIENCE_S:g} s: {' | '.join(self.child.last_lines)}")
            yield from (frame.message for frame in heard)

    def send(self, number: int, job: Job) -> None:
        """One job more in flight."""
        self.flying[number] = job
        job.sent_at = time.monotonic()
        self.child.send(Transcribe(job=number, options=job.options), (os.open(job.path, os.O_RDONLY),))

    def ended(self) -> Iterator[int]:
        """The numbers of the jobs as they end, until none is in flight; more may be sent meanwhile. Raises Failed."""
        frames = self._frames()
        while self.flying:
            message = next(frames)
            self.listener(message)
            match message:
                case BatchDone():
                    self.counters.add(message)
                case WindowDone():
                    self.flying[message.job].windows.append(message.window)
                case JobFailed():
                    raise Failed(f"{self.flying[message.job].path}: {message.failure.what}")
                case Finished():
                    job = self.flying.pop(message.job)
                    job.ended_at, job.finished = time.monotonic(), message
                    yield message.job

    def work(self, jobs: list[Job]) -> None:
        """All jobs to their end, as many in flight as there are slots."""
        waiting = deque(enumerate(jobs))
        for _ in range(min(self.ready.slots, len(jobs))):
            self.send(*waiting.popleft())
        for _ in self.ended():
            if waiting:
                self.send(*waiting.popleft())

    def unload(self) -> None:
        """Have it give its model's memory back."""
        self.child.send(Unload())
        next(message for message in self._frames() if isinstance(message, Unloaded))

    def stop(self) -> str:
        """Ask it to end; how it ended. Its CPU time is then among this process's children."""
        self.child.drain(time.monotonic())
        return self._gone()

    def kill(self) -> str:
        self.child.kill(time.monotonic(), "")
        return self._gone()

    def _gone(self) -> str:
        readable, _, _ = select.select([self.child.pidfd], [], [], PATIENCE_S)
        if not readable:
            raise Failed("the engine does not end")
        return self.child.gone(time.monotonic())
