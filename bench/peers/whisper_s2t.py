"""whisper_s2t: WhisperS2T with its CTranslate2 back-end, beam 5, batches of 8: MODEL THREADS FILE…

It does not detect languages and writes no time stamps: it is given English, and does less than the others.
"""

from __future__ import annotations

import sys

from bench.peers.phases import Phases


def main() -> int:
    model_path, threads, *paths = sys.argv[1:]
    phases = Phases()
    import whisper_s2t

    model = whisper_s2t.load_model(
        model_path, backend="CTranslate2", device="cpu", compute_type="int8", cpu_threads=int(threads), asr_options={"beam_size": 5}
    )
    phases.loaded()
    count = len(paths)
    found = model.transcribe_with_vad(
        paths, lang_codes=["en"] * count, tasks=["transcribe"] * count, initial_prompts=[None] * count, batch_size=8
    )
    phases.say([" ".join(part["text"].strip() for part in parts) for parts in found])
    return 0


if __name__ == "__main__":
    sys.exit(main())
