"""transcript: one window of audio becomes segments of text.

Owns: the call into faster-whisper and the translation of its result. The window was cut at speech boundaries already, so
faster-whisper's own voice filter and previous-text conditioning are off: windows are independent, and so they can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from whisperd.engine.speech import WindowAudio
from whisperd.vocabulary import JobOptions, Segment, Word


class Language(NamedTuple):
    """A language code and how sure the model was (1.0 when it was given)."""

    code: str
    probability: float


class WindowDecoding:
    """Segments of one window, lazily: iterate, then read `language`."""

    def __init__(self, whisper: Any, audio: WindowAudio, options: JobOptions, known: Language | None) -> None:
        given = options.language if options.language != "auto" else None
        self._audio = audio
        self._segments, info = whisper.transcribe(
            audio.samples,
            language=known.code if known else given,
            task=options.task,
            beam_size=options.beam_size,
            temperature=list(options.temperatures),
            initial_prompt=options.initial_prompt or None,
            hotwords=options.hotwords or None,
            word_timestamps=options.word_timestamps,
            condition_on_previous_text=False,
            vad_filter=False,
        )
        self.language = known or Language(str(info.language), round(float(info.language_probability), 4))

    def __iter__(self) -> Iterator[Segment]:
        for raw in self._segments:
            segment = self._segment(raw)
            if segment.text:
                yield segment

    def _segment(self, raw: Any) -> Segment:
        return Segment(
            start_s=self._place(raw.start),
            end_s=self._place(max(raw.start, raw.end)),
            text=raw.text.strip(),
            avg_logprob=round(float(raw.avg_logprob), 4),
            no_speech_prob=round(float(raw.no_speech_prob), 4),
            compression_ratio=round(float(raw.compression_ratio), 4),
            temperature=round(float(raw.temperature or 0.0), 2),
            words=tuple(
                Word(
                    start_s=self._place(word.start),
                    end_s=self._place(word.end),
                    text=word.word,
                    probability=round(float(word.probability), 4),
                )
                for word in raw.words or ()
            ),
        )

    def _place(self, in_window_s: float) -> float:
        """Seconds in the recording, to the millisecond, never past the window."""
        return round(min(self._audio.start_s + float(in_window_s), self._audio.end_s), 3)
