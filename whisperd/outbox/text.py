"""text: the words of a transcript as every format can carry them. Pure.

Owns: cleaning (one line, no control characters, no halves of characters), how many columns a text takes, and where it may be broken.
A break is no translation: the parts, put together again, are the text up to white space. Does not fail.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from whisperd.vocabulary import Segment, Word

_LINE_ENDS = re.compile("[\t\n\x0b\x0c\r\x1c-\x1f\x85\u2028\u2029]+")
_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\ufeff\ufffe\uffff]")
_HALVES = re.compile("[\ud800-\udfff]")


# --- cleaning ------------------------------------------------------------------------------------------------------------------


def one_line(text: str) -> str:
    """A text that no format can break on: line breaks become a space, control characters and halves of characters go."""
    return whole_characters(_UNSEEN.sub("", _LINE_ENDS.sub(" ", text)))


def whole_characters(text: str) -> str:
    return _HALVES.sub("\ufffd", text)


def line_of(segment: Segment) -> str:
    return one_line(segment.text).strip()


def speaker_of(segment: Segment) -> str:
    return one_line(segment.speaker).strip()


def named(speaker: str, text: str) -> str:
    return f"{speaker}: {text}" if speaker else text


def squeezed(text: str) -> str:
    """Without any white space."""
    return "".join(text.split())


# --- times ---------------------------------------------------------------------------------------------------------------------


def milliseconds(seconds: float) -> int:
    return max(0, round(seconds * 1000))


def span(part: Segment | Word) -> tuple[int, int]:
    """Start and end in milliseconds, the end never before the start."""
    start = milliseconds(part.start_s)
    return start, max(start, milliseconds(part.end_s))


# --- columns -------------------------------------------------------------------------------------------------------------------


def columns(text: str) -> int:
    """Columns on a screen: East Asian wide characters take two, marks and joiners none."""
    return len(text) if text.isascii() else sum(map(_columns, text))


@lru_cache(maxsize=4096)
def _columns(char: str) -> int:
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


# --- breaking ------------------------------------------------------------------------------------------------------------------

_SPACE = re.compile("[^\\S\u00a0\u2007\u202f]+")  # no-break spaces are none: "Bonjour !"
_OPENERS = "([{«‹“‘（［｛「『【〈《〔〖〘〝¿¡$£¥￥"
_CLOSERS = ")]}»›”’%,.!?:;…‥）］｝」』】〉》〕〗〙〟、。，．・：；？！％℃"
_SMALL_KANA = "ぁぃぅぇぉっゃゅょゎァィゥェォッャュョヮヵヶゝゞヽヾ々ー〜～"
_NEVER_FIRST = frozenset(_CLOSERS + _SMALL_KANA)
_NEVER_LAST = frozenset(_OPENERS)
# Scripts that put no space between words and may be broken between almost any two characters. Korean does put spaces.
_SPACELESS = re.compile(
    "[\u2e80-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uff9f\U00020000-\U0003ffff]"
)
# Thai, Lao, Khmer and Burmese need a dictionary. Where a run is longer than a line, a syllable's start must do.
_SYLLABLE = re.compile(
    "(?<![\u0e40-\u0e44\u0ec0-\u0ec4\u17d2\u1039])(?=[\u0e01-\u0e2e\u0e40-\u0e44\u0e81-\u0eae\u0ec0-\u0ec4\u1780-\u17b3]"
    "|[\u1000-\u102a](?![\u1039\u103a]))"
)


class Part(NamedTuple):
    """A piece of text that is not broken any more, and whether there was white space before it."""

    text: str
    spaced: bool


def parts_of(text: str, longest: int) -> list[Part]:
    """The text in the smallest pieces that a line may be made of. Words stay whole however long they are, except where a script writes
    no spaces (`longest`: columns from which on Thai and its kin are broken)."""
    parts: list[Part] = []
    for chunk in _SPACE.split(text):
        if word := chunk.strip():
            glued = bool(parts) and (_is_only(word, _NEVER_FIRST) or _is_only(parts[-1].text, _NEVER_LAST))
            if glued:  # "Qui ?" and "« Moi »" are not torn apart
                parts[-1] = Part(f"{parts[-1].text} {word}", parts[-1].spaced)
            else:
                parts.extend(Part(piece, bool(parts) and number == 0) for number, piece in enumerate(_pieces(word, longest)))
    return parts


def _is_only(word: str, characters: frozenset[str]) -> bool:
    return all(char in characters for char in word)


def _pieces(word: str, longest: int) -> Iterator[str]:
    """A run without spaces, broken where its script allows it."""
    if word.isascii():
        yield word
        return
    cuts = [at for at in range(1, len(word)) if _may_part(word[at - 1], word[at])]
    if columns(word) > longest:
        cuts = sorted({*cuts, *(found.start() for found in _SYLLABLE.finditer(word) if found.start() > 0)})
    for begin, end in zip([0, *cuts], [*cuts, len(word)], strict=True):
        yield word[begin:end]


def _may_part(before: str, after: str) -> bool:
    if not (_SPACELESS.match(before) or _SPACELESS.match(after)) or before in _NEVER_LAST or after in _NEVER_FIRST:
        return False
    return unicodedata.category(after) not in ("Mn", "Mc", "Me", "Cf") and before != "\u200d"


# --- how good a place is -------------------------------------------------------------------------------------------------------

_SENTENCE_END = re.compile("[.!?…。！？؟।۔][\"'”’»)\\]」』）]*$")
_CLAUSE_END = re.compile("[,;:،؛、，；：–—-][\"'”’»)\\]」』）]*$")
_SHORT_WORD = 3


class Place(NamedTuple):
    """What breaking a line, and a subtitle, after a part costs."""

    line: float
    subtitle: float


SENTENCE, CLAUSE, BETWEEN, AFTER_SHORT = Place(0.0, 0.0), Place(1.0, 3.0), Place(3.0, 8.0), Place(4.0, 10.0)


def place_after(part: str, following: Part) -> Place:
    """Punctuation is the best place in any language. Short words mostly belong to what follows them: articles, prepositions."""
    if _SENTENCE_END.search(part):
        return SENTENCE
    if _CLAUSE_END.search(part) or (following.spaced and _SPACELESS.match(following.text)):
        return CLAUSE
    return AFTER_SHORT if following.spaced and len(part) <= _SHORT_WORD else BETWEEN
