"""heals: what may be tried when a check fails. The acts are handed in by the daemon; here is only when. Pure."""

from __future__ import annotations

COOL_DOWN_S = 300.0


class CoolDown:
    """A heal fires when its check flips to a fault, and again only after a pause."""

    def __init__(self, pause_s: float = COOL_DOWN_S) -> None:
        self._pause_s = pause_s
        self._fired_at: dict[str, float] = {}

    def due(self, check: str, *, faulty: bool, now: float) -> bool:
        """Whether the heal of this check is to be called now; counts as called when it is."""
        if not faulty:
            self._fired_at.pop(check, None)
            return False
        last = self._fired_at.get(check)
        if last is not None and now - last < self._pause_s:
            return False
        self._fired_at[check] = now
        return True
