"""Judgements about recordings, made from figures alone: is it all there, which track is meant; and the file format of the network."""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from whisperd.engine import onnx
from whisperd.engine.choice import Track, candidates, choose, two_letters
from whisperd.engine.whole import MOV, Promised, Reach, gap_of, loss_of, promise


class Packet(NamedTuple):
    """As much of a packet as is looked at."""

    pts: int | None
    duration: int = 100
    size: int = 50
    stream_index: int = 0
    is_corrupt: bool = False
    time_base: Fraction = Fraction(1, 1000)


def reach_of(*packets: Packet, others: tuple[Packet, ...] = ()) -> Reach:
    reach = Reach()
    for packet in packets:
        reach.note_good(packet)
    for packet in others:
        reach.note(packet)
    return reach


# --- is it all there -----------------------------------------------------------------------------------------------------------


def test_exact_containers_promise_the_track_others_all_streams() -> None:
    """A FLAC's own count is believed to the sample, a Matroska's to a second, a bare stream's estimate not at all."""
    assert promise("flac", 60.0, 60.0) == Promised(60.0, 0.01, of_track=True, gapless=True)
    assert promise(MOV, 60.0, 50.0) == Promised(50.0, 0.25, of_track=True, gapless=False)
    assert promise("matroska,webm", 60.0, 50.0) == Promised(60.0, 1.0, of_track=False, gapless=False)
    assert promise("matroska,webm", 3600.0, None) == Promised(3600.0, 36.0, of_track=False, gapless=False)
    assert promise("aac", 60.0, 60.0) is promise("flac", None, None) is None


@given(st.floats(0.0, 59.0), st.sampled_from(["flac", "mp3", "wav", MOV, "matroska,webm"]))
def test_what_ends_a_second_early_is_cut_off(reached_s: float, container: str) -> None:
    """Whatever the container promises for the end is there, or it is said how much is."""
    reach = reach_of(Packet(0, round(reached_s * 1000)))
    promised = promise(container, 60.1, 60.1)
    assert "is cut off" in loss_of(promised, reach, reached_s)
    assert loss_of(None, reach, reached_s) == ""


def test_sound_that_begins_late_or_ends_early_is_no_loss() -> None:
    """Where the container's length is that of the picture, the picture is what must reach it; times may begin anywhere."""
    promised = promise("matroska,webm", 60.0, None)
    picture = (Packet(10_000, 1000, stream_index=1), Packet(69_000, 1000, stream_index=1))
    assert loss_of(promised, reach_of(Packet(20_000, 5000), others=picture), 5.0) == ""
    assert "is cut off" in loss_of(promised, reach_of(Packet(20_000, 5000), others=picture[:1]), 5.0)


def test_a_gap_is_damage_only_where_sound_must_fill_the_time() -> None:
    """Half of a FLAC missing in the middle is damage, a moment is told; in an MP4 the microphone may have been off."""
    reach = reach_of(Packet(0), Packet(59_900))
    assert "are missing" in loss_of(promise("flac", 60.0, 60.0), reach, 30.0)
    assert loss_of(promise(MOV, 60.0, 60.0), reach, 30.0) == gap_of(promise(MOV, 60.0, 60.0), 30.0) == ""
    assert loss_of(promise("flac", 60.0, 60.0), reach, 59.5) == ""
    assert gap_of(promise("flac", 60.0, 60.0), 59.5) == "0.50 s of the sound are missing"
    assert gap_of(promise("flac", 60.0, 60.0), 59.995) == gap_of(promise("mp3", 60.0, 60.0), 59.7) == ""


def test_spoilt_packets_are_counted_and_reach_nowhere() -> None:
    """One in twenty is too many, and the last one, if it cannot be decoded, is not there."""
    reach = reach_of(*(Packet(place) for place in range(0, 1900, 100)))
    reach.note_bad(Packet(1900))
    assert reach.track_s() == 1.9 and reach.told_bad == "1 of 20 packets of sound" and not reach.unreadable
    reach.note_bad(Packet(2000))
    assert reach.unreadable
    reach.note_good(Packet(None, size=0))  # what asks a decoder for its rest is no packet
    assert reach.packets == 21


# --- which track ---------------------------------------------------------------------------------------------------------------

TRACKS = [Track(1, "eng"), Track(2, "ger", default=True), Track(3, "deu"), Track(4, "")]


def test_tracks_are_meant_by_number_or_language() -> None:
    """A number names one, a language all that are tagged with it, "auto" all there are."""
    assert candidates(TRACKS, "3", "en") == [TRACKS[2]]
    assert candidates(TRACKS, "auto", "de") == TRACKS[1:3]
    assert candidates(TRACKS, "auto", "ja") == candidates(TRACKS, "auto", "auto") == TRACKS
    for wrong in ("0", "5", "-1", "x", ""):
        with pytest.raises(LookupError):
            candidates(TRACKS, wrong, "auto")


def test_most_speech_wins_and_near_ties_are_ties() -> None:
    """A track that is nearly as talkative as the most talkative one is as good, and then players' choice is ours."""
    assert choose(TRACKS, [0.0, 1.0, 30.0, 20.0]).number == 3
    assert choose(TRACKS, [30.0, 28.0, 29.0, 0.0]).number == 2
    assert choose(TRACKS, [30.0, 2.0, 29.0, 0.0]).number == 1
    assert choose(TRACKS, [0.0] * 4).number == 2
    assert choose(TRACKS[2:], [0.0] * 2).number == 3


def test_languages_have_many_names() -> None:
    """Two letters, three of the one kind or the other, with a country; what nobody knows stays itself."""
    assert {two_letters(tag) for tag in ("de", "deu", "ger", "DE-at", "de_CH", " ger ")} == {"de"}
    assert two_letters("cmn-Hans") == "zh" and two_letters("tlh") == "tlh" and two_letters("") == ""


# --- the network's file --------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(1, 5), max_size=3), min_size=1, max_size=4))
def test_weights_come_out_of_a_model_as_they_went_in(shapes: list[list[int]]) -> None:
    """Names, shapes and values; other constants are not weights."""
    weights = {f"weight {number}": np.random.default_rng(number).random(shape, dtype=np.float32) for number, shape in enumerate(shapes)}
    constants = {**weights, "axis": np.array([-1, 1 << 40])}
    opset = b"\x10\x12"
    made = onnx.model(
        [onnx.node("Relu", ["x"], ["y"])], constants, {"x": (np.float32, (1, "n"))}, {"y": (np.float32, (1, "n"))}, opset=opset
    )
    found = onnx.weights_of(made)
    assert found.keys() == weights.keys() and onnx.opset_of(made) == opset
    assert all(np.array_equal(found[name], weights[name]) for name in weights)


@pytest.mark.parametrize("wrong", [b"", b"\x08\x08", b"\x3a\x05ab"])
def test_what_is_no_model_is_a_lookup_error(wrong: bytes) -> None:
    """Empty, without a graph, cut off."""
    with pytest.raises(LookupError):
        onnx.weights_of(wrong)
        onnx.opset_of(wrong)
