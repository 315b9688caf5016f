"""Finds what the prompts of a job begin with in common, so that it is prefilled once, stored once, attended together.

A radix tree over token ids takes every prompt as it is read (few-shot headers, system prompts, the choices of one
prompt, and any of these within another). Of its inner nodes those are chosen whose sharing spares more prefill than the
attention in parts costs (as in Hydragen, arXiv 2402.05099, and BatchLLM, arXiv 2412.03594).
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy

LEAST_TOKENS = 16  # of a prefix, for a share of its own
ROW_COST_TOKENS = 4  # what a sequence pays for one more part of its attention, in tokens of prefill
MOST_TREE_TOKENS = 32 << 20  # that are kept to compare with, at first
MOST_LEAVES = 1 << 18  # likewise, prompts that share nothing further yet
ROOT, NONE = 0, -1


@dataclass(frozen=True, eq=False)
class Prefixes:
    """The shared prefixes of a job, parents before children.

    parents: int64 [prefixes], NONE where it begins a prompt. lengths: int64 [prefixes], tokens that each adds to its
    parent's. tokens: those tokens, int32 each. rows: int64 [prefixes], sequences that begin with it.
    """

    parents: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0, dtype=numpy.int64))
    lengths: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0, dtype=numpy.int64))
    tokens: Sequence[numpy.ndarray] = ()
    rows: numpy.ndarray = field(default_factory=lambda: numpy.zeros(0, dtype=numpy.int64))

    def __len__(self) -> int:
        return len(self.parents)

    def joined(self, others: Prefixes) -> Prefixes:
        """These, and behind them others of another job."""
        parents = numpy.where(others.parents == NONE, NONE, others.parents + len(self))
        pairs = ((self.parents, parents), (self.lengths, others.lengths))
        columns = [numpy.concatenate(pair) for pair in (*pairs, (self.rows, others.rows))]
        return Prefixes(*columns[:2], [*self.tokens, *others.tokens], columns[2])

    @cached_property
    def depths(self) -> numpy.ndarray:
        """int64 [prefixes + 1], tokens from the start of a prompt to the end of each; the last, for NONE, is 0."""
        depths = numpy.append(self.lengths, 0)
        for prefix, parent in enumerate(self.parents.tolist()):
            depths[prefix] += depths[parent]
        return depths

    @cached_property
    def chains(self) -> list[tuple[int, ...]]:
        """Of each prefix, those it consists of, itself last."""
        chains: list[tuple[int, ...]] = []
        for prefix, parent in enumerate(self.parents.tolist()):
            chains.append((*(chains[parent] if parent != NONE else ()), prefix))
        return chains

    def chain(self, prefix: int) -> tuple[int, ...]:
        return self.chains[prefix] if prefix != NONE else ()

    def begins(self, prefix: int, token_ids: numpy.ndarray) -> bool:
        """Whether a prompt begins with all of a prefix, and goes on behind it."""
        start = 0
        for link in self.chain(prefix):
            part = token_ids[start : start + len(self.tokens[link])]
            start += len(part)
            if not numpy.array_equal(part, self.tokens[link]):
                return False
        return start < len(token_ids)

    def order(self, prefix_of: Sequence[int]) -> numpy.ndarray:
        """Rows in an order in which those that share run one after the other, int64 [rows].

        prefix_of: of each row, in the order wanted otherwise. What shares comes where its first row would have come.
        """
        prefix_of = numpy.asarray(prefix_of, dtype=numpy.int64)
        if not len(self) or not (prefix_of != NONE).any():
            return numpy.arange(len(prefix_of))
        first, _ = self.spans(prefix_of)
        rows = numpy.arange(len(prefix_of))
        deepest = max(map(len, self.chains))
        links = numpy.full((len(self) + 1, deepest), NONE, dtype=numpy.int64)  # the last row is that of NONE
        for prefix, chain in enumerate(self.chains):
            links[prefix, : len(chain)] = chain
        keys = links[prefix_of].T
        keys = [numpy.where(links == NONE, rows, numpy.append(first, 0)[links]) for links in keys]
        return numpy.lexsort((rows, *keys[::-1]))

    def spans(self, prefix_of: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(first, last) row that begins with each prefix, int64 [prefixes]; (rows, -1) where none does."""
        first = numpy.full(len(self), len(prefix_of), dtype=numpy.int64)
        last = numpy.full(len(self), -1, dtype=numpy.int64)
        rows = numpy.flatnonzero(prefix_of != NONE)
        numpy.minimum.at(first, prefix_of[rows], rows)
        numpy.maximum.at(last, prefix_of[rows], rows)
        for prefix, parent in reversed(list(enumerate(self.parents.tolist()))):
            if parent != NONE:
                first[parent] = min(first[parent], first[prefix])
                last[parent] = max(last[parent], last[prefix])
        return first, last


def shareable_tokens(prompt_tokens: int, max_tokens: int, score_start: int | None = None) -> int:
    """How many tokens of a prompt may come out of a prefix: those whose rows nothing is asked of.

    max_tokens: 0 where it is only scored. score_start: the first token that is scored, by the row before it.
    """
    most = prompt_tokens - 1 if max_tokens else prompt_tokens - 2
    return max(most if score_start is None else min(most, score_start - 1), 0)


class PrefixTree:
    """Takes prompts one by one, in memory that does not grow with them beyond some bytes a prompt.

    Where more would have to be kept, what only one prompt has so far is forgotten: later prompts then do not find that
    they share it. Each node has the tokens from its parent's end to its own, and the rows that end in it.
    unit: prefixes are of whole ones, of so many tokens.
    """

    def __init__(self, most_tokens: int = MOST_TREE_TOKENS, most_leaves: int = MOST_LEAVES, *, unit: int = 1):
        self._unit = unit
        self._most_tokens, self._most_leaves = most_tokens, most_leaves
        self._parents, self._depths = array("i", [ROOT]), array("i", [0])
        self._starts, self._rows = array("q", [0]), array("i", [0])
        self._children: dict[tuple[int, int | bytes], int] = {}  # see _key
        self._pool, self._used = numpy.empty(1 << 12, dtype=numpy.int32), 0
        self._full = False

    def add(self, token_ids: Sequence[int], rows: int = 1) -> int:
        """Take ``rows`` sequences that begin with these tokens, and go on in their own ways. Returns their node."""
        if len(token_ids) < LEAST_TOKENS:
            return ROOT
        ids = numpy.asarray(token_ids, dtype=numpy.int32)
        node, at = ROOT, 0
        while at < len(ids):
            child = self._children.get(_key(node, ids[at:]))
            if child is None:
                node = self._new_leaf(node, ids[at:])
                break
            start, length = self._starts[child], self._depths[child] - self._depths[node]
            same = _common(self._pool[start : start + length], ids[at : at + length])
            node = child if same == length else self._split(node, child, same)
            at += same
        self._rows[node] += rows
        return node

    def _new(self, parent: int, depth: int, start: int) -> int:
        self._parents.append(parent)
        self._depths.append(depth)
        self._starts.append(start)
        self._rows.append(0)
        return len(self._parents) - 1

    def _new_leaf(self, parent: int, tokens: numpy.ndarray) -> int:
        if not self._full and (self._used + len(tokens) > self._most_tokens or len(self._children) > self._most_leaves):
            self._forget_leaves(but=parent)
        if self._full:
            return parent
        while self._used + len(tokens) > len(self._pool):
            self._pool = numpy.concatenate([self._pool, numpy.empty_like(self._pool)])
        leaf = self._new(parent, self._depths[parent] + len(tokens), self._used)
        self._pool[self._used : self._used + len(tokens)] = tokens
        self._used += len(tokens)
        self._children[_key(parent, tokens)] = leaf
        return leaf

    def _split(self, parent: int, child: int, tokens: int) -> int:
        """A node between two others, ``tokens`` behind the first."""
        start = self._starts[child]
        middle = self._new(parent, self._depths[parent] + tokens, start)
        self._parents[child], self._starts[child] = middle, start + tokens
        self._children[_key(parent, self._pool[start:])] = middle
        self._children[_key(middle, self._pool[start + tokens :])] = child
        return middle

    def _forget_leaves(self, but: int) -> None:
        """Prompts that share nothing further become rows of what they do share. Gives up growing where little helps."""
        inner = {node for node, _ in self._children}
        kept, pool, used = {}, [], 0
        for (parent, token), child in self._children.items():
            if child in inner or child == but or self._rows[child] > 1:
                start, length = self._starts[child], self._depths[child] - self._depths[parent]
                pool.append(self._pool[start : start + length])
                self._starts[child] = used
                used += length
                kept[parent, token] = child
            else:
                self._rows[parent] += self._rows[child]
                self._rows[child] = 0
        self._children = kept
        self._pool = numpy.concatenate(pool) if pool else numpy.empty(1 << 12, dtype=numpy.int32)
        self._used = used
        self._full = used > self._most_tokens // 2 or len(kept) > self._most_leaves // 2

    def chosen(self) -> tuple[Prefixes, numpy.ndarray]:
        """The prefixes worth sharing, and of each node the one that its rows begin with, int64 [nodes].

        A node of ``k`` continuations, with ``L`` tokens behind the chosen prefix it goes on from, spares ``(k - 1) L``
        tokens of prefill. Where it is not chosen its tokens become part of what follows it.
        """
        parents, depths = numpy.array(self._parents), numpy.array(self._depths)
        by_depth = numpy.argsort(depths, kind="stable")[1:]  # parents lie less deep; without the root
        rows, branches = numpy.array(self._rows, dtype=numpy.int64), numpy.array(self._rows, dtype=numpy.int64)
        for node in by_depth[::-1].tolist():
            if rows[node]:
                rows[parents[node]] += rows[node]
                branches[parents[node]] += 1
        depths = depths // self._unit * self._unit
        prefix_of = numpy.full(len(parents), NONE, dtype=numpy.int64)
        chosen: list[int] = []
        for node in by_depth.tolist():
            before = prefix_of[parents[node]]
            prefix_of[node] = before
            length = depths[node] - (depths[chosen[before]] if before != NONE else 0)
            if length >= LEAST_TOKENS and (branches[node] - 1) * length > ROW_COST_TOKENS * rows[node]:
                prefix_of[node] = len(chosen)
                chosen.append(node)
        above = [int(prefix_of[parents[node]]) for node in chosen]
        lengths = [
            int(depths[node] - (depths[chosen[parent]] if parent != NONE else 0)) for node, parent in zip(chosen, above)
        ]
        tokens = [self._path(node)[depths[node] - length : depths[node]] for node, length in zip(chosen, lengths)]
        columns = (numpy.array(column, dtype=numpy.int64) for column in (above, lengths))
        return Prefixes(*columns, tokens, rows[chosen]), prefix_of

    def _path(self, node: int) -> numpy.ndarray:
        """Tokens from the root to the end of a node."""
        parts = []
        while node != ROOT:
            parent = self._parents[node]
            start = self._starts[node]
            parts.append(self._pool[start : start + self._depths[node] - self._depths[parent]])
            node = parent
        return numpy.concatenate(parts[::-1])


def _key(node: int, tokens: numpy.ndarray) -> tuple[int, int | bytes]:
    """What a child of ``node`` that goes on with ``tokens`` is found by: its first token, of the root's as many as a
    prefix has at least, so that prompts that share fewer never meet."""
    return node, tokens[:LEAST_TOKENS].tobytes() if node == ROOT else int(tokens[0])


def _common(first: numpy.ndarray, second: numpy.ndarray) -> int:
    """How many tokens two runs begin with in common."""
    length = min(len(first), len(second))
    different = first[:length] != second[:length]
    place = int(different.argmax())
    return place if length and different[place] else length
