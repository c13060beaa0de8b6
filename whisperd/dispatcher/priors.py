"""priors: what is believed of a model's memory before anything was measured: published figures, per model and precision (FEATURES F88).

Owns: the table. `weights_mib` is a process with the model loaded, CUDA context and library included; `window_mib` what each further window
of a batch adds at beam 5. Sources: ENGINE.md §f (faster-whisper's README, faster-whisper issue 1030, wyoming-faster-whisper issue 122) and
OPTIMISER.md §0.1 (about 495 MiB of context a process). Where only one precision of a model was published the others follow from the size
of its weights. The optimiser adds a quarter to what it has not measured itself.
"""

from __future__ import annotations

from typing import NamedTuple

from whisperd.dispatcher.optimiser.values import ModelNeed

CONTEXT_MIB = 500


class Published(NamedTuple):
    """A process with the model loaded, in MiB, and what one window adds."""

    float16_mib: int
    int8_mib: int
    float32_mib: int
    window_mib: int


PUBLISHED = {
    "demo": Published(float16_mib=550, int8_mib=530, float32_mib=580, window_mib=10),  # the embedded one, on a GPU mostly context
    "tiny": Published(float16_mib=600, int8_mib=560, float32_mib=680, window_mib=15),
    "base": Published(float16_mib=680, int8_mib=600, float32_mib=820, window_mib=25),
    "small": Published(float16_mib=1158, int8_mib=800, float32_mib=1650, window_mib=60),
    "medium": Published(float16_mib=2400, int8_mib=1500, float32_mib=3900, window_mib=130),
    "large-v1": Published(float16_mib=4525, int8_mib=2926, float32_mib=9800, window_mib=200),
    "large-v2": Published(float16_mib=4525, int8_mib=2926, float32_mib=9800, window_mib=200),
    "large-v3": Published(float16_mib=4521, int8_mib=2953, float32_mib=9800, window_mib=200),
    "large-v3-turbo": Published(float16_mib=2537, int8_mib=1545, float32_mib=4300, window_mib=130),
    "distil-large-v2": Published(float16_mib=2409, int8_mib=1481, float32_mib=4200, window_mib=130),
    "distil-large-v3": Published(float16_mib=2409, int8_mib=1481, float32_mib=4200, window_mib=130),
    "distil-medium.en": Published(float16_mib=1300, int8_mib=900, float32_mib=2100, window_mib=90),
    "distil-small.en": Published(float16_mib=900, int8_mib=700, float32_mib=1300, window_mib=50),
}

ALIASES = {
    "large": "large-v3",
    "turbo": "large-v3-turbo",
    **{f"{size}.en": size for size in ("tiny", "base", "small", "medium")},
}

WEIGHTS_OF = {
    "float16": "float16_mib",
    "bfloat16": "float16_mib",
    "int8": "int8_mib",
    "int8_float16": "int8_mib",
    "int8_bfloat16": "int8_mib",
    "int8_float32": "int8_mib",
    "float32": "float32_mib",
}

WIDE = ("int8", "int8_float32", "float32")
"""Precisions whose activations take four bytes instead of two."""


def needs() -> tuple[ModelNeed, ...]:
    """The whole table: every model under every name, in every precision."""
    names = {**{name: name for name in PUBLISHED}, **ALIASES}
    return tuple(
        ModelNeed(
            model=name,
            compute_type=compute_type,
            weights_mib=getattr(PUBLISHED[of], column),
            window_mib=PUBLISHED[of].window_mib * (2 if compute_type == "float32" else 1)
            + (PUBLISHED[of].window_mib // 5 if compute_type in WIDE else 0),
        )
        for name, of in sorted(names.items())
        for compute_type, column in WEIGHTS_OF.items()
    )


NEEDS = needs()
