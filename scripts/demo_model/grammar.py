"""The closed language of the demo model: about 230 words and the sentences made of them.

Owns the word lists, the sentence templates and the rule that says which sentences are held out of training.
``VOCABULARY`` decides the token ids of the trained model (see tokenizer.py): a word added here needs a new training
from scratch.

Sentences are drawn from a ``random.Random`` that the caller seeds, so the same seed always gives the same texts.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path


def _words(text: str) -> list[str]:
    return text.split()


DIGITS = _words("zero one two three four five six seven eight nine")
TEENS = _words("ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen")
TENS = _words("twenty thirty forty fifty sixty seventy eighty ninety")
SPELLING = _words(
    "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november oscar papa quebec romeo "
    "sierra tango uniform victor whiskey xray yankee zulu"
)
DAYS = _words("monday tuesday wednesday thursday friday saturday sunday")
MONTHS = _words("january february march april may june july august september october november december")
COLOURS = _words("red green blue yellow white black orange purple")
ROOMS = _words("kitchen office garden hall bedroom studio")
ROLES = _words("worker device server service camera printer")
OBJECTS = _words("file folder report recording meeting message invoice backup archive transcript")
ADJECTIVES = _words("new old first last next big small final")
VERBS = _words("open close delete copy move print send rename check save")
NAMES = _words("anna peter maria david sarah thomas laura james")

_TEMPLATE_WORDS = _words(
    "a after alarm an and are at box boxes busy call car cars closed dollars doors door do down euros failed files "
    "finished forty five for from gigabytes good goodbye have heating hello hours how hundred i idle in inbox is "
    "job light lights later many memory messages minutes morning music my need night no now number oclock of off on "
    "outbox percent please price ready recordings reports restart running seconds see set start started stop thank "
    "that the there they this timer to today tomorrow turn using waiting want we where window windows world yes you "
    "your"
)

# Words of a sentence that earlier versions had ("and so my fellow americans ..."). No template says it any more, but
# the words keep their token ids and are still trained in the free word lists.
_WORDS_WITHOUT_TEMPLATE = _words("americans ask can country fellow not so what")

VOCABULARY: list[str] = sorted(
    {
        *DIGITS, *TEENS, *TENS, *SPELLING, *DAYS, *MONTHS, *COLOURS, *ROOMS, *ROLES, *OBJECTS, *ADJECTIVES, *VERBS,
        *NAMES, *_TEMPLATE_WORDS, *_WORDS_WITHOUT_TEMPLATE,
    }
)  # fmt: skip

_PARENT_SENTENCES = Path(__file__).with_name("parent_sentences.txt")
_HELD_OUT_SHARE = 8


def spoken(number: int) -> str:
    """The words for 0 to 999, as in British English: "two hundred and five"."""
    if number < 10:
        return DIGITS[number]
    if number < 20:
        return TEENS[number - 10]
    if number < 100:
        ten, one = divmod(number, 10)
        return TENS[ten - 2] + (f" {DIGITS[one]}" if one else "")
    hundred, rest = divmod(number, 100)
    return f"{DIGITS[hundred]} hundred" + (f" and {spoken(rest)}" if rest else "")


class _Draw:
    """One random choice after another, for the templates below."""

    def __init__(self, source: random.Random) -> None:
        self.source = source

    def one(self, words: list[str]) -> str:
        return self.source.choice(words)

    def of(self, words: str) -> str:
        """One of several phrases given as "this|that"."""
        return self.source.choice(words.split("|"))

    def number(self, highest: int) -> str:
        """A number up to ``highest``; small ones more often than large ones."""
        limit = highest if self.source.random() < 0.6 else min(highest, 60)
        return spoken(self.source.randint(0, limit))

    def several(self, words: list[str], most: int) -> str:
        return " ".join(self.one(words) for _ in range(self.source.randint(1, most)))


TEMPLATES: list[Callable[[_Draw], str]] = [
    lambda d: f"turn {d.of('on|off')} the {d.one(ROOMS)} {d.of('light|lights|heating|music')}",
    lambda d: f"set {d.of('a timer|an alarm')} for {d.number(59)} {d.of('seconds|minutes|hours')}",
    lambda d: f"{d.one(VERBS)} the {d.one(ADJECTIVES)} {d.one(OBJECTS)}",
    lambda d: f"{d.one(VERBS)} {d.of('this|that|my|your')} {d.one(OBJECTS)} {d.of('now|later|today|tomorrow')}",
    lambda d: f"send the {d.one(OBJECTS)} to {d.one(NAMES)} on {d.one(DAYS)}",
    lambda d: f"the {d.one(OBJECTS)} is in the {d.one(ADJECTIVES)} {d.of('folder|archive|office|garden')}",
    lambda d: f"{d.of('start|stop|restart')} the {d.one(ROLES)} number {d.number(20)}",
    lambda d: f"{d.one(ROLES)} {d.number(12)} is {d.of('ready|running|busy|idle|down|waiting')}",
    lambda d: f"{d.one(ROLES)} {d.number(12)} is using {d.number(24)} gigabytes of memory",
    lambda d: (
        f"job {d.number(999)} {d.of('failed|finished|started')} "
        f"after {d.number(59)} {d.of('seconds|minutes|hours')}"
    ),
    lambda d: (
        f"please call {d.one(NAMES)} at {d.number(12)} {d.of('thirty|fifteen|forty five|oclock')} "
        f"on {d.one(DAYS)}"
    ),
    lambda d: (
        f"the meeting is on {d.one(DAYS)} the {d.number(31)} of {d.one(MONTHS)} "
        f"at {d.number(12)} {d.of('thirty|fifteen|oclock')}"
    ),
    lambda d: f"{d.one(NAMES)} and {d.one(NAMES)} are in the {d.one(ROOMS)}",
    lambda d: (
        f"{d.of('how many|where are the')} {d.one(COLOURS)} {d.of('cars|doors|windows|boxes')} "
        f"{d.of('are there|do you see')}"
    ),
    lambda d: f"the {d.one(COLOURS)} {d.of('car|door|window|box')} is {d.of('open|closed|big|small|new|old')}",
    lambda d: (
        f"{d.of('i need|we want|they have|you have')} {d.number(99)} {d.one(ADJECTIVES)} "
        f"{d.of('files|reports|recordings|messages|boxes')}"
    ),
    lambda d: (
        f"move the {d.one(ADJECTIVES)} {d.one(OBJECTS)} from the {d.of('inbox|outbox|archive')} "
        f"to the {d.of('inbox|outbox|archive')}"
    ),
    lambda d: d.of("yes|no|stop|thank you|good morning|good night|hello|goodbye|hello world"),
    lambda d: f"the price is {d.number(999)} {d.of('dollars|euros|percent')}",
]  # fmt: skip


def template_sentence(source: random.Random) -> str:
    """A sentence that reads naturally: a command, a report, a date."""
    return source.choice(TEMPLATES)(_Draw(source))


def sentence(source: random.Random) -> str:
    """Any utterance of the language: digits (12 %), spelling (10 %), loose words (28 %), templates (50 %)."""
    draw, kind = _Draw(source), source.random()
    if kind < 0.12:
        return draw.several(DIGITS, 8)
    if kind < 0.22:
        letters = draw.several(SPELLING, 5)
        return f"{letters} {draw.several(DIGITS, 3)}" if source.random() < 0.4 else letters
    if kind < 0.50:
        return draw.several(VOCABULARY, 8)
    return template_sentence(source)


@cache
def _parent_sentences() -> frozenset[str]:
    """Checksums of sentences that the first model (the starting weights) was trained on; see README.md."""
    return frozenset(_PARENT_SENTENCES.read_text().split()) if _PARENT_SENTENCES.exists() else frozenset()


def checksum(text: str) -> str:
    return f"{zlib.crc32(text.encode()):08x}"


def in_held_out_share(text: str) -> bool:
    """One sentence of eight, by its checksum, is never trained on; up to three words are too few to hold out."""
    return len(text.split()) > 3 and int(checksum(text), 16) % _HELD_OUT_SHARE == 0


def is_held_out(text: str) -> bool:
    """Neither these scripts nor those of the first model ever trained on it."""
    return in_held_out_share(text) and checksum(text) not in _parent_sentences()


def training_sentence(source: random.Random) -> str:
    while in_held_out_share(text := sentence(source)):
        pass
    return text


def held_out_sentence(source: random.Random, draw: Callable[[random.Random], str] = sentence) -> str:
    """A sentence for measuring: up to three words, or longer and never trained on (the first model included)."""
    text = draw(source)
    if len(text.split()) <= 3:
        return text
    while not is_held_out(text):
        text = draw(source)
    return text
