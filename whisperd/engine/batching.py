"""batching: windows of any jobs through the model: each stretch encoded once, decoded together, judged one by one.

Owns: what shares a call of the decoder and in which order the model works. `WhisperModel.transcribe` is taken apart into its own
steps here (encode, detect the language on that output, prompt, generate, split by time stamps, align words), so that a window's
text is the same alone and in company. What CTranslate2 allows in one call (src/models/whisper.cc, `check_prompts`): prompts of
equal length with the start of transcript at one place, equal frame counts, one beam; languages and tasks may differ.

    add → [vote for the language] → encode → pending → decode (up to `limit` together) → judge ─┬─▶ done
                                       ▲                                                        │
                                       └────────── further pass, next way of the ladder ◀───────┘

Fails with what CTranslate2 raises, in `Refused` for the windows concerned. Out of memory halves the limit first; a window that does not
fit even alone is tried once more on a model that was loaded anew; when that cannot be loaded, `Lost` says that this process is of no use.
"""

from __future__ import annotations

import time
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from whisperd.engine import transcript
from whisperd.engine.events import Call, Counts, Event, Lost, Refused, Shrunk
from whisperd.engine.limit import Limit
from whisperd.engine.memory import is_out_of_memory
from whisperd.engine.model import Loaded, ModelUnusable
from whisperd.engine.voting import Voting
from whisperd.engine.ways import ladder, stretches
from whisperd.engine.work import UNHEARD, Attempt, Drawn, Language, WindowWork
from whisperd.vocabulary import JobOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

OWN_LANGUAGE_MIN = 0.5  # a window less sure than this speaks the recording's language (`language_per_window`)
PASSED_OVER_MAX = 2


class Batcher:
    """All windows in the hands of one model. One thread only; every method is one bounded step."""

    def __init__(self, loaded: Loaded, limit: int) -> None:
        self._loaded = loaded
        self._whisper = loaded.whisper
        self._multilingual = bool(loaded.whisper.model.is_multilingual)
        self.limit = Limit(limit)
        self._lost = False  # the model could not be loaded anew
        self._tokenizers: dict[tuple[str, str], Any] = {}
        self._languages: dict[int, Language] = {}
        self._votings: dict[int, Voting] = {}
        self._unencoded: deque[WindowWork] = deque()
        self._pending: list[WindowWork] = []
        self._alone: deque[WindowWork] = deque()  # for passes at a temperature above zero
        self._passed_over = 0  # calls without the oldest pending window
        self._sampled: WindowWork | None = None  # whose samples the generator is drawing
        self._needed: dict[int, set[tuple[int, int, int, int]]] = {}
        self.total = Counts()

    # --- jobs ---

    def begin(self, job: int, options: JobOptions, known: Language | None) -> int:
        """A job is coming; `known` is its language when an earlier life chose it. How many windows will vote for its language.

        Raises ValueError for an unknown language.
        """
        self._needed[job] = set()
        language = known
        if not self._multilingual:
            language = Language("en", 1.0)
        elif language is None and options.language != "auto":
            language = Language(options.language, 1.0)
        if language is None:
            self._votings[job] = Voting(options.language_windows)
            return options.language_windows
        self._tokenizer(options.task, language.code)
        self._languages[job] = language
        return 0

    def heard_all(self, job: int) -> None:
        """No more windows of this job will come: those that are here choose the language."""
        if job in self._votings:
            self._votings[job].complete = True
            self._close_vote(job)

    def forget(self, job: int) -> None:
        """The job is over or not wanted any more."""
        for queue in (self._unencoded, self._pending, self._alone):
            for work in [work for work in queue if work.job == job]:
                queue.remove(work)
        for of_job in (self._languages, self._votings, self._needed):
            of_job.pop(job, None)

    def _wanted(self, work: WindowWork) -> bool:
        """Whether its job has not been refused a moment ago, and there is a model."""
        return work.job in self._needed and not self._lost

    def add(self, work: WindowWork) -> None:
        """Take one window in."""
        work.ways = ladder(work)
        self._begin_attempt(work)
        self._unencoded.append(work)

    # --- what there is to do ---

    @property
    def to_encode(self) -> bool:
        return bool(self._unencoded)

    @property
    def to_decode(self) -> bool:
        return bool(self._pending)

    @property
    def to_retry(self) -> bool:
        return bool(self._alone)

    @property
    def full(self) -> bool:
        """Whether one call of the decoder would be as large as allowed."""
        return len(self._pending) >= self.limit.value and len(self._together()) >= self.limit.value

    def language_of(self, job: int) -> Language | None:
        """What was chosen for this job; None before the vote."""
        return self._languages.get(job)

    @property
    def jobs_waiting(self) -> set[int]:
        """Jobs with a window that waits for the decoder."""
        return {work.job for work in self._pending}

    # --- steps ---

    def encode(self) -> list[Event]:
        """Encode one window, or on a GPU as many of equal length as a batch holds; language on the way."""
        works = [self._unencoded.popleft()]
        if self._loaded.stacked:
            same = [work for work in self._unencoded if work.span[2] == works[0].span[2]][: self.limit.value - 1]
            for work in same:
                self._unencoded.remove(work)
            works += same
        try:
            outputs = self._run_encoder([_padded(work) for work in works])
        except Exception as error:  # noqa: BLE001 - CTranslate2 raises RuntimeError for everything
            return self._trouble(error, works, "encode")
        events: list[Event] = []
        for work, output in zip(works, outputs, strict=True):
            if not self._wanted(work):
                continue
            start, end, frames = work.span
            work.encoded[work.span] = output
            self._count(work.job, (work.number if not work.only_vote else -1, round(work.start_s * 100) + start, end, frames))
            events += self._after_encoding(work)
        return events

    def decode(self) -> list[Event]:
        """One call of the decoder on as many windows as can share it."""
        works = self._together()
        beam, frames = works[0].options.beam_size, works[0].span[2]
        oldest, limit, began = self._pending[0], self.limit.value, time.monotonic()
        for work in works:
            self._pending.remove(work)
        try:
            results = self._generate(works)
        except Exception as error:  # noqa: BLE001
            if len(works) == 1 or is_out_of_memory(error):
                return self._trouble(error, works, "generate")
            self._pending[:0] = works
            for work in works:
                work.apart = True
            return []
        self._passed_over = 0 if oldest in works else self._passed_over + 1
        self.limit.calm()
        events: list[Event] = [Call(len(works), limit, beam, frames, time.monotonic() - began)]
        for work, drawn in zip(works, results, strict=True):
            if self._wanted(work):
                events += self._take(work, drawn)
        return events

    def retry(self) -> list[Event]:
        """One pass of one window, alone, at a temperature above zero. A window that has begun is gone through with."""
        work = next((work for work in self._alone if work is self._sampled), self._alone[0])
        self._alone.remove(work)
        try:
            drawn = self._sample(work)
        except Exception as error:  # noqa: BLE001
            return self._trouble(error, [work], "generate")
        return self._take(work, drawn)

    # --- encoding and language ---

    def _run_encoder(self, features: Sequence[Any]) -> list[Any]:
        """Encoder outputs, one [1, frames / 2, d] for each window."""
        stack = np.ascontiguousarray(np.stack(features))
        if self._loaded.torch_encoder is not None:
            return [self._loaded.torch_encoder.encode(stack)]
        output = self._whisper.model.encode(transcript.storage(stack))
        return [output] if len(features) == 1 else transcript.rows(output)

    def _count(self, job: int, stretch: tuple[int, int, int, int]) -> None:
        """One run of the encoder, and whether it was on something new."""
        new = stretch not in self._needed[job]
        self._needed[job].add(stretch)
        self.total = Counts(self.total.encoded + 1, self.total.needed + new)

    def _after_encoding(self, work: WindowWork) -> list[Event]:
        voting = self._votings.get(work.job)
        if voting is not None or (self._own_language(work) and work.language is UNHEARD):
            try:
                probabilities = self._whisper.model.detect_language(work.encoded[work.span])[0]
            except Exception as error:  # noqa: BLE001
                return self._trouble(error, [work], "encode")
            work.language = Language(probabilities[0][0][2:-2], round(float(probabilities[0][1]), 4))
            if voting is not None:
                voting.count(work, probabilities)
                self._close_vote(work.job)
                return []
        self._enqueue(work)
        return []

    def _close_vote(self, job: int) -> None:
        """Choose the language once enough windows have voted, or all there are."""
        voting = self._votings[job]
        to_come = not voting.complete or any(work.job == job for work in self._unencoded)
        if not voting.works or (to_come and len(voting.works) < voting.wanted):
            return
        del self._votings[job]
        self._languages[job] = voting.winner()
        for work in voting.works:
            self._enqueue(work)

    def _own_language(self, work: WindowWork) -> bool:
        return self._multilingual and work.options.language_per_window and work.options.language == "auto"

    def _language_of(self, work: WindowWork) -> Language:
        common = self._languages[work.job]
        if self._own_language(work) and work.language.probability >= OWN_LANGUAGE_MIN:
            return work.language
        return common

    def _tokenizer(self, task: str, language: str) -> Any:
        if (task, language) not in self._tokenizers:
            self._tokenizers[task, language] = transcript.tokenizer(self._whisper, task, language)
        return self._tokenizers[task, language]

    # --- decoding ---

    def _enqueue(self, work: WindowWork) -> None:
        """The pass under way is encoded: to the decoder."""
        if work.only_vote:
            return
        work.language = self._language_of(work)
        if work.attempt.way.temperature > 0:
            self._alone.append(work)
        else:
            self._pending.append(work)

    def _prompt(self, work: WindowWork) -> list[int]:
        return transcript.prompt(self._whisper, self._tokenizer(work.options.task, work.language.code), work)

    def _together(self) -> list[WindowWork]:
        """The pending windows that fill a call best, the oldest first, at most `limit`; after a few calls without it, the oldest's own.

        Those of a call that failed are each alone: so it shows whose fault it was.
        """
        limit = self.limit.value
        groups: dict[tuple[object, ...], list[WindowWork]] = {}
        for work in self._pending:
            options = work.options
            shape = (len(self._prompt(work)), work.span[2], options.beam_size, options.patience, id(work) if work.apart else None)
            groups.setdefault(shape, []).append(work)
        oldest, *_ = groups.values()
        best = max(groups.values(), key=lambda group: min(len(group), limit))
        return (oldest if self._passed_over >= PASSED_OVER_MAX else best)[:limit]

    def _generate(self, works: Sequence[WindowWork]) -> list[Drawn]:
        options = works[0].options
        return [transcript.drawn(result, 0.0) for result in self._call(works, beam_size=options.beam_size, patience=options.patience)]

    def _sample(self, work: WindowWork) -> Drawn:
        """One pass at a temperature. What is drawn depends on the window alone: the generator is seeded by its sound (decision 0010)."""
        if self._sampled is not work:
            self._loaded.reseed(zlib.crc32(work.features.tobytes()))
            self._sampled = work
        temperature = work.attempt.way.temperature
        result = self._call(
            [work],
            beam_size=1,
            num_hypotheses=work.options.best_of,
            sampling_topk=0,
            sampling_temperature=temperature,
        )[0]
        return transcript.drawn(result, temperature)

    def _call(self, works: Sequence[WindowWork], **search: Any) -> list[Any]:
        return list(
            self._whisper.model.generate(
                transcript.stacked([work.encoded[work.span] for work in works]),
                [self._prompt(work) for work in works],
                max_length=self._whisper.max_length,
                return_scores=True,
                return_no_speech_prob=True,
                suppress_blank=True,
                suppress_tokens=transcript.suppressed(self._tokenizer(works[0].options.task, works[0].language.code)),
                max_initial_timestamp_index=transcript.MAX_INITIAL_TIMESTAMP_INDEX,
                **search,
            )
        )

    # --- after decoding ---

    def _take(self, work: WindowWork, drawn: Drawn) -> list[Event]:
        """A pass is written: go on in the window, or judge it."""
        attempt = work.attempt
        tokenizer = self._tokenizer(work.options.task, work.language.code)
        try:
            unfinished = transcript.write(self._whisper, tokenizer, work, drawn)
        except Exception as error:  # noqa: BLE001 - the times of words are the model's work, too
            return self._trouble(error, [work], "generate")
        if unfinished:
            self._pass(work)
            return []
        attempt.complaints = transcript.judge(tokenizer, work)
        work.attempts.append(attempt)
        if transcript.again(work):
            self._begin_attempt(work)
            self._pass(work)
            return []
        transcript.conclude(tokenizer, work)
        work.encoded.clear()
        return [work]

    def _begin_attempt(self, work: WindowWork) -> None:
        way = work.ways.pop(0)
        spans = stretches(work) if way.by_stretch else [(0, work.features.shape[1])]
        work.attempt = Attempt(way, spans, spans[0][0])

    def _pass(self, work: WindowWork) -> None:
        """To the encoder, unless this stretch went through it before."""
        if work.span in work.encoded:
            self._enqueue(work)
        else:
            self._unencoded.appendleft(work)

    # --- memory ---

    def _trouble(self, error: Exception, works: list[WindowWork], where: str) -> list[Event]:
        """Too much memory: smaller batches from now on, and at last a fresh model. Anything else: the jobs concerned are refused."""
        scarce = is_out_of_memory(error)
        alone = len(works) == 1 and self.limit.value == 1
        afresh = scarce and alone and not works[0].afresh
        refusal = MemoryError(f"a window does not fit even alone: {self._loaded.memory_told()}; {error}") if scarce else error
        try:
            if afresh:
                self._loaded.unload()
            self._loaded.reload()  # nothing where it is: sampling may have failed between two models
        except ModelUnusable as lost:
            self._lost = True
            return [*(self._refuse(works, refusal) if alone or not scarce else ()), Lost(lost)]
        if not scarce or (alone and not afresh):
            return self._refuse(works, refusal)
        if afresh:
            works[0].afresh = True
            return self._again(works, where, f"{error}; the model was loaded anew")
        self.limit.halve(len(works))
        return self._again(works, where, str(error))

    def _refuse(self, works: list[WindowWork], error: Exception) -> list[Event]:
        jobs = sorted({work.job for work in works})
        for job in jobs:
            self.forget(job)
        return [Refused(job, error) for job in jobs]

    def _again(self, works: list[WindowWork], where: str, what: str) -> list[Event]:
        """Back to where they were, and the news."""
        if where == "encode":
            self._unencoded.extendleft(reversed(works))
        else:
            for work in reversed(works):
                self._pass(work) if work.attempt.way.temperature > 0 else self._pending.insert(0, work)
        return [Shrunk(len(works), works[0].options.beam_size, works[0].span[2], self.limit.value, what)]


def _padded(work: WindowWork) -> Any:
    """The features of the pass under way, filled up with zeros as faster-whisper does."""
    start, end, frames = work.span
    padded = np.zeros((work.features.shape[0], frames), dtype=np.float32)
    padded[:, : end - start] = work.features[:, start:end]
    return padded
