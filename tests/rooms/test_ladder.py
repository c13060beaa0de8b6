"""When memory runs out: smaller batches, then a fresh model, then the job is given back; and what a batch may hold meanwhile."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_model import fresh, request

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bench import clock_model
from whisperd.engine import model
from whisperd.engine.batching import Batcher
from whisperd.engine.events import Event, Lost, Refused, Shrunk
from whisperd.engine.failure import failure_of
from whisperd.engine.limit import CLIMB_AFTER, Limit
from whisperd.engine.memory import release_freed_memory
from whisperd.engine.work import WindowWork
from whisperd.vocabulary import JobOptions

OPTIONS = JobOptions(model="demo", language="en", temperatures=(0.0,))
GPU_FULL = "CUDA failed with error out of memory"
ROOT = Path(__file__).resolve().parents[2]
PLACES = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "rooms")])


@pytest.fixture
def loaded() -> model.Loaded:
    return model.load(request())


def windows(count: int, options: JobOptions = OPTIONS) -> list[WindowWork]:
    """Full windows of different jobs, of noise of their own."""
    made = []
    for number in range(count):
        features = np.random.default_rng(number).normal(0.0, 0.4, (80, 3000)).astype(np.float32)
        work = WindowWork(job=number, number=0, options=options, start_s=0.0, end_s=30.0, features=features, stretches_s=((0.1, 29.9),))
        made.append(work)
    return made


def batcher_with(loaded: model.Loaded, works: Sequence[WindowWork], limit: int) -> Batcher:
    batcher = Batcher(loaded, limit)
    for work in works:
        batcher.begin(work.job, work.options, None)
        batcher.add(work)
        batcher.heard_all(work.job)
    return batcher


def settle(batcher: Batcher) -> Iterator[Event]:
    """Step until nothing is left to do, or no model to do it with."""
    while batcher.to_encode or batcher.to_decode or batcher.to_retry:
        events = batcher.encode() if batcher.to_encode else batcher.decode() if batcher.to_decode else batcher.retry()
        yield from events
        if any(isinstance(event, Lost) for event in events):
            return


def texts_of(events: Sequence[Event]) -> dict[int, list[str]]:
    return {event.job: [segment.text for segment in event.chosen.segments] for event in events if isinstance(event, WindowWork)}


class Scarce:
    """A decoder for which memory is there only for so many windows, until the model is loaded anew."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loaded: model.Loaded, *, fits: int, fits_afresh: int) -> None:
        self.fits, self.reloads = fits, 0
        self.calls: list[int] = []
        generate, unload = Batcher._generate, model.Loaded.unload

        def scarce(batcher: Batcher, works: Sequence[WindowWork]) -> Any:
            self.calls.append(len(works))
            if len(works) > self.fits:
                raise RuntimeError(GPU_FULL)
            return generate(batcher, works)

        def counted(of: model.Loaded) -> None:
            self.reloads += 1
            self.fits = fits_afresh
            unload(of)

        monkeypatch.setattr(Batcher, "_generate", scarce)
        monkeypatch.setattr(model.Loaded, "unload", counted)


# --- the rungs -------------------------------------------------------------------------------------------------------------------


def test_a_fresh_model_is_the_last_but_one_rung(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that does not fit alone is tried once more after the model was loaded anew; then all have the texts they have otherwise."""
    calm = texts_of(list(settle(batcher_with(loaded, windows(3), 2))))
    scarce = Scarce(monkeypatch, loaded, fits=0, fits_afresh=1)
    events = list(settle(batcher_with(loaded, windows(3), 2)))
    assert [(event.windows, event.limit) for event in events if isinstance(event, Shrunk)] == [(2, 1), (1, 1)]
    assert "loaded anew" in next(event.what for event in events if isinstance(event, Shrunk) and event.windows == 1)
    assert scarce.reloads == 1
    assert texts_of(events) == calm and len(calm) == 3


def test_a_window_that_never_fits_is_refused_once_and_the_next_one_is_not(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its job fails as out of memory, with what there was; the engine goes on with other jobs when there is memory again."""
    scarce = Scarce(monkeypatch, loaded, fits=0, fits_afresh=0)
    batcher = batcher_with(loaded, windows(1), 1)
    events = list(settle(batcher))
    assert [type(event) for event in events] == [Shrunk, Refused]
    failure = failure_of(next(event.error for event in events if isinstance(event, Refused)))
    assert (failure.kind, failure.code) == ("transient", "out_of_memory")
    assert "does not fit even alone" in failure.what and "this process holds" in failure.what and GPU_FULL in failure.what
    assert scarce.reloads == 1
    scarce.fits = 1
    batcher.begin(7, OPTIONS, None)
    work = windows(1)[0]
    work.job = 7
    batcher.add(work)
    assert list(texts_of(list(settle(batcher)))) == [7]


def test_an_engine_without_a_model_says_so(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory does not suffice to load it anew: the job that needed that is refused, no other, and `Lost` says the rest."""
    Scarce(monkeypatch, loaded, fits=0, fits_afresh=1)

    def full(of: model.Loaded) -> None:
        raise model.ModelTooLarge("cannot load the model")

    batcher = batcher_with(loaded, windows(3), 1)
    while batcher.to_encode:
        batcher.encode()
    monkeypatch.setattr(model.Loaded, "reload", full)
    assert [type(event) for event in batcher.decode()] == [Refused, Lost]


def test_samples_that_do_not_fit_leave_a_model(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is loaded anew to sample (decision 0010). Where memory runs out just then, it is there again for the next step."""
    reader, failures = model._reader, iter([True, False])

    def scarce(*args: Any, **given: Any) -> Any:
        if next(failures, False):
            raise RuntimeError(GPU_FULL)
        return reader(*args, **given)

    monkeypatch.setattr(model, "_reader", scarce)
    with pytest.raises(RuntimeError, match="out of memory"):
        loaded.reseed(1)
    assert loaded.whisper.model is None
    loaded.reload()
    assert loaded.whisper.model.model_is_loaded
    assert len(texts_of(list(settle(batcher_with(loaded, windows(1), 1))))) == 1


class Failing:
    """CTranslate2's model, one step of which fails at first for lack of memory."""

    def __init__(self, core: Any, step: str, failures: int, **answers: Any) -> None:
        self._core, self._step, self._failures, self._answers = core, step, failures, answers

    def __getattr__(self, name: str) -> Any:
        if name == self._step and self._failures:
            self._failures -= 1
            raise RuntimeError(GPU_FULL)
        return self._answers.get(name) or getattr(self._core, name)


def test_the_times_of_words_are_on_the_ladder_too(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out after the text is there: the window is done again, and has the same words at the same times."""
    options = JobOptions(model="demo", language="en", temperatures=(0.0,), word_timestamps=True)
    calm = list(settle(batcher_with(loaded, windows(2, options), 2)))
    monkeypatch.setattr(loaded.whisper, "model", Failing(loaded.whisper.model, "align", 2))
    events = list(settle(batcher_with(loaded, windows(2, options), 2)))
    assert [type(event) for event in events if isinstance(event, Shrunk | Refused | Lost)] == [Shrunk, Shrunk]
    spoken = [{event.job: event.chosen.segments for event in run if isinstance(event, WindowWork)} for run in (calm, events)]
    assert spoken[0] == spoken[1]
    assert any(segment.words for segments in spoken[0].values() for segment in segments)


def test_the_choice_of_a_language_is_on_the_ladder_too(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out when a window is asked for its language: it is asked again."""
    calm = texts_of(list(settle(batcher_with(loaded, windows(2), 2))))
    core = Failing(loaded.whisper.model, "detect_language", 2, detect_language=lambda encoded: [[("<|en|>", 1.0)]])
    monkeypatch.setattr(loaded.whisper, "model", core)
    monkeypatch.setattr(Batcher, "_own_language", lambda batcher, work: True)
    events = list(settle(batcher_with(loaded, windows(2), 2)))
    assert [type(event) for event in events if isinstance(event, Shrunk | Refused | Lost)] == [Shrunk, Shrunk]
    assert texts_of(events) == calm


# --- the real thing ----------------------------------------------------------------------------------------------------------------

REAL = """
from tests.rooms import test_ladder
answer = test_ladder.under_a_limit()
"""


def size_bytes() -> int:
    """Of this process's address space."""
    with open("/proc/self/statm", encoding="ascii") as sizes:
        return int(sizes.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def under_a_limit() -> list[list[Any]]:
    """Twelve windows with more and more memory, and at last without a limit: lowered limits, jobs done, jobs done with another text."""
    loaded = model.load(request())
    calm = texts_of(list(settle(batcher_with(loaded, windows(12), 12))))
    told = []
    for room_mib in (8, 32, 48, None):
        loaded.unload()
        loaded.reload()
        works = windows(12)
        release_freed_memory()
        limit = resource.RLIM_INFINITY if room_mib is None else size_bytes() + (room_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        try:
            events = list(settle(batcher_with(loaded, works, 12)))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        texts = texts_of(events)
        other = sum(text != calm[job] for job, text in texts.items())
        told.append([[event.limit for event in events if isinstance(event, Shrunk)], len(texts), other])
    return told


def test_the_ladder_with_true_lack_of_memory() -> None:
    """The kernel refuses the process more memory. It lives; with some memory all windows are done in smaller batches; whatever is done has
    the text that it has otherwise; and when there is memory again nothing is left of it."""
    told = fresh(REAL, PYTHONPATH=PLACES)
    assert any(lowered and max(lowered) < 12 and done == 12 for lowered, done, _ in told), told
    assert [other for _, _, other in told] == [0] * len(told), told
    assert told[-1] == [[], 12, 0]


TOO_LARGE = """
import resource
from tests.rooms import test_ladder
from whisperd.engine import model
model.load(test_ladder.request()).unload()
resource.setrlimit(resource.RLIMIT_AS, (test_ladder.size_bytes() + (70 << 20), resource.RLIM_INFINITY))
try:
    model.load(test_ladder.request(model=DIRECTORY, compute_type="float32"))
except model.ModelUnusable as error:
    answer = [error.code, error.what, error.hint]
"""


def test_a_model_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    """The kernel refuses what its weights need: that is said with a code of its own, for it may pass."""
    made = Path(clock_model.made(str(tmp_path), "tiny"))
    snapshot = tmp_path / "snapshots" / "0123abcd"  # whose name is its revision: nothing but the weights needs much memory
    snapshot.parent.mkdir()
    made.rename(snapshot)
    code, what, hint = fresh(TOO_LARGE.replace("DIRECTORY", repr(str(snapshot))), PYTHONPATH=PLACES)
    assert code == "out_of_memory", what
    assert str(snapshot) in what and "smaller model" in hint


# --- one step at a time --------------------------------------------------------------------------------------------------------------


def test_a_step_is_one_call_of_the_decoder(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a call fails for one window's sake: the windows of that call are tried alone one step after the other, so that a stop
    is seen between any two of them."""
    generate = Batcher._generate
    calls: list[int] = []

    def picky(batcher: Batcher, works: Sequence[WindowWork]) -> Any:
        calls.append(len(works))
        if any(work.job == 2 for work in works):
            raise RuntimeError("something about that window")
        return generate(batcher, works)

    monkeypatch.setattr(Batcher, "_generate", picky)
    batcher = batcher_with(loaded, windows(4), 4)
    events: list[Event] = []
    while batcher.to_encode or batcher.to_decode:
        before = len(calls)
        events += batcher.encode() if batcher.to_encode else batcher.decode()
        assert len(calls) <= before + 1
    assert calls[0] == 4 and set(calls[1:]) == {1}
    assert [event.job for event in events if isinstance(event, Refused)] == [2]
    assert sorted(texts_of(events)) == [0, 1, 3]


# --- how many windows ----------------------------------------------------------------------------------------------------------------


def test_a_limit_follows_what_is_asked() -> None:
    limit = Limit(4)
    for asked in (8, 1, 16, 0):
        limit.ask(asked)
        assert limit.value == limit.asked == max(1, asked)


def test_a_limit_lowered_for_memory_is_climbed_back_to() -> None:
    """Asking for more, or for less and then more, does not lift it; calm does, step by step, up to what is asked by then."""
    limit = Limit(8)
    limit.halve(8)
    assert (limit.value, limit.asked) == (4, 8)
    limit.ask(16)
    limit.ask(2)
    assert limit.value == 2
    limit.ask(16)
    assert limit.value == 4
    seen = [limit.value]
    for _ in range(5 * CLIMB_AFTER):
        limit.calm()
        if limit.value != seen[-1]:
            seen.append(limit.value)
    assert seen == [4, 8, 16]


def test_a_smaller_batch_that_did_not_fit_counts() -> None:
    """What was tried is halved, not what is allowed; never below one window; trouble begins the calm anew."""
    limit = Limit(16)
    limit.halve(6)
    assert limit.value == 3
    for _ in range(CLIMB_AFTER - 1):
        limit.calm()
    limit.halve(1)
    assert limit.value == 1
    limit.calm()
    assert limit.value == 1
