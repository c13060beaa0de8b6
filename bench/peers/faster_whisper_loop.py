"""faster_whisper_loop: what most people write: one model, `for file: model.transcribe(file)`: [OPTION…] MODEL THREADS FILE…"""

from __future__ import annotations

import argparse
import sys

from bench.peers.phases import Phases, age_s


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--language", default=None)
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--batch", type=int, default=0, help="use BatchedInferencePipeline with this batch")
    parser.add_argument("--no-previous-text", action="store_true", help="windows of a long file do not see the text before")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compute-type", default="int8")
    parser.add_argument("model")
    parser.add_argument("threads", type=int)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    phases = Phases()
    from faster_whisper import BatchedInferencePipeline, WhisperModel

    model = WhisperModel(args.model, device=args.device, compute_type=args.compute_type, cpu_threads=args.threads)
    phases.loaded()
    pipeline, more = (BatchedInferencePipeline(model), {"batch_size": args.batch}) if args.batch else (model, {})
    if args.no_previous_text:
        more = {**more, "condition_on_previous_text": False}
    texts, ended_s = [], []
    for path in args.files:
        segments, _ = pipeline.transcribe(path, language=args.language, beam_size=args.beam, **more)
        texts.append(" ".join(segment.text.strip() for segment in segments))
        ended_s.append(round(age_s(), 3))
    phases.say(texts, ended_s=ended_s)
    return 0


if __name__ == "__main__":
    sys.exit(main())
