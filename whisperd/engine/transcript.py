"""transcript: one window of audio becomes segments of text.

Owns: the call into faster-whisper and the translation of its result. The window was cut at speech boundaries already, so
faster-whisper's own voice filter and previous-text conditioning are off: windows are independent, and so they can be resumed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from faster_whisper.audio import pad_or_trim
from faster_whisper.tokenizer import Tokenizer
from faster_whisper.transcribe import TranscriptionOptions, get_suppressed_tokens

from whisperd.engine.speech import WindowAudio
from whisperd.vocabulary import JobOptions, Segment, Word


class Language(NamedTuple):
    """A language code and how sure the model was (1.0 when it was given)."""

    code: str
    probability: float


class WindowDecoding:
    """Segments of one window, lazily: iterate, then read `language`.

    The window is encoded once: the language is read off the same encoder output that is decoded afterwards (faster-whisper's own
    `transcribe` encodes it a second time). Raises ValueError for a language the model does not know.
    """

    def __init__(self, whisper: Any, audio: WindowAudio, options: JobOptions, known: Language | None) -> None:
        self._audio = audio
        features = whisper.feature_extractor(audio.samples)
        encoded = whisper.encode(pad_or_trim(features[:, : min(features.shape[1] - 1, whisper.feature_extractor.nb_max_frames)]))
        self.language = known or _language(whisper, encoded, options.language)
        tokenizer = Tokenizer(whisper.hf_tokenizer, whisper.model.is_multilingual, task=options.task, language=self.language.code)
        self._segments = whisper.generate_segments(features, tokenizer, _decoding_options(tokenizer, options), False, encoded)

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


def _language(whisper: Any, encoded: Any, wanted: str) -> Language:
    if not whisper.model.is_multilingual:
        return Language("en", 1.0)
    if wanted != "auto":
        return Language(wanted, 1.0)
    token, probability = whisper.model.detect_language(encoded)[0][0]
    return Language(token[2:-2], round(float(probability), 4))


def _decoding_options(tokenizer: Tokenizer, options: JobOptions) -> TranscriptionOptions:
    """faster-whisper's own defaults, but for what a job may choose and for previous text, which would make windows depend on each other."""
    return TranscriptionOptions(
        beam_size=options.beam_size,
        best_of=5,
        patience=1,
        length_penalty=1,
        repetition_penalty=1,
        no_repeat_ngram_size=0,
        log_prob_threshold=-1.0,
        no_speech_threshold=0.6,
        compression_ratio_threshold=2.4,
        condition_on_previous_text=False,
        prompt_reset_on_temperature=0.5,
        temperatures=list(options.temperatures),
        initial_prompt=options.initial_prompt or None,
        prefix=None,
        suppress_blank=True,
        suppress_tokens=get_suppressed_tokens(tokenizer, (-1,)),
        without_timestamps=False,
        max_initial_timestamp=1.0,
        word_timestamps=options.word_timestamps,
        prepend_punctuations="\"'“¿([{-",
        append_punctuations="\"'.。,，!！?？:：”)]}、",
        multilingual=False,
        max_new_tokens=None,
        clip_timestamps="0",
        hallucination_silence_threshold=None,
        hotwords=options.hotwords or None,
    )
