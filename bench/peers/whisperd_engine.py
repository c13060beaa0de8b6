"""whisperd_engine: our engine child over the wire: [--mode M] [--encoder E] [--batch N] MODEL THREADS FILE…"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict

from bench.engine import Engine, Job, options_of
from bench.measure import cpu_s, ending
from bench.peers.phases import Phases


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", default="batched")
    parser.add_argument("--encoder", default="auto")
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--language", default="auto")
    parser.add_argument("model")
    parser.add_argument("threads", type=int)
    parser.add_argument("files", nargs="+")
    args = parser.parse_args()
    phases = Phases()
    engine = Engine(args.model, threads=args.threads, batch=args.batch, encoder=args.encoder)
    phases.loaded(children_cpu_s=engine.boot_cpu_s)
    jobs = [Job(path, options_of(args.model, mode=args.mode, language=args.language)) for path in args.files]
    engine.work(jobs)
    used_s = cpu_s(engine.child.pid)
    engine.stop()
    verdicts = [window.verdict.quality for job in jobs for window in job.windows]
    phases.say(
        [job.text for job in jobs],
        children_cpu_s=used_s,
        encoder=engine.ready.encoder,
        slots=engine.ready.slots,
        counters=asdict(engine.counters),
        verdicts={name: verdicts.count(name) for name in sorted(set(verdicts))},
    )
    return 0


if __name__ == "__main__":
    sys.exit(ending(main))
