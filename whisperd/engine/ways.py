"""ways: how a window may be decoded: which lengths, temperatures and stretches are tried, in which order.

Owns: the ladder of a window and the stretches of speech in it. Pure; never fails.
"""

from __future__ import annotations

from whisperd.engine.work import FRAMES, Way, WindowWork

SHORT_MIN_FRAMES = 1000  # 10 s: below, Whisper's accuracy falls off (CTranslate2#2100)
SHORT_STEP_FRAMES = 200  # windows of about equal length share a batch
SHORT_MARGIN_FRAMES = 50
STRETCH_PAD_FRAMES = 20
STRETCH_MIN_FRAMES = 200


def ladder(work: WindowWork) -> list[Way]:
    """The ways to decode a window, the next one only where the gate complains: as asked, at full length, warmer, pause by pause."""
    content, options = work.features.shape[1], work.options
    full = [Way(FRAMES, temperature) for temperature in options.temperatures]
    if options.mode == "sequential":
        return full
    by_stretch = [Way(by_stretch=True)] if len(work.stretches_s) > 1 else []
    if options.mode == "short_windows":
        frames = -(-(content + SHORT_MARGIN_FRAMES) // SHORT_STEP_FRAMES) * SHORT_STEP_FRAMES
        short = [Way(max(SHORT_MIN_FRAMES, frames))] if max(SHORT_MIN_FRAMES, frames) < FRAMES else []
        return short + full + by_stretch
    return full + by_stretch


def stretches(work: WindowWork) -> list[tuple[int, int]]:
    """The stretches of speech in a window as frames, padded a little; very short ones go with the one before."""
    content = work.features.shape[1]
    spans: list[tuple[int, int]] = []
    for start_s, end_s in work.stretches_s:
        start = max(0, round((start_s - work.start_s) * 100) - STRETCH_PAD_FRAMES)
        end = min(content, round((end_s - work.start_s) * 100) + STRETCH_PAD_FRAMES)
        if spans and (end - start < STRETCH_MIN_FRAMES or start < spans[-1][1]):
            spans[-1] = spans[-1][0], end
        elif end > start:
            spans.append((start, end))
    return spans or [(0, content)]
