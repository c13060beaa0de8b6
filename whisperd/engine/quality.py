"""quality: whether a window's text can be what was said, and which of several attempts to believe.

Owns: the complaints of the quality gate and their thresholds, the phrases that Whisper writes on silence, the choice among attempts.
Pure: figures and text in, stable reason codes out. Never fails.

    compression  the text compresses too well: it repeats itself
    logprob      the decoder itself was unsure
    no_speech    no text, and the decoder took it for silence, although speech was heard
    repetition   one phrase over and over, back to back
    uncovered    speech was heard where no text stands
    too_fast     more text than anybody can say in that time
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from whisperd.vocabulary import Segment

Span = tuple[float, float]
"""Start and end in the recording, in seconds."""


class Decoded(NamedTuple):
    """What one attempt made of a window. `tokens` are those of the text alone, `spans_s` where its segments lie."""

    text: str
    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float
    compression_ratio: float
    temperature: float
    spans_s: tuple[Span, ...]


class Heard(NamedTuple):
    """A window and the speech detected in it. No stretches: nobody listened, or nobody spoke; nothing is concluded from that."""

    start_s: float
    end_s: float
    stretches_s: tuple[Span, ...]

    @property
    def speech_s(self) -> float:
        return sum(end - start for start, end in self.stretches_s)


class Thresholds(NamedTuple):
    """Where a figure becomes a complaint. The first three are openai-whisper's."""

    compression_max: float = 2.4
    logprob_min: float = -1.0
    no_speech_max: float = 0.6
    silence_heard_s: float = 1.0  # speech heard, from which "no speech" is not believed

    # A loop of the decoder runs until the window is full (up to 224 tokens); people stop sooner. The number of repeats falls with
    # the length of what is repeated: laughter is 24 times one token or 6 times four, a sentence counts from the 4th time on.
    repeats_min: int = 4
    repeated_tokens_min: int = 24
    repeated_share_min: float = 0.25
    ngram_max: int = 32

    # Time stamps are rounded to whole sentences and often half a second off, and detected speech has padding of its own.
    stamp_slack_s: float = 0.5
    uncovered_without_text_s: float = 1.5
    uncovered_stretch_s: float = 3.0  # about seven words
    uncovered_share: float = 0.4
    uncovered_share_s: float = 1.5  # below, a share says nothing

    # The fastest speech has 8 syllables a second. One takes 2.5 to 4 characters to write, 1 to 1.5 in the wide scripts of East Asia.
    # Tokens tell nothing: Whisper spends 0.8 of them on a Japanese syllable, 0.9 on a German one, 7.5 on a Burmese one.
    characters_per_s: float = 36.0
    wide_character: int = 3  # counts as so many
    speech_slack_s: float = 1.0  # what a detector may miss of a word at its edges

    phantom_speech_s: float = 0.3  # less than the shortest "bye" as it is detected


DEFAULT = Thresholds()

WEIGHTS = {"compression": 4, "repetition": 4, "no_speech": 3, "uncovered": 3, "too_fast": 3, "logprob": 2}
"""How much a complaint counts against an attempt: made-up text worst, missing text next, unsure text least. A loop nearly always
brings both of its complaints, an empty window both of its own, so that unsure words are preferred to none and both to a loop."""


# --- complaints ----------------------------------------------------------------------------------------------------------------


def complaints(decoded: Decoded, heard: Heard, thresholds: Thresholds = DEFAULT) -> tuple[str, ...]:
    """What speaks against an attempt, in the order of the module's list; empty when nothing does."""
    silence = is_silence(decoded, thresholds)
    found = {
        "compression": decoded.compression_ratio > thresholds.compression_max,
        "logprob": not silence and not decoded.avg_logprob >= thresholds.logprob_min,  # NaN is no confidence either
        "no_speech": silence and heard.speech_s >= thresholds.silence_heard_s,
        "repetition": repeats_itself(decoded.tokens, thresholds),
        "uncovered": _leaves_speech(decoded.spans_s, heard, thresholds),
        "too_fast": _too_fast(decoded, heard, thresholds),
    }
    return tuple(code for code, holds in found.items() if holds)


def is_silence(decoded: Decoded, thresholds: Thresholds = DEFAULT) -> bool:
    """Whether an attempt found nobody speaking: no text, and what was drawn instead is neither likely nor speech."""
    unsure = decoded.no_speech_prob > thresholds.no_speech_max and decoded.avg_logprob < thresholds.logprob_min
    return unsure and not (decoded.text.strip() and decoded.spans_s)


def repeats_itself(tokens: Sequence[object], thresholds: Thresholds = DEFAULT) -> bool:
    """Whether one n-gram stands so often back to back that it is a loop, over a good part of the whole."""
    enough = thresholds.repeated_share_min * len(tokens)
    return any(
        run >= enough and run // length >= max(thresholds.repeats_min, thresholds.repeated_tokens_min // length)
        for length in range(1, min(thresholds.ngram_max, len(tokens) // thresholds.repeats_min) + 1)
        if (run := _longest_run(tokens, length))
    )


def _longest_run(tokens: Sequence[object], length: int) -> int:
    """Tokens of the longest stretch that repeats with this period; 0 when nothing does."""
    longest = same = 0
    for before, after in zip(tokens, tokens[length:], strict=False):
        same = same + 1 if before == after else 0
        longest = max(longest, same)
    return longest + length if longest else 0


def uncovered(spans_s: Iterable[Span], heard: Heard, thresholds: Thresholds = DEFAULT) -> tuple[Span, ...]:
    """The detected speech with no text over it, in order; the spans of the text are given some slack."""
    slack = thresholds.stamp_slack_s
    bare = list(heard.stretches_s)
    for start, end in spans_s:
        bare = [part for stretch in bare for part in _without(stretch, (start - slack, end + slack))]
    return tuple(bare)


def _without(stretch: Span, covered: Span) -> list[Span]:
    parts = (stretch[0], min(stretch[1], covered[0])), (max(stretch[0], covered[1]), stretch[1])
    return [(start, end) for start, end in parts if start < end]


def _leaves_speech(spans_s: Sequence[Span], heard: Heard, thresholds: Thresholds) -> bool:
    bare = [end - start for start, end in uncovered(spans_s, heard, thresholds)]
    if not spans_s:
        return sum(bare) >= thresholds.uncovered_without_text_s
    share = max(thresholds.uncovered_share * heard.speech_s, thresholds.uncovered_share_s)
    return max(bare, default=0.0) >= thresholds.uncovered_stretch_s or sum(bare) >= share


def _too_fast(decoded: Decoded, heard: Heard, thresholds: Thresholds) -> bool:
    if not heard.stretches_s:
        return False
    written = sum(thresholds.wide_character if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in decoded.text)
    return written > thresholds.characters_per_s * (heard.speech_s + thresholds.speech_slack_s)


# --- what Whisper writes on silence --------------------------------------------------------------------------------------------


def phantom(text: str, span_s: Span, heard: Heard, *, no_speech_prob: float, avg_logprob: float, thresholds: Thresholds = DEFAULT) -> bool:
    """Whether a segment is made up and to be dropped: a credit always, a stock phrase where something else speaks against it."""
    kind = hallucinated(text)
    if kind != "stock":
        return kind == "credit"
    unheard = bool(heard.stretches_s) and speech_under(span_s, heard) < thresholds.phantom_speech_s
    unsure = not heard.stretches_s and avg_logprob < thresholds.logprob_min  # over speech that was heard, a bad line alone is no proof
    return unheard or unsure or no_speech_prob > thresholds.no_speech_max


def speech_under(span_s: Span, heard: Heard) -> float:
    """Seconds of detected speech within a span."""
    return sum(max(0.0, min(end, span_s[1]) - max(start, span_s[0])) for start, end in heard.stretches_s)


def hallucinated(text: str) -> str:
    """What a text is when it is known phrases and nothing else: "credit" when one of them is, "stock"; "" for any other text."""
    rest, kinds = _normalised(text), set[str]()
    while rest:
        match = _PHRASE.match(rest)
        if match is None:
            return ""
        kinds.add(match.lastgroup or "")
        rest = rest[match.end() :]
    return "credit" if "credit" in kinds else "stock" if kinds else ""


def _normalised(text: str) -> str:
    """Letters, marks and figures only, case folded; every number is 0 (credits carry years)."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\d+", "0", "".join(character for character in folded if unicodedata.category(character)[0] in "LMN"))


NAME = "*"  # in a phrase: whoever made the subtitles

CREDITS = (
    "Subtitles by the Amara.org community",
    "Transcription by CastingWords",
    "Untertitel der Amara.org-Community",
    "Untertitel von Stephanie Geiges",
    "Untertitelung aufgrund der Amara.org-Community",
    "Untertitelung des ZDF, 2020",
    "Untertitel im Auftrag des ZDF, 2017",
    "Untertitel im Auftrag des ZDF für funk, 2017",
    "Untertitelung im Auftrag des ZDF, 2021",
    "Untertitelung im Auftrag des ZDF für funk, 2016",
    "Untertitelung. BR 2018",
    "Copyright WDR 2021",
    "Ondertitels ingediend door de Amara.org gemeenschap",
    "Ondertiteld door de Amara.org gemeenschap",
    "Ondertiteling door de Amara.org gemeenschap",
    "TV GELDERLAND 2021",
    "Sous-titres réalisés par la communauté d'Amara.org",
    "Sous-titres réalisés para la communauté d'Amara.org",
    "Sous-titres par la communauté d'Amara.org",
    "Sous-titres faits par la communauté d'Amara.org",
    "Sous-titrage Société Radio-Canada",
    "Sous-titrage ST' 501",
    "Sous-titrage FR 2021",
    "❤️ par SousTitreur.com",
    "Subtítulos realizados por la comunidad de Amara.org",
    "Subtítulos por la comunidad de Amara.org",
    "Subtítulos creados por la comunidad de Amara.org",
    "Subtitulado por la comunidad de Amara.org",
    "Legendas pela comunidade Amara.org",
    "Legendas pela comunidade de Amara.org",
    "Transcrição e Legendas pela comunidade de Amara.org",
    "Transcrição e Legendas Pedro Negri",
    "Sottotitoli creati dalla comunità Amara.org",
    "Sottotitoli e revisione a cura di QTSS",
    "Sottotitoli a cura di QTSS",
    "Napisy stworzone przez społeczność Amara.org",
    "Napisy wykonane przez społeczność Amara.org",
    "Tłumaczenie i napisy stworzone przez społeczność Amara.org",
    "Titulky vytvořil JohnyX",
    "Undertexter från Amara.org-gemenskapen",
    "Svensktextning.nu",
    "Danske tekster af Amara.org-fællesskabet",
    "Altyazı M.K.",
    "Субтитры сделал DimaTorzok",
    "Субтитры создавал DimaTorzok",
    "Субтитры добавил DimaTorzok",
    "Субтитры подогнал «Симон»",
    f"Редактор субтитров {NAME} Корректор {NAME}",
    "字幕由Amara.org社区提供",
    "字幕由Amara.org社區提供",
    "字幕由 Amara.org 社群提供",
    "小編字幕由Amara.org社區提供",
    f"中文字幕志愿者 {NAME}",
    "优优独播剧场——YoYo Television Series Exclusive",
    "優優獨播劇場——YoYo Television Series Exclusive",
    "作词·作曲·编曲 李宗盛",
    "词曲 李宗盛",
    f"한글자막 by {NAME}",
    "자막 제공 배달의민족",
    "ترجمة نانسي قنقر",
)
"""Nobody dictates these: they stood under films that Whisper was trained on, while nothing was said."""

STOCK = (
    "Thank you",
    "Thank you very much",
    "Thank you so much",
    "Thank you for watching",
    "Thank you for listening",
    "Thanks",
    "Thanks for watching",
    "Thanks for listening",
    "Please subscribe",
    "Please subscribe to my channel",
    "Don't forget to like and subscribe",
    "See you next time",
    "See you in the next video",
    "you",
    "Bye",
    "Goodbye",
    "Okay",
    "Oh",
    "Yeah",
    "Danke",
    "Vielen Dank",
    "Vielen Dank fürs Zuschauen",
    "Vielen Dank für die Aufmerksamkeit",
    "Tschüss",
    "Bis zum nächsten Mal",
    "SWR 2021",
    "Bedankt voor het kijken",
    "Merci",
    "Merci d'avoir regardé",
    "Merci d'avoir regardé cette vidéo",
    "Abonnez-vous",
    "Gracias",
    "Gracias por ver el video",
    "Suscríbete al canal",
    "Obrigado",
    "Obrigado por assistir",
    "Tchau",
    "Grazie",
    "Grazie per la visione",
    "Grazie a tutti",
    "Dziękuję",
    "Dziękuję za oglądanie",
    "Dziękuję za uwagę",
    "İzlediğiniz için teşekkür ederim",
    "Abone olmayı unutmayın",
    "Спасибо",
    "Спасибо за просмотр",
    "Спасибо за внимание",
    "Продолжение следует",
    "Подписывайтесь на канал",
    "До свидания",
    "Дякую за перегляд",
    "ご視聴ありがとうございました",
    "ご視聴ありがとうございます",
    "最後までご視聴ありがとうございました",
    "ありがとうございました",
    "チャンネル登録をお願いいたします",
    "チャンネル登録お願いします",
    "おやすみなさい",
    "谢谢",
    "謝謝",
    "谢谢大家",
    "谢谢观看",
    "謝謝觀看",
    "請不吝點贊訂閱轉發打賞支持明鏡與點點欄目",
    "请不吝点赞订阅转发打赏支持明镜与点点栏目",
    "감사합니다",
    "시청해주셔서 감사합니다",
    "구독과 좋아요 부탁드립니다",
    "다음 영상에서 만나요",
    f"MBC 뉴스 {NAME}입니다",
    "شكرا",
    "شكرا للمشاهدة",
    "اشتركوا في القناة",
    "धन्यवाद",
)
"""People do say these, and Whisper writes them on silence: its videos ended with them."""


def _either(phrases: Iterable[str]) -> str:
    """An expression for any of the phrases, normalised, the longest first: the first that fits is taken."""
    parts = sorted((tuple(_normalised(part) for part in phrase.split(NAME)) for phrase in phrases), key=lambda part: -len("".join(part)))
    return "|".join(r"\w{2,20}".join(part) for part in parts)


_PHRASE = re.compile(f"(?P<credit>{_either(CREDITS)})|(?P<stock>{_either(STOCK)})")


# --- verdicts ------------------------------------------------------------------------------------------------------------------


def choose(candidates: Sequence[tuple[Decoded, tuple[str, ...]]]) -> int:
    """The attempt to keep: the lightest complaints, then the highest log-probability, then the earliest."""

    def merit(index: int) -> tuple[int, float]:
        decoded, codes = candidates[index]
        confidence = -math.inf if math.isnan(decoded.avg_logprob) else decoded.avg_logprob
        return -sum(WEIGHTS[code] for code in codes), confidence

    return max(range(len(candidates)), key=merit)


def falls_back(decoded: Decoded, thresholds: Thresholds = DEFAULT) -> bool:
    """Whether faster-whisper itself would try the next temperature."""
    silence = decoded.no_speech_prob > thresholds.no_speech_max and decoded.avg_logprob < thresholds.logprob_min
    return not silence and (decoded.compression_ratio > thresholds.compression_max or decoded.avg_logprob < thresholds.logprob_min)


def choose_in_order(attempts: Sequence[Decoded], thresholds: Thresholds = DEFAULT) -> int:
    """The attempt that faster-whisper keeps: the one that ended its ladder, else the likeliest of those that do not repeat themselves."""
    last = len(attempts) - 1
    if not falls_back(attempts[last], thresholds):
        return last
    calm = [index for index, decoded in enumerate(attempts) if decoded.compression_ratio <= thresholds.compression_max]
    return max(calm or range(len(attempts)), key=lambda index: attempts[index].avg_logprob)


def quality_of(attempts: int, complaints: Sequence[str]) -> str:
    """The verdict on a window: "good" at once, "second_pass" when a further attempt was, "doubtful" when none was."""
    if complaints:
        return "doubtful"
    return "good" if attempts == 1 else "second_pass"


def doubts_of(
    segments: Sequence[Segment], complaints: Sequence[str], heard: Heard | None = None, thresholds: Thresholds = DEFAULT
) -> list[tuple[str, ...]]:
    """For each segment of a doubtful window the complaints that concern it.

    A complaint that no segment can be blamed for holds for all of them: a reader is warned too often rather than not at all.
    """
    marked = [(code, _blamed(code, segments, heard, thresholds) or set(range(len(segments)))) for code in complaints]
    return [tuple(code for code, blamed in marked if index in blamed) for index in range(len(segments))]


def _blamed(code: str, segments: Sequence[Segment], heard: Heard | None, thresholds: Thresholds) -> set[int]:
    """The segments that a complaint comes from; empty when it cannot be told."""
    match code:
        case "compression":
            return {index for index, segment in enumerate(segments) if segment.compression_ratio > thresholds.compression_max}
        case "logprob":
            return {index for index, segment in enumerate(segments) if not segment.avg_logprob >= thresholds.logprob_min}
        case "no_speech":
            return {index for index, segment in enumerate(segments) if segment.no_speech_prob > thresholds.no_speech_max}
        case "repetition":
            return _repeated(segments, thresholds)
        case "uncovered" if heard is not None:
            return _beside_gaps(segments, heard, thresholds)
        case _:
            return set()


def _repeated(segments: Sequence[Segment], thresholds: Thresholds) -> set[int]:
    """Segments that loop in themselves or say what their neighbour says."""
    texts = [_normalised(segment.text) for segment in segments]
    twins = {index for pair in pairwise(range(len(texts))) if texts[pair[0]] == texts[pair[1]] for index in pair}
    return twins | {index for index, text in enumerate(texts) if repeats_itself(text, thresholds)}


def _beside_gaps(segments: Sequence[Segment], heard: Heard, thresholds: Thresholds) -> set[int]:
    """The segments before and after the longest stretch of speech without text."""
    gaps = uncovered(((segment.start_s, segment.end_s) for segment in segments), heard, thresholds)
    if not gaps:
        return set()
    start, end = max(gaps, key=lambda gap: gap[1] - gap[0])
    before = [index for index, segment in enumerate(segments) if segment.end_s <= start]
    after = [index for index, segment in enumerate(segments) if segment.start_s >= end]
    return {*before[-1:], *after[:1]}
