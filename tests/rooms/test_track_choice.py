"""The language that is asked for chooses among a film's audio tracks, through a real engine; how the choice is made is in test_audio.py."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from recordings import SENTENCES, Studio, likeness, run
from test_engine import OPTIONS, Engine, load_request

from whisperd.wire import EngineReady

ENGLISH, GERMAN = SENTENCES[11], SENTENCES[:5]


@pytest.fixture
def engine() -> Iterator[Engine]:
    engine = Engine(load_request())
    engine.until(EngineReady)
    yield engine
    engine.close()


def test_a_job_s_language_chooses_the_track(engine: Engine, studio: Studio, tmp_path: Path) -> None:
    """The first track holds far more speech and is tagged as German: without a wish it is taken, with "en" the other is."""
    film = tmp_path / "film.mkv"
    tags = ("-metadata:s:a:0", "language=ger", "-metadata:s:a:1", "language=eng")
    sound = ("-i", studio.long(GERMAN), "-i", studio.say(ENGLISH), "-map", "0:a", "-map", "1:a", "-c:a", "flac")
    run("ffmpeg", "-loglevel", "error", *sound, *tags, film)
    for language, said, other in (("en", ENGLISH, " ".join(GERMAN)), ("auto", " ".join(GERMAN), ENGLISH)):
        windows, _ = engine.whole(1, film, options=msgspec.structs.replace(OPTIONS, language=language))
        heard = " ".join(segment.text for window in windows for segment in window.segments)
        assert likeness(said, heard) > max(0.7, likeness(other, heard)), heard
