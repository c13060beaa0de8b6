"""The GPU probe, as the real process over the real wire."""

from __future__ import annotations

import time

from whisperd.child import Child, Life
from whisperd.wire import ProbeOut, Readings, StartProbe, WireClosed


def test_the_probe_says_plainly_what_it_sees() -> None:
    """Every look gives at least one reading with a sentence; without a GPU it says so, and no figure is given as zero."""
    child: Child[Readings] = Child(name="probe", module="whisperd.dispatcher.probe", receives=ProbeOut, now=time.monotonic())
    try:
        child.send(StartProbe(interval_s=0.05))
        looks = [frame.message for _ in range(3) for frame in child.channel.wait(30)]
        assert len(looks) >= 3
        for look in looks:
            assert look.readings
            for reading in look.readings:
                assert reading.what
                if reading.status != "ok":
                    assert reading.vram_total_mib is None and reading.utilisation_percent is None
                if reading.status == "no_driver":
                    assert "no GPU" in reading.what
    finally:
        child.drain(time.monotonic())
        try:
            while True:
                child.channel.wait(10)
        except WireClosed:
            pass
        assert child.gone(time.monotonic()) == "ended normally"
        assert child.life is Life.GONE
