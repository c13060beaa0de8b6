"""world: the simulation itself: events in order, rates constant between them, the policy asked every 2 s.

`simulate(scenario, decider, seed)` runs one installation and returns its Outcome. The same arguments give the same outcome.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

from whisperd.dispatcher.optimiser.values import Advice, Backlog, Event, Observation
from whisperd.dispatcher.simulator import contention
from whisperd.dispatcher.simulator.contention import Group, Speeds
from whisperd.dispatcher.simulator.crew import Crews
from whisperd.dispatcher.simulator.decider import Decider
from whisperd.dispatcher.simulator.ground import Ground, grounds
from whisperd.dispatcher.simulator.outcome import Crew, Decision, Denial, Glance, Happening, Outcome, Staffing
from whisperd.dispatcher.simulator.scenario import Arrival, Change, Scenario
from whisperd.dispatcher.simulator.staff import Queue, Recording, Staff

STEP_S = 2.0
NOISE_S = 30.0
GLANCE_S = 60.0
EPOCH_S = 1_000_000.0
"""The observation's `now` at the scenario's begin: any clock will do, and zero would hide mistakes."""


def simulate(scenario: Scenario, decider: Decider, seed: int = 0) -> Outcome:
    """Run it from the first moment to the horizon."""
    return World(scenario, decider, seed).run()


class World:
    """One run."""

    def __init__(self, scenario: Scenario, decider: Decider, seed: int) -> None:
        self.scenario, self.decider = scenario, decider
        self.now = 0.0
        self.chance = random.Random(seed)
        self.recordings = drawn(scenario, seed)
        self.changes: Sequence[Change] = sorted(scenario.changes, key=lambda change: change.at_s)
        self.grounds: list[Ground] = grounds(scenario.cards)
        self.queue = Queue()
        self.outcome = Outcome(scenario.name, decider.name, seed, scenario.horizon_s, progress_of=dict.fromkeys(scenario.models, 0.0))
        self.crews = Crews(self)
        self.events: list[Event] = []
        self.state: Any = decider.start(scenario.policy)
        self.advice: Advice | None = None
        self.cores_foreign = 0.0
        self.content = (1.0, 1.0)
        self.dirty = True
        self._arrived = self._changed = 0
        self._speeds: dict[Any, Speeds] = {}
        self._cores_busy = 0.0
        self._working: list[Staff] = []

    @property
    def staff(self) -> list[Staff]:
        return self.crews.staff

    # --- time ---

    def run(self) -> Outcome:
        horizon_s = self.scenario.horizon_s
        step_at = 0.0
        noise_at, glance_at = NOISE_S, 0.0
        while self.now < horizon_s:
            if self.dirty:
                self._set_speeds()
            self._advance(min(step_at, horizon_s, self._next_happening()))
            self._happen()
            if self.now >= step_at:
                if self.now >= noise_at:
                    noise_at += NOISE_S
                    self._draw_noise()
                if self.now >= glance_at:
                    glance_at += GLANCE_S
                    self._glance()
                self._step()
                step_at += STEP_S
        return self._close()

    def _next_happening(self) -> float:
        next_at = math.inf
        if self._arrived < len(self.recordings):
            next_at = self.recordings[self._arrived].arrived_at
        if self._changed < len(self.changes):
            next_at = min(next_at, self.changes[self._changed].at_s)
        for worker in self.staff:
            next_at = min(next_at, worker.next_at, worker.until, worker.climb_at)
        return next_at

    def _advance(self, until: float) -> None:
        seconds = until - self.now
        if seconds > 0:
            self.now = until
            outcome = self.outcome
            for worker in self._working:
                audio_s = worker.advance(seconds)
                outcome.progress_s += audio_s
                outcome.progress_of[worker.model] += audio_s
            if not self._working and not self.queue:
                outcome.idle_memory_mib_s += seconds * sum(ground.own_mib for ground in self.grounds if not ground.spec.is_cpu)

    def _happen(self) -> None:
        """Everything that is due."""
        now = self.now + 1e-9
        while self._arrived < len(self.recordings) and self.recordings[self._arrived].arrived_at <= now:
            self.queue.put(self.recordings[self._arrived])
            self._arrived += 1
        while self._changed < len(self.changes) and self.changes[self._changed].at_s <= now:
            self._change(self.changes[self._changed])
            self._changed += 1
        for worker in list(self.staff):
            if worker.until <= now:
                self.crews.boundary(worker)
            if worker.climb_at <= now:
                self.crews.climb(worker)
            if worker.next_at <= now:
                self.crews.next_mark(worker)
        self.crews.hand_out()

    def _change(self, change: Change) -> None:
        self.dirty = True
        self.outcome.happenings.append(Happening(self.now, change.card, change.what))
        match change.what:
            case "cores":
                self.cores_foreign = change.busy
            case "content":
                self.content = (change.gpu, change.host)
            case "restart":
                self.crews.end_all()
                self.state, self.advice = self.decider.restart(self.state, self.scenario.policy), None
            case _:
                ground = self.grounds[change.card]
                ground.change(change)
                ground.let_others_in(self.now)
                if ground.lost:
                    self.crews.card_lost(change.card)

    # --- speed ---

    def _set_speeds(self) -> None:
        """Solve for the present configuration (once for each that ever was) and give each engine its rate."""
        self.dirty = False
        self._working = [worker for worker in self.staff if worker.recordings and worker.life != "loading"]
        count: dict[tuple[Any, ...], int] = {}
        keys = []
        for worker in self._working:
            key = (worker.card, worker.kind, worker.batch, worker.threads)
            keys.append(key)
            count[key] = count.get(key, 0) + 1
        clocks = tuple(ground.clock for ground in self.grounds)
        foreign = tuple(ground.foreign_busy for ground in self.grounds)
        weather = (tuple(sorted(count.items(), key=_order)), clocks, foreign, self.cores_foreign, self.content)
        speeds = self._speeds.get(weather)
        if speeds is None:
            groups = [self.group(key, number) for key, number in weather[0]]
            speeds = self._speeds[weather] = contention.solve(
                groups, self.scenario.cards, foreign, self.scenario.cores, cores_busy=self.cores_foreign, spin=self.scenario.spin
            )
            speeds = self._speeds[weather] = self._crooked(groups, [key[2] for key, _ in weather[0]], speeds)
        rates = {key: rate for (key, _), rate in zip(weather[0], speeds.rates, strict=True)}
        for worker, key in zip(self._working, keys, strict=True):
            worker.nominal = rates[key]
        for worker in self.staff:
            worker.set_speed(self.now)
        for ground, busy in zip(self.grounds, speeds.busy, strict=True):
            ground.busy = busy
        self._cores_busy = speeds.cores + self.cores_foreign
        self._note_staffing()

    def _crooked(self, groups: Sequence[Group], batches: Sequence[int], speeds: Speeds) -> Speeds:
        scenario = self.scenario
        if scenario.crooked is None:
            return speeds
        on_card = [sum(group.number for group in groups if group.card == card) for card in range(len(scenario.cards))]
        factors = [scenario.factor(group.card, on_card[group.card], batch) for group, batch in zip(groups, batches, strict=True)]
        return speeds._replace(rates=tuple(rate * factor for rate, factor in zip(speeds.rates, factors, strict=True)))

    def group(self, key: tuple[Any, ...], number: int) -> Group:
        card, kind, batch, threads = key
        spec, ground = self.scenario.cards[card], self.grounds[card]
        gpu, host = self.content
        cost = self.scenario.cost(kind, batch)
        if spec.is_cpu:
            return Group(card, number, 0.0, kind.host_s * cost * host, threads)
        return Group(card, number, kind.gpu_s * cost * gpu / (spec.speed * ground.clock), kind.host_s * host)

    def _draw_noise(self) -> None:
        sigma = self.scenario.local_sigma
        for worker in self._working:
            one = sigma / math.sqrt(len(worker.recordings) or 1)
            worker.noise = math.exp(self.chance.gauss(-one * one / 2, one))
            worker.set_speed(self.now)

    def _note_staffing(self) -> None:
        count: dict[tuple[int, str, str, int, int], int] = {}
        for worker in self.staff:
            if worker.serves:
                key = (worker.card, worker.model, worker.kind.compute_type, worker.limit, worker.threads)
                count[key] = count.get(key, 0) + 1
        crews = tuple(Crew(*key, number) for key, number in sorted(count.items()))
        log = self.outcome.staffing
        if not log or log[-1].crews != crews:
            log.append(Staffing(self.now, crews))

    # --- the policy ---

    def _step(self) -> None:
        for ground in self.grounds:
            if not ground.spec.is_cpu and ground.heat(STEP_S):
                self.dirty = True
            ground.let_others_in(self.now)
        self.state, advice = self.decider.decide(self.state, self.observation(), self.scenario.policy)
        if advice.reasons or self.advice is None or advice.cards != self.advice.cards:
            self.outcome.decisions.append(Decision(self.now, advice.cards, advice.reasons))
        self.advice = advice
        self.crews.step(advice)
        self.crews.hand_out()

    def observation(self) -> Observation:
        """Only what a dispatcher knows."""
        workers: list[list[Any]] = [[] for _ in self.grounds]
        for worker in self.staff:
            workers[worker.card].append(worker.observed(told_by_driver=self.scenario.told_by_driver))
        cards = tuple(ground.observed(own, self.chance) for ground, own in zip(self.grounds, workers, strict=True))
        events, self.events = tuple(self.events), []
        return Observation(
            now=EPOCH_S + self.now,
            cards=cards,
            backlog=self._backlog(),
            events=events,
            cores=round(self.scenario.cores),
            cores_busy=max(0.0, min(self.scenario.cores, self._cores_busy + self.chance.gauss(0, 0.2))),
        )

    def _backlog(self) -> tuple[Backlog, ...]:
        found = []
        for model in self.scenario.models:
            ready = self.queue.ready.get(model)
            if ready:
                oldest_s = self.now - ready[0][1]
                urgent = sum(1 for entry in ready if not entry[0]) if not ready[0][0] else 0
                found.append(Backlog(model=model, jobs=len(ready), oldest_s=oldest_s, urgent=urgent))
        if not found and self.advice is None:  # nothing to do yet: be ready for the usual model
            found.append(Backlog(model=next(iter(self.scenario.models)), jobs=0, oldest_s=0.0))
        return tuple(found)

    # --- the record ---

    def _glance(self) -> None:
        for ground in self.grounds:
            own = [worker for worker in self.staff if worker.card == ground.index and worker.serves]
            batch = max((worker.limit for worker in own), default=0)
            progress_s = self.outcome.progress_s - self.outcome.lost_s
            memory = (ground.own_mib, ground.foreign_mib, ground.wanted_mib)
            self.outcome.glances.append(Glance(self.now, ground.index, len(own), batch, *memory, ground.celsius, progress_s))

    def _close(self) -> Outcome:
        outcome = self.outcome
        for ground in self.grounds:
            if ground.asked_at is not None:
                ground.denials.append(Denial(ground.asked_at, ground.index, self.now - ground.asked_at))
            outcome.denials += ground.denials
            outcome.throttled_s.append(ground.throttled_s)
        outcome.recordings = len(self.recordings)
        for recording in self.recordings:
            outcome.ended += recording.ended_at >= 0
            outcome.hit_twice += recording.hits > 1
            if recording.arrived_at < self.scenario.horizon_s:
                outcome.waits_s.append((recording.ended_at if recording.ended_at >= 0 else self.now) - recording.arrived_at)
        return outcome


def _order(item: tuple[tuple[Any, ...], int]) -> tuple[Any, ...]:
    card, kind, batch, threads = item[0]
    return card, kind.compute_type, kind.gpu_s, kind.host_s, batch, threads


def drawn(scenario: Scenario, seed: int) -> list[Recording]:
    """The recordings with what chance gives them; another seed's are others."""
    arrivals: list[Arrival] = sorted(scenario.arrivals(random.Random(seed * 7919 + 1)), key=lambda arrival: arrival.at_s)
    chance = random.Random(seed * 104729 + 2)
    sigma = scenario.cost_sigma
    found = []
    for number, arrival in enumerate(arrivals):
        recording = Recording(number, arrival.at_s, arrival.audio_s, arrival.model, urgent=arrival.urgent)
        peak = math.exp(chance.gauss(0, scenario.peak_sigma)) * (scenario.tail_factor if chance.random() < scenario.tail_p else 1.0)
        cost = math.exp(chance.gauss(-sigma * sigma / 2, sigma))
        recording.peak = peak if arrival.peak is None else arrival.peak
        recording.cost = cost if arrival.cost is None else arrival.cost
        recording.peak_left_s = arrival.audio_s * (1 - chance.uniform(0.05, 0.6))
        found.append(recording)
    return found
