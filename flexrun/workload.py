"""What a job asks for, as two columns of numbers: enough to size the cache and to plan before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy


@dataclass(frozen=True, eq=False)
class Workload:
    """One row a sequence (a request with n choices is n rows).

    prompt_tokens, max_tokens: int64 [rows]; max_tokens is the most a sequence may generate.
    """

    prompt_tokens: numpy.ndarray
    max_tokens: numpy.ndarray

    @classmethod
    def of(cls, prompt_tokens: Iterable[int], max_tokens: Iterable[int]) -> Workload:
        return cls(numpy.fromiter(prompt_tokens, dtype=numpy.int64), numpy.fromiter(max_tokens, dtype=numpy.int64))

    @classmethod
    def uniform(cls, sequences: int, prompt_tokens: int, max_tokens: int) -> Workload:
        """``sequences`` alike, for planning without a prompt file."""
        return cls(
            numpy.full(sequences, prompt_tokens, dtype=numpy.int64),
            numpy.full(sequences, max_tokens, dtype=numpy.int64),
        )

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
