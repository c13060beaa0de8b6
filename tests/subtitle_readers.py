"""Two strict readers of subtitles, by the letter: WebVTT (https://www.w3.org/TR/webvtt1/) as far as a writer of plain cues may use it, and
SubRip by the grammar its players share (counter, times, lines, an empty line). Whatever they would have to guess fails an assertion."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

_VTT_TIME = r"(?:(\d{2,}):)?([0-5]\d):([0-5]\d)\.(\d{3})"
_SRT_TIME = r"(\d{2,}):([0-5]\d):([0-5]\d),(\d{3})"
_ENTITY = re.compile("&(amp|lt|gt|lrm|rlm|nbsp);")
_NEVER = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


@dataclass
class Cue:
    """What a screen shows at once."""

    start_ms: int
    end_ms: int
    lines: tuple[str, ...]
    speaker: str = ""

    @property
    def text(self) -> str:
        return " ".join(self.lines)


def _timing(line: str, time: str) -> tuple[int, int]:
    found = re.fullmatch(f"{time} --> {time}", line, re.ASCII)
    assert found, line
    figures = [int(figure or 0) for figure in found.groups()]
    start, end = (((h * 60 + m) * 60 + s) * 1000 + ms for h, m, s, ms in (figures[:4], figures[4:]))
    assert start < end
    return start, end


def _blocks(text: str) -> list[list[str]]:
    """Blocks of lines, one empty line between two, none at either end."""
    assert text.endswith("\n") and not text.endswith("\n\n") and not text.startswith("\n") and "\n\n\n" not in text
    return [block.split("\n") for block in text[:-1].split("\n\n")]


def _line(line: str) -> str:
    assert line.strip() == line != ""
    assert "-->" not in line
    assert not _NEVER.search(line)
    return line


def read_srt(data: bytes) -> list[Cue]:
    if not data:
        return []
    found = []
    for number, (counter, timing, *lines) in enumerate(_blocks(data.decode("utf-8")), 1):
        assert counter == str(number)
        assert lines
        found.append(Cue(*_timing(timing, _SRT_TIME), tuple(map(_line, lines))))
    return found


def read_vtt(data: bytes) -> list[Cue]:
    header, *blocks = _blocks(data.decode("utf-8"))
    assert header == ["WEBVTT"]
    found = []
    for timing, *lines in blocks:
        assert lines
        first = re.fullmatch("(?:<v ([^<>]+)>)?([^<>]+)", _line(lines[0]))
        assert first, lines
        rest = [_line(line) for line in lines[1:]]
        assert not any(char in line for line in rest for char in "<>")
        said = tuple(_unescaped(line) for line in (first[2], *rest))
        found.append(Cue(*_timing(timing, _VTT_TIME), said, _unescaped(first[1] or "")))
    assert all(one.start_ms <= two.start_ms for one, two in pairwise(found)), "the specification orders cues by their start"
    return found


def _unescaped(text: str) -> str:
    assert "&" not in _ENTITY.sub("", text), text
    return _ENTITY.sub(lambda found: {"amp": "&", "lt": "<", "gt": ">", "lrm": "\u200e", "rlm": "\u200f", "nbsp": "\u00a0"}[found[1]], text)


def runs_forward(found: Iterable[Cue]) -> bool:
    """Whether cues begin in order, and none lies over the next one of the same speaker."""
    found = list(found)
    by_speaker: dict[str, list[Cue]] = {}
    for cue in found:
        by_speaker.setdefault(cue.speaker, []).append(cue)
    alone = all(one.end_ms <= two.start_ms for own in by_speaker.values() for one, two in pairwise(own))
    return alone and all(one.start_ms <= two.start_ms for one, two in pairwise(found))
