"""voting: the language of a recording, chosen by several of its windows.

Owns: the votes of one job and their count. Never fails.
"""

from __future__ import annotations

from whisperd.engine.work import Language, WindowWork


class Voting:
    """The windows that a job's language is chosen by."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.complete = False  # no more windows will come
        self.works: list[WindowWork] = []
        self._shares: dict[str, float] = {}
        self._weight = 0.0

    def count(self, work: WindowWork, probabilities: list[tuple[str, float]]) -> None:
        """Each window votes with the model's probabilities, by the length of its speech."""
        weight = max(work.speech_s, 0.1)
        self.works.append(work)
        self._weight += weight
        for token, probability in probabilities:
            self._shares[token[2:-2]] = self._shares.get(token[2:-2], 0.0) + weight * probability

    def winner(self) -> Language:
        code = max(self._shares, key=lambda name: self._shares[name])
        return Language(code, round(self._shares[code] / self._weight, 4))
