"""Life and death of the service under a real systemd: start, stop, kill, hang, bad configuration. A machine for each."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
from machine import CLEAR_WORD, CLIPS, CONFIG, LONG_SENTENCES, Service, wait_for
from tools.share import UNCACHED, missing

from whisperd.report.status import daemon_runs

NAMES = {f"long.{suffix}" for suffix in ("txt", "srt", "vtt", "tsv", "json")}
STOP_S = 15.0


def begin(service: Service, recording: Path) -> int:
    """The long recording is being transcribed, some of its windows are stored. The daemon's process."""
    service.start()
    process = service.main_process()
    service.drop("long.wav", recording)
    wait_for(lambda: len(service.windows("long.wav")) >= 3, "some windows are stored")
    return process


def goes_on_from(service: Service, position_s: float) -> None:
    """The interrupted recording gets done, and none of what was stored is worked on again."""
    while (job := service.job("long.wav"))["state"] != "done":
        assert job["position_s"] >= position_s, "finished windows are transcribed anew"
        assert job["state"] in ("ready", "running", "transcribed"), job
        time.sleep(0.05)


def assert_whole(service: Service) -> None:
    """One whole transcript of the long recording, published once, and nothing left over."""
    assert (service.outbox / "long.txt").read_text().count(CLEAR_WORD) == LONG_SENTENCES
    segments = json.loads((service.outbox / "long.json").read_text())["segments"]
    starts = [segment["start"] for segment in segments]
    assert starts == sorted(starts)
    verbs = service.verbs("long.wav")
    assert (verbs.count("publish"), verbs.count("finish"), verbs.count("interrupt")) == (1, 1, 1), verbs
    assert service.job("long.wav")["attempts"] == 1
    assert service.published() == NAMES
    assert os.listdir(service.state_dir / "staging") == [service.job("long.wav")["transcript"]]
    with service.ledger() as ledger:
        assert ledger.integrity() == "ok"


def test_active_means_ready(service: Service) -> None:
    """The unit stays "activating" while the daemon cannot serve yet, and becomes active when it says READY."""
    with service.ledger_locked():
        service.systemctl("start", "--no-block", "whisperd")
        wait_for(lambda: daemon_runs(str(service.state_dir)), "the daemon has begun")
        assert service.show("ActiveState") == "activating"
    wait_for(service.is_active, "the unit is active")
    wait_for(lambda: service.said("WHISPERD_EVENT=ready"), "the daemon says so as well")


def test_kill_9_in_the_middle_of_a_file(service: Service, long_recording: Path) -> None:
    """kill -9 of the daemon while it transcribes: systemd ends the children and starts it again, and the file goes on where it was."""
    process = begin(service, long_recording)
    before = service.processes()
    os.kill(process, signal.SIGKILL)
    stored = service.windows("long.wav")
    assert service.job("long.wav")["state"] == "running", "the recording is too short for this test"
    wait_for(lambda: service.show("NRestarts") == "1", "systemd starts it again")
    goes_on_from(service, stored[-1].end_s)
    assert_whole(service)
    assert not [process for process in before if os.path.exists(f"/proc/{process}")]
    assert service.show("NRestarts") == "1"


def test_stop_in_the_middle_of_a_file(service: Service, long_recording: Path) -> None:
    """`systemctl stop` while it transcribes: in order, within 15 s, nobody killed; the next start goes on where it was."""
    begin(service, long_recording)
    began = time.monotonic()
    service.systemctl("stop", "whisperd")
    assert time.monotonic() - began < STOP_S
    assert (service.show("ActiveState"), service.show("Result"), service.show("ExecMainStatus")) == ("inactive", "success", "0")
    assert not [line for line in service.said() if "SIGKILL" in line or "timed out" in line]
    assert not service.processes()
    job = service.job("long.wav")
    assert (job["state"], job["attempts"]) == ("ready", 0)
    stored = service.windows("long.wav")
    assert len(stored) >= 3
    service.start()
    goes_on_from(service, stored[-1].end_s)
    assert_whole(service)


def test_a_bad_configuration_is_said_once(service: Service) -> None:
    """A configuration that cannot be used ends with status 2: the unit fails, is not started for ever, and the journal says why."""
    service.configure(CONFIG.replace("quiet_s = 1.0", 'quiet_s = "soon"'))
    assert service.systemctl("start", "whisperd", check=False).returncode != 0
    found = [service.show(name) for name in ("ActiveState", "SubState", "ExecMainStatus", "NRestarts")]
    assert found == ["failed", "failed", "2", "0"]  # SubState would be auto-restart if it was to be tried again
    said = "\n".join(service.said())
    assert "cannot use the configuration /etc/whisperd/whisperd.toml" in said
    assert "watcher.quiet_s" in said
    assert "'soon'" in said
    service.configure()
    service.start()


def test_a_folder_in_a_home(service: Service) -> None:
    """A home is closed to whisperd, and `BindPaths=` opens one folder of it, as the unit's comment says."""
    home = service.sandbox.root / "home/anna"
    (home / "dictation/inbox").mkdir(parents=True)
    (home / "diary.txt").touch()
    service.sandbox.run("chgrp", "whisperd", "/home/anna/dictation")
    (home / "dictation").chmod(0o2775)
    home.chmod(0o700)
    (home / "dictation/inbox/home.wav").write_bytes((CLIPS / "meeting.wav").read_bytes())
    service.configure(CONFIG.replace("/srv/whisperd", "/home/anna/dictation"))
    service.drop_in("home", "BindPaths=-/home/anna/dictation")
    service.start()
    service.wait_for_state("home.wav")
    assert (home / "dictation/outbox/home.txt").exists()
    seen = Path(f"/proc/{service.main_process()}/root/home")
    assert [path.relative_to(seen) for path in (*seen.iterdir(), *(seen / "anna").iterdir())] == [Path("anna"), Path("anna/dictation")]


def test_a_daemon_that_hangs_is_started_again(service: Service) -> None:
    """A stopped main process misses its watchdog: systemd aborts it and starts it again."""
    service.drop_in("watchdog", "WatchdogSec=5")
    service.start()
    before = service.processes()
    os.kill(service.main_process(), signal.SIGSTOP)
    wait_for(lambda: service.show("NRestarts") == "1" and service.is_active(), "systemd starts it again")
    assert any("Watchdog timeout" in line for line in service.said())
    assert not [process for process in before if os.path.exists(f"/proc/{process}")]


def waits_for_fuse(process: int) -> bool:
    """Whether it is in the kernel, for an answer of a filesystem's server."""
    try:
        return Path(f"/proc/{process}/wchan").read_text() == "request_wait_answer"
    except OSError:
        return False


def test_stop_and_start_beside_a_share_that_hangs(service: Service) -> None:
    """A FUSE share stops answering; its watcher is beyond SIGKILL. `systemctl stop` ends when systemd's patience with that one does, the
    daemon itself long before; `systemctl start` serves the other inbox while the share still hangs, and that one as soon as it answers."""
    if why := missing():
        pytest.skip(why)
    sandbox = service.sandbox
    server = sandbox.root / "usr/local/bin/serve"
    server.write_text("#!/bin/sh\nexec /usr/lib/openssh/sftp-server\n")
    server.chmod(0o755)
    sandbox.run("install", "-d", "-o", "whisperd", "/served/inbox", "/mnt/share")
    mounted = sandbox.run(
        "sshfs", "-o", f"ssh_command=/usr/local/bin/serve,allow_other,{UNCACHED}", "nas:/served", "/mnt/share", check=False
    )
    if mounted.returncode:
        pytest.skip(f"no share can be mounted in the sandbox: {mounted.stderr.strip()}")
    config = CONFIG.replace("quiet_s = 1.0", "quiet_s = 1.0\npoll_s = 1")
    service.configure(config + '[[inbox]]\npath = "/mnt/share/inbox"\noutbox = "/srv/whisperd/share outbox"\n')
    service.drop_in("patience", "TimeoutStopSec=16")
    service.start()
    far = sandbox.root / "served/inbox"
    (far / "before.ogg").write_bytes((CLIPS / "price.ogg").read_bytes())
    service.wait_for_state("before.ogg")
    sandbox.run("pkill", "-STOP", "sftp-server")
    wait_for(lambda: any(map(waits_for_fuse, service.processes())), "its watcher waits for it")
    process = service.main_process()
    began = time.monotonic()
    service.systemctl("stop", "--no-block", "whisperd")
    wait_for(lambda: not os.path.exists(f"/proc/{process}"), "the daemon has ended")
    assert time.monotonic() - began < STOP_S
    wait_for(lambda: service.show("ActiveState") in ("inactive", "failed"), "systemd waits no longer")
    assert service.processes(), "one that cannot be killed"
    service.start()
    service.drop("near.wav")
    service.wait_for_state("near.wav")
    (far / "after.ogg").write_bytes((CLIPS / "price.ogg").read_bytes() + b"\0")
    sandbox.run("pkill", "-CONT", "sftp-server")
    service.wait_for_state("after.ogg")
