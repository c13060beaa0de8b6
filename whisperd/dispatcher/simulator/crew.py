"""crew: the simulated pool: steps the engines toward the advice as the real pool does, and lets their memory grow, fail and climb.

One start at a time on a GPU and only where there is room; who has nothing in hand is drained first, then who is loading, then the youngest;
a drained engine ends at its next boundary and its recordings go back with what is done of them. Out of memory in a batch halves the
engine's own batch (event), which doubles again after 64 calm batches; alone in a batch it ends the engine.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from whisperd.dispatcher.optimiser.values import Advice, CardPlan, Event
from whisperd.dispatcher.simulator.outcome import Happening
from whisperd.dispatcher.simulator.scenario import Kind
from whisperd.dispatcher.simulator.staff import WINDOW_S, Queue, Recording, Staff

if TYPE_CHECKING:
    from whisperd.dispatcher.simulator.world import World

CALM_BATCHES = 64
ALLOCATES_AT = 0.6  # of the time to load
FIRST_PEAK = 0.85  # of a typical batch's memory is there from the first one on
BOOT_PAUSE_MAX_S = 60.0


class Identity(NamedTuple):
    """What cannot be changed without loading anew."""

    card: int
    model: str
    kind: Kind
    threads: int


class Crews:
    """All engines of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.staff: list[Staff] = []
        self._count = 0
        self._boots: dict[Identity, tuple[int, float]] = {}  # failures, not before
        self._last_model: dict[int, str] = {}
        self._index = {spec.gpu: index for index, spec in enumerate(world.scenario.cards)}

    # --- toward the advice ---

    def step(self, advice: Advice) -> None:
        wanted = [(self._identity(plan), plan) for plan in advice.cards if plan.model]
        kinds = {identity for identity, _ in wanted}
        for worker in list(self.staff):
            if worker.life != "draining" and (_identity(worker) not in kinds or worker.id in advice.recycle):
                self.drain(worker)
        for identity, plan in wanted:
            own = [worker for worker in self.staff if worker.life != "draining" and _identity(worker) == identity]
            for worker in self._surplus(own, plan.workers):
                self.drain(worker)
            for worker in own:
                if worker.told != plan.batch:
                    self._set_batch(worker, plan.batch)
            self._start_missing(identity, plan)

    def _identity(self, plan: CardPlan) -> Identity:
        card = self._index[plan.gpu]
        scenario = self.world.scenario
        threads = max(1, round(scenario.cores) // max(1, plan.workers)) if scenario.cards[card].is_cpu else 0
        return Identity(card, plan.model, scenario.kind(plan.model, plan.compute_type), threads)

    def _surplus(self, own: list[Staff], workers: int) -> list[Staff]:
        ordered = sorted(own, key=lambda worker: (bool(worker.recordings), worker.life != "loading", -worker.id))
        return ordered[: max(0, len(own) - workers)]

    def _set_batch(self, worker: Staff, batch: int) -> None:
        worker.told = worker.limit = batch
        worker.climb_audio_s = worker.climb_at = math.inf
        self.world.dirty = True
        if worker.life == "busy":
            self._grow(worker, FIRST_PEAK, None)

    def _start_missing(self, identity: Identity, plan: CardPlan) -> None:
        world, ground = self.world, self.world.grounds[identity.card]
        missing = plan.workers - sum(1 for worker in self.staff if worker.life != "draining" and _identity(worker) == identity)
        while missing > 0:
            failures, not_before = self._boots.get(identity, (0, 0.0))
            loading = any(worker.card == identity.card and worker.life == "loading" for worker in self.staff)
            if world.now < not_before or (loading and not ground.spec.is_cpu):
                return
            need_mib = world.decider.need_mib(world.state, plan.gpu, plan.model, plan.compute_type, plan.batch)
            if need_mib is not None and (ground.usable != "ok" or ground.free_mib < need_mib):
                return
            self._start(identity, plan.batch)
            missing = 0 if failures else missing - 1

    def _start(self, identity: Identity, batch: int) -> None:
        world = self.world
        self._count += 1
        worker = Staff(self._count, identity.card, identity.model, identity.kind, batch=batch, threads=identity.threads, now=world.now)
        worker.until = world.now + ALLOCATES_AT * world.scenario.load_s
        self.staff.append(worker)
        world.outcome.starts += 1
        world.outcome.swaps += self._last_model.get(identity.card, identity.model) != identity.model
        self._last_model[identity.card] = identity.model
        world.dirty = True

    def drain(self, worker: Staff) -> None:
        """It ends at its next boundary: at once when it has nothing in hand."""
        world = self.world
        now_s = 0.0 if not worker.recordings else world.scenario.drain_s * world.chance.uniform(0.5, 1.5)
        worker.life, worker.until, worker.climb_audio_s = "draining", world.now + now_s, math.inf
        world.dirty = True
        if not now_s:
            self._end(worker)

    # --- moments of an engine ---

    def boundary(self, worker: Staff) -> None:
        """What it was doing besides decoding is over."""
        if worker.life == "draining":
            self._end(worker)
        elif worker.birth:
            self._take_weights(worker)
        else:
            worker.life, worker.until = "idle", math.inf
            self._boots.pop(_identity(worker), None)
            self.world.dirty = True

    def _take_weights(self, worker: Staff) -> None:
        ground = self.world.grounds[worker.card]
        if ground.lost or ground.frozen or ground.free_mib < worker.kind.weights_mib:
            if not (ground.lost or ground.frozen):
                self.world.outcome.load_out_of_memory += 1
                self._tell("load_out_of_memory", worker, worker.told)
            self._boot_failed(worker)
            return
        worker.birth = False
        worker.until = worker.born_at + self.world.scenario.load_s
        self._hold(worker, worker.kind.weights_mib)

    def _boot_failed(self, worker: Staff) -> None:
        failures = self._boots.get(_identity(worker), (0, 0.0))[0] + 1
        self._boots[_identity(worker)] = failures, self.world.now + min(BOOT_PAUSE_MAX_S, 2.0 ** (failures - 1))
        self._end(worker)

    def climb(self, worker: Staff) -> None:
        """Calm for long enough: twice the batch."""
        worker.limit = min(worker.told, 2 * worker.limit)
        worker.climb_audio_s = worker.climb_at = math.inf
        self.world.dirty = True
        if self._grow(worker, FIRST_PEAK, None) and worker.limit < worker.told:
            self._calm_down(worker)

    def _calm_down(self, worker: Staff) -> None:
        worker.climb_audio_s = worker.audio_s + CALM_BATCHES * WINDOW_S * max(1, worker.batch)

    def next_mark(self, worker: Staff) -> None:
        """A recording's hungriest batch, or its end."""
        world = self.world
        while worker.marks and worker.marks[0][0] <= worker.served_s + 1e-6:
            _, ends, _, recording = heapq.heappop(worker.marks)
            if ends:
                batch = worker.batch
                worker.finish(recording)
                recording.ended_at = world.now
                worker.note_hunger()
                self._after_change(worker, batch)
            elif recording.peak_left_s >= 0:
                recording.left_s = max(0.001, recording.mark - worker.served_s)
                if not self._grow(worker, recording.peak, recording):
                    return  # it is dead
                recording.peak_left_s = -1.0
        worker.set_speed(world.now)

    def _after_change(self, worker: Staff, batch: int) -> None:
        """It has more or less in hand than before."""
        if not worker.recordings and worker.life == "busy":
            worker.life = "idle"
        if worker.batch != batch:
            self.world.dirty = True
        else:
            worker.set_speed(self.world.now)

    # --- memory ---

    def _hold(self, worker: Staff, mib: float) -> None:
        self.world.grounds[worker.card].own_mib += mib - worker.memory_mib
        worker.memory_mib = mib

    def _grow(self, worker: Staff, peak: float, recording: Recording | None) -> bool:
        """A batch as large as it may be now, at this peak; smaller ones until it fits. Whether the engine survives."""
        batch, hit = worker.batch, False
        ground = self.world.grounds[worker.card]
        while batch:
            need_mib = worker.kind.memory_mib(batch, peak)
            if need_mib - worker.memory_mib <= max(0.0, ground.free_mib):
                break
            if not hit:
                hit = True
                self._count_hit(worker, recording)
            self._tell("out_of_memory", worker, batch)
            if batch == 1:
                self._die_hungry(worker, recording, need_mib)
                return False
            batch = worker.limit = batch // 2
            self.world.dirty = True
        self._hold(worker, max(worker.memory_mib, worker.kind.memory_mib(batch, peak) if batch else 0.0))
        if hit:
            self._calm_down(worker)
        return True

    def _count_hit(self, worker: Staff, recording: Recording | None) -> None:
        self.world.outcome.out_of_memory += 1
        self.world.outcome.happenings.append(Happening(self.world.now, worker.card, "out_of_memory"))
        if recording is not None:
            recording.hits += 1

    def _die_hungry(self, worker: Staff, recording: Recording | None, need_mib: float) -> None:
        if recording is not None:
            recording.needs_mib = need_mib
        self.world.outcome.died += 1
        self.world.outcome.happenings.append(Happening(self.world.now, worker.card, "worker_died"))
        self._tell("worker_died", worker, worker.told)
        self.kill(worker)

    def _tell(self, kind: str, worker: Staff, batch: int) -> None:
        """As the pool does: of what it would have needed nobody knows more than what it held."""
        self.world.events.append(
            Event(
                kind=kind,  # type: ignore[arg-type]
                gpu=self.world.scenario.cards[worker.card].gpu,
                worker=worker.id,
                compute_type=worker.kind.compute_type,
                batch=batch,
                need_mib=None if worker.birth else round(worker.memory_mib),
            )
        )

    # --- ends ---

    def kill(self, worker: Staff) -> None:
        """It is dead with a batch in its hands."""
        number = len(worker.recordings)
        self._give_back(worker, lost_s=WINDOW_S * worker.batch / number if number else 0.0)
        self._end(worker)

    def _end(self, worker: Staff) -> None:
        self._give_back(worker, lost_s=0.0)
        self._hold(worker, 0.0)
        self.staff.remove(worker)
        worker.next_at = worker.until = worker.climb_at = math.inf
        self.world.grounds[worker.card].let_others_in(self.world.now)
        self.world.dirty = True

    def _give_back(self, worker: Staff, lost_s: float) -> None:
        outcome = self.world.outcome
        for recording in worker.put_down():
            again_s = min(lost_s, recording.audio_s - recording.left_s)
            recording.left_s += again_s
            outcome.lost_s += again_s
            outcome.progress_of[worker.model] -= again_s
            self.world.queue.put(recording)

    def card_lost(self, card: int) -> None:
        """Its workers are dead, and nobody blames them for it."""
        for worker in [worker for worker in self.staff if worker.card == card]:
            self.kill(worker)

    def end_all(self) -> None:
        """The daemon ends: all come to a boundary."""
        for worker in list(self.staff):
            self._end(worker)

    # --- work ---

    def hand_out(self) -> None:
        """As long as there is work and room: the next recording to the engine with most room for it."""
        queue = self.world.queue
        if not queue:
            return
        for model in self.world.scenario.models:
            self._hand_out(queue, model, [worker for worker in self.staff if worker.model == model and worker.serves])

    def _hand_out(self, queue: Queue, model: str, seats: Iterable[Staff]) -> None:
        open_seats = [(len(worker.recordings) - 2 * worker.told, worker.id, worker) for worker in seats]
        heapq.heapify(open_seats)
        touched: dict[int, tuple[Staff, int]] = {}
        while open_seats and open_seats[0][0] < 0:
            taken, number, worker = open_seats[0]
            recording = self._held(queue, worker) or queue.next(model)
            if recording is None:
                break
            touched.setdefault(number, (worker, worker.batch))
            if recording.first_at < 0:
                recording.first_at = self.world.now
            worker.take(recording)
            worker.life = "busy"
            heapq.heapreplace(open_seats, (taken + 1, number, worker))
        for worker, batch in touched.values():
            self._after_change(worker, batch)
            if worker.batch > batch:
                self._grow(worker, FIRST_PEAK, None)

    def _held(self, queue: Queue, worker: Staff) -> Recording | None:
        if not queue.held:
            return None
        return queue.fitting(worker.model, self.world.grounds[worker.card].free_mib + worker.memory_mib)


def _identity(worker: Staff) -> Identity:
    return Identity(worker.card, worker.model, worker.kind, worker.threads)
