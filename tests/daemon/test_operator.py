"""The operator's word on jobs, with a true daemon: cancel, hold, unhold, prioritise, while it works and while it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, assert_ledger_and_disk_agree
from recordings import SENTENCES, Studio
from test_slots import NewFloor, floor

from whisperd.ledger.ledger import Ledger
from whisperd.ledger.queries import Queries, Row

__all__ = ["floor"]  # the fixture

NewPlace = Callable[[str], Installation]
TALK = b"talk.wav"


@pytest.fixture(scope="module")
def long_talk(studio: Studio) -> Path:
    """Minutes of speech: what works on it can be stopped in the middle."""
    return studio.long(SENTENCES * 12)


def row_of(ledger: Queries, path: bytes) -> Row | None:
    return next((row for row in ledger.jobs() if row["path"] == path), None)


def in_state(path: bytes, state: str, **fields: Any) -> Callable[[Queries], Row | None]:
    """The job of a path, once it is there and has these fields."""

    def found(ledger: Queries) -> Row | None:
        row = row_of(ledger, path)
        return row if row and row["state"] == state and all(row[name] == value for name, value in fields.items()) else None

    return found


def under_way(ledger: Queries) -> Row | None:
    """The long talk runs, and some of it is done."""
    row = row_of(ledger, TALK)
    return row if row and row["state"] == "running" and ledger.windows(row["id"]) else None


def test_a_held_file_stays_until_it_is_released(place: Installation, studio: Studio) -> None:
    """Held before it has settled, a file becomes ready and stays so while another that came later is done; released, it is done, too."""
    place.write_config(watcher={"quiet_s": 2.0})
    with place.daemon() as daemon:
        place.drop(studio.say(SENTENCES[0]), TALK)
        job = str(daemon.wait_until(in_state(TALK, "seen"), "it is seen")["id"])
        assert place.desk("hold", job).out == f"job {job} is held: talk.wav\n"
        daemon.wait_until(in_state(TALK, "ready", held=1), "it is ready and held")
        place.drop(studio.say(SENTENCES[1]), b"later.wav")
        daemon.wait_ended(b"later.wav")
        with place.ledger() as ledger:
            assert in_state(TALK, "ready", held=1, attempts=0)(ledger)
        assert place.desk("unhold", job).out == f"job {job} is held no more: talk.wav\n"
        daemon.wait_ended(TALK)
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_a_running_file_is_held_and_goes_on_where_it_was(place: Installation, long_talk: Path) -> None:
    """Held while it runs, a file is out of the engine's hands with its windows and its attempt; released, it goes on from them."""
    place.drop(long_talk, TALK)
    with place.daemon() as daemon:
        job = daemon.wait_until(under_way, "some windows are done")["id"]
        assert place.desk("hold", str(job)).code == 0
        with place.ledger() as ledger:
            assert in_state(TALK, "ready", held=1, attempts=0)(ledger)
            kept = len(ledger.windows(job))
        assert kept
        assert place.desk("unhold", str(job)).code == 0
        daemon.wait_ended(TALK)
        with place.ledger() as ledger:
            verbs = [event["verb"] for event in ledger.events(job)]
        assert verbs == ["see", "settle", "claim", "hold", "unhold", "claim", "finish", "publish"]
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_a_running_file_is_cancelled(place: Installation, long_talk: Path, studio: Studio) -> None:
    """Cancelled while it runs, a file has no transcript and the engine goes on with others; a retry makes one."""
    place.drop(long_talk, TALK)
    with place.daemon() as daemon:
        job = str(daemon.wait_until(under_way, "some windows are done")["id"])
        assert place.desk("cancel", job).out == f"job {job} is cancelled: talk.wav\n"
        place.drop(studio.say(SENTENCES[0]), b"other.wav")
        daemon.wait_ended(b"other.wav")
        with place.ledger() as ledger:
            assert in_state(TALK, "cancelled")(ledger)
        assert not any(name.startswith(b"talk") for name in place.published())
        assert place.desk("retry", job).code == 0
        daemon.wait_ended(TALK)
        assert daemon.stop() == 0
    assert_ledger_and_disk_agree(place)


def test_one_refused_job_does_not_stop_the_rest(place: Installation, studio: Studio) -> None:
    """Of several jobs, those that are done or unknown are refused in words and the others obey; exit status 1. The JSON has both lists."""
    place.drop(studio.say(SENTENCES[0]), b"done.wav")
    assert place.run_once().code == 0
    done = place.job(b"done.wav")["id"]
    ledger = Ledger(str(place.state), epoch="the test")
    inbox = ledger.inboxes()[0]["id"]
    with ledger.transaction():
        seen = row_of(ledger, b"done.wav")
        assert seen is not None
        ledger.db.conn.execute(  # a file that is gone again: nobody watches, so it stays as it is seen
            "INSERT INTO job (inbox_id, path, dev, inode, size, mtime_ns, ctime_ns, state, verb, updated_at, seen_at)"
            " VALUES (?, X'6E6577', 1, 1, 1, 1, 1, 'seen', 'see', 1.0, 1.0)",
            [inbox],
        )
    new = place.job(b"new")["id"]
    ledger.close()
    for verb, arguments, told in (
        ("prioritise", ["--class", "urgent"], "prioritised"),
        ("hold", [], "held"),
        ("unhold", [], "unheld"),
        ("cancel", [], "cancelled"),
    ):
        answer = place.desk(verb, "--json", *arguments, str(done), str(new), "999")
        assert answer.code == 1 and "Traceback" not in answer.err
        shown = json.loads(answer.out)
        assert set(shown) == {"schema", told, "refused"} and shown["schema"] == f"whisperd.{verb}/1"
        assert shown[told] == [{"job": new, "path": "new"}]
        assert [item["job"] for item in shown["refused"]] == [done, 999]
        assert f"cannot {verb} job {done}: it is done" in shown["refused"][0]["what"]
    said = place.desk("hold", str(new), str(done))
    assert said.code == 1 and f"cannot hold job {new}: it is cancelled" in said.out
    assert place.desk("hold").code == 2 and place.desk("prioritise", str(new)).code == 2
    assert place.job(b"new")["options"] is not None, "cancelled before it settled, it asks for what its inbox asks for"


def test_a_waiting_file_is_brought_forward(floor: NewFloor) -> None:
    """With one slot, and files that wait in the order they came, the one that is made urgent is next, and the one made low is last."""
    life = floor(slots=1)
    names = ["first", "a", "b", "c", "d"]
    for name in names:
        life.drop(name, after=life.go(name))
        life.until(lambda name=name: life.states().get(name) in ("ready", "running"), f"{name} is there")
    life.until(lambda: life.in_hand() == {"first"}, "the first one is in hand")
    life.until(lambda: all(row["sha256"] for row in life.rows().values()), "the contents of the others were read")
    desk = Ledger(str(life.home / "state"), epoch="desk")
    desk.prioritise(life.rows()["d"]["id"], 0, 1.0)
    desk.prioritise(life.rows()["a"]["id"], 2, 1.0)
    desk.close()
    order = []
    for _ in names:
        (name,) = life.until(life.in_hand, "somebody is in hand")
        order.append(name)
        Path(life.go(name)).touch()
        life.until(lambda name=name: life.states()[name] == "done", f"{name} is done")
    assert order == ["first", "d", "b", "c", "a"]
