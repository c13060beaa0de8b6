"""climb: trials of the batch first, then of the number of workers, then of the precision (OPTIMISER §5).

One experiment at a time: the present setting is measured, another is set, measured as well, and kept only if it earns its place: the
burden of proof is on the larger one. What did not pay is blocked for an hour, then two, up to eight. Once nothing is worth trying, a
scheduled look asks now and then whether one worker fewer would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from whisperd.dispatcher.optimiser import curves, gate, sentences, watch
from whisperd.dispatcher.optimiser.curves import Belief
from whisperd.dispatcher.optimiser.state import Block, CardState, Comparison, Knobs, Pace, Proven, Trial
from whisperd.dispatcher.optimiser.values import CPU, Card, Policy, Reason

replace = msgspec.structs.replace

WORTH = 0.012
"""Gain (logarithm) that a larger setting must bring."""
BRISK_S, CALM_S = 20.0, 45.0
"""Seconds that a pace must cover before it is judged, while searching and later."""
BRISK_MAX_S, CALM_MAX_S = 60.0, 240.0
"""However uncertain it still is, it is judged then."""
WINDOW_S = 180.0
"""A window as old as that is begun anew, so that what is compared lies close together."""
BACKED_BRISK_S, BACKED_S = 8.0, 45.0
STARVED_S = 60.0
NO_PACE_S, TRIAL_S = 900.0, 3600.0
BLOCK_S, BLOCK_MAX_S = 3600.0, 8 * 3600.0
UNDECIDED_BLOCK_S = 900.0
PROBE_FIRST_S, PROBE_MAX_S = 900.0, 14_400.0
STILL_S = 600.0
PRECISION_SD = 0.2
BELIEF_SD = 0.04
"""A verdict rests on what was measured: what the curves say is trusted less by this much."""
HOST_FULL = 0.97
COMPARISONS_MAX = 60
KEEP_PROVEN_S = 24 * 3600.0
ATTEMPTED = ("heat", "out_of_memory", "load_out_of_memory")
"""Whether the cause of these is gone is only known by trying."""
ROOMY = 0.95
DRIFT, DRIFT_SDS, DRIFT_LOOKS, DRIFT_PULL = 0.1, 3.0, 6, 0.005
"""Another speed than the proven one, by so much or so many standard deviations, so many looks in a row, is no chance any more."""
HOPE = 0.5
"""Share of its uncertainty by which a setting is given the benefit of the doubt while searching."""
BOUND_BY = ("foreign", "squeezed", "memory", "heat", "out_of_memory", "load_out_of_memory")
"""What keeps a plan below the wanted knobs for so long that these are adapted to it."""


class Scene(NamedTuple):
    """What the climb looks at beside its own state."""

    now: float
    card: Card
    policy: Policy
    cores: int
    host_full: bool
    most_workers: int  # what everything but memory allows
    batch_max: int


class Move(NamedTuple):
    """A setting worth trying."""

    code: str
    knobs: Knobs
    gain: float
    sd: float


def look(state: CardState, scene: Scene) -> tuple[CardState, tuple[Reason, ...]]:
    """One look: judge the trial under way, or begin one when there is something to gain. Called every `look_s`."""
    pace = watch.pace_of(state, scene.card, scene.now)
    if state.trial is not None:
        return _go_on(state, state.trial, scene, pace)
    state, reasons = _follow_bounds(state, scene)
    if reasons or not _may_learn(state, scene) or pace is None or pace.seconds < (BRISK_S if state.brisk else CALM_S):
        return state, reasons
    state = _notice_drift(replace(state, pace=pace, window=None if pace.seconds > WINDOW_S else state.window), pace)
    if not state.brisk and scene.now < state.plan_at:
        return state, ()
    move = _best_move(state, scene, pace.knobs)
    if move is not None:
        return _begin(state, scene, pace, move)
    state = _settle(state, scene, pace)
    return _probe(state, scene, pace) if scene.now >= state.probe_at else (state, ())


# --- bounds ---


def _follow_bounds(state: CardState, scene: Scene) -> tuple[CardState, tuple[Reason, ...]]:
    """Search below what limits the plan for long; go back to the proven knobs when that has ended."""
    plan = state.plan
    if plan is None or scene.card.usable != "ok":
        return state, ()
    possible = Knobs(compute_type=plan.compute_type, batch=plan.batch, workers=plan.workers)
    pinned = plan.workers > state.knobs.workers and plan.compute_type == state.knobs.compute_type  # the operator wants so many
    if pinned or (state.binding in BOUND_BY and plan.workers):
        return (state if possible == state.knobs else replace(state, knobs=possible, bound=not pinned)), ()
    if not state.bound or state.binding or any(scene.now < cap.until for cap in state.caps):
        return state, ()
    return _restore(state, scene)


def _restore(state: CardState, scene: Scene) -> tuple[CardState, tuple[Reason, ...]]:
    """The proven knobs again, where there is room for them; a new search where they turned out to need more than there is."""
    proven = proven_of(state, state.model)
    if proven is None or proven.knobs == state.knobs or proven.knobs.compute_type != state.knobs.compute_type:
        return replace(state, bound=False, brisk=True), ()
    if _room_for(state, scene, proven.knobs) < proven.knobs.workers:
        roomy = (gate.least_room(state) or 0.0) >= ROOMY * proven.room_mib
        return (replace(state, bound=False, brisk=True) if roomy else state), ()
    last = max(state.caps, key=lambda cap: cap.until, default=None)
    attempt = last is not None and last.code in ATTEMPTED
    text = f"{sentences.setting(proven.knobs)} again, as before: {'a scheduled attempt' if attempt else 'there is room'}"
    restored = sentences.reason(state.gpu, "probe_restored" if attempt else "restored", text, speed=proven.speed)
    return replace(state, knobs=proven.knobs, bound=False, brisk=True), (restored,)


def proven_of(state: CardState, model: str) -> Proven | None:
    return next((one for one in reversed(state.proven) if one.model == model), None)


def _may_learn(state: CardState, scene: Scene) -> bool:
    """Only with all at work and more waiting, as planned, and with figures."""
    if state.plan is None or not state.plan.workers or state.binding not in ("", *BOUND_BY) or state.backed_at is None:
        return False
    if any(cap.code == "foreign" and scene.now < cap.until for cap in state.caps):  # it is not clear yet how much room there will be
        return False
    backed_s = scene.now - state.backed_at
    return state.blind_since is None and state.hot_since is None and backed_s >= (BACKED_BRISK_S if state.brisk else BACKED_S)


def _room_for(state: CardState, scene: Scene, knobs: Knobs) -> int:
    most = gate.most(
        state,
        scene.policy,
        scene.card.limits.memory_max_mib,
        compute_type=knobs.compute_type,
        batch=knobs.batch,
        growing=True,
        now=scene.now,
    )
    return 0 if most is None else min(most, scene.most_workers)


def _notice_drift(state: CardState, pace: Pace) -> CardState:
    """Far from the proven speed with the proven knobs: something has changed, and what was compared before counts no more."""
    proven = proven_of(state, state.model)
    if proven is None or not proven.speed or proven.knobs != pace.knobs or pace.seconds < CALM_S:
        return state
    moved = math.log(pace.speed / proven.speed)
    chance = DRIFT_SDS * watch.COST_SIGMA / math.sqrt(max(1, pace.recordings))
    drifted = abs(moved) > max(DRIFT, chance)
    count = state.drifted + 1 if drifted else 0
    if count < DRIFT_LOOKS:
        speed = proven.speed if drifted else proven.speed * math.exp(DRIFT_PULL * moved)
        followed = tuple(replace(one, speed=speed) if one is proven else one for one in state.proven)
        return replace(state, drifted=count, proven=followed)
    others = tuple(one for one in state.comparisons if one.model != state.model)
    rest = tuple(one for one in state.blocks if one.model != state.model)
    here = tuple(replace(one, speed=pace.speed, probe_wait_s=2 * PROBE_FIRST_S) if one is proven else one for one in state.proven)
    return replace(state, drifted=0, comparisons=others, blocks=rest, proven=here, brisk=True)


# --- what to try ---


def _best_move(state: CardState, scene: Scene, now_at: Knobs) -> Move | None:
    """Batch first: it costs nothing to turn. Then workers, then both at once, then the precision."""
    belief = curves.belief(
        state.comparisons, now_at.compute_type, state.model, scene.now, cores=scene.cores, processor=scene.card.gpu == CPU
    )
    moves = [move for move in _moves(state, scene, now_at, belief) if not _is_blocked(state, move.knobs, scene.now)]
    hope = HOPE if state.brisk else 0.0
    worth = [move for move in moves if move.gain + (hope * move.sd if move.knobs.workers > now_at.workers else 0.0) > WORTH]
    if not worth:
        return _precision(state, scene, now_at)
    top = max(worth, key=lambda move: move.gain)
    cheap = [move for move in worth if move.knobs.workers == now_at.workers and _leads_to(now_at, move.knobs, top.knobs)]
    if cheap:
        return max(cheap, key=lambda move: move.gain)
    steps = [move for move in worth if move.knobs.batch == now_at.batch]
    return max(steps, key=lambda move: move.gain) if steps else top


def _leads_to(now_at: Knobs, step: Knobs, top: Knobs) -> bool:
    """A batch larger than the best setting has would take memory that its workers need."""
    return step.batch <= max(top.batch, now_at.batch)


def _moves(state: CardState, scene: Scene, now_at: Knobs, belief: Belief) -> Iterator[Move]:
    for batch in _batches(scene):
        fit = _room_for(state, scene, msgspec.structs.replace(now_at, batch=batch))
        if scene.host_full:
            fit = min(fit, now_at.workers)
        least = max(1, min(scene.card.limits.workers_min, scene.most_workers))
        numbers = {now_at.workers, now_at.workers + 1, now_at.workers - 1, _peak(belief, now_at, batch, least, fit)}
        if state.brisk:
            numbers.add(now_at.workers + 2)
        for number in sorted(numbers):
            knobs = Knobs(compute_type=now_at.compute_type, batch=batch, workers=number)
            if least <= number <= fit and knobs != now_at and abs(number - now_at.workers) <= 2:
                gain, sd = _expected(state, belief, now_at, knobs, scene.now)
                yield Move(_code(now_at, knobs), knobs, gain, sd)


def _batches(scene: Scene) -> tuple[int, ...]:
    allowed = scene.policy.cpu_batches if scene.card.gpu == CPU else scene.policy.batches
    return tuple(batch for batch in allowed if batch <= scene.batch_max) or allowed[:1]


def _peak(belief: Belief, now_at: Knobs, batch: int, least: int, most: int) -> int:
    """The number of workers beyond which the curve gains nothing, for a batch."""
    number = min(max(now_at.workers, least), max(most, least))
    while number < most:
        here, more = (Knobs(compute_type=now_at.compute_type, batch=batch, workers=number + step) for step in (0, 1))
        if belief.gain(here, more)[0] < WORTH / 2:
            break
        number += 1
    return number


def _expected(state: CardState, belief: Belief, before: Knobs, after: Knobs, now: float) -> tuple[float, float]:
    return curves.together(belief.gain(before, after), curves.measured(state.comparisons, before, after, state.model, now))


def _code(before: Knobs, after: Knobs) -> str:
    if before.compute_type != after.compute_type:
        return "trial_precision"
    if before.workers == after.workers:
        return "trial_batch"
    return "trial_workers" if before.batch == after.batch else "trial_trade"


def _precision(state: CardState, scene: Scene, now_at: Knobs) -> Move | None:
    """The operator's next precision, when everything else has stood still for long."""
    if scene.now - state.still_since < STILL_S or scene.card.gpu == CPU:
        return None
    for compute_type in scene.policy.compute_types:
        knobs = msgspec.structs.replace(now_at, compute_type=compute_type)
        if compute_type != now_at.compute_type and not _is_blocked(state, _any_of(compute_type), scene.now):
            fit = _room_for(state, scene, knobs)
            if fit:
                return Move("trial_precision", msgspec.structs.replace(knobs, workers=min(fit, now_at.workers)), 0.0, PRECISION_SD)
    return None


def _any_of(compute_type: str) -> Knobs:
    """Stands for a precision with whatever batch and workers."""
    return Knobs(compute_type=compute_type, batch=0, workers=0)


def _is_blocked(state: CardState, knobs: Knobs, now: float) -> bool:
    return any(block.model == state.model and block.knobs == knobs and now < block.until for block in state.blocks)


# --- trials ---


def _begin(state: CardState, scene: Scene, pace: Pace, move: Move) -> tuple[CardState, tuple[Reason, ...]]:
    trial = Trial(code=move.code, before=pace.knobs, after=move.knobs, base=pace, since=scene.now)
    said = sentences.tried(state.gpu, move.code, pace.knobs, move.knobs, expected=move.gain, speed=pace.speed)
    return replace(state, trial=trial, knobs=move.knobs, plan_at=scene.now + scene.policy.interval_s), (said,)


def _probe(state: CardState, scene: Scene, pace: Pace) -> tuple[CardState, tuple[Reason, ...]]:
    """One worker fewer for a while, if there is one to spare."""
    fewer = msgspec.structs.replace(pace.knobs, workers=pace.knobs.workers - 1)
    state = _probed_later(state, scene.now)
    if fewer.workers < max(1, scene.card.limits.workers_min):
        return state, ()
    if _room_for(state, scene, pace.knobs) < pace.knobs.workers:  # there would be no way back
        return state, ()
    trial = Trial(code="probe_fewer", before=pace.knobs, after=fewer, base=pace, since=scene.now, probe=True)
    return replace(state, trial=trial, knobs=fewer), (sentences.probed(state.gpu, pace.knobs, fewer, speed=pace.speed),)


def _probed_later(state: CardState, now: float) -> CardState:
    """Twice as long until the next time."""
    proven = proven_of(state, state.model)
    wait_s = proven.probe_wait_s if proven is not None else 2 * PROBE_FIRST_S
    state = replace(state, probe_at=now + wait_s)
    if proven is None:
        return state
    longer = replace(proven, probe_wait_s=min(PROBE_MAX_S, 2 * wait_s))
    return replace(state, proven=tuple(longer if one is proven else one for one in state.proven))


def _go_on(state: CardState, trial: Trial, scene: Scene, pace: Pace | None) -> tuple[CardState, tuple[Reason, ...]]:
    plan = state.plan
    if plan is None or (plan.compute_type, plan.batch, plan.workers) != (trial.after.compute_type, trial.after.batch, trial.after.workers):
        if plan is not None and plan.batch < trial.after.batch and not state.binding and scene.now - trial.since < STARVED_S:
            return state, ()  # the batch follows when those that leave are gone
        return _give_up(state, trial, scene, "something else came between")
    if state.backed_at is None and (state.starved_since or scene.now) <= scene.now - STARVED_S:
        return _give_up(state, trial, scene, "there is too little to do to measure it")
    if pace is None:
        late = scene.now - trial.since > (NO_PACE_S if state.window is None else TRIAL_S)
        return _give_up(state, trial, scene, "it could not be measured") if late else (state, ())
    if pace.seconds < (BRISK_S if state.brisk else CALM_S):
        return state, ()
    return _judge(state, trial, scene, pace)


def _judge(state: CardState, trial: Trial, scene: Scene, pace: Pace) -> tuple[CardState, tuple[Reason, ...]]:
    gain, sd = watch.compare(trial.base, pace, state.gpu)
    said = Comparison(model=state.model, before=trial.before, after=trial.after, gain=gain, sd=sd, at=scene.now)
    with_it = replace(state, comparisons=(*state.comparisons, said)[-COMPARISONS_MAX:])
    mean, spread = _posterior(with_it, trial, scene)
    worth = -WORTH if trial.probe else WORTH
    enough_s = BRISK_MAX_S if state.brisk and trial.code != "trial_trade" else CALM_MAX_S
    if abs(mean - worth) < spread and pace.seconds < enough_s:
        return state, ()
    figures = {"gain": mean, "sd": spread, "speeds": (trial.base.speed, trial.base.speed * 2.718281828459045**mean)}
    if mean >= worth:
        reason = sentences.judged(state.gpu, "trial_kept", trial.before, trial.after, **figures)  # type: ignore[arg-type]
        brisk = state.brisk
        if trial.probe:
            with_it = block(with_it, trial.before, scene.now)
        if trial.after.compute_type != trial.before.compute_type:
            with_it, brisk = block(with_it, _any_of(trial.before.compute_type), scene.now), True
        later = {"still_since": scene.now, "plan_at": scene.now, "probe_at": scene.now + PROBE_FIRST_S}
        return replace(with_it, trial=None, pace=pace, brisk=brisk, **later), (reason,)
    reason = sentences.judged(state.gpu, "trial_ended", trial.before, trial.after, **figures)  # type: ignore[arg-type]
    changed_type = trial.after.compute_type != trial.before.compute_type
    state = with_it
    if not trial.probe:
        state = block(state, _any_of(trial.after.compute_type) if changed_type else trial.after, scene.now)
    return replace(state, trial=None, knobs=trial.before, window=None), (reason,)


def _posterior(state: CardState, trial: Trial, scene: Scene) -> tuple[float, float]:
    """What was measured of these two, and what the curves say after it."""
    direct = curves.measured(state.comparisons, trial.before, trial.after, state.model, scene.now)
    if trial.before.compute_type != trial.after.compute_type:
        return curves.together((0.0, PRECISION_SD), direct)
    belief = curves.belief(
        state.comparisons, trial.after.compute_type, state.model, scene.now, cores=scene.cores, processor=scene.card.gpu == CPU
    )
    mean, sd = belief.gain(trial.before, trial.after)
    return curves.together((mean, math.hypot(sd, BELIEF_SD)), direct)


def _give_up(state: CardState, trial: Trial, scene: Scene, why: str) -> tuple[CardState, tuple[Reason, ...]]:
    """Without a verdict: as before, and not again at once."""
    until = scene.now + UNDECIDED_BLOCK_S
    others = tuple(one for one in state.blocks if (one.model, one.knobs) != (state.model, trial.after))
    blocks = (*others, Block(model=state.model, knobs=trial.after, until=until, times=0))
    text = f"back to {sentences.setting(trial.before)}: {why}"
    return replace(state, trial=None, knobs=trial.before, blocks=blocks, window=None), (
        sentences.reason(state.gpu, "trial_given_up", text),
    )


def block(state: CardState, knobs: Knobs, now: float) -> CardState:
    """It did not pay: not for an hour, then two, up to eight."""
    before = next((one for one in state.blocks if (one.model, one.knobs) == (state.model, knobs)), None)
    times = before.times + 1 if before is not None else 1
    others = tuple(one for one in state.blocks if one is not before)
    until = now + min(BLOCK_MAX_S, BLOCK_S * 2 ** (times - 1))
    return replace(state, blocks=(*others, Block(model=state.model, knobs=knobs, until=until, times=times)))


# --- rest ---


def _settle(state: CardState, scene: Scene, pace: Pace) -> CardState:
    """Nothing is worth trying: these are the proven knobs, until the next plan."""
    before = proven_of(state, state.model)
    if state.brisk:
        state = replace(state, still_since=scene.now, probe_at=max(state.probe_at, scene.now + PROBE_FIRST_S))
    state = replace(state, brisk=False, plan_at=scene.now + scene.policy.interval_s)
    if state.bound and before is not None and scene.now - before.at < KEEP_PROVEN_S:
        return state
    wait_s = before.probe_wait_s if before is not None and before.knobs == pace.knobs else 2 * PROBE_FIRST_S
    speed = before.speed if before is not None and before.knobs == pace.knobs else pace.speed
    new = Proven(model=state.model, knobs=pace.knobs, at=scene.now, speed=speed, probe_wait_s=wait_s, room_mib=state.room_mib or 0.0)
    return replace(state, proven=(*(one for one in state.proven if one.model != state.model), new))
