"""vocabulary: the nouns of whisperd, as frozen values.

Owns: Sighting, State, Failure, Media, Job options, Segment, Window, Transcript, Reading, Plan. No behaviour beyond what follows from
the values themselves. All are msgspec structs: they travel over the wire and into the ledger as strict, typed JSON.
Times are seconds since the epoch (`_at`), durations and positions in a recording are seconds (`_s`), names are bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum

import msgspec


class Noun(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of every value here: immutable, strict when decoded."""


class State(StrEnum):
    """Where a job stands; the arrows between the states are rows of the ledger's `transition` table."""

    SEEN = "seen"
    READY = "ready"
    RUNNING = "running"
    TRANSCRIBED = "transcribed"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    GONE = "gone"


LIVE = (State.SEEN, State.READY, State.RUNNING)
"""States in which the source is still needed: at most one such job for a path."""


class FailureKind(StrEnum):
    """What a failure means for the next attempt (DESIGN §4, retry policy)."""

    PERMANENT = "permanent"  # no audio, corrupt, refused: trying again cannot help
    TRANSIENT = "transient"  # worker died, out of memory, timeout: try again, a bounded number of times
    WAITING = "waiting"  # share, disk, GPU or model absent: no attempt is spent


class Failure(Noun, frozen=True):
    """Why something did not work: a stable code, a sentence, and what to do."""

    kind: FailureKind
    code: str
    what: str
    hint: str = ""


class Sighting(Noun, frozen=True):
    """One file as a scan saw it. `path` is relative to the inbox, in bytes."""

    path: bytes
    dev: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    def same_content(self, other: Sighting) -> bool:
        """Whether nothing suggests that the content differs. A device or inode number alone does not: remounts change both."""
        return (self.size, self.mtime_ns) == (other.size, other.mtime_ns)


class Track(Noun, frozen=True):
    """One audio track, by what its container says of it."""

    number: int  # from 1
    codec: str
    language: str = ""  # ISO 639-2 as the container has it; "" when it says none
    channels: int = 0
    rate_hz: int = 0


class Media(Noun, frozen=True):
    """What a container says of a recording before anything is decoded."""

    container: str
    tracks: tuple[Track, ...]
    duration_s: float | None = None
    start_offset_s: float = 0.0  # how much later than the picture the sound begins
    video: bool = False


class SubtitleShape(Noun, frozen=True):
    """How subtitles are cut (FEATURES F96)."""

    line_chars: int = 42
    lines: int = 2
    chars_per_s: float = 20.0
    duration_min_s: float = 0.833
    duration_max_s: float = 7.0
    gap_min_s: float = 0.083


class JobOptions(Noun, frozen=True):
    """What was asked for one file, frozen when it settles; part of the provenance of its transcript."""

    model: str = "auto"
    mode: str = "batched"  # "batched", "sequential", "short_windows"
    language: str = "auto"
    language_windows: int = 4
    language_per_window: bool = False
    task: str = "transcribe"
    beam_size: int = 5
    patience: float = 1.0
    best_of: int = 5
    temperatures: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    initial_prompt: str = ""
    hotwords: str = ""
    previous_text: bool = True
    audio_track: str = "auto"
    channels: str = "mix"  # "mix", "speakers"
    speakers: tuple[str, ...] = ()
    word_timestamps: bool = False
    window_s: float = 30.0
    vad_threshold: float = 0.5
    vad_min_silence_s: float = 0.5
    formats: tuple[str, ...] = ("txt", "srt", "json")


class Word(Noun, frozen=True):
    """One word with its place in the recording."""

    start_s: float
    end_s: float
    text: str
    probability: float


class Segment(Noun, frozen=True):
    """A stretch of text with its place in the recording and the decoder's own confidence in it."""

    start_s: float
    end_s: float
    text: str
    avg_logprob: float = 0.0
    no_speech_prob: float = 0.0
    compression_ratio: float = 0.0
    temperature: float = 0.0
    speaker: str = ""
    doubts: tuple[str, ...] = ()
    words: tuple[Word, ...] = ()


class Verdict(Noun, frozen=True):
    """What the quality gate says of one window: how good, after how many passes, and what still speaks against its text."""

    quality: str = "good"  # "good", "second_pass", "doubtful"
    passes: int = 1
    complaints: tuple[str, ...] = ()


class Window(Noun, frozen=True):
    """At most 30 s of audio cut at speech boundaries, decoded: the unit of checkpoint and resume.

    `tokens` are those of the whole text; `seek` is where the next pass begins in sequential mode, in mel frames (10 ms).
    """

    index: int
    start_s: float
    end_s: float
    language: str
    language_probability: float
    segments: tuple[Segment, ...]
    channel: int = 0
    tokens: tuple[int, ...] = ()
    seek: int = 0
    verdict: Verdict = Verdict()


class Summary(Noun, frozen=True):
    """What the engine knows of a whole recording once its last window is done."""

    duration_s: float
    speech_s: float
    windows: int
    source_sha256: str
    container: str
    codec: str
    model: str
    model_revision: str
    device: str
    compute_type: str
    engine_version: str
    encoder: str = "ctranslate2"
    track: int = 1
    tracks: int = 1
    channels: int = 1
    doubts: tuple[str, ...] = ()  # about the container: it may be cut off
    start_offset_s: float = 0.0  # added to every time when it is shown: a film's sound may begin later than its picture


class WindowVerdict(Noun, frozen=True):
    """What a transcript keeps of one of its windows: where it lies, which language was heard, and the gate's verdict."""

    start_s: float
    end_s: float
    channel: int
    language: str
    language_probability: float
    verdict: Verdict


class Quality(Noun, frozen=True):
    """The verdict on a whole transcript, and how many of its windows stand for it."""

    verdict: str = "good"  # the worst of its windows; "doubtful" as well when the recording itself may be cut off
    windows: int = 0
    second_pass: int = 0
    doubtful: int = 0
    complaints: tuple[str, ...] = ()


class Transcript(Noun, frozen=True):
    """The text of one recording with its provenance (FEATURES F102). Holds no clock time: the same work gives the same bytes."""

    source: str
    size: int
    language: str
    language_probability: float
    segments: tuple[Segment, ...]
    options: JobOptions
    summary: Summary
    mtime_ns: int
    quality: Quality = Quality()
    windows: tuple[WindowVerdict, ...] = ()
    schema: str = "whisperd.transcript/1"


def assemble(*, source: str, size: int, mtime_ns: int, windows: list[Window], options: JobOptions, summary: Summary) -> Transcript:
    """Make one transcript of the windows, in order. The language is that of most of the decoded audio."""
    ordered = sorted(windows, key=lambda window: window.index)
    spoken: dict[str, float] = {}
    for window in ordered:
        spoken[window.language] = spoken.get(window.language, 0.0) + window.end_s - window.start_s
    language = max(spoken, key=lambda name: spoken[name]) if spoken else options.language.replace("auto", "")
    sure = [window.language_probability for window in ordered if window.language == language]
    return Transcript(
        source=source,
        size=size,
        mtime_ns=mtime_ns,
        language=language,
        language_probability=round(sum(sure) / len(sure), 4) if sure else 0.0,
        segments=tuple(sorted((segment for window in ordered for segment in window.segments), key=lambda segment: segment.start_s)),
        options=options,
        summary=summary,
        quality=quality_of(ordered, summary.doubts),
        windows=tuple(
            WindowVerdict(
                start_s=window.start_s,
                end_s=window.end_s,
                channel=window.channel,
                language=window.language,
                language_probability=window.language_probability,
                verdict=window.verdict,
            )
            for window in ordered
        ),
    )


def quality_of(windows: Sequence[Window], doubts: Sequence[str]) -> Quality:
    """The worst verdict among the windows; a recording that may be cut off is doubtful whatever its text looks like."""
    verdicts = [window.verdict for window in windows]
    count = Counter(verdict.quality for verdict in verdicts)
    worst = "doubtful" if count["doubtful"] or doubts else "second_pass" if count["second_pass"] else "good"
    return Quality(
        verdict=worst,
        windows=len(verdicts),
        second_pass=count["second_pass"],
        doubtful=count["doubtful"],
        complaints=tuple(sorted({complaint for verdict in verdicts for complaint in verdict.complaints})),
    )


class GpuProcess(Noun, frozen=True):
    """A process that a GPU's driver knows of. In a container its number may be another one than here, and its memory unknown."""

    pid: int
    vram_mib: int | None = None


class Xid(Noun, frozen=True):
    """An error event of a GPU, by NVIDIA's XID number, delivered once."""

    code: int
    pid: int | None = None


class Reading(Noun, frozen=True):
    """What the probe saw of one GPU, or why it saw none. Unknown figures are None, never zero."""

    gpu: str  # UUID, or "" when there is no GPU at all
    status: str  # "ok", "no_gpu", "no_driver", "lost", "mismatch", "revoked", "reset_required", "unknown"
    what: str
    name: str = ""
    driver: str = ""
    vram_total_mib: int | None = None
    vram_used_mib: int | None = None  # everybody's, with what the driver keeps for itself: the rest is free
    utilisation_percent: int | None = None
    temperature_c: int | None = None
    slowdown_c: int | None = None  # from here on the GPU slows itself down
    power_w: int | None = None
    power_limit_w: int | None = None
    throttled: tuple[str, ...] = ()  # "thermal", "hw_slowdown", "power_brake", "power_cap"
    mig: bool | None = None
    mps: bool | None = None  # an MPS server runs on this machine
    processes: tuple[GpuProcess, ...] | None = None
    unsupported: tuple[str, ...] = ()  # figures that this GPU does not give
    xids: tuple[Xid, ...] = ()  # since the last reading


class CardMinute(Noun, frozen=True):
    """One minute of a card, rolled up from readings and from what the pool did. `gpu` is a UUID or "cpu"."""

    gpu: str
    at: float  # its end, epoch
    samples: int
    memory_total_mib: int | None = None
    memory_used_min_mib: int | None = None
    memory_used_max_mib: int | None = None
    own_max_mib: int | None = None  # held by our workers
    utilisation_mean_percent: float | None = None
    temperature_max_c: int | None = None
    power_mean_w: float | None = None
    throttled_s: float = 0.0
    workers: float = 0.0  # mean number
    batch: int = 0
    audio_s: float = 0.0  # finished in it


class Plan(Noun, frozen=True):
    """How many engine children should live, and why, in words."""

    workers: int
    reason: str
