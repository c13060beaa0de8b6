"""The operator's desk, from outside: what each command prints, in words and as JSON, and with which status it exits."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installation import Installation, assert_ledger_and_disk_agree, toml, whisperd
from recordings import SENTENCES, Studio

NewPlace = Callable[[str], Installation]
TEXT = "This is a letter, not a recording.\n"

STATUS_KEYS = {
    "schema", "at", "daemon", "waits_for", "model", "engines", "batches", "counts", "quality", "running", "last_hour", "gpus", "plan",
    "inboxes", "alerts",
}  # fmt: skip
STATES = {"seen", "ready", "running", "transcribed", "done", "failed", "cancelled", "gone"}
JOB_KEYS = {
    "job", "state", "path", "inbox", "size", "attempts", "priority", "held", "duration_s", "language", "process_s", "quality", "seen_at",
    "ended_at", "failure",
}  # fmt: skip
LIFE_KEYS = JOB_KEYS | {"schema", "sha256", "checkpoints", "last_lines", "published", "events"}


def letter(home: Path) -> Path:
    """A file that can never be transcribed."""
    path = home / "letter.mp3"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def office(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """One good and one bad file, after a run."""
    home = tmp_path_factory.mktemp("office")
    place = Installation(home / "home")
    place.drop(studio.say(SENTENCES[0]), "talks/good.wav")
    place.drop(letter(home), b"bad \n\xff.mp3")
    assert place.run_once().code == 1
    return place


def answer(place: Installation, verb: str, *arguments: str) -> Any:
    """What a command says as JSON."""
    done = place.desk(verb, "--json", *arguments)
    assert done.code == 0, done.err
    return json.loads(done.out)


def listed(place: Installation, *arguments: str) -> list[Any]:
    """The jobs of `jobs --json`, whose shape is whisperd.jobs/1."""
    shown = answer(place, "jobs", *arguments)
    assert set(shown) == {"schema", "jobs"} and shown["schema"] == "whisperd.jobs/1"
    return list(shown["jobs"])


def test_the_judge_of_these_tests_can_find_fault(office: Installation) -> None:
    """What every test here asserts at its end does notice a stray file, a transcript cut short, and a source that was touched."""
    assert_ledger_and_disk_agree(office)
    talk, transcript = office.inbox / "talks" / "good.wav", office.outbox / "talks" / "good.srt"
    whole, times = transcript.read_bytes(), (talk.stat().st_atime_ns, talk.stat().st_mtime_ns)
    stray = office.outbox / "talks" / ".whisperd-1.txt.tmp"
    faults: list[tuple[Callable[[], object], Callable[[], object]]] = [
        (lambda: stray.write_text(""), stray.unlink),
        (lambda: transcript.write_bytes(whole[:-5]), lambda: transcript.write_bytes(whole)),
        (lambda: os.utime(talk), lambda: os.utime(talk, ns=times)),
    ]
    for commit, mend in faults:
        commit()
        with pytest.raises(AssertionError):
            assert_ledger_and_disk_agree(office)
        mend()
        assert_ledger_and_disk_agree(office)


# --- status, jobs, show --------------------------------------------------------------------------------------------------------


def test_status_for_people(office: Installation) -> None:
    """Whether a daemon runs, how many files stand where, which inbox goes to which outbox."""
    done = office.desk("status")
    assert done.code == 0, done.err
    assert "not running" in done.out
    assert "done 1" in done.out and "failed 1" in done.out
    assert f"{office.inbox} → {office.outbox}" in done.out


def test_status_for_programs(office: Installation) -> None:
    """The keys of schema whisperd.status/1, all of them, every time."""
    status = answer(office, "status")
    assert status["schema"] == "whisperd.status/1"
    assert set(status) >= STATUS_KEYS
    assert set(status["counts"]) == STATES
    assert (status["counts"]["done"], status["counts"]["failed"]) == (1, 1)
    assert status["quality"] == {"good": 1, "second_pass": 0, "doubtful": 0}
    assert status["batches"]["windows"] >= status["batches"]["batches"] > 0
    assert status["daemon"]["running"] is False
    assert status["plan"]["workers"] == 1 and status["plan"]["reason"]
    assert [inbox["path"] for inbox in status["inboxes"]] == [str(office.inbox)]


def test_jobs_by_state(office: Installation) -> None:
    """`jobs --json --state` lists just those, in whisperd.job/1's short form; names that are no text are escaped."""
    done, failed = listed(office, "--state", "done"), listed(office, "--state", "failed")
    assert [row["path"] for row in done] == ["talks/good.wav"]
    assert [row["path"] for row in failed] == ["bad \\x0a\\xff.mp3"]
    assert all(set(row) >= JOB_KEYS for row in done + failed)
    assert done[0]["failure"] is None
    assert set(failed[0]["failure"]) == {"kind", "code", "what", "hint"}
    assert listed(office, "--state", "running") == []


def test_jobs_by_quality(office: Installation) -> None:
    """`--quality` keeps to transcripts with that verdict; `show` says it in words."""
    (good,) = listed(office, "--quality", "good")
    assert (good["path"], good["quality"]) == ("talks/good.wav", "good")
    assert listed(office, "--quality", "doubtful") == []
    assert "quality   good" in office.desk("show", str(good["job"])).out


def test_jobs_of_an_inbox(office: Installation) -> None:
    """`--inbox` keeps to one inbox; another has no jobs."""
    assert len(listed(office, "--inbox", str(office.inbox))) == 2
    assert listed(office, "--inbox", str(office.outbox)) == []


def test_jobs_for_people(office: Installation) -> None:
    """A line a file, whatever is in its name, and why it failed."""
    done = office.desk("jobs")
    assert done.code == 0
    header, *lines = done.out.splitlines()
    assert len(lines) == 2 and "file" in header
    assert any("failed" in line and "text" in line for line in lines)


def test_show_tells_one_life(office: Installation) -> None:
    """`show` has every step of a job and where its transcripts are; `show --json` has the same as whisperd.job/1."""
    (row,) = listed(office, "--state", "done")
    life = answer(office, "show", str(row["job"]))
    assert life["schema"] == "whisperd.job/1"
    assert set(life) >= LIFE_KEYS
    assert [event["verb"] for event in life["events"]] == ["see", "settle", "claim", "finish", "publish"]
    for item in life["published"]:
        assert hashlib.sha256(Path(item["path"]).read_bytes()).hexdigest() == item["sha256"]
    shown = office.desk("show", str(row["job"]))
    assert shown.code == 0
    assert "talks/good.wav" in shown.out and "publish" in shown.out and life["published"][0]["path"] in shown.out


def test_an_unknown_job_is_said_so(office: Installation) -> None:
    """A number that no job has: a sentence, what to do, exit status 3; so for absurd numbers."""
    for number in ("999", "99999999999999999999999"):
        done = office.desk("show", number)
        assert done.code == 3
        assert f"there is no job {number}" in done.err and "whisperd jobs" in done.err
        assert "Traceback" not in done.err


def test_the_desk_before_the_first_run(place: Installation) -> None:
    """Without a ledger there is nothing to show: exit status 3, and the question that helps."""
    for verb in ("status", "jobs", "show 1"):
        done = place.desk(verb)
        assert done.code == 3, (verb, done)
        assert "no ledger" in done.err and "has the daemon run" in done.err


# --- retry ---------------------------------------------------------------------------------------------------------------------


def test_retry_fails_again_with_one_error_file(place: Installation, tmp_path: Path) -> None:
    """A bad file tried again, alone and with --failed, fails again: there is one error file, and it tells of the last time."""
    place.drop(letter(tmp_path))
    assert place.run_once().code == 1
    job = str(place.job(b"letter.mp3")["id"])
    for arguments in ((job,), ("--failed",)):
        done = place.desk("retry", *arguments)
        assert done.code == 0, done.err
        assert f"job {job} will be tried again: letter.mp3" in done.out
        assert place.run_once().code == 1
        assert set(place.published()) == {b"letter.mp3.error.txt"}
        assert_ledger_and_disk_agree(place)
    verbs = [event["verb"] for event in answer(place, "show", job)["events"]]
    assert verbs.count("reject") == 1 and verbs.count("fail") == 2 and verbs.count("report") == 3


def test_retry_of_a_file_that_can_be_read_now(place: Installation, studio: Studio) -> None:
    """Failed for a cap that was too low; the cap is raised, the file is tried again and done, and its error file is gone."""
    place.write_config(engine={"duration_max_s": 0.5})
    place.drop(studio.say(SENTENCES[0]), "talk.wav")
    assert place.run_once().code == 1
    assert "raise engine.duration_max_s" in place.error_file(b"talk.wav")
    place.write_config(engine={"duration_max_s": 60.0})
    assert place.desk("retry", "--failed").code == 0
    assert place.run_once().code == 0
    assert b"talk.wav.error.txt" not in place.published()
    assert_ledger_and_disk_agree(place)


def test_retry_refuses_what_is_not_failed(office: Installation) -> None:
    """A job that is done is not tried again; an unknown one neither; both are said, and the exit status is 1."""
    (row,) = listed(office, "--state", "done")
    done = office.desk("retry", str(row["job"]), "999")
    assert done.code == 1
    assert f"cannot retry job {row['job']}: it is done" in done.out + done.err
    assert "999" in done.out + done.err
    told = office.desk("retry", "--json", "999")
    assert told.code == 1
    shown = json.loads(told.out)
    assert shown["schema"] == "whisperd.retry/1" and shown["retried"] == [] and [item["job"] for item in shown["refused"]] == [999]


def test_retry_failed_with_nothing_failed(place: Installation) -> None:
    """Nothing to do is no error."""
    assert place.run_once().code == 0
    done = place.desk("retry", "--failed")
    assert (done.code, done.out.strip()) == (0, "no failed files")


# --- configuration -------------------------------------------------------------------------------------------------------------


def test_config_check_says_good(place: Installation) -> None:
    """A configuration that can be used: exit status 0, how many inboxes, what to know about it."""
    done = place.desk("config check")
    assert done.code == 0 and "good, 1 inbox" in done.out
    said = answer(place, "config check")
    assert said["usable"] is True and any("demo" in note for note in said["notes"])


def test_config_show_tells_where_each_setting_comes_from(place: Installation) -> None:
    """Default, file or environment, for every setting."""
    done = whisperd("config", "show", "--json", "--config", place.config, WHISPERD_DISPATCHER__WORKERS="2")
    shown = json.loads(done.out)
    assert shown["schema"] == "whisperd.config/1"
    shown = shown["settings"]
    assert shown["engine.model"] == {"value": "demo", "origin": "file"}
    assert shown["dispatcher.workers"] == {"value": 2, "origin": "WHISPERD_DISPATCHER__WORKERS"}
    assert shown["watcher.rescan_s"]["origin"] == "default"
    assert shown["inbox.0.path"]["value"] == str(place.inbox)


HOME = "/nonexistent/whisperd"
INBOX = {"inbox": [{"path": f"{HOME}/in"}]}
BAD = {
    "unknown key": ({**INBOX, "engine": {"modell": "small"}}, ["engine.modell", "no such setting"]),
    "unknown section": ({**INBOX, "enigne": {"model": "small"}}, ["enigne", "no such setting"]),
    "unknown key of an inbox": ({"inbox": [{"path": f"{HOME}/in", "priorty": "low"}]}, ["inbox.0.priorty", "no such setting"]),
    "wrong type": ({**INBOX, "dispatcher": {"workers": "many"}}, ["dispatcher.workers", "integer", "many"]),
    "out of range": ({**INBOX, "engine": {"cpu_threads": 33}}, ["engine.cpu_threads", "32", "33"]),
    "not one of": ({**INBOX, "outbox": {"formats": ["txt", "docx"]}}, ["outbox.formats.1", "docx"]),
    "no inbox": ({}, ["inbox"]),
    "relative inbox": ({"inbox": [{"path": "in"}]}, ["inbox.0.path", "absolute"]),
    "nested inboxes": ({"inbox": [{"path": f"{HOME}/in"}, {"path": f"{HOME}/in/b"}]}, [f"inbox {HOME}/in/b", "inside another inbox"]),
    "the same inbox twice": ({"inbox": [{"path": f"{HOME}/in"}, {"path": f"{HOME}/in/"}]}, [f"{HOME}/in", "twice"]),
    "inbox in an outbox": (
        {"inbox": [{"path": f"{HOME}/a", "outbox": f"{HOME}/out"}, {"path": f"{HOME}/out/b"}]},
        [f"inbox {HOME}/out/b", "inside an outbox"],
    ),
    "inbox is outbox": ({"inbox": [{"path": f"{HOME}/in", "outbox": f"{HOME}/in"}]}, [f"inbox {HOME}/in", "its own outbox"]),
    "half precision on a CPU": ({**INBOX, "engine": {"device": "cpu", "compute_type": "float16"}}, ["engine", "float16", "GPU"]),
    "a large batch on a CPU": ({**INBOX, "engine": {"device": "cpu", "batch": 16}}, ["engine", "batch 16", "at most 8"]),
    "speakers one after the other": (
        {**INBOX, "transcription": {"mode": "sequential", "channels": "speakers"}},
        ["channels", "speakers", "sequential", "batched"],
    ),
    "unknown field of a name": ({**INBOX, "outbox": {"name": "{stm}"}}, ["outbox.name", "stm", "{stem}"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_setting_is_named(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2, and a sentence that names the key, what is wrong with it and what was found there."""
    from whisperd.cli import main

    settings, named = BAD[case]
    path = tmp_path / "whisperd.toml"
    path.write_text(toml(settings))
    for name in [name for name in os.environ if name.startswith("WHISPERD_")]:
        monkeypatch.delenv(name)
    assert main(["config", "check", "--config", str(path)]) == 2
    said = capsys.readouterr().err
    assert str(path) in said and all(word in said for word in named), said
    assert "Traceback" not in said and "pydantic" not in said


def test_a_configuration_that_cannot_be_read(tmp_path: Path) -> None:
    """No such file, a directory, no TOML, no UTF-8: exit status 2, the file is named, and `run` refuses alike."""
    bad = tmp_path / "bad.toml"
    bad.write_text('state_dir = "/var/lib/whisperd\n[engine\n')
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b'state_dir = "\xff\xfe"\n')
    for path, words in ((tmp_path / "absent.toml", "no such file"), (bad, "TOML"), (tmp_path, ""), (binary, "")):
        for verb in (["config", "check"], ["run", "--once"]):
            done = whisperd(*verb, "--config", path)
            assert done.code == 2, (path, done)
            assert str(path) in done.err and words in done.err
            assert "Traceback" not in done.err


def test_a_bad_setting_in_the_environment_is_named(place: Installation) -> None:
    """What comes from the environment is judged like what comes from the file."""
    done = whisperd("config", "check", "--config", place.config, WHISPERD_DISPATCHER__WORKERS="-1")
    assert done.code == 2 and "dispatcher.workers" in done.err


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    """What `config example` prints can be used as it stands."""
    example = whisperd("config", "example")
    assert example.code == 0, example.err
    if not example.out.strip():
        pytest.skip("etc/whisperd.toml is still empty")
    path = tmp_path / "whisperd.toml"
    path.write_text(example.out)
    done = whisperd("config", "check", "--config", path)
    assert done.code == 0, done.err


# --- what stands in the way of a run -------------------------------------------------------------------------------------------


def test_two_daemons_on_one_state_directory(place: Installation) -> None:
    """The second one ends with status 3 and says that another is running; the first is not disturbed."""
    with place.daemon() as daemon:
        done = place.run_once()
        assert done.code == 3
        assert f"another whisperd is running on {place.state}" in done.err
        assert "Traceback" not in done.err
        status = answer(place, "status")
        assert status["daemon"]["running"] is True and status["daemon"]["pid"] == daemon.pid
        assert daemon.stop() == 0


@pytest.mark.parametrize("model", ["small", "auto"])
def test_an_absent_model_is_waited_for(model: str, place: Installation, studio: Studio) -> None:
    """Offline and without the model: status 3 at once, in plain words what is missing and what to do; the file waits with no attempt
    spent and no error file. With a model that is there, the next run transcribes it."""
    place.write_config(engine={"model": model, "offline": True})
    place.drop(studio.say(SENTENCES[0]), "talk.wav")
    done = place.run_once()
    assert done.code == 3, done.err[-3000:]
    said = done.err.splitlines()[-3:]
    assert any("the model" in line and "engine.offline is set" in line and "set engine.model" in line for line in done.err.splitlines()), (
        said
    )
    assert "Traceback" not in done.err
    job = place.job(b"talk.wav")
    assert (job["state"], job["attempts"]) == ("ready", 0)
    assert place.published() == {}
    waits_for = answer(place, "status")["waits_for"]
    assert waits_for and "the model" in waits_for
    place.write_config(engine={"model": "demo"})
    assert place.run_once().code == 0
    assert place.transcript(b"talk")["engine"]["model"] == "demo"
    assert_ledger_and_disk_agree(place)


def test_an_absent_inbox_is_no_reason_to_fail(place: Installation) -> None:
    """`run --once` with an inbox that is not there ends with status 3, names it, and makes nothing there."""
    place.inbox.rmdir()
    done = place.run_once()
    assert done.code == 3, done.err[-2000:]
    assert str(place.inbox) in done.err and "Traceback" not in done.err
    assert not place.inbox.exists()


def test_a_state_directory_that_cannot_be_used(place: Installation, tmp_path: Path) -> None:
    """A file stands where the state directory should be: status 3 and a sentence."""
    (tmp_path / "file").write_text("")
    place.write_config(state_dir=str(tmp_path / "file" / "state"))
    done = place.run_once()
    assert done.code == 3
    assert "cannot use the state directory" in done.err and "Traceback" not in done.err


def test_a_command_is_required(tmp_path: Path) -> None:
    """No command, an unknown one, an unknown state: usage, status 2."""
    for arguments in ([], ["transcribe"], ["jobs", "--state", "lost"]):
        done = whisperd(*arguments)
        assert done.code == 2 and "usage: whisperd" in done.err


def test_output_may_be_cut_off(office: Installation) -> None:
    """`whisperd jobs | head` ends quietly."""
    import subprocess
    import sys

    from installation import environment

    reader = subprocess.Popen(
        [sys.executable, "-m", "whisperd", "jobs", "--config", str(office.config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert reader.stdout is not None and reader.stderr is not None
    reader.stdout.close()
    said = reader.stderr.read().decode()
    reader.stderr.close()
    assert reader.wait() == 0 and "Traceback" not in said and "Exception" not in said, said
