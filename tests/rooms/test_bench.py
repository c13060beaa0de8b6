"""The bench's own ground: its models keep the clock, its bars judge as they read, its page is what its figures say."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from bench import clock_model, report
from bench.measure import Bar, percentile, run_tree

SMALL = clock_model.Size(width=384, layers=1, heads=6)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("clock") / "model")
    clock_model.write_ctranslate2(path, SMALL, clock_model.weights(SMALL, 20))
    return path


def test_a_clock_model_says_so_many_words_in_english(small_model: str) -> None:
    """Whatever the sound: 20 text tokens, English, one segment over the window, nothing that would start a second pass."""
    from faster_whisper import WhisperModel

    model = WhisperModel(small_model, device="cpu", compute_type="int8", cpu_threads=1)
    noise = np.random.default_rng(1).normal(0, 0.1, 80_000).astype(np.float32)
    segments, info = model.transcribe(noise, beam_size=5)
    (segment,) = segments
    text_tokens = [token for token in segment.tokens if token < clock_model.END_OF_TEXT]
    assert (info.language, len(text_tokens), segment.temperature) == ("en", 20, 0.0)
    assert segment.avg_logprob > -1 and segment.compression_ratio < 2.4 and segment.no_speech_prob < 0.1


def test_the_vocabulary_is_a_true_byte_level_bpe() -> None:
    """As many tokens as Whisper has, none twice, every merge made of two earlier tokens."""
    words = clock_model.vocabulary(clock_model.SIZES["tiny"])
    assert len(words.all) == len(set(words.all)) == 51_865
    rank = {word: number for number, word in enumerate(words.text)}
    assert all(max(rank[first], rank[second]) < rank[first + second] for first, second in words.merges)


@pytest.mark.parametrize(("figure", "at_most", "kept"), [(0.5, True, True), (0.51, True, False), (0.5, False, True), (0.49, False, False)])
def test_a_bar_is_kept_up_to_its_limit(figure: float, at_most: bool, kept: bool) -> None:
    """The limit itself keeps; a figure without a limit is only told."""
    assert Bar("x", figure, 0.5, at_most=at_most).kept is kept
    assert Bar("x", figure, None).kept is None


def test_a_percentile_is_one_of_the_values() -> None:
    """The smallest value that so large a share does not exceed."""
    values = [float(number) for number in range(1, 21)]
    assert (percentile(values, 0.95), percentile(values, 0.5), percentile(values, 1.0), percentile([3.0], 0.95)) == (19.0, 10.0, 20.0, 3.0)


def test_the_cost_of_a_tree_holds_its_grandchildren() -> None:
    """A process that only waits for one that works has the CPU time of both, orphans too."""
    work = "import time; t = time.process_time()\nwhile time.process_time() - t < 0.3: pass"
    nested = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {work!r}])"
    assert run_tree([sys.executable, "-c", nested]).cpu_s > 0.3


def test_the_page_is_what_the_figures_say() -> None:
    """docs/performance.md holds every saved figure's section as the generator writes it."""
    page = Path(report.PAGE).read_text("utf-8")
    for document in report.documents(report.RESULTS).values():
        assert "\n".join(report.section(document)).strip() in page
