"""What is told of a finished file, to whom, in which words; and how the ledger's notices become frames and back."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.config import Settings
from whisperd.dispatcher.notices import bodies, facts, targets

NOW = 1_700_000_000.25
HOOK = {"command": ["/usr/local/bin/tell", "--all"]}
WEBHOOK = {"url": "https://me:hush@hooks.example/T0/secret-token?key=hidden", "secret": "whsec_c2VjcmV0"}


def settings(webhook: Any = (WEBHOOK,), hook: Any = (HOOK,)) -> Settings:
    return Settings(inbox=({"path": "/in"},), webhook=webhook, hook=hook)  # type: ignore[arg-type]


def a_row(**changes: Any) -> dict[str, Any]:
    return {
        "id": 7,
        "inbox_path": b"/srv/in",
        "outbox": b"/srv/out",
        "path": b"talks/a.wav",
        "size": 100,
        "mtime_ns": 1_600_000_000_000_000_000,
        "sha256": "ab" * 32,
        "duration_s": 12.5,
        "language": "en",
        "quality": "good",
        "attempts": 1,
        "failure_kind": None,
        "failure_code": None,
        "failure_what": None,
        "failure_hint": None,
        **changes,
    }


FAILED = {
    "duration_s": None,
    "language": None,
    "quality": None,
    "attempts": 3,
    "failure_kind": "permanent",
    "failure_code": "no_audio",
    "failure_what": "it has no audio",
    "failure_hint": "drop one that has",
}
FILES = [(b"talks/a.txt", "txt", "01" * 32), (b"talks/a.srt", "srt", "02" * 32)]


def body_of(row: dict[str, Any], event: str = "done", files: Any = FILES) -> bytes:
    return bodies(row, files, settings(), event, NOW)[0].body


def test_a_notice_says_what_was_made_of_which_file() -> None:
    """The whole of it (schema whisperd.notice/1)."""
    assert json.loads(body_of(a_row())) == {
        "schema": "whisperd.notice/1",
        "event": "done",
        "at": "2023-11-14T22:13:20.250+00:00",
        "job": 7,
        "inbox": "/srv/in",
        "path": "talks/a.wav",
        "outbox": "/srv/out",
        "size": 100,
        "modified_at": "2020-09-13T12:26:40.000+00:00",
        "sha256": "ab" * 32,
        "duration_s": 12.5,
        "language": "en",
        "quality": "good",
        "files": [
            {"format": "txt", "path": "talks/a.txt", "absolute": "/srv/out/talks/a.txt", "sha256": "01" * 32},
            {"format": "srt", "path": "talks/a.srt", "absolute": "/srv/out/talks/a.srt", "sha256": "02" * 32},
        ],
        "failure": None,
    }


def test_a_failure_says_why() -> None:
    """What happened and what to do, as the error file has it."""
    notice = json.loads(body_of(a_row(**FAILED), "failed", [(b"talks/a.wav.error.txt", "error.txt", "03" * 32)]))
    assert notice["event"] == "failed" and notice["files"][0]["absolute"] == "/srv/out/talks/a.wav.error.txt"
    assert notice["failure"] == {
        "kind": "permanent",
        "code": "no_audio",
        "what": "it has no audio",
        "hint": "drop one that has",
        "attempts": 3,
    }


def test_every_time_that_the_ledger_can_hold_is_told() -> None:
    """Somebody's clock was wrong by centuries: that must not stop the publication that the notice rides on."""
    told = [json.loads(body_of(a_row(mtime_ns=ns)))["modified_at"] for ns in (-(1 << 63), 0, (1 << 63) - 1)]
    assert [text[:10] for text in told] == ["1677-09-21", "1970-01-01", "2262-04-11"]


@given(st.binary(min_size=1, max_size=40).map(lambda name: name.replace(b"\0", b"0")))
def test_every_name_arrives_byte_by_byte(name: bytes) -> None:
    """In the notice escaped, with its bytes beside it where those differ; in a hook's environment as it is."""
    body = body_of(a_row(path=name, outbox=b"/out"), files=[(name, "txt", "")])
    notice = json.loads(body)
    assert notice["path"].isprintable()
    assert base64.b64decode(notice.get("path_base64", base64.b64encode(notice["path"].encode()))) == name
    environment = {key: value.encode("latin-1") for key, value in facts(body).items()}
    assert environment["WHISPERD_PATH"] == os.path.join(b"/srv/in", name)
    assert environment["WHISPERD_FILE_TXT"] == os.path.join(b"/out", name)
    assert b"\n" not in environment["WHISPERD_FILES"] and not any(b"\0" in value for value in environment.values())


def test_a_hook_is_told_all_of_it() -> None:
    """Nothing is missing where there is nothing to say: it is empty."""
    told = facts(body_of(a_row()))
    body = told.pop("WHISPERD_NOTICE")
    assert json.loads(body)["job"] == 7
    assert told == {
        "WHISPERD_JOB": "7",
        "WHISPERD_EVENT": "done",
        "WHISPERD_PATH": "/srv/in/talks/a.wav",
        "WHISPERD_INBOX_PATH": "/srv/in",
        "WHISPERD_OUTBOX_PATH": "/srv/out",
        "WHISPERD_FILES": "/srv/out/talks/a.txt\n/srv/out/talks/a.srt",
        "WHISPERD_FILE_TXT": "/srv/out/talks/a.txt",
        "WHISPERD_FILE_SRT": "/srv/out/talks/a.srt",
        "WHISPERD_LANGUAGE": "en",
        "WHISPERD_DURATION_S": "12.5",
        "WHISPERD_QUALITY": "good",
        "WHISPERD_FAILURE": "",
        "WHISPERD_FAILURE_WHAT": "",
    }
    failed = facts(body_of(a_row(**FAILED), "failed", [(b"a.wav.error.txt", "error.txt", "")]))
    assert (failed["WHISPERD_FAILURE"], failed["WHISPERD_FAILURE_WHAT"], failed["WHISPERD_LANGUAGE"]) == ("no_audio", "it has no audio", "")
    assert failed["WHISPERD_FILE_ERROR_TXT"] == "/srv/out/a.wav.error.txt"


def test_no_fact_is_taken_for_a_setting() -> None:
    """A hook may run whisperd itself, which reads settings from the same environment."""
    names = {name.removeprefix("WHISPERD_").lower() for name in facts(body_of(a_row()))}
    assert not names & set(Settings.model_fields) and "config" not in names and not any("__" in name for name in names)


def test_the_list_of_files_can_be_read_by_a_shell() -> None:
    """A path a line; where one is escaped, `printf %b` gives the name back."""
    name = b"a\nb\\n \xff.txt"
    told = facts(body_of(a_row(outbox=b"/out"), files=[(name, "txt", ""), (b"b.srt", "srt", "")]))
    script = 'while IFS= read -r file; do printf "%b\\0" "$file"; done <<< "$WHISPERD_FILES"'
    found = subprocess.run(["bash", "-c", script], env={"WHISPERD_FILES": told["WHISPERD_FILES"]}, capture_output=True, check=True).stdout
    assert found.split(b"\0")[:-1] == [b"/out/" + name, b"/out/b.srt"]


def test_only_those_are_told_who_want_to_hear_of_it() -> None:
    """By event; the same address twice is told once."""
    some = settings([WEBHOOK, WEBHOOK, {"url": "http://a/", "events": ["failed"]}], [{**HOOK, "events": ["done"]}])
    assert [name.partition(":")[0] for name in targets(some, "done")] == ["webhook", "hook"]
    assert [name.partition("#")[0] for name in targets(some, "failed")] == ["webhook:https://hooks.example", "webhook:http://a"]
    assert bodies(a_row(), FILES, settings([], []), "done", NOW) == []


def test_no_secret_reaches_the_ledger_and_a_target_keeps_its_name() -> None:
    """Neither secret, password, path nor query of a webhook; another secret or time limit leaves the name as it is."""
    told = bodies(a_row(), FILES, settings(), "done", NOW)
    for word in ("hush", "me:", "T0", "secret", "hidden", "whsec"):
        assert not any(word in notice.target or word in notice.body.decode() for notice in told)
    assert targets(settings([{**WEBHOOK, "secret": "x", "timeout_s": 5}]), "done") == targets(settings(), "done")
    assert targets(settings([{**WEBHOOK, "url": WEBHOOK["url"] + "2"}]), "done") != targets(settings(), "done")
    assert targets(settings(hook=[{"command": [*HOOK["command"], "x"]}]), "done") != targets(settings(), "done")


@pytest.mark.parametrize("changes", [{"id": 8}, {"path": b"b.wav"}, {"inbox_path": b"/srv/other"}, {"sha256": None}])
def test_a_delivery_id_is_of_one_delivery(changes: dict[str, Any]) -> None:
    """The same again has the same; another target, job or moment another."""
    first, second = bodies(a_row(), FILES, settings(), "done", NOW)
    assert first.delivery != second.delivery and first == bodies(a_row(), FILES, settings(), "done", NOW)[0]
    others = [bodies(a_row(), FILES, settings(), "done", NOW + 1)[0], bodies(a_row(**changes), FILES, settings(), "done", NOW)[0]]
    assert first.delivery not in {other.delivery for other in others}
    assert first.delivery.startswith("msg_") and "." not in first.delivery
