"""profiles: what folders and files of an inbox ask for themselves (pure; DESIGN §5.8, FEATURES F19, F20, G14).

Owns: the closed list of keys of a `.whisperd.toml` (of a folder and all below) and of a `NAME.whisperd.toml` (of the file NAME beside it),
and what wins: from the root of the inbox downward, the file's own last, key by key. Whoever may write to a share writes these, so they
are judged like any input: a profile with a fault is not used at all, what stands above it holds, and the fault is told in plain words.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, NamedTuple

from msgspec import structs
from pydantic import BeforeValidator, Field, ValidationError, field_validator

from whisperd.config import FORMATS, Channels, Format, Language, Mode, Section
from whisperd.errors import WhisperdError, printable
from whisperd.vocabulary import JobOptions
from whisperd.wire import ProfileFile

FOLDER_PROFILE = b".whisperd.toml"
PRIORITY = {"urgent": 0, "normal": 1, "low": 2}
FOUND_CHARS = 60
NO_SPEAKERS = 'channels = "speakers" cannot be done with mode = "sequential"; use mode = "batched", or channels = "mix"'


class ProfileUnusable(WhisperdError):
    """A profile that cannot be used, and everything that is wrong with it."""

    code = "profile_unusable"


def _number(found: Any) -> Any:
    return str(found) if type(found) is int else found


class Profile(Section):
    """The keys of a profile; what is not named is taken from above."""

    language: Language | None = None
    model: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] | None = None
    mode: Mode | None = None
    task: Literal["transcribe", "translate"] | None = None
    formats: Annotated[tuple[Format, ...], Field(min_length=1)] | None = None
    priority: Literal["urgent", "normal", "low"] | None = None
    initial_prompt: Annotated[str, Field(max_length=2000)] | None = None
    hotwords: Annotated[str, Field(max_length=2000)] | None = None
    channels: Channels | None = None
    speakers: Annotated[tuple[str, ...], Field(max_length=8)] | None = None
    audio_track: Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]?)$"), BeforeValidator(_number)] | None = None
    word_timestamps: bool | None = None
    skip: bool | None = None

    @field_validator("formats")
    @classmethod
    def _each_once(cls, formats: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if formats is not None and len(set(formats)) != len(formats):
            raise ValueError("a format is named twice")
        return formats


ALLOWED = {
    "language": '"auto", or a code of two or three small letters ("en", "de")',
    "model": 'the name of a model ("small", "large-v3-turbo") or "auto" (directories and repositories: in the configuration only)',
    "mode": '"batched", "sequential" or "short_windows"',
    "task": '"transcribe" or "translate"',
    "formats": f"some of {', '.join(FORMATS)}, each once",
    "priority": '"urgent", "normal" or "low"',
    "initial_prompt": "a text of at most 2000 characters",
    "hotwords": "a text of at most 2000 characters",
    "channels": '"mix" or "speakers"',
    "speakers": "at most 8 names",
    "audio_track": '"auto", or a number from 1 to 99',
    "word_timestamps": "true or false",
    "skip": "true or false",
}
OPTIONS = tuple(key for key in ALLOWED if key not in ("priority", "skip"))


class Asked(NamedTuple):
    """What is asked for one file, and which profile said so, key by key."""

    options: JobOptions
    priority: int
    skip: bool
    sources: dict[str, bytes]


def parse(text: str) -> Profile:
    """Read one profile. Raises ProfileUnusable with a sentence for each fault."""
    try:
        return Profile.model_validate(tomllib.loads(text))
    except ValidationError as error:
        raise ProfileUnusable("; ".join(dict.fromkeys(_complaint(item) for item in error.errors(include_url=False)))) from error
    except (ValueError, RecursionError) as error:  # no TOML, or nested without end
        why = printable(str(error)) if isinstance(error, ValueError) else "too deeply nested"
        raise ProfileUnusable(f"it is not valid TOML: {why}") from error


def _complaint(item: Any) -> str:
    key = str(item["loc"][0]) if item["loc"] else ""
    if item["type"] == "extra_forbidden":
        return f"there is no key {printable(key[:FOUND_CHARS])}; allowed: {', '.join(ALLOWED)}"
    shown = json.dumps(item["input"], ensure_ascii=False, default=str)
    shown = shown if len(shown) <= FOUND_CHARS else shown[:FOUND_CHARS] + "…"
    return f"{key}: {printable(shown)} cannot be used; allowed: {ALLOWED.get(key, '')}"


class Profiles:
    """All profiles of one inbox, as far as its watcher has told."""

    def __init__(self) -> None:
        self._good: dict[bytes, Profile] = {}
        self._bad: dict[bytes, str] = {}
        self._clashes: dict[bytes, str] = {}  # good by themselves, but not together with what stands above them

    def update(self, files: Iterable[ProfileFile], *, whole: bool = False) -> None:
        """Take in profiles that are new, changed or gone; `whole`: there are no others."""
        if whole:
            self._good, self._bad, self._clashes = {}, {}, {}
        for file in files:
            for known in (self._good, self._bad, self._clashes):
                known.pop(file.path, None)
            if file.fault:
                self._bad[file.path] = file.fault
            elif file.text is not None:
                self._judge(file.path, file.text)

    def _judge(self, path: bytes, text: str) -> None:
        try:
            self._good[path] = parse(text)
        except ProfileUnusable as error:
            self._bad[path] = error.what

    def settings_changed(self) -> None:
        """The inbox's own options are others now: what clashed with them may not any more, and shows again when a file asks."""
        self._clashes = {}

    def faults(self) -> list[tuple[bytes, str]]:
        """Profiles that are not used, each with a sentence. Those that clash with others are known once a file asked for them."""
        return sorted({**self._clashes, **self._bad}.items())

    def asked(self, path: bytes, base: JobOptions, priority: int) -> Asked:
        """What is asked for a file: `base` and `priority` are its inbox's, and the profiles above and beside it change them."""
        if not self._good:
            return Asked(base, priority, False, {})
        chain = [(place, self._good[place]) for place in places(path) if place in self._good]
        asked = _merged(chain, base, priority)
        while _clash(asked.options):
            blamed = next((place for place, profile in reversed(chain) if profile.mode or profile.channels), None)
            if blamed is None:  # the inbox's own options, which the configuration does not let pass
                break
            self._clashes[blamed] = NO_SPEAKERS
            chain = [item for item in chain if item[0] != blamed]
            asked = _merged(chain, base, priority)
        return asked


def places(path: bytes) -> Iterator[bytes]:
    """Where profiles of a file may lie: the farthest first, its own last."""
    yield FOLDER_PROFILE
    position = path.find(b"/")
    while position >= 0:
        yield path[: position + 1] + FOLDER_PROFILE
        position = path.find(b"/", position + 1)
    yield path + FOLDER_PROFILE


def _merged(chain: Iterable[tuple[bytes, Profile]], base: JobOptions, priority: int) -> Asked:
    named: dict[str, Any] = {}
    sources: dict[str, bytes] = {}
    for place, profile in chain:
        for key in profile.model_fields_set:
            named[key] = getattr(profile, key)
            sources[key] = place
    changes = {key: named[key] for key in OPTIONS if key in named}
    options = structs.replace(base, **changes) if changes else base
    return Asked(options, PRIORITY.get(named.get("priority", ""), priority), bool(named.get("skip", False)), sources)


def _clash(options: JobOptions) -> bool:
    return options.mode == "sequential" and options.channels == "speakers"


# --- how a fault is told where people look ---


def error_base(path: bytes) -> bytes:
    """The name of a profile's error file below the outbox, without `.error.txt`: in the mirrored folder, and not hidden."""
    folder, slash, name = path.rpartition(b"/")
    return folder + slash + name.removeprefix(b".")


def error_text(path: bytes, fault: str) -> str:
    """The error file of a profile. For people who only see the share."""
    lines = [
        f"{printable(path.rpartition(b'/')[2])} is not used; what is set above it holds.",
        "",
        f"What happened: {fault}",
        "What to do:    correct it. It is read again by itself, and this file then goes away.",
        "",
        "Keys:",
        *(f"  {key:<16} {allowed}" for key, allowed in ALLOWED.items()),
    ]
    return "\n".join(lines) + "\n"
