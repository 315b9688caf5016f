"""Knows what is left of a job: how long answers to each kind of line get is learnt while they come.

Lines are of one kind whose answers may get about as long, and whose prompts begin with the same.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from flexrun.jobs.index import JobIndex
from flexrun.offload.likely_lengths import LikelyLengths
from flexrun.prefixes import NONE
from flexrun.workload import Workload

FIRST_LOOK = 32  # answers after which what is left is looked at anew; then after twice as many, and so on
MOST_KINDS = 256


class Outlook:
    """The lines of one job that are to be answered, and how long their answers are likely to get.

    answer_tokens: float64 [rows of the index], the mean of what each choice of a line is likely to take; kept_tokens:
    int64 likewise, what nearly all of them stay below. left: bool likewise, what has no answer yet. knows: whether
    any of that is learnt.
    """

    def __init__(self, index: JobIndex, rows: np.ndarray):
        self.index = index
        self.left = np.zeros(len(index), dtype=bool)
        self.left[rows] = True
        self.answer_tokens = index.answer_tokens.astype(np.float64)
        self.kept_tokens = index.answer_tokens.copy()
        self._kind = _kinds(index)
        self._lengths: dict[int, LikelyLengths] = {}
        self._all = LikelyLengths()
        self._answers, self._next_look = 0, FIRST_LOOK
        self.knows = False
        self._prompt_cost = self._answer_cost = 1.0

    def cost(self, prompt_seconds: float, answer_seconds: float) -> None:
        """What a token of a prompt and one of an answer are forecast to take."""
        self._prompt_cost, self._answer_cost = prompt_seconds, answer_seconds

    def work(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Seconds that so many tokens are forecast to take."""
        return self._prompt_cost * prompt_tokens + self._answer_cost * answer_tokens

    def work_of(self, row: int) -> float:
        """Of one row, all of its choices."""
        index = self.index
        return self.work(float(index.prompt_tokens[row]), float(self.answer_tokens[row] * index.choices[row]))

    @property
    def work_left(self) -> float:
        """Of all that has no answer yet."""
        index, rows = self.index, self.left
        answers = float(self.answer_tokens[rows] @ index.choices[rows])
        return self.work(float(index.prompt_tokens[rows].sum()), answers)

    def add(self, row: int, tokens: int, ended: bool) -> None:
        """One choice of a row is answered. ended: by itself, not at its limit."""
        kind = int(self._kind[row])
        for lengths in (self._lengths.setdefault(kind, LikelyLengths()), self._all):
            lengths.add(tokens, ended)
        self._answers += 1

    @property
    def due(self) -> bool:
        """Whether so much is new that it is worth a look."""
        return self._answers >= self._next_look

    def look(self, running: Iterable[tuple[int, int]] = ()) -> None:
        """Expect of what is left what has been learnt. running: (row, tokens so far) of answers under way."""
        self._next_look = max(2 * self._answers, FIRST_LOOK)
        self.knows = self._all.enough
        by_kind: dict[int, list[int]] = {}
        for row, tokens in running:
            by_kind.setdefault(int(self._kind[row]), []).append(tokens)
        everything = [tokens for found in by_kind.values() for tokens in found]
        rows = np.flatnonzero(self.left)
        rows = rows[np.argsort(self._kind[rows], kind="stable")]
        kinds, starts = np.unique(self._kind[rows], return_index=True)
        for kind, those in zip(kinds.tolist(), np.split(rows, starts[1:])):
            lengths, under_way = self._lengths.get(kind), by_kind.get(kind, [])
            if lengths is None or not lengths.enough:
                lengths, under_way = self._all, everything
            limits = self.index.answer_tokens[those]
            self.answer_tokens[those] = lengths.expected(limits, under_way)
            likely = lengths.likely(under_way)
            self.kept_tokens[those] = limits if likely is None else np.minimum(limits, likely)

    def order(self, name: str, rows: np.ndarray) -> np.ndarray:
        """``rows`` as JobIndex.order has them. A kind that is not known counts by its limit: it may be the long one."""
        known = np.zeros(int(self._kind.max(initial=0)) + 1, dtype=bool)
        known[[kind for kind, lengths in self._lengths.items() if lengths.enough]] = True
        answers = np.where(known[self._kind], self.answer_tokens, self.index.answer_tokens)
        return self.index.order(name, rows, answers)

    def workload(self, rows: np.ndarray) -> Workload:
        """What the engine sizes itself by to run ``rows``."""
        workload, choices = self.index.workload(rows), self.index.choices[rows]
        likely = np.repeat(np.ceil(self.answer_tokens[rows]).astype(np.int64), choices)
        kept = np.repeat(self.kept_tokens[rows], choices)
        likely, kept = (np.clip(column, 1, workload.max_tokens) for column in (likely, kept))
        return dataclasses.replace(workload, likely_tokens=likely, kept_tokens=kept)


def _kinds(index: JobIndex) -> np.ndarray:
    """int32 [rows], the number of each row's kind."""
    sizes = np.ceil(4 * np.log2(index.answer_tokens + 1.0)).astype(np.int64)
    roots = np.array([chain[0] for chain in index.prefixes.chains] + [NONE], dtype=np.int64)[index.prefix]
    keys, kinds = np.unique(sizes + 1024 * (roots + 1), return_inverse=True)
    if len(keys) > MOST_KINDS:
        keys, kinds = np.unique(sizes, return_inverse=True)
    return kinds.astype(np.int32)
