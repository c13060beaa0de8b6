"""failure: what an exception of the engine means for the job or for the engine itself.

Owns: the step from exceptions to `Failure`. Never fails.
"""

from __future__ import annotations

from loguru import logger

from whisperd.engine.audio import MediaDamaged, MediaRefused
from whisperd.engine.memory import is_out_of_memory
from whisperd.errors import WhisperdError
from whisperd.vocabulary import Failure, FailureKind


def failure_of(error: Exception) -> Failure:
    """What an exception means for the job. Ours carry their own code; memory and the unknown may pass."""
    match error:
        case MediaDamaged() | MediaRefused():
            return Failure(kind=FailureKind.PERMANENT, code=error.code, what=error.what, hint=error.hint)
        case WhisperdError():
            return Failure(kind=FailureKind.TRANSIENT, code=error.code, what=error.what, hint=error.hint)
        case _ if is_out_of_memory(error):
            return _out_of_memory(str(error) or "the engine ran out of memory")
        case OSError(strerror=why):
            return Failure(
                kind=FailureKind.TRANSIENT,
                code="source_unreadable",
                what=f"the file cannot be read: {why or type(error).__name__}",
                hint="is the share or the disk that holds it all right? See the kernel log",
            )
        case ValueError() if "language" in str(error).lower():
            return Failure(kind=FailureKind.PERMANENT, code="language_unknown", what=str(error), hint="correct the language setting")
        case _:
            logger.opt(exception=error).error("unexpected error in the engine")
            return Failure(kind=FailureKind.TRANSIENT, code="engine_error", what=f"unexpected {type(error).__name__}: {error}")


def _out_of_memory(what: str) -> Failure:
    return Failure(
        kind=FailureKind.TRANSIENT, code="out_of_memory", what=what, hint="use fewer workers, a lighter compute type or a smaller model"
    )
