"""render and names: the five formats and the names of files, as pure functions of their arguments."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from itertools import pairwise

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.subtitle_readers import Cue, read_srt, read_vtt, runs_forward
from whisperd.outbox.failures import BadName, UnknownFormat
from whisperd.outbox.names import NAME_BYTES_MAX, components, fit_name, temporary
from whisperd.outbox.publish import Action, decide
from whisperd.outbox.render import FORMATS, render, timestamp
from whisperd.outbox.subtitles import SHAPE, subtitles
from whisperd.outbox.text import one_line, squeezed
from whisperd.vocabulary import JobOptions, Quality, Segment, Summary, Transcript, Verdict, WindowVerdict, Word

NASTY = [
    "00:00:01,000 --> 00:00:02,000",
    "a ---> b -->",
    "-\x00->",
    "one\r\n\r\n2\r\n00:00:03,000 --> 00:00:04,000\r\nforged",
    "<v Somebody>&amp; <i>&lt;</i>",
    "NOTE not a note",
    "tab\tand\x0bvertical\x85next\u2028line\u2029paragraph",
    "שלום \u202eright to left\u202c עולם",
    "👩‍👩‍👧‍👦 🏳️‍🌈",
    "\ufeffbyte order mark",
    "\udc80 half a character",
    "\x00\x1b[31m\x7f",
    " \u00a0\u3000 ",
    "",
]

texts = st.one_of(st.sampled_from(NASTY), st.text(st.characters(exclude_categories=())), st.text("-> \n\r&<;0:,."))
times = st.floats(0, 400_000, allow_nan=False)
speakers = st.sampled_from(["", "Anna", "Channel 2", *NASTY])
words = st.builds(Word, start_s=times, end_s=times, text=texts, probability=st.floats(0, 1))
segments = st.builds(
    Segment,
    start_s=times,
    end_s=times,
    text=texts,
    avg_logprob=st.floats(-5, 0),
    no_speech_prob=st.floats(0, 1),
    compression_ratio=st.floats(0, 9),
    temperature=st.sampled_from([0.0, 0.2]),
    speaker=speakers,
    words=st.lists(words, max_size=2).map(tuple),
)

SUMMARY = Summary(
    duration_s=61.25,
    speech_s=40.5,
    windows=3,
    source_sha256="ab" * 32,
    container="matroska,webm",
    codec="opus",
    model="large-v3",
    model_revision="f0fe81560cb8",
    device="cuda:0",
    compute_type="float16",
    engine_version="faster-whisper 1.2.1",
)


def transcript(*segments: Segment, source: str = "talk.opus", mtime_ns: int = 1_700_000_000_123_456_789) -> Transcript:
    return Transcript(
        source=source,
        size=1234,
        mtime_ns=mtime_ns,
        language="en",
        language_probability=0.98,
        segments=segments,
        options=JobOptions(word_timestamps=True),
        summary=SUMMARY,
    )


TWO = transcript(
    Segment(start_s=0.0, end_s=1.5, text=" Hello & <welcome>"),
    Segment(start_s=3599.9996, end_s=3723.0049, text=" a --> b", words=(Word(start_s=3600, end_s=3601, text=" a", probability=0.5),)),
)


# --- a small strict reader -----------------------------------------------------------------------------------------------------


def read_tsv(data: bytes) -> list[Cue]:
    header, *rows = data.decode("utf-8").removesuffix("\n").split("\n")
    assert header == "start\tend\ttext"
    found = []
    for row in rows:
        start, end, text = row.split("\t")
        found.append(Cue(int(start), int(end), (text,)))
    return found


def by_speaker(lines: Iterable[tuple[str, str]]) -> dict[str, str]:
    """All that each one says, without white space."""
    found: dict[str, str] = {}
    for name, text in lines:
        found[name] = found.get(name, "") + squeezed(text)
    return found


# --- claims --------------------------------------------------------------------------------------------------------------------


def test_what_each_format_looks_like() -> None:
    """The shapes are fixed to the byte."""
    assert render(TWO, "txt") == b"Hello & <welcome>\na --> b\n"
    assert render(TWO, "srt") == (b"1\n00:00:00,000 --> 00:00:01,500\nHello & <welcome>\n\n2\n01:00:00,000 --> 01:00:07,000\na -> b\n")
    assert render(TWO, "vtt") == (
        b"WEBVTT\n\n00:00:00.000 --> 00:00:01.500\nHello &amp; &lt;welcome&gt;\n\n01:00:00.000 --> 01:00:07.000\na --&gt; b\n"
    )
    assert render(TWO, "tsv") == b"start\tend\ttext\n0\t1500\tHello & <welcome>\n3600000\t3723005\ta --> b\n"


def test_json_carries_text_and_provenance() -> None:
    """The json format says what was transcribed, with what, and how sure the decoder was (F102)."""
    made = json.loads(render(TWO, "json"))
    assert list(made) == [
        "schema",
        "source",
        "engine",
        "options",
        "language",
        "language_probability",
        "quality",
        "text",
        "segments",
        "windows",
    ]
    assert made["schema"] == "whisperd.transcript/1"
    assert made["source"] == {
        "name": "talk.opus",
        "size": 1234,
        "modified_at": "2023-11-14T22:13:20.123456Z",
        "mtime_ns": 1_700_000_000_123_456_789,
        "sha256": "ab" * 32,
        "container": "matroska,webm",
        "codec": "opus",
        "track": 1,
        "tracks": 1,
        "channels": 1,
        "duration_s": 61.25,
        "speech_s": 40.5,
        "start_offset_s": 0.0,
    }
    assert made["engine"] == {
        "version": "faster-whisper 1.2.1",
        "model": "large-v3",
        "model_revision": "f0fe81560cb8",
        "device": "cuda:0",
        "compute_type": "float16",
        "encoder": "ctranslate2",
    }
    assert made["quality"] == {"verdict": "good", "windows": 0, "second_pass": 0, "doubtful": 0, "complaints": [], "doubts": []}
    assert made["options"] == json.loads(msgspec.json.encode(TWO.options))
    assert made["text"] == "Hello & <welcome>\na --> b"
    first, second = made["segments"]
    assert list(first) == ["id", "start", "end", "text", "avg_logprob", "no_speech_prob", "compression_ratio", "temperature"]
    assert (second["id"], second["start"], second["end"], second["text"]) == (1, 3600.0, 3723.005, "a --> b")
    assert second["words"] == [{"start": 3600.0, "end": 3601.0, "word": " a", "probability": 0.5}]


def test_silence_gives_whole_if_empty_files() -> None:
    """A recording without speech has a transcript in every format: empty, or with nothing but the header."""
    empty = transcript()
    assert {name: render(empty, name) for name in ("txt", "srt", "vtt", "tsv")} == {
        "txt": b"",
        "srt": b"",
        "vtt": b"WEBVTT\n",
        "tsv": b"start\tend\ttext\n",
    }
    assert json.loads(render(empty, "json"))["segments"] == []


def test_unknown_format_is_named() -> None:
    """A format that nobody renders is refused with the list of those that exist."""
    with pytest.raises(UnknownFormat) as caught:
        render(TWO, "docx")
    assert caught.value.failure().code == "unknown_format"
    assert "txt, srt, vtt, tsv, json" in caught.value.hint


def test_years_without_a_calendar() -> None:
    """A modification time that no calendar has (a broken share) is no reason to fail."""
    made = json.loads(render(transcript(mtime_ns=10**30), "json"))
    assert (made["source"]["modified_at"], made["source"]["mtime_ns"]) == (None, 10**30)


@settings(max_examples=150, deadline=None)
@given(st.lists(segments, max_size=6))
@example([Segment(start_s=0, end_s=1, text=text) for text in NASTY])
def test_strict_readers_read_back_every_text(made: list[Segment]) -> None:
    """Whatever was heard and whoever said it, srt, vtt and tsv are well-formed, carry the same lines as txt, and their cues run forward."""
    whole = transcript(*made)
    lines = [(one_line(segment.speaker).strip(), line) for segment in made if (line := one_line(segment.text).strip())]
    names = [name for name, _ in lines]
    said = [f"{name}: {line}" if name else line for name, line in lines]
    changes = [name != before for before, name in pairwise(["", *names])]
    told = [full if change else line for change, full, (_, line) in zip(changes, said, lines, strict=True)]
    assert render(whole, "txt").decode() == "".join(f"{line}\n" for line in told)
    srt, vtt, tsv = read_srt(render(whole, "srt")), read_vtt(render(whole, "vtt")), read_tsv(render(whole, "tsv"))
    assert by_speaker((cue.speaker, cue.text) for cue in vtt) == by_speaker(lines)
    assert [cue.text for cue in tsv] == said
    assert all(cue.start_ms < cue.end_ms for cue in tsv)
    shown = ("\n".join(one.lines) for one in subtitles(made, SHAPE, labels=True))
    labels = (one.speaker for one in subtitles(made, SHAPE, labels=True))
    wanted = [re.sub("-{2,}>", "->", f"{name}: {text}" if name else text) for name, text in zip(labels, shown, strict=True)]
    assert ["\n".join(cue.lines) for cue in srt] == wanted
    assert runs_forward(vtt)


@settings(max_examples=100, deadline=None)
@given(st.lists(segments, max_size=4), texts)
def test_json_is_strict_and_complete(made: list[Segment], source: str) -> None:
    """The json format is valid UTF-8 JSON with every segment, its times in whole milliseconds and never backwards."""
    read = msgspec.json.decode(render(transcript(*made, source=source), "json"))
    assert [segment["id"] for segment in read["segments"]] == list(range(len(made)))
    for segment in read["segments"]:
        assert 0 <= segment["start"] <= segment["end"]
        assert round(segment["start"], 3) == segment["start"]


@settings(max_examples=50, deadline=None)
@given(st.lists(segments.filter(lambda segment: segment.text.isascii()), max_size=4))
def test_the_same_transcript_gives_the_same_bytes(made: list[Segment]) -> None:
    """After the journey through the staged file the bytes are the same: the outbox knows its own files by that."""
    made = [msgspec.structs.replace(segment, words=(), speaker="Anna") for segment in made]
    whole = transcript(*made)
    again = msgspec.json.decode(msgspec.json.encode(whole), type=Transcript)
    assert {name: render(whole, name) for name in FORMATS} == {name: render(again, name) for name in FORMATS}


def test_overlapping_and_instant_segments() -> None:
    """A segment that runs into the next ends where the next begins; one without length is a millisecond long."""
    made = transcript(
        Segment(start_s=0, end_s=5, text="long"), Segment(start_s=3, end_s=3, text="now"), Segment(start_s=3, end_s=2, text="back")
    )
    assert read_tsv(render(made, "tsv")) == [Cue(0, 3000, ("long",)), Cue(3000, 3001, ("now",)), Cue(3001, 3002, ("back",))]
    assert read_srt(render(made, "srt")) == [Cue(0, 2917, ("long",)), Cue(3000, 3001, ("now",)), Cue(3001, 3834, ("back",))]


def test_speakers_are_named_and_may_talk_at_once() -> None:
    """Each format says who speaks: txt where that changes, srt and tsv on every cue, vtt as voices, json as a field. A subtitle is cut
    short by the next one of its own speaker only."""
    made = transcript(
        Segment(start_s=0, end_s=5, text="one", speaker="Anna"),
        Segment(start_s=2, end_s=3, text="two", speaker="B & <C>"),
        Segment(start_s=4, end_s=6, text="three", speaker="Anna"),
        Segment(start_s=6, end_s=7, text="four", speaker="Anna"),
        Segment(start_s=8, end_s=9, text="five"),
    )
    assert render(made, "txt").decode().splitlines() == ["Anna: one", "B & <C>: two", "Anna: three", "four", "five"]
    assert read_vtt(render(made, "vtt")) == [
        Cue(0, 3917, ("one",), "Anna"),
        Cue(2000, 3000, ("two",), "B & <C>"),
        Cue(4000, 5917, ("three",), "Anna"),
        Cue(6000, 7000, ("four",), "Anna"),
        Cue(8000, 9000, ("five",)),
    ]
    assert b"\n<v B &amp; &lt;C&gt;>two\n" in render(made, "vtt")
    assert [cue.text for cue in read_srt(render(made, "srt"))] == ["Anna: one", "B & <C>: two", "Anna: three", "Anna: four", "five"]
    assert read_tsv(render(made, "tsv"))[1] == Cue(2000, 3000, ("B & <C>: two",))
    read = json.loads(render(made, "json"))
    assert [segment.get("speaker") for segment in read["segments"]] == ["Anna", "B & <C>", "Anna", "Anna", None]
    assert read["text"] == render(made, "txt").decode().strip()


def test_the_start_of_the_sound_is_compensated() -> None:
    """Where the sound begins later than the picture, every time of every format is that much later, and json says by how much (F104).
    Nothing is earlier than the recording."""
    window = WindowVerdict(start_s=0.2, end_s=30.1, channel=0, language="en", language_probability=1.0, verdict=Verdict())
    segment = Segment(start_s=1.0, end_s=2.5, text=" Hello there", words=(Word(start_s=1.0, end_s=2.0, text=" Hello", probability=1.0),))
    late = msgspec.structs.replace(SUMMARY, start_offset_s=1.021)
    made = msgspec.structs.replace(transcript(segment), summary=late, windows=(window,))
    assert b"00:00:02,021 --> 00:00:03,521" in render(made, "srt")
    assert b"00:00:02.021 --> 00:00:03.521" in render(made, "vtt")
    assert b"\n2021\t3521\tHello there\n" in render(made, "tsv")
    read = json.loads(render(made, "json"))
    assert read["source"]["start_offset_s"] == 1.021
    assert [(part["start"], part["end"]) for part in (*read["segments"], *read["segments"][0]["words"], *read["windows"])] == [
        (2.021, 3.521),
        (2.021, 3.021),
        (1.221, 31.121),
    ]
    early = msgspec.structs.replace(made, summary=msgspec.structs.replace(SUMMARY, start_offset_s=-1.5))
    assert b"\n0\t1000\tHello there\n" in render(early, "tsv")


def test_json_marks_what_is_doubtful() -> None:
    """The verdict on the whole, how many windows stand for it and why; each doubtful segment says what speaks against it, no other does."""
    doubted = msgspec.structs.replace(TWO.segments[1], doubts=("repetition",))
    quality = Quality(verdict="doubtful", windows=3, second_pass=1, doubtful=1, complaints=("repetition",))
    cut_off = msgspec.structs.replace(SUMMARY, doubts=("3.0 s of the 61.3 s are missing",))
    made = msgspec.structs.replace(transcript(TWO.segments[0], doubted), quality=quality, summary=cut_off)
    read = json.loads(render(made, "json"))
    assert read["quality"] == {
        "verdict": "doubtful",
        "windows": 3,
        "second_pass": 1,
        "doubtful": 1,
        "complaints": ["repetition"],
        "doubts": ["3.0 s of the 61.3 s are missing"],
    }
    assert [segment.get("doubts") for segment in read["segments"]] == [None, ["repetition"]]


def test_recordings_of_more_than_a_hundred_runs_forward() -> None:
    """Hours grow past two digits rather than wrap."""
    assert timestamp(400_000_000, ",") == "111:06:40,000"


# --- names ---------------------------------------------------------------------------------------------------------------------


names = st.binary(min_size=200, max_size=400).map(lambda name: name.replace(b"/", b"_"))
long_names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=70, max_size=255)


@settings(max_examples=200, deadline=None)
@given(names, st.sampled_from([b".txt", b".json", b".error.txt"]))
def test_a_fitted_name_fits(name: bytes, suffix: bytes) -> None:
    """Every name fits with its suffix, one that fitted already is untouched, and the folder never changes."""
    fitted = fit_name(b"folder/" + name, suffix).removeprefix(b"folder/")
    assert len(fitted + suffix) <= NAME_BYTES_MAX
    if len(name + suffix) <= NAME_BYTES_MAX:
        assert fitted == name
    else:
        assert name.startswith(fitted[:-9])
        assert fitted[-9:-8] == b"~"


@settings(deadline=None)
@given(long_names)
@example("é" * 126 + "x")
@example("🎙" * 63 + "abc")
def test_a_cut_never_splits_a_character(name: str) -> None:
    """A name in UTF-8 stays one."""
    fit_name(name.encode(), b".json").decode()


def test_long_names_that_differ_at_the_end_stay_different() -> None:
    """The mark stands for the whole name."""
    one, two = (fit_name(b"x" * 254 + last, b".txt") for last in (b"1", b"2"))
    assert one != two


@pytest.mark.parametrize("path", [b"", b"/etc/passwd", b"..", b"a/../b", b"./a", b"a//b", b"a/", b"a\0b"])
def test_names_that_lead_elsewhere_are_refused(path: bytes) -> None:
    """Only plain paths below the outbox are names."""
    with pytest.raises(BadName):
        components(path)


def test_temporary_names_are_short_and_hidden() -> None:
    """A temporary name holds nothing of the source's name, so it always fits, and every watcher ignores it."""
    assert temporary(12, "error.txt") == b".whisperd-12.error.txt.tmp"


@pytest.mark.parametrize(
    ("standing", "own", "action"),
    [
        (None, None, Action.CREATE),
        (None, "old", Action.CREATE),
        ("new", None, Action.KEEP),
        ("new", "old", Action.KEEP),
        ("old", "old", Action.REPLACE),
        ("old", None, Action.REFUSE),
        ("edited", "old", Action.REFUSE),
        ("foreign", None, Action.REFUSE),
        ("foreign", "old", Action.REFUSE),
    ],
)
def test_what_may_happen_at_a_name(standing: str | None, own: str | None, action: Action) -> None:
    """Only what is absent is created and only what is still as we wrote it is replaced."""
    assert decide(standing, "new", own) is action
