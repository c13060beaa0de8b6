"""checks: is something wrong? Pure: an observation in, a sentence for each fault out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from whisperd.config import HealthSettings


@dataclass(frozen=True)
class Observation:
    """What was seen at one moment. None means unknown, and what is unknown is not judged."""

    disk_free_mib: int | None = None
    memory_used_percent: float | None = None
    done_last_hour: int = 0
    failed_last_hour: int = 0
    oldest_ready_age_s: float | None = None
    inboxes_down: Sequence[str] = field(default=())
    outboxes_down: Sequence[str] = field(default=())
    engine_blocked: str = ""


Check = Callable[[Observation, HealthSettings], str | None]


def disk_free(seen: Observation, limits: HealthSettings) -> str | None:
    if seen.disk_free_mib is None or seen.disk_free_mib >= limits.disk_free_min_mib:
        return None
    return f"the state directory has only {seen.disk_free_mib} MiB free (less than {limits.disk_free_min_mib}): free space on that disk"


def memory(seen: Observation, limits: HealthSettings) -> str | None:
    if seen.memory_used_percent is None or seen.memory_used_percent <= limits.memory_used_max_percent:
        return None
    return f"{seen.memory_used_percent:.0f} % of the memory is in use: use fewer workers or a smaller model"


def success(seen: Observation, limits: HealthSettings) -> str | None:
    total = seen.done_last_hour + seen.failed_last_hour
    if total < 5 or 100 * seen.done_last_hour / total >= limits.success_min_percent:
        return None
    return f"{seen.failed_last_hour} of {total} files failed in the last hour: see `whisperd jobs --state failed`"


def queue_age(seen: Observation, limits: HealthSettings) -> str | None:
    if seen.oldest_ready_age_s is None or seen.oldest_ready_age_s <= limits.queue_age_max_s:
        return None
    return f"a file has been waiting for {seen.oldest_ready_age_s / 60:.0f} minutes"


def inbox(seen: Observation, limits: HealthSettings) -> str | None:
    return "; ".join(seen.inboxes_down) or None


def outbox(seen: Observation, limits: HealthSettings) -> str | None:
    return "; ".join(seen.outboxes_down) or None


def engine(seen: Observation, limits: HealthSettings) -> str | None:
    return seen.engine_blocked or None


CHECKS: dict[str, Check] = {
    "disk_free": disk_free,
    "memory": memory,
    "success": success,
    "queue_age": queue_age,
    "inbox": inbox,
    "outbox": outbox,
    "engine": engine,
}


def judge(seen: Observation, limits: HealthSettings) -> dict[str, str | None]:
    """Every check with its fault, or None."""
    return {name: check(seen, limits) for name, check in CHECKS.items()}
