"""Windows through the model: the same text as faster-whisper's own, each stretch encoded once, alone and in any company."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import SENTENCES, Studio, samples_of

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from faster_whisper.audio import decode_audio

from bench import clock_model
from whisperd.engine import model
from whisperd.engine.audio import Caps
from whisperd.engine.batching import Batcher, Call, Refused, Shrunk, Voting, ladder, stretches
from whisperd.engine.frontend import Feed
from whisperd.engine.mel import LogMel
from whisperd.engine.work import Language, Way, WindowWork
from whisperd.vocabulary import JobOptions, Segment
from whisperd.wire import LoadModel

CLIPS = ("meeting.wav", "stereo.wav", "memory.opus", "call.mp3", "price.ogg", "backup.flac", "job.m4a", "inbox.mkv", "telephone.wav")
CAPS = Caps(3600.0, 8, 192_000)
GREEDY = (0.0,)


def load(name: str) -> model.Loaded:
    return model.load(
        LoadModel(
            model=name,
            device="cpu",
            compute_type="int8",
            gpu="",
            cpu_threads=1,
            batch=4,
            encoder="ctranslate2",
            cache_dir="/nonexistent",
            offline=True,
            duration_max_s=3600.0,
            channels_max=8,
            rate_max_hz=192_000,
        )
    )


@pytest.fixture(scope="module")
def loaded() -> model.Loaded:
    return load("demo")


@pytest.fixture
def encodings(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length in frames of everything that goes through the encoder."""
    runs: list[int] = []
    batcher_run = Batcher._run_encoder

    def counted(self: Batcher, features: Sequence[Any]) -> list[Any]:
        runs.extend(item.shape[-1] for item in features)
        return batcher_run(self, features)

    monkeypatch.setattr(Batcher, "_run_encoder", counted)
    return runs


def clip(name: str) -> Path:
    with as_file(files("whisperd").joinpath("share", "clips", name)) as path:
        return path


def window(name: str, options: JobOptions, job: int = 1) -> WindowWork:
    """A whole clip as one window."""
    samples = decode_audio(str(clip(name)))
    length_s = len(samples) / 16_000
    features = LogMel(80)(samples)[:, :-1]
    return WindowWork(
        job=job, number=0, options=options, start_s=0.0, end_s=length_s, features=features, stretches_s=((0.2, length_s - 0.2),)
    )


def settle(batcher: Batcher) -> Iterator[Any]:
    """Step until nothing is left to do."""
    while batcher.to_encode or batcher.to_decode or batcher.to_retry:
        if batcher.to_encode:
            yield from batcher.encode()
        elif batcher.to_retry:
            yield from batcher.retry()
        else:
            yield from batcher.decode()


def decode(loaded: model.Loaded, works: Sequence[WindowWork], limit: int = 4) -> list[Any]:
    """Windows of different jobs, all at once."""
    batcher = Batcher(loaded, limit)
    for work in works:
        batcher.begin(work.job, work.options, None)
        batcher.add(work)
        batcher.heard_all(work.job)
    return list(settle(batcher))


def transcribe(loaded: model.Loaded, path: Path, options: JobOptions) -> list[Segment]:
    """A recording from its file to its segments, in one thread."""
    batcher = Batcher(loaded, 4)
    votes = batcher.begin(1, options, None)
    feed = Feed(1, os.open(path, os.O_RDONLY), options, caps=CAPS, log_mel=LogMel(loaded.n_mels), place=None, votes=votes)
    done: list[WindowWork] = []
    while not feed.over or feed.ready:
        if not feed.resting and not feed.over:
            feed.step()
        while feed.ready:
            batcher.add(feed.ready.popleft())
        if feed.over or feed.voted:
            batcher.heard_all(1)
        for event in settle(batcher):
            if isinstance(event, WindowWork):
                done.append(event)
                if options.mode == "sequential":
                    feed.written(event)
    feed.close()
    assert feed.error is None and feed.heard is not None
    assert [work.number for work in done] == list(range(feed.heard.windows))
    return [segment for work in done if work.chosen for segment in work.chosen.segments]


def assert_equal(ours: Sequence[Segment], theirs: Sequence[Any]) -> None:
    """Texts, times and words are the same; figures but for the rounding."""
    assert [(segment.text, segment.start_s, segment.end_s) for segment in ours] == [
        (segment.text.strip(), round(float(segment.start), 3), round(float(segment.end), 3)) for segment in theirs
    ]
    assert [[(word.text, word.start_s, word.end_s) for word in segment.words] for segment in ours] == [
        [(word.word, round(float(word.start), 3), round(float(word.end), 3)) for word in segment.words or ()] for segment in theirs
    ]
    for name in ("avg_logprob", "no_speech_prob", "compression_ratio", "temperature"):
        assert [getattr(segment, name) for segment in ours] == pytest.approx([getattr(segment, name) for segment in theirs], abs=1e-4)


def theirs(loaded: model.Loaded, audio: Any, **options: Any) -> list[Any]:
    found, _ = loaded.whisper.transcribe(audio, language="en", vad_filter=False, **options)
    return list(found)


# --- batched ---


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("words", [False, True])
def test_a_window_equals_faster_whisper(loaded: model.Loaded, name: str, words: bool) -> None:
    """Text, times, words and figures of a window are those of `WhisperModel.transcribe` on the same samples."""
    work = window(name, JobOptions(word_timestamps=words, temperatures=GREEDY))
    decode(loaded, [work])
    expected = theirs(loaded, decode_audio(str(clip(name))), temperature=[0.0], word_timestamps=words, condition_on_previous_text=False)
    assert work.chosen
    assert_equal(work.chosen.segments, expected)


def test_company_changes_nothing(loaded: model.Loaded) -> None:
    """Sixty mixtures of clips, tasks, beams, prompts and hot words, in batches of 1 to 8: every window's text is the one it has alone."""
    kinds = [
        JobOptions(temperatures=GREEDY),
        JobOptions(temperatures=GREEDY, beam_size=1),
        JobOptions(temperatures=GREEDY, patience=2.0),
        JobOptions(temperatures=GREEDY, initial_prompt="the meeting is on monday"),
        JobOptions(temperatures=GREEDY, hotwords="david sarah"),
        JobOptions(temperatures=GREEDY, word_timestamps=True),
    ]
    alone = {}
    for number, options in enumerate(kinds):
        for name in CLIPS:
            work = window(name, options)
            decode(loaded, [work], limit=1)
            assert work.chosen
            alone[number, name] = work.chosen.segments
    chance = random.Random(5)
    for _ in range(10):
        picked = [(chance.randrange(len(kinds)), chance.choice(CLIPS)) for _ in range(6)]
        works = [window(name, kinds[number], job) for job, (number, name) in enumerate(picked)]
        decode(loaded, works, limit=chance.randint(1, 8))
        for work, key in zip(works, picked, strict=True):
            assert work.chosen and work.chosen.segments == alone[key]


def test_each_stretch_is_encoded_once(loaded: model.Loaded, encodings: list[int]) -> None:
    """One window that ends with its speech costs one run of the encoder, whatever else is done with it; and it is counted."""
    works = [window(name, JobOptions(word_timestamps=True, temperatures=GREEDY), job) for job, name in enumerate(CLIPS)]
    batcher = Batcher(loaded, 4)
    for work in works:
        batcher.begin(work.job, work.options, None)
        batcher.add(work)
    calls = [event for event in settle(batcher) if isinstance(event, Call)]
    assert encodings == [3000] * len(CLIPS)
    assert batcher.total == (len(CLIPS), len(CLIPS))
    assert [call.windows for call in calls] == [4, 4, 1]


def test_short_windows_are_not_filled_up(loaded: model.Loaded, encodings: list[int]) -> None:
    """short_windows gives the encoder 10 s or what the clip needs; where the text is refused, the full window follows."""
    options = JobOptions(mode="short_windows", temperatures=GREEDY)
    work = window("meeting.wav", options)
    decode(loaded, [work])
    assert encodings == [1000]
    assert work.chosen and work.verdict.quality == "good"
    encodings.clear()
    work = window("meeting.wav", options)
    batcher = Batcher(loaded, 4)
    batcher.begin(1, options, None)
    batcher.add(work)
    work.features = np.random.default_rng(1).normal(0.0, 0.5, work.features.shape).astype(np.float32)  # no speech: no good text
    list(settle(batcher))
    assert encodings[:2] == [1000, 3000]
    assert len(work.attempts) == 2 and work.verdict.quality == "doubtful"


# --- sequential ---


@pytest.mark.parametrize("name", CLIPS)
def test_sequential_mode_equals_faster_whisper(loaded: model.Loaded, name: str) -> None:
    """A file in sequential mode has the segments of `WhisperModel.transcribe(file)` with its defaults."""
    ours = transcribe(loaded, clip(name), JobOptions(mode="sequential", language="en"))
    assert_equal(ours, theirs(loaded, str(clip(name)), beam_size=5))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"word_timestamps": True},
        {"initial_prompt": "the meeting is on monday", "hotwords": "david"},
        {"previous_text": False},
        {"beam_size": 1, "patience": 1.0},
    ],
    ids=["defaults", "words", "prompt", "no previous text", "greedy"],
)
def test_long_recordings_in_sequential_mode_equal_faster_whisper(loaded: model.Loaded, studio: Studio, options: dict[str, Any]) -> None:
    """Over several passes, with the text before as context, too."""
    path = studio.long(SENTENCES[:24])
    given = dict(options)
    given["condition_on_previous_text"] = given.pop("previous_text", True)
    expected = theirs(loaded, str(path), temperature=[0.0], **given)
    ours = transcribe(loaded, path, JobOptions(mode="sequential", language="en", temperatures=GREEDY, **options))
    assert_equal(ours, expected)
    assert expected[-1].seek > 3000


# --- what is pure ---


def test_the_ladder() -> None:
    """As asked; then at full length; then warmer; then pause by pause where there are pauses."""

    def ways(**options: Any) -> list[Way]:
        pauses = options.pop("pauses", 1)
        spoken = tuple((float(number), number + 0.5) for number in range(pauses))
        features = np.zeros((80, 700), dtype=np.float32)
        return ladder(
            WindowWork(job=1, number=0, options=JobOptions(**options), start_s=0.0, end_s=7.0, features=features, stretches_s=spoken)
        )

    assert ways(temperatures=(0.0, 0.4)) == [Way(), Way(temperature=0.4)]
    assert ways(temperatures=(0.0,), pauses=3) == [Way(), Way(by_stretch=True)]
    assert ways(temperatures=(0.0,), mode="short_windows") == [Way(frames=1000), Way()]
    assert ways(temperatures=(0.0, 0.4), mode="sequential", pauses=3) == [Way(), Way(temperature=0.4)]


def test_stretches_lie_in_the_window() -> None:
    """Pauses become cuts; what is too short goes with the stretch before it; nothing reaches past the window."""
    features = np.zeros((80, 1000), dtype=np.float32)
    work = WindowWork(
        job=1,
        number=0,
        options=JobOptions(),
        start_s=100.0,
        end_s=110.0,
        features=features,
        stretches_s=((100.1, 103.0), (104.0, 104.3), (106.0, 109.9)),
    )
    assert stretches(work) == [(0, 450), (580, 1000)]


# --- when it goes wrong ---


def test_out_of_memory_halves_the_batch_and_loses_nothing(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that does not fit is done again in smaller ones, with the same texts; one window alone that does not fit is refused."""
    fits = 2
    generate = Batcher._generate

    def scarce(self: Batcher, works: Sequence[WindowWork]) -> Any:
        if len(works) > fits:
            raise RuntimeError("CUDA failed with error out of memory")
        return generate(self, works)

    monkeypatch.setattr(Batcher, "_generate", scarce)
    works = [window(name, JobOptions(temperatures=GREEDY), job) for job, name in enumerate(CLIPS[:5])]
    events = decode(loaded, works, limit=4)
    assert [event.limit for event in events if isinstance(event, Shrunk)] == [2]
    assert sum(isinstance(event, WindowWork) for event in events) == 5
    fits = 0
    events = decode(loaded, works[:1] and [window("meeting.wav", JobOptions(temperatures=GREEDY))], limit=2)
    assert [type(event) for event in events] == [Shrunk, Shrunk, Refused]


def test_an_error_in_a_shared_call_blames_one(loaded: model.Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the decoder does not like about one window, its neighbours have their text; only its own job is refused."""
    generate = Batcher._generate

    def picky(self: Batcher, works: Sequence[WindowWork]) -> Any:
        if any(work.job == 2 for work in works):
            raise RuntimeError("something about that window")
        return generate(self, works)

    monkeypatch.setattr(Batcher, "_generate", picky)
    works = [window(name, JobOptions(temperatures=GREEDY), job) for job, name in enumerate(CLIPS[:4])]
    events = decode(loaded, works, limit=4)
    assert [event.job for event in events if isinstance(event, Refused)] == [2]
    assert {event.job for event in events if isinstance(event, WindowWork)} == {0, 1, 3}


# --- temperature ---


def noisy(name: str, seed: int, job: int) -> WindowWork:
    """A clip that the gate sends up the ladder: speech under loud noise."""
    work = window(name, JobOptions(best_of=3), job)
    noise = np.random.default_rng(seed).normal(0.0, 0.5, work.features.shape)
    work.features = (0.4 * work.features + noise).astype(np.float32)
    return work


def test_the_ladder_is_the_same_every_time(loaded: model.Loaded) -> None:
    """Windows that are sampled at a temperature come out the same alone, in any order, and after others: their sound is the seed."""
    made = {(name, seed): noisy(name, seed, 1) for name in CLIPS[:4] for seed in (1, 2)}
    alone = {}
    for key, work in made.items():
        decode(loaded, [work])
        alone[key] = work.attempts
    sampled = [attempt for attempts in alone.values() for attempt in attempts if attempt.way.temperature > 0]
    assert len(sampled) >= 3
    keys = list(made)
    random.Random(3).shuffle(keys)
    works = [noisy(*key, job) for job, key in enumerate(keys)]
    decode(loaded, works, limit=3)
    for key, work in zip(keys, works, strict=True):
        assert [attempt.drawn for attempt in work.attempts] == [attempt.drawn for attempt in alone[key]]
        assert work.chosen and (work.verdict.passes, work.verdict.complaints) == (len(alone[key]), work.chosen.complaints)


# --- languages ---


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> model.Loaded:
    """A model that knows 99 languages, of random weights: it hears English in everything."""
    size = clock_model.Size(width=384, layers=1, heads=6)
    directory = str(tmp_path_factory.mktemp("clock") / "model")
    clock_model.write_ctranslate2(directory, size, clock_model.weights(size, 12))
    return load(directory)


def piece(job: int, number: int, options: JobOptions, speech_s: float = 8.0) -> WindowWork:
    features = np.random.default_rng(number).normal(0.0, 0.5, (80, 1000)).astype(np.float32)
    start_s = 10.0 * number
    return WindowWork(
        job=job,
        number=number,
        options=options,
        start_s=start_s,
        end_s=start_s + 10,
        features=features,
        stretches_s=((start_s + 1, start_s + 1 + speech_s),),
    )


def test_no_text_before_the_vote(multilingual: model.Loaded, encodings: list[int]) -> None:
    """With automatic language, windows are encoded and wait until enough have voted; then nothing is encoded again."""
    batcher = Batcher(multilingual, 4)
    options = JobOptions(language_windows=3, temperatures=GREEDY)
    assert batcher.begin(1, options, None) == 3
    for number in range(2):
        batcher.add(piece(1, number, options))
    assert not list(settle(batcher)) and batcher.language_of(1) is None
    batcher.add(piece(1, 2, options))
    done = [event for event in settle(batcher) if isinstance(event, WindowWork)]
    assert [work.number for work in done] == [0, 1, 2] and len(encodings) == 3
    assert batcher.language_of(1) == done[0].language
    assert done[0].language and done[0].language.code == "en" and done[0].language.probability > 0.5


def test_a_short_recording_votes_with_what_it_has(multilingual: model.Loaded) -> None:
    """Fewer windows than voters: the end of the recording closes the vote, before or after they are encoded."""
    for heard_first in (True, False):
        batcher = Batcher(multilingual, 4)
        options = JobOptions(temperatures=GREEDY)
        batcher.begin(1, options, None)
        batcher.add(piece(1, 0, options))
        if heard_first:
            batcher.heard_all(1)
            events = list(settle(batcher))
        else:
            events = list(settle(batcher))
            batcher.heard_all(1)
            events += list(settle(batcher))
        assert sum(isinstance(event, WindowWork) for event in events) == 1


def test_sequential_mode_votes_before_its_first_text(multilingual: model.Loaded, studio: Studio, encodings: list[int]) -> None:
    """The first pass and later ones choose the language; only then is there text, pass by pass to the end."""
    path = studio.long(SENTENCES[:24])
    segments = transcribe(multilingual, path, JobOptions(mode="sequential", temperatures=GREEDY, language_windows=2, previous_text=False))
    length_s = len(samples_of(path)) / 32_000
    assert segments and segments[-1].end_s == pytest.approx(length_s, abs=0.1)
    assert len(encodings) == -(-int(length_s * 100) // 3000) + 1  # each pass once, and one more that only voted


def test_votes_weigh_as_much_as_was_spoken() -> None:
    """A long window outvotes two short ones; the probability that is reported is the mean over all speech."""
    voting = Voting(3)
    for number, (speech_s, german) in enumerate(((1.0, 0.1), (1.0, 0.2), (8.0, 0.9))):
        voting.count(piece(1, number, JobOptions(), speech_s), [("<|de|>", german), ("<|en|>", 1 - german)])
    assert voting.winner() == Language("de", round((0.1 + 0.2 + 8 * 0.9) / 10, 4))


def test_languages_and_tasks_share_a_batch(multilingual: model.Loaded) -> None:
    """German, English, translation into English and automatic: one call of the decoder for all."""
    batcher = Batcher(multilingual, 4)
    kinds = [
        JobOptions(language="de", temperatures=GREEDY),
        JobOptions(language="en", temperatures=GREEDY),
        JobOptions(language="de", task="translate", temperatures=GREEDY),
        JobOptions(language_per_window=True, temperatures=GREEDY),
    ]
    works = [piece(job, 0, options) for job, options in enumerate(kinds)]
    for work in works:
        batcher.begin(work.job, work.options, None)
        batcher.add(work)
        batcher.heard_all(work.job)
    calls = [event for event in settle(batcher) if isinstance(event, Call)]
    assert [call.windows for call in calls] == [4]
    assert [work.language and work.language.code for work in works] == ["de", "en", "de", "en"]
    prompts = [batcher._prompt(work) for work in works]
    token = multilingual.whisper.hf_tokenizer.token_to_id
    assert prompts[0] == [token("<|startoftranscript|>"), token("<|de|>"), token("<|transcribe|>")]
    assert prompts[2] == [token("<|startoftranscript|>"), token("<|de|>"), token("<|translate|>")]


def test_a_language_that_no_model_knows_is_refused(multilingual: model.Loaded) -> None:
    """Before anything is spent on the file."""
    with pytest.raises(ValueError, match="language"):
        Batcher(multilingual, 4).begin(1, JobOptions(language="xx"), None)
