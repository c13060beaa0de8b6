"""Train the demo model, from scratch or from an exported model, for a given number of minutes.

    python -m scripts.demo_model.train --corpus DIR --out DIR --minutes 60                    # from scratch
    python -m scripts.demo_model.train --corpus DIR --out DIR --minutes 60 --init-ct2 MODEL   # go on from an export

Owns ``checkpoint.pt`` in the output directory: it is replaced every few minutes and holds the averaged weights that
export.py takes. Started again with the same arguments, a run goes on from it (``--out`` decides which run it is).
From scratch the first two fifths of the time goes to short windows, then 8 to 20 s, then 30 s; from an export it goes
straight to long windows. SIGTERM or Ctrl-C ends it with a last checkpoint.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import signal
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .model import BLANK, Network, Shape
from .recover import read_weights
from .tokenizer import build
from .windows import NO_TARGET, Batch, Composer

SHIPPED = Path("whisperd/share/demo_model")
SECONDS_A_BATCH = 180


@dataclass
class Progress:
    steps: int = 0
    windows: int = 0
    audio_hours: float = 0.0
    trained_minutes: float = 0.0
    accuracy: list[float] = field(default_factory=list)


class Optimisers:
    """Muon for the matrices inside the layers, AdamW for everything else."""

    def __init__(self, network: Network, rate: float) -> None:
        named = [(name, weight) for name, weight in network.named_parameters() if weight.requires_grad]
        matrices = [weight for name, weight in named if weight.ndim == 2 and ".layers." in name]
        chosen = {id(weight) for weight in matrices}
        rest = [weight for _, weight in named if id(weight) not in chosen]
        self.both: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        ]

    def step(self, rate: float) -> None:
        for optimiser in self.both:
            for group in optimiser.param_groups:
                group["lr"] = rate
            optimiser.step()

    def clear(self) -> None:
        for optimiser in self.both:
            optimiser.zero_grad()


class Average:
    """A running average of the weights: what gets exported."""

    def __init__(self, network: Network) -> None:
        self.weights = {name: value.detach().clone() for name, value in network.whisper.state_dict().items()}

    @torch.no_grad()
    def follow(self, network: Network, steps: int) -> None:
        share = 1 - min(0.998, (1 + steps) / (20 + steps))
        current = network.whisper.state_dict()
        torch._foreach_lerp_(list(self.weights.values()), [current[name] for name in self.weights], share)


def letter_loss(logits: Tensor, batch: Batch) -> Tensor:
    odds = functional.log_softmax(logits.float(), -1).transpose(0, 1)
    lengths = torch.full((odds.shape[1],), odds.shape[0])
    loss = functional.ctc_loss(odds, batch.letters, lengths, batch.letter_counts, blank=BLANK, reduction="none", zero_infinity=True)
    return (loss / batch.letter_counts.clamp(min=1)).mean()


class Trainer:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        torch.manual_seed(arguments.seed)
        tokenizer = build()
        shape = Shape(tokenizer.get_vocab_size(), encoder_layers=arguments.encoder_layers)
        self.network = Network(shape)
        self.scratch = arguments.init_ct2 is None
        if not self.scratch:
            self.network.start_from(read_weights(arguments.init_ct2))
        self.progress = Progress()
        self.average = Average(self.network)
        self.optimisers = Optimisers(self.network, arguments.rate)
        self.checkpoint = arguments.out / "checkpoint.pt"
        self.resume()
        seed = arguments.seed + 1000 * self.progress.steps
        self.composer = Composer(arguments.corpus, tokenizer, seed)
        self.draw = random.Random(seed)
        self.stopping = False
        self.ahead = ThreadPoolExecutor(1, "compose")  # the next batch is made while this one is learnt
        self.coming: Future[Batch] | None = None

    def resume(self) -> None:
        if not self.checkpoint.exists():
            return
        saved: dict[str, Any] = torch.load(self.checkpoint)
        self.network.load_state_dict(saved["network"])
        self.average.weights = saved["average"]
        for optimiser, state in zip(self.optimisers.both, saved["optimisers"], strict=True):
            optimiser.load_state_dict(state)
        self.progress = Progress(**saved["progress"])
        print(f"going on from step {self.progress.steps}, minute {self.progress.trained_minutes:.1f}", flush=True)

    def save(self) -> None:
        state = {
            "shape": asdict(self.network.shape),
            "network": self.network.state_dict(),
            "average": self.average.weights,
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers.both],
            "progress": asdict(self.progress),
            "from_scratch": self.scratch,
        }
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def next_batch(self, share: float) -> Batch:
        """``share`` is how much of the time is over; windows grow with it."""
        if self.scratch and share < 0.4:
            return self.composer.short_batch(16)
        choices = [8, 12, 16, 20] if self.scratch and share < 0.7 else self.arguments.seconds
        seconds = self.draw.choice(choices)
        return self.composer.batch(max(2, round(SECONDS_A_BATCH / seconds)), seconds)

    def take_batch(self, share: float) -> Batch:
        batch = self.coming.result() if self.coming else self.next_batch(share)
        self.coming = self.ahead.submit(self.next_batch, share)
        return batch

    def rate(self, share: float) -> float:
        highest = self.arguments.rate
        warm = min(1.0, (self.progress.steps + 1) / 60)
        return float(warm * highest * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))))

    def step(self, share: float) -> tuple[float, float]:
        batch = self.take_batch(share)
        with torch.autocast("cpu", torch.bfloat16):
            heard = self.network.whisper.encoder(batch.mel, batch.offset)
            logits = self.network.whisper.decoder(batch.tokens, heard)
            new_head = not self.scratch and self.progress.steps < 100  # let the spelling head find its feet first
            spelling = self.network.spelling(heard.detach() if new_head else heard)
        said = functional.cross_entropy(logits.float().flatten(0, 1), batch.targets.flatten(), ignore_index=NO_TARGET)
        spelt = letter_loss(spelling, batch)
        self.optimisers.clear()
        (said + 0.5 * spelt).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimisers.step(self.rate(share))
        self.average.follow(self.network, self.progress.steps)
        self.count(batch, logits)
        return said.item(), spelt.item()

    @torch.no_grad()
    def count(self, batch: Batch, logits: Tensor) -> None:
        wanted = batch.targets != NO_TARGET
        right = ((logits.argmax(-1) == batch.targets) & wanted).sum() / wanted.sum()
        progress = self.progress
        progress.accuracy = [*progress.accuracy[-99:], right.item()]
        progress.steps += 1
        progress.windows += len(batch.mel)
        progress.audio_hours += batch.mel.shape[0] * batch.mel.shape[2] / 360000

    def run(self) -> None:
        began, before, saved = time.monotonic(), self.progress.trained_minutes, time.monotonic()
        losses = (math.nan, math.nan)
        while not self.stopping and (share := self.progress.trained_minutes / self.arguments.minutes) < 1:
            losses = self.step(share)
            now = time.monotonic()
            self.progress.trained_minutes = before + (now - began) / 60
            if self.progress.steps % 50 == 0:
                self.report(losses)
            if now - saved > 120:
                self.save()
                saved = now
        self.save()
        self.report(losses)
        self.ahead.shutdown(cancel_futures=True)

    def stop(self, _signal: int, _frame: object) -> None:
        """On SIGTERM and SIGINT: finish the step, save, leave."""
        self.stopping = True

    def report(self, losses: tuple[float, float]) -> None:
        progress = self.progress
        accuracy = sum(progress.accuracy) / len(progress.accuracy)
        print(
            f"minute {progress.trained_minutes:.1f} step {progress.steps} windows {progress.windows} "
            f"audio {progress.audio_hours:.1f} h loss {losses[0]:.3f} letters {losses[1]:.3f} accuracy {accuracy:.4f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--init-ct2", type=Path, help="start from the weights of this exported model")
    parser.add_argument("--encoder-layers", type=int, default=3)
    parser.add_argument("--rate", type=float, default=1.2e-3, help="highest learning rate")
    parser.add_argument("--seconds", type=int, nargs="+", default=[8, 24, 30, 30, 30], help="lengths of long windows")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(arguments)
    signal.signal(signal.SIGTERM, trainer.stop)
    signal.signal(signal.SIGINT, trainer.stop)
    trainer.run()


if __name__ == "__main__":
    main()
