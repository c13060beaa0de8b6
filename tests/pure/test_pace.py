"""When the watcher looks, and at how much, without a disk or a clock."""

from __future__ import annotations

from whisperd.watcher.folders import COARSE_S, LIE_S, Contents, Folders, Stamp
from whisperd.watcher.pace import GAP_MIN_S, GAP_PER_SCAN, IDLE_PER_COST, TIGHT_S, Pace

# --- the timetable ---


def paced(*, took_s: float = 0.01, polling: bool = False) -> Pace:
    pace = Pace(rescan_s=300, poll_s=10, polling=polling)
    pace.begins(100)
    pace.ended(100 + took_s)
    return pace


def test_the_first_scan_and_one_that_is_asked_for_are_due_at_once() -> None:
    """A hint or a request that comes during a scan is not answered by that scan."""
    pace = Pace(rescan_s=300, poll_s=10)
    assert pace.next_scan(None) == 0
    pace.begins(100)
    pace.asked()
    pace.ended(101)
    assert pace.next_scan(None) == 0


def test_the_timetable() -> None:
    """Regular scans by the kind of hints, earlier ones for hints and waiting files, never more than the inbox bears."""
    assert paced().next_scan(None) == 400
    assert paced(polling=True).next_scan(None) == 110
    assert paced().next_scan(150) == 150
    hinted = paced()
    hinted.hinted(200)
    hinted.hinted(201)
    assert 200 < hinted.next_scan(None) < 200.2
    assert paced().next_scan(99) == 100.01 + GAP_MIN_S
    assert paced(took_s=20, polling=True).next_scan(99) == 120 + GAP_PER_SCAN * 20
    down = paced()
    down.down = True
    assert down.next_scan(99) == 110.01


def test_polls_become_frequent_with_news_and_rare_without() -> None:
    """At most half a percent of a core when nothing arrives, however long one poll takes; a poll each second when something does."""
    pace, now = Pace(rescan_s=1e6, poll_s=5, polling=True), 0.0
    pauses: list[float] = []
    for number in range(14):
        pace.begins(now, everything=number == 0)
        now += 0.1
        pace.ended(now, busy_s=0.1, news=number == 6)
        began, now = now - 0.1, pace.next_scan(None)
        pauses.append(round(now - began, 3))
    assert pauses[0] == 7.5
    assert pauses[5] == round(0.1 * IDLE_PER_COST, 3)
    assert pauses[6] == TIGHT_S
    assert pauses[6:] == sorted(pauses[6:])
    assert pauses[13] < pauses[5]


def test_everything_is_listed_every_rescan_and_more_rarely_where_that_is_dear() -> None:
    """A poll of what changed does not put it off."""
    pace = Pace(rescan_s=300, poll_s=10, polling=True)
    assert pace.wants_everything(0)
    pace.begins(100)
    pace.ended(101, busy_s=1)
    pace.begins(200, everything=False)
    pace.ended(201, busy_s=0.01)
    assert not pace.wants_everything(399)
    assert pace.wants_everything(400)
    pace.begins(400)
    pace.ended(405, busy_s=4)
    assert not pace.wants_everything(400 + 4 * IDLE_PER_COST - 1)
    pace.asked()
    assert pace.wants_everything(406)
    pace.begins(406, everything=False)
    assert pace.next_scan(None) == 0, "who asks for everything is not served with less"


# --- directories that need not be listed again ---

STAMP = Stamp(1, 10, 10)


def contents(names: int = 1) -> Contents:
    return Contents(names=names, entries=3, files=2, left_out=1, below=(b"d",))


def meet(folders: Folders, now: float, *, stamp: Stamp = STAMP, after: Stamp = STAMP, names: int = 1, everything: bool = False) -> bool:
    """Meet the directory in a walk, and list it if need be; whether it was listed."""
    folders.begin(everything=everything)
    known = folders.unchanged(b"a", stamp)
    if known is None:
        folders.listed(b"a", stamp, after, contents(names), now)
    folders.end()
    return known is None


def test_a_directory_that_stands_still_is_listed_twice_and_not_again() -> None:
    """The second time late enough for a clock of two seconds' steps; then only what changed, what is doubted, or everything."""
    folders = Folders()
    assert meet(folders, 0)
    assert meet(folders, COARSE_S - 0.1)
    assert meet(folders, COARSE_S)
    assert not meet(folders, COARSE_S + 1)
    assert meet(folders, 10, everything=True)
    assert not meet(folders, 11)
    folders.begin(everything=False, doubted=[b"a"])
    assert folders.unchanged(b"a", STAMP) is None
    for stamp in (Stamp(2, 10, 10), Stamp(2, 11, 10), Stamp(2, 11, 11)):
        assert meet(folders, 20, stamp=stamp)


def test_a_directory_that_another_walk_did_not_meet_is_forgotten() -> None:
    """If it comes back it is listed, whatever its stamp says."""
    folders = Folders()
    meet(folders, 0)
    meet(folders, 10)
    folders.begin(everything=False)
    folders.end()
    assert meet(folders, 20)


def test_directories_that_do_not_tell_of_changes_are_found_out() -> None:
    """A time of zero is never believed; entries that change under an old stamp, longer than a cache may lie: all is listed always."""
    folders, zero = Folders(), Stamp(1, 0, 0)
    assert all(meet(folders, now, stamp=zero, after=zero) for now in (0, 10, 20))
    folders = Folders()
    meet(folders, 0)
    meet(folders, 10)
    assert meet(folders, 300, names=2, everything=True)
    assert meet(folders, 310, names=2)
    assert not folders.lying
    assert meet(folders, 301 + LIE_S, names=2)
    assert folders.lying
    assert meet(folders, 1000, names=2)


def test_a_change_during_a_listing_and_a_late_stamp_are_no_lies() -> None:
    """The stamp has moved by the end of the listing, or does so when the cache of a network filesystem runs out."""
    folders, moved = Folders(), Stamp(1, 20, 20)
    meet(folders, 0)
    meet(folders, 10)
    meet(folders, 300, names=2, after=moved, everything=True)
    meet(folders, 300 + 2 * LIE_S, names=2, stamp=moved, after=moved)
    meet(folders, 600, names=2, stamp=moved, after=moved)
    meet(folders, 700, names=3, stamp=moved, after=moved, everything=True)
    meet(folders, 705, names=3, stamp=Stamp(1, 30, 30))
    meet(folders, 900, names=3, stamp=Stamp(1, 30, 30))
    assert not folders.lying
