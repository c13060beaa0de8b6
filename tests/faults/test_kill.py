"""kill -9 at random moments, of the daemon and of its children: nothing lost, nothing twice, nothing half-written (DESIGN P1)."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import wave
from importlib.resources import files
from pathlib import Path

import pytest

from whisperd.ledger.queries import Queries

FILES = 60
KILLS = 100
SEED = int(os.environ.get("WHISPERD_TEST_SEED", "20261121"))
FORMATS = ("txt", "srt", "vtt", "tsv", "json")


class Installation:
    """An inbox with a daemon that is started again whenever it dies, as systemd would."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.inbox = home / "inbox"
        self.outbox = home / "outbox"
        self.inbox.mkdir(parents=True)
        self.config = home / "whisperd.toml"
        self.config.write_text(
            f'state_dir = "{home}/state"\ncache_dir = "{home}/cache"\n[engine]\nmodel = "demo"\n'
            '[transcription]\nlanguage = "en"\ntemperatures = [0.0]\n'
            f"[dispatcher]\nworkers = 2\n[watcher]\nquiet_s = 0.3\n"
            f'[outbox]\nformats = ["txt", "srt", "vtt", "tsv", "json"]\n[[inbox]]\npath = "{self.inbox}"\n'
        )
        self.log = (home / "whisperd.log").open("ab")
        self.daemon: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self.daemon = subprocess.Popen(
            [sys.executable, "-m", "whisperd", "run", "--config", str(self.config)], stdout=self.log, stderr=self.log
        )

    def processes(self) -> list[int]:
        """The daemon and its living children."""
        assert self.daemon is not None
        task = Path(f"/proc/{self.daemon.pid}/task/{self.daemon.pid}/children")
        try:
            return [self.daemon.pid, *map(int, task.read_text().split())]
        except FileNotFoundError:
            return [self.daemon.pid]

    def kill_one(self, chance: random.Random) -> None:
        """SIGKILL to the daemon (one time in four) or to one of its children; a dead daemon is started again."""
        assert self.daemon is not None
        own, *children = self.processes()
        victim = own if not children or chance.random() < 0.25 else chance.choice(children)
        try:
            os.kill(victim, signal.SIGKILL)
        except ProcessLookupError:  # it ended in between: then this kill hit nothing, as kills in the field may
            return
        if victim == own:
            self.daemon.wait()
            self.start()

    def stop(self) -> int:
        assert self.daemon is not None
        self.daemon.send_signal(signal.SIGTERM)
        return self.daemon.wait(timeout=30)

    def counts(self) -> dict[str, int]:
        ledger = Queries.open(str(self.home / "state"))
        try:
            return ledger.counts()
        finally:
            ledger.close()


def recordings(target: Path, chance: random.Random) -> list[Path]:
    """Recordings of 4 to 15 s, each different: sample clips joined with pauses of random length."""
    clips = files("whisperd").joinpath("share", "clips")
    with clips.joinpath("meeting.wav").open("rb") as file, wave.open(file) as clip:
        parameters, spoken = clip.getparams(), clip.readframes(clip.getnframes())
    made = []
    for number in range(FILES):
        path = target / f"recording {number:02d}.wav"
        with wave.open(str(path), "wb") as out:
            out.setparams(parameters)
            for _ in range(chance.randint(1, 3)):
                out.writeframes(spoken)
                out.writeframes(bytes(2 * parameters.nchannels * int(parameters.framerate * chance.uniform(0.2, 2.0))))
        made.append(path)
    return made


def wait_for(condition: object, deadline_s: float, what: str) -> None:
    until = time.monotonic() + deadline_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until, f"not within {deadline_s} s: {what}"
        time.sleep(0.1)


@pytest.mark.timeout(600)
def test_a_hundred_kills_lose_nothing_and_repeat_nothing(tmp_path: Path) -> None:
    """100 × kill -9 of daemon and children while 60 files are processed: 60 transcripts, each published once, none partial,
    each byte-identical in its text to that of an undisturbed run, and the ledger and the disk agree."""
    chance = random.Random(SEED)
    source = tmp_path / "source"
    source.mkdir()
    made = recordings(source, chance)
    calm = Installation(tmp_path / "calm")
    for path in made:
        os.link(path, calm.inbox / path.name)
    done = subprocess.run([sys.executable, "-m", "whisperd", "run", "--once", "--config", str(calm.config)], stderr=calm.log, check=False)
    assert done.returncode == 0, calm.home.joinpath("whisperd.log").read_text()[-3000:]

    stormy = Installation(tmp_path / "stormy")
    stormy.start()
    for number in range(KILLS):
        while len(made) and FILES - len(made) <= number * FILES // KILLS:
            path = made.pop(0)
            os.link(path, stormy.inbox / path.name)
        time.sleep(chance.uniform(0.05, 1.0))
        stormy.kill_one(chance)
    for path in made:
        os.link(path, stormy.inbox / path.name)
    wait_for((stormy.home / "state/ledger.sqlite3").exists, 20, "the ledger is there")
    wait_for(lambda: stormy.counts()["done"] == FILES, 180, f"all done; {stormy.counts()}")
    assert stormy.stop() == 0

    assert_whole(stormy)
    for path in sorted(calm.outbox.iterdir()):
        if path.suffix != ".json":  # JSON tells the job's number nowhere, but the inode's time differs
            assert (stormy.outbox / path.name).read_bytes() == path.read_bytes(), path.name


def assert_whole(place: Installation) -> None:
    """Ledger and disk agree, and nothing else is there."""
    ledger = Queries.open(str(place.home / "state"))
    assert ledger.integrity() == "ok"
    jobs = list(ledger.jobs())
    assert len(jobs) == FILES
    expected: set[str] = set()
    for job in jobs:
        assert job["state"] == "done", (job["path"], job["state"], job["failure_what"])
        verbs = [event["verb"] for event in ledger.events(job["id"])]
        assert verbs.count("publish") == 1 and verbs.count("finish") == 1, verbs
        published = ledger.publications(job["id"])
        assert {item["format"] for item in published} == set(FORMATS)
        for item in published:
            path = place.outbox / os.fsdecode(item["path"])
            assert hashlib.sha256(path.read_bytes()).hexdigest() == item["sha256"], path
            expected.add(path.name)
        document = json.loads((place.outbox / (os.fsdecode(job["path"]).removesuffix(".wav") + ".json")).read_text())
        assert document["segments"], job["path"]
    assert {path.name for path in place.outbox.iterdir()} == expected
    assert len(list(place.inbox.iterdir())) == FILES
    ledger.close()
