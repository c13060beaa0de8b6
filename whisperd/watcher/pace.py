"""pace: when to scan next (pure).

Owns: the balance between prompt and cheap. A hint is answered at once, a burst of them by a few scans; scans never take more than
about a tenth of the time, however long one of them is: that is also how polling adapts its interval to what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass

HINT_DELAY_S = 0.03  # one copied file makes several events
GAP_MIN_S = 0.2
GAP_PER_SCAN = 9.0  # rest that many times as long as the last scan took


@dataclass
class Pace:
    """The timetable of one inbox, in seconds of one monotonic clock."""

    rescan_s: float
    poll_s: float
    polling: bool = False
    down: bool = False
    _began: float | None = None
    _ended: float = 0.0
    _hinted: float | None = None
    _asked: bool = False

    @property
    def has_hint(self) -> bool:
        """Whether a hint waits for its scan."""
        return self._hinted is not None

    def hinted(self, now: float) -> None:
        """Something may have changed."""
        if self._hinted is None:
            self._hinted = now

    def asked(self) -> None:
        """Somebody wants a scan without delay."""
        self._asked = True

    def begins(self, now: float) -> None:
        """A scan starts: it answers what was asked until now, not what comes while it runs."""
        self._began = now
        self._hinted = None
        self._asked = False

    def ended(self, now: float) -> None:
        """The scan is over, well or not."""
        self._ended = now

    def next_scan(self, next_look: float | None) -> float:
        """When to scan; `next_look` is when waiting files want it."""
        if self._began is None or self._asked:
            return 0.0
        if self.down:
            return self._ended + self.poll_s
        wanted = [self._began + (min(self.poll_s, self.rescan_s) if self.polling else self.rescan_s)]
        if self._hinted is not None:
            wanted.append(self._hinted + HINT_DELAY_S)
        if next_look is not None:
            wanted.append(next_look)
        return max(min(wanted), self._ended + max(GAP_MIN_S, GAP_PER_SCAN * (self._ended - self._began)))
