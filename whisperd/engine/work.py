"""work: what passes between the front end and the model: one window, from its sound to its text.

Owns: `WindowWork` and the nouns of its decoding. A window is the unit of checkpoint; a *pass* decodes one stretch of it (at most 30 s
from `seek`); an *attempt* is all passes over the window in one *way*; the quality gate chooses among attempts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from whisperd.vocabulary import JobOptions, Segment, Verdict

if TYPE_CHECKING:
    from numpy.typing import NDArray

FRAMES = 3000  # mel frames (10 ms) of a full window: the 30 s that Whisper was trained on


class Language(NamedTuple):
    """A language code and how sure the model was (1.0 when it was given)."""

    code: str
    probability: float


UNHEARD = Language("", 0.0)


class Way(NamedTuple):
    """How a window is decoded: the length given to the encoder, the temperature, and whether pause by pause with the text before."""

    frames: int = FRAMES
    temperature: float = 0.0
    by_stretch: bool = False


class Drawn(NamedTuple):
    """What the decoder wrote in one pass. `avg_logprob` as faster-whisper counts it: the end of text is one of the tokens."""

    tokens: tuple[int, ...]
    avg_logprob: float
    no_speech_prob: float
    temperature: float


@dataclass(eq=False)
class Attempt:
    """One decoding of a whole window. `spans` are the frames still to be decoded; the first is under way, from `seek`."""

    way: Way
    spans: list[tuple[int, int]]
    seek: int
    segments: list[Segment] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    phantoms: int = 0  # segments dropped as made up on silence
    last_speech_s: float = 0.0  # in the window: word times after it look back at it
    complaints: tuple[str, ...] = ()


@dataclass(eq=False)
class WindowWork:
    """One window on its way through the model.

    `features` is the log-mel [n_mels, frames] of its content, at most 30 s. `state` is the front end's, from which this window and
    those after it can be found again. `previous` are the text tokens before it (sequential mode), `only_vote` says that it is
    encoded for the choice of the language alone.
    """

    job: int
    number: int
    options: JobOptions
    start_s: float
    end_s: float
    features: NDArray[Any]
    stretches_s: tuple[tuple[float, float], ...] = ()
    channel: int = 0
    state: bytes = b""
    previous: tuple[int, ...] = ()
    prompted: bool = True  # the operator's prompt still holds (sequential mode loses it with the text before)
    last_speech_s: float = 0.0
    only_vote: bool = False
    apart: bool = False  # decoded alone: a call that it shared failed
    afresh: bool = False  # the model was loaded anew once for its sake: even alone it did not fit into memory
    language: Language = UNHEARD
    ways: list[Way] = field(default_factory=list)  # still to be tried
    attempt: Attempt = field(init=False)  # under way
    attempts: list[Attempt] = field(default_factory=list)
    encoded: dict[tuple[int, int, int], Any] = field(default_factory=dict)  # by start, end and padded length, in frames
    chosen: Attempt = field(init=False)  # once the window is through
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def speech_s(self) -> float:
        return sum(end - start for start, end in self.stretches_s)

    @property
    def span(self) -> tuple[int, int, int]:
        """Start, end and padded length, in frames, of the pass under way."""
        attempt = self.attempt
        end = min(attempt.spans[0][1], attempt.seek + FRAMES)
        return attempt.seek, end, max(attempt.way.frames, end - attempt.seek)
