"""What a job asks for, as two columns of numbers: enough to size the cache and to plan before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy


@dataclass(frozen=True, eq=False)
class Workload:
    """One row a sequence (a request with n choices is n rows).

    prompt_tokens, max_tokens: int64 [rows]; max_tokens is the most a sequence may generate.
    scored_tokens: int64 [rows], prompt tokens whose log-probabilities are wanted, each a row of the head besides those
    that are sampled; default: none.
    """

    prompt_tokens: numpy.ndarray
    max_tokens: numpy.ndarray
    scored_tokens: numpy.ndarray | None = None

    def __post_init__(self):
        if self.scored_tokens is None:
            object.__setattr__(self, "scored_tokens", numpy.zeros_like(self.prompt_tokens))

    @classmethod
    def of(
        cls, prompt_tokens: Iterable[int], max_tokens: Iterable[int], scored_tokens: Iterable[int] | None = None
    ) -> Workload:
        """The rows that sequences run. One with 0 max_tokens is only scored: its last token is not run, and its last
        scored one takes the row that others are sampled from."""
        prompt, most = (numpy.fromiter(column, dtype=numpy.int64) for column in (prompt_tokens, max_tokens))
        scored = numpy.zeros_like(prompt) if scored_tokens is None else numpy.fromiter(scored_tokens, numpy.int64)
        only = (most == 0).astype(numpy.int64)
        return cls(numpy.maximum(prompt - only, 1), most + only, numpy.maximum(scored - only, 0))

    @classmethod
    def uniform(cls, sequences: int, prompt_tokens: int, max_tokens: int) -> Workload:
        """``sequences`` alike, for planning without a prompt file."""
        return cls(
            numpy.full(sequences, prompt_tokens, dtype=numpy.int64),
            numpy.full(sequences, max_tokens, dtype=numpy.int64),
        )

    def rows(self, numbers: numpy.ndarray) -> Workload:
        """Those rows alone, in that order."""
        return Workload(self.prompt_tokens[numbers], self.max_tokens[numbers], self.scored_tokens[numbers])

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def kv_tokens(self) -> numpy.ndarray:
        """Cache room each sequence may need; its last token is never attended to."""
        return self.prompt_tokens + self.max_tokens - 1

    @property
    def longest_tokens(self) -> int:
        return int(self.kv_tokens.max(initial=1))

    def kv_tokens_of(self, sequences: int) -> int:
        """Room for any ``sequences`` of them at once: the sum over the longest."""
        if sequences >= len(self):
            return int(self.kv_tokens.sum())
        return int(numpy.partition(self.kv_tokens, -sequences)[-sequences:].sum())
