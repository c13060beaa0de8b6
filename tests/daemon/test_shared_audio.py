"""Recordings from the field, through the real pipeline: many codecs, containers and languages, noise, silence, and what is broken.

The collection lies beside the checkout and is not part of the project; without it these tests are skipped. With WHISPERD_TEST_MODEL (the
directory or the name of a Whisper model) the same run also tells the word error rate against the references.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from installation import FORMATS, Installation, Run, assert_ledger_and_disk_agree

MODEL = os.environ.get("WHISPERD_TEST_MODEL", "")
WHOLE = ("formats/", "video/", "broken/", "derived/", "noise/", "silence/", "multi/")
SAMPLE = (
    "en/jfk.flac",
    "en/jfk_441khz.m4a",
    "en/hotwords.mp3",
    "en/stereo_diarization.wav",
    "en/OSR_us_000_0034_8k.wav",
    "en/lj/LJ001-0002.flac",
    "en/lj/LJ001-0002.mp3",
    "en/lj/LJ002-0020.wav",
    "en/libri/61-70968-0000.flac",
    "en/cv/common_voice_en_22058267.mp3",
    "en/fsdd/0_jackson_0.wav",
    "en/brooklyn_silence_padding.wav",
    "en/kennedy_moon.mp3",
    "de/riva_de-DE_sample.wav",
    "es/13697_11991_000000.opus",
    "es/riva_es-US_sample.wav",
    "fr/uberi_french.aiff",
    "ja/whisperkit_ja.wav",
    "lv/buzz_latvian.wav",
    "ru/riva_ru-RU_sample.wav",
    "sv/se10x016_u0016001.wav",
    "zh/uberi_chinese.flac",
)
UNREADABLE = "not audio or video that can be read"
BROKEN = {
    "broken/empty_0byte.wav": r"the file is empty \(0 bytes\)",
    "broken/invalid_22byte.wav": r"cut off: 22 of the \d+ bytes",
    "broken/header_only_44byte.wav": r"no sound in it \(0\.0 s\)",
    "broken/pydub_empty_44byte.wav": r"no sound in it \(0\.0 s\)",
    "broken/ps_awful.wav": r"1092676 samples a second",
    "broken/ps_bad.wav": UNREADABLE,
    "broken/ps_evil.wav": UNREADABLE,
    "broken/missing_wav_header.wav": UNREADABLE,
    "derived/broken_truncated_half.flac": r"cut off: 4\.\d+ s of the 11\.00? s it promises",
    "derived/broken_growing.wav": r"cut off: 200000 of the 352078 bytes",
    "derived/broken_no_moov.mp4": r"an MP4 whose index is missing or damaged",
    "derived/broken_random.mp3": UNREADABLE,
    "derived/broken_text.wav": r"it is a text file",
    "derived/broken_png.m4a": r"it is a picture",
    "video/av1_video_only.mkv": r"there is no sound in the file \(it holds video\)",
}
NO_NAME_OF_A_RECORDING = ("formats/goforward.raw",)
SHORTER_THAN_LISTED = {
    "formats/sonnet1_head.aac": 9.01,  # listed as FFmpeg guesses it; a bare stream has no length of its own
    "video/nasa_13013.mp4": 13.06,  # the second of its tracks is longer
    "derived/jfk_video.mp4": 11.0,  # the picture goes on after the sound
    "derived/jfk_video.mkv": 11.0,
}
BLAMING_US = ("worker_died", "engine_error", "windows_missing", "out_of_memory")


class Collection:
    """The chosen recordings after one run."""

    def __init__(self, place: Installation, rows: dict[str, dict[str, str]], done: Run) -> None:
        self.place = place
        self.rows = rows
        self.run = done
        self.jobs = {os.fsdecode(path): job for path, job in place.jobs().items()}
        with place.ledger() as ledger:
            published = {os.fsdecode(path): ledger.publications(job["id"]) for path, job in place.jobs().items()}
        self._bases = {
            path: os.fsdecode(item["path"]).removesuffix(".json")
            for path, items in published.items()
            for item in items
            if item["format"] == "json"
        }

    def transcript(self, path: str) -> dict[str, Any]:
        return self.place.transcript(self._bases[path])


@pytest.fixture(scope="module")
def collection(shared_audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    with (shared_audio / "manifest.csv").open(encoding="utf-8", newline="") as file:
        listed = {row["file"]: row for row in csv.DictReader(file)}
    rows = {path: row for path, row in listed.items() if path in SAMPLE or path.startswith(WHOLE)}
    assert len(rows) >= 80
    place = Installation(tmp_path_factory.mktemp("shared") / "home")
    if MODEL:
        place.write_config(engine={"model": MODEL, "offline": os.path.isabs(MODEL)}, transcription={"language": "auto"})
    for path in rows:
        place.drop(shared_audio / path, path)
    return Collection(place, rows, place.run_once(timeout_s=36_000 if MODEL else 280))


@pytest.mark.timeout(0 if MODEL else 300)
def test_nothing_crashes(collection: Collection) -> None:
    """Every recording ends without a second attempt, done or failed by its own fault; no worker dies, nothing unforeseen is met."""
    assert collection.run.code == 1, collection.run.err[-4000:]
    assert set(collection.rows) - set(collection.jobs) == set(NO_NAME_OF_A_RECORDING)
    odd = {path: (job["state"], job["attempts"], job["failure_code"]) for path, job in collection.jobs.items() if job["attempts"] > 1}
    assert not odd
    assert not {job["failure_code"] for job in collection.jobs.values()} & set(BLAMING_US)
    assert "Traceback" not in collection.run.err and "killed by" not in collection.run.err
    assert_ledger_and_disk_agree(collection.place)


def test_what_is_broken_fails_for_its_true_reason_and_nothing_else_does(collection: Collection) -> None:
    """Empty, cut off, silent without saying so, no media at all: each error file names what it is. All others have their transcript."""
    failed = {path: job["failure_what"] for path, job in collection.jobs.items() if job["state"] == "failed"}
    assert set(failed) == set(BROKEN)
    for path, reason in BROKEN.items():
        assert re.search(reason, failed[path]), (path, failed[path])
        assert failed[path] in collection.place.error_file(path)
        assert collection.jobs[path]["failure_kind"] == "permanent"


def test_nothing_is_lost_silently(collection: Collection) -> None:
    """What is called done was heard to its end: the decoded length is the listed one, for every codec and container."""
    short = {}
    for path, job in collection.jobs.items():
        listed = SHORTER_THAN_LISTED.get(path) or float(collection.rows[path]["duration_s"] or 0)
        if job["state"] == "done" and abs(job["duration_s"] - listed) > 0.3:
            short[path] = (job["duration_s"], listed)
    assert not short


def test_the_same_speech_is_found_in_every_container(collection: Collection) -> None:
    """One speech in fifteen wrappings, telephone codecs among them: the voice activity found differs by no more than two seconds."""
    wrapped = [path for path in collection.jobs if re.fullmatch(r"derived/jfk[_.](?!2_audio|late|noise).*", path)]
    assert len(wrapped) >= 12
    speech = {path: collection.transcript(path)["source"]["speech_s"] for path in wrapped}
    assert max(speech.values()) - min(speech.values()) < 2.0, speech


def test_words_after_a_long_silence_have_their_place(collection: Collection) -> None:
    """Ninety seconds of silence come first: no segment begins before them."""
    document = collection.transcript("derived/jfk_late_90s_silence_first.flac")
    assert document["segments"] and all(segment["start"] > 89.0 for segment in document["segments"])


def test_nobody_speaks_in_silence(collection: Collection) -> None:
    """Digital silence has no speech in it and gives no word, however long it is."""
    document = collection.transcript("derived/silence_60s.flac")
    assert (document["source"]["speech_s"], document["text"]) == (0.0, "")


def test_every_format_is_written(collection: Collection) -> None:
    """Each recording that is done stands in the outbox in all configured formats, below the sub-directory it came from."""
    files = {os.fsdecode(path) for path in collection.place.published()}
    for path, base in collection._bases.items():
        assert os.path.dirname(base) == os.path.dirname(path)
        assert {f"{base}.{name}" for name in FORMATS} <= files


def test_the_track_with_speech_is_chosen(collection: Collection) -> None:
    """Two audio tracks, the first silent: the transcript is that of the second."""
    assert collection.transcript("derived/jfk_2_audio_tracks.mkv")["source"]["speech_s"] > 5.0


@pytest.mark.skipif(not MODEL, reason="WHISPERD_TEST_MODEL names no Whisper model; the demo model knows a few hundred words only")
def test_word_error_rate(collection: Collection, capsys: pytest.CaptureFixture[str]) -> None:
    """With a real model: the error rate against the exact references, by language (characters instead of words where none are written)."""
    said, heard = defaultdict(list), defaultdict(list)
    for path, row in collection.rows.items():
        exact = row["reference"] and row["reference_kind"].startswith("exact") and "|" not in row["reference"]
        if exact and path in collection.jobs and collection.jobs[path]["state"] == "done" and row["language"].isalpha():
            reference, hypothesis = plain(row["reference"]), plain(collection.transcript(path)["text"])
            said[row["language"]].append(reference)
            heard[row["language"]].append(hypothesis)
    rates = {language: error_rate(language, said[language], heard[language]) for language in said}
    with capsys.disabled():
        print(f"\nerror rates of {MODEL} on the shared recordings:")
        for language, rate in sorted(rates.items()):
            print(f"  {language}  {100 * rate:5.1f} %  ({len(said[language])} recordings)")
    assert rates["en"] < 0.6


def plain(text: str) -> str:
    """Lower case, without punctuation."""
    folded = unicodedata.normalize("NFKC", text).lower().replace("'", "")
    return " ".join("".join(char if char.isalnum() else " " for char in folded).split())


def error_rate(language: str, said: list[str], heard: list[str]) -> float:
    jiwer = pytest.importorskip("jiwer", reason="jiwer is not installed; it counts the word errors")
    if language in ("zh", "ja"):
        return float(jiwer.cer([text.replace(" ", "") for text in said], [text.replace(" ", "") for text in heard]))
    return float(jiwer.wer(said, heard))
