"""A film's subtitles stand where its sound is: from a container whose sound begins late, through a real engine, to the cues of an SRT.

What the front end makes of single containers is tried in test_audio.py; here the demo model hears the words.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from recordings import SENTENCES, Studio, likeness, run, samples_of, write_wav
from subtitle_readers import Cue, read_srt
from test_audio import opened
from test_engine import OPTIONS, Engine, load_request

from whisperd.outbox.render import render
from whisperd.vocabulary import assemble
from whisperd.wire import EngineReady

LATE_S = 3.2
HOLE_S = 4.0  # of silence between two sentences
EDGE_S = 0.3  # of it that is stored, at either end
BYTES_IN_S = 32_000
FIRST, SECOND = SENTENCES[2], SENTENCES[11]
SLACK_S = 0.15  # an encoder's priming, the rounding of a container's clock and of a model's

FILMS = {  # name → codec of the sound, and where its clock begins
    "film.mkv": ("pcm_s16le", ()),
    "film.mp4": ("aac", ()),
    "film.mov": ("aac", ()),
    "broadcast.ts": ("mp2", ("-output_ts_offset", "80000")),
}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(load_request())
    engine.until(EngineReady)
    yield engine
    engine.close()


def subtitles(engine: Engine, recording: Path) -> list[Cue]:
    """What the outbox would publish."""
    windows, finished = engine.whole(1, recording, options=OPTIONS)
    found = assemble(source=recording.name, size=1, mtime_ns=1, windows=windows, options=OPTIONS, summary=finished.summary)
    return read_srt(render(found, "srt"))


class Talk(NamedTuple):
    """A recording of two sentences, and when the second begins."""

    path: Path
    second_s: float


@pytest.fixture(scope="module")
def talk(studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Talk:
    first, second = (samples_of(studio.say(text)) for text in (FIRST, SECOND))
    path = write_wav(tmp_path_factory.mktemp("talk") / "talk.wav", first + bytes(round(HOLE_S * BYTES_IN_S)) + second)
    return Talk(path, len(first) / BYTES_IN_S + HOLE_S)


@pytest.fixture(scope="module")
def on_time(engine: Engine, talk: Talk) -> list[Cue]:
    """The cues of the sound alone."""
    return subtitles(engine, talk.path)


@pytest.mark.parametrize("name", FILMS)
def test_a_cue_stands_where_its_words_are(name: str, engine: Engine, talk: Talk, on_time: list[Cue], tmp_path: Path) -> None:
    """The sound begins 3.2 seconds after the picture, and nothing is stored of the silence in it: every cue is as late on the film's
    clock as its words are, the first one at 3.2 s, however far on that clock itself begins."""
    film, (codec, clock) = tmp_path / name, FILMS[name]
    second_s = talk.second_s
    picture = ("-f", "lavfi", "-i", "testsrc=size=96x64:rate=10:duration=18")
    hole = ("-af", f"aselect='lt(t,{LATE_S + second_s - HOLE_S + EDGE_S})+gte(t,{LATE_S + second_s - EDGE_S})'")
    codecs = ("-map", "0:v", "-map", "1:a", "-c:v", "mpeg4", "-c:a", codec, "-ar", "48000")
    run("ffmpeg", "-loglevel", "error", *picture, "-itsoffset", str(LATE_S), "-i", talk.path, *hole, *codecs, *clock, film)
    with opened(film) as recording:
        for _ in recording.blocks():
            pass
        assert recording.duration_s - recording.heard_s == pytest.approx(HOLE_S - 2 * EDGE_S, abs=0.2), "or this tests no hole"
    cues = subtitles(engine, film)
    assert likeness(f"{FIRST} {SECOND}", " ".join(cue.text for cue in cues)) > 0.8
    assert cues[0].start_ms / 1000 == pytest.approx(LATE_S, abs=0.4)
    assert cues[-1].start_ms / 1000 == pytest.approx(LATE_S + second_s, abs=0.4)
    for late, plain in ((cues[0], on_time[0]), (cues[-1], on_time[-1])):
        assert (late.start_ms - plain.start_ms) / 1000 == pytest.approx(LATE_S, abs=SLACK_S)
