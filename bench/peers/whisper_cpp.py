"""whisper_cpp: whisper.cpp through its Python package, loaded once, beam 5, language detected: MODEL.bin THREADS FILE…"""

from __future__ import annotations

import sys

from bench.peers.phases import Phases


def main() -> int:
    model_path, threads, *paths = sys.argv[1:]
    phases = Phases()
    from faster_whisper.audio import decode_audio
    from pywhispercpp.model import Model

    model = Model(model_path, n_threads=int(threads), redirect_whispercpp_logs_to=None, print_progress=False)
    phases.loaded()
    texts = []
    for path in paths:  # it reads WAV alone by itself
        segments = model.transcribe(decode_audio(path), language="", beam_search={"beam_size": 5, "patience": -1.0})
        texts.append(" ".join(segment.text.strip() for segment in segments))
    phases.say(texts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
