"""How long answers are likely to get, learnt from those of the job: room is kept for that, not for the worst case.

Answers still under way, and those that were cut at their limit, are only known to be at least as long as they are: a
share of survivors (Kaplan and Meier 1958) takes them as that, where a plain quantile would take long answers for short.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import numpy

LEAST_ANSWERS = 16  # before these have ended, nothing is guessed
MOST_ANSWERS = 512  # the latest: jobs may change on the way
SURE = 0.9  # the share of answers that are to end within what is guessed


class LikelyLengths:
    """Lengths of answers in tokens, of which the latest MOST_ANSWERS count."""

    def __init__(self) -> None:
        self._tokens: deque[int] = deque(maxlen=MOST_ANSWERS)
        self._ended: deque[bool] = deque(maxlen=MOST_ANSWERS)

    def add(self, tokens: int, ended: bool) -> None:
        """An answer is over. ended: by itself, not at its limit."""
        self._tokens.append(tokens)
        self._ended.append(ended)

    @property
    def enough(self) -> bool:
        return len(self._tokens) >= LEAST_ANSWERS

    def likely(self, running: Iterable[int] = ()) -> int | None:
        """Tokens that SURE of the answers need, or None where too little is known. running: tokens so far of others."""
        if not self.enough:
            return None
        tokens, survivors = self._survivors(running)
        enough = numpy.flatnonzero(survivors <= 1.0 - SURE + 1e-9)
        return int(tokens[enough[0]]) if len(enough) else None

    def expected(self, limits: numpy.ndarray, running: Iterable[int] = ()) -> numpy.ndarray:
        """Mean tokens of answers that may get as long as ``limits``, float64 like these: the area under the share of
        survivors. What lives longer than anything known is taken to go on to its limit."""
        if not self.enough:
            return limits.astype(numpy.float64)
        tokens, survivors = self._survivors(running)
        starts = numpy.concatenate([[0], tokens])
        shares = numpy.concatenate([[1.0], survivors])
        areas = numpy.concatenate([[0.0], numpy.cumsum(numpy.diff(starts) * shares[:-1])])
        place = numpy.searchsorted(starts, limits, side="right") - 1
        return areas[place] + shares[place] * (limits - starts[place])

    def _survivors(self, running: Iterable[int]) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Lengths, ascending, and the share of answers that get longer than each."""
        running = list(running)
        tokens = numpy.array([*self._tokens, *running], dtype=numpy.int64)
        ended = numpy.array([*self._ended, *([False] * len(running))], dtype=bool)
        # At equal lengths those that ended come first: the others lived on.
        order = numpy.lexsort((~ended, tokens))
        at_risk = numpy.arange(len(tokens), 0, -1)
        return tokens[order], numpy.cumprod(1.0 - ended[order] / at_risk)
