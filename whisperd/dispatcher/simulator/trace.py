"""trace: the history of an installation as lines of JSON, without the name of any file, and back.

Owns: Trace and its parts, `lines`, `parse`. One object a line, each with one key that says what it is: "trace" (the first), "job",
"minute", "plan", "learned". Fails with BadTrace for anything else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from whisperd.dispatcher.optimiser.values import CardPlan, Policy, Reason
from whisperd.errors import WhisperdError
from whisperd.vocabulary import CardMinute, Noun

SCHEMA = "whisperd.trace/1"


class BadTrace(WhisperdError):
    """This is no trace, or one of another version, or one that says too little."""

    code = "bad_trace"


class Head(Noun, frozen=True):
    """When, where, and under which settings. Times are of the epoch."""

    begin: float
    end: float
    cores: int
    model: str  # what "auto" meant
    compute_type: str
    policy: Policy
    schema: str = SCHEMA


class PastJob(Noun, frozen=True):
    """A recording as it was."""

    ready_at: float
    model: str
    audio_s: float | None = None
    urgent: bool = False
    started_at: float | None = None
    ended_at: float | None = None
    done: bool = False


class PastPlan(Noun, frozen=True):
    """A plan as it was."""

    at: float
    cards: tuple[CardPlan, ...]
    reasons: tuple[Reason, ...] = ()


class PastLesson(Noun, frozen=True):
    """Memory that workers were seen to hold."""

    gpu: str
    model: str
    compute_type: str
    batch: int  # 0: loaded, and nothing decoded yet
    typical_mib: float


class Trace(Noun, frozen=True):
    """A stretch of an installation's life."""

    head: Head
    jobs: tuple[PastJob, ...] = ()
    minutes: tuple[CardMinute, ...] = ()
    plans: tuple[PastPlan, ...] = ()
    lessons: tuple[PastLesson, ...] = ()


def trace_of(
    head: Head,
    *,
    jobs: Iterable[Mapping[str, Any]],
    minutes: Iterable[CardMinute],
    plans: Iterable[Mapping[str, Any]],
    learned: Iterable[Mapping[str, Any]],
) -> Trace:
    """Of rows as the ledger's queries give them (`arrivals`, `minutes`, `last_plans`, `learned`)."""
    return Trace(
        head=head,
        jobs=tuple(_job(row, head) for row in jobs),
        minutes=tuple(minutes),
        plans=tuple(sorted((plan for row in plans if (plan := _plan(row)) is not None), key=lambda plan: plan.at)),
        lessons=tuple(lesson for row in learned for lesson in _lessons(row)),
    )


def _job(row: Mapping[str, Any], head: Head) -> PastJob:
    model = row["model"]
    return PastJob(
        ready_at=row["ready_at"],
        model=head.model if model in (None, "", "auto") else model,
        audio_s=row["duration_s"],
        urgent=row["priority"] == 0,
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        done=row["state"] in ("transcribed", "done"),
    )


def _plan(row: Mapping[str, Any]) -> PastPlan | None:
    """None for a plan of an earlier release, which kept less of it."""
    body = row["body"] or {}
    try:
        return msgspec.convert({"at": row["at"], "cards": body["cards"], "reasons": body.get("reasons", ())}, PastPlan)
    except (KeyError, msgspec.ValidationError):
        return None


def _lessons(row: Mapping[str, Any]) -> Iterator[PastLesson]:
    for held in row.get("body", {}).get("held", ()):
        yield PastLesson(
            gpu=row["gpu"], model=row["model"], compute_type=row["compute_type"], batch=row["batch"], typical_mib=held["typical_mib"]
        )


# --- lines ---


def lines(trace: Trace) -> Iterator[bytes]:
    """As a file holds it, without the ends of lines."""
    encode = msgspec.json.Encoder().encode
    yield encode({"trace": trace.head})
    for name, values in (("job", trace.jobs), ("minute", trace.minutes), ("plan", trace.plans), ("learned", trace.lessons)):
        for value in values:
            yield encode({name: value})


def parse(found: Iterable[bytes]) -> Trace:
    """Raises BadTrace."""
    kinds: dict[str, type[Any]] = {"trace": Head, "job": PastJob, "minute": CardMinute, "plan": PastPlan, "learned": PastLesson}
    parts: dict[str, list[Any]] = {name: [] for name in kinds}
    for number, line in enumerate(found, start=1):
        if not line.strip():
            continue
        try:
            ((name, value),) = msgspec.json.decode(line).items()
            parts[name].append(msgspec.convert(value, kinds[name]))
        except (msgspec.MsgspecError, AttributeError, KeyError, ValueError) as error:
            raise BadTrace(f"line {number} is no line of a trace: {error}", hint="`whisperd plan export FILE` writes one") from error
    heads = parts["trace"]
    if len(heads) != 1 or heads[0].schema != SCHEMA:
        raise BadTrace(f"this is no trace of schema {SCHEMA}", hint="`whisperd plan export FILE` writes one")
    return Trace(
        head=heads[0],
        jobs=tuple(parts["job"]),
        minutes=tuple(parts["minute"]),
        plans=tuple(parts["plan"]),
        lessons=tuple(parts["learned"]),
    )
