"""What a job asks for, as two columns of numbers: enough to size the cache and to plan before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy

from flexrun.prefixes import NONE, Prefixes


def longest_answers_first(prompt_tokens: numpy.ndarray, answer_tokens: numpy.ndarray) -> numpy.ndarray:
    """Rows in the order to run, int64 [rows]: the longest answers first, so that none runs alone at the end and prompts
    with short answers fill the passes beside them; of answers about as long (within a factor of two) the longest
    sequences first, so that what runs together is alike."""
    return numpy.lexsort((-(prompt_tokens + answer_tokens), -numpy.ceil(numpy.log2(answer_tokens + 1.0))))


@dataclass(frozen=True, eq=False)
class Workload:
    """One row a sequence (a request with n choices is n rows).

    prompt_tokens, max_tokens: int64 [rows]; max_tokens is the most a sequence may generate.
    scored_tokens: int64 [rows], prompt tokens whose log-probabilities are wanted, each a row of the head besides those
    that are sampled; default: none.
    prefixes, prefix: int64 [rows], which of the job's shared prefixes the prompt begins with, NONE where with none.
    likely_tokens, kept_tokens: int64 [rows], what a sequence is likely to generate, by which a job is forecast, and for
    how much of it the cache keeps room; default of both: max_tokens.
    """

    prompt_tokens: numpy.ndarray
    max_tokens: numpy.ndarray
    scored_tokens: numpy.ndarray | None = None
    prefixes: Prefixes = field(default_factory=Prefixes)
    prefix: numpy.ndarray | None = None
    likely_tokens: numpy.ndarray | None = None
    kept_tokens: numpy.ndarray | None = None

    def __post_init__(self):
        for name in ("likely_tokens", "kept_tokens"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.max_tokens)
        if self.scored_tokens is None:
            object.__setattr__(self, "scored_tokens", numpy.zeros_like(self.prompt_tokens))
        if self.prefix is None:
            object.__setattr__(self, "prefix", numpy.full_like(self.prompt_tokens, NONE))

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
        names = ("prompt_tokens", "max_tokens", "scored_tokens", "prefix", "likely_tokens", "kept_tokens")
        return replace(self, **{name: getattr(self, name)[numbers] for name in names})

    def sharing(self, prefixes: Prefixes, prefix: Iterable[int]) -> Workload:
        """The same rows, which begin with these prefixes."""
        return replace(self, prefixes=prefixes, prefix=numpy.asarray(prefix, dtype=numpy.int64))

    def apart(self) -> Workload:
        """The same rows, each with all of its prompt to itself."""
        return replace(self, prefixes=Prefixes(), prefix=None) if self.shares else self

    def own(self) -> Workload:
        """What the rows have to themselves, as if nothing came before it."""
        if not self.shares:
            return self
        return replace(self, prompt_tokens=self.own_prompt_tokens, prefixes=Prefixes(), prefix=None)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @cached_property
    def shares(self) -> bool:
        return bool((self.prefix != NONE).any())

    @cached_property
    def shared_tokens(self) -> numpy.ndarray:
        """int64 [rows], tokens of each prompt that are its prefix's."""
        return self.prefixes.depths[self.prefix]

    @cached_property
    def own_prompt_tokens(self) -> numpy.ndarray:
        return self.prompt_tokens - self.shared_tokens

    @cached_property
    def prefix_spans(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """See Prefixes.spans."""
        return self.prefixes.spans(self.prefix)

    @cached_property
    def groups(self) -> numpy.ndarray:
        """int64 [rows], counted from 0: rows that follow each other and begin with the same prefix are of one group."""
        first = numpy.array([chain[0] for chain in self.prefixes.chains] + [NONE], dtype=numpy.int64)[self.prefix]
        begins = numpy.ones(len(first), dtype=bool)
        begins[1:] = (first[1:] != first[:-1]) | (first[1:] == NONE)
        return numpy.cumsum(begins) - 1

    @cached_property
    def prefill_tokens(self) -> int:
        """Prompt tokens that are run where prefixes are shared: each of these once."""
        _, last = self.prefix_spans
        return int(self.own_prompt_tokens.sum() + self.prefixes.lengths[last >= 0].sum())

    def prefix_tokens_of(self, sequences: int) -> int:
        """Room for the prefixes of any ``sequences`` rows that follow each other."""
        if not self.shares:
            return 0
        known = self.__dict__.setdefault("_prefix_tokens", {})
        if sequences not in known:
            first, last = self.prefix_spans
            used, lengths = last >= 0, self.prefixes.lengths
            changes = numpy.zeros(len(self) + 1, dtype=numpy.int64)  # by the first of the rows looked at
            numpy.add.at(changes, numpy.maximum(first[used] - sequences + 1, 0), lengths[used])
            numpy.add.at(changes, last[used] + 1, -lengths[used])
            known[sequences] = int(numpy.cumsum(changes).max())
        return known[sequences]

    @cached_property
    def kv_tokens(self) -> numpy.ndarray:
        """Cache room each sequence may need for itself; its last token is never attended to."""
        return self.own_prompt_tokens + self.max_tokens - 1

    @cached_property
    def kept_kv_tokens(self) -> numpy.ndarray:
        """Cache room that is kept for each."""
        return self.own_prompt_tokens + self.kept_tokens - 1

    @cached_property
    def longest_tokens(self) -> int:
        return int(self.kv_tokens.max(initial=1))

    def kv_tokens_of(self, sequences: int) -> int:
        """Room kept for any ``sequences`` of them at once, the sum over the longest, and no less than one may need."""
        kept = self.kept_kv_tokens
        if sequences < len(self):
            kept = numpy.partition(kept, -sequences)[-sequences:]
        return max(int(kept.sum()), self.longest_tokens)
