"""A real FUSE share (sshfs on a local sftp server) that hangs, drops, breaks and comes back; a model that is not there yet (issue 5)."""

from __future__ import annotations

import os
import select
import shutil
import signal
import struct
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path

import pytest
from floor import Floor
from installation import Installation
from recordings import SENTENCES, Studio
from tools import share
from tools.mounts import tmpfs
from tools.share import PATIENCE_S, Share

from whisperd.child import Life
from whisperd.dispatcher import delivery, intake
from whisperd.ledger.queries import Queries
from whisperd.wire import name_only

WAKE_S = 30.0
"""What waits goes on within that, once its cause has cleared: the promise itself, not patience."""
STOP_S = 20.0
"""A stop, whatever hangs; systemd/whisperd.service allows 30."""
SILENT_S = 2.0
"""Taken for a hang in tests that play the daemon; the daemon itself waits longer."""
WATCHER, EXAMINER = "whisperd.watcher", "whisperd.engine.examiner"

NewFloor = Callable[..., Floor]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Share]:
    """A share at `share` with an inbox in it. Whatever becomes of the test, nothing is left hanging."""
    if why := share.missing():
        pytest.skip(why)
    with Share(tmp_path / "served", tmp_path / "share") as given:
        (given.served / "inbox").mkdir()
        yield given


@pytest.fixture
def two(floor: NewFloor, mounted: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Floor:
    """A dispatcher with an inbox on the local disk and one on the share, the transcripts of both on the local disk."""
    monkeypatch.setattr(intake, "SILENT_S", SILENT_S)
    monkeypatch.setattr(intake, "ASK_S", 0.5)
    monkeypatch.setattr(intake, "DOUBT_S", 1.0)
    return floor(inboxes=({}, {"path": str(mounted.point / "inbox"), "outbox": str(tmp_path / "outbox 2")}), watcher={"poll_s": 0.5})


def the_share(life: Floor) -> intake.Inbox:
    return next(inbox for inbox in life.dispatcher.intake.inboxes.values() if inbox.settings.path.endswith("/share/inbox"))


def down(life: Floor) -> str:
    """What the ledger says of the share's inbox, as `status` shows it."""
    return next((row["what"] for row in life.ledger.inboxes() if row["path"].endswith(b"/share/inbox") and row["state"] == "down"), "")


# --- hanging -------------------------------------------------------------------------------------------------------------------


def test_a_share_that_hangs_stops_only_its_own_inbox(two: Floor, mounted: Share) -> None:
    """The other inbox goes on, the ledger says which share does not answer, what was copied from it is finished, no attempt is spent on
    what waits there, nothing of it is taken for deleted, and when it answers all is done, by the same watcher."""
    two.drop("before", inbox="served/inbox")
    two.until(lambda: two.all_in("before"), "a file of the share is done")
    assert two.rows()["before"]["spooled"] and the_share(two).network
    watcher = the_share(two).keeper.child
    two.drop("copied", inbox="served/inbox", length_s=60, after=two.go("copied"))
    two.until(two.in_hand, "another is worked on")
    two.drop("late", inbox="served/inbox")
    two.until(lambda: "late" in two.rows(), "and one is only seen")
    mounted.hang()
    two.until(lambda: down(two), "the share is named")
    assert str(mounted.point / "inbox") in down(two) and "does not answer" in down(two)
    Path(two.go("copied")).touch()
    near = [f"near {number}" for number in range(10)]
    for name in near:
        two.drop(name)
    two.until(lambda: two.all_in("copied", *near), "all of the other inbox are done, and what was copied")
    assert down(two) and two.states()["late"] in ("seen", "ready")
    two.drop("later", inbox="served/inbox")
    mounted.answer()
    began = time.monotonic()
    two.until(lambda: not down(two), "it is back")
    two.until(lambda: two.all_in("late", "later"), "what waited is done")
    assert time.monotonic() - began < WAKE_S
    assert the_share(two).keeper.child is watcher
    assert {row["attempts"] for row in two.rows().values()} == {1}
    assert "gone" not in two.states().values()


def test_a_watcher_that_cannot_be_killed_is_one(two: Floor, mounted: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is killed and does not end; no other is started to hang beside it. When the share answers it ends, and the next one works."""
    two.drop("before", inbox="served/inbox")
    two.until(lambda: two.all_in("before"), "the share is there")
    monkeypatch.setattr(intake, "KILL_S", SILENT_S + 0.5)
    hanging = the_share(two).keeper.child
    mounted.hang()
    two.until(lambda: down(two), "the share is named")
    two.until(lambda: hanging.life is Life.KILLING, "it is killed")
    two.live(2.0)
    assert the_share(two).keeper.child is hanging and state_of(hanging.pid) == "D"
    two.drop("waits", inbox="served/inbox")
    mounted.answer()
    two.until(lambda: not down(two), "it is back")
    two.until(lambda: two.all_in("waits"), "what waited is done")
    assert the_share(two).keeper.child is not hanging


def test_mounted_anew_over_one_that_hangs(two: Floor, mounted: Share, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hangs on the old mount is left to itself; the inbox on the new one comes back without it."""
    two.drop("before", inbox="served/inbox")
    two.until(lambda: two.all_in("before"), "the share is there")
    monkeypatch.setattr(intake, "KILL_S", SILENT_S + 0.5)
    mounted.hang()
    two.until(lambda: the_share(two).keeper.child.life is Life.KILLING, "its watcher is killed")
    hanging = the_share(two).keeper.child
    mounted.unmount()
    with Share(mounted.served, mounted.point):
        two.drop("after", inbox="served/inbox")
        two.until(lambda: two.all_in("after"), "it is back")
        assert state_of(hanging.pid) == "D" and not down(two)
        mounted.close()
        two.until(lambda: hanging.life is Life.GONE, "the other has ended, too")
    assert the_share(two).keeper.child is not hanging


def test_a_daemon_that_starts_beside_a_share_that_hangs(
    floor: NewFloor, mounted: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first stat of its watcher never comes back: the inbox is named and down, the other is served, and it comes when it answers."""
    monkeypatch.setattr(intake, "SILENT_S", SILENT_S)
    (mounted.served / "inbox" / "far.wav").write_text('{"content": "far"}')
    life = floor(inboxes=({}, {"path": str(mounted.point / "inbox"), "outbox": str(tmp_path / "outbox 2")}))
    mounted.hang()  # before it begins to live
    life.drop("near")
    life.until(lambda: life.all_in("near"), "the other is served")
    life.until(lambda: down(life), "the share is named")
    mounted.answer()
    life.until(lambda: life.all_in("far"), "and served when it answers")
    assert not down(life)


def test_an_outbox_on_a_share_that_hangs(floor: NewFloor, mounted: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is finished waits as transcribed, the outbox is named, the transcripts of the other inbox are published, and when the share
    answers so are these, once."""
    monkeypatch.setattr(delivery, "ANSWER_S", SILENT_S)
    (tmp_path / "inbox 2").mkdir()
    life = floor(inboxes=({}, {"path": str(tmp_path / "inbox 2"), "outbox": str(mounted.point / "outbox")}))
    life.drop("before", inbox="inbox 2")
    life.until(lambda: life.all_in("before"), "the share is there")
    mounted.hang()
    far = [f"far {number}" for number in range(3)]
    for name in far:
        life.drop(name, inbox="inbox 2")
    life.until(lambda: life.all_in(*far, state="transcribed"), "they wait for the outbox")
    writer = life.dispatcher.delivery.writers[os.fsencode(mounted.point / "outbox")]
    life.until(lambda: writer.down, "it is named")
    assert str(mounted.point / "outbox") in writer.down
    life.drop("near")
    life.until(lambda: life.all_in("near"), "the other outbox is served")
    assert life.all_in(*far, state="transcribed")
    mounted.answer()
    life.until(lambda: life.all_in(*far), "they are published")
    assert not writer.down
    assert sorted(path.name for path in (mounted.served / "outbox").glob("far*.txt")) == [f"{name}.txt" for name in far]


def state_of(pid: int) -> str:
    """As the kernel names it: D waits and cannot be killed."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]


# --- dropping ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["drop", "break_off"])
def test_a_share_that_drops_during_the_work_costs_nothing(two: Floor, mounted: Share, how: str) -> None:
    """Unmounted (the bare mount point is left) or broken (every call an error): what was copied is finished, what was not waits without
    an attempt, nothing is declared vanished, and all comes back by itself within half a minute."""
    two.drop("copied", inbox="served/inbox", length_s=60, after=two.go("copied"))
    two.until(two.in_hand, "one is worked on")
    for number in range(3):
        two.drop(f"held {number}", inbox="served/inbox")
    two.until(lambda: sum(state != "seen" for state in two.states().values()) == 4, "others have settled")
    getattr(mounted, how)()
    two.until(lambda: down(two), "the inbox is down")
    Path(two.go("copied")).touch()
    two.drop("near")
    two.until(lambda: two.all_in("copied", "near"), "what was copied is done, and the other inbox")
    two.live(1.0)
    assert "gone" not in two.states().values() and down(two)
    two.drop("new", inbox="served/inbox")
    mounted.close()
    mounted.mount()
    began = time.monotonic()
    two.until(lambda: two.all_in("new", *(f"held {number}" for number in range(3))), "all are done")
    assert time.monotonic() - began < WAKE_S
    assert not down(two)
    assert {row["attempts"] for row in two.rows().values()} == {1}
    assert len(two.rows()) == len(list(two.ledger.jobs())) == 6


# --- the whole daemon ----------------------------------------------------------------------------------------------------------


def test_status_names_it_and_a_stop_ends_in_time(place: Installation, mounted: Share, studio: Studio) -> None:
    """The real daemon, with a watcher and an examiner in the middle of a copy that hang, one of them beyond SIGKILL: the other inbox is
    served, `whisperd status` names the share, and SIGTERM ends the daemon with status 0."""
    place.write_config(inbox=[{"path": str(place.inbox)}, {"path": str(mounted.point / "inbox")}])
    talk = studio.say(SENTENCES[0])
    with place.daemon() as daemon:
        (mounted.served / "inbox" / "far.wav").write_bytes(talk.read_bytes())
        row = daemon.wait_ended("far.wav")
        assert row["spooled"] and (mounted.served / "outbox" / "far.txt").exists()
        quiet(mounted.served / "inbox" / "huge.wav", samples=1 << 28)
        daemon.wait_until(lambda ledger: copying(place, ledger, b"huge.wav"), "it is being copied")
        mounted.hang()
        place.drop(studio.say(SENTENCES[1]), "near.wav")
        daemon.wait_ended("near.wav")
        daemon.wait_until(lambda ledger: [inbox for inbox in ledger.inboxes() if inbox["state"] == "down"], "it is down")
        said = place.desk("status").out
        assert f"the share of {mounted.point}/inbox does not answer" in said
        assert f"{mounted.point}/inbox is on a share that does not answer" in place.desk("config check").out
        children = [pid for module in (WATCHER, EXAMINER) for pid in daemon.children(module)]
        began = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - began < STOP_S
        assert "D" in [state_of(pid) for pid in children if os.path.exists(f"/proc/{pid}")], "killed, and still there"
        mounted.close()
    with place.ledger() as ledger:
        assert {row["path"]: row["attempts"] for row in ledger.jobs()} == {b"far.wav": 1, b"near.wav": 1, b"huge.wav": 0}


def copying(place: Installation, ledger: Queries, path: bytes) -> bool:
    """Whether a copy of that file is begun and not whole."""
    row = next((row for row in ledger.jobs() if row["path"] == path), None)
    if row is None or row["sha256"] is not None:
        return False
    return any(name.partition(".")[0] == str(row["id"]) for name in os.listdir(place.state / "spool"))


def quiet(to: Path, samples: int) -> None:
    """A good recording of silence, as long as you like: nothing of it lies on the disk. It is whole from its first moment."""
    size, rate_hz = 2 * samples, 16_000
    header = struct.pack("<4sI4s4sIHHIIHH4sI", b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate_hz, 2 * rate_hz, 2, 16, b"data", size)
    aside = to.with_name(to.name + ".part")
    aside.write_bytes(header)
    os.truncate(aside, len(header) + size)
    aside.rename(to)


# --- other causes that clear -----------------------------------------------------------------------------------------------------


def test_room_on_the_disk_again(floor: NewFloor, tmp_path: Path) -> None:
    """The disk of the state directory is nearly full: files wait without an attempt. When something else is deleted there, work begins."""
    state = tmp_path / "state"
    with tmpfs(state, "size=64m"):
        (state / "of somebody else").write_bytes(bytes(40 << 20))
        life = floor(intake={"free_min_mib": 32})
        life.drop("a")
        life.until(lambda: life.all_in("a", state="ready") and life.dispatcher.no_room(), "it waits for room")
        life.live(0.5)
        assert life.rows()["a"]["attempts"] == 0
        (state / "of somebody else").unlink()
        began = time.monotonic()
        life.until(lambda: life.all_in("a"), "there is room")
        assert time.monotonic() - began < WAKE_S
        life.end()


def test_a_model_that_is_there_at_last(place: Installation, studio: Studio, tmp_path: Path) -> None:
    """Its directory is absent: the file waits, no attempt is spent, the daemon says what is missing. When it is there, work begins."""
    model = tmp_path / "model"
    place.write_config(engine={"model": str(model)})
    with place.daemon() as daemon:
        place.drop(studio.say(SENTENCES[0]), "a.wav")
        daemon.wait_until(lambda ledger: ledger.counts()["ready"], "it waits")
        daemon.wait_until(lambda ledger: str(model) in ((ledger.heard("daemon") or (0, {}))[1].get("blocked") or ""), "it is said")
        shutil.copytree(files("whisperd").joinpath("share", "demo_model"), tmp_path / "aside")
        (tmp_path / "aside").rename(model)
        assert daemon.wait_ended("a.wav", timeout_s=WAKE_S)["attempts"] == 1
        assert daemon.stop() == 0


def test_what_is_passed_on_is_let_go_without_asking_the_share(mounted: Share) -> None:
    """A descriptor as a watcher sends it is closed at once though sshfs itself is stopped, and without an error when it is dead: the
    daemon, through which it passes, neither hangs nor fails."""
    (mounted.served / "inbox" / "a.wav").write_bytes(b"sound")
    with Forked(lambda: name_only(os.open(mounted.point / "inbox" / "a.wav", os.O_RDONLY))) as holder:
        mounted.freeze()
        closed = holder.closes()
        mounted.thaw()
        assert closed
    descriptor = name_only(os.open(mounted.point / "inbox" / "a.wav", os.O_RDONLY))
    mounted.break_off()
    os.close(descriptor)


class Forked:
    """A process that opens something and closes it when it is told to: what hangs is not the test."""

    def __init__(self, opens: Callable[[], int]) -> None:
        self._tell, told = os.pipe()[::-1]
        heard, self._hear = os.pipe()[::-1]
        self._pid = os.fork()
        if self._pid == 0:
            descriptor = opens()
            os.write(heard, b"open")
            os.read(told, 1)
            os.close(descriptor)
            os.write(heard, b"closed")
            os._exit(0)
        assert self._says() == b"open"

    def _says(self) -> bytes:
        readable, _, _ = select.select([self._hear], [], [], PATIENCE_S)
        return os.read(self._hear, 100) if readable else b""

    def closes(self) -> bool:
        os.write(self._tell, b"!")
        return self._says() == b"closed"

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
