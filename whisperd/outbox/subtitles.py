"""subtitles: segments cut into subtitles as broadcasters want them, by a `SubtitleShape` (FEATURES F96). Pure.

Owns: what a subtitle may hold (lines of a width, at most so many; at most so long), where text is divided and lines are broken, and the
times. Every word appears once and in order, and no subtitle holds two segments, so never two speakers. Places are chosen by cost, over
the whole segment at once: at punctuation and pauses first, then evenly, and without a subtitle or a last line of a few letters.
Starts are those of the words where the words have times, else shared out over the segment by columns; starts are never moved for the
looks of it, ends are. The limits are for what can be kept: a word longer than a line stays whole, and fast speech is read fast.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from whisperd.outbox.text import CLAUSE, SENTENCE, Part, Place, columns, line_of, named, one_line, parts_of, place_after, span, squeezed
from whisperd.outbox.text import speaker_of as speaker_name
from whisperd.vocabulary import Segment, SubtitleShape

SHAPE = SubtitleShape()

_SUBTITLE = 4.0  # each one costs, so that there are few
_FULL = 6.0  # times the square of how full it is: with the cost above, four fifths full is best, and equal ones are better than unequal
_ORPHAN = 30.0
_OVERLONG = 30.0
_BRIEF = 10.0
_UNEVEN = 20.0
_PAUSE_MS = 500
_BREATH_MS = 200


class Subtitle(NamedTuple):
    """What a screen shows at once. Whole milliseconds; `speaker` is "" when nobody is named, and no part of the lines."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str = ""


class Piece(NamedTuple):
    """A part of a text with its time and what a break after it costs."""

    text: str
    spaced: bool
    columns: int
    start_ms: int
    end_ms: int
    after: Place


class Room(NamedTuple):
    """How much fits: `indent` columns of the first line are taken by the speaker's name."""

    line: int
    lines: int
    indent: int
    brief_ms: float
    long_ms: float

    @property
    def capacity(self) -> int:
        return self.line * self.lines - self.indent


def subtitles(segments: Iterable[Segment], shape: SubtitleShape, *, labels: bool) -> list[Subtitle]:
    """The segments as subtitles, in the order of their starts. With `labels` the name of the speaker takes its place in the first line."""
    drafts = [draft for segment in segments for draft in _drafts(segment, shape, labels)]
    return fitted(drafts, shape)


def _drafts(segment: Segment, shape: SubtitleShape, labels: bool) -> Iterator[Subtitle]:
    speaker = speaker_name(segment)
    label = columns(named(speaker, " ")) if labels and speaker else 0
    # A name of more than half a line is counted as half of one: else it would leave a word for each subtitle.
    indent = min(label, shape.line_chars // 2)
    room = Room(shape.line_chars, shape.lines, indent, shape.duration_min_s * 1000, shape.duration_max_s * 1000)
    for pieces in divided(timed(segment, parts_of(line_of(segment), shape.line_chars)), room):
        yield Subtitle(pieces[0].start_ms, pieces[-1].end_ms, laid_out(pieces, room), speaker)


# --- times of parts ------------------------------------------------------------------------------------------------------------


def timed(segment: Segment, parts: Sequence[Part]) -> list[Piece]:
    """Each part with its time, never backwards."""
    if not parts:
        return []
    ends = list(accumulate(len(squeezed(part.text)) for part in parts))
    spans = _by_words(segment, ends, "".join(squeezed(part.text) for part in parts)) or _by_columns(segment, parts)
    places = [*(_place(spans, number, part, parts[number + 1]) for number, part in enumerate(parts[:-1])), SENTENCE]
    return [Piece(*part, columns(part.text), *span, place) for part, span, place in zip(parts, spans, places, strict=True)]


def _by_words(segment: Segment, ends: Sequence[int], text: str) -> list[tuple[int, int]]:
    """From the words' own times; nothing when they are not the words of this text."""
    owner: list[int] = []  # of each character, the number of its word
    spoken = [squeezed(one_line(word.text)) for word in segment.words]
    if not text or "".join(spoken) != text:
        return []
    for number, word in enumerate(spoken):
        owner.extend([number] * len(word))
    times = [span(word) for word in segment.words]
    found: list[tuple[int, int]] = []
    before = 0
    for begin, end in zip([0, *ends], ends, strict=False):
        start = max(before, times[owner[begin]][0])
        found.append((start, max(start, times[owner[end - 1]][1])))
        before = start
    return found


def _by_columns(segment: Segment, parts: Sequence[Part]) -> list[tuple[int, int]]:
    start, end = span(segment)
    sums = list(accumulate((columns(part.text) for part in parts), initial=0))
    marks = [start + (end - start) * done // max(1, sums[-1]) for done in sums]
    return list(pairwise(marks))


def _place(spans: Sequence[tuple[int, int]], number: int, part: Part, following: Part) -> Place:
    """A pause that was heard is as good as punctuation."""
    pause = spans[number + 1][0] - spans[number][1]
    place = place_after(part.text, following)
    if pause >= _PAUSE_MS:
        return SENTENCE
    return min(place, CLAUSE) if pause >= _BREATH_MS else place


# --- dividing ------------------------------------------------------------------------------------------------------------------


def divided(pieces: Sequence[Piece], room: Room) -> list[Sequence[Piece]]:
    """The pieces in as many subtitles as they need, at the places that cost least together."""
    if not pieces:
        return []
    if pieces[-1].end_ms - pieces[0].start_ms <= room.long_ms and sum(1 for _ in _ends(pieces, 0, room)) == len(pieces):
        return [pieces]
    best = [(0.0, 0), *((float("inf"), 0) for _ in pieces)]  # for each end: the least cost, and where its last subtitle begins
    for begin in range(len(pieces)):
        width = 0
        for end in _ends(pieces, begin, room):
            width += pieces[end - 1].columns + (pieces[end - 1].spaced and end - 1 > begin)
            cost = best[begin][0] + _cost(pieces[begin], pieces[end - 1], width, room)
            if cost < best[end][0]:
                best[end] = (cost, begin)
    found: list[Sequence[Piece]] = []
    end = len(pieces)
    while end:
        begin = best[end][1]
        found.append(pieces[begin:end])
        end = begin
    return found[::-1]


def _ends(pieces: Sequence[Piece], begin: int, room: Room) -> Iterator[int]:
    """Where a subtitle that begins there may end, as far as its lines reach. One piece always fits."""
    lines, used, empty = 1, room.indent, True
    for number in range(begin, len(pieces)):
        piece = pieces[number]
        wanted = piece.columns + (piece.spaced and not empty)
        if used + wanted > room.line and not empty:
            lines, used, wanted = lines + 1, 0, piece.columns
            if lines > room.lines:
                return
        used, empty = used + wanted, False
        yield number + 1


def _cost(first: Piece, last: Piece, width: int, room: Room) -> float:
    """What one subtitle costs."""
    lasts_ms = last.end_ms - first.start_ms
    cost = _SUBTITLE + last.after.subtitle + _FULL * (width / room.capacity) ** 2
    if width * 4 < room.line:
        cost += _ORPHAN
    if lasts_ms > room.long_ms:
        cost += _OVERLONG + 10 * (lasts_ms / room.long_ms - 1)
    elif lasts_ms < room.brief_ms:
        cost += _BRIEF
    return cost


# --- lines ---------------------------------------------------------------------------------------------------------------------


def laid_out(pieces: Sequence[Piece], room: Room) -> tuple[str, ...]:
    """The text of one subtitle in as few lines as hold it, broken where it costs least."""
    count = _least_lines(pieces, room)
    mean = (room.indent + sum(piece.columns + piece.spaced for piece in pieces) - 1) / count
    layer: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}  # where lines so far end: their cost, and each one's end
    for number in range(1, count + 1):
        following: dict[int, tuple[float, tuple[int, ...]]] = {}
        for begin, (cost, ends) in layer.items():
            for end, width in _widths(pieces, begin, room):
                extra = cost + _line_cost(pieces[end - 1], width - mean, room)
                if number == count and width * 4 < room.line:
                    extra += _ORPHAN
                if end not in following or extra < following[end][0]:
                    following[end] = (extra, (*ends, end))
        layer = following
    ends = layer[len(pieces)][1]
    return tuple(_joined(pieces[begin:end]) for begin, end in zip((0, *ends), ends, strict=False))


def _line_cost(last: Piece, uneven: float, room: Room) -> float:
    return last.after.line + _UNEVEN * (uneven / room.line) ** 2


def _least_lines(pieces: Sequence[Piece], room: Room) -> int:
    count, begin = 0, 0
    while begin < len(pieces):
        *_, (begin, _) = _widths(pieces, begin, room)
        count += 1
    return count


def _widths(pieces: Sequence[Piece], begin: int, room: Room) -> Iterator[tuple[int, int]]:
    """Where a line that begins there may end, and how wide it is then. One piece always fits."""
    width = room.indent if begin == 0 else 0
    for number in range(begin, len(pieces)):
        width += pieces[number].columns + (pieces[number].spaced and number > begin)
        if width > room.line and number > begin:
            return
        yield number + 1, width


def _joined(pieces: Sequence[Piece]) -> str:
    return "".join(f" {piece.text}" if piece.spaced else piece.text for piece in pieces).strip()


# --- times of subtitles --------------------------------------------------------------------------------------------------------


def fitted(drafts: Iterable[Subtitle], shape: SubtitleShape) -> list[Subtitle]:
    """Each one after the one before of its speaker, ended before the next, and kept long enough to be read where nobody else speaks.

    The gap is kept where at least as much is left for the subtitle itself. Two speakers may overlap where they spoke at once.
    """
    latest: dict[str, int] = {}
    started: list[Subtitle] = []
    for draft in drafts:
        start = max(draft.start_ms, latest.get(draft.speaker, -1) + 1)
        latest[draft.speaker] = start
        started.append(draft._replace(start_ms=start))
    started.sort(key=lambda subtitle: subtitle.start_ms)
    own: dict[str, int] = {}  # where the next one of each speaker begins
    found: list[Subtitle] = []
    following: int | None = None
    for subtitle in reversed(started):
        found.append(_ended(subtitle, own.get(subtitle.speaker), following, shape))
        own[subtitle.speaker] = following = subtitle.start_ms
    return found[::-1]


def _ended(subtitle: Subtitle, own: int | None, following: int | None, shape: SubtitleShape) -> Subtitle:
    """`own` and `following` are where the next one begins: of this speaker, and of anybody."""
    start = subtitle.start_ms
    longest = start + round(shape.duration_max_s * 1000)
    readable = start + round(1000 * max(shape.duration_min_s, sum(map(columns, subtitle.lines)) / shape.chars_per_s))
    end = max(subtitle.end_ms, _before(following, start, shape, wanted=readable))
    return subtitle._replace(end_ms=max(start + 1, _before(own, start, shape, wanted=min(end, longest))))


def _before(following: int | None, start: int, shape: SubtitleShape, *, wanted: int) -> int:
    """The wanted end, brought back before what follows."""
    if following is None:
        return wanted
    gap = round(shape.gap_min_s * 1000)
    return min(wanted, following - gap if following - start >= 2 * gap else following)
