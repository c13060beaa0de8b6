"""From the share and back, with the real daemon: identity by content, examinations, profiles, copies, disposal, notices (issue 5)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from installation import Installation
from recordings import SENTENCES, Studio
from tools.mounts import tmpfs

from whisperd.ledger.queries import Queries

SECRET = "whsec_" + base64.b64encode(b"a key of twenty-four b").decode()


@pytest.fixture
def talk(studio: Studio) -> Path:
    return studio.say(SENTENCES[0])


@pytest.fixture
def other(studio: Studio) -> Path:
    return studio.say(SENTENCES[1])


def verbs(ledger: Queries, job: int) -> list[str]:
    return [event["verb"] for event in ledger.events(job)]


def claims(place: Installation) -> int:
    """How often an engine was given a job."""
    with place.ledger() as ledger:
        return sum(verbs(ledger, row["id"]).count("claim") for row in ledger.jobs())


# --- identity is content ---------------------------------------------------------------------------------------------------------


def test_a_copy_costs_no_second_transcription(place: Installation, talk: Path) -> None:
    """Of three files with one content, two dropped at once and one later, one is given to an engine; each has its own transcript, which
    names its own source."""
    with place.daemon() as daemon:
        for name in ("one.wav", "two.wav"):
            place.drop(talk, name)
        for name in ("one.wav", "two.wav"):
            daemon.wait_ended(name)
        place.drop(talk, "three.wav")
        row = daemon.wait_ended("three.wav")
        assert daemon.stop() == 0
    assert claims(place) == 1 and row["origin"] is not None
    texts = {name: place.transcript(name) for name in ("one", "two", "three")}
    assert len({document["text"] for document in texts.values()}) == 1 and texts["one"]["text"]
    assert {document["source"]["name"] for document in texts.values()} == {"one.wav", "two.wav", "three.wav"}


def test_a_renamed_recording_is_not_transcribed_again(place: Installation, talk: Path) -> None:
    """Done, then renamed and moved into a folder: its transcript appears under the new name, from what is stored."""
    with place.daemon() as daemon:
        place.drop(talk, "before.wav")
        first = daemon.wait_ended("before.wav")
        (place.inbox / "folder").mkdir()
        (place.inbox / "before.wav").rename(place.inbox / "folder" / "after.wav")
        second = daemon.wait_ended("folder/after.wav")
        assert daemon.stop() == 0
    assert claims(place) == 1 and second["origin"] == first["id"]
    assert place.transcript("folder/after")["text"] == place.transcript("before")["text"]


def test_other_options_are_another_question(place: Installation, talk: Path) -> None:
    """The same content with other options is transcribed again; with other formats only it is not."""
    (place.inbox / "words").mkdir()
    (place.inbox / "words" / ".whisperd.toml").write_text("word_timestamps = true\n")
    (place.inbox / "subtitles").mkdir()
    (place.inbox / "subtitles" / ".whisperd.toml").write_text('formats = ["vtt"]\n')
    with place.daemon() as daemon:
        place.drop(talk, "a.wav")
        daemon.wait_ended("a.wav")
        for name in ("words/a.wav", "subtitles/a.wav"):
            place.drop(talk, name)
            daemon.wait_ended(name)
        assert daemon.stop() == 0
    assert claims(place) == 2
    assert any("words" in segment for segment in place.transcript("words/a")["segments"])
    assert [name for name in place.published() if name.startswith(b"subtitles/")] == [b"subtitles/a.vtt"]


def test_replaced_in_place_with_its_old_size_and_time(place: Installation, talk: Path, other: Path) -> None:
    """Another content under the name, size and time of a finished file is new work; another mode of the same file is not."""
    size = max(talk.stat().st_size, other.stat().st_size)
    with place.daemon() as daemon:
        place.drop(talk, "a.wav")
        target = place.inbox / "a.wav"
        target.write_bytes(talk.read_bytes().ljust(size, b"\0"))
        os.utime(target, ns=(10**18, 10**18))
        first = daemon.wait_ended("a.wav")
        target.chmod(0o600)
        daemon.wait_until(lambda ledger: "recognise" in verbs(ledger, first["id"]), "the same content is recognised")
        target.write_bytes(other.read_bytes().ljust(size, b"\0"))
        os.utime(target, ns=(10**18, 10**18))
        second = daemon.wait_ended("a.wav", after=first["id"])
        assert daemon.stop() == 0
    assert second["sha256"] != first["sha256"] and claims(place) == 2


# --- examined before it queues ---------------------------------------------------------------------------------------------------


def test_what_is_no_recording_is_refused_before_the_queue(place: Installation, tmp_path: Path, talk: Path) -> None:
    """A text file named like a recording is failed without an attempt; what a container says of a good one is in the ledger."""
    letter = tmp_path / "letter.mp3"
    letter.write_text("Dear Sirs,\n" * 100)
    place.drop(letter)
    place.drop(talk, "talk.wav")
    assert place.run_once().code == 1
    bad, good = place.job("letter.mp3"), place.job("talk.wav")
    assert (bad["state"], bad["attempts"], bad["started_at"]) == ("failed", 0, None)
    assert "it is a text file" in place.error_file("letter.mp3")
    media = json.loads(good["media"])
    assert media["container"] == "wav" and len(media["tracks"]) == 1


def test_an_examiner_that_dies_blames_nobody(place: Installation, talk: Path) -> None:
    """Examiners are killed again and again while files come; every file is done at its first attempt."""
    with place.daemon() as daemon:
        for number in range(6):
            path = place.drop(talk, f"{number}.wav")
            with open(place.inbox / os.fsdecode(path), "ab") as file:
                file.write(b"\0" * number)
            for pid in daemon.children("whisperd.engine.examiner"):
                os.kill(pid, signal.SIGKILL)
        for number in range(6):
            assert daemon.wait_ended(f"{number}.wav")["attempts"] <= 1
        assert daemon.stop() == 0


# --- profiles --------------------------------------------------------------------------------------------------------------------


def test_a_bad_profile_is_explained_until_it_is_mended(place: Installation, talk: Path) -> None:
    """It has an error file in the mirrored folder, what is above it holds, and the error file goes when it is mended; also when the daemon
    was away in between."""
    folder, said = place.inbox / "calls", b"calls/whisperd.toml.error.txt"
    folder.mkdir()
    (folder / ".whisperd.toml").write_text('langage = "de"\n')
    with place.daemon() as daemon:
        place.drop(talk, "calls/a.wav")
        daemon.wait_ended("calls/a.wav")
        daemon.wait_until(lambda _: said in place.published(), "it is explained")
        assert b"there is no key langage" in place.published()[said]
        assert daemon.stop() == 0
    (folder / ".whisperd.toml").write_text('formats = ["txt"]\n')
    with place.daemon() as daemon:
        daemon.wait_until(lambda _: said not in place.published(), "the explanation is gone")
        assert daemon.stop() == 0
    assert place.transcript("calls/a")["language"] == "en"


# --- copies from shares ----------------------------------------------------------------------------------------------------------


def test_a_share_that_drops_during_the_work_costs_nothing(place: Installation, studio: Studio) -> None:
    """The copy was made: its inbox goes away, the work is finished all the same, at the first attempt; the copy is removed."""
    place.write_config(intake={"spool": "always"}, engine={"batch": 1}, transcription={"window_s": 5.0})
    away = place.home / "away"
    with place.daemon() as daemon:
        place.drop(studio.long(SENTENCES[:6]), "long.wav")
        daemon.wait_until(lambda ledger: [row for row in ledger.running() if ledger.windows(row["id"])], "it is worked on")
        place.inbox.rename(away)
        row = daemon.wait_ended("long.wav")
        daemon.wait_until(lambda _: not any((place.state / "spool").iterdir()), "the copy is gone")
        away.rename(place.inbox)
        assert daemon.stop() == 0
    assert row["attempts"] == 1 and row["spooled"]


def test_too_little_room_is_waited_for(place: Installation, talk: Path) -> None:
    """With less room than is to stay free nothing is begun and no attempt spent; the daemon says so, and goes on when there is room."""
    place.write_config(intake={"free_min_mib": 1 << 40})
    with place.daemon() as daemon:
        place.drop(talk, "a.wav")
        daemon.wait_until(lambda ledger: ledger.counts()["ready"], "it waits")
        daemon.wait_until(
            lambda ledger: "files wait for room" in ((ledger.heard("daemon") or (0, {}))[1].get("blocked") or ""), "it is said"
        )
        place.write_config(intake={"free_min_mib": 0})
        daemon.signal(signal.SIGHUP)
        assert daemon.wait_ended("a.wav")["attempts"] == 1
        assert daemon.stop() == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_copy_for_which_there_is_no_room_keeps_no_local_file(place: Installation, talk: Path) -> None:
    """With `spool = "always"` and a disk on which a copy would leave too little free, a local file is read where it lies, and done."""
    with tmpfs(place.state, "size=100m"):
        place.write_config(intake={"spool": "always", "free_min_mib": 80})
        place.drop(talk, "large.wav")
        with (place.inbox / "large.wav").open("ab") as file:
            file.write(b"JUNK" + (40 << 20).to_bytes(4, "little"))
            file.truncate(file.tell() + (40 << 20))
        assert place.run_once().code == 0
        row = place.job("large.wav")
        assert (row["state"], row["attempts"], row["spooled"]) == ("done", 1, 0)


# --- afterwards ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("afterwards", ["archive", "delete"])
def test_the_source_afterwards(place: Installation, talk: Path, tmp_path: Path, afterwards: str) -> None:
    """Archived with its sub-tree, or deleted, once its transcript stands in the outbox; one that failed stays."""
    place.write_config(outbox={"source": afterwards})
    letter = tmp_path / "letter.mp3"
    letter.write_text("no sound")
    with place.daemon() as daemon:
        place.drop(talk, "folder/a.wav")
        place.drop(letter)
        row = daemon.wait_ended("folder/a.wav")
        daemon.wait_ended("letter.mp3", "failed")
        disposed = daemon.wait_until(lambda ledger: _disposal(ledger, row["id"]), "it is put away")
        assert daemon.stop() == 0
    assert disposed == {"archive": "archived", "delete": "deleted"}[afterwards]
    assert not (place.inbox / "folder" / "a.wav").exists() and (place.inbox / "letter.mp3").exists()
    archived = place.home / "archive" / "folder" / "a.wav"
    assert archived.exists() == (afterwards == "archive")
    if archived.exists():
        assert archived.read_bytes() == talk.read_bytes()
    assert place.transcript("folder/a")["text"]


def _disposal(ledger: Queries, job: int) -> str:
    said = str(ledger.job(job)["disposal"] or "")
    return said if said.endswith("d") else ""


# --- notices ---------------------------------------------------------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """A web server that takes down what it is told; the first call is answered with an error."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Taking)
        self.calls: list[tuple[dict[str, str], bytes]] = []


class Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert isinstance(self.server, Receiver)
        self.server.calls.append((dict(self.headers), body))
        self.send_response(503 if len(self.server.calls) == 1 else 204)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_webhook_is_told_until_it_takes_it(place: Installation, talk: Path, receiver: Receiver) -> None:
    """Refused once, told again with the same delivery id, signed; what it is told names the job and its files."""
    url = f"http://127.0.0.1:{receiver.server_address[1]}/told"
    place.write_config(webhook=[{"url": url, "secret": SECRET, "allow": ["127.0.0.0/8"]}])
    with place.daemon() as daemon:
        place.drop(talk, "a.wav")
        row = daemon.wait_ended("a.wav")
        daemon.wait_until(lambda _: len(receiver.calls) == 2, "it was told twice")
        assert daemon.stop() == 0
    (first, body), (second, again) = receiver.calls
    assert body == again and first["webhook-id"] == second["webhook-id"]
    signed = f"{second['webhook-id']}.{second['webhook-timestamp']}.".encode() + body
    mac = base64.b64encode(hmac.new(base64.b64decode(SECRET.removeprefix("whsec_")), signed, hashlib.sha256).digest()).decode()
    assert second["webhook-signature"] == f"v1,{mac}"
    told = json.loads(body)
    assert (told["event"], told["job"], told["path"]) == ("done", row["id"], "a.wav")
    assert {os.path.basename(file["path"]) for file in told["files"]} == {name.decode() for name in place.published()}


def test_a_hook_is_run_with_the_facts(place: Installation, talk: Path, tmp_path: Path) -> None:
    """Its environment says what became of the file; a name that looks like shell is only a name."""
    script, said = tmp_path / "hook", tmp_path / "said"
    script.write_text(f'#!/bin/sh\nprintf "%s %s %s\\n" "$WHISPERD_EVENT" "$WHISPERD_JOB" "$WHISPERD_PATH" >> {said}\n')
    script.chmod(0o755)
    place.write_config(hook=[{"command": [str(script)]}])
    name = "a $(touch owned);`touch owned`.wav"
    with place.daemon() as daemon:
        place.drop(talk, name)
        row = daemon.wait_ended(name)
        daemon.wait_until(lambda _: said.exists() and said.read_text().endswith("\n"), "it was run")
        assert daemon.stop() == 0
    assert said.read_text() == f"done {row['id']} {place.inbox / name}\n"
    assert not list(tmp_path.rglob("owned"))


# --- two daemons, backups --------------------------------------------------------------------------------------------------------


def test_a_second_daemon_on_one_state_directory_ends(place: Installation) -> None:
    """With a clear message and status 3; the first goes on."""
    with place.daemon() as daemon:
        second = place.desk("run")
        assert second.code == 3 and "another whisperd is running on" in second.err
        assert daemon.stop() == 0


def test_a_damaged_ledger_is_refused_with_the_backup_to_use(place: Installation, talk: Path) -> None:
    """It is left as it is, and the newest good backup is named."""
    place.drop(talk, "a.wav")
    assert place.run_once().code == 0
    ledger, backups = place.state / "ledger.sqlite3", place.state / "backup"
    backups.mkdir(exist_ok=True)
    good, bad = backups / "ledger-20260101T000000Z.sqlite3", backups / "ledger-20260102T000000Z.sqlite3"
    with place.ledger() as queries:
        queries.backup(str(good))
    shutil.copy(good, bad)
    for damaged in (ledger, bad):
        content = bytearray(damaged.read_bytes())
        content[4096 : len(content)] = b"\xff" * (len(content) - 4096)
        damaged.write_bytes(content)
    before = ledger.read_bytes()
    done = place.run_once()
    assert done.code == 3 and str(good) in done.err and str(bad) not in done.err
    assert ledger.read_bytes() == before
