"""sentences: why a plan is as it is, in words that an administrator understands, with the figures it rests on.

Owns: the codes. They are stable: whoever filters plans by them may rely on it. Codes of scheduled experiments begin with trial or probe.
"""

from __future__ import annotations

from whisperd.dispatcher.optimiser.state import Knobs, Trial
from whisperd.dispatcher.optimiser.values import CPU, Reason

UUID_SHOWN = 12


def card_name(gpu: str) -> str:
    return "CPU" if gpu == CPU else gpu if len(gpu) <= UUID_SHOWN else gpu[:UUID_SHOWN] + "…"


def reason(gpu: str, code: str, text: str, **facts: float) -> Reason:
    return Reason(
        gpu=gpu, code=code, text=f"{card_name(gpu)}: {text}", facts=tuple((name, round(value, 3)) for name, value in facts.items())
    )


def gib(mib: float) -> str:
    return f"{mib / 1024:.1f} GiB"


def workers(number: int) -> str:
    return "no worker" if number == 0 else "1 worker" if number == 1 else f"{number} workers"


def percent(gain: float) -> str:
    """Of a logarithm of a ratio: "11 % more", "3 % less"."""
    share = abs(100 * (2.718281828459045**gain - 1))
    return f"{share:.0f} % {'more' if gain >= 0 else 'less'}" if share >= 0.5 else "as much"


def setting(knobs: Knobs) -> str:
    return f"{workers(knobs.workers)} with batch {knobs.batch}"


def change(before: Knobs, after: Knobs) -> str:
    """What is different, in the words of what is turned."""
    parts = []
    if before.compute_type != after.compute_type:
        parts.append(f"{after.compute_type} instead of {before.compute_type}")
    if before.workers != after.workers:
        parts.append(f"{workers(after.workers)} instead of {before.workers}")
    if before.batch != after.batch:
        parts.append(f"batch {after.batch} instead of {before.batch}")
    return " and ".join(parts) or setting(after)


def tried(gpu: str, code: str, before: Knobs, after: Knobs, *, expected: float, speed: float) -> Reason:
    text = f"trying {change(before, after)}: {percent(expected)} is expected beside {speed:.1f} audio-seconds per second now"
    return reason(gpu, code, text, expected_gain=expected, speed=speed)


def probed(gpu: str, trial: Trial, *, speed: float) -> Reason:
    why = "more would bring something by now" if trial.code == "probe_more" else "less would do as well"
    text = f"{change(trial.before, trial.after)} for a few minutes: a scheduled look whether {why}"
    return reason(gpu, trial.code, text, speed=speed)


def judged(gpu: str, code: str, before: Knobs, after: Knobs, *, gain: float, sd: float, speeds: tuple[float, float]) -> Reason:
    """The end of a trial, whichever way it went."""
    figures = f"({speeds[0]:.1f} → {speeds[1]:.1f} audio-seconds per second, ± {100 * sd:.0f} %)"
    kept = code.endswith("_kept")
    text = (
        f"{change(before, after)}: it brought {percent(gain)} {figures}"
        if kept
        else f"back to {setting(before)}: {change(before, after)} brought {percent(gain)} {figures}"
    )
    return reason(gpu, code, text, gain=gain, sd=sd, speed_before=speeds[0], speed_after=speeds[1])
