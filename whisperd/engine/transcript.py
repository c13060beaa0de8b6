"""transcript: between windows and faster-whisper's own words: prompts and encoder output in, segments and verdicts out.

Owns: every call into faster-whisper's steps (prompt, split by time stamps, word alignment) and the conversion of what CTranslate2
returns. Options that a job may not choose are faster-whisper's defaults.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from whisperd.engine import quality
from whisperd.engine.work import Attempt, Drawn, WindowWork
from whisperd.vocabulary import Segment, Verdict, Word

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faster_whisper.tokenizer import Tokenizer

FRAME_S = 0.01
TIMESTAMP_S = 0.02
FRAMES_PER_TIMESTAMP = 2
MAX_INITIAL_TIMESTAMP_INDEX = 50  # 1 s
NO_SPEECH_MIN = 0.6
LOGPROB_MIN = -1.0
PASSES_MAX = 30  # of one window: a decoder that writes a word at a time is stuck
RESET_ABOVE = 0.5  # a text drawn warmer than this is no context for the next
PREPENDED = "\"'“¿([{-"
APPENDED = "\"'.。,，!！?？:：”)]}、"


# --- into the model ------------------------------------------------------------------------------------------------------------


def tokenizer(whisper: Any, task: str, language: str) -> Tokenizer:
    """Raises ValueError for a language that the model does not know."""
    from faster_whisper.tokenizer import Tokenizer

    return Tokenizer(whisper.hf_tokenizer, whisper.model.is_multilingual, task=task, language=language)


def suppressed(tokenizer: Tokenizer) -> list[int]:
    from faster_whisper.transcribe import get_suppressed_tokens

    return list(get_suppressed_tokens(tokenizer, (-1,)) or ())


def prompt(whisper: Any, tokenizer: Tokenizer, work: WindowWork) -> list[int]:
    """The tokens before the text of the pass under way: hot words, the operator's prompt or the text before, language and task."""
    before = list(work.previous)
    if work.options.initial_prompt and work.prompted and work.attempt.seek == 0:
        before = tokenizer.encode(" " + work.options.initial_prompt.strip()) + before
    if work.attempt.way.by_stretch:
        before += work.attempt.tokens
    return list(whisper.get_prompt(tokenizer, before, hotwords=work.options.hotwords or None))


def storage(features: Any) -> Any:
    """A numpy array as CTranslate2 takes it."""
    from ctranslate2 import StorageView  # type: ignore[attr-defined]

    return StorageView.from_array(features)


def rows(output: Any) -> list[Any]:
    """One output of the encoder for each window of a stack."""
    return [storage(row[None]) for row in _host(output)]


def stacked(outputs: Sequence[Any]) -> Any:
    """Encoder outputs of equal length as one."""
    return outputs[0] if len(outputs) == 1 else storage(np.concatenate([_host(output) for output in outputs]))


def _host(output: Any) -> Any:
    """An encoder output as a numpy array; numpy knows no bfloat16."""
    from ctranslate2 import DataType, Device  # type: ignore[attr-defined]

    if output.device != "cpu":
        output = output.to_device(Device.cpu)
    return np.asarray(output.to(DataType.float32) if output.dtype == DataType.bfloat16 else output)


def drawn(result: Any, temperature: float) -> Drawn:
    """What CTranslate2 found."""
    tokens = tuple(result.sequences_ids[0])
    return Drawn(tokens, float(result.scores[0]) * len(tokens) / (len(tokens) + 1), float(result.no_speech_prob), temperature)


# --- out of the model ----------------------------------------------------------------------------------------------------------


def write(whisper: Any, tokenizer: Tokenizer, work: WindowWork, drawn: Drawn) -> bool:
    """Append a pass to the attempt under way; whether more of the window is to be decoded. Where the model fails, nothing is appended."""
    attempt = work.attempt
    start, end, _ = work.span
    if drawn.no_speech_prob > NO_SPEECH_MIN and drawn.avg_logprob <= LOGPROB_MIN:
        attempt.seek = end
    else:
        attempt.seek = _segments(whisper, tokenizer, work, drawn)
    attempt.drawn.append(drawn)
    if attempt.seek <= start or len(attempt.drawn) >= PASSES_MAX:
        attempt.seek = end
    if work.options.mode == "sequential":
        return False
    if attempt.seek >= attempt.spans[0][1]:
        attempt.spans.pop(0)
        if attempt.spans:
            attempt.seek = attempt.spans[0][0]
    return bool(attempt.spans)


def _segments(whisper: Any, tokenizer: Tokenizer, work: WindowWork, drawn: Drawn) -> int:
    """Append the segments of one pass; the frame from which the next one goes on."""
    attempt = work.attempt
    start, end, _ = work.span
    found, seek, ends_there = whisper._split_segments_by_timestamps(
        tokenizer=tokenizer,
        tokens=list(drawn.tokens),
        time_offset=start * FRAME_S,
        segment_size=end - start,
        segment_duration=(end - start) * FRAME_S,
        seek=start,
    )
    if work.options.word_timestamps:
        whisper.add_word_timestamps(
            [found], tokenizer, work.encoded[work.span], end - start, PREPENDED, APPENDED, last_speech_timestamp=attempt.last_speech_s
        )
        last = next((float(raw["words"][-1]["end"]) for raw in reversed(found) if raw["words"]), None)
        if last is not None:
            attempt.last_speech_s = last
            if not ends_there and last > start * FRAME_S:
                seek = round(last / FRAME_S)
    ratio = compression_ratio(tokenizer.decode(list(drawn.tokens)).strip())
    for raw in found:
        text = tokenizer.decode(raw["tokens"])
        if raw["start"] == raw["end"] or not text.strip():
            continue
        segment = _segment(work, raw, text, drawn, ratio)
        if quality.phantom(
            segment.text,
            (segment.start_s, segment.end_s),
            _heard(work),
            no_speech_prob=segment.no_speech_prob,
            avg_logprob=segment.avg_logprob,
        ):
            attempt.phantoms += 1
        else:
            attempt.tokens += raw["tokens"]
            attempt.segments.append(segment)
    return int(seek)


def _segment(work: WindowWork, raw: dict[str, Any], text: str, drawn: Drawn, ratio: float) -> Segment:
    def place(in_window_s: float) -> float:
        """Seconds in the recording, to the millisecond, never past the window."""
        return round(min(work.start_s + float(in_window_s), work.end_s), 3)

    return Segment(
        start_s=place(raw["start"]),
        end_s=place(max(raw["start"], raw["end"])),
        text=text.strip(),
        avg_logprob=round(drawn.avg_logprob, 4),
        no_speech_prob=round(drawn.no_speech_prob, 4),
        compression_ratio=round(ratio, 4),
        temperature=round(drawn.temperature, 2),
        speaker=_speaker(work),
        words=tuple(
            Word(
                start_s=place(word["start"]),
                end_s=place(max(word["start"], word["end"])),
                text=word["word"],
                probability=round(float(word["probability"]), 4),
            )
            for word in raw.get("words") or ()
        ),
    )


def _speaker(work: WindowWork) -> str:
    if work.options.channels != "speakers":
        return ""
    names = work.options.speakers
    return names[work.channel] if work.channel < len(names) else f"Channel {work.channel + 1}"


def compression_ratio(text: str) -> float:
    """Bytes of a text over its bytes compressed: repetition compresses well (as openai-whisper measures it)."""
    encoded = text.encode()
    return len(encoded) / len(zlib.compress(encoded))


# --- the gate ------------------------------------------------------------------------------------------------------------------


def judge(tokenizer: Tokenizer, work: WindowWork) -> tuple[str, ...]:
    """What speaks against the attempt that was just completed."""
    return quality.complaints(_decoded(tokenizer, work.attempt), _heard(work))


def again(work: WindowWork) -> bool:
    """Whether another way is to be tried. Sequential mode goes by faster-whisper's own two criteria, and is equal to it."""
    complaints = work.attempt.complaints
    if work.options.mode == "sequential":
        drawn = work.attempt.drawn[-1]
        silence = drawn.no_speech_prob > NO_SPEECH_MIN and drawn.avg_logprob < LOGPROB_MIN
        return bool(work.ways) and not silence and ("compression" in complaints or "logprob" in complaints)
    return bool(work.ways) and bool(complaints)


def conclude(tokenizer: Tokenizer, work: WindowWork) -> None:
    """Choose the best attempt; its verdict marks what is still in doubt."""
    decoded = [_decoded(tokenizer, attempt) for attempt in work.attempts]
    if work.options.mode == "sequential":
        best = quality.choose_in_order(decoded)
    else:
        best = quality.choose([(found, attempt.complaints) for found, attempt in zip(decoded, work.attempts, strict=True)])
    chosen = work.chosen = work.attempts[best]
    work.verdict = Verdict(
        quality=quality.quality_of(len(work.attempts), chosen.complaints), passes=len(work.attempts), complaints=chosen.complaints
    )
    if chosen.complaints:
        chosen.segments = [
            msgspec.structs.replace(segment, doubts=doubts)
            for segment, doubts in zip(chosen.segments, quality.doubts_of(chosen.segments, chosen.complaints, _heard(work)), strict=True)
        ]


def _decoded(tokenizer: Tokenizer, attempt: Attempt) -> quality.Decoded:
    text_tokens = tuple(token for token in attempt.tokens if token < tokenizer.eot)
    text = tokenizer.decode(list(text_tokens)).strip()
    lengths = [len(drawn.tokens) + 1 for drawn in attempt.drawn]
    return quality.Decoded(
        text=text,
        tokens=text_tokens,
        avg_logprob=sum(drawn.avg_logprob * length for drawn, length in zip(attempt.drawn, lengths, strict=True)) / sum(lengths),
        no_speech_prob=max(drawn.no_speech_prob for drawn in attempt.drawn),
        compression_ratio=compression_ratio(text),
        temperature=attempt.way.temperature,
        spans_s=tuple((segment.start_s, segment.end_s) for segment in attempt.segments),
    )


def _heard(work: WindowWork) -> quality.Heard:
    return quality.Heard(work.start_s, work.end_s, work.stretches_s)
