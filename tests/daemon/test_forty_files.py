"""The main job, whole: a folder of forty mixed files, one `whisperd run --once`, every good one transcribed, every bad one explained."""

from __future__ import annotations

import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from installation import FORMATS, Installation, assert_ledger_and_disk_agree
from recordings import SENTENCES, Studio, cut, likeness, nearest, samples_of, wav_header, write_wav

from whisperd.errors import printable


class Shape(NamedTuple):
    """One kind of recording: where it is dropped, and how ffmpeg makes it."""

    path: bytes
    options: tuple[str, ...] = ()
    video: tuple[str, ...] = ()


PICTURE = ("-c:v", "mpeg4", "-q:v", "20")
VP8 = ("-c:v", "libvpx", "-b:v", "60k", "-deadline", "realtime", "-cpu-used", "8")

GOOD = (
    Shape(b"meeting.wav"),
    Shape(b"two names.mp3", ("-b:a", "48k")),
    Shape(b"two names.wav", ("-c:a", "pcm_s24le", "-ar", "48000")),
    Shape(b"studio/lossless.flac", ("-ar", "96000")),
    Shape(b"studio/surround.flac", ("-ac", "6")),
    Shape(b"studio/apple.aiff"),
    Shape(b"studio/float.wav", ("-c:a", "pcm_f32le")),
    Shape(b"studio/pack.wv"),
    Shape(b"studio/core.caf"),
    Shape(b"phone/memo.m4a", ("-c:a", "aac")),
    Shape(b"phone/voice note.opus", ("-c:a", "libopus", "-b:a", "24k")),
    Shape(b"phone/telephone.wav", ("-c:a", "pcm_mulaw", "-ar", "8000")),
    Shape(b"phone/gsm.wav", ("-c:a", "libgsm_ms", "-ar", "8000")),
    Shape(b"phone/clip.3gp", ("-c:a", "aac", "-ar", "16000")),
    Shape(b"phone/old/eight bit.wav", ("-c:a", "pcm_u8", "-ar", "11025")),
    Shape(b"web/chat.ogg", ("-c:a", "libvorbis")),
    Shape(b"web/stream.aac", ("-c:a", "aac", "-b:a", "48k")),
    Shape(b"web/browser.webm", ("-c:a", "libopus")),
    Shape(b"web/film.webm", ("-c:a", "libvorbis"), VP8),
    Shape(b"web/media.wma", ("-c:a", "wmav2")),
    Shape(b"web/sound.mka", ("-c:a", "libopus")),
    Shape(b"web/line\nbreak.mp3", ("-b:a", "48k")),
    Shape(b"films/film.mkv", ("-c:a", "aac"), PICTURE),
    Shape(b"films/film.mp4", ("-c:a", "aac", "-ac", "2"), PICTURE),
    Shape(b"films/camera.mov", ("-c:a", "pcm_s16le"), PICTURE),
    Shape(b"films/old.avi", ("-c:a", "libmp3lame"), PICTURE),
    Shape(b"films/broadcast.ts", ("-c:a", "mp2"), ("-c:v", "mpeg2video", "-r", "25")),
    Shape("films/müßig – 音.mp3".encode(), ("-ac", "2", "-b:a", "64k")),
    Shape(b"films/not \xff\xfe unicode.flac"),
    Shape(b"films/-rf $(reboot);'\".wav", ("-ac", "2")),
)

BAD = {
    b"bad/empty.wav": "the file is empty (0 bytes)",
    b"bad/letter.mp3": "it is a text file",
    b"bad/cut off.wav": r"the recording is cut off: \d+ of the \d+ bytes it promises are there",
    b"bad/cut off.flac": r"the recording is cut off: [\d.]+ s of the [\d.]+ s it promises are there",
    b"bad/cut off.m4a": "it is an MP4 whose index is missing or damaged",
    b"bad/header only.wav": r"no sound in it \(0\.0 s\)",
    b"bad/noise.ogg": "not audio or video that can be read",
    b"bad/mute film.mp4": r"there is no sound in the file \(it holds video\)",
    b"bad/picture.mp3": "it is a picture",
}
SILENT = b"quiet/silent.wav"
SAID = dict(zip((shape.path for shape in GOOD), SENTENCES, strict=False))


def record(studio: Studio, shape: Shape) -> Path:
    suffix = os.path.splitext(os.fsdecode(shape.path))[1]
    return studio.encode(SAID[shape.path], suffix, shape.options, video=shape.video)


def break_all(studio: Studio, home: Path) -> dict[bytes, Path]:
    """One file for each way to be bad."""
    home.mkdir()
    text = "send the invoice to maria on friday"
    samples = samples_of(studio.say(text))
    made = {path: home / os.fsdecode(os.path.basename(path)) for path in BAD}
    made[b"bad/empty.wav"].touch()
    made[b"bad/letter.mp3"].write_text("Dear Maria,\nthe invoice was sent on friday.\n" * 40)
    write_wav(made[b"bad/cut off.wav"], samples[: len(samples) // 2], promised=len(samples))
    cut(studio.encode(text, ".flac"), made[b"bad/cut off.flac"], 0.5)
    cut(studio.encode(text, ".m4a", ("-c:a", "aac")), made[b"bad/cut off.m4a"], 0.5)
    made[b"bad/header only.wav"].write_bytes(wav_header(0))
    made[b"bad/noise.ogg"].write_bytes(bytes(37 * number * number % 251 for number in range(60_000)))
    shutil.copyfile(studio.film_without_sound(), made[b"bad/mute film.mp4"])
    made[b"bad/picture.mp3"].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    return made


@pytest.fixture(scope="module")
def forty(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The folder, after one run."""
    home = tmp_path_factory.mktemp("forty")
    place = Installation(home / "home")
    with ThreadPoolExecutor(2) as pool:
        recordings = dict(zip((shape.path for shape in GOOD), pool.map(lambda shape: record(studio, shape), GOOD), strict=True))
    recordings |= {SILENT: studio.silence(2.0), **break_all(studio, home / "broken")}
    assert len(recordings) == 40
    for path, recording in recordings.items():
        place.drop(recording, path)
    done = place.run_once()
    assert done.code == 1, (done.code, done.err[-4000:])
    return place


def base_of(path: bytes, place: Installation) -> bytes:
    """The name under which the transcript of a source stands, without the extension."""
    with place.ledger() as ledger:
        (base,) = {
            bytes(item["path"]).removesuffix(b".json") for item in ledger.publications(place.job(path)["id"]) if item["format"] == "json"
        }
    return base


@pytest.mark.timeout(180)
def test_every_good_recording_has_its_own_transcript(forty: Installation) -> None:
    """Thirty formats, names and places: each is done at the first attempt and holds the sentence that was said in it, not another's."""
    jobs = forty.jobs()
    heard = {}
    for path in SAID:
        job = jobs[path]
        assert (job["state"], job["attempts"]) == ("done", 1), (path, job["state"], job["failure_what"])
        heard[path] = forty.transcript(base_of(path, forty))["text"]
    mixed_up = {path: (SAID[path], text) for path, text in heard.items() if nearest(text, SENTENCES) != SAID[path]}
    assert not mixed_up
    assert sum(likeness(SAID[path], text) for path, text in heard.items()) / len(heard) > 0.9


def test_every_transcript_stands_in_all_formats_beside_the_mirrored_tree(forty: Installation) -> None:
    """The outbox mirrors the sub-directories; each good source has txt, srt, vtt, tsv and json there, which agree with each other."""
    assert_ledger_and_disk_agree(forty)
    files = set(forty.published())
    for path in (*SAID, SILENT):
        base = base_of(path, forty)
        assert os.path.dirname(base) == os.path.dirname(path)
        assert {base + b"." + name.encode() for name in FORMATS} <= files
    assert len(files) == len(FORMATS) * (len(SAID) + 1) + len(BAD), "nothing else is left behind"


def test_two_sources_of_one_stem_get_two_names(forty: Installation) -> None:
    """`two names.mp3` and `two names.wav` both have their transcript: one as {stem}, the other as {name}, each with its own words."""
    bases = {base_of(path, forty): SAID[path] for path in (b"two names.mp3", b"two names.wav")}
    assert b"two names" in bases and len(bases) == 2
    assert set(bases) <= {b"two names", b"two names.mp3", b"two names.wav"}
    for base, said in bases.items():
        assert nearest(forty.transcript(base)["text"], SENTENCES) == said


def test_silence_is_no_failure_and_has_no_words(forty: Installation) -> None:
    """A recording in which nobody speaks is done; its transcript is whole, and empty."""
    document = forty.transcript(b"quiet/silent")
    assert (document["segments"], document["text"], document["source"]["speech_s"]) == ([], "", 0.0)
    assert document["source"]["duration_s"] == pytest.approx(2.0, abs=0.01)


@pytest.mark.parametrize("path", BAD, ids=lambda path: os.path.basename(path).decode().replace(" ", "-"))
def test_every_bad_file_has_an_error_file_that_names_the_true_reason(forty: Installation, path: bytes) -> None:
    """What cannot be transcribed fails before or at the first attempt, and the file beside the transcripts says why and what to do."""
    job = forty.job(path)
    assert (job["state"], job["failure_kind"]) == ("failed", "permanent") and job["attempts"] <= 1
    text = forty.error_file(path)
    pattern = BAD[path]
    assert pattern in text or re.search(pattern, text), text
    assert text.startswith(f"{printable(os.path.basename(path))} could not be transcribed.")
    assert "What to do:" in text and "will not be tried again unless the file changes" in text
    assert "Traceback" not in text and "Errno" not in text


def test_a_second_run_has_nothing_to_do(forty: Installation) -> None:
    """`run --once` again: nothing is transcribed or published anew, and, since nothing failed in it, it exits 0."""
    before = {path: os.stat(os.path.join(os.fsencode(forty.outbox), path)).st_mtime_ns for path in forty.published()}
    rows = forty.jobs()
    done = forty.run_once()
    assert done.code == 0, done.err[-2000:]
    assert forty.jobs() == rows
    assert {path: os.stat(os.path.join(os.fsencode(forty.outbox), path)).st_mtime_ns for path in forty.published()} == before
    assert_ledger_and_disk_agree(forty)


def test_good_recordings_alone_exit_0(place: Installation, studio: Studio) -> None:
    """Where nothing fails, the exit status says so; the log names no error."""
    for number in range(2):
        place.drop(studio.say(SENTENCES[number]), f"{number}.wav")
    done = place.run_once()
    assert done.code == 0, done.err[-2000:]
    assert "ERROR" not in done.err and "Traceback" not in done.err
    assert_ledger_and_disk_agree(place)


def test_an_empty_inbox_exits_0(place: Installation) -> None:
    """Nothing to do is no failure."""
    assert place.run_once().code == 0
    assert place.published() == {}
