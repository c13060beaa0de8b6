"""choice: which of several audio tracks is transcribed.

Owns: the choice, by number, by language tag, by how much is said. Pure: listening is the caller's. Fails with LookupError when a
track is asked for that is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SAME_SPEECH = 0.9  # of the most talkative track: as much, by any means of telling


class Track(NamedTuple):
    """An audio track of a container: its place among them, from 1, the language it is tagged with, and whether players start with it."""

    number: int
    language: str = ""
    default: bool = False


def candidates(tracks: Sequence[Track], wanted: str, language: str) -> list[Track]:
    """The tracks that may be meant by "auto" or a number; those in `language` (ISO 639-1, or "auto") if there are any.

    Raises LookupError when the number is not that of a track.
    """
    if wanted != "auto":
        return [{str(track.number): track for track in tracks}[wanted.strip()]]
    tagged = [track for track in tracks if language != "auto" and two_letters(track.language) == two_letters(language)]
    return tagged or list(tracks)


def choose(tracks: Sequence[Track], spoken_s: Sequence[float]) -> Track:
    """The track with most speech; among equals the default one, then the first."""
    enough = SAME_SPEECH * max(spoken_s, default=0.0)
    equals = [track for track, spoken in zip(tracks, spoken_s, strict=True) if spoken >= enough]
    return next((track for track in equals if track.default), equals[0])


def two_letters(tag: str) -> str:
    """A language tag of a container ("ger", "deu", "de-AT") as ISO 639-1 ("de"); what is not known stays as it is."""
    base = tag.strip().lower().replace("_", "-").split("-")[0]
    return _TWO_LETTERS.get(base, base)


# fmt: off
_CODES = {
    "af": "afr", "am": "amh", "ar": "ara", "az": "aze", "be": "bel", "bg": "bul", "bn": "ben", "bs": "bos", "ca": "cat", "cs": "ces cze",
    "cy": "cym wel", "da": "dan", "de": "deu ger", "el": "ell gre", "en": "eng", "es": "spa", "et": "est", "eu": "eus baq",
    "fa": "fas per", "fi": "fin", "fr": "fra fre", "ga": "gle", "gl": "glg", "gu": "guj", "he": "heb iw", "hi": "hin", "hr": "hrv scr",
    "hu": "hun", "hy": "hye arm", "id": "ind in", "is": "isl ice", "it": "ita", "ja": "jpn", "ka": "kat geo", "kk": "kaz", "km": "khm",
    "kn": "kan", "ko": "kor", "la": "lat", "lt": "lit", "lv": "lav", "mk": "mkd mac", "ml": "mal", "mn": "mon", "mr": "mar",
    "ms": "msa may", "mt": "mlt", "my": "mya bur", "ne": "nep", "nl": "nld dut", "nn": "nno", "no": "nor nob nb", "oc": "oci",
    "pa": "pan", "pl": "pol", "ps": "pus", "pt": "por", "ro": "ron rum", "ru": "rus", "si": "sin", "sk": "slk slo", "sl": "slv",
    "so": "som", "sq": "sqi alb", "sr": "srp scc", "sv": "swe", "sw": "swa", "ta": "tam", "te": "tel", "th": "tha", "tl": "fil tgl",
    "tr": "tur", "uk": "ukr", "ur": "urd", "uz": "uzb", "vi": "vie", "yi": "yid", "yo": "yor", "yue": "yue", "zh": "chi zho cmn",
}
# fmt: on
"""Codes of ISO 639-2 (both where there are two), and some old ones, for each of ISO 639-1."""
_TWO_LETTERS = {code: short for short, codes in _CODES.items() for code in codes.split()}
