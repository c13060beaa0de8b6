"""The quality gate: honest text passes, loops, gaps and phantoms do not. Pure: no audio, no model."""

from __future__ import annotations

import math
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from recordings import SENTENCES

from whisperd.engine import quality
from whisperd.engine.quality import WEIGHTS, Decoded, Heard, Thresholds
from whisperd.vocabulary import Segment

GERMAN = (
    "die besprechung ist am dienstag um viertel nach zehn",
    "bitte rufen sie frau müller am sonntag an",
    "die sicherung liegt im kleinen ordner",
    "der preis beträgt dreihundertfünfundzwanzig euro",
    "der server fünf ist bereit",
)
HONEST = SENTENCES + GERMAN
CODES = tuple(WEIGHTS)
ORDER = ("compression", "logprob", "no_speech", "repetition", "uncovered", "too_fast")

# One sentence and its syllables, counted by hand: what a second of speech holds differs less between languages than what it costs to write.
SPOKEN = {
    "en": ("The backup is in the small folder, please call Thomas at ten fifteen on Sunday.", 20),
    "de": ("Die Sicherung liegt im kleinen Ordner, bitte rufen Sie Thomas am Sonntag um zehn Uhr an.", 25),
    "ja": ("バックアップは小さいフォルダにあります。日曜日の十時にトーマスに電話してください。", 42),
    "zh": ("备份在小文件夹里，请在星期天十点十五分给托马斯打电话。", 25),
    "ko": ("백업은 작은 폴더에 있습니다. 일요일 열 시에 토마스에게 전화해 주세요.", 27),
    "ru": ("Резервная копия находится в маленькой папке, позвоните Томасу в воскресенье.", 28),
    "hi": ("बैकअप छोटे फ़ोल्डर में है, कृपया रविवार को दस बजे थॉमस को फोन करें।", 25),
    "te": ("బ్యాకప్ చిన్న ఫోల్డర్‌లో ఉంది, దయచేసి ఆదివారం పది గంటలకు థామస్‌కు కాల్ చేయండి.", 30),
    "my": ("အရန်ကူးယူမှုသည် ဖိုင်တွဲငယ်ထဲတွင် ရှိသည်။ တနင်္ဂနွေနေ့ ဆယ်နာရီတွင် သောမတ်စ်ကို ဖုန်းခေါ်ပါ။", 34),
    "ka": ("სარეზერვო ასლი პატარა საქაღალდეშია, გთხოვთ დაურეკოთ თომას კვირას.", 24),
    "ar": ("النسخة الاحتياطية في المجلد الصغير، يرجى الاتصال بتوماس يوم الأحد.", 26),
    "bn": ("ব্যাকআপ ছোট ফোল্ডারে আছে, রবিবার দশটায় থমাসকে ফোন করুন।", 23),
}
TOKENS = {"en": 17, "de": 23, "ja": 33, "zh": 32, "ko": 26, "ru": 27, "hi": 74, "te": 142, "my": 255, "ka": 157, "ar": 35, "bn": 111}
"""Of openai-whisper 20250625's multilingual vocabulary."""


def tokens_of(text: str) -> tuple[int, ...]:
    """A stand-in for a tokenizer: a token for each word."""
    return tuple(hash(word) for word in text.split())


def decoded(text: str = "the backup is in the small folder", **changes: object) -> Decoded:
    """A good attempt at ten seconds of speech, but for the changes."""
    good = Decoded(text, tokens_of(text), -0.2, 0.01, 1.2, 0.0, ((0.0, 10.0),))
    return good._replace(**changes)


def heard(*stretches_s: tuple[float, float]) -> Heard:
    return Heard(0.0, 30.0, stretches_s or ((0.0, 10.0),))


words = st.text(string.ascii_lowercase, min_size=2, max_size=9)
spans = st.tuples(st.floats(0, 30), st.floats(0, 30)).map(lambda pair: (min(pair), max(pair)))
probabilities = st.floats(0, 1)
logprobs = st.floats(-8, 0)


@st.composite
def stretches(draw: st.DrawFn) -> tuple[tuple[float, float], ...]:
    """Stretches of speech in order, none overlapping."""
    edges = sorted(draw(st.lists(st.floats(0, 30), max_size=12, unique=True)))
    return tuple(zip(edges[::2], edges[1::2], strict=False))


attempts = st.builds(
    Decoded,
    text=st.lists(words, max_size=20).map(" ".join),
    tokens=st.lists(st.integers(0, 5), max_size=60).map(tuple),
    avg_logprob=logprobs,
    no_speech_prob=probabilities,
    compression_ratio=st.floats(0, 10),
    temperature=st.sampled_from((0.0, 0.2, 1.0)),
    spans_s=st.lists(spans, max_size=6).map(tuple),
)
windows = st.builds(Heard, st.just(0.0), st.just(30.0), stretches())


# --- complaints ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", HONEST)
def test_an_honest_sentence_passes(text: str) -> None:
    """Clean figures and an ordinary sentence: nothing to complain of."""
    assert quality.complaints(decoded(text), heard()) == ()


@given(attempts, windows)
def test_complaints_are_stable_codes_in_one_order(attempt: Decoded, window: Heard) -> None:
    """Whatever comes in, each code stands at most once and in the order of the list; every one of them has its weight."""
    assert set(ORDER) == set(CODES)
    found = quality.complaints(attempt, window)
    assert [code for code in ORDER if code in found] == list(found)


@pytest.mark.parametrize(("ratio", "complains"), [(1.1, False), (2.4, False), (2.41, True), (9.0, True)])
def test_compression_is_a_complaint_above_its_threshold(ratio: float, complains: bool) -> None:
    """openai-whisper's 2.4, not reached but passed."""
    assert ("compression" in quality.complaints(decoded(compression_ratio=ratio), heard())) == complains


@pytest.mark.parametrize(("logprob", "complains"), [(-0.1, False), (-1.0, False), (-1.01, True), (math.nan, True)])
def test_logprob_is_a_complaint_below_its_threshold(logprob: float, complains: bool) -> None:
    """openai-whisper's -1.0; a figure that is none is no confidence."""
    assert ("logprob" in quality.complaints(decoded(avg_logprob=logprob), heard())) == complains


@given(attempts, windows, st.floats(0, 3))
def test_a_surer_attempt_is_never_complained_of_for_being_unsure(attempt: Decoded, window: Heard, more: float) -> None:
    """Raising the log-probability, all else equal, brings no complaint about silence."""
    surer = attempt._replace(avg_logprob=attempt.avg_logprob + more)
    new = set(quality.complaints(surer, window)) - set(quality.complaints(attempt, window))
    assert new <= {"logprob"}
    assert "logprob" not in new or quality.is_silence(attempt)


@given(attempts, windows, st.floats(0, 5))
def test_a_stricter_threshold_finds_no_less(attempt: Decoded, window: Heard, less: float) -> None:
    """Lowering the highest compression ratio allowed only adds a complaint."""
    usual = Thresholds()
    stricter = usual._replace(compression_max=usual.compression_max - less)
    assert set(quality.complaints(attempt, window, usual)) <= set(quality.complaints(attempt, window, stricter))


# --- silence -------------------------------------------------------------------------------------------------------------------

SILENT = {"text": "", "tokens": (), "spans_s": (), "avg_logprob": -1.4, "no_speech_prob": 0.9}


def test_silence_is_believed_where_nobody_was_heard() -> None:
    """No text, the decoder took it for silence, and the detector agrees: a good window."""
    assert quality.complaints(decoded(**SILENT), Heard(0.0, 30.0, ())) == ()
    assert quality.complaints(decoded(**SILENT), heard((3.0, 3.4))) == ()


def test_silence_is_not_believed_where_somebody_was_heard() -> None:
    """The same attempt over four seconds of speech: two complaints, the plain case of text that is missing."""
    assert quality.complaints(decoded(**SILENT), heard((3.0, 7.0))) == ("no_speech", "uncovered")


def test_a_sure_text_is_no_silence_whatever_the_no_speech_token_says() -> None:
    """The no-speech probability counts only together with an unsure text, as in faster-whisper."""
    assert quality.complaints(decoded(no_speech_prob=0.99), heard()) == ()


# --- repetition ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        *HONEST,
        "no no no",
        "no no no no no no that is not what i said",
        "ha ha ha ha ha ha ha ha",
        "one two three four five six seven eight nine ten",
        "five five five zero one two three",
        "three three three three is the extension",
        "a b c d e f g",
        "bravo bravo bravo charlie",
        "very very very very very good",
        "ja ja ja genau",
        "bla bla bla und so weiter",
        "new york new york",
    ],
)
def test_honest_text_does_not_repeat_itself(text: str) -> None:
    """Emphasis, laughter, numbers and spelling are said."""
    assert not quality.repeats_itself(tokens_of(text))


@given(st.permutations(HONEST), st.integers(1, 12))
def test_different_sentences_in_a_row_do_not_repeat_themselves(order: list[str], many: int) -> None:
    """A full window of dictation passes in whatever order."""
    assert not quality.repeats_itself(tokens_of(" ".join(order[:many])))


@given(st.sampled_from(HONEST), st.integers(0, 30), st.integers(0, 30), st.sampled_from(HONEST))
def test_a_sentence_over_and_over_always_repeats_itself(text: str, before: int, after: int, other: str) -> None:
    """A decoder caught in a loop until its window is full is found, with other text before and behind."""
    one = tokens_of(text)
    loop = one * (224 // len(one))
    around = tokens_of(other) * 8
    assert quality.repeats_itself((*around[:before], *loop, *around[:after]))


@given(st.lists(st.integers(0, 9999), min_size=1, max_size=32), st.integers(24, 60))
def test_any_loop_is_found_whatever_its_period(period: list[int], times: int) -> None:
    """Up to 32 tokens long, repeated for a whole window: no period hides."""
    assert quality.repeats_itself(period * times)


@given(st.lists(st.integers(0, 3), max_size=80), st.integers(1, 40))
def test_going_on_with_a_loop_never_helps(tokens: list[int], more: int) -> None:
    """Once a whole text is a loop of its last token, more of that token is one as well."""
    loop = [*tokens, *[7] * (len(tokens) + 24)]
    assert quality.repeats_itself(loop)
    assert quality.repeats_itself([*loop, *[7] * more])


# --- coverage ------------------------------------------------------------------------------------------------------------------


def test_text_over_all_speech_covers_it() -> None:
    """Coarse time stamps, half a second off at either end, are no gap."""
    assert quality.complaints(decoded(spans_s=((0.4, 5.0), (5.0, 9.6))), heard((0.0, 4.8), (5.4, 10.0))) == ()


def test_a_pause_without_text_is_no_gap() -> None:
    """Only detected speech has to be covered."""
    assert "uncovered" not in quality.complaints(decoded(spans_s=((0.0, 4.0), (20.0, 24.0))), heard((0.0, 4.0), (20.0, 24.0)))


@pytest.mark.parametrize(("speech_s", "complains"), [(0.5, False), (1.4, False), (1.5, True), (20.0, True)])
def test_no_text_at_all(speech_s: float, complains: bool) -> None:
    """The plain case: from a second and a half of speech on there has to be some text."""
    nothing = decoded("", spans_s=(), tokens=())
    assert ("uncovered" in quality.complaints(nothing, heard((2.0, 2.0 + speech_s)))) == complains


def test_a_sentence_left_out_is_found() -> None:
    """Text over most of a long window does not hide one long stretch that has none."""
    window = heard((0.0, 9.0), (10.0, 14.5), (15.5, 28.0))
    assert "uncovered" in quality.complaints(decoded(spans_s=((0.0, 9.0), (15.5, 28.0))), window)


def test_nothing_is_concluded_where_nobody_listened() -> None:
    """Without stretches there is no speech to cover and no rate to exceed."""
    assert quality.complaints(decoded(), Heard(0.0, 30.0, ())) == ()


@given(stretches(), st.lists(spans, max_size=5), spans)
def test_more_text_never_uncovers_speech(
    speech: tuple[tuple[float, float], ...], texts: list[tuple[float, float]], one: tuple[float, float]
) -> None:
    """What is uncovered lies in the speech, and shrinks with every span of text."""
    window = Heard(0.0, 30.0, speech)
    bare = quality.uncovered(texts, window)
    assert all(any(start <= left and right <= end for start, end in speech) for left, right in bare)
    less = quality.uncovered([*texts, one], window)
    assert sum(end - start for start, end in less) <= sum(end - start for start, end in bare) + 1e-9


# --- speed ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", SPOKEN)
@pytest.mark.parametrize("sentences", [1, 3])
def test_the_fastest_speakers_are_believed_in_every_script(language: str, sentences: int) -> None:
    """Eight syllables a second, whether a syllable is one token or seven."""
    sentence, syllables = SPOKEN[language]
    text = " ".join([sentence] * sentences)
    attempt = decoded(text, tokens=tuple(range(TOKENS[language] * sentences)))
    assert "too_fast" not in quality.complaints(attempt, heard((0.0, sentences * syllables / 8)))


@pytest.mark.parametrize("language", SPOKEN)
def test_more_text_than_anybody_can_say_is_found_in_every_script(language: str) -> None:
    """Ten sentences are not said in four seconds."""
    sentence, _ = SPOKEN[language]
    attempt = decoded(" ".join([sentence] * 10), tokens=tuple(range(TOKENS[language] * 10)))
    assert "too_fast" in quality.complaints(attempt, heard((0.0, 4.0)))


# --- phrases -------------------------------------------------------------------------------------------------------------------

CREDITS = (
    "Subtitles by the Amara.org community",
    "Untertitelung des ZDF, 2020",
    "Untertitel im Auftrag des ZDF für funk, 2017",
    "Sous-titres réalisés par la communauté d'Amara.org",
    "Sottotitoli creati dalla comunità Amara.org",
    "Субтитры создавал DimaTorzok",
    "字幕由Amara.org社区提供",
)
NAMED = ("Редактор субтитров А.Семкин Корректор А.Егорова", "中文字幕志愿者 杨栋梁", "한글자막 by 박진희")
STOCK = (
    "Thank you.",
    "Thanks for watching!",
    "you",
    "Bye.",
    "Vielen Dank.",
    "Merci d'avoir regardé cette vidéo !",
    "¡Gracias por ver el video!",
    "Продолжение следует...",
    "ご視聴ありがとうございました",
    "谢谢观看",
    "시청해주셔서 감사합니다.",
    "MBC 뉴스 이덕영입니다.",
)


@pytest.mark.parametrize("text", CREDITS)
def test_a_credit_is_known_however_it_is_written(text: str) -> None:
    """Case, punctuation, white space and the year make no difference; several are as one, and it is dropped whatever was heard."""
    for written in (
        text,
        text.upper(),
        text.replace(" ", "  ") + " ...",
        text.replace("2020", "2018"),
        f"{text} {text}",
        f"Thank you. {text}",
    ):
        assert quality.hallucinated(written) == "credit", written
        assert quality.phantom(written, (0.0, 10.0), heard(), no_speech_prob=0.0, avg_logprob=-0.1)


@pytest.mark.parametrize("text", NAMED)
def test_a_credit_is_known_whoever_is_named_in_it(text: str) -> None:
    """The names change from film to film."""
    assert quality.hallucinated(text) == "credit"


@pytest.mark.parametrize("text", STOCK)
def test_a_stock_phrase_is_dropped_only_where_something_speaks_against_it(text: str) -> None:
    """People do say these: they stay where they were heard and the decoder is sure."""
    assert quality.hallucinated(text) == "stock"
    assert not quality.phantom(text, (1.0, 3.0), heard((1.0, 2.5)), no_speech_prob=0.1, avg_logprob=-0.3)
    assert quality.phantom(text, (1.0, 3.0), heard((5.0, 9.0)), no_speech_prob=0.1, avg_logprob=-0.3)
    assert quality.phantom(text, (1.0, 3.0), heard((1.0, 2.5)), no_speech_prob=0.9, avg_logprob=-0.3)


@given(st.sampled_from(HONEST), st.sampled_from(CREDITS + STOCK), probabilities, logprobs)
def test_text_with_anything_else_in_it_is_never_dropped(said: str, phrase: str, no_speech: float, logprob: float) -> None:
    """A segment is a phantom as a whole or not at all, however unsure the decoder was."""
    for text in (said, f"{said} {phrase}", f"{phrase} {said}"):
        assert quality.hallucinated(text) == ""
        assert not quality.phantom(text, (0.0, 2.0), heard((9.0, 10.0)), no_speech_prob=no_speech, avg_logprob=logprob)


@pytest.mark.parametrize(
    "text", ["", "…", "youtube", "thank you maria", "tschüss thomas", "copyright law in 2021", "the okay button", "buy", "23"]
)
def test_other_short_text_is_no_phrase(text: str) -> None:
    """Nothing, and words that only begin like a phrase."""
    assert quality.hallucinated(text) == ""


# --- verdicts ------------------------------------------------------------------------------------------------------------------

codes = st.lists(st.sampled_from(CODES), unique=True).map(tuple)
candidates = st.lists(st.tuples(attempts, codes), min_size=1, max_size=6)


@given(candidates)
def test_an_attempt_without_complaints_beats_every_other(several: list[tuple[Decoded, tuple[str, ...]]]) -> None:
    """The chosen one carries the lightest complaints; among equals the surest, among those the earliest."""
    best = quality.choose(several)
    merits = [(-sum(WEIGHTS[code] for code in found), attempt.avg_logprob) for attempt, found in several]
    assert best == merits.index(max(merits))
    if any(not found for _, found in several):
        assert not several[best][1]


def test_unsure_words_are_preferred_to_none_and_both_to_a_loop() -> None:
    """The order of the weights, by the complaints as they come together."""
    unsure, nothing, loop = ("logprob",), ("no_speech", "uncovered"), ("compression", "repetition")
    several = [(decoded(), loop), (decoded(), nothing), (decoded(), unsure)]
    assert quality.choose(several) == 2
    assert quality.choose(several[:2]) == 1


def test_a_figure_that_is_none_is_never_preferred() -> None:
    """Not a number compares with nothing: it counts as the least sure."""
    assert quality.choose([(decoded(avg_logprob=math.nan), ()), (decoded(avg_logprob=-5.0), ())]) == 1


@pytest.mark.parametrize(
    ("passes", "complaints", "verdict"),
    [(1, (), "good"), (3, (), "second_pass"), (1, ("logprob",), "doubtful"), (7, ("logprob",), "doubtful")],
)
def test_the_verdict_on_a_window(passes: int, complaints: tuple[str, ...], verdict: str) -> None:
    """Good at once, good at last, or doubtful."""
    assert quality.quality_of(passes, complaints) == verdict


def segment(start_s: float, text: str = "the backup is in the small folder", **changes: float) -> Segment:
    figures = {"avg_logprob": -0.2, "no_speech_prob": 0.01, "compression_ratio": 1.2} | changes
    return Segment(start_s=start_s, end_s=start_s + 2.0, text=text, **figures)


def test_only_the_unsure_segments_are_marked() -> None:
    """A complaint that a segment brings itself is marked there and nowhere else."""
    marked = quality.doubts_of([segment(0.0), segment(2.0, avg_logprob=-1.5), segment(4.0)], ("logprob",))
    assert marked == [(), ("logprob",), ()]


def test_the_segments_beside_a_gap_are_marked() -> None:
    """Where text is missing, the reader is warned just before and just behind."""
    segments = [segment(0.0), segment(2.0), segment(20.0), segment(22.0)]
    window = heard((0.0, 24.0))
    assert quality.doubts_of(segments, ("uncovered",), window) == [(), ("uncovered",), ("uncovered",), ()]


def test_the_looping_segments_are_marked() -> None:
    """Neighbours that say the same, and one that says the same over and over."""
    loop = " ".join(["server five is ready"] * 20)
    segments = [
        segment(0.0, "hello world"),
        segment(2.0, "good morning"),
        segment(4.0, "Good morning."),
        segment(6.0, "zulu"),
        segment(8.0, loop),
    ]
    assert quality.doubts_of(segments, ("repetition",)) == [(), ("repetition",), ("repetition",), (), ("repetition",)]


@given(st.lists(st.builds(segment, st.floats(0, 28), avg_logprob=logprobs, no_speech_prob=probabilities), max_size=6), codes, windows)
def test_every_complaint_of_a_window_stands_on_a_segment(segments: list[Segment], found: tuple[str, ...], window: Heard) -> None:
    """Nothing is hidden: where there is text at all, each complaint marks some of it, and no other does."""
    marked = quality.doubts_of(segments, found, window)
    assert len(marked) == len(segments)
    assert not segments or {code for doubts in marked for code in doubts} == set(found)


# --- faster-whisper's own choice -----------------------------------------------------------------------------------------------


@given(st.lists(attempts, min_size=1, max_size=6))
def test_the_choice_in_order_is_that_of_faster_whisper(tried: list[Decoded]) -> None:
    """Its ladder written out (`generate_with_fallback`): up to the first good one, else the likeliest, loops last."""
    ladder: list[Decoded] = []
    calm: list[Decoded] = []
    for attempt in tried:
        ladder.append(attempt)
        again = attempt.compression_ratio > 2.4
        if not again:
            calm.append(attempt)
        again = again or attempt.avg_logprob < -1.0
        if attempt.no_speech_prob > 0.6 and attempt.avg_logprob < -1.0:
            again = False
        if not again:
            expected = attempt
            break
    else:
        expected = max(calm or ladder, key=lambda attempt: attempt.avg_logprob)
    assert [quality.falls_back(attempt) for attempt in ladder[:-1]] == [True] * (len(ladder) - 1)
    assert ladder[quality.choose_in_order(ladder)] is expected
