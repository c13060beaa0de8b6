"""openai_whisper: openai-whisper's API, loaded once, beam 5, language detected: MODEL.pt THREADS FILE…"""

from __future__ import annotations

import sys

from bench.peers.phases import Phases


def main() -> int:
    model_path, threads, *paths = sys.argv[1:]
    phases = Phases()
    import torch
    import whisper

    torch.set_num_threads(int(threads))
    model = whisper.load_model(model_path, device="cpu")
    phases.loaded()
    phases.say([" ".join(part["text"].strip() for part in model.transcribe(path, beam_size=5, fp16=False)["segments"]) for path in paths])
    return 0


if __name__ == "__main__":
    sys.exit(main())
