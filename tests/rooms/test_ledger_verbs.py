"""The verbs of intake and delivery (docs/decisions/0012), on a real disk with real SQLite: what each does, and what each refuses."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.rooms.test_ledger import ABSENT, BAD, STATES, bring_to, sighting, window
from whisperd.ledger.connection import LEDGER_NAME, LedgerBroken
from whisperd.ledger.intake import judged
from whisperd.ledger.ledger import IllegalMove, Ledger, NoSuchJob, Settling
from whisperd.ledger.queries import Queries
from whisperd.report import life, status
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Media, Sighting, Track

MEDIA = Media(container="mov", tracks=(Track(number=1, codec="aac", language="ces"),), duration_s=61.5, start_offset_s=0.25, video=True)
SHARE_GONE = Failure(kind=FailureKind.WAITING, code="source_down", what="the share is gone")
HOOK = "hook:/usr/bin/true#1"


def state_of(ledger: Ledger, job: int) -> str:
    return str(ledger.job(job)["state"])


def transcribed(ledger: Ledger, inbox: int, path: bytes, *, sha256: str = "ab", now: float = 10.0) -> int:
    """A job whose transcript is kept as the answer to a question."""
    job = bring_to(ledger, inbox, "running", path)
    done = {"transcript": f"{job}.json", "sha256": sha256, "duration_s": 60.0, "language": "cs", "process_s": 2.0, "quality": "second_pass"}
    ledger.finish(job, "anna", now, **done, asked="q", revision="main", size=100)
    return job


# --- seen, settled -------------------------------------------------------------------------------------------------------------------


def test_thousands_are_seen_at_once(ledger: Ledger, inbox: int) -> None:
    """`see_all` gives each file its job, in order; files that are known keep theirs, one seen twice has one, one that changed a new one."""
    files = [sighting(b"%d" % number) for number in range(3000)]
    jobs = ledger.see_all(inbox, files, 1.0)
    assert [ledger.job(job)["path"] for job in jobs[::500]] == [file.path for file in files[::500]]
    assert len(set(jobs)) == 3000
    assert ledger.see_all(inbox, files[::-1], 2.0) == jobs[::-1]
    ledger.settle(jobs[0], files[0], JobOptions(), 3.0)
    again = ledger.see_all(inbox, [sighting(b"0"), sighting(b"0", size=5), sighting(b"new"), sighting(b"0", size=6)], 4.0)
    assert again[0] == jobs[0]
    assert again[1] == again[3] != jobs[0]
    assert (state_of(ledger, jobs[0]), ledger.job(again[1])["size"]) == ("gone", 6)
    assert ledger.see_all(inbox, [], 5.0) == []
    assert ledger.counts()["seen"] == 3000 + 1


def test_one_bad_file_among_many_refuses_all(ledger: Ledger, inbox: int) -> None:
    """`see_all` is one transaction: with a file that no row can hold nothing of it stays."""
    with pytest.raises(IllegalMove):
        ledger.see_all(inbox, [sighting(b"a"), sighting(b"b", size=-1)], 1.0)
    with pytest.raises(IllegalMove):
        ledger.see_all(4711, [sighting(b"a")], 1.0)
    assert sum(ledger.counts().values()) == 0


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([], (None, False, None)),
        ([(1, "seen", 9, 9)], (1, True, None)),
        ([(1, "ready", 5, 3)], (1, False, None)),
        ([(1, "running", 9, 3)], (None, False, 1)),
        ([(1, "done", 5, 3)], (1, False, None)),
        ([(1, "gone", 5, 3)], (None, False, None)),
        ([(2, "done", 5, 3), (1, "ready", 9, 9)], (2, False, 1)),
        ([(2, "done", 9, 3), (1, "done", 5, 3)], (None, False, None)),
    ],
)
def test_what_a_sighting_means(rows: list[tuple[int, str, int, int]], expected: tuple[Any, ...]) -> None:
    """The newest word on a path decides; a live job comes first; what has gone says nothing (size 5, time 3 was seen)."""
    assert tuple(judged(5, 3, rows)) == expected


def test_settling_keeps_what_the_container_says(ledger: Ledger, inbox: int) -> None:
    """Media comes back as the noun it was, and its length is the job's; a file that was not examined has none."""
    examined, unexamined = (ledger.see(inbox, sighting(name), 1.0) for name in (b"a", b"b"))
    ledger.settle(examined, sighting(b"a"), JobOptions(), 2.0, media=MEDIA)
    ledger.settle(unexamined, sighting(b"b"), JobOptions(), 2.0)
    assert (ledger.media(ledger.job(examined)), ledger.job(examined)["duration_s"]) == (MEDIA, 61.5)
    assert ledger.media(ledger.job(unexamined)) is None


def test_many_settle_at_once(ledger: Ledger, inbox: int) -> None:
    """`settle_all` tells which became ready: not what is ready already, nor a job whose file is another by now, nor one that is none; the
    operator's class stays."""
    known = [ledger.see(inbox, sighting(b"%d" % number), 1.0) for number in range(4)]
    ledger.settle(known[1], sighting(b"1"), JobOptions(), 2.0)
    ledger.prioritise(known[3], 0, 2.0)
    options = JobOptions(language="cs")
    settled = [Settling(sighting(b"%d" % number), options, 2, MEDIA, job) for number, job in enumerate(known)]
    settled[2] = Settling(sighting(b"2", size=7), options, 2, MEDIA, known[2])
    settled += [Settling(sighting(b"new"), options), Settling(sighting(b"0"), options, job=4711)]
    new = known[-1] + 1
    assert ledger.settle_all(inbox, settled, 3.0) == [known[0], known[3], new]
    assert [ledger.job(job)["priority"] for job in (known[0], known[3], new)] == [2, 0, 1]
    row = ledger.job(known[0])
    assert (ledger.options(row), ledger.media(row), row["ready_at"], row["duration_s"]) == (options, MEDIA, 3.0, 61.5)
    assert state_of(ledger, known[2]) == "seen"
    with pytest.raises(IllegalMove):
        ledger.settle_all(inbox, [Settling(sighting(b"x"), options, 9)], 4.0)


def test_what_is_no_recording_is_refused_for_good(ledger: Ledger, inbox: int) -> None:
    """`reject` ends a file before any engine sees it: an error file is owed; the operator may still retry; nothing else is refused so."""
    job = ledger.see(inbox, sighting(b"a"), 1.0)
    ledger.hold(job, 1.5)
    ledger.reject(job, BAD, JobOptions(language="cs"), 2.0)
    row = ledger.job(job)
    assert (row["state"], row["failure_code"], row["attempts"], row["held"], row["ended_at"]) == ("failed", "no_audio", 0, 0, 2.0)
    assert [item["id"] for item in ledger.unpublished()] == [job]
    assert ledger.see(inbox, sighting(b"a"), 3.0) == job, "it is not taken for a new file"
    ledger.retry(job, 4.0)
    assert (state_of(ledger, job), ledger.options(ledger.job(job)).language) == ("ready", "cs")
    with pytest.raises(IllegalMove, match="it is ready"):
        ledger.reject(job, BAD, JobOptions(), 5.0)
    with pytest.raises(IllegalMove, match="may pass"):
        ledger.reject(ledger.see(inbox, sighting(b"b"), 5.0), ABSENT, JobOptions(), 5.0)
    with pytest.raises(NoSuchJob):
        ledger.reject(4711, BAD, JobOptions(), 5.0)


# --- contents ------------------------------------------------------------------------------------------------------------------------


def test_a_content_is_taken_before_its_turn(ledger: Ledger, inbox: int) -> None:
    """`take` notes the content, the question and the copy, ends a wait, leaves no event; only what is ready can be taken."""
    job = bring_to(ledger, inbox, "ready", b"a")
    ledger.postpone(job, SHARE_GONE, 3.0, not_before=60.0)
    assert ledger.ready(4.0) == []
    ledger.take(job, "ab", 61.0, spooled=True, asked="q")
    row = ledger.job(job)
    assert (row["sha256"], row["spooled"], row["asked"], row["failure_kind"]) == ("ab", 1, "q", None)
    assert [event["verb"] for event in ledger.events(job)] == ["see", "settle"]
    ledger.cancel(job, 62.0)
    ledger.retry(job, 63.0)
    assert ledger.job(job)["spooled"] == 0, "its copy went with it"
    with pytest.raises(IllegalMove, match="it is done"):
        ledger.take(bring_to(ledger, inbox, "done", b"b"), "ab", 5.0, spooled=False, asked="q")
    with pytest.raises(NoSuchJob):
        ledger.take(4711, "ab", 5.0, spooled=False, asked="q")


def test_copies_are_worked_on_while_the_share_is_away(ledger: Ledger, inbox: int) -> None:
    """Of an inbox that is down exactly those are ready of which there is a copy, unless they are held."""
    copied, held, absent = (bring_to(ledger, inbox, "ready", name) for name in (b"copied", b"held", b"absent"))
    for job in (copied, held):
        ledger.take(job, "ab", 103.0, spooled=True, asked="q")
    ledger.hold(held, 104.0)
    ledger.inbox_down(inbox, "the share is gone", 105.0)
    assert [row["id"] for row in ledger.ready(200.0)] == [copied]
    ledger.inbox_up(inbox, 106.0)
    assert [row["id"] for row in ledger.ready(200.0)] == [copied, absent]


def test_the_same_content_is_published_from_the_stored_transcript(ledger: Ledger, inbox: int) -> None:
    """`reuse` leads to the usual publication with language, length and verdict of the job that made it; history tells whose it was."""
    first = transcribed(ledger, inbox, b"first")
    assert ledger.result("ab", "other") is None
    result = ledger.result("ab", "q")
    assert result is not None
    assert (result["job_id"], result["transcript"], result["revision"], result["bytes"]) == (first, f"{first}.json", "main", 100)
    second = bring_to(ledger, inbox, "ready", b"second")
    ledger.take(second, "ab", 19.0, spooled=False, asked="q")
    ledger.reuse(second, 20.0, transcript=f"{second}.json", result=result)
    row = ledger.job(second)
    assert (row["state"], row["origin"], row["language"], row["duration_s"], row["quality"]) == (
        "transcribed",
        first,
        "cs",
        60.0,
        "second_pass",
    )
    assert (row["process_s"], row["attempts"], ledger.result("ab", "q")["used_at"]) == (None, 0, 20.0)  # type: ignore[index]
    assert ledger.events(second)[-1]["note"] == f"its content is that of job {first}"
    ledger.publish(second, b"/out", [(b"second.txt", "txt", "ef")], 21.0)
    assert state_of(ledger, second) == "done"


def test_what_cannot_be_reused(ledger: Ledger, inbox: int) -> None:
    """Another content, another question, a result that was dropped, a held job, one that is not ready: refused, and nothing changed."""
    transcribed(ledger, inbox, b"first")
    result = ledger.result("ab", "q")
    assert result is not None
    job = bring_to(ledger, inbox, "ready", b"second")
    for sha256, asked in (("cd", "q"), ("ab", "r")):
        ledger.take(job, sha256, 19.0, spooled=False, asked=asked)
        with pytest.raises(IllegalMove, match="another content, or was asked otherwise"):
            ledger.reuse(job, 20.0, transcript="t.json", result=result)
    ledger.take(job, "ab", 19.0, spooled=False, asked="q")
    ledger.hold(job, 19.5)
    with pytest.raises(IllegalMove, match="it is held"):
        ledger.reuse(job, 20.0, transcript="t.json", result=result)
    ledger.unhold(job, 19.6)
    with pytest.raises(IllegalMove, match="it is seen"):
        ledger.reuse(bring_to(ledger, inbox, "seen", b"third"), 20.0, transcript="t.json", result=result)
    with pytest.raises(NoSuchJob):
        ledger.reuse(4711, 20.0, transcript="t.json", result=result)
    ledger.drop_results(0, 0.0)
    with pytest.raises(IllegalMove, match="not kept any more"):
        ledger.reuse(job, 20.0, transcript="t.json", result=result)
    assert state_of(ledger, job) == "ready"


def test_the_second_of_two_copies_waits(ledger: Ledger, inbox: int) -> None:
    """While a job with the same content and question runs, the other is told so; not by itself, nor by one that was asked otherwise."""
    first, second = (bring_to(ledger, inbox, "ready", name) for name in (b"a", b"b"))
    for job in (first, second):
        ledger.take(job, "ab", 103.0, spooled=False, asked="q")
    assert not ledger.being_made("ab", "q", other_than=second)
    ledger.claim(first, "anna", 104.0, lease_s=60)
    assert ledger.being_made("ab", "q", other_than=second)
    assert not ledger.being_made("ab", "q", other_than=first)
    assert not ledger.being_made("ab", "r", other_than=second)


def test_results_are_bounded(ledger: Ledger, inbox: int) -> None:
    """Those used longest ago go first; a staged file that is still to be published, or that another result has, is not given up."""
    jobs = [transcribed(ledger, inbox, b"%d" % number, sha256=f"{number}", now=10.0 + number) for number in range(5)]
    for job in jobs[:4]:
        ledger.publish(job, b"/out", [(b"%d.txt" % job, "txt", "ab")], 20.0)
    assert ledger.drop_results(10_000, 0.0) == []
    twin = bring_to(ledger, inbox, "ready", b"twin")
    ledger.reuse(twin, 30.0, transcript="twin.json", result=ledger.result("0", "q") or {})
    assert ledger.drop_results(300, 0.0) == [f"{jobs[1]}.json", f"{jobs[2]}.json"], "the first was used again"
    assert [ledger.result(f"{number}", "q") is not None for number in range(5)] == [True, False, False, True, True]
    assert ledger.drop_results(10_000, 14.5) == [f"{jobs[3]}.json"], "the last is not out yet"
    assert ledger.needed_transcripts() == {f"{jobs[0]}.json", f"{jobs[4]}.json", "twin.json"}


# --- other names, other inodes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["seen", "ready", "running"])
def test_a_rename_keeps_the_job(ledger: Ledger, inbox: int, state: str) -> None:
    """What lives goes on under its new name: same number, history, windows and lease; what lived there was replaced."""
    job, other = bring_to(ledger, inbox, state, b"a"), bring_to(ledger, inbox, "ready", b"b")
    windows = ledger.windows(job)
    new = Sighting(path=b"b", dev=1, inode=7, size=1000, mtime_ns=3, ctime_ns=9)
    assert ledger.rename(inbox, b"a", new, 200.0) == job
    row = ledger.job(job)
    assert (row["path"], row["inode"], row["ctime_ns"], row["state"]) == (b"b", 7, 9, state)
    assert (ledger.windows(job), state_of(ledger, other), ledger.live_job(inbox, b"a")) == (windows, "gone", None)
    event = ledger.events(job)[-1]
    assert (event["verb"], event["path"], event["note"]) == ("rename", b"a", "it was a")
    assert ledger.see(inbox, sighting(b"b"), 201.0) == job
    if state == "running":
        ledger.checkpoint(job, "anna", window(1), 202.0, lease_s=60)


def test_what_is_not_renamed(ledger: Ledger, inbox: int) -> None:
    """Nothing lives at the old name, or its content is another by now: then it is the new file's own matter. A path is changed by no other
    verb."""
    assert ledger.rename(inbox, b"nothing", sighting(b"b"), 1.0) is None
    done = bring_to(ledger, inbox, "done", b"done")
    assert ledger.rename(inbox, b"done", sighting(b"b"), 200.0) is None
    job = bring_to(ledger, inbox, "ready", b"a")
    assert ledger.rename(inbox, b"a", sighting(b"a"), 200.0) == job, "it has this name"
    assert ledger.rename(inbox, b"a", sighting(b"b", size=5), 200.0) is None
    assert (state_of(ledger, done), state_of(ledger, job)) == ("done", "gone")
    with pytest.raises(IllegalMove), ledger.transaction():
        ledger.db.conn.execute("UPDATE job SET verb = 'recognise', path = X'41' WHERE id = ?", [done])


def test_names_that_were_never_published_are_free_after_a_rename(ledger: Ledger, inbox: int) -> None:
    """A reserved name goes back, unless a file of ours stands under it; a name that is avoided stays avoided."""
    job = bring_to(ledger, inbox, "failed", b"a.wav")
    assert ledger.reserve_name(job, b"/out", [b"a.wav.error.txt"], "error") == b"a.wav.error.txt"
    ledger.report(job, b"/out", [(b"a.wav.error.txt", "error", "ab")], 110.0)
    ledger.retry(job, 111.0)
    assert ledger.reserve_name(job, b"/out", [b"a"], "transcript") == b"a"
    ledger.avoid_name(job, b"/out", b"somebody's")
    ledger.rename(inbox, b"a.wav", sighting(b"b.wav"), 112.0)
    newcomer = bring_to(ledger, inbox, "transcribed", b"a.mp3")
    assert ledger.reserve_name(newcomer, b"/out", [b"a"], "transcript") == b"a"
    with pytest.raises(IllegalMove, match="taken"):
        ledger.reserve_name(newcomer, b"/out", [b"a.wav.error.txt", b"somebody's"], "error")
    assert [item["path"] for item in ledger.publications_of_source(inbox, b"b.wav")] == [b"a.wav.error.txt"]


def test_the_same_content_in_another_file_is_recognised(ledger: Ledger, inbox: int) -> None:
    """A finished job's file with another inode and change time is noted, whatever became of it; with another size or time it is not."""
    for state in ("transcribed", "done", "failed", "cancelled"):
        job = bring_to(ledger, inbox, state, state.encode())
        ledger.recognise(job, Sighting(path=state.encode(), dev=8, inode=7, size=1000, mtime_ns=3, ctime_ns=9), 200.0)
        row = ledger.job(job)
        assert (row["dev"], row["inode"], row["ctime_ns"], row["state"]) == (8, 7, 9, state)
    with pytest.raises(IllegalMove, match="its size or time is another"):
        ledger.recognise(job, sighting(b"x", size=5), 201.0)
    with pytest.raises(IllegalMove, match="it is ready"):
        ledger.recognise(bring_to(ledger, inbox, "ready", b"r"), sighting(b"r"), 201.0)
    with pytest.raises(NoSuchJob):
        ledger.recognise(4711, sighting(b"x"), 201.0)


def test_another_content_of_the_same_size_and_time_is_new_work(ledger: Ledger, inbox: int) -> None:
    """`see_anew` begins a job where `see` would find the old one; a live job is not doubled."""
    done = bring_to(ledger, inbox, "done", b"a")
    assert ledger.see(inbox, sighting(b"a"), 200.0) == done
    new = ledger.see_anew(inbox, sighting(b"a"), 201.0)
    assert new != done
    assert ledger.see_anew(inbox, sighting(b"a"), 202.0) == new
    assert ledger.see(inbox, sighting(b"a"), 203.0) == new


def test_the_watcher_hears_what_moved(ledger: Ledger, inbox: int) -> None:
    """After an event's number: the newest job of each path that moved, nothing of other inboxes, and "gone" for a name that was left."""
    other = ledger.register_inbox(b"/in2", b"/out", 1.0)
    first, second = bring_to(ledger, inbox, "done", b"a"), bring_to(ledger, inbox, "ready", b"b")
    before = ledger.newest_event()
    assert list(ledger.moved_since(before, inbox)) == []
    bring_to(ledger, other, "seen", b"a")
    ledger.see(inbox, sighting(b"a", size=5), 200.0)
    ledger.recognise(first, sighting(b"a"), 201.0)
    ledger.rename(inbox, b"b", sighting(b"c"), 202.0)
    ledger.cancel(second, 203.0)
    told = {row[0]: row[1:] for row in ledger.moved_since(before, inbox)}
    assert told == {b"a": (1, 2, 5, 3, 4, "seen"), b"b": (0, 0, 0, 0, 0, "gone"), b"c": (1, 2, 1000, 3, 4, "cancelled")}
    everything = list(ledger.identities(inbox))
    assert [row[0] for row in everything] == [b"a", b"c", b"a"]
    assert {row[0]: row[-1] for row in everything} == {b"a": "seen", b"c": "cancelled"}
    assert [row["id"] for row in ledger.by_inode(inbox, 2, 1000, 3)] == [first, second]
    assert ledger.by_inode(inbox, 2, 999, 3) == ledger.by_inode(other, 3, 1000, 3) == []


# --- waiting, and what is owed afterwards --------------------------------------------------------------------------------------------


def test_what_waits_wakes_when_its_cause_clears(ledger: Ledger, inbox: int) -> None:
    """Only jobs that wait for one of these things, and whose time has not come, go on at once; an attempt is never spent."""
    share, card, late = (bring_to(ledger, inbox, "ready", name) for name in (b"share", b"card", b"late"))
    ledger.postpone(share, SHARE_GONE, 103.0, not_before=500.0)
    ledger.claim(card, "anna", 103.0, lease_s=60)
    ledger.wait(card, "anna", ABSENT, 104.0, not_before=500.0)
    ledger.postpone(late, SHARE_GONE, 103.0, not_before=104.0)
    assert ledger.wake_waiting([], 105.0) == 0
    assert ledger.wake_waiting(["source_down", "source_denied"], 105.0) == 1
    assert {row["id"] for row in ledger.ready(105.0)} == {share, late}
    assert ledger.wake_waiting(["no_gpu"], 106.0) == 1
    assert {row["id"]: row["attempts"] for row in ledger.ready(106.0)} == {share: 0, card: 0, late: 0}
    with pytest.raises(IllegalMove, match="nobody waits for"):
        ledger.postpone(share, BAD, 107.0, not_before=500.0)
    with pytest.raises(IllegalMove, match="it is seen"):
        ledger.postpone(bring_to(ledger, inbox, "seen", b"x"), SHARE_GONE, 107.0, not_before=500.0)


def test_a_source_is_disposed_of_once(ledger: Ledger, inbox: int) -> None:
    """What was said at publication is owed until it is done; nothing else can be struck off, and nothing twice."""
    jobs = {name: bring_to(ledger, inbox, "transcribed", name) for name in (b"keep", b"archive", b"delete")}
    for name, job in jobs.items():
        disposal = "" if name == b"keep" else name.decode()
        ledger.publish(job, b"/out", [(name + b".txt", "txt", "ab")], 200.0, disposal=disposal)
    assert [(row["id"], row["disposal"]) for row in ledger.owed_disposals(10)] == [
        (jobs[b"archive"], "archive"),
        (jobs[b"delete"], "delete"),
    ]
    assert len(ledger.owed_disposals(1)) == 1
    ledger.disposed(jobs[b"archive"], "archived", 201.0)
    ledger.disposed(jobs[b"delete"], "gone", 201.0)
    assert ledger.owed_disposals(10) == []
    assert [ledger.job(job)["disposal"] for job in jobs.values()] == [None, "archived", "gone"]
    for job, how in ((jobs[b"keep"], "deleted"), (jobs[b"archive"], "archived")):
        with pytest.raises(IllegalMove, match="nothing of the kind is owed"):
            ledger.disposed(job, how, 202.0)
    job = bring_to(ledger, inbox, "transcribed", b"other")
    with pytest.raises(IllegalMove):
        ledger.publish(job, b"/out", [(b"o.txt", "txt", "ab")], 203.0, disposal="burn")
    assert (state_of(ledger, job), ledger.publications(job)) == ("transcribed", [])


def test_notices_are_owed_until_they_are_told(ledger: Ledger, inbox: int) -> None:
    """Each is due from its publication on, is told again when its time comes, and is told no more once it was sent or given up."""
    done, failed = bring_to(ledger, inbox, "transcribed", b"a"), bring_to(ledger, inbox, "failed", b"b")
    ledger.publish(
        done, b"/out", [(b"a.txt", "txt", "ab")], 10.0, notices=[(HOOK, "msg_1", b'{"text": "\xc5\xbe"}'), ("webhook:x", "msg_2", "{}")]
    )
    ledger.report(failed, b"/out", [(b"b.error.txt", "error", "ab")], 11.0, notices=[(HOOK, "msg_3", "{}")])
    first, second, third = ledger.due_notices(12.0, 10)
    assert (first["job_id"], first["event"], first["target"], first["delivery"]) == (done, "done", HOOK, "msg_1")
    assert (first["body"], third["event"]) == ('{"text": "ž"}'.encode(), "failed")
    assert ledger.due_notices(10.5, 1) == [first]
    ledger.notice_postponed(first["id"], "no answer", 60.0, 12.0)
    ledger.notice_sent(second["id"], 13.0)
    ledger.notice_given_up(third["id"], "too often", 14.0)
    assert ledger.due_notices(59.0, 10) == []
    (again,) = ledger.due_notices(60.0, 10)
    assert (again["id"], again["attempts"], again["what"], again["delivery"]) == (first["id"], 1, "no answer", "msg_1")
    for over in (second["id"], third["id"], 4711):
        with pytest.raises(IllegalMove, match="it is not owed"):
            ledger.notice_sent(over, 61.0)
    ledger.prune(readings_before=0.0, events_before=1000.0)
    kept = ledger.db.conn.execute("SELECT id FROM notice").fetchall()
    assert kept == [(first["id"],)], "what is still owed is never dropped"


def test_a_publication_whose_notice_cannot_be_kept_is_none(ledger: Ledger, inbox: int) -> None:
    """A delivery's id is used once: published and owed are one transaction, both or neither."""
    job = bring_to(ledger, inbox, "transcribed", b"a")
    with pytest.raises(IllegalMove):
        ledger.publish(job, b"/out", [(b"a.txt", "txt", "ab")], 10.0, notices=[(HOOK, "msg_1", "{}"), (HOOK, "msg_1", "{}")])
    assert (state_of(ledger, job), ledger.due_notices(99.0, 10)) == ("transcribed", [])


# --- a million files -----------------------------------------------------------------------------------------------------------------


def test_no_question_goes_through_all_jobs(ledger: Ledger, inbox: int) -> None:
    """With 20,000 jobs ready, no answer that the desk gives or the daemon asks for every few seconds takes SQLite as many steps as there
    are jobs (issue 5: a million rows, 100 ms)."""
    count = 20_000
    other = ledger.register_inbox(b"/in2", b"/out2", 1.0)
    for state in STATES:
        bring_to(ledger, other, state, state.encode())
    settled = [Settling(Sighting(path=b"%d" % n, dev=1, inode=n, size=n, mtime_ns=1, ctime_ns=1), JobOptions()) for n in range(count)]
    assert len(ledger.settle_all(inbox, settled, 100.0)) == count
    newest = ledger.newest_event()
    steps = 0

    def thousand_steps() -> int:
        nonlocal steps
        steps += 1000
        return 0

    def listed(**wanted: Any) -> list[Any]:
        return [life.brief(row) for row in ledger.jobs(limit=100, newest=True, **wanted)]

    questions = {
        "status": lambda: status.snapshot(ledger, ledger.state_dir, 200.0),
        "ready": lambda: ledger.ready(200.0),
        "unpublished": ledger.unpublished,
        "drained": ledger.open_work,
        "hopeless": ledger.only_waiting_work_left,
        "oldest": ledger.oldest_ready_at,
        "owed": lambda: (ledger.owed_disposals(100), ledger.due_notices(200.0, 100), ledger.needed_transcripts()),
        "wake": lambda: ledger.wake_waiting(["source_down"], 200.0),
        "twin": lambda: ledger.being_made("ab", "q", 1),
        "moved": lambda: list(ledger.moved_since(newest, inbox)),
        "paths": lambda: (ledger.live_job(inbox, b"7"), ledger.latest_job(inbox, b"7"), ledger.by_inode(inbox, 7, 7, 1)),
        "see": lambda: ledger.see(inbox, settled[7].sighting, 200.0),
        "source": lambda: ledger.publications_of_source(inbox, b"7"),
        "jobs": listed,
        **{f"jobs {state}": lambda state=state: listed(state=state) for state in STATES},  # type: ignore[misc]
        "jobs of one": lambda: (
            listed(inbox=b"/in"),
            listed(inbox=b"/in2"),
            listed(quality="doubtful"),
            listed(quality="good", state="done"),
        ),
    }
    took = {}
    ledger.db.conn.set_progress_handler(thousand_steps, 1000)
    for name, question in questions.items():
        steps = 0
        question()
        took[name] = steps
    ledger.db.conn.set_progress_handler(None, 0)
    assert max(took.values()) < count, took
    tallied = dict(ledger.db.conn.execute("SELECT state, count(*) FROM job GROUP BY state").fetchall())
    assert tallied == {state: number for state, number in ledger.counts().items() if number}


# --- damage --------------------------------------------------------------------------------------------------------------------------


def test_a_damaged_ledger_names_its_newest_good_backup(ledger: Ledger, inbox: int, state_dir: str) -> None:
    """Of several copies the newest that is whole is named to whoever opens the damaged file, or works with it; it stays as it is."""
    bring_to(ledger, inbox, "done", b"a")
    backups = Path(state_dir, "backup")
    backups.mkdir()
    names = [f"ledger-2026010{day}T000000Z.sqlite3" for day in range(1, 5)]
    for name in names:
        ledger.backup(str(backups / name))
    (backups / names[3]).write_bytes(b"not a ledger at all")
    whole = (backups / names[2]).read_bytes()
    (backups / names[2]).write_bytes(whole[: len(whole) // 2])
    (backups / "ledger-20260105T000000Z.sqlite3.partial").write_bytes(whole)
    with closing(sqlite3.connect(backups / "ledger-20260106T000000Z.sqlite3")) as other:
        other.execute("CREATE TABLE recipe (name TEXT)")
    listing = sorted(os.listdir(backups))
    ledger.truncate_wal()
    shutil.copy(Path(state_dir, LEDGER_NAME), Path(state_dir, "copy"))
    Path(state_dir, LEDGER_NAME).write_bytes(whole[:5000])
    for opening in (lambda: Ledger(state_dir, epoch="b"), lambda: Queries.open(state_dir)):
        with pytest.raises(LedgerBroken) as refusal:
            opening()
        assert f"the newest good backup is {backups / names[1]}" in refusal.value.hint
    assert Path(state_dir, LEDGER_NAME).read_bytes() == whole[:5000]
    assert sorted(os.listdir(backups)) == listing, "looking at copies leaves nothing beside them"
    for name in names:
        (backups / name).unlink()
    with pytest.raises(LedgerBroken, match="cannot open") as refusal:
        Ledger(state_dir, epoch="b")
    assert "there is no good backup" in refusal.value.hint
    shutil.copy(Path(state_dir, "copy"), Path(state_dir, LEDGER_NAME))


def test_damage_that_a_verb_meets_is_named(state_dir: str) -> None:
    """A page that turns bad while the daemon works ends in `ledger_broken`, not in a traceback of SQLite's."""
    ledger = Ledger(state_dir, epoch="a")
    inbox = ledger.register_inbox(b"/in", b"/out", 1.0)
    ledger.see_all(inbox, [sighting(b"%d" % number + b"x" * 100) for number in range(2000)], 1.0)
    ledger.close()
    path = Path(state_dir, LEDGER_NAME)
    whole = bytearray(path.read_bytes())
    with closing(sqlite3.connect(path)) as connection:
        (root,) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'job_one_live_per_path'").fetchone()
    whole[(root - 1) * 4096 : root * 4096] = b"\xff" * 4096
    ledger = Ledger(state_dir, epoch="b")
    path.write_bytes(whole)
    with pytest.raises(LedgerBroken) as refusal:
        ledger.see(inbox, sighting(b"new"), 2.0)
    assert "backup" in refusal.value.hint
    ledger.close()
