"""render: one transcript as txt, srt, vtt, tsv or json. Pure, and the same transcript gives the same bytes: after a crash the
outbox knows its own files by that.

Owns: `FORMATS`, the renderers by name, and what each shape promises:

  txt   one line for each segment; where there are speakers, a name and a colon where another one begins to speak
  srt   subtitles (see there), numbered, comma milliseconds, CRLF-free; `-->` in a text becomes `->`, since SubRip cannot quote it; each
        subtitle of a speaker begins with the name and a colon
  vtt   WebVTT, as subtitles; `&`, `<` and `>` are escaped; a speaker is a voice: `<v Name>`
  tsv   `start`, `end` (milliseconds) and `text` of each segment, tab-separated, with a header line: what openai-whisper writes; names
        as in srt
  json  everything, with its provenance: see `document`

Times are those of the whole recording: where its sound begins later than its picture, `start_offset_s` is added to every one (F104).
Texts are cleaned alike for all of them: one line, no control characters. Segments without any text have no line and no cue;
json keeps them. Fails with UnknownFormat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple, TypeVar

import msgspec

from whisperd.outbox.failures import UnknownFormat
from whisperd.outbox.subtitles import SHAPE, Subtitle, subtitles
from whisperd.outbox.text import line_of, named, one_line, span, speaker_of, whole_characters
from whisperd.vocabulary import Segment, SubtitleShape, Transcript, WindowVerdict, Word

_ARROW = re.compile("-{2,}>")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class Cue(NamedTuple):
    """One segment with its place, in whole milliseconds, and who says it ("" when nobody is named)."""

    start_ms: int
    end_ms: int
    text: str
    speaker: str = ""


def render(transcript: Transcript, wanted: str, shape: SubtitleShape = SHAPE) -> bytes:
    """The transcript in one format. Raises UnknownFormat."""
    if wanted not in FORMATS:
        raise UnknownFormat(f"cannot write a transcript as {wanted!r}", hint=f"formats are {', '.join(FORMATS)}")
    return FORMATS[wanted](shifted(transcript), shape).encode()


# --- text and time -------------------------------------------------------------------------------------------------------------


def shifted(transcript: Transcript) -> Transcript:
    """Every time as the recording as a whole counts it."""
    offset = transcript.summary.start_offset_s
    if offset == 0:
        return transcript
    segments = tuple(
        _moved(msgspec.structs.replace(segment, words=tuple(_moved(word, offset) for word in segment.words)), offset)
        for segment in transcript.segments
    )
    windows = tuple(_moved(window, offset) for window in transcript.windows)
    return msgspec.structs.replace(transcript, segments=segments, windows=windows)


_Timed = TypeVar("_Timed", Segment, Word, WindowVerdict)


def _moved(part: _Timed, offset: float) -> _Timed:
    return msgspec.structs.replace(part, start_s=_later(part.start_s, offset), end_s=_later(part.end_s, offset))


def _later(seconds: float, offset: float) -> float:
    return max(0.0, round(seconds + offset, 6))


def _lines(transcript: Transcript) -> Iterator[str]:
    """The texts, each change of the speaker named."""
    last = ""
    for segment in transcript.segments:
        text, speaker = line_of(segment), speaker_of(segment)
        if text:
            yield text if speaker == last else named(speaker, text)
            last = speaker


def cues(transcript: Transcript) -> list[Cue]:
    """The segments as players can show them: in order, each at least a millisecond long, none over the next one of the same speaker.

    Two speakers may talk at the same time.
    """
    found: list[Cue] = []
    latest: dict[str, int] = {}  # of each speaker
    for segment in transcript.segments:
        text, speaker = line_of(segment), speaker_of(segment)
        if not text:
            continue
        start, end = span(segment)
        start = max(start, found[-1].start_ms) if found else start
        if speaker in latest:
            before = found[latest[speaker]]
            start = max(start, before.start_ms + 1)
            found[latest[speaker]] = before._replace(end_ms=min(before.end_ms, start))
        latest[speaker] = len(found)
        found.append(Cue(start, max(end, start + 1), text, speaker))
    return found


def timestamp(ms: int, comma: str) -> str:
    """`hh:mm:ss,mmm`; hours grow past two digits when they must."""
    seconds, ms = divmod(ms, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02}:{minutes:02}:{seconds:02}{comma}{ms:03}"


def _timing(cue: Subtitle, comma: str) -> str:
    return f"{timestamp(cue.start_ms, comma)} --> {timestamp(cue.end_ms, comma)}"


# --- the formats ---------------------------------------------------------------------------------------------------------------


def _txt(transcript: Transcript, _shape: SubtitleShape) -> str:
    return "".join(f"{line}\n" for line in _lines(transcript))


def _srt(transcript: Transcript, shape: SubtitleShape) -> str:
    shown = enumerate(subtitles(transcript.segments, shape, labels=True), 1)
    return "\n".join(f"{number}\n{_timing(cue, ',')}\n{_ARROW.sub('->', named(cue.speaker, _text(cue)))}\n" for number, cue in shown)


def _vtt(transcript: Transcript, shape: SubtitleShape) -> str:
    shown = subtitles(transcript.segments, shape, labels=False)
    return "\n".join(["WEBVTT\n", *(f"{_timing(cue, '.')}\n{_voice(cue)}{_escaped(_text(cue))}\n" for cue in shown)])


def _text(cue: Subtitle) -> str:
    return "\n".join(cue.lines)


def _voice(cue: Subtitle) -> str:
    return f"<v {_escaped(cue.speaker)}>" if cue.speaker else ""


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _tsv(transcript: Transcript, _shape: SubtitleShape) -> str:
    rows = (f"{cue.start_ms}\t{cue.end_ms}\t{named(cue.speaker, cue.text)}\n" for cue in cues(transcript))
    return "".join(["start\tend\ttext\n", *rows])


def _json(transcript: Transcript, _shape: SubtitleShape) -> str:
    return json.dumps(document(transcript), ensure_ascii=False, allow_nan=False, indent=1) + "\n"


def document(transcript: Transcript) -> dict[str, Any]:
    """The json format: its keys and their order are a contract, `schema` names its version. Times are seconds.

    `text` is what the txt format holds. `segments[].id` counts from 0; `speaker`, `doubts` (what speaks against a text) and `words` are
    there only when there are any. `quality` is the verdict on the whole: good, second_pass or doubtful. `windows` are the stretches that
    were decoded, each with its language and its own verdict.
    """
    return {
        "schema": transcript.schema,
        "source": _source(transcript),
        "engine": _engine(transcript),
        "options": msgspec.to_builtins(transcript.options),
        "language": transcript.language,
        "language_probability": transcript.language_probability,
        "quality": _quality(transcript),
        "text": "\n".join(_lines(transcript)),
        "segments": [_segment(number, segment) for number, segment in enumerate(transcript.segments)],
        "windows": [_window(window) for window in transcript.windows],
    }


def _source(transcript: Transcript) -> dict[str, Any]:
    summary = transcript.summary
    return {
        "name": whole_characters(transcript.source),
        "size": transcript.size,
        "modified_at": _calendar(transcript.mtime_ns),
        "mtime_ns": transcript.mtime_ns,
        "sha256": summary.source_sha256,
        "container": summary.container,
        "codec": summary.codec,
        "track": summary.track,
        "tracks": summary.tracks,
        "channels": summary.channels,
        "duration_s": round(summary.duration_s, 3),
        "speech_s": round(summary.speech_s, 3),
        "start_offset_s": round(summary.start_offset_s, 6),
    }


def _engine(transcript: Transcript) -> dict[str, Any]:
    summary = transcript.summary
    return {
        "version": summary.engine_version,
        "model": summary.model,
        "model_revision": summary.model_revision,
        "device": summary.device,
        "compute_type": summary.compute_type,
        "encoder": summary.encoder,
    }


def _quality(transcript: Transcript) -> dict[str, Any]:
    """The verdict and what speaks against the text (`complaints`) and against the recording (`doubts`: it may be cut off)."""
    quality = transcript.quality
    return {
        "verdict": quality.verdict,
        "windows": quality.windows,
        "second_pass": quality.second_pass,
        "doubtful": quality.doubtful,
        "complaints": list(quality.complaints),
        "doubts": list(transcript.summary.doubts),
    }


def _segment(number: int, segment: Segment) -> dict[str, Any]:
    start, end = span(segment)
    return {
        "id": number,
        "start": start / 1000,
        "end": end / 1000,
        **({"speaker": speaker_of(segment)} if speaker_of(segment) else {}),
        "text": line_of(segment),
        "avg_logprob": round(segment.avg_logprob, 4),
        "no_speech_prob": round(segment.no_speech_prob, 4),
        "compression_ratio": round(segment.compression_ratio, 4),
        "temperature": round(segment.temperature, 4),
        **({"doubts": list(segment.doubts)} if segment.doubts else {}),
        **({"words": [_word(word) for word in segment.words]} if segment.words else {}),
    }


def _window(window: WindowVerdict) -> dict[str, Any]:
    return {
        "start": window.start_s,
        "end": window.end_s,
        "channel": window.channel,
        "language": window.language,
        "language_probability": window.language_probability,
        "verdict": window.verdict.quality,
        "attempts": window.verdict.passes,
        "complaints": list(window.verdict.complaints),
    }


def _word(word: Word) -> dict[str, Any]:
    start, end = span(word)
    return {"start": start / 1000, "end": end / 1000, "word": one_line(word.text), "probability": round(word.probability, 4)}


def _calendar(mtime_ns: int) -> str | None:
    """ISO 8601 in UTC, or None: a broken clock or share gives years that no calendar has."""
    try:
        return (_EPOCH + timedelta(microseconds=mtime_ns // 1000)).isoformat().replace("+00:00", "Z")
    except OverflowError:
        return None


FORMATS: dict[str, Callable[[Transcript, SubtitleShape], str]] = {"txt": _txt, "srt": _srt, "vtt": _vtt, "tsv": _tsv, "json": _json}
