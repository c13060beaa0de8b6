"""Whether a watcher answers (intake.Pulse), and on which mounts a directory lies (ledger.connection.mounts_above)."""

from __future__ import annotations

from whisperd.dispatcher.intake import ASK_S, Pulse
from whisperd.ledger.connection import mounts_above


def test_one_question_at_a_time() -> None:
    """A new one is asked; after that not before the answer, and then only after a while."""
    pulse = Pulse()
    assert pulse.wants_asking(100.0) and pulse.waited_s(100.0) == 0
    pulse.asked_at = 100.0
    assert not pulse.wants_asking(1000.0)
    assert pulse.waited_s(103.0) == 3.0
    pulse.answered(104.0)
    assert pulse.waited_s(105.0) == 0
    assert not pulse.wants_asking(104.0 + ASK_S / 2) and pulse.wants_asking(104.0 + ASK_S)


def test_who_speaks_does_not_hang() -> None:
    """Whatever it says in the meantime begins the wait anew, and is no answer."""
    pulse = Pulse(asked_at=100.0)
    pulse.heard(110.0)
    assert pulse.waited_s(112.0) == 2.0 and not pulse.wants_asking(112.0)
    nobody_asked = Pulse()
    nobody_asked.heard(110.0)
    assert nobody_asked.waited_s(112.0) == 0


def test_a_directory_lies_on_the_mounts_above_it() -> None:
    """All of them by name, the root's first; a name that only begins alike is none; the directory need not be there."""
    points = [mount.point for mount in mounts_above(b"/proc/self/nowhere")]
    assert b"/" in points and b"/proc" in points
    assert b"/proc" not in [mount.point for mount in mounts_above(b"/processes")]
