"""Brings the tokens of a pass into the order of their experts, and what experts made of them back to the tokens.

A token's sum over its experts is taken in float32 and in the order of the experts' numbers. Experts run one after
another in that order, whichever tier they come from and whichever are moved together, so neither changes a token;
those that the CPU runs beside a device have a sum of their own, which is added last. The other way, a row for each
choice of each token that are summed at the end, would hold as many rows as experts a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """The tokens of some rows, expert by expert.

    rows: int64 [T * k], rows of those of expert 0, then of expert 1, ...; ascending within an expert, where each is
    there once. weights: float32 [T * k], of the expert for the row. starts: E + 1 places in both, on the host: the
    rows of an expert are ``rows[starts[expert]:starts[expert + 1]]``.
    """

    rows: Tensor
    weights: Tensor
    starts: tuple[int, ...]

    def count(self, expert: int) -> int:
        """How many tokens chose the expert."""
        return self.starts[expert + 1] - self.starts[expert]

    @property
    def counts(self) -> list[int]:
        return [stop - start for start, stop in pairwise(self.starts)]


def assign(experts: Tensor, weights: Tensor, num_experts: int) -> Assignment:
    """experts [T, k] int64 and weights [T, k] float32, as route gives them. Waits for the device they are on."""
    chosen = experts.flatten()
    order = chosen.argsort(stable=True)
    rows = order.div(experts.shape[1], rounding_mode="floor")
    counts = torch.bincount(chosen, minlength=num_experts)
    starts = (0, *counts.cumsum(0).tolist())
    return Assignment(rows, weights.flatten()[order], starts)


def chunks(start: int, stop: int, limit: int) -> list[tuple[int, int]]:
    """start .. stop in as few parts of nearly equal size as have at most ``limit`` (0: any number) each."""
    total = stop - start
    if total <= 0:
        return []
    parts = -(-total // limit) if limit else 1
    edges = [start + total * part // parts for part in range(parts + 1)]
    return list(pairwise(edges))


def add_weighted(routed: Tensor, rows: Tensor, weights: Tensor, results: Tensor) -> None:
    """routed [T, H] float32 += weights * results at ``rows``, which are all different; results [n, H]."""
    routed.index_add_(0, rows, results * weights.unsqueeze(1))
