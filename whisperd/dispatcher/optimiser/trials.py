"""trials: one experiment at a time: the present setting is measured, another is set, measured as well, and kept only if it earns its place.

The burden of proof is on the larger one. What did not pay is blocked for an hour, then two, up to eight; what could not be measured for a
quarter of an hour.
"""

from __future__ import annotations

import math

from whisperd.dispatcher.optimiser import curves, sentences, watch
from whisperd.dispatcher.optimiser.moves import PRECISION_SD, Move
from whisperd.dispatcher.optimiser.scene import WORTH, Scene, any_of, block, pace_needs_s, replace
from whisperd.dispatcher.optimiser.state import Block, CardState, Comparison, Echo, Pace, Trial
from whisperd.dispatcher.optimiser.values import CPU, Reason

BRISK_MAX_S, CALM_MAX_S = 60.0, 240.0
"""However uncertain it still is, it is judged then."""
SURPRISE, SURPRISE_MAX_S = 0.1, 300.0
"""Where so much was expected a refusal has to be sure, and may take so long."""
BELIEF_SD = 0.04
"""A verdict rests on what was measured: what the curves say is trusted less by this much."""
STARVED_S = 60.0
NO_PACE_S, TRIAL_S = 900.0, 3600.0
UNDECIDED_BLOCK_S = 900.0
ECHO_S = 40.0
PROBE_FIRST_S = 900.0
COMPARISONS_MAX = 60


def begin(state: CardState, scene: Scene, pace: Pace, move: Move) -> tuple[CardState, tuple[Reason, ...]]:
    trial = Trial(code=move.code, before=pace.knobs, after=move.knobs, base=pace, since=scene.now, expected=move.gain)
    said = sentences.tried(state.gpu, move.code, pace.knobs, move.knobs, expected=move.gain, speed=pace.speed)
    return replace(state, trial=trial, echo=None, knobs=move.knobs, plan_at=scene.now + scene.policy.interval_s), (said,)


def go_on(state: CardState, trial: Trial, scene: Scene, pace: Pace | None) -> tuple[CardState, tuple[Reason, ...]]:
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
    if pace.seconds < pace_needs_s(state):
        return state, ()
    return _judge(state, trial, scene, pace)


def _judge(state: CardState, trial: Trial, scene: Scene, pace: Pace) -> tuple[CardState, tuple[Reason, ...]]:
    gain, sd = watch.compare(trial.base, pace, state.gpu)
    said = Comparison(model=state.model, before=trial.before, after=trial.after, gain=gain, sd=sd, at=scene.now)
    with_it = replace(state, comparisons=(*state.comparisons, said)[-COMPARISONS_MAX:])
    mean, spread = _posterior(with_it, trial, scene)
    worth = (-WORTH if trial.before.workers != trial.after.workers else -WORTH / 2) if trial.probe else WORTH
    enough_s = BRISK_MAX_S if state.brisk and trial.code != "trial_trade" else CALM_MAX_S
    if abs(mean - worth) < spread and pace.seconds < enough_s:
        return state, ()
    surprising = trial.expected > SURPRISE and mean < worth
    if surprising and mean + 2 * spread > worth and pace.seconds < SURPRISE_MAX_S:
        return state, ()
    figures = {"gain": mean, "sd": spread, "speeds": (trial.base.speed, trial.base.speed * 2.718281828459045**mean)}
    if mean >= worth:
        reason = sentences.judged(state.gpu, "trial_kept", trial.before, trial.after, **figures)  # type: ignore[arg-type]
        brisk = state.brisk
        if trial.probe:
            with_it = block(with_it, trial.before, scene.now)
        brisk = brisk or trial.code == "probe_more"
        if trial.after.compute_type != trial.before.compute_type:
            with_it, brisk = block(with_it, any_of(trial.before.compute_type), scene.now), True
        later = {"still_since": scene.now, "plan_at": scene.now, "probe_at": scene.now + PROBE_FIRST_S}
        return replace(with_it, trial=None, pace=pace, brisk=brisk, **later), (reason,)
    reason = sentences.judged(state.gpu, "trial_ended", trial.before, trial.after, **figures)  # type: ignore[arg-type]
    changed_type = trial.after.compute_type != trial.before.compute_type
    state = with_it
    if not trial.probe:
        state = block(state, any_of(trial.after.compute_type) if changed_type else trial.after, scene.now)
    echo = Echo(before=trial.before, after=pace) if mean + 2 * spread > worth else None
    return replace(state, trial=None, echo=echo, knobs=trial.before, window=None), (reason,)


def hear(state: CardState, scene: Scene, pace: Pace) -> CardState:
    """The same recordings are in hand after a trial as in it, more than before it: so this second comparison is the better one, and may
    acquit what was blocked."""
    echo = state.echo
    if echo is None or pace.knobs != echo.before:
        return state if echo is None else replace(state, echo=None)
    if pace.seconds < ECHO_S:
        return state
    gain, sd = watch.compare(pace, echo.after, state.gpu)
    said = Comparison(model=state.model, before=echo.before, after=echo.after.knobs, gain=gain, sd=sd, at=scene.now)
    state = replace(state, echo=None, comparisons=(*state.comparisons, said)[-COMPARISONS_MAX:])
    trial = Trial(code="trial_echo", before=echo.before, after=echo.after.knobs, base=pace, since=scene.now)
    mean, spread = _posterior(state, trial, scene)
    if mean - 0.5 * spread < WORTH:
        return state
    return replace(state, blocks=tuple(one for one in state.blocks if (one.model, one.knobs) != (state.model, trial.after)))


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
