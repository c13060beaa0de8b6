"""counters: what the decoder was fed, added up. Values: each frame of an engine gives the next one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from whisperd.wire import BatchDone


@dataclass(frozen=True)
class Counters:
    """Sums over the batches of one or many engines. `limits` adds up what each batch might have held."""

    batches: int = 0
    windows: int = 0
    limits: int = 0
    encoded: int = 0
    encoded_needed: int = 0
    out_of_memory: int = 0

    def plus(self, batch: BatchDone) -> Counters:
        return replace(
            self,
            batches=self.batches + 1,
            windows=self.windows + batch.windows,
            limits=self.limits + batch.limit,
            encoded=self.encoded + batch.encoded,
            encoded_needed=self.encoded_needed + batch.encoded_needed,
        )

    def told(self) -> dict[str, Any]:
        """As the desk shows them; a mean of nothing is None."""
        return {
            "batches": self.batches,
            "windows": self.windows,
            "mean_batch": _mean(self.windows, self.batches),
            "mean_limit": _mean(self.limits, self.batches),
            "encoded": self.encoded,
            "encoded_needed": self.encoded_needed,
            "encoded_per_needed": _mean(self.encoded, self.encoded_needed),
            "out_of_memory": self.out_of_memory,
        }


def _mean(total: int, number: int) -> float | None:
    return round(total / number, 3) if number else None
