"""planning: the optimiser in its place: what it is told, what is made of its answer, what is kept of it.

Owns: the optimiser's state, the plan in force, learned tables and plans in the ledger, and which cards there are. Decides nothing itself.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime

import msgspec
from loguru import logger

from whisperd.config import Settings
from whisperd.dispatcher import choice, limits, machine, optimiser, reaction
from whisperd.dispatcher.engines import Engine, Memory, Share
from whisperd.dispatcher.gauge import Gauge
from whisperd.dispatcher.optimiser import values
from whisperd.dispatcher.optimiser.values import CPU, Advice, CardPlan
from whisperd.dispatcher.pool import Pool
from whisperd.dispatcher.queueing import Row
from whisperd.ledger.ledger import Ledger
from whisperd.vocabulary import Plan, Reading
from whisperd.wire import LoadModel

LEARNED_STORE_S = 300.0
STRANDED_S = 60.0
CPU_COMPUTE_TYPE = "int8"
UNHEARD = reaction.Standing("unknown", "the GPU probe has not told of it yet")


class Planning:
    """The plan, made anew every few seconds (guards) and every `interval_s` (history)."""

    def __init__(self, ledger: Ledger, gauge: Gauge, pool: Pool, settings: Settings) -> None:
        self._ledger = ledger
        self._gauge = gauge
        self._pool = pool
        self._reactions = reaction.Reactions()
        self._state: optimiser.State | None = None
        self._ticks = machine.ticks()
        self._now = 0.0
        self._learned_at = 0.0
        self._cards: dict[str, Reading] = {}  # every GPU seen in this life, as last seen well
        self.settings = settings
        self.choice: choice.Choice | None = None
        self.advice: Advice | None = None
        self.plan: Plan | None = None
        self._usable_at = 0.0  # when a card was good for anything last
        self.stranded: set[str] = set()  # models of jobs that only the CPU can run
        self.quarantined: set[str] = set()  # models of which suspects wait: an engine of their own is wanted

    # --- deciding ---

    def decide(self, wall: float) -> None:
        """Look, decide, store what is new."""
        if not self._gauge.readings:
            return
        self._choose()
        if self.choice is None:
            return
        self._now = max(wall, self._now + 0.001)  # a clock set back is no news from the past
        policy = limits.policy_of(self.settings, self.choice.compute_type)
        if self._state is None:
            self._state = optimiser.start(policy, self._learned())
        seen = self._observe()
        if not self._usable_at or any(card.usable in ("ok", "suspect", "frozen") for card in seen.cards):
            self._usable_at = self._now
        self._state, advice = optimiser.decide(self._state, seen, policy)
        self._follow(advice, seen, wall)

    def _follow(self, advice: Advice, seen: values.Observation, wall: float) -> None:
        self._pool.recycle(advice.recycle, time.monotonic())
        changed = self.advice is None or advice.cards != self.advice.cards
        self.advice = advice
        if changed or advice.reasons:
            self._store(advice, wall)
        if changed or wall - self._learned_at >= LEARNED_STORE_S:
            self.store_learned(wall)
        for card in seen.cards:
            of_cpu = card.gpu == CPU and card.memory_free_mib is not None and card.memory_total_mib is not None
            staying = [worker for worker in card.workers if worker.life != "draining"]
            self._gauge.note(
                card.gpu,
                workers=len(staying),
                batch=max((worker.batch for worker in staying), default=0),
                own_mib=sum(worker.memory_mib or 0 for worker in card.workers),
                audio_s=self._pool.audio_s[card.gpu],
                memory=Memory(card.memory_free_mib or 0, card.memory_total_mib or 0) if of_cpu else None,
            )

    def _store(self, advice: Advice, wall: float) -> None:
        workers = sum(card.workers for card in advice.cards)
        said = "; ".join(reason.text for reason in advice.reasons) or "as it was"
        self.plan = Plan(workers=workers, reason=said)
        body = {"cards": msgspec.to_builtins(advice.cards), "reasons": msgspec.to_builtins(advice.reasons)}
        self._ledger.record_plan(self.plan, wall, body=body)
        logger.bind(event="plan").info(f"plan: {describe(advice.cards)} ({said})")

    def _learned(self) -> list[optimiser.Learned]:
        return [msgspec.convert(row, optimiser.Learned) for row in self._ledger.learned()]

    def store_learned(self, wall: float) -> None:
        """What a restart begins with."""
        if self._state is not None:
            self._learned_at = wall
            self._ledger.learn([msgspec.to_builtins(row) for row in self._state.learned()], wall)

    # --- what is there ---

    def _choose(self) -> None:
        """What "auto" means. A GPU that was seen, or whose driver is in trouble, is waited for; without any GPU the CPU works."""
        for found in self._gauge.readings:
            if found.gpu and found.status == "ok":
                self._cards[found.gpu] = found
        engine = self.settings.engine
        readings = list(self._cards.values())
        in_trouble = any(found.status not in ("ok", "no_gpu", "no_driver") for found in self._gauge.readings)
        if engine.device == "auto" and not readings and in_trouble and not self.settings.dispatcher.cpu_fallback:
            return
        hardware = choice.hardware_of(readings, cores=machine.cores(), memory_mib=machine.memory_total_mib())
        chosen = choice.choose(engine.model, engine.device, engine.compute_type, hardware)
        if chosen != self.choice:
            if self.choice is not None:  # another model or device by another setting: with what is known, from the beginning
                self.store_learned(time.time())
                self._state = None
            self.choice = chosen
            logger.bind(event="model").info(f"model: {chosen.reason}")

    def _observe(self) -> values.Observation:
        ticks, before = machine.ticks(), self._ticks
        self._ticks = ticks
        by_card: dict[str, list[Engine]] = {}
        for engine in self._pool.engines.values():
            by_card.setdefault(engine.card, []).append(engine)
        cards = self._gpus(by_card) if self.choice is not None and self.choice.device == "cuda" else (self._cpu(by_card.get(CPU, [])),)
        return values.Observation(
            now=self._now,
            cards=cards,
            backlog=self._backlog(),
            events=self._pool.take_events(),
            cores=machine.cores(),
            cores_busy=machine.busy_cores(before, ticks),
        )

    def _backlog(self) -> tuple[values.Backlog, ...]:
        rows = self._ledger.backlog(self._now, default_model=self.choice.model if self.choice else "")
        waiting = [values.Backlog(model=row["model"], jobs=row["jobs"], oldest_s=row["oldest_s"], urgent=row["urgent"]) for row in rows]
        if not waiting and self.choice is not None:  # be ready for the usual model
            waiting = [values.Backlog(model=self.choice.model, jobs=0, oldest_s=0.0)]
        return tuple(waiting)

    def _cpu(self, engines: list[Engine]) -> values.Card:
        for engine in engines:
            engine.see_memory(None, time.monotonic())
        return values.Card(
            gpu=CPU,
            memory_total_mib=machine.memory_total_mib(),
            memory_free_mib=machine.memory_free_mib(),
            workers=tuple(engine.observed() for engine in engines),
            limits=self._limits(CPU),
        )

    def _gpus(self, by_card: Mapping[str, list[Engine]]) -> tuple[values.Card, ...]:
        """Every GPU that was seen in this life, and whether it is good for anything now."""
        pids = {gpu: tuple(engine.child.pid for engine in engines) for gpu, engines in by_card.items()}
        pids = {gpu: pids.get(gpu, ()) for gpu in self._cards}
        readings = self._gauge.collect()
        self._reactions, standings, hits = reaction.react(self._reactions, readings, pids, self._now)
        for hit in hits:
            self._restart(hit)
        now = {found.gpu: found for found in readings}
        return tuple(
            self._gpu(known, now.get(gpu), standings.get(gpu, UNHEARD), by_card.get(gpu, [])) for gpu, known in self._cards.items()
        )

    def _gpu(self, known: Reading, found: Reading | None, standing: reaction.Standing, engines: list[Engine]) -> values.Card:
        seen = found if found is not None and found.status == "ok" else None
        if standing.usable == "lost":
            self._pool.kill_card(known.gpu, standing.why, time.monotonic())
        by_driver = {process.pid: process.vram_mib for process in (seen.processes if seen and seen.processes else ())}
        for engine in engines:
            engine.see_memory(by_driver.get(engine.child.pid) or None, self._gauge.looked_at)  # in a container it may be told as 0
        free_mib = None
        if seen is not None and seen.vram_total_mib is not None and seen.vram_used_mib is not None:
            free_mib = seen.vram_total_mib - seen.vram_used_mib
        return values.Card(
            gpu=known.gpu,
            driver=known.driver,
            usable=standing.usable,
            why=standing.why,
            memory_total_mib=known.vram_total_mib,
            memory_free_mib=free_mib,
            utilisation_percent=seen.utilisation_percent if seen else None,
            temperature_c=seen.temperature_c if seen else None,
            slowdown_c=known.slowdown_c,
            throttled=bool(seen and set(seen.throttled) - {"power_cap"}),
            workers=tuple(engine.observed() for engine in engines),
            limits=self._limits(known.gpu),
        )

    def _restart(self, hit: reaction.Restart) -> None:
        engine = self._pool.engines.get(hit.pid)
        if engine is not None:
            self._pool.kill(engine, hit.why, time.monotonic())

    def _limits(self, gpu: str) -> values.Limits:
        return limits.limits_of(gpu, self.settings, datetime.now())  # quiet hours are those of the wall clock in the room

    # --- what should run ---

    def shares(self) -> list[Share]:
        """The plan as the pool takes it. A plan that is not to be followed leaves one worker on each card."""
        if self.advice is None:
            return []
        dry_run, alone = self.settings.dispatcher.dry_run, set(self.quarantined)
        shares = []
        for card in self.advice.cards:
            workers = min(1, card.workers) if dry_run else card.workers
            shares.append(Share(self._request(card), workers, quarantine=workers > 0 and card.model in alone))
            if workers:
                alone.discard(card.model)
        return [*shares, *self._fallback_shares()]

    def _fallback_shares(self) -> list[Share]:
        """The CPU beside the GPUs, for what cannot run on them (`dispatcher.cpu_fallback`)."""
        batch = limits.policy_of(self.settings, "").cpu_batch_first
        plans = [CardPlan(gpu=CPU, model=model, compute_type=CPU_COMPUTE_TYPE, batch=batch, workers=1) for model in sorted(self.stranded)]
        return [Share(self._request(plan), plan.workers) for plan in plans]

    def is_fallback(self, card: str) -> bool:
        """Whether this is the CPU beside the GPUs."""
        return card == CPU and self.choice is not None and self.choice.device == "cuda"

    def strand(self, ready: Sequence[Row]) -> set[int]:
        """Which of these jobs only the CPU can run: they need more memory than any card has, or no card has been usable for a while.

        Their models are kept, so that `shares` has an engine for them; () without `dispatcher.cpu_fallback`.
        """
        self.stranded = set()
        if not self.settings.dispatcher.cpu_fallback or self.choice is None or self.choice.device != "cuda":
            return set()
        largest_mib = max((card.vram_total_mib or 0 for card in self._cards.values()), default=0)
        no_card = bool(self._now) and self._now - self._usable_at >= STRANDED_S
        left = [row for row in ready if no_card or (row["needs_mib"] or 0) > largest_mib]
        self.stranded = {row["model"] for row in left}
        return {row["id"] for row in left}

    def _request(self, card: CardPlan) -> LoadModel:
        engine, on_cpu = self.settings.engine, card.gpu == CPU
        return LoadModel(
            model=card.model,
            device="cpu" if on_cpu else "cuda",
            compute_type=card.compute_type,
            gpu="" if on_cpu else card.gpu,
            cpu_threads=engine.cpu_threads or max(1, machine.cores() // max(1, card.workers if on_cpu else 1)),
            batch=card.batch,
            encoder=engine.encoder,
            cache_dir=self.settings.cache_dir,
            offline=engine.offline,
            duration_max_s=engine.duration_max_s,
            channels_max=engine.channels_max,
            rate_max_hz=engine.rate_max_hz,
        )

    def memory(self) -> dict[str, Memory]:
        """Of each GPU, where it is known."""
        return {
            found.gpu: Memory(free_mib=found.vram_total_mib - found.vram_used_mib, total_mib=found.vram_total_mib)
            for found in self._gauge.readings
            if found.gpu and found.vram_total_mib is not None and found.vram_used_mib is not None
        }

    def no_room(self, request: LoadModel) -> str:
        """Looked at immediately before each start: memory may have gone since the plan was made."""
        if self._state is None or not request.gpu:
            return ""
        found = next((found for found in self._gauge.readings if found.gpu == request.gpu), None)
        if found is None or found.status != "ok":
            return f"{request.gpu} cannot be read now" if found is None else found.what
        need_mib = optimiser.start_need_mib(self._state, request.gpu, request.model, request.compute_type, request.batch)
        memory = self.memory().get(request.gpu)
        if need_mib is None or memory is None or memory.free_mib >= need_mib:
            return ""
        return f"{memory.free_mib} MiB are free, it needs {need_mib}"


def describe(cards: tuple[CardPlan, ...]) -> str:
    """The plan in a few words."""
    said = [
        f"{card.workers} worker{'' if card.workers == 1 else 's'} with batch {card.batch} on {card.gpu}: {card.model} ({card.compute_type})"
        for card in cards
    ]
    return "; ".join(said) or "no card to work on"
