"""limit: how many windows share one call of the decoder: what the daemon asks for, less what memory has shown to allow.

Owns: the two figures and the way back up. Never fails.
"""

from __future__ import annotations

CLIMB_AFTER = 64  # calls without trouble after which a limit lowered for memory is doubled again


class Limit:
    """A bound on windows in a call, always at least 1."""

    def __init__(self, asked: int) -> None:
        self._asked = max(1, asked)
        self._fits: int | None = None  # None: memory has never run out
        self._calm = 0

    @property
    def asked(self) -> int:
        """What the daemon allows."""
        return self._asked

    @property
    def value(self) -> int:
        """What the next call may hold."""
        return self._asked if self._fits is None else min(self._asked, self._fits)

    def ask(self, batch: int) -> None:
        """The daemon allows so many from now on. What memory has shown not to allow is climbed back to, not jumped to."""
        self._asked = max(1, batch)

    def halve(self, windows: int) -> None:
        """So many windows did not fit."""
        self._fits = max(1, min(self.value, windows) // 2)
        self._calm = 0

    def calm(self) -> None:
        """A call went well."""
        self._calm += 1
        if self._fits is not None and self._fits < self._asked and self._calm >= CLIMB_AFTER:
            self._fits, self._calm = self._fits * 2, 0
