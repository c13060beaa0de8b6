"""whisperd under a real systemd, running: what it serves, what it says, what it may do. One machine for all of these."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator

import pytest
from machine import CLIPS, CONFIG, SENTENCE, Service, about, wait_for

CAP_LEASE = 1 << 28
FORMATS = {"txt", "srt", "vtt", "tsv", "json"}

LOGS_AN_ERROR = """
from whisperd.log import *
to_journal_or_stderr('INFO')
spoken = ' '.join(('in', 'private'))
try:
    len(spoken) / len(spoken[:0])
except ZeroDivisionError as error:
    logger.opt(exception=error).error('cannot divide')
"""


@pytest.fixture
def restored(running: Service) -> Iterator[Service]:
    """The running service; afterwards its configuration is as it was."""
    yield running
    running.configure()
    running.systemctl("reload", "whisperd")


def test_a_dropped_file_is_transcribed(running: Service) -> None:
    """A file of another user, dropped into the inbox, comes out in every format, group and mode fit for those who share the folder."""
    running.drop("meeting.wav")
    running.wait_for_state("meeting.wav")
    assert {f"meeting.{name}" for name in FORMATS} <= running.published()
    assert SENTENCE in (running.outbox / "meeting.txt").read_text()
    assert json.loads((running.outbox / "meeting.json").read_text())
    known = (running.outbox / "meeting.txt").stat()
    assert known.st_gid == running.inbox.stat().st_gid
    assert known.st_mode & 0o777 == 0o664


def test_systemctl_status_says_what_it_does(running: Service) -> None:
    """`systemctl status` has a line on how much is running, waiting, done and failed, and the line follows the work."""
    running.drop("status.wav")
    running.wait_for_state("status.wav")
    with running.ledger() as ledger:
        done = ledger.counts()["done"]
    wait_for(lambda: running.show("StatusText").startswith(f"0 running, 0 waiting, {done} done, 0 failed"), "the status line is right")
    assert f"{done} done" in running.systemctl("status", "whisperd").stdout


def test_no_network_is_needed(running: Service) -> None:
    """All of this happens on a machine whose only network is a loopback device."""
    (process, *_) = running.processes()
    with open(f"/proc/{process}/net/dev", encoding="utf-8") as devices:
        assert [line.split(":")[0].strip() for line in devices.readlines()[2:]] == ["lo"]


def test_it_runs_with_few_rights(running: Service) -> None:
    """The daemon and every child run as whisperd, can gain nothing, hold one capability and only a filtered set of system calls."""
    for process in running.processes():
        status = about(process)
        assert set(status["Uid"].split()) == {str(running.state_dir.stat().st_uid)} != {"0"}
        assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == CAP_LEASE


def test_a_file_still_written_by_somebody_else_is_waited_for(running: Service) -> None:
    """A file of another user that is held open for writing does not settle, however long it is quiet (this is what CAP_LEASE is for)."""
    with open(running.inbox / "held.wav", "wb") as held:
        held.write((CLIPS / "meeting.wav").read_bytes())
        held.flush()
        running.drop("later.wav")
        running.wait_for_state("later.wav")  # dropped later, and settled: the quiet period of the other one is over as well
        running.drop("much-later.wav")
        running.wait_for_state("much-later.wav")
        assert running.job("held.wav").get("state") in (None, "seen")
    running.wait_for_state("held.wav")


def test_one_files_life_is_in_the_journal(running: Service) -> None:
    """`journalctl WHISPERD_JOB=N` is one file's life in order, each entry with what happened and, where it matters, the inbox."""
    running.drop("life.wav")
    job = running.wait_for_state("life.wav")["id"]
    life = wait_for(
        lambda: (found := running.sandbox.journal(f"WHISPERD_JOB={job}")) and found[-1]["WHISPERD_EVENT"] == "done" and found,
        "the journal has the whole life",
    )
    assert [entry["WHISPERD_EVENT"] for entry in life] == ["settled", "claimed", "transcribed", "done"]
    assert {entry["WHISPERD_INBOX"] for entry in life if entry["WHISPERD_EVENT"] != "done"} == {"/srv/whisperd/inbox"}
    for entry in life:
        assert entry["_SYSTEMD_UNIT"] == "whisperd.service"
        assert entry["SYSLOG_IDENTIFIER"] == "whisperd"
        assert entry["PRIORITY"] in ("5", "6")
        assert f"job {job}" in entry["MESSAGE"]


def test_a_file_name_cannot_forge_the_journal(running: Service) -> None:
    """Line breaks, escape codes, field names and false directions in a file name make no entry, no field and no control byte."""
    name = b"a\nMESSAGE=forged\nWHISPERD_EVENT=forged\nWHISPERD_JOB=1\n\x1b[31m\x07\r\xe2\x80\xae\xff{0.__class__}<red>.wav"
    running.drop(name)
    job = running.wait_for_state(name)["id"]
    entries = running.sandbox.journal()
    assert not [entry for entry in entries if "forged" in (entry.get("MESSAGE"), entry.get("WHISPERD_EVENT"))]
    life = [entry for entry in entries if entry.get("WHISPERD_JOB") == str(job)]
    assert [entry["WHISPERD_EVENT"] for entry in life] == ["settled", "claimed", "transcribed", "done"]
    for entry in life:
        assert isinstance(entry["MESSAGE"], str)  # journald gives what is not printable as a list of bytes
        assert entry["MESSAGE"].isprintable()
    assert "a\\x0aMESSAGE=forged\\x0a" in life[0]["MESSAGE"]


def test_journald_may_be_restarted(running: Service) -> None:
    """After a restart of journald the entries go on, with their fields."""
    running.systemctl("restart", "systemd-journald")
    running.drop("after-restart.wav")
    job = running.wait_for_state("after-restart.wav")["id"]
    wait_for(
        lambda: [entry["WHISPERD_EVENT"] for entry in running.sandbox.journal(f"WHISPERD_JOB={job}")][-1:] == ["done"],
        "entries reach the new journald",
    )


def test_a_share_mounted_later_is_served(restored: Service) -> None:
    """A filesystem mounted while whisperd runs, at a place that its unit knows nothing of, is seen, read and written to."""
    sandbox = restored.sandbox
    sandbox.run("mkdir", "-p", "/mnt/share")
    restored.configure(CONFIG + '[[inbox]]\npath = "/mnt/share/inbox"\n')
    restored.systemctl("reload", "whisperd")
    wait_for(lambda: "/mnt/share/inbox" in restored.show("StatusText"), "the absent inbox is named in the status line")
    sandbox.run("mount", "-t", "tmpfs", "-o", "mode=775,gid=whisperd", "tmpfs", "/mnt/share")
    share = sandbox.root / "mnt/share"
    (share / "inbox").mkdir()
    (share / "inbox/late.ogg").write_bytes((CLIPS / "price.ogg").read_bytes())
    restored.wait_for_state("late.ogg")
    assert (share / "outbox/late.txt").exists()


def test_reload_applies_a_good_file(restored: Service) -> None:
    """`systemctl reload` with a good file: new settings without a restart, for what is dropped from then on."""
    process = restored.show("MainPID")
    restored.configure(CONFIG.replace('["txt", "srt", "vtt", "tsv", "json"]', '["txt"]'))
    before = len(restored.said("WHISPERD_EVENT=reloaded"))
    restored.systemctl("reload", "whisperd")
    wait_for(lambda: len(restored.said("WHISPERD_EVENT=reloaded")) > before, "the daemon says that it has reloaded")
    restored.drop("text-only.wav")
    restored.wait_for_state("text-only.wav")
    assert {name for name in restored.published() if name.startswith("text-only")} == {"text-only.txt"}
    assert (restored.show("MainPID"), restored.show("ActiveState")) == (process, "active")


def test_folders_may_be_setgid(restored: Service) -> None:
    """A directory_mode with the setgid bit, as shared folders have it, is not refused by the unit's hardening."""
    restored.configure(CONFIG.replace("[outbox]", '[outbox]\ndirectory_mode = "2770"'))
    restored.systemctl("reload", "whisperd")
    (restored.inbox / "shared").mkdir()
    restored.drop("shared/talk.wav")
    restored.wait_for_state("shared/talk.wav")
    assert (restored.outbox / "shared").stat().st_mode & 0o7777 == 0o2770


def test_reload_refuses_a_bad_file(restored: Service) -> None:
    """`systemctl reload` with a bad file fails and says why; so does a bare SIGHUP, in the journal; the old settings hold."""
    process = restored.show("MainPID")
    restored.configure(CONFIG.replace("quiet_s", "quite_s"))
    refused = restored.systemctl("reload", "whisperd", check=False)
    assert refused.returncode != 0
    assert any("watcher.quite_s: there is no such setting" in line for line in restored.said())
    restored.systemctl("kill", "--kill-who=main", "--signal=HUP", "whisperd")
    told = wait_for(lambda: restored.said("WHISPERD_EVENT=reload_refused"), "the daemon says that it has not reloaded")
    assert "the settings stay as they were" in told[-1]
    assert "watcher.quite_s" in told[-1]
    restored.drop("old-settings.wav")
    restored.wait_for_state("old-settings.wav")
    assert (restored.show("MainPID"), restored.show("ActiveState")) == (process, "active")


def test_a_second_daemon_on_the_same_state_ends(running: Service) -> None:
    """A second daemon ends with status 3, a sentence and an advice, and the first does not notice."""
    process = running.show("MainPID")
    second = running.whisperd("run", "--config", "/etc/whisperd/whisperd.toml")
    assert second.returncode == 3
    assert re.search(r"another whisperd is running on /var/lib/whisperd \(stop it first", second.stderr)
    assert (running.show("MainPID"), running.show("NRestarts")) == (process, "0")


@pytest.mark.parametrize("target", ["to_journal_or_stderr('INFO')", "to_parent()"])
def test_a_traceback_shows_no_values(running: Service, target: str) -> None:
    """An unexpected error is logged with its traceback, but never with the values of variables: those are what somebody said."""
    shown = running.sandbox.run(sys.executable, "-c", LOGS_AN_ERROR.replace("to_journal_or_stderr('INFO')", target))
    assert "ZeroDivisionError" in shown.stderr
    assert "in private" not in shown.stderr


def test_a_traceback_is_one_entry_of_the_journal(running: Service) -> None:
    """In the journal a traceback is one entry, and shows no values either."""
    stream = "import os; os.environ['JOURNAL_STREAM'] = f'{os.fstat(2).st_dev}:{os.fstat(2).st_ino}'\n"
    shown = running.sandbox.run(sys.executable, "-c", stream + LOGS_AN_ERROR)
    assert shown.stderr == ""
    (entry,) = (entry for entry in running.sandbox.journal("SYSLOG_IDENTIFIER=whisperd") if "cannot divide" in str(entry["MESSAGE"]))
    assert "ZeroDivisionError" in entry["MESSAGE"]
    assert "in private" not in entry["MESSAGE"]
    assert entry["PRIORITY"] == "3"


def test_a_stray_sigterm_is_no_end(running: Service) -> None:
    """A daemon ended from outside (earlyoom sends SIGTERM first) ends in order and is started again."""
    process = running.show("MainPID")
    running.systemctl("kill", "--kill-who=main", f"--signal={signal.SIGTERM}", "whisperd")
    wait_for(lambda: running.is_active() and running.show("MainPID") != process, "it is started again")
