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

    def likely(self, running: Iterable[int]) -> int | None:
        """Tokens that SURE of the answers need, or None where too little is known. running: tokens so far of others."""
        if len(self._tokens) < LEAST_ANSWERS:
            return None
        running = list(running)
        tokens = numpy.array([*self._tokens, *running])
        ended = numpy.array([*self._ended, *([False] * len(running))])
        # At equal lengths those that ended come first: the others lived on.
        order = numpy.lexsort((~ended, tokens))
        at_risk = numpy.arange(len(tokens), 0, -1)
        survivors = numpy.cumprod(1.0 - ended[order] / at_risk)
        enough = numpy.flatnonzero(survivors <= 1.0 - SURE + 1e-9)
        return int(tokens[order][enough[0]]) if len(enough) else None
