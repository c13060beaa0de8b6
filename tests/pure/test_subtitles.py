"""subtitles: where texts are divided, how lines are broken and how long each subtitle stays, as a pure function of the segments."""

from __future__ import annotations

import io
import sys
from itertools import pairwise

import av
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.subtitle_readers import read_srt, read_vtt
from whisperd.outbox.render import render
from whisperd.outbox.subtitles import Subtitle, fitted, subtitles
from whisperd.outbox.text import columns, line_of, one_line, parts_of, speaker_of, squeezed
from whisperd.vocabulary import JobOptions, Segment, SubtitleShape, Summary, Transcript, Word

SHAPE = SubtitleShape()
LONG = (
    "The ministry said on Tuesday that the bridge over the river would be closed for repairs until the end of the year, and that all "
    "traffic would be led through the village. Nobody there had been asked."
)
CHINESE = "我们今天要讨论的是如何把录音变成文字，这件事情看起来很简单，其实非常困难。因为每个人说话的方式都不一样。"
JAPANESE = "私はその本を読みました。とても面白かったので、「ぜひ」と友達にも勧めました。ちょっと待ってください。"
THAI = "สวัสดีครับวันนี้เราจะพูดถึงการแปลงเสียงเป็นข้อความซึ่งเป็นเรื่องที่น่าสนใจมากสำหรับทุกคนที่ทำงานกับเสียง"
FRENCH = "Qui est-ce ? « Moi », dit-il ; alors, viens donc ici tout de suite et ferme la porte derrière toi !"


def cut(text: str, length_s: float = 6.0, shape: SubtitleShape = SHAPE, speaker: str = "", *, labels: bool = True) -> list[Subtitle]:
    return subtitles([Segment(start_s=0, end_s=length_s, text=text, speaker=speaker)], shape, labels=labels)


def spoken(text: str, start_s: float = 0.0, each_s: float = 0.3, pauses: dict[int, float] | None = None) -> Segment:
    """A segment with a time for each word, `pauses` before some."""
    words, at = [], start_s
    for number, word in enumerate(text.split()):
        at += (pauses or {}).get(number, 0.0)
        words.append(Word(start_s=round(at, 3), end_s=round(at + each_s, 3), text=" " + word, probability=1.0))
        at += each_s
    return Segment(start_s=start_s, end_s=at, text=" " + text, words=tuple(words))


# --- by property ---------------------------------------------------------------------------------------------------------------

words = st.one_of(
    st.sampled_from(
        ["a", "the", "of", "and", "Yes.", "people,", "considerable", "-->", "?", "«", "»", "Donaudampfschifffahrtsgesellschaft"]
    ),
    st.sampled_from([CHINESE[:20], JAPANESE[:30], THAI[:50], "한국어는", "👩‍👩‍👧‍👦", "e\u0301te\u0301", "\u00a0", "\u200b"]),
    st.text(st.characters(exclude_categories=()), max_size=12),
)
texts = st.lists(words, max_size=40).map(" ".join)
shapes = st.builds(
    SubtitleShape,
    line_chars=st.integers(10, 60),
    lines=st.integers(1, 4),
    chars_per_s=st.floats(5, 100),
    duration_min_s=st.floats(0, 1),
    duration_max_s=st.floats(1.5, 20),
    gap_min_s=st.floats(0, 1),
)


@st.composite
def segments(draw: st.DrawFn) -> list[Segment]:
    """As an engine gives them: by their starts; with times for the words or without, sane or not."""
    made = []
    for start_s in sorted(draw(st.lists(st.floats(0, 100), max_size=4))):
        text = draw(texts)
        end_s = start_s + draw(st.floats(-1, 40))
        timed = tuple(
            Word(start_s=draw(st.floats(0, 140)), end_s=draw(st.floats(0, 140)), text=" " + word, probability=1.0)
            for word in text.split(" ")
        )
        speaker = draw(st.sampled_from(["", "Anna", "A rather long name for a speaker"]))
        made.append(Segment(start_s=start_s, end_s=end_s, text=text, speaker=speaker, words=draw(st.sampled_from([(), timed]))))
    return made


def said(made: list[Segment]) -> dict[str, str]:
    """What each speaker says, without white space."""
    found: dict[str, str] = {}
    for segment in made:
        if line_of(segment):
            found[speaker_of(segment)] = found.get(speaker_of(segment), "") + squeezed(line_of(segment))
    return found


@settings(max_examples=200, deadline=None)
@given(segments(), shapes, st.booleans())
@example([Segment(start_s=0, end_s=60, text=text) for text in (LONG, CHINESE, JAPANESE, THAI, FRENCH)], SHAPE, True)
def test_what_holds_for_every_text_and_shape(made: list[Segment], shape: SubtitleShape, labels: bool) -> None:
    """Every word once and in order; at most so many lines; none too wide but for one word; nothing over another one of its speaker, or
    longer than it may be, or ended too early where there is room."""
    found = subtitles(made, shape, labels=labels)
    by_speaker: dict[str, list[Subtitle]] = {}
    for one in found:
        by_speaker.setdefault(one.speaker, []).append(one)
        assert 1 <= len(one.lines) <= shape.lines
        for number, line in enumerate(one.lines):
            assert line.strip() == line != ""
            label = min(columns(one.speaker) + 2, shape.line_chars // 2) if labels and one.speaker and number == 0 else 0
            assert label + columns(line) <= shape.line_chars or len(parts_of(line, shape.line_chars)) == 1
        assert one.start_ms < one.end_ms <= one.start_ms + round(shape.duration_max_s * 1000)
    assert {speaker: "".join(squeezed(line) for one in own for line in one.lines) for speaker, own in by_speaker.items()} == said(made)
    assert [one.start_ms for one in found] == sorted(one.start_ms for one in found)
    gap = round(shape.gap_min_s * 1000)
    for own in by_speaker.values():
        for one, two in pairwise(own):
            assert one.end_ms <= two.start_ms
            assert two.start_ms - one.end_ms >= gap or two.start_ms - one.start_ms < 2 * gap
    for one, following in pairwise(found):
        if following.start_ms - one.start_ms >= round(shape.duration_min_s * 1000) + gap + 1:
            assert one.end_ms - one.start_ms >= round(shape.duration_min_s * 1000) or following.start_ms - one.start_ms < 2 * gap


@settings(max_examples=100, deadline=None)
@given(segments(), shapes)
def test_strict_readers_read_the_same(made: list[Segment], shape: SubtitleShape) -> None:
    """srt and vtt hold exactly these subtitles, by two strict readers."""
    whole = transcript(made)
    vtt, srt = subtitles(made, shape, labels=False), subtitles(made, shape, labels=True)
    assert [(cue.start_ms, cue.end_ms, cue.lines, cue.speaker) for cue in read_vtt(render(whole, "vtt", shape))] == [
        tuple(one) for one in vtt
    ]
    times = [(cue.start_ms, cue.end_ms, len(cue.lines)) for cue in read_srt(render(whole, "srt", shape))]
    assert times == [(one.start_ms, one.end_ms, len(one.lines)) for one in srt]


@settings(max_examples=200, deadline=None)
@given(texts, st.integers(4, 60))
def test_parts_are_the_text(text: str, longest: int) -> None:
    """Broken anywhere that is allowed, a text is still itself; a part has white space before it only where the text has."""
    parts = parts_of(one_line(text), longest)
    assert squeezed("".join(part.text for part in parts)) == squeezed(one_line(text))
    assert " ".join("".join(f" {part.text}" if part.spaced else part.text for part in parts).split()) == " ".join(one_line(text).split())


def transcript(made: list[Segment]) -> Transcript:
    summary = Summary(
        duration_s=1,
        speech_s=1,
        windows=1,
        source_sha256="",
        container="wav",
        codec="pcm",
        model="m",
        model_revision="1",
        device="cpu",
        compute_type="int8",
        engine_version="1",
    )
    return Transcript(
        source="a",
        size=1,
        language="en",
        language_probability=1,
        segments=tuple(made),
        options=JobOptions(),
        summary=summary,
        mtime_ns=0,
    )


def test_another_program_reads_them() -> None:
    """FFmpeg's readers, which are nobody's strict ones, find the same subtitles at the same times."""
    made = [Segment(start_s=0, end_s=14, text=LONG), Segment(start_s=15, end_s=40, text=CHINESE, speaker="Anna & <Co>")]
    for name, reader, labels in (("srt", "srt", True), ("vtt", "webvtt", False)):
        with av.open(io.BytesIO(render(transcript(made), name)), format=reader) as container:
            packets = [packet for packet in container.demux() if packet.size]
        found = [(packet.pts, packet.pts + packet.duration, bytes(packet).decode().count("\n")) for packet in packets]
        assert found == [(one.start_ms, one.end_ms, len(one.lines) - 1) for one in subtitles(made, SHAPE, labels=labels)]


# --- lines ---------------------------------------------------------------------------------------------------------------------


def test_what_fits_a_line_stays_on_one() -> None:
    """Nothing is broken that need not be."""
    (one,) = cut("Nobody there had been asked before Tuesday.")
    assert len(one.lines) == 2
    (one,) = cut("Nobody there had been asked before Monday.")
    assert one.lines == ("Nobody there had been asked before Monday.",)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("He said nothing at all about it, and nobody asked.", ("He said nothing at all about it,", "and nobody asked.")),
        ("They walked all the way back home. It was still dark.", ("They walked all the way back home.", "It was still dark.")),
        ("One two three four five six seven eight nine ten", ("One two three four five", "six seven eight nine ten")),
        ("Everybody was waiting for him at the station now", ("Everybody was waiting", "for him at the station now")),
    ],
)
def test_lines_are_broken_at_punctuation_then_evenly(text: str, lines: tuple[str, ...]) -> None:
    """After a sentence or a clause where that leaves two lines of some length, else in the middle; rather before a short word than
    after it."""
    (one,) = cut(text)
    assert one.lines == lines


@pytest.mark.parametrize(
    "text", [LONG, "The considerable majority of people agreed. So.", "Forty characters and a little more than it is."]
)
@pytest.mark.parametrize("width", [20, 32, 42])
def test_no_orphans(text: str, width: int) -> None:
    """No last line, and no last subtitle, of one short word."""
    found = cut(text, 15.0, SubtitleShape(line_chars=width))
    assert all(len(one.lines) == 1 or columns(one.lines[-1]) * 4 >= width for one in found)
    assert len(found) == 1 or columns(" ".join(found[-1].lines)) * 4 >= width


def test_a_word_longer_than_a_line_stays_whole() -> None:
    """An address is not torn apart."""
    address = "https://example.org/" + "a" * 60
    found = cut(f"Look at {address} for more.", 6.0)
    assert address in [line for one in found for line in one.lines]


def test_names_take_their_place_in_the_line() -> None:
    """In srt the name is part of the first line, so that this one is shorter; in vtt it is not shown."""
    text = "Nobody there had been asked before Monday."
    (plain,), (labelled,) = cut(text, speaker="Anna", labels=False), cut(text, speaker="Anna")
    assert (len(plain.lines), len(labelled.lines)) == (1, 2)
    assert labelled.speaker == "Anna"
    (shown,) = read_srt(render(transcript([Segment(start_s=0, end_s=6, text=text, speaker="Anna")]), "srt"))
    assert shown.lines[0].startswith("Anna: Nobody") and columns(shown.lines[0]) <= 42


# --- other scripts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [CHINESE, JAPANESE])
def test_scripts_without_spaces(text: str) -> None:
    """A wide character counts two; lines break between any two, but never before closing punctuation, small kana or after an opening
    bracket."""
    found = cut(text, 20.0, SubtitleShape(line_chars=20))
    lines = [line for one in found for line in one.lines]
    assert all(columns(line) <= 20 for line in lines)
    assert not any(line[0] in "，。、」ゃょっー" or line[-1] in "「" for line in lines)


def test_thai_is_broken_only_where_it_must() -> None:
    """Without a dictionary a syllable's start must do, and only in a run longer than a line; no mark is parted from its letter."""
    found = cut(THAI, 20.0)
    lines = [line for one in found for line in one.lines]
    assert all(columns(line) <= 42 for line in lines)
    assert not any("\u0e31" <= line[0] <= "\u0e3a" or "\u0e47" <= line[0] <= "\u0e4e" for line in lines)
    assert parts_of("สวัสดีครับ วันนี้", 42) == [("สวัสดีครับ", False), ("วันนี้", True)]


def test_spaces_before_punctuation_are_kept_together() -> None:
    """French puts a space before some marks and inside quotes: no line begins or ends there."""
    lines = [line for one in cut(FRENCH, 12.0, SubtitleShape(line_chars=14)) for line in one.lines]
    assert not any(line[0] in "?;!»" or line[-1] == "«" for line in lines)


@pytest.mark.parametrize(("text", "width"), [("abc", 3), ("日本", 4), ("한국", 4), ("e\u0301", 1), ("a\u200bb", 2), ("", 0)])
def test_columns(text: str, width: int) -> None:
    """East Asian wide characters take two columns, marks and joiners none."""
    assert columns(text) == width


# --- times ---------------------------------------------------------------------------------------------------------------------


def test_subtitles_begin_and_end_with_their_words() -> None:
    """Where words have times, each subtitle begins exactly with its first word, and without a gap to keep ends with its last."""
    segment = spoken(LONG)
    found = subtitles([segment], SubtitleShape(gap_min_s=0.0, chars_per_s=1000.0), labels=True)
    assert len(found) > 1
    position = 0
    for one in found:
        count = len(" ".join(one.lines).split())
        first, last = segment.words[position], segment.words[position + count - 1]
        assert (one.start_ms, one.end_ms) == (round(first.start_s * 1000), round(last.end_s * 1000))
        position += count


def test_a_pause_is_a_place_to_divide() -> None:
    """A pause that was heard counts like the end of a sentence."""
    text = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    first, *_ = subtitles([spoken(text, pauses={8: 1.5})], SHAPE, labels=True)
    assert first.lines == ("one two three four five six seven eight",)
    assert first.end_ms == 2400


def test_without_words_times_are_shared_out() -> None:
    """Each subtitle of a segment gets time by its columns; words that are not those of the text are not believed."""
    found = cut("aaaa " * 40, 20.0)
    before = 0
    for one in found:
        assert one.start_ms == 20_000 * before // 160
        before += sum(columns(line.replace(" ", "")) for line in one.lines)
    strange = Segment(start_s=0, end_s=20, text="aaaa " * 40, words=spoken("cccc " * 40).words)
    assert [one.start_ms for one in subtitles([strange], SHAPE, labels=True)] == [one.start_ms for one in found]


def test_long_segments_are_divided_and_none_stays_too_long() -> None:
    """Thirty seconds of text, as windows without time stamps have it, become subtitles of seven at most; a single word ends then."""
    found = cut(LONG, 30.0)
    assert len(found) >= 5
    assert all(one.end_ms - one.start_ms <= 7000 for one in found)
    assert [(one.start_ms, one.end_ms) for one in cut("Yes.", 30.0)] == [(0, 7000)]


def test_short_ones_stay_as_long_as_there_is_room() -> None:
    """A word of a tenth of a second stays for the least time, or until the gap before the next."""
    alone, hurried = Segment(start_s=1, end_s=1.1, text="Yes."), Segment(start_s=10, end_s=10.1, text="No.")
    found = subtitles([alone, hurried, Segment(start_s=10.5, end_s=12, text="Never ever.")], SHAPE, labels=True)
    assert [(one.start_ms, one.end_ms) for one in found] == [(1000, 1833), (10_000, 10_417), (10_500, 12_000)]


def test_fast_speech_stays_long_enough_to_be_read() -> None:
    """Forty characters said in a second stay for two, at twenty characters a second."""
    (one,) = cut("Forty characters of text, which is a lot", 1.0)
    assert one.end_ms == 2000


def test_nobody_is_kept_on_screen_over_somebody_else() -> None:
    """The extra time to read ends where another speaker begins; what was truly said at once overlaps."""
    drafts = [Subtitle(0, 100, ("Yes.",), "Anna"), Subtitle(500, 3000, ("No.",), "Bo"), Subtitle(1000, 2000, ("Yes!",), "Anna")]
    assert [(one.start_ms, one.end_ms) for one in fitted(drafts, SHAPE)] == [(0, 417), (500, 3000), (1000, 2000)]


def test_ten_hours_take_seconds() -> None:
    """The cost grows with the text, not with its square: twice the text, about twice the steps (counted, not timed)."""
    calls = {"half": 0, "whole": 0}

    def count(name: str, times: int) -> None:
        def step(frame: object, event: str, argument: object) -> None:
            calls[name] += event == "call"

        sys.setprofile(step)
        try:
            cut(LONG * times, 14.0 * times)
        finally:
            sys.setprofile(None)

    count("half", 5)
    count("whole", 10)
    assert calls["whole"] < 2.3 * calls["half"]
