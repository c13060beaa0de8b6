"""pace: when to scan next, and whether everything (pure).

Owns: the balance between prompt and cheap. A hint is answered at once, a burst of them by a few scans; scans never take more than
about a tenth of the time, however long one of them is. Without news polls become rare until they, and the listings of everything, cost
half a percent of one core each; news makes them frequent again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

HINT_DELAY_S = 0.03  # one copied file makes several events
GAP_MIN_S = 0.2
GAP_PER_SCAN = 9.0  # rest that many times as long as the last scan took
IDLE_PER_COST = 199.0  # without news, rest that many times as long as the scan kept the processor busy
TIGHT_S = 1.0  # between two polls when something arrives
SLACKEN = 1.5  # each poll without news makes the next pause so many times longer


@dataclass
class Pace:
    """The timetable of one inbox, in seconds of one monotonic clock."""

    rescan_s: float
    poll_s: float
    polling: bool = False
    down: bool = False
    _began: float | None = None
    _ended: float = 0.0
    _everything_at: float = 0.0
    _hinted: float | None = None
    _asked: bool = False
    _whole: bool = True  # the scan under way, or the last one, lists everything
    _pause_s: float = field(default=0.0)

    def __post_init__(self) -> None:
        self._pause_s = self.poll_s

    @property
    def has_hint(self) -> bool:
        """Whether a hint waits for its scan."""
        return self._hinted is not None

    def hinted(self, now: float) -> None:
        """Something may have changed."""
        if self._hinted is None:
            self._hinted = now

    def asked(self) -> None:
        """Somebody wants a scan of everything without delay."""
        self._asked = True

    def wants_everything(self, now: float) -> bool:
        """Whether a scan that begins now has to list every directory, changed or not."""
        return self._asked or now >= self._everything_at

    def begins(self, now: float, *, everything: bool = True) -> None:
        """A scan starts: it answers what was asked until now, not what comes while it runs."""
        self._began = now
        self._whole = everything
        self._hinted = None
        if everything:
            self._asked = False

    def ended(self, now: float, *, busy_s: float = 0.0, news: bool = False) -> None:
        """The scan is over, well or not; it kept the processor busy for so long."""
        self._ended = now
        idle_s = max(self.poll_s, IDLE_PER_COST * busy_s)
        self._pause_s = min(idle_s, TIGHT_S) if news else min(idle_s, max(self._pause_s * SLACKEN, TIGHT_S))
        if self._whole and self._began is not None:
            self._everything_at = self._began + max(self.rescan_s, IDLE_PER_COST * busy_s)

    def next_scan(self, next_look: float | None) -> float:
        """When to scan; `next_look` is when waiting files want it."""
        if self._began is None or self._asked:
            return 0.0
        if self.down:
            return self._ended + self.poll_s
        wanted = [self._everything_at]
        if self.polling:
            wanted.append(self._began + self._pause_s)
        if self._hinted is not None:
            wanted.append(self._hinted + HINT_DELAY_S)
        if next_look is not None:
            wanted.append(next_look)
        return max(min(wanted), self._ended + max(GAP_MIN_S, GAP_PER_SCAN * (self._ended - self._began)))
