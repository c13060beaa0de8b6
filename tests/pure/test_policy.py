"""Pure decisions of the dispatcher and of health: values and `now` in, values out."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.config import HealthSettings
from whisperd.dispatcher import choice, resume, retry
from whisperd.dispatcher.counters import Counters
from whisperd.dispatcher.delivery import error_text, names
from whisperd.health.checks import CHECKS, Observation, judge
from whisperd.health.heals import CoolDown
from whisperd.report import status
from whisperd.vocabulary import Failure, FailureKind, JobOptions, Reading, Window
from whisperd.wire import BatchDone, EngineReady, Transcribe

# --- where it goes on ------------------------------------------------------------------------------------------------------------

ENGINE = EngineReady(
    model="small", revision="abc", device="cpu", compute_type="int8", encoder="ctranslate2", slots=8, load_s=0.1, rss_mib=100
)
SOURCE = {"size": 100, "mtime_ns": 7}


def window(index: int) -> Window:
    return Window(
        index=index,
        start_s=30.0 * index,
        end_s=30.0 * index + 30,
        language="cs",
        language_probability=0.9,
        segments=(),
    )


def test_a_fingerprint_changes_with_all_that_the_text_depends_on() -> None:
    """Model, revision, device, precision, encoder, every option, size and time of the source: each gives another fingerprint. How
    many windows share a batch, and how long it took to load, do not."""
    options = JobOptions()
    prints = [resume.fingerprint(ENGINE, options, SOURCE)]
    assert resume.fingerprint(msgspec.structs.replace(ENGINE, slots=2, load_s=9.0, rss_mib=1), options, {**SOURCE, "inode": 3}) == prints[0]
    for name in ("model", "revision", "device", "compute_type", "encoder"):
        prints.append(resume.fingerprint(msgspec.structs.replace(ENGINE, **{name: "other"}), options, SOURCE))
    for name in JobOptions.__struct_fields__:
        prints.append(resume.fingerprint(ENGINE, msgspec.structs.replace(options, **{name: "other"}), SOURCE))
    prints += [resume.fingerprint(ENGINE, options, {**SOURCE, name: 8}) for name in SOURCE]
    assert len(set(prints)) == len(prints)


def test_a_job_without_windows_begins_at_the_beginning() -> None:
    """Nothing kept, nothing told."""
    assert resume.transcribe(7, JobOptions(), [], b"left over") == Transcribe(job=7, options=JobOptions())


def test_a_job_goes_on_after_its_last_window() -> None:
    """Where the windows end, and from which state."""
    work = resume.transcribe(7, JobOptions(), [window(0), window(1), window(2)], b"state")
    assert (work.windows_done, work.position_s, work.front_end) == (3, 90.0, b"state")


# --- what a failure means --------------------------------------------------------------------------------------------------------


def failure(kind: FailureKind) -> Failure:
    return Failure(kind=kind, code="x", what="x")


@pytest.mark.parametrize(
    ("law", "pauses"),
    [("fixed", [5, 5, 5, 5]), ("linear", [5, 10, 15, 20]), ("exponential", [5, 10, 20, 40]), ("fibonacci", [5, 5, 10, 15])],
)
def test_four_laws_of_backoff(law: str, pauses: list[float]) -> None:
    """Fixed, linear, exponential and Fibonacci pauses (FEATURES F38), capped."""
    backoff = retry.Backoff(law=law, base_s=5, max_s=1000, jitter=0)
    assert [backoff.pause_s(attempt, 0.5) for attempt in (1, 2, 3, 4)] == pauses
    assert retry.Backoff(law=law, base_s=5, max_s=7, jitter=0).pause_s(50, 0) <= 7


@pytest.mark.parametrize("law", ["fixed", "linear", "exponential", "fibonacci"])
@pytest.mark.parametrize("attempt", [1, 1025, 10**6])
def test_a_pause_has_an_end_however_long_it_fails(law: str, attempt: int) -> None:
    """Months of failures in a row give the longest pause, not an overflow: what is absent is waited for."""
    assert 0 < retry.Backoff(law=law, base_s=1, max_s=60).pause_s(attempt) <= 60


@given(st.integers(1, 1000), st.floats(0, 1))
def test_jitter_only_shortens(attempt: int, chance: float) -> None:
    """A pause stays within its jitter and is never negative, however many attempts there were."""
    backoff = retry.Backoff(jitter=0.2)
    calm = retry.Backoff(jitter=0.0).pause_s(attempt, chance)
    assert 0.8 * calm - 1e-9 <= backoff.pause_s(attempt, chance) <= calm


@given(st.sampled_from(FailureKind), st.integers(1, 10), st.booleans(), st.booleans())
def test_verdicts(kind: FailureKind, attempts: int, at_once: bool, shared: bool) -> None:
    """Permanent fails, waiting waits without an attempt, transient is retried until the attempts are used up; a failure shared with
    others is never the last word."""
    verdict = retry.after_failure(
        failure(kind), attempts=attempts, attempts_max=3, now=100.0, backoff=retry.Backoff(), chance=0.0, at_once=at_once, shared=shared
    )
    match kind:
        case FailureKind.WAITING:
            assert isinstance(verdict, retry.Wait)
        case FailureKind.PERMANENT:
            assert verdict == retry.Fail()
        case FailureKind.TRANSIENT:
            assert (verdict == retry.Fail()) == (attempts >= 3 and not shared)
            if isinstance(verdict, retry.Retry):
                assert verdict.not_before == 100.0 if at_once else verdict.not_before > 100.0


# --- what "auto" means -----------------------------------------------------------------------------------------------------------


def gpu(vram_mib: int | None, status: str = "ok") -> Reading:
    return Reading(gpu="GPU-1", status=status, what="a card", vram_total_mib=vram_mib)


@pytest.mark.parametrize(
    ("readings", "cores", "memory_mib", "expected"),
    [
        ([gpu(24_000)], 8, 32_000, ("large-v3", "cuda", "float16")),
        ([gpu(6_000)], 8, 32_000, ("large-v3-turbo", "cuda", "float16")),
        ([gpu(2_000)], 8, 32_000, ("base", "cuda", "float16")),
        ([], 8, 32_000, ("small", "cpu", "int8")),
        ([], 2, 32_000, ("base", "cpu", "int8")),
        ([gpu(24_000, status="lost")], 8, 32_000, ("small", "cpu", "int8")),
        ([gpu(None)], 8, 32_000, ("small", "cpu", "int8")),
    ],
)
def test_auto_chooses_a_real_model_by_hardware(
    readings: list[Reading], cores: int, memory_mib: int, expected: tuple[str, str, str]
) -> None:
    """ "auto" is a real Whisper model that fits the machine, never the demo; an unknown size is no size."""
    hardware = choice.hardware_of(readings, cores=cores, memory_mib=memory_mib)
    chosen = choice.choose("auto", "auto", "auto", hardware)
    assert chosen[:3] == expected
    assert chosen.reason


def test_what_is_configured_is_not_overruled() -> None:
    """A named model, device and precision are taken as they are."""
    hardware = choice.hardware_of([gpu(24_000)], cores=2, memory_mib=1)
    assert choice.choose("demo", "cpu", "float32", hardware)[:3] == ("demo", "cpu", "float32")


# --- names and words -------------------------------------------------------------------------------------------------------------


def job(path: bytes, **more: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "path": path,
        "language": "en",
        "duration_s": 12.4,
        "mtime_ns": 0,
        "size": 3,
        "attempts": 3,
        "failure_kind": "transient",
        "failure_code": "worker_died",
        "failure_what": "the worker was killed",
        "failure_hint": "convert it",
        "failure_tail": "",
        **more,
    }


def test_names_offered() -> None:
    """The template first, then the whole name, then numbers; below the mirrored directory."""
    offered = list(names(job(b"a/b/talk.mp3"), "{stem}"))
    assert offered[:3] == [b"a/b/talk", b"a/b/talk.mp3", b"a/b/talk.mp3.2"]
    assert next(names(job(b"talk.mp3"), "{date} {stem} {language} {duration}")) == b"1970-01-01 talk en 12"
    assert next(names(job(b"README"), "{stem}")) == b"README"


@given(st.binary(min_size=1, max_size=60).filter(lambda raw: b"/" not in raw and b"\0" not in raw and raw not in (b".", b"..")))
def test_names_are_bytes_and_stay_in_their_directory(name: bytes) -> None:
    """Whatever a file is called, its transcript's name is one component in the same directory, all candidates distinct."""
    offered = list(names(job(b"dir/" + name), "{stem}"))
    assert all(candidate.startswith(b"dir/") and candidate.count(b"/") == 1 for candidate in offered)
    assert len(set(offered[1:])) == len(offered) - 1


def test_an_error_file_says_what_where_and_what_to_do() -> None:
    """The words of an error file: what happened, what to do, whether it is tried again; the same each time."""
    text = error_text(job(b"x/\x1b[31mbad\n.mp3", failure_tail="Fatal Python error"))
    assert "the worker was killed" in text and "convert it" in text and "3 attempts were made" in text and "Fatal Python error" in text
    assert "\x1b" not in text and "\\x1b[31mbad\\x0a.mp3" in text
    assert "It will not be tried again unless the file changes" in error_text(job(b"x", failure_kind="permanent"))


# --- health ----------------------------------------------------------------------------------------------------------------------

FAULTY = Observation(
    disk_free_mib=10,
    memory_used_percent=99.0,
    done_last_hour=1,
    failed_last_hour=9,
    oldest_ready_age_s=1e5,
    inboxes_down=["the inbox is gone"],
    outboxes_down=["full"],
    engine_blocked="no model",
)


def test_every_check_can_fail_and_pass() -> None:
    """Each check stays silent on a healthy machine, and speaks a sentence on a sick one."""
    limits = HealthSettings()
    assert all(fault is None for fault in judge(Observation(disk_free_mib=10_000, memory_used_percent=10.0), limits).values())
    faults = judge(FAULTY, limits)
    assert set(faults) == set(CHECKS)
    assert all(fault for fault in faults.values())


def test_what_is_unknown_is_not_judged() -> None:
    """An absent figure is neither good nor bad."""
    assert all(fault is None for fault in judge(Observation(), HealthSettings()).values())


def test_checks_flip_at_their_threshold() -> None:
    """The threshold itself is still good; one step beyond is not."""
    limits = HealthSettings(disk_free_min_mib=512, memory_used_max_percent=90)
    assert judge(Observation(disk_free_mib=512, memory_used_percent=90.0), limits)["disk_free"] is None
    assert judge(Observation(disk_free_mib=511), limits)["disk_free"]
    assert judge(Observation(memory_used_percent=90.1), limits)["memory"]


def test_a_heal_fires_once_and_cools_down() -> None:
    """A heal fires at the flip, not at every look, again after its pause, and at once after a recovery."""
    heal = CoolDown(pause_s=100)
    fired = [heal.due("inbox", faulty=faulty, now=now) for now, faulty in ((0, True), (10, True), (101, True), (102, False), (103, True))]
    assert fired == [True, False, True, False, True]


EMPTY_STATUS: dict[str, Any] = {
    "at": 0.0,
    "daemon": {"running": False},
    "waits_for": None,
    "outboxes_down": [],
    "model": None,
    "batches": None,
    "counts": {},
    "quality": {"good": 5, "second_pass": 1, "doubtful": 0},
    "running": [],
    "last_hour": {"done": 0, "failed": 0, "audio_s": 0.0, "working_s": 0.0},
    "gpus": [],
    "plan": None,
    "inboxes": [],
    "alerts": [],
}

# --- the desk --------------------------------------------------------------------------------------------------------------------


def test_status_line_is_useful_and_short() -> None:
    """STATUS= says the counts and what is waited for, within what systemd shows."""
    counts = {"seen": 1, "ready": 2, "running": 1, "transcribed": 1, "done": 5, "failed": 1, "cancelled": 0, "gone": 0}
    line = status.status_line(counts, running=1, waits_for="the model is absent", down=["share away"])
    assert line == "1 running, 3 waiting, 1 to publish, 5 done, 1 failed; waiting: the model is absent; share away"
    assert len(status.status_line(counts, running=1, waits_for="x" * 1000, down=[])) <= 400


def test_the_batches_in_a_line() -> None:
    """How full the batches were, how often the encoder ran, how often memory ran out."""
    usual = {"limit": 4, "beam": 5, "frames": 3000, "took_s": 1.0, "rss_mib": 1}
    sums = Counters()
    for windows in (4, 4, 3):
        sums = sums.plus(BatchDone(windows=windows, encoded=windows, encoded_needed=windows, **usual))
    shown = {**EMPTY_STATUS, "batches": sums.told()}
    assert "11 windows in 3 batches (mean 3.7 of 4), encoder 1.00 per window, 0 out of memory" in status.render(shown)
    assert "batches" not in status.render({**EMPTY_STATUS, "batches": Counters().told()})


def test_doubtful_transcripts_are_said() -> None:
    """One line when there are any, none otherwise."""
    assert "doubtful" not in status.render(EMPTY_STATUS)
    shown = {**EMPTY_STATUS, "quality": {"good": 5, "second_pass": 1, "doubtful": 2}}
    assert "2 of the files that are done" in status.render(shown)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59.9, "59 s"), (61, "1 min 01 s"), (3725, "1 h 02 min")])
def test_durations_read_well(seconds: float, text: str) -> None:
    """Durations are said as people say them."""
    assert status.duration(seconds) == text
