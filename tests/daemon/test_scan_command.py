"""`whisperd scan --dry-run` from outside: every entry of every inbox, what would happen to it, and why; and that nothing does."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, Run

from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import JobOptions, Sighting


def scan(place: Installation) -> dict[str, Any]:
    """What the command says of the one inbox, entry by entry."""
    done = place.desk("scan --dry-run", "--json")
    assert (done.code, done.err) == (0, "")
    shown = json.loads(done.out)
    assert set(shown) == {"schema", "inboxes"} and shown["schema"] == "whisperd.scan/1"
    (inbox,) = shown["inboxes"]
    assert set(inbox) == {"inbox", "down", "entries"} and (inbox["inbox"], inbox["down"]) == (str(place.inbox), "")
    found = {entry["path"]: entry for entry in inbox["entries"]}
    assert len(found) == len(inbox["entries"])
    return found


def put(place: Installation, path: str | bytes, content: str = "x") -> None:
    whole = os.path.join(os.fsencode(place.inbox), os.fsencode(path))
    os.makedirs(os.path.dirname(whole), exist_ok=True)
    with open(whole, "w", encoding="utf-8") as file:
        file.write(content)


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    return {path: entry["verdict"] for path, entry in found.items()}


@pytest.fixture
def quick(place: Installation) -> Installation:
    """An inbox whose files are old enough at once."""
    place.write_config(watcher={"quiet_s": 0.1, "ignore": ["draft*"]})
    return place


def settled() -> None:
    time.sleep(0.15)  # the quiet period itself: what was written before it is older now


def test_every_entry_is_named_with_what_keeps_it_out(quick: Installation) -> None:
    """Built-in names, the operator's patterns, `include`, things that are no files, folders with a marker; names are escaped."""
    inbox = quick.inbox
    for path in ("new.wav", "half.mp3.part", "draft 1.wav", "letter.txt", "alone/.whisperd-skip", "alone/in.wav", ".hidden/in.wav"):
        put(quick, path)
    put(quick, b"n\n\x1b\xff.wav")
    os.mkfifo(inbox / "pipe.wav")
    (inbox / "link.wav").symlink_to("new.wav")
    (inbox / "elsewhere").symlink_to("/etc")
    settled()
    found = scan(quick)
    assert verdicts(found) == {
        "new.wav": "new",
        r"n\x0a\x1b\xff.wav": "new",
        "half.mp3.part": "ignored",
        "draft 1.wav": "ignored",
        "letter.txt": "left_out",
        "alone": "left_alone",
        ".hidden": "left_alone",
        "pipe.wav": "not_a_file",
        "link.wav": "not_a_file",
        "elsewhere": "not_a_file",
    }
    why = {path: entry["why"] for path, entry in found.items()}
    assert '"*.part"' in why["half.mp3.part"] and '`ignore` has "draft*"' in why["draft 1.wav"] and "`include`" in why["letter.txt"]
    assert ".whisperd-skip" in why["alone"] and "named pipe" in why["pipe.wav"] and "symbolic link" in why["elsewhere"]
    assert all(entry["why"].isprintable() and entry["job"] is None for entry in found.values())


def test_it_says_with_which_options_and_who_said_so(quick: Installation) -> None:
    """Profiles of folders and files are held against each file; a bad one is named and changes nothing."""
    put(quick, "a/talk.wav")
    put(quick, "a/b/talk.wav")
    put(quick, "a/b/other.wav")
    put(quick, "a/.whisperd.toml", 'language = "de"\nformats = ["srt"]')
    put(quick, "a/b/.whisperd.toml", 'langauge = "fr"')
    put(quick, "a/b/other.wav.whisperd.toml", "skip = true")
    put(quick, "clash.wav")
    put(quick, "clash.wav.whisperd.toml", 'mode = "sequential"\nchannels = "speakers"')
    settled()
    found = scan(quick)
    assert verdicts(found) == {
        "a/talk.wav": "new",
        "a/b/talk.wav": "new",
        "a/b/other.wav": "skipped",
        "clash.wav": "new",
        "a/.whisperd.toml": "profile",
        "a/b/.whisperd.toml": "bad_profile",
        "a/b/other.wav.whisperd.toml": "profile",
        "clash.wav.whisperd.toml": "bad_profile",
    }
    for path in ("a/talk.wav", "a/b/talk.wav"):
        assert (found[path]["options"]["language"], found[path]["options"]["formats"]) == ("de", ["srt"])
        assert found[path]["profiles"] == {"language": "a/.whisperd.toml", "formats": "a/.whisperd.toml"}
    assert "there is no key langauge" in found["a/b/.whisperd.toml"]["why"]
    assert (found["clash.wav"]["options"]["channels"], found["clash.wav"]["options"]["language"]) == ("mix", "en")
    assert "sequential" in found["clash.wav.whisperd.toml"]["why"]


def test_it_is_held_against_the_ledger_and_writes_nothing(quick: Installation) -> None:
    """Known, changed, touched since, and new again after it had gone; neither the ledger nor the inbox is another one after it."""
    for name in ("ready", "cancelled", "touched", "changed", "back", "seen", "new"):
        put(quick, f"{name}.wav")
    quick.state.mkdir()
    ledger = Ledger(str(quick.state), epoch="e")
    number = ledger.register_inbox(os.fsencode(quick.inbox), os.fsencode(quick.outbox), 1.0)
    jobs = {name: record(ledger, number, quick.inbox / f"{name}.wav") for name in ("ready", "cancelled", "touched", "changed", "back")}
    ledger.see(number, sighting(quick.inbox / "seen.wav"), 1.0)
    for name in ("cancelled", "touched", "changed"):
        ledger.cancel(jobs[name], 3.0)
    ledger.vanish(jobs["back"], 3.0)
    version = ledger.data_version()
    os.chmod(quick.inbox / "touched.wav", 0o600)
    put(quick, "changed.wav", "another")
    before = photograph(quick.inbox)
    settled()
    found = scan(quick)
    assert verdicts(found) == {
        "ready.wav": "known",
        "cancelled.wav": "known",
        "touched.wav": "doubted",
        "changed.wav": "changed",
        "back.wav": "new",
        "seen.wav": "new",
        "new.wav": "new",
    }
    assert found["ready.wav"]["job"] == jobs["ready"] and f"job {jobs['ready']}" in found["ready.wav"]["why"]
    assert (photograph(quick.inbox), ledger.data_version(), quick.outbox.exists()) == (before, version, False)
    ledger.close()


def sighting(path: Path) -> Sighting:
    found = path.stat()
    return Sighting(
        path=os.fsencode(path.name),
        dev=found.st_dev,
        inode=found.st_ino,
        size=found.st_size,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
    )


def record(ledger: Ledger, inbox: int, path: Path) -> int:
    """A job that waits its turn."""
    job = ledger.see(inbox, sighting(path), 1.0)
    ledger.settle(job, sighting(path), JobOptions(), 2.0)
    return job


def photograph(inbox: Path) -> dict[str, tuple[int, int, int]]:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ctime_ns, path.stat().st_atime_ns) for path in inbox.iterdir()}


def test_a_file_that_just_changed_is_waited_for(place: Installation) -> None:
    """It is new, but not settled."""
    place.write_config(watcher={"quiet_s": 3600.0})
    put(place, "a.wav")
    entry = scan(place)["a.wav"]
    assert entry["verdict"] == "unsettled" and "3600 s" in entry["why"] and entry["options"]["language"] == "en"


def test_in_words_it_is_a_line_an_entry_and_a_sum(quick: Installation) -> None:
    """No name can forge a line; an inbox that is not there does not hide the others, and is a fault of the environment."""
    put(quick, "a\nb.wav")
    quick.write_config(inbox=[{"path": str(quick.inbox)}, {"path": str(quick.home / "absent"), "outbox": str(quick.home / "out")}])
    settled()
    done = quick.desk("scan --dry-run")
    lines = done.out.splitlines()
    assert done.code == 3
    assert lines[0] == str(quick.inbox) and lines[1].startswith(r"  a\x0ab.wav") and "new: it would be transcribed" in lines[1]
    assert lines[2] == "  1 new" and lines[4] == str(quick.home / "absent") and "down: cannot list the inbox" in lines[5]


def test_without_dry_run_it_refuses_and_says_what_does_the_work(place: Installation) -> None:
    """A usage error: nothing is looked at."""
    done: Run = place.desk("scan")
    assert (done.code, done.out) == (2, "") and "whisperd run --once" in done.err
