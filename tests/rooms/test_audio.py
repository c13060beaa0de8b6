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

import av
import numpy as np
import pytest
from recordings import SENTENCES, Studio, cut, need_tools, run, samples_of, wav_header, write_wav

from whisperd.engine.audio import DEMUXERS, RATE_HZ, Caps, MediaDamaged, MediaRefused, Recording, Source, behind_id3, looks_like, sha256_of

USUAL = Caps(duration_max_s=3600.0, channels_max=8, rate_max_hz=192_000)
TEXT = SENTENCES[2]


@contextmanager
def opened(path: Path, caps: Caps = USUAL) -> Iterator[Recording]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        recording = Recording(descriptor, caps)
        try:
            yield recording
        finally:
            recording.close()
    finally:
        os.close(descriptor)


def heard(path: Path, caps: Caps = USUAL) -> np.ndarray:
    """All samples of a recording. Raises MediaRefused, MediaDamaged."""
    with opened(path, caps) as recording:
        blocks = list(recording.blocks())
        samples = np.concatenate(blocks)
        assert recording.duration_s == len(samples) / RATE_HZ
        return samples


def length_s(path: Path) -> float:
    return len(heard(path)) / RATE_HZ


# --- good ones -----------------------------------------------------------------------------------------------------------------


def test_samples_are_those_of_the_file(studio: Studio) -> None:
    """16 kHz mono PCM comes out as it is, in blocks of about two seconds, between -1 and 1."""
    path = studio.say(TEXT)
    with opened(path) as recording:
        blocks = list(recording.blocks())
    assert all(block.dtype == np.float32 and abs(block).max() <= 1.0 for block in blocks)
    assert all(2 * RATE_HZ <= len(block) < 3 * RATE_HZ for block in blocks[:-1])
    assert np.array_equal(np.concatenate(blocks), np.frombuffer(samples_of(path), dtype=np.int16).astype(np.float32) / 32768.0)


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
        lengths.append(sum(map(len, recording.blocks())))
        recording.close()
    os.close(descriptor)
    assert lengths[0] == lengths[1] > 0


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


def test_the_tag_in_front_is_passed_over() -> None:
    """Behind an ID3 tag with a picture of megabytes the header of an MP3 is still found."""
    with open(os.memfd_create("tagged"), "w+b") as file:
        file.write(b"ID3\x04\x00\x00" + bytes([0, 0, 2, 1]) + bytes(257) + b"sound")
        file.flush()
        assert behind_id3(file.fileno(), 5) == b"sound"


def test_a_demuxer_may_seek_to_nowhere(studio: Studio) -> None:
    """It is told no, as the system calls tell it, and keeps its place."""
    descriptor = os.open(studio.say(TEXT), os.O_RDONLY)
    with Source(descriptor, "rb", closefd=False) as source:
        assert source.seek(100) == 100
        assert source.seek(-5) < 0 and source.seek(-(1 << 40), os.SEEK_CUR) < 0
        assert source.tell() == 100
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
