"""What each GPU is good for, and which worker must begin anew: OPTIMISER.md §2's table, as values (reaction.py, xid.py, minutes.py)."""

from __future__ import annotations

import pytest

from whisperd.dispatcher import xid
from whisperd.dispatcher.minutes import Minutes, Note, roll_up
from whisperd.dispatcher.reaction import BACK_S, SUSPECT_S, Reactions, Restart, Standing, react
from whisperd.vocabulary import Reading, Xid

A, B = "GPU-a", "GPU-b"
PIDS = {A: (11, 12, 13), B: (21,)}


def good(gpu: str, *xids: Xid) -> Reading:
    return Reading(gpu=gpu, status="ok", what=f"{gpu} (driver 1)", driver="1", xids=xids)


def bad(gpu: str, status: str, *xids: Xid) -> Reading:
    return Reading(gpu=gpu, status=status, what=f"it is {status}", xids=xids)


class Story:
    """Looks, one after the other."""

    def __init__(self) -> None:
        self.state = Reactions()
        self.now = 1000.0
        self.restarts: tuple[Restart, ...] = ()
        self.see(good(A), good(B))

    def see(self, *readings: Reading, after_s: float = 1.0) -> dict[str, Standing]:
        self.now += after_s
        self.state, standings, self.restarts = react(self.state, readings, PIDS, self.now)
        return standings

    def usable(self, *readings: Reading, after_s: float = 1.0) -> tuple[str, str]:
        standings = self.see(*readings, after_s=after_s)
        return standings[A].usable, standings[B].usable


def test_a_good_gpu_is_good() -> None:
    """Nothing speaks against it, and nothing is said."""
    assert Story().see(good(A), good(B)) == {A: Standing("ok", ""), B: Standing("ok", "")}


@pytest.mark.parametrize(
    ("status", "usable"),
    [
        ("mismatch", "frozen"),
        ("no_driver", "frozen"),
        ("revoked", "unknown"),
        ("unknown", "unknown"),
        ("no_gpu", "lost"),
        ("something new", "unknown"),
    ],
)
def test_what_is_said_of_the_driver_holds_for_every_gpu(status: str, usable: str) -> None:
    """A reading without a UUID is about all that were ever seen; the reason is the reading's own."""
    story = Story()
    standings = story.see(bad("", status))
    assert standings == {A: Standing(usable, f"it is {status}"), B: Standing(usable, f"it is {status}")}


@pytest.mark.parametrize(
    ("status", "usable"), [("lost", "lost"), ("reset_required", "drain"), ("revoked", "unknown"), ("unknown", "unknown")]
)
def test_what_is_said_of_one_gpu_holds_for_it_alone(status: str, usable: str) -> None:
    """The others go on."""
    assert Story().usable(good(A), bad(B, status)) == ("ok", usable)


def test_a_gpu_that_is_not_named_any_more_is_lost() -> None:
    """It fell off the bus without a word: the driver only names the others. One that cannot even tell its UUID is no GPU of ours."""
    assert Story().usable(good(A)) == ("ok", "lost")
    assert Story().usable(good(A), bad("#1", "lost")) == ("ok", "lost")


def test_before_any_look_nothing_is_known() -> None:
    """Nobody is lost because the probe has not answered yet."""
    assert Story().usable() == ("unknown", "unknown")
    assert react(Reactions(), (), {}, 0.0) == (Reactions({}), {}, ())


def test_a_lost_gpu_is_back_when_it_stays() -> None:
    """One good look is not enough, a break begins anew; after ten seconds it is good."""
    story = Story()
    assert story.usable(good(A), bad(B, "lost")) == ("ok", "lost")
    assert story.usable(good(A), good(B)) == ("ok", "lost")
    assert story.usable(good(A), bad(B, "unknown"), after_s=BACK_S - 2) == ("ok", "lost")
    assert story.usable(good(A), good(B)) == ("ok", "lost")
    assert story.usable(good(A), good(B), after_s=BACK_S - 1) == ("ok", "lost")
    assert story.usable(good(A), good(B)) == ("ok", "ok")


@pytest.mark.parametrize("code", [48, 63, 64, 94, 95])
def test_a_gpu_that_needs_a_reset_is_drained_until_it_was_away(code: int) -> None:
    """Good looks do not heal it; a reset takes it away, and then it is as new."""
    story = Story()
    assert story.usable(good(A), good(B, Xid(code=code))) == ("ok", "drain")
    standing = story.see(good(A), good(B), after_s=2 * SUSPECT_S)[B]
    assert standing.usable == "drain" and f"XID {code}" in standing.why and "nvidia-smi" in standing.why
    story.see(good(A), bad(B, "lost"))
    story.see(good(A), good(B))
    assert story.usable(good(A), good(B), after_s=BACK_S) == ("ok", "ok")


def test_a_reset_that_the_board_itself_asks_for_ends_with_its_asking() -> None:
    """The status is the board's own word: it needs no memory."""
    story = Story()
    assert story.usable(good(A), bad(B, "reset_required")) == ("ok", "drain")
    assert story.usable(good(A), good(B)) == ("ok", "ok")


def test_fallen_off_the_bus_goes_over_all_else() -> None:
    """XID 79 counts although the GPU seemed to answer in the same look."""
    story = Story()
    assert story.usable(good(A), good(B, Xid(code=79), Xid(code=48))) == ("ok", "lost")
    assert "XID 79" in story.see(good(A), good(B))[B].why


@pytest.mark.parametrize("code", [13, 31, 43, 45])
def test_a_worker_that_crashed_its_gpu_begins_anew(code: int) -> None:
    """Only the one that is named, only on its own GPU, once however many XIDs tell of it; the GPU stays good."""
    story = Story()
    assert story.usable(good(A, Xid(code=code, pid=11), Xid(code=43, pid=11)), good(B)) == ("ok", "ok")
    assert story.restarts == (Restart(A, 11, xid.describe(code)),)
    story.see(good(A), good(B))
    assert story.restarts == ()


@pytest.mark.parametrize("event", [Xid(code=13, pid=4242), Xid(code=13, pid=21), Xid(code=31), Xid(code=74, pid=11), Xid(code=777, pid=11)])
def test_who_is_not_named_is_left_alone(event: Xid) -> None:
    """Somebody else's process, a worker of another GPU, nobody, or an XID that nothing follows from."""
    story = Story()
    assert story.usable(good(A, event), good(B)) == ("ok", "ok")
    assert story.restarts == ()


def test_three_crashes_in_an_hour_make_a_gpu_suspect() -> None:
    """Three workers, or three moments where none is named; one crash with many XIDs is one; after an hour it is good again."""
    story = Story()
    for pid, usable in ((11, "ok"), (12, "ok"), (13, "suspect")):
        assert story.usable(good(A, Xid(code=31, pid=pid), Xid(code=43, pid=pid), Xid(code=45)), good(B)) == (usable, "ok")
    assert story.usable(good(A), good(B), after_s=SUSPECT_S - 10) == ("suspect", "ok")
    assert story.usable(good(A), good(B), after_s=20) == ("ok", "ok")
    for usable in ("ok", "ok", "suspect"):
        assert story.usable(good(A, Xid(code=13), Xid(code=13)), good(B), after_s=60) == (usable, "ok")


def test_crashes_of_others_make_nobody_suspect() -> None:
    """A stranger's bugs say nothing of the board, and without a worker of ours on it there is nobody to judge."""
    story = Story()
    for pid in range(900, 910):
        assert story.usable(good(A, Xid(code=31, pid=pid)), good(B), after_s=60) == ("ok", "ok")
    state = Reactions()
    for number in range(5):
        state, standings, _ = react(state, (good(A, Xid(code=31)),), {}, 60.0 * number)
    assert standings[A].usable == "ok"


def test_reacting_leaves_the_state_before_as_it_was() -> None:
    """A pure function: the same again gives the same."""
    before, _, _ = react(Reactions(), (good(A), good(B)), PIDS, 1.0)
    looks = (good(A, Xid(code=31, pid=11)), bad(B, "lost"))
    assert react(before, looks, PIDS, 2.0) == react(before, looks, PIDS, 2.0)


# --- XIDs ---


@pytest.mark.parametrize(
    ("line", "pci", "event"),
    [
        ("6,1,2,-;NVRM: Xid (PCI:0000:01:00): 31, pid=4242, name=python, Ch 00000008", (0, 1, 0), Xid(code=31, pid=4242)),
        ("NVRM: Xid (PCI:0000:c1:00): 79, GPU has fallen off the bus.", (0, 0xC1, 0), Xid(code=79)),
        ("NVRM: Xid (PCI:0000:01:00): 43, pid='<unknown>', name=<unknown>, Ch 1", (0, 1, 0), Xid(code=43)),
        ("NVRM: Xid (PCI:0008:01:00 GPU-I:05): 94, pid='77', name=x", (8, 1, 0), Xid(code=94, pid=77)),
    ],
)
def test_lines_of_the_kernel(line: str, pci: tuple[int, ...], event: Xid) -> None:
    """The forms in which drivers have written it; the place is the same as NVML names it."""
    assert xid.parse_kernel_line(line) == xid.KernelLine(pci, event)
    assert xid.pci_address("00000000:01:00.0") == (0, 1, 0)


def test_other_lines_of_the_kernel_are_none() -> None:
    """Nothing is read into what is no XID."""
    for line in ("NVRM: GPU 0000:01:00.0: RmInitAdapter failed!", "usb 1-1: new device", "", "NVRM: Xid (PCI:zz): x"):
        assert xid.parse_kernel_line(line) is None


def test_events_get_the_processes_that_the_kernel_named() -> None:
    """Each line is used once, for its own code."""
    told = (Xid(code=43, pid=1), Xid(code=31, pid=2), Xid(code=31, pid=3))
    assert xid.name_processes([31, 31, 31, 13], told) == (Xid(code=31, pid=2), Xid(code=31, pid=3), Xid(code=31), Xid(code=13))


def test_every_xid_of_the_table_says_what_to_do() -> None:
    """What leads to a reaction comes with a name and with advice; an unknown one is told as such."""
    for code, kind in xid.TABLE.items():
        assert kind.name in xid.describe(code)
        assert kind.todo or kind.follows == "nothing"
    assert "XID 1234" in xid.describe(1234) and xid.kind(1234).follows == "nothing"


# --- minutes ---


def measured(used_mib: int | None, *, util: int | None = 50, throttled: tuple[str, ...] = (), temperature_c: int | None = 60) -> Reading:
    return Reading(
        gpu=A,
        status="ok",
        what="a",
        vram_total_mib=8000,
        vram_used_mib=used_mib,
        utilisation_percent=util,
        temperature_c=temperature_c,
        throttled=throttled,
    )


def test_a_minute_of_a_card() -> None:
    """Extremes of what swings, means of what flows; the power cap of a loaded board is no throttling."""
    readings = [
        measured(1000, util=10),
        measured(3000, util=90, throttled=("thermal", "power_cap")),
        measured(2000, throttled=("power_cap",)),
    ]
    notes = [Note(1, 4, 500, 10.0), Note(3, 8, 900, 20.5)]
    rolled = roll_up(A, 60.0, [*readings, bad(A, "unknown")], notes, sample_s=1.0)
    assert (rolled.samples, rolled.memory_used_min_mib, rolled.memory_used_max_mib, rolled.memory_total_mib) == (3, 1000, 3000, 8000)
    assert (rolled.utilisation_mean_percent, rolled.temperature_max_c, rolled.power_mean_w, rolled.throttled_s) == (50.0, 60, None, 1.0)
    assert (rolled.workers, rolled.batch, rolled.own_max_mib, rolled.audio_s) == (2.0, 8, 900, 30.5)


def test_a_minute_without_figures() -> None:
    """Unknown is None, not zero: a minute in which nothing could be read has no memory, no heat and no load."""
    rolled = roll_up(A, 60.0, [bad(A, "lost"), measured(None, util=None, temperature_c=None)], [], sample_s=1.0)
    assert (rolled.samples, rolled.memory_used_max_mib, rolled.utilisation_mean_percent, rolled.temperature_max_c) == (1, None, None, None)
    assert (rolled.own_max_mib, rolled.workers) == (None, 0.0)


def test_each_minute_is_told_once() -> None:
    """The minute under way stays; a long pause is no minute; a clock set back tells what there was."""
    minutes = Minutes(sample_s=1.0)
    assert minutes.take(30.0) == ()
    minutes.add((measured(1000), Reading(gpu="", status="no_gpu", what="none")))
    assert minutes.take(59.9) == ()
    assert [(minute.gpu, minute.at) for minute in minutes.take(60.0)] == [(A, 60.0)]
    assert minutes.take(61.0) == ()
    minutes.note("cpu", workers=1, batch=2, own_mib=None, audio_s=100.0)
    minutes.note("cpu", workers=1, batch=2, own_mib=None, audio_s=130.0)
    minutes.note("cpu", workers=0, batch=0, own_mib=None, audio_s=0.0)
    minutes.note("cpu", workers=1, batch=2, own_mib=None, audio_s=5.0)
    assert [(minute.gpu, minute.at, minute.audio_s) for minute in minutes.take(9999.0)] == [("cpu", 120.0, 35.0)]
    minutes.add((measured(1000),))
    assert [minute.at for minute in minutes.take(30.0)] == [10020.0]
