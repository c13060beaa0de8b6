"""config: every setting, typed, ranged and explained. The only reader of configuration files and of the environment.

Order: defaults, then the TOML file, then `WHISPERD_SECTION__KEY` in the environment. An unknown key is an error: a typing mistake
must not silently mean the default. Fails with `ConfigError` that names the key, the value and what is allowed.
docs/settings.md and etc/whisperd.toml are generated from the descriptions here (scripts/generate_docs.py).
"""

from __future__ import annotations

import grp
import json
import os
import pwd
import tomllib
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from whisperd.errors import ConfigError
from whisperd.vocabulary import JobOptions

DEFAULT_PATH = "/etc/whisperd/whisperd.toml"
FORMATS = ("txt", "srt", "vtt", "tsv", "json")

Format = Literal["txt", "srt", "vtt", "tsv", "json"]
Language = Annotated[str, Field(pattern=r"^(auto|[a-z]{2,3})$")]
Mode = Literal["batched", "sequential", "short_windows"]
Channels = Literal["mix", "speakers"]
ComputeType = Literal["int8", "int8_float16", "int8_float32", "int8_bfloat16", "float16", "bfloat16", "float32"]
Outcome = Literal["done", "failed"]
Afterwards = Literal["keep", "archive", "delete"]
Hour = Annotated[str, Field(pattern=r"^([01][0-9]|2[0-3]):[0-5][0-9]$")]
Day = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]

RECORDINGS = tuple(
    f"*.{suffix}"
    for line in (
        "wav w64 mp3 mp2 flac m4a m4b aac ogg oga opus wma aif aiff aifc amr 3gp 3g2 caf au snd ac3 ape wv tta mpc gsm voc dsf sph dss",
        "mka weba webm mkv mp4 m4v mov avi wmv asf flv mpg mpeg ts mts m2ts",
    )
    for suffix in line.split()
)


class Section(BaseModel):
    """Base of the sections: unknown keys are refused, values are read-only."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineSettings(Section):
    """The model and the device that runs it."""

    model: str = Field(
        "auto",
        min_length=1,
        description='"auto" chooses a Whisper model by the hardware. Otherwise a model name ("small", "large-v3-turbo"), a repository '
        'id of the model hub, or the absolute path of a directory with a CTranslate2 model. "demo" is the tiny embedded one: it knows '
        "a few hundred spoken English words and is for trying whisperd out, nothing else.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where the model runs; auto takes a GPU when there is one.")
    compute_type: Literal["auto"] | ComputeType = Field(
        "auto", description="Precision of the model. auto: float16 on a GPU, int8 on a CPU."
    )
    cpu_threads: int = Field(0, ge=0, le=32, description="Threads of each engine process on a CPU; 0 shares the cores among the workers.")
    batch: int = Field(
        0,
        ge=0,
        le=64,
        description="Windows of any files decoded together at most; 0: the optimiser finds out what pays. Text does not depend on it.",
    )
    encoder: Literal["auto", "ctranslate2", "torch"] = Field(
        "auto",
        description="What runs the encoder on a CPU. auto: PyTorch in bfloat16 where the CPU has AMX and a measurement "
        "at the start says that it pays, else CTranslate2.",
    )
    rss_growth_max_mib: int = Field(
        2048,
        ge=64,
        description="An engine whose memory grew by more than this over what its first batches needed is replaced at its next boundary.",
    )
    unload_idle_s: float = Field(
        0.0, ge=0, description="An engine without work for this long gives its model's memory back until the next file; 0: never."
    )
    offline: bool = Field(False, description="Never use the network, not even to fetch a model that is absent.")
    duration_max_s: float = Field(86_400.0, gt=0, description="Longer recordings are refused.")
    channels_max: int = Field(32, ge=1, le=512, description="Recordings with more channels are refused.")
    rate_max_hz: int = Field(768_000, ge=8_000, description="Recordings with a higher sampling rate are refused.")

    @model_validator(mode="after")
    def _cpu_has_its_limits(self) -> EngineSettings:
        if self.device == "cpu" and self.compute_type in ("float16", "bfloat16", "int8_float16", "int8_bfloat16"):
            raise ValueError(f"compute_type {self.compute_type} needs a GPU; on a CPU use int8 or float32")
        if self.device == "cpu" and self.batch > 8:
            raise ValueError(f"batch {self.batch} gains nothing on a CPU; at most 8")
        return self


class TranscriptionSettings(Section):
    """How recordings are transcribed, unless an inbox says otherwise."""

    mode: Mode = Field(
        "batched",
        description="batched: windows cut at pauses, decoded together. sequential: one pass after the other as faster-whisper does it, "
        "with the text before as context (slower; memory of names and style). short_windows: like batched, but short windows are not "
        "filled up to 30 s with silence (half the time for short recordings on a CPU; check its accuracy on your own speech).",
    )
    language: Language = Field("auto", description='Spoken language ("en", "de", …); auto detects it for each recording.')
    language_windows: int = Field(4, ge=1, le=16, description="Windows that vote for the language before any text is decoded.")
    language_per_window: bool = Field(False, description="Recordings in which the language changes: each window has its own.")
    task: Literal["transcribe", "translate"] = Field("transcribe", description="translate writes English whatever is spoken.")
    beam_size: int = Field(5, ge=1, le=20, description="Alternatives kept while decoding; 1 is fastest.")
    patience: float = Field(1.0, ge=1, le=4, description="More than 1 lets the beam search go on longer (slower, a little better).")
    best_of: int = Field(5, ge=1, le=10, description="Samples drawn at each temperature above 0.")
    temperatures: tuple[Annotated[float, Field(ge=0, le=1)], ...] = Field(
        (0.0, 0.2, 0.4, 0.6, 0.8, 1.0), min_length=1, description="Tried in turn while a window's text looks wrong."
    )
    initial_prompt: str = Field("", max_length=2000, description="Text the model is told came before: names, spelling, style.")
    hotwords: str = Field("", max_length=2000, description="Words to expect.")
    previous_text: bool = Field(True, description="In sequential mode, the text before is given to the next pass.")
    audio_track: str = Field(
        "auto",
        pattern=r"^(auto|[1-9][0-9]?)$",
        description="Of several audio tracks: a number, or auto: the language's, the one with speech.",
    )
    channels: Channels = Field("mix", description='mix: all channels together. speakers: each channel is one speaker ("Channel 1", …).')
    speakers: tuple[str, ...] = Field((), max_length=8, description="Names of the channels' speakers, in order.")
    word_timestamps: bool = Field(False, description="Time every word (slower); they appear in the JSON.")
    window_s: float = Field(30.0, ge=5, le=30, description="Longest piece of audio given to the model at once.")
    vad_threshold: float = Field(0.5, gt=0, lt=1, description="Probability from which sound counts as speech.")
    vad_min_silence_s: float = Field(0.5, ge=0.1, le=10, description="A pause of this length ends a stretch of speech.")


class WatcherSettings(Section):
    """How inboxes are watched."""

    quiet_s: float = Field(5.0, ge=0.1, le=86_400, description="A file is taken once it has not changed for this long.")
    rescan_s: float = Field(300.0, ge=1, description="The whole inbox is listed at least this often, whatever events say.")
    poll_s: float = Field(5.0, ge=0.5, description="How often an inbox without events (a network share) is listed.")
    include: tuple[str, ...] = Field(RECORDINGS, min_length=1, description="Names that are recordings.")
    ignore: tuple[str, ...] = Field((), description="Names to leave alone, beside the built-in list of temporary and NAS files.")


class IntakeSettings(Section):
    """What happens between a settled file and its turn."""

    queue_max: int = Field(
        1_000_000, ge=1, description="Files that wait their turn at most; what else lies in the inboxes is taken in when there is room."
    )
    ahead: int = Field(16, ge=1, le=1000, description="Files whose content is read (and copied from shares) ahead of their turn.")
    spool: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether recordings are copied to state_dir/spool before their turn, so that a share may drop while they are "
        "worked on. auto: from network shares only.",
    )
    spool_max_mib: int = Field(
        16_384, ge=64, description="Copies take no more room than this; what is larger is read from the share while it is worked on."
    )
    free_min_mib: int = Field(1024, ge=0, description="So much stays free on the disk of state_dir: less, and files wait for room.")


class BackoffSettings(Section):
    """When a file is tried again after a failure that may pass."""

    law: Literal["fixed", "linear", "exponential", "fibonacci"] = Field("exponential", description="How the pause grows.")
    base_s: float = Field(5.0, gt=0, description="The first pause.")
    max_s: float = Field(600.0, gt=0, description="The longest pause.")
    jitter: float = Field(0.2, ge=0, le=1, description="Random share by which each pause is shortened, so that retries spread.")


class DispatcherSettings(Section):
    """Worker processes and retries."""

    workers: int = Field(
        0, ge=0, le=64, description="Engine processes on each card (or on the CPU); 0: the optimiser finds out how many pay."
    )
    workers_max: int = Field(12, ge=1, le=64, description="The optimiser never runs more on one card.")
    interval_s: float = Field(300.0, ge=10, description="How often a plan is made on history; trials are judged more often.")
    dry_run: bool = Field(False, description="Plans are made and stored but not followed: one worker on each card.")
    idle_s: float = Field(600.0, ge=10, description="Without work for this long, a card is left with `idle_workers`.")
    idle_workers: int = Field(1, ge=0, le=1, description="Kept warm while idle: 1 answers at once, 0 uses no video memory at all.")
    yield_to_others: bool = Field(
        True, description="Another program on the same GPU gets its memory at once, down to no worker of ours; the work waits."
    )
    reserve_mib: int | None = Field(
        None, ge=0, description="Memory of a card that is always left free; unset: 1.5 % of it, at least 256 MiB."
    )
    temperature_max_c: int | None = Field(
        None, ge=40, le=110, description="Work on a GPU is reduced from this temperature on; unset: from one degree below its own slowdown."
    )
    compute_types: tuple[ComputeType, ...] = Field(
        (), description="Precisions that the optimiser may choose among on a GPU, the preferred first; empty: engine.compute_type only."
    )
    cpu_fallback: bool = Field(
        False, description="What does not fit into a GPU's memory even alone is transcribed on the CPU instead of waiting."
    )
    recycle_jobs: int = Field(0, ge=0, description="An engine that has finished so many files is replaced by a fresh one; 0: never.")
    recycle_s: float = Field(0.0, ge=0, description="An engine of this age is replaced by a fresh one; 0: never.")
    attempts_max: int = Field(3, ge=1, le=20, description="Attempts before a file is set aside as failed.")
    stall_s: float = Field(900.0, ge=5, description="An engine that makes no progress for this long is killed; the file is tried again.")
    stop_grace_s: float = Field(8.0, ge=0, le=300, description="At a stop, engines have this long to reach the next boundary.")
    backoff: BackoffSettings = Field(default_factory=BackoffSettings, description="Pauses after failures that may pass.")


class SubtitleSettings(Section):
    """How srt and vtt are cut. The defaults are what broadcasters and streaming services ask for."""

    line_chars: int = Field(42, ge=10, le=200, description="Characters in a line at most.")
    lines: int = Field(2, ge=1, le=4, description="Lines of a subtitle at most.")
    chars_per_s: float = Field(20.0, ge=5, le=100, description="Reading speed that a subtitle should not exceed.")
    duration_min_s: float = Field(0.833, ge=0, le=5, description="A subtitle stays at least so long, where the next one leaves room.")
    duration_max_s: float = Field(7.0, ge=1, le=60, description="Longer ones are divided.")
    gap_min_s: float = Field(0.083, ge=0, le=1, description="Pause between two subtitles.")

    @model_validator(mode="after")
    def _one_fits(self) -> SubtitleSettings:
        if self.duration_max_s <= self.duration_min_s:
            raise ValueError("duration_max_s must be more than duration_min_s")
        return self


class OutboxSettings(Section):
    """What is written, where, and as what."""

    formats: tuple[Format, ...] = Field(("txt", "srt", "json"), min_length=1, description="Any of txt, srt, vtt, tsv, json.")
    name: str = Field(
        "{stem}",
        min_length=1,
        description="Name of a transcript without its extension: {stem} {name} {language} {model} {date} {duration}. Where two recordings "
        "would share a name, the later one gets {name}.",
    )
    file_mode: str = Field("0664", pattern=r"^0?[0-7]{3}$", description="Mode of published files (octal).")
    directory_mode: str = Field("0775", pattern=r"^[0-7]?[0-7]{3}$", description="Mode of directories made in the outbox (octal).")
    owner: str = Field(
        "", description="User that published files are given to (a name or a number; needs CAP_CHOWN); empty: that of the inbox."
    )
    group: str = Field("", description="Group of published files; empty: that of the inbox (a setgid outbox hands down its own).")
    source: Afterwards = Field(
        "keep", description="What becomes of a recording (and its own profile) once its transcript is durable in the outbox."
    )
    subtitles: SubtitleSettings = Field(default_factory=SubtitleSettings, description="How srt and vtt are cut.")

    @field_validator("owner")
    @classmethod
    def _known_user(cls, owner: str) -> str:
        user_number(owner)
        return owner

    @field_validator("group")
    @classmethod
    def _known_group(cls, group: str) -> str:
        group_number(group)
        return group

    @field_validator("formats")
    @classmethod
    def _each_once(cls, formats: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(formats)) != len(formats):
            raise ValueError("a format is named twice")
        return formats

    @field_validator("name")
    @classmethod
    def _known_fields(cls, name: str) -> str:
        try:
            name.format(stem="s", name="n", language="l", model="m", date="d", duration="1")
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"unknown field {error}; allowed: {{stem}} {{name}} {{language}} {{model}} {{date}} {{duration}}") from error
        if "/" in name or not ("{stem}" in name or "{name}" in name):
            raise ValueError("must contain {stem} or {name}, and no /")
        return name


class HealthSettings(Section):
    """Checks and upkeep."""

    judge_s: float = Field(15.0, ge=1, description="How often the checks run.")
    disk_free_min_mib: int = Field(512, ge=0, description="Less free space for the state directory raises an alert.")
    memory_used_max_percent: float = Field(90.0, gt=0, le=100, description="More memory in use raises an alert.")
    success_min_percent: float = Field(95.0, ge=0, le=100, description="A lower share of good files in the last hour raises an alert.")
    queue_age_max_s: float = Field(3600.0, gt=0, description="A file waiting longer raises an alert.")
    checkpoint_s: float = Field(60.0, ge=5, description="How often the ledger's write-ahead log is folded into its file.")
    backup_s: float = Field(3600.0, ge=60, description="How often the ledger is copied to state_dir/backup.")
    history_keep_days: float = Field(400.0, gt=0, description="Events of finished files are kept this long.")
    readings_keep_days: float = Field(30.0, gt=0, description="GPU readings, plans and throughput samples are kept this long.")
    transcripts_keep_days: float = Field(
        400.0, gt=0, description="Copies of published transcripts are kept this long: the same recording again is published from them."
    )
    transcripts_max_mib: int = Field(4096, ge=16, description="They take no more room than this; the least recently used go first.")


class WebhookSettings(Section):
    """An address that is told of every finished file. Repeat the table for more."""

    url: str = Field(..., pattern=r"^https?://[^\s]+$", description="Where to POST (JSON).")
    secret: SecretStr = Field(
        SecretStr(""), description='Signs each call as standardwebhooks.com says ("whsec_" and base64, or any text); empty: unsigned.'
    )
    events: tuple[Outcome, ...] = Field(("done", "failed"), min_length=1, description="What is told.")
    allow: tuple[str, ...] = Field(
        (), description='Networks that may be called though they are not public ("192.168.1.0/24"); without, private addresses are refused.'
    )
    timeout_s: float = Field(10.0, gt=0, le=120, description="A call that takes longer is tried again.")
    attempts_max: int = Field(12, ge=1, le=100, description="Then it is given up; the pauses grow to an hour.")

    @field_validator("allow")
    @classmethod
    def _networks(cls, allow: tuple[str, ...]) -> tuple[str, ...]:
        for network in allow:
            ip_network(network)
        return allow


class HookSettings(Section):
    """A command that is run for every finished file, without a shell. Repeat the table for more."""

    command: tuple[str, ...] = Field(
        ..., min_length=1, description="Program (absolute) and arguments; the facts are in its environment: WHISPERD_JOB, WHISPERD_PATH, …."
    )
    events: tuple[Outcome, ...] = Field(("done", "failed"), min_length=1, description="What it is run for.")
    timeout_s: float = Field(60.0, gt=0, le=3600, description="It is ended when it takes longer.")
    attempts_max: int = Field(3, ge=1, le=100, description="Then it is given up.")

    @field_validator("command")
    @classmethod
    def _absolute(cls, command: tuple[str, ...]) -> tuple[str, ...]:
        if not os.path.isabs(command[0]):
            raise ValueError("the program must be an absolute path")
        return command


class LogSettings(Section):
    """What is written to the journal."""

    level: Literal["TRACE", "DEBUG", "INFO", "SUCCESS", "WARNING", "ERROR"] = Field("INFO", description="Least level that is logged.")


class CardSettings(Section):
    """Limits of one GPU. Repeat the table for more; a GPU that is not named has none but those of [dispatcher]."""

    gpu: str = Field(..., min_length=1, description='UUID of the GPU as `nvidia-smi -L` prints it, "cpu", or "*" for all.')
    use: bool = Field(True, description="Whether whisperd may use it at all.")
    workers: int | None = Field(None, ge=0, le=64, description="Overrides dispatcher.workers.")
    workers_max: int | None = Field(None, ge=0, le=64, description="Overrides dispatcher.workers_max.")
    memory_max_mib: int | None = Field(None, ge=256, description="All workers on it together take no more.")


class QuietSettings(Section):
    """Hours in which GPUs are left to others. Repeat the table for more."""

    begin: Hour = Field(..., description='From this time of day (local, "22:00")')
    end: Hour = Field(..., description="to this one; earlier than `begin`: on the next day.")
    days: tuple[Day, ...] = Field(("mon", "tue", "wed", "thu", "fri", "sat", "sun"), min_length=1, description="Days on which it begins.")
    gpu: str = Field("*", min_length=1, description='UUID of the GPU, "cpu", or "*" for all.')
    workers_max: int = Field(0, ge=0, le=64, description="Workers left in these hours.")


class InboxSettings(Section):
    """One directory to watch. Repeat the table for more."""

    path: str = Field(..., description="The directory recordings are dropped into (absolute). It must exist; it is never written to.")
    outbox: str = Field("", description='Where its transcripts go; empty means a directory "outbox" beside the inbox.')
    recursive: bool = Field(True, description="Also watch sub-directories; the outbox mirrors them.")
    include: tuple[str, ...] | None = Field(None, min_length=1, description="Overrides watcher.include.")
    ignore: tuple[str, ...] = Field(
        (), description="Names to leave alone here; with a / in it, a pattern of the whole path below the inbox."
    )
    source: Afterwards | None = Field(None, description="Overrides outbox.source.")
    archive: str = Field("", description='Where recordings go with source = "archive"; empty means a directory "archive" beside the inbox.')
    events: Literal["auto", "native", "polling"] = Field("auto", description="auto: inotify on local disks, polling on network shares.")
    priority: Literal["urgent", "normal", "low"] = Field("normal", description="Class of everything dropped here.")
    model: str | None = Field(None, min_length=1, description="Overrides engine.model for what is dropped here.")
    mode: Mode | None = Field(None, description="Overrides transcription.mode.")
    language: Language | None = Field(None, description="Overrides transcription.language.")
    task: Literal["transcribe", "translate"] | None = Field(None, description="Overrides transcription.task.")
    formats: tuple[Format, ...] | None = Field(None, min_length=1, description="Overrides outbox.formats.")
    initial_prompt: str | None = Field(None, max_length=2000, description="Overrides transcription.initial_prompt.")
    channels: Channels | None = Field(None, description="Overrides transcription.channels.")
    speakers: tuple[str, ...] | None = Field(None, max_length=8, description="Overrides transcription.speakers.")

    @field_validator("path", "outbox", "archive")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if path and not os.path.isabs(path):
            raise ValueError("must be an absolute path")
        return os.path.normpath(path) if path else path

    @property
    def outbox_path(self) -> str:
        return self.outbox or os.path.join(os.path.dirname(self.path), "outbox")

    @property
    def archive_path(self) -> str:
        return self.archive or os.path.join(os.path.dirname(self.path), "archive")


class Settings(BaseSettings):
    """All settings of one daemon."""

    model_config = SettingsConfigDict(env_prefix="WHISPERD_", env_nested_delimiter="__", extra="forbid", frozen=True)

    state_dir: str = Field("/var/lib/whisperd", description="Ledger, staged transcripts, backups. On a local disk.")
    cache_dir: str = Field("/var/cache/whisperd", description="Models that were fetched.")
    engine: EngineSettings = Field(default_factory=EngineSettings)
    transcription: TranscriptionSettings = Field(default_factory=TranscriptionSettings)
    watcher: WatcherSettings = Field(default_factory=WatcherSettings)
    intake: IntakeSettings = Field(default_factory=IntakeSettings)
    dispatcher: DispatcherSettings = Field(default_factory=DispatcherSettings)
    outbox: OutboxSettings = Field(default_factory=OutboxSettings)
    health: HealthSettings = Field(default_factory=HealthSettings)
    log: LogSettings = Field(default_factory=LogSettings)
    card: tuple[CardSettings, ...] = Field((), description="Limits of single GPUs.")
    quiet: tuple[QuietSettings, ...] = Field((), description="Hours in which GPUs are left to others.")
    webhook: tuple[WebhookSettings, ...] = Field((), description="Addresses that are told of finished files.")
    hook: tuple[HookSettings, ...] = Field((), description="Commands that are run for finished files.")
    inbox: tuple[InboxSettings, ...] = Field((), description="The directories to watch.")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)

    @field_validator("state_dir", "cache_dir")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not os.path.isabs(path):
            raise ValueError("must be an absolute path")
        return os.path.normpath(path)

    @model_validator(mode="after")
    def _rooms_do_not_overlap(self) -> Settings:
        if not self.inbox:
            raise ValueError("no [[inbox]] is configured: name at least one directory to watch")
        paths = [inbox.path for inbox in self.inbox]
        for path in paths:
            if paths.count(path) > 1:
                raise ValueError(f"inbox {path} is configured twice")
            if any(other != path and path.startswith(other.rstrip("/") + "/") for other in paths):
                raise ValueError(f"inbox {path} lies inside another inbox")
        for inbox in self.inbox:
            if inbox.outbox_path == inbox.path:
                raise ValueError(f"inbox {inbox.path} is its own outbox")
            if any(inbox.path.startswith(other.outbox_path.rstrip("/") + "/") for other in self.inbox):
                raise ValueError(f"inbox {inbox.path} lies inside an outbox: transcripts would be dropped into it")
            if inbox.archive_path == inbox.path or any(inbox.path.startswith(other.archive_path.rstrip("/") + "/") for other in self.inbox):
                raise ValueError(f"inbox {inbox.path} lies inside an archive: what is finished would be dropped into it again")
        return self

    @model_validator(mode="after")
    def _modes_can_be_done(self) -> Settings:
        for inbox in self.inbox:
            options = self.options(inbox)
            if options.mode == "sequential" and options.channels == "speakers":
                raise ValueError(f'inbox {inbox.path}: channels = "speakers" cannot be done with mode = "sequential"; use "batched"')
        return self

    def options(self, inbox: InboxSettings) -> JobOptions:
        """What a file of this inbox asks for; frozen into its job when it settles. Model "auto" is whatever [engine] says when it runs."""
        asked = {**self.transcription.model_dump(), "formats": self.outbox.formats}
        own = {name: value for name, value in inbox.model_dump().items() if name in asked and value is not None}
        return JobOptions(model=inbox.model or "auto", **{**asked, **own})


def user_number(name: str) -> int:
    """The number of a user by name or number; -1 for "". Raises ValueError when there is no such user."""
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {name}") from None


def group_number(name: str) -> int:
    """The number of a group by name or number; -1 for "". Raises ValueError when there is no such group."""
    if not name or name.isdigit():
        return int(name or -1)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise ValueError(f"there is no group {name}") from None


def load(path: str) -> Settings:
    """Read and validate. Raises ConfigError."""

    class FromFile(Settings):
        model_config = SettingsConfigDict(toml_file=path)

    if not os.path.isfile(path):
        raise ConfigError(f"cannot read the configuration {path}: there is no such file", hint="`whisperd config example` prints one")
    try:
        return FromFile()
    except ValidationError as error:
        raise ConfigError("\n".join([f"cannot use the configuration {path}:", *_complaints(error)])) from error
    except (OSError, ValueError) as error:  # not readable; not TOML
        raise ConfigError(f"cannot read the configuration {path}: {error}", hint="it must be valid TOML (https://toml.io)") from error


def _complaints(error: ValidationError) -> Iterator[str]:
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "configuration"
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            message = "there is no such setting"
        shown = "" if item["type"] in ("missing", "value_error") else f" (found {str(item['input'])[:80]!r})"
        yield f"  {where}: {message}{shown}"


def origin_of(settings: Settings, path: str) -> dict[str, tuple[Any, str]]:
    """Every setting with its value and where it comes from: default, file or environment."""
    with open(path, "rb") as file:
        document = tomllib.load(file)
    found: dict[str, tuple[Any, str]] = {}
    for key, value in flat(settings.model_dump(mode="json")):
        variable = "WHISPERD_" + key.upper().replace(".", "__")
        if variable in os.environ:
            found[key] = value, variable
        else:
            found[key] = value, "file" if _has(document, key) else "default"
    return found


def flat(tree: dict[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """`{"engine": {"model": …}}` as `("engine.model", …)`; tables in lists get their number."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")
        elif isinstance(value, list | tuple) and value and isinstance(value[0], dict):
            for number, item in enumerate(value):
                yield from flat(item, f"{before}{key}.{number}.")
        else:
            yield f"{before}{key}", value


def _has(document: Any, key: str) -> bool:
    for part in key.split("."):
        if isinstance(document, list) and part.isdigit() and int(part) < len(document):
            document = document[int(part)]
        elif isinstance(document, dict) and part in document:
            document = document[part]
        else:
            return False
    return True


def toml_value(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)
