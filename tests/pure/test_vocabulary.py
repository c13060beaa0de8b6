"""The nouns: frozen, strict, and how windows become one transcript."""

from __future__ import annotations

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given

from whisperd.vocabulary import (
    LIVE,
    Failure,
    FailureKind,
    JobOptions,
    Quality,
    Segment,
    Sighting,
    State,
    Summary,
    Transcript,
    Verdict,
    Window,
    assemble,
    quality_of,
)

SUMMARY = Summary(
    duration_s=100.0,
    speech_s=90.0,
    windows=0,
    source_sha256="ab",
    container="wav",
    codec="pcm_s16le",
    model="demo",
    model_revision="1",
    device="cpu",
    compute_type="int8",
    engine_version="1",
)


def window(index: int, *texts: str, language: str = "en", length_s: float = 30.0, probability: float = 0.9) -> Window:
    begin = index * 30.0
    segments = tuple(Segment(start_s=begin, end_s=begin + 1, text=text) for text in texts)
    return Window(
        index=index, start_s=begin, end_s=begin + length_s, language=language, language_probability=probability, segments=segments
    )


def put_together(*windows: Window, language: str = "auto") -> Transcript:
    options = JobOptions(language=language)
    return assemble(source="talk.wav", size=7, mtime_ns=9, windows=list(windows), options=options, summary=SUMMARY)


def test_text_is_in_the_order_of_the_recording() -> None:
    """Windows that come in any order (a batch mixes them) give the text in the order of the recording, every segment once."""
    transcript = put_together(window(2, "d"), window(0, "a", "b"), window(10, "e"), window(1, "c"))
    assert [segment.text for segment in transcript.segments] == ["a", "b", "c", "d", "e"]


def test_the_language_is_that_of_most_of_the_audio() -> None:
    """Seconds decide, not the number of windows; the probability is the mean over the windows of that language."""
    transcript = put_together(
        window(0, language="cs", length_s=5.0),
        window(1, language="cs", length_s=5.0),
        window(2, language="de", length_s=20.0, probability=0.5),
        window(3, language="cs", length_s=5.0),
        window(4, language="de", length_s=1.0, probability=0.75),
    )
    assert (transcript.language, transcript.language_probability) == ("de", 0.625)


def test_a_tie_goes_to_the_language_heard_first() -> None:
    """With equal seconds the language that comes first in the recording wins, whatever order the windows came in."""
    for windows in ((window(0, language="cs"), window(1, language="de")), (window(1, language="de"), window(0, language="cs"))):
        assert put_together(*windows).language == "cs"


@pytest.mark.parametrize(("asked", "told"), [("auto", ""), ("cs", "cs")])
def test_a_recording_without_speech(asked: str, told: str) -> None:
    """No window at all is a transcript without text: its language is the one that was asked for, or unknown; never a guess."""
    transcript = put_together(language=asked)
    assert (transcript.language, transcript.language_probability, transcript.segments) == (told, 0.0, ())


def test_provenance_travels_along() -> None:
    """Source, options and summary are those that were given, and the schema has a name."""
    transcript = put_together(window(0, "a"), language="en")
    assert (transcript.source, transcript.size, transcript.mtime_ns) == ("talk.wav", 7, 9)
    assert (transcript.options, transcript.summary) == (JobOptions(language="en"), SUMMARY)
    assert transcript.schema == "whisperd.transcript/1"


def test_speakers_are_told_as_they_spoke() -> None:
    """Windows of two channels: the text is in the order of the recording, not channel after channel."""
    left = Window(
        index=0,
        start_s=0.0,
        end_s=30.0,
        language="en",
        language_probability=1.0,
        segments=(Segment(start_s=0, end_s=1, text="a", speaker="Anna"), Segment(start_s=9, end_s=10, text="c", speaker="Anna")),
    )
    right = msgspec.structs.replace(left, index=1, channel=1, segments=(Segment(start_s=5, end_s=6, text="b", speaker="Bert"),))
    assert [(segment.speaker, segment.text) for segment in put_together(left, right).segments] == [
        ("Anna", "a"),
        ("Bert", "b"),
        ("Anna", "c"),
    ]


def test_the_worst_window_is_the_verdict() -> None:
    """One doubtful window makes a doubtful transcript; a second pass that helped is told as such; a recording that may be cut off is
    doubtful however good its text looks."""

    def judged(*verdicts: Verdict, doubts: tuple[str, ...] = ()) -> Quality:
        return quality_of([msgspec.structs.replace(window(number), verdict=verdict) for number, verdict in enumerate(verdicts)], doubts)

    second, bad = Verdict(quality="second_pass", passes=2), Verdict(quality="doubtful", passes=7, complaints=("repetition", "coverage"))
    assert judged(Verdict(), Verdict()) == Quality(windows=2)
    assert judged(Verdict(), second) == Quality(verdict="second_pass", windows=2, second_pass=1)
    assert judged(second, bad, Verdict()) == Quality(
        verdict="doubtful", windows=3, second_pass=1, doubtful=1, complaints=("coverage", "repetition")
    )
    assert judged(Verdict(), doubts=("3 s are missing",)).verdict == "doubtful"
    assert judged() == Quality()


WINDOWS = st.lists(
    st.builds(
        window,
        st.integers(0, 500),
        st.text(max_size=5),
        language=st.sampled_from(("cs", "de", "en")),
        length_s=st.sampled_from((0.0, 1.0, 7.5, 30.0)),
        probability=st.floats(0, 1),
    ),
    max_size=12,
    unique_by=lambda each: each.index,
)


@given(windows=WINDOWS, data=st.data())
def test_the_same_windows_give_the_same_bytes(windows: list[Window], data: st.DataObject) -> None:
    """The transcript is the same to the last byte in whatever order the windows came, and reads back equal from JSON."""
    written = msgspec.json.encode(put_together(*windows))
    assert msgspec.json.encode(put_together(*data.draw(st.permutations(windows)))) == written
    again = msgspec.json.decode(written, type=Transcript)
    assert msgspec.json.encode(again) == written
    assert [segment.text for segment in again.segments] == [
        segment.text for each in sorted(windows, key=lambda each: each.index) for segment in each.segments
    ]
    spoken = {name: sum(each.end_s - each.start_s for each in windows if each.language == name) for name in ("cs", "de", "en")}
    assert not windows or spoken[again.language] == max(spoken.values())
    assert 0.0 <= again.language_probability <= 1.0


def test_same_content_is_size_and_time() -> None:
    """A remount changes device and inode numbers and no content; another size or modification time is other content."""
    one = Sighting(path=b"a", dev=1, inode=2, size=3, mtime_ns=4, ctime_ns=5)
    assert one.same_content(Sighting(path=b"b", dev=9, inode=9, size=3, mtime_ns=4, ctime_ns=9))
    assert not one.same_content(Sighting(path=b"a", dev=1, inode=2, size=4, mtime_ns=4, ctime_ns=5))
    assert not one.same_content(Sighting(path=b"a", dev=1, inode=2, size=3, mtime_ns=5, ctime_ns=5))


def test_values_never_change_and_accept_nothing_else() -> None:
    """A noun cannot be changed; reading one refuses fields it does not know, missing ones and wrong kinds."""
    failure = Failure(kind=FailureKind.PERMANENT, code="no_audio", what="none")
    with pytest.raises(AttributeError):
        failure.code = "other"  # type: ignore[misc]
    for text in (
        b'{"kind":"permanent","code":"a","what":"b","more":1}',
        b'{"kind":"permanent","code":"a"}',
        b'{"kind":"sometimes","code":"a","what":"b"}',
        b'{"kind":"permanent","code":1,"what":"b"}',
    ):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(text, type=Failure)


def test_states_are_the_designs() -> None:
    """The states are those of DESIGN §4; live are those whose source is still needed."""
    assert [str(state) for state in State] == ["seen", "ready", "running", "transcribed", "done", "failed", "cancelled", "gone"]
    assert LIVE == (State.SEEN, State.READY, State.RUNNING)
