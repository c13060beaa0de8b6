"""retry: what a failure means for the next attempt. Pure (DESIGN §4, retry policy; FEATURES F38, F39)."""

from __future__ import annotations

from dataclasses import dataclass

from whisperd.vocabulary import Failure, FailureKind

WAITING_PAUSE_S = 15.0
INTERRUPTIONS_MAX = 20
"""Deaths in a row that look like somebody's hand; from here on the file is held to blame after all."""


@dataclass(frozen=True)
class Backoff:
    """How pauses grow: fixed, linear, exponential, fibonacci."""

    law: str = "exponential"
    base_s: float = 5.0
    max_s: float = 600.0
    jitter: float = 0.2

    def pause_s(self, attempt: int, chance: float = 0.0) -> float:
        """The pause after the n-th attempt (n ≥ 1); `chance` in 0..1 shortens it by up to `jitter`, so that retries spread."""
        match self.law:
            case "fixed":
                steps = 1.0
            case "linear":
                steps = float(attempt)
            case "fibonacci":
                steps = float(_fibonacci(attempt))
            case _:
                steps = 2.0 ** min(attempt - 1, 60)
        return min(self.base_s * steps, self.max_s) * (1.0 - self.jitter * chance)


def _fibonacci(n: int) -> int:
    a, b = 1, 1
    for _ in range(min(n, 90) - 1):
        a, b = b, a + b
    return a


@dataclass(frozen=True)
class Fail:
    """No further attempt."""


@dataclass(frozen=True)
class Retry:
    """Another attempt, not before."""

    not_before: float


@dataclass(frozen=True)
class Wait:
    """The cause is not the file: no attempt is spent."""

    not_before: float


Verdict = Fail | Retry | Wait


def after_failure(
    failure: Failure,
    *,
    attempts: int,
    attempts_max: int,
    now: float,
    backoff: Backoff,
    chance: float,
    at_once: bool = False,
    shared: bool = False,
) -> Verdict:
    """What follows a failure; `attempts` counts the one that just failed. A worker's death is retried `at_once`; one that was `shared`
    with other files proves nothing against this one, so it is never the last word."""
    if failure.kind is FailureKind.WAITING:
        return Wait(now + WAITING_PAUSE_S)
    if failure.kind is FailureKind.PERMANENT or (attempts >= attempts_max and not shared):
        return Fail()
    return Retry(now if at_once else now + backoff.pause_s(attempts, chance))
