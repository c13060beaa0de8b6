"""Recordings as they come: caps, what is no recording, what is cut off, and files that would make a decoder open other files."""

from __future__ import annotations

import ctypes
import os
import random
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from recordings import SENTENCES, Studio, cut, need_tools, run, samples_of, wav_header, write_wav

from whisperd.engine.audio import RATE_HZ, Recording, sha256_of
from whisperd.engine.container import behind_id3, frame_bytes, looks_like
from whisperd.engine.media import DEMUXERS, Caps, MediaDamaged, MediaRefused, Source, examine
from whisperd.engine.timeline import Timeline, start_offset_s
from whisperd.engine.tracks import open_recording

USUAL = Caps(duration_max_s=3600.0, channels_max=8, rate_max_hz=192_000)
TEXT = SENTENCES[2]


@contextmanager
def opened(path: Path, caps: Caps = USUAL, **choice: Any) -> Iterator[Recording]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        recording = open_recording(descriptor, caps, **choice)
        try:
            yield recording
        finally:
            recording.close()
    finally:
        os.close(descriptor)


def heard(path: Path, caps: Caps = USUAL, **choice: Any) -> np.ndarray:
    """All samples of a recording, mixed. Raises MediaRefused, MediaDamaged."""
    with opened(path, caps, **choice) as recording:
        (samples,) = np.concatenate(list(recording.blocks()), axis=1)
        assert recording.duration_s == len(samples) / RATE_HZ
        return samples


def doubts(path: Path) -> tuple[str, ...]:
    """What is doubtful about a recording that is read to its end."""
    with opened(path) as recording:
        for _ in recording.blocks():
            pass
        return recording.doubts


def length_s(path: Path) -> float:
    return len(heard(path)) / RATE_HZ


# --- good ones -----------------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_file(studio: Studio) -> None:
    """16 kHz mono PCM comes out as it is, in blocks of about two seconds, between -1 and 1."""
    path = studio.say(TEXT)
    with opened(path) as recording:
        blocks = list(recording.blocks())
    assert all(block.dtype == np.float32 and abs(block).max() <= 1.0 for block in blocks)
    assert all(len(block) == 1 and 2 * RATE_HZ <= block.shape[1] <= 3 * RATE_HZ for block in blocks[:-1])
    assert np.array_equal(np.concatenate(blocks, axis=1)[0], np.frombuffer(samples_of(path), dtype=np.int16).astype(np.float32) / 32768.0)


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".flac", ("-ar", "96000", "-ac", "6")),
        (".mp3", ("-ar", "44100", "-ac", "2", "-b:a", "64k")),
        (".m4a", ("-c:a", "aac")),
        (".ogg", ("-c:a", "libopus")),
        (".wav", ("-c:a", "pcm_mulaw", "-ar", "8000")),
        (".wav", ("-c:a", "adpcm_ms")),
    ],
    ids=lambda value: value if isinstance(value, str) else value[1],
)
def test_every_codec_gives_the_whole_length(suffix: str, options: tuple[str, ...], studio: Studio) -> None:
    """Whatever the codec, rate and channels: the length is that of the speech, and it can be heard."""
    said, there = heard(studio.say(TEXT)), heard(studio.encode(TEXT, suffix, options))
    assert len(there) == pytest.approx(len(said), abs=0.1 * RATE_HZ)
    assert 0.25 < np.sqrt(np.mean(there**2)) / np.sqrt(np.mean(said**2)) < 1.5  # a mix of six channels is quieter


def test_a_picture_in_an_mp3_is_no_harm(studio: Studio) -> None:
    """An MP3 with cover art is the sound in it."""
    assert length_s(studio.with_cover(TEXT)) == pytest.approx(length_s(studio.say(TEXT)), abs=0.08)


def test_a_film_is_its_sound(studio: Studio) -> None:
    """Of a video the audio track is read, whatever is in the picture."""
    film = studio.encode(TEXT, ".mkv", ("-c:a", "aac"), video=("-c:v", "mpeg4"))
    assert length_s(film) == pytest.approx(length_s(studio.say(TEXT)), abs=0.3)


def test_a_picture_that_goes_on_after_the_sound_is_no_loss(studio: Studio, tmp_path: Path) -> None:
    """The container is longer than its audio track, since the picture is: nothing is missing."""
    film = tmp_path / "film.mkv"
    picture = ("-f", "lavfi", "-i", "testsrc=size=96x64:rate=5:duration=12", "-c:v", "mpeg4")
    run("ffmpeg", "-loglevel", "error", "-i", studio.say(TEXT), *picture, film)
    assert length_s(film) == pytest.approx(length_s(studio.say(TEXT)), abs=0.3)


@pytest.mark.parametrize("suffix", [".mp3", ".aac", ".ts", ".ac3"])
def test_a_recording_may_change_its_shape_midway(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Two pieces of different rate and channels, joined as broadcasts and recorders do: both are heard."""
    codec = {".mp3": ("-c:a", "libmp3lame"), ".aac": ("-c:a", "aac"), ".ts": ("-c:a", "mp2"), ".ac3": ("-c:a", "ac3")}[suffix]
    first = studio.encode(TEXT, suffix, (*codec, "-ar", "48000", "-ac", "2"))
    second = studio.encode(TEXT, suffix, (*codec, "-ar", "32000", "-ac", "1"))
    joined = tmp_path / f"joined{suffix}"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert length_s(joined) == pytest.approx(2 * length_s(studio.say(TEXT)), abs=0.3)


@pytest.mark.parametrize("suffix", [".mp3", ".aac"])
def test_a_guessed_length_is_no_promise(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """A bare stream that begins quietly and goes on loudly: FFmpeg guesses a length many times too long. The recording is whole, and
    is not refused for being too long either."""
    silence, speech = bytes(2 * RATE_HZ * 20), samples_of(studio.say(TEXT))
    source = write_wav(tmp_path / "source.wav", silence + speech * 3)
    bare = tmp_path / f"bare{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", source, "-write_xing", "0", "-id3v2_version", "0", "-ar", "44100", "-q:a", "0", bare)
    with opened(bare) as recording:
        assert recording.declared_s is not None and recording.declared_s > 1.5 * length_s(source), (
            "the guess is too long, or this tests nothing"
        )
    assert len(heard(bare, USUAL._replace(duration_max_s=40.0))) == pytest.approx(len(heard(source)), abs=0.1 * RATE_HZ)


@pytest.mark.parametrize("promised", [0, 0x7FFFF000, 0x80000000, 0xFFFFFFFF], ids=hex)
def test_a_wav_written_into_a_pipe_is_whole(promised: int, studio: Studio, tmp_path: Path) -> None:
    """arecord, sox and FFmpeg write a length that means "unknown" when they cannot go back to the beginning."""
    samples = samples_of(studio.say(TEXT))
    piped = tmp_path / "piped.wav"
    header = bytearray(wav_header(len(samples)))
    header[4:8] = header[40:44] = promised.to_bytes(4, "little")
    piped.write_bytes(bytes(header) + samples)
    assert length_s(piped) == pytest.approx(length_s(studio.say(TEXT)), abs=0.001)


@pytest.mark.parametrize("muxer", ["asf", "matroska", "caf", "au", "flac", "wav"])
def test_what_ffmpeg_writes_into_a_pipe_is_whole(muxer: str, studio: Studio, tmp_path: Path) -> None:
    """Containers whose header was written before their size was known."""
    piped = tmp_path / "piped"
    run("ffmpeg", "-loglevel", "error", "-i", studio.say(TEXT), "-f", muxer, "pipe:1", stdout=piped)
    assert length_s(piped) == pytest.approx(length_s(studio.say(TEXT)), abs=0.2)


def test_the_digest_is_of_the_whole_file(studio: Studio) -> None:
    """Wherever a reader stands in the file."""
    import hashlib

    path = studio.say(TEXT)
    descriptor = os.open(path, os.O_RDONLY)
    os.lseek(descriptor, 100, os.SEEK_SET)
    assert sha256_of(descriptor) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert os.lseek(descriptor, 0, os.SEEK_CUR) == 100
    os.close(descriptor)


def test_a_shared_descriptor_is_read_from_its_beginning(studio: Studio) -> None:
    """The daemon's descriptor may stand anywhere: a second reading is the same as the first."""
    descriptor = os.open(studio.say(TEXT), os.O_RDONLY)
    lengths = []
    for _ in range(2):
        recording = Recording(descriptor, USUAL)
        lengths.append(sum(block.shape[1] for block in recording.blocks()))
        recording.close()
    os.close(descriptor)
    assert lengths[0] == lengths[1] > 0


# --- the very samples of faster-whisper -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "options"),
    [
        (".wav", ("-ar", "44100", "-ac", "2")),
        (".flac", ("-ar", "96000", "-ac", "6")),
        (".mp3", ("-ar", "44100", "-ac", "2")),
        (".m4a", ("-c:a", "aac", "-ar", "48000")),
        (".ogg", ("-c:a", "libvorbis", "-ar", "22050")),
        (".opus", ("-c:a", "libopus")),
        (".tta", ("-ar", "8000")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_samples_are_those_that_faster_whisper_decodes(suffix: str, options: tuple[str, ...], studio: Studio, tmp_path: Path) -> None:
    """Bit for bit, whatever codec, rate and channels: what differs in a transcript is not for the decoder to explain."""
    from faster_whisper.audio import decode_audio

    path = tmp_path / f"long{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), *options, path)
    assert np.array_equal(heard(path), decode_audio(str(path)))


# --- channels ------------------------------------------------------------------------------------------------------------------


def two_voices(studio: Studio, path: Path, *options: str) -> Path:
    """One sentence on the left, another on the right, one after the other."""
    graph = "[0]apad=pad_dur=4[l];[1]adelay=4000[r];[l][r]join=inputs=2:channel_layout=stereo"
    run("ffmpeg", "-loglevel", "error", "-i", studio.say(SENTENCES[0]), "-i", studio.say(TEXT), "-filter_complex", graph, *options, path)
    return path


@pytest.mark.parametrize(("suffix", "options"), [(".wav", ("-ar", "44100")), (".mp3", ()), (".m4a", ("-c:a", "aac"))])
def test_channels_are_kept_apart(suffix: str, options: tuple[str, ...], studio: Studio, tmp_path: Path) -> None:
    """With `split_channels` each channel comes by itself, whatever the codec: what is said on the left is not on the right."""
    stereo = two_voices(studio, tmp_path / f"two{suffix}", *options)
    with opened(stereo, split_channels=True) as recording:
        assert recording.channels == 2
        left, right = np.concatenate(list(recording.blocks()), axis=1)
    third = len(left) // 3
    assert np.abs(left[:third]).max() > 0.1 > 100 * np.abs(right[:third]).max()
    assert np.abs(right[-third:]).max() > 0.1 > 100 * np.abs(left[-third:]).max()
    assert abs(np.concatenate(list(_blocks(stereo)), axis=1)[0] - (left + right) / 2).max() < 1e-3


def _blocks(path: Path, **choice: Any) -> list[np.ndarray]:
    with opened(path, **choice) as recording:
        return list(recording.blocks())


def test_one_voice_on_two_channels_is_heard_once(studio: Studio) -> None:
    """Dual mono, as most "stereo" is: the second channel is silence. What has one channel gives one."""
    double = np.concatenate(_blocks(studio.encode(TEXT, ".wav", ("-ac", "2")), split_channels=True), axis=1)
    mono = heard(studio.say(TEXT))
    assert double.shape == (2, len(mono)) and not double[1].any()
    assert np.abs(double[0]).max() == pytest.approx(np.abs(mono).max(), rel=0.5)
    (single,) = np.concatenate(_blocks(studio.say(TEXT), split_channels=True), axis=1)
    assert np.array_equal(single, mono)


@pytest.mark.parametrize(("channels", "kept"), [(1, 1), (2, 2), (3, 3), (6, 6), (8, 8), (12, 1)])
def test_up_to_eight_channels_are_kept_apart(channels: int, kept: int, studio: Studio, tmp_path: Path) -> None:
    """Also where the file names no loudspeakers for them; more than eight are mixed."""
    sound = np.frombuffer(samples_of(studio.say(TEXT)), dtype=np.int16)
    shifted = np.stack([np.roll(sound, 3000 * number) for number in range(channels)], axis=1)
    path = write_wav(tmp_path / "many.wav", shifted.tobytes(), channels=channels)
    with opened(path, USUAL._replace(channels_max=16), split_channels=True) as recording:
        assert recording.channels == kept
        together = np.concatenate(list(recording.blocks()), axis=1)
    assert together.shape == (kept, len(sound))
    if kept == channels:
        assert np.array_equal(together, shifted.T.astype(np.float32) / 32768.0)


def test_a_film_changes_from_stereo_to_mono(studio: Studio, tmp_path: Path) -> None:
    """Kept apart, there are as many channels as at the beginning to the end."""
    pieces = [studio.encode(TEXT, ".mp3", ("-c:a", "libmp3lame", "-ar", "48000", "-ac", count)) for count in ("2", "1")]
    joined = tmp_path / "joined.mp3"
    joined.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    assert {block.shape[0] for block in _blocks(joined, split_channels=True)} == {2}


# --- which track ---------------------------------------------------------------------------------------------------------------


def with_tracks(path: Path, *tracks: tuple[Path, str], default: int = 0) -> Path:
    """A container with these recordings as tracks, each with a language tag."""
    command: list[str | Path] = ["ffmpeg", "-loglevel", "error"]
    for sound, _ in tracks:
        command += ["-i", sound]
    for number, (_, language) in enumerate(tracks):
        command += ["-map", f"{number}:a", f"-metadata:s:a:{number}", f"language={language}"]
        command += [f"-disposition:a:{number}", "default" if number == default else "0"]
    run(*command, "-c:a", "aac", path)
    return path


def chosen(path: Path, **choice: Any) -> int:
    with opened(path, **choice) as recording:
        return recording.track


@pytest.mark.parametrize("suffix", [".mkv", ".mp4"])
def test_the_track_with_speech_is_chosen(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Silence on the first track, which players start with, somebody speaking on the second: that one is read, from its beginning."""
    said = studio.long(SENTENCES[:6])
    path = with_tracks(tmp_path / f"two{suffix}", (studio.silence(20.0), "eng"), (said, "eng"))
    with opened(path) as recording:
        assert (recording.track, recording.tracks) == (2, 2)
        (samples,) = np.concatenate(list(recording.blocks()), axis=1)
    assert len(samples) == pytest.approx(len(heard(said)), abs=0.2 * RATE_HZ)
    assert np.abs(samples[: 2 * RATE_HZ]).max() > 0.1


def test_speech_is_found_far_behind(studio: Studio, tmp_path: Path) -> None:
    """Two minutes of silence come first on each track: a moment here and there is listened to, not the beginning alone."""
    late = tmp_path / "late.wav"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:10]), "-af", "adelay=120000,apad=whole_dur=200", late)
    assert chosen(with_tracks(tmp_path / "late.mkv", (studio.silence(200.0), "und"), (late, "und"))) == 2


def test_the_language_asked_for_goes_before_speech(studio: Studio, tmp_path: Path) -> None:
    """Tracks with the language's tag are preferred, in whichever of its codes it is written; an unknown wish is no obstacle."""
    short, long = studio.say(TEXT), studio.long(SENTENCES[:6])
    path = with_tracks(tmp_path / "three.mkv", (long, "eng"), (short, "ger"), (short, "fre"))
    assert chosen(path, language="de") == 2
    assert chosen(path, language="fr") == 3
    assert chosen(path, language="en") == chosen(path, language="cy") == chosen(path) == 1


def test_among_equals_the_default_track_is_taken(studio: Studio, tmp_path: Path) -> None:
    """The same words on three tracks: the one that players start with."""
    said = studio.long(SENTENCES[:3])
    assert chosen(with_tracks(tmp_path / "same.mkv", (said, "und"), (said, "und"), (said, "und"), default=1)) == 2


def test_a_track_is_taken_by_its_number(studio: Studio, tmp_path: Path) -> None:
    """Whatever is on it; one that is not there is refused in words."""
    path = with_tracks(tmp_path / "two.mkv", (studio.long(SENTENCES[:3]), "eng"), (studio.silence(5.0), "ger"))
    assert not np.abs(heard(path, track="2")).max() > 0.01
    assert chosen(path, track="1", language="de") == 1
    for wrong in ("3", "0", "first"):
        with pytest.raises(MediaRefused, match=rf"no audio track {wrong} \(it has 2\)") as refusal:
            chosen(path, track=wrong)
        assert refusal.value.hint


def test_one_track_is_not_listened_to(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is nothing to choose, nothing is read twice."""
    monkeypatch.setattr("whisperd.engine.audio.spoken", None)
    assert chosen(studio.say(TEXT), language="de") == 1


# --- caps ----------------------------------------------------------------------------------------------------------------------


def test_longer_than_allowed_is_refused_before_it_is_read(studio: Studio) -> None:
    """A header that promises too much is enough; the hint names the setting."""
    with pytest.raises(MediaRefused, match="longer") as refusal, opened(studio.say(TEXT), USUAL._replace(duration_max_s=1.0)):
        pass
    assert "engine.duration_max_s" in refusal.value.hint


def test_longer_than_it_says_is_refused_when_it_is_reached(studio: Studio, tmp_path: Path) -> None:
    """A stream that says nothing of its length, or the wrong thing, is read only as far as allowed."""
    piped = tmp_path / "piped.flac"
    run("ffmpeg", "-loglevel", "error", "-i", studio.silence(30.0), "-f", "flac", "pipe:1", stdout=piped)
    with opened(piped, USUAL._replace(duration_max_s=5.0)) as recording:
        assert recording.declared_s is None
        with pytest.raises(MediaRefused, match="longer"):
            list(recording.blocks())
        assert recording.duration_s < 10.0


@pytest.mark.parametrize(
    ("channels", "rate", "word"), [(300, 16_000, "300 channels"), (9, 48_000, "9 channels"), (1, 4_000_000, "4000000 samples a second")]
)
def test_more_channels_or_samples_than_allowed(channels: int, rate: int, word: str, tmp_path: Path) -> None:
    """Refused by the header, before anything is decoded."""
    path = write_wav(tmp_path / "many.wav", bytes(2 * channels * 2000), channels=channels, rate=rate)
    with pytest.raises(MediaRefused, match=word), opened(path):
        pass


# --- what holds no recording ---------------------------------------------------------------------------------------------------


def test_nothing_is_in_it(tmp_path: Path) -> None:
    """Zero bytes, and a header with nothing behind it: each is said so."""
    empty = tmp_path / "empty.wav"
    empty.touch()
    with pytest.raises(MediaRefused, match=r"empty \(0 bytes\)"):
        heard(empty)
    with pytest.raises(MediaRefused, match=r"no sound in it \(0\.0 s\)"):
        heard(write_wav(tmp_path / "header.wav", b""))


def test_a_film_without_sound(studio: Studio) -> None:
    """It holds video, and is said so."""
    with pytest.raises(MediaRefused, match=r"no sound in the file \(it holds video\)"), opened(studio.film_without_sound()):
        pass


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(500), "a picture"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "a picture"),
        (b"%PDF-1.7\n" + bytes(500), "a PDF document"),
        (b"PK\x03\x04" + bytes(500), "a ZIP archive"),
        ("Liebe Grüße, café".encode() * 40, "a text file"),
        (bytes(4) + b"ftypM4A " + bytes(500), "index is missing"),
        (bytes(500), ""),
        (bytes(range(32, 256)) * 4, ""),
        (b"", ""),
    ],
    ids=["png", "jpeg", "pdf", "zip", "text", "mp4", "zeros", "bytes", "nothing"],
)
def test_what_people_drop_by_mistake_is_named(content: bytes, words: str) -> None:
    """By its first bytes; what they do not tell is not invented. A character cut in two at the end is still text."""
    said = looks_like(content[:512])
    assert words in said if words else said == ""


# --- what is cut off -----------------------------------------------------------------------------------------------------------


CUT = {
    ".wav": (),
    ".flac": (),
    ".mp3": ("-b:a", "64k"),
    ".m4a": ("-c:a", "aac"),
    ".mkv": ("-c:a", "libopus"),
    ".aiff": (),
    ".wma": ("-c:a", "wmav2"),
    ".avi": ("-c:a", "libmp3lame"),
    ".w64": (),
    ".rf64.wav": ("-rf64", "always"),
    ".au": (),
    ".wv": (),
}


@pytest.mark.parametrize("suffix", CUT)
def test_half_a_recording_is_not_called_good(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Every container that says how long or how large it is gives its loss away, also where FFmpeg reads to the early end without
    an error; a twentieth missing is as bad as nine tenths."""
    whole = studio.long(SENTENCES[:8])  # 5 % are more than the second that is forgiven
    source = tmp_path / f"whole{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", whole, *CUT[suffix], source)
    assert length_s(source) == pytest.approx(length_s(whole), abs=0.2)
    for share in (0.95, 0.5, 0.1):
        with pytest.raises((MediaDamaged, MediaRefused)) as complaint:
            heard(cut(source, tmp_path / f"cut{suffix}", share))
        assert complaint.value.what and complaint.value.hint


def test_a_long_recording_may_not_lose_a_minute(tmp_path: Path) -> None:
    """Two hours of which one minute is missing: less than one in a hundred, and yet cut off."""
    minute = 60 * 2 * RATE_HZ
    path = tmp_path / "meeting.wav"
    path.write_bytes(wav_header(0, promised=120 * minute))
    os.truncate(path, 44 + 119 * minute)
    with pytest.raises(MediaDamaged, match="cut off"), opened(path, USUAL._replace(duration_max_s=86_400)):
        pass


def test_an_m4a_made_for_the_web_is_cut_off_behind_its_index(studio: Studio, tmp_path: Path) -> None:
    """The index comes first and promises all; half of the sound is there."""
    whole = tmp_path / "whole.m4a"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), "-c:a", "aac", "-movflags", "+faststart", whole)
    with pytest.raises(MediaDamaged):
        heard(cut(whole, tmp_path / "cut.m4a", 0.5))


def test_a_hole_in_the_middle_is_damage(studio: Studio, tmp_path: Path) -> None:
    """A copy that lost blocks in its middle, which the file system filled with zeros."""
    source = tmp_path / "whole.mp3"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), "-b:a", "64k", source)
    data = bytearray(source.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    source.write_bytes(data)
    with pytest.raises(MediaDamaged):
        heard(source)


def test_a_click_is_no_damage(studio: Studio, tmp_path: Path) -> None:
    """One spoilt packet in a long recording costs a moment of sound, not the recording."""
    source = tmp_path / "whole.mp3"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), "-b:a", "64k", source)
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 100] = bytes(100)
    source.write_bytes(data)
    assert length_s(source) == pytest.approx(length_s(studio.long(SENTENCES[:8])), abs=0.3)


@pytest.mark.parametrize(("rate", "seconds"), [("8000", "7.3"), ("44100", "20.07")])
def test_a_flac_cut_anywhere_is_cut_off(rate: str, seconds: str, studio: Studio, tmp_path: Path) -> None:
    """At a dozen places, the last frame among them: its header knows the number of samples."""
    source = tmp_path / "whole.flac"
    run("ffmpeg", "-loglevel", "error", "-stream_loop", "-1", "-i", studio.say(TEXT), "-t", seconds, "-ar", rate, source)
    assert length_s(source) == pytest.approx(float(seconds), abs=0.001)
    size = source.stat().st_size
    for kept in (*(size * share // 10 for share in range(1, 10)), size - 3000, size - 1000, size - 300):
        with pytest.raises((MediaDamaged, MediaRefused)):
            heard(cut(source, tmp_path / "cut.flac", (kept + 0.5) / size))


@pytest.mark.parametrize(
    "suffix", [".wav", ".w64", ".rf64.wav", ".aiff", ".caf", ".au", ".flac", ".tta", ".mp3", ".m4a", ".mov", ".gsm.wav"]
)
def test_half_a_second_may_not_be_lost(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Of a minute, where the container tells the length of the sound exactly."""
    codec = {
        ".rf64.wav": ("-rf64", "always"),
        ".mp3": ("-b:a", "64k"),
        ".m4a": ("-c:a", "aac", "-movflags", "+faststart"),
        ".mov": ("-c:a", "pcm_s16le", "-movflags", "+faststart"),
        ".gsm.wav": ("-c:a", "adpcm_ms"),
    }
    source = tmp_path / f"whole{suffix}"
    minute = ("-stream_loop", "-1", "-i", studio.long(SENTENCES[:8]), "-t", "60")
    run("ffmpeg", "-loglevel", "error", *minute, *codec.get(suffix, ()), source)
    assert length_s(source) == pytest.approx(60.0, abs=0.1) and doubts(source) == ()
    with pytest.raises(MediaDamaged):
        heard(cut(source, tmp_path / f"cut{suffix}", 1 - 0.7 / 60))


WHOLE = {
    ".wav": ("", "-c:a pcm_s24le -ar 48000", "-c:a pcm_u8 -ar 11025", "-c:a adpcm_ima_wav", "-c:a pcm_alaw -ar 8000", "-c:a pcm_f32le"),
    ".flac": ("", "-ar 96000 -ac 2", "-ar 8000", "-frame_size 16384"),
    ".mp3": ("-ar 8000", "-ar 11025", "-ar 16000", "-ar 24000 -q:a 9", "-ar 44100 -ac 2", "-ar 48000 -b:a 320k", "-abr 1", "-write_xing 0"),
    ".m4a": ("-ar 8000", "-ar 16000", "-ar 44100 -ac 2", "-c:a alac", "-movflags +faststart", "-movflags +frag_keyframe+empty_moov"),
    ".mp4": ("-c:a libmp3lame", "-c:a ac3", "-c:a libopus -strict -2", "-c:a flac -strict -2"),
    ".mov": ("-c:a pcm_s16le", "-c:a adpcm_ima_qt", "-c:a aac"),
    ".ogg": ("-c:a libvorbis", "-c:a libopus", "-c:a flac", "-c:a libspeex"),
    ".opus": ("-b:a 12k -frame_duration 60",),
    ".mkv": ("-c:a libvorbis", "-c:a aac", "-c:a pcm_s16le", "-c:a flac"),
    ".webm": ("",),
    ".aac": ("", "-ar 8000"),
    ".ts": ("-c:a aac", "-c:a mp2"),
    ".mpg": ("-c:a mp2",),
    ".avi": ("-c:a libmp3lame", "-c:a pcm_s16le", "-c:a ac3"),
    ".wma": ("-c:a wmav2 -ar 44100", "-c:a wmav1 -ar 16000"),
    ".flv": ("-c:a libmp3lame -ar 44100", "-c:a aac"),
    ".aiff": ("", "-ar 44100 -ac 2"),
    ".caf": ("", "-c:a alac", "-c:a adpcm_ima_qt"),
    ".au": ("", "-c:a pcm_mulaw -ar 8000"),
    ".w64": ("-ar 44100",),
    ".voc": ("",),
    ".wv": ("", "-ar 44100 -ac 2"),
    ".tta": ("",),
    ".ac3": ("-ar 44100",),
    ".eac3": ("-ar 48000",),
    ".amr": ("-c:a libopencore_amrnb -ar 8000 -b:a 12.2k",),
    ".3gp": ("-c:a aac",),
}


@pytest.mark.parametrize("suffix", WHOLE)
def test_what_real_encoders_write_is_whole(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Of odd lengths, in every rate and mode: nothing is refused, nothing doubted, nothing missing."""
    for number, options in enumerate(WHOLE[suffix]):
        for seconds in ("0.73", "3.217"):
            path = tmp_path / f"{number}-{seconds}{suffix}"
            try:
                run("ffmpeg", "-loglevel", "error", "-stream_loop", "-1", "-i", studio.say(TEXT), "-t", seconds, *options.split(), path)
            except AssertionError as error:
                if "Unknown encoder" in str(error):
                    pytest.skip(f"this ffmpeg has no encoder for {suffix}")
                raise
            assert length_s(path) == pytest.approx(float(seconds), abs=0.3), path.name  # an encoder's delay and padding
            assert doubts(path) == (), path.name


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".webm", ".avi", ".ts"])
@pytest.mark.parametrize("sound_first", [True, False])
def test_a_film_whose_sound_is_short_or_late_is_whole(suffix: str, sound_first: bool, studio: Studio, tmp_path: Path) -> None:
    """Pictures at an uneven pace, and sound that ends long before them or begins long after them."""
    film = tmp_path / f"film{suffix}"
    picture = ("-f", "lavfi", "-i", "testsrc=size=96x64:rate=10:duration=9,select='lt(mod(n\\,7)\\,3)'")
    codec = ("-c:v", "libvpx", "-deadline", "realtime", "-c:a", "libopus") if suffix == ".webm" else ("-c:v", "mpeg4", "-c:a", "mp3")
    late = () if sound_first else ("-itsoffset", "4.5")
    pace = () if suffix == ".avi" else ("-vsync", "vfr")
    run("ffmpeg", "-loglevel", "error", *picture, *late, "-i", studio.say(TEXT), *pace, *codec, film)
    assert length_s(film) == pytest.approx(length_s(studio.say(TEXT)), abs=0.3)


# --- the container's clock -----------------------------------------------------------------------------------------------------

LATE = {
    "delayed.mp4": 2.0,
    "delayed.mov": 2.0,
    "delayed.mkv": 2.0,
    "delayed.ts": 2.0,
    "delayed.flv": 2.0,
    "on time.mp4": 0.0,
    "on time.mkv": 0.0,
    "on time.ts": 0.0,
    "far on.ts": 2.0,  # on the clock of a broadcast
    "picture delayed.mkv": 0.0,
    "by its header.avi": 2.0,
}


@pytest.mark.parametrize("name", LATE)
def test_how_late_the_sound_begins(name: str, studio: Studio, tmp_path: Path) -> None:
    """By the container's own first moment, wherever that is on its clock; the sound itself is all there, without silence in front. (With
    silence in front in an AVI, whose header FFmpeg follows in the times of the packets only.)"""
    film = tmp_path / name
    delay = ("-itsoffset", "2")
    sound = (*(delay if name.startswith(("delayed", "far")) else ()), "-i", studio.say(TEXT))
    picture = (*(delay if name.startswith("picture") else ()), "-f", "lavfi", "-i", "testsrc=size=96x64:rate=10:duration=9")
    codecs = {".avi": ("mpeg4", "mp3"), ".flv": ("flv", "aac")}.get(film.suffix, ("mpeg4", "aac"))
    clock = ("-output_ts_offset", "80000") if name.startswith("far") else ()
    rate = ("-ar", "22050")
    run("ffmpeg", "-loglevel", "error", *sound, *picture, "-c:v", codecs[0], "-c:a", codecs[1], *rate, *clock, film)
    if film.suffix == ".avi":
        start_later(film, 2.0)
    silence_s = LATE[name] if film.suffix == ".avi" else 0.0
    with opened(film) as recording:
        assert recording.start_offset_s == pytest.approx(LATE[name] - silence_s, abs=0.1)
    assert length_s(film) == pytest.approx(length_s(studio.say(TEXT)) + silence_s, abs=0.3)


def start_later(avi: Path, seconds: float) -> None:
    """Write into the header of the sound that it begins later (FFmpeg reads that, but never writes it)."""
    data = bytearray(avi.read_bytes())
    header = data.index(b"auds")
    scale, rate = struct.unpack_from("<II", data, header + 20)
    struct.pack_into("<I", data, header + 28, round(seconds * rate / scale))
    avi.write_bytes(data)


TONE = ("-f", "lavfi", "-i", "sine=440:duration=6:sample_rate=48000")


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".ts", ".flv"])
def test_a_hole_in_the_sound_keeps_its_time(suffix: str, tmp_path: Path) -> None:
    """A microphone was off for two seconds, and nothing is stored for them: what comes behind is as late as it was. No damage, no doubt."""
    path, codec = tmp_path / f"hole{suffix}", "libopus" if suffix == ".webm" else "aac"
    run("ffmpeg", "-loglevel", "error", *TONE, "-af", "aselect='lt(t,2)+gte(t,4)'", "-c:a", codec, path)
    with opened(path) as recording:
        (samples,) = np.concatenate(list(recording.blocks()), axis=1)
        assert (recording.duration_s, recording.heard_s) == (pytest.approx(6.0, abs=0.1), pytest.approx(4.0, abs=0.1))
        assert recording.doubts == ()
    for begin, end, there in ((0.2, 1.8, True), (2.2, 3.8, False), (4.2, 5.8, True)):
        assert (np.abs(samples[round(begin * RATE_HZ) : round(end * RATE_HZ)]).max() > 0.02) == there


def test_another_clock_is_no_hole(tmp_path: Path) -> None:
    """Two broadcasts joined, the second ten minutes further on its clock: one comes behind the other."""
    pieces = [tmp_path / f"{offset}.ts" for offset in (0, 600)]
    for piece in pieces:
        run("ffmpeg", "-loglevel", "error", *TONE, "-c:a", "mp2", "-output_ts_offset", piece.stem, piece)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    assert length_s(joined) == pytest.approx(12.0, abs=0.3)


def test_what_is_a_hole() -> None:
    """More than a container's rounding, less than another clock; behind frames without a time too, and in front of the first one that
    can be decoded. Times that go back are followed."""
    line = Timeline(1.0, 10.0)
    frames = [(1.5, 1.0), (2.6, 1.0), (None, 1.0), (6.6, 0.1), (100.0, 1.0), (2.0, 1.0), (3.3, 0.1)]
    assert [round(line.hole_before(*frame), 3) for frame in frames] == [0.5, 0.0, 0.0, 2.0, 0.0, 0.0, 0.3]
    assert line.filled_s == pytest.approx(2.8)
    assert Timeline(None, 10.0).hole_before(5.0, 1.0) == 0.0


@pytest.mark.parametrize(
    ("track_s", "container_s", "offset_s"),
    [(3.4, 1.4, 2.0), (80003.379, 80001.4, 1.979), (0.0, 0.5, 0.0), (None, 0.0, 0.0), (2.0, None, 0.0), (1e9, 0.0, 0.0)],
)
def test_what_is_an_offset(track_s: float | None, container_s: float | None, offset_s: float) -> None:
    """The difference, where both are known and it makes sense."""
    assert start_offset_s(track_s, container_s) == pytest.approx(offset_s)


@pytest.mark.parametrize(
    ("suffix", "options", "words"),
    [
        (".ogg", ("-c:a", "libvorbis"), "no end mark"),
        (".opus", ("-c:a", "libopus"), "no end mark"),
        (".oga", ("-c:a", "flac"), "no end mark"),
        (".ts", ("-c:a", "aac"), "ends within a packet"),
        (".aac", (), "last frame of sound is incomplete"),
        (".mp3", ("-write_xing", "0", "-b:a", "64k", "-ar", "24000"), "last frame of sound is incomplete"),
        (".mp3", ("-write_xing", "0", "-b:a", "128k", "-ar", "44100"), "last frame of sound is incomplete"),
    ],
)
def test_an_end_that_comes_too_early_is_doubted(suffix: str, options: tuple[str, ...], words: str, studio: Studio, tmp_path: Path) -> None:
    """A container that promises no length, cut off somewhere: it may be a broadcast that was stopped, so it is read, and said so."""
    source = tmp_path / f"whole{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:4]), *options, source)
    assert doubts(source) == ()
    found = doubts(cut(source, tmp_path / f"cut{suffix}", 0.5003))
    assert any(words in doubt for doubt in found), found


@pytest.mark.parametrize(("suffix", "words"), [(".flac", "are missing"), (".mp3", "cannot be decoded")])
def test_a_click_is_told(suffix: str, words: str, studio: Studio, tmp_path: Path) -> None:
    """A spoilt moment is no damage, but it is no secret either."""
    source = tmp_path / f"whole{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), "-b:a", "128k", source)
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000) if suffix == ".flac" else random.Random(1).randbytes(2000)
    source.write_bytes(data)
    found = doubts(source)
    assert any(words in doubt for doubt in found), found


def test_a_hole_in_a_flac_is_damage(studio: Studio, tmp_path: Path) -> None:
    """Its frames are numbered, so that what comes behind the hole is in its right place, and the end is where it should be."""
    source = tmp_path / "whole.flac"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), source)
    data = bytearray(source.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = bytes(third)
    source.write_bytes(data)
    with pytest.raises(MediaDamaged, match="missing"):
        heard(source)


@pytest.mark.parametrize("suffix", [".m4a", ".mov"])
def test_a_recording_that_was_trimmed_is_whole(suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Telephones trim by an edit list: the index of the file knows more sound than is to be heard."""
    source, trimmed = tmp_path / f"source{suffix}", tmp_path / f"trimmed{suffix}"
    run("ffmpeg", "-loglevel", "error", "-i", studio.long(SENTENCES[:8]), "-c:a", "aac", source)
    run("ffmpeg", "-loglevel", "error", "-ss", "7.77", "-i", source, "-t", "9.5", "-c", "copy", trimmed)
    assert length_s(trimmed) == pytest.approx(9.5, abs=0.2) and doubts(trimmed) == ()


def test_frames_tell_their_length() -> None:
    """Of MPEG audio in all its versions and layers, and of AAC; other bytes tell none."""
    told = {
        "ff fb 90 64": 417,  # MPEG-1 layer III, 128 kb/s, 44.1 kHz
        "ff fb 92 64": 418,  # padded
        "ff f3 48 c4": 144,  # MPEG-2 layer III, 32 kb/s, 16 kHz
        "ff e3 18 c4": 72,  # MPEG-2.5 layer III, 8 kb/s, 8 kHz
        "ff fd c4 00": 768,  # MPEG-1 layer II, 256 kb/s, 48 kHz
        "ff f1 50 80 02 1f fc": 16,  # ADTS
        "ff fb 00 64": 0,  # free format
        "49 44 33 04": 0,
        "": 0,
    }
    for head, length in told.items():
        assert frame_bytes(bytes.fromhex(head).ljust(7, b"\0")) == length, head


def test_the_tag_in_front_is_passed_over() -> None:
    """Behind an ID3 tag with a picture of megabytes the header of an MP3 is still found."""
    with open(os.memfd_create("tagged"), "w+b") as file:
        file.write(b"ID3\x04\x00\x00" + bytes([0, 0, 2, 1]) + bytes(257) + b"sound")
        file.flush()
        assert behind_id3(file.fileno(), 5) == b"sound"


def test_a_demuxer_may_seek_to_nowhere(studio: Studio) -> None:
    """It is told no, as the system calls tell it, and keeps its place."""
    descriptor = os.open(studio.say(TEXT), os.O_RDONLY)
    with Source(descriptor) as source:
        assert source.seek(100) == 100
        assert source.seek(-5) < 0 and source.seek(-(1 << 40), os.SEEK_CUR) < 0
        assert source.tell() == 100
    os.close(descriptor)


def test_the_room_that_a_recorder_took_is_not_looked_through(tmp_path: Path) -> None:
    """A second of sound and a gibibyte of zeros, taken in advance and never given back: FFmpeg would look at every eight bytes of them."""
    path = tmp_path / "taken.wav"
    sound = bytes(range(256)) * 125
    path.write_bytes(whole := wav_header(len(sound)) + sound)
    os.truncate(path, 1 << 30)
    descriptor = os.open(path, os.O_RDONLY)
    read: list[int] = []
    media = examine(descriptor, USUAL, on_read=read.append)
    assert media.duration_s == 1.0 and 0 < sum(read) < 1 << 20
    with Source(descriptor) as source:
        assert source.seek(0, os.SEEK_END) == len(whole)
        assert source.seek(-10, os.SEEK_END) and source.read(100) == sound[-10:] and source.read() == b""
    recording = Recording(descriptor, USUAL)
    assert sum(block.shape[1] for block in recording.blocks()) == 16_000 and not recording.doubts
    os.close(descriptor)


def test_spoilt_files_are_refused_in_words(studio: Studio, tmp_path: Path) -> None:
    """Two hundred recordings with random bytes changed: each is heard, refused or damaged; nothing else is raised, nothing crashes."""
    chance = random.Random(20261121)
    shapes = [
        (".wav", ()),
        (".flac", ()),
        (".mp3", ("-b:a", "32k")),
        (".m4a", ("-c:a", "aac")),
        (".ogg", ("-c:a", "libvorbis")),
        (".webm", ()),
    ]
    sources = [studio.encode(SENTENCES[13], suffix, options).read_bytes() for suffix, options in shapes]
    outcomes = set()
    for number in range(198):
        data = bytearray(sources[number % len(sources)])
        for _ in range(chance.choice([1, 5, 50])):
            place = chance.randrange(min(len(data), chance.choice([64, 512, len(data)])))
            data[place] = chance.randrange(256)
        spoilt = tmp_path / "spoilt"
        spoilt.write_bytes(data)
        try:
            heard(spoilt)
            outcomes.add("heard")
        except (MediaRefused, MediaDamaged) as error:
            assert error.what
            outcomes.add(error.code)
    assert outcomes == {"heard", "media_refused", "media_damaged"}


# --- files that name other files -----------------------------------------------------------------------------------------------

_IN_OPEN = 0x20


@contextmanager
def nobody_opens(*paths: Path) -> Iterator[Callable[[], int]]:
    """Count how often these files are opened, by inotify: by anybody, in whatever way."""
    libc = ctypes.CDLL(None, use_errno=True)
    watcher = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watcher >= 0
    for path in paths:
        assert libc.inotify_add_watch(watcher, os.fsencode(path), _IN_OPEN) >= 0

    def opened_times() -> int:
        try:
            return len(os.read(watcher, 65536)) // struct.calcsize("iIII")
        except BlockingIOError:
            return 0

    try:
        yield opened_times
        assert opened_times() == 0, "a file that a recording names was opened"
    finally:
        os.close(watcher)


def test_openings_are_noticed(studio: Studio) -> None:
    """The trap itself works: what opens the file, is counted."""
    secret = studio.say(TEXT)
    with nobody_opens(secret) as times:
        assert times() == 0
        secret.read_bytes()
        assert times() == 1
        with av.open(str(secret)):
            pass
        assert times() >= 1


PLAYLISTS = {
    "hls": "#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:10\n#EXTINF:3.0,\n{target}\n#EXT-X-ENDLIST\n",
    "hls with a local scheme": "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:3.0,\nfile://{target}\n#EXT-X-ENDLIST\n",
    "hls by concat": "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:3.0,\nconcat:{target}|{target}\n#EXT-X-ENDLIST\n",
    "m3u": "#EXTM3U\n{target}\n",
    "concat": "ffconcat version 1.0\nfile '{target}'\nduration 3\n",
    "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio {port} RTP/AVP 0\n",
    "dash": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet mimeType="audio/mp4">'
    "<Representation id='1'><BaseURL>{target}</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "pls": "[playlist]\nFile1={target}\nNumberOfEntries=1\n",
    "network": "#EXTM3U\n#EXT-X-MEDIA-SEQUENCE:0\n#EXTINF:3.0,\nhttp://127.0.0.1:{port}/a.ts\n#EXT-X-ENDLIST\n",
}


@pytest.mark.parametrize("suffix", [".m3u8", ".mp3", ".wav", ".ts"])
@pytest.mark.parametrize("kind", PLAYLISTS)
def test_a_playlist_is_refused_and_what_it_names_is_not_touched(kind: str, suffix: str, studio: Studio, tmp_path: Path) -> None:
    """Whatever its name: a file that only names others is no recording. No file it names is opened, nobody is called."""
    target = tmp_path / "secret.wav"
    target.write_bytes(studio.say(TEXT).read_bytes())
    with socket.create_server(("127.0.0.1", 0)) as server, nobody_opens(target, Path("/etc/passwd")):
        server.setblocking(False)
        port = server.getsockname()[1]
        for named in (target, "/etc/passwd"):
            playlist = tmp_path / f"list{suffix}"
            playlist.write_text(PLAYLISTS[kind].format(target=named, port=port))
            with pytest.raises(MediaRefused, match="not audio or video"), opened(playlist):
                pass
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_playlist_that_names_a_pipe_does_not_hang(tmp_path: Path) -> None:
    """Who opened that pipe would wait for ever."""
    pipe = tmp_path / "pipe.ts"
    os.mkfifo(pipe)
    playlist = tmp_path / "list.mp3"
    playlist.write_text(PLAYLISTS["hls"].format(target=pipe))
    with pytest.raises(MediaRefused), opened(playlist):
        pass


def test_a_film_that_refers_to_another_file(studio: Studio, tmp_path: Path) -> None:
    """QuickTime can say that its samples are in another file: that one is not opened."""
    secret = tmp_path / "secret.wav"
    secret.write_bytes(studio.say(TEXT).read_bytes())
    film = studio.encode(TEXT, ".mov", ("-c:a", "pcm_s16le")).read_bytes()
    alias = _alias(secret.name)
    assert film.count(b"url \0\0\0\1") >= 1
    pointing = tmp_path / "film.mov"
    pointing.write_bytes(_with_data_reference(film, alias))
    with nobody_opens(secret):
        try:
            heard(pointing)
        except (MediaRefused, MediaDamaged):
            pass


def _alias(name: str) -> bytes:
    """A QuickTime alias record with an absolute path of the kind that FFmpeg follows when it is allowed to."""
    record = bytearray(150)
    record[50] = len(name)
    record[51 : 51 + len(name)] = name.encode()
    path = name.encode()
    return bytes(record) + struct.pack(">hh", 2, len(path)) + path + struct.pack(">hh", -1, 0)


def _with_data_reference(film: bytes, alias: bytes) -> bytes:
    """The film, its first self-reference replaced by one to another file; the lengths of all boxes around it grow along."""
    entry = struct.pack(">I", 12 + len(alias)) + b"alis" + bytes(4) + alias
    place = film.index(b"url \0\0\0\1") - 4
    grown = bytearray(film[:place] + entry + film[place + 12 :])
    more = len(entry) - 12
    for box in (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref"):
        at = film.rindex(box, 0, place + 4) - 4
        grown[at : at + 4] = struct.pack(">I", struct.unpack(">I", film[at : at + 4])[0] + more)
    return bytes(grown)


def test_only_recordings_are_demuxed() -> None:
    """Among the containers that are read there is none that opens files, devices or the network by itself."""
    dangerous = {"hls", "concat", "sdp", "rtsp", "dash", "image2", "lavfi", "applehttp", "imf", "ffmetadata", "tty", "v4l2", "alsa", "rtp"}
    assert not dangerous & set(DEMUXERS.split(","))


def test_tools_are_there() -> None:
    """Without espeak-ng and ffmpeg most of this file is skipped; here it says so."""
    need_tools()
