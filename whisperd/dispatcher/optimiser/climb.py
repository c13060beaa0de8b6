"""climb: the search for a card's best setting (OPTIMISER §5): a trial under way is judged, else one is begun when something is to gain.

Below what limits a plan for long it searches as well, and goes back to the proven knobs afterwards. Once nothing is worth trying, scheduled
looks ask now and then whether less would do or more would pay by now.
"""

from __future__ import annotations

import math

from whisperd.dispatcher.optimiser import gate, moves, sentences, trials, watch
from whisperd.dispatcher.optimiser.scene import CALM_S, Scene, pace_needs_s, proven_of, replace, room_for, with_proven
from whisperd.dispatcher.optimiser.state import CardState, Knobs, Pace, Proven, Trial
from whisperd.dispatcher.optimiser.trials import PROBE_FIRST_S
from whisperd.dispatcher.optimiser.values import CPU, Reason

WINDOW_S = 180.0
"""A window as old as that is begun anew, so that what is compared lies close together."""
BACKED_BRISK_S, BACKED_S = 8.0, 45.0
"""Jobs have to wait for so long before anything is learned, while searching and later."""
PROBE_WAIT_S, PROBE_MAX_S = 2700.0, 14_400.0
HOST_FULL = 0.97
KEEP_PROVEN_S = 24 * 3600.0
BOUND_BY = ("foreign", "memory", "heat", "out_of_memory", "load_out_of_memory", "no_room")
"""What keeps a plan below the wanted knobs for so long that these are adapted to it."""
ATTEMPTED = ("heat", "out_of_memory", "load_out_of_memory", "no_room")
"""Whether the cause of these is gone is only known by trying."""
ROOMY = 0.95
DRIFT, DRIFT_SDS, DRIFT_LOOKS, DRIFT_PULL = 0.1, 3.0, 6, 0.005
"""Another speed than the proven one, by so much or so many standard deviations, so many looks in a row, is no chance any more."""
HOST_RATIO, HOST_CORES = 1.5, 1.0


def look(state: CardState, scene: Scene) -> tuple[CardState, tuple[Reason, ...]]:
    """One look: judge the trial under way, or begin one when there is something to gain. Called every `look_s`."""
    pace = watch.pace_of(state, scene.card, scene.now)
    if state.trial is not None:
        return trials.go_on(state, state.trial, scene, pace)
    state, reasons = _follow_bounds(state, scene)
    if reasons or not _may_learn(state, scene) or pace is None or pace.seconds < pace_needs_s(state):
        return state, reasons
    state = _notice_drift(replace(state, pace=pace, window=None if pace.seconds > WINDOW_S else state.window), scene, pace)
    state = trials.hear(state, scene, pace)
    if state.echo is not None or (not state.brisk and scene.now < state.plan_at):
        return state, ()
    move = moves.best_move(state, scene, pace.knobs)
    if move is not None:
        return trials.begin(state, scene, pace, move)
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
    if room_for(state, scene, proven.knobs) < proven.knobs.workers:
        roomy = (gate.least_room(state) or 0.0) >= ROOMY * proven.room_mib
        return (replace(state, bound=False, brisk=True) if roomy else state), ()
    last = max(state.caps, key=lambda cap: cap.until, default=None)
    attempt = last is not None and last.code in ATTEMPTED
    text = f"{sentences.setting(proven.knobs)} again, as before: {'a scheduled attempt' if attempt else 'there is room'}"
    restored = sentences.reason(state.gpu, "probe_restored" if attempt else "restored", text, speed=proven.speed)
    return replace(state, knobs=proven.knobs, bound=False, brisk=True), (restored,)


def _may_learn(state: CardState, scene: Scene) -> bool:
    """Only with all at work and more waiting, as planned, and with figures."""
    if state.plan is None or not state.plan.workers or state.binding not in ("", *BOUND_BY) or state.backed_at is None:
        return False
    if any(cap.code == "foreign" and scene.now < cap.until for cap in state.caps):  # it is not clear yet how much room there will be
        return False
    backed_s = scene.now - state.backed_at
    return state.blind_since is None and state.hot_since is None and backed_s >= (BACKED_BRISK_S if state.brisk else BACKED_S)


# --- what changed by itself ---


def _notice_drift(state: CardState, scene: Scene, pace: Pace) -> CardState:
    """Far from the proven speed, or from the host's usual load, with the proven knobs: something has changed, and what was compared before
    counts no more."""
    proven = proven_of(state, state.model)
    if proven is None or not proven.speed or proven.knobs != pace.knobs or pace.seconds < CALM_S:
        return state
    moved = math.log(pace.speed / proven.speed)
    chance = DRIFT_SDS * watch.COST_SIGMA * math.sqrt(2 / max(1, pace.recordings))  # the proven speed rested on about as many
    drifted = abs(moved) > max(DRIFT, chance) or _host_differs(scene, proven)
    count = state.drifted + 1 if drifted else 0
    if count < DRIFT_LOOKS:
        speed = proven.speed if drifted else proven.speed * math.exp(DRIFT_PULL * moved)
        return with_proven(replace(state, drifted=count), proven, speed=speed)
    state = with_proven(state, proven, speed=pace.speed, cores_busy=scene.cores_busy, probe_wait_s=PROBE_WAIT_S)
    others = tuple(one for one in state.comparisons if one.model != state.model)
    rest = tuple(one for one in state.blocks if one.model != state.model)
    return replace(state, drifted=0, comparisons=others, blocks=rest, brisk=True)


def _host_differs(scene: Scene, proven: Proven) -> bool:
    """Half again as many cores are busy, or as few."""
    if scene.card.gpu == CPU or not proven.cores_busy:
        return False
    low, high = sorted((max(0.1, scene.cores_busy), proven.cores_busy))
    return high > HOST_RATIO * low and high - low > HOST_CORES


# --- rest ---


def _settle(state: CardState, scene: Scene, pace: Pace) -> CardState:
    """Nothing is worth trying: these are the proven knobs, until the next plan."""
    before = proven_of(state, state.model)
    if state.brisk:
        state = replace(state, still_since=scene.now, probe_at=max(state.probe_at, scene.now + PROBE_FIRST_S))
    state = replace(state, brisk=False, plan_at=scene.now + scene.policy.interval_s)
    if state.bound and before is not None and scene.now - before.at < KEEP_PROVEN_S:
        return state
    wait_s = before.probe_wait_s if before is not None and before.knobs == pace.knobs else PROBE_WAIT_S
    speed = before.speed if before is not None and before.knobs == pace.knobs else pace.speed
    new = Proven(
        model=state.model,
        knobs=pace.knobs,
        at=scene.now,
        speed=speed,
        probe_wait_s=wait_s,
        room_mib=state.room_mib or 0.0,
        cores_busy=before.cores_busy if before is not None and before.knobs == pace.knobs else scene.cores_busy,
        probes=before.probes if before is not None else 0,
    )
    return replace(state, proven=(*(one for one in state.proven if one.model != state.model), new))


def _probe(state: CardState, scene: Scene, pace: Pace) -> tuple[CardState, tuple[Reason, ...]]:
    """A scheduled look, if there is a way back from it."""
    proven = proven_of(state, state.model)
    state = _probed_later(state, scene.now)
    if room_for(state, scene, pace.knobs) < pace.knobs.workers:
        return state, ()
    asked = moves.scheduled(proven.probes if proven is not None else 0, state, scene, pace.knobs)
    if asked is None:
        return state, ()
    code, knobs = asked
    trial = Trial(code=code, before=pace.knobs, after=knobs, base=pace, since=scene.now, probe=code != "probe_more")
    return replace(state, trial=trial, echo=None, knobs=knobs), (sentences.probed(state.gpu, trial, speed=pace.speed),)


def _probed_later(state: CardState, now: float) -> CardState:
    """Twice as long until the next time."""
    proven = proven_of(state, state.model)
    wait_s = proven.probe_wait_s if proven is not None else PROBE_WAIT_S
    state = replace(state, probe_at=now + wait_s)
    if proven is None:
        return state
    return with_proven(state, proven, probe_wait_s=min(PROBE_MAX_S, 2 * wait_s), probes=proven.probes + 1)
