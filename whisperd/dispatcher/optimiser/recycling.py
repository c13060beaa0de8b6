"""recycling: which worker should be replaced by a fresh one because of its memory. Only the end of a process gives memory back."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from whisperd.dispatcher.optimiser import gate
from whisperd.dispatcher.optimiser.sentences import gib, reason
from whisperd.dispatcher.optimiser.state import CardState
from whisperd.dispatcher.optimiser.values import Card, Policy, Reason, Worker

BLOAT = 1.3
SPARE = 1.08
AGAIN_S = 120.0
SHORT, SHORT_AGAIN_S = 0.25, 600.0
"""Less than this share of the reserve is left: a fresh process gives some of it back."""
ROOMY, ROOMY_AGAIN_S = 2.0, 1800.0
"""Where nobody needs the memory there is no hurry."""


def recycle(state: CardState, card: Card, policy: Policy, now: float) -> tuple[CardState, tuple[int, ...], tuple[Reason, ...]]:
    """At most one at a time, with all others serving: the one that is bloated, that keeps another from starting, or that leaves too little
    for the worst that was seen. Called at every look."""
    own = [worker for worker in card.workers if worker.memory_mib is not None]
    if state.plan is None or not own or len(own) < len(card.workers) or any(worker.life not in ("idle", "busy") for worker in own):
        return state, (), ()
    fattest = max(own, key=lambda worker: (worker.memory_mib or 0, -worker.id))
    why = _why(state, card, policy, own, now)
    if not why:
        return state, (), ()
    mib = float(fattest.memory_mib or 0)
    said = reason(card.gpu, "recycle", f"worker {fattest.id} is replaced: it holds {gib(mib)}{why}", memory_mib=mib)
    return msgspec.structs.replace(state, recycled_at=now), (fattest.id,), (said,)


def _why(state: CardState, card: Card, policy: Policy, own: Sequence[Worker], now: float) -> str:
    """Why the fattest of them should be replaced; "" when it should not."""
    plan = state.plan
    if plan is None or card.memory_free_mib is None or state.total_mib is None:
        return ""
    one = gate.need(state, policy, plan.model, plan.compute_type, plan.batch)
    fat, lean = (float(pick(worker.memory_mib or 0 for worker in own)) for pick in (max, min))
    free, reserve, rested_s = card.memory_free_mib, gate.reserve_mib(state.total_mib, policy, card.gpu), now - state.recycled_at
    is_fat, spare = fat > SPARE * one.typical, free - 0.5 * reserve
    patience_s = ROOMY_AGAIN_S if free > ROOMY * one.typical else AGAIN_S
    usual = f", {gib(one.typical)} are usual"
    reasons = {
        f"{usual}, and another one waits for room": is_fat and len(own) < plan.workers and free < one.typical + state.pending_mib,
        f" and only {gib(free)} are free": free < SHORT * reserve and rested_s >= SHORT_AGAIN_S,
        usual: fat > BLOAT * one.typical and rested_s >= patience_s,
        f" and only {gib(max(0.0, spare))} are left for the others' peaks": is_fat and spare < one.worst - lean and rested_s >= AGAIN_S,
    }
    return next((why for why, holds in reasons.items() if holds), "")
