"""optimiser: history into a plan, with a sentence why. Pure: no clock, no chance, no input or output.

`decide(state, observation, policy) -> (state, advice)` is called every 2 s. Between plans it may only lower (guards).
`start` makes the first state, from what was learned before; `State.learned()` is what a restart should begin with.
"""

from whisperd.dispatcher.optimiser.decide import decide, start_need_mib
from whisperd.dispatcher.optimiser.state import Learned, Lesson, State, start

__all__ = ["Learned", "Lesson", "State", "decide", "start", "start_need_mib"]
