"""Seconds of routed experts: on the compute lane, and of those that the CPU runs beside a device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, lru_cache

import numpy

from flexrun.core import Lane
from flexrun.hardware import Transfer
from flexrun.models.spec import ModelSpec
from flexrun.placement import WeightPlacement, normed_row_bytes
from flexrun.steps import Step, chosen_share


class ExpertCosts:
    """one_expert(rows, beside): seconds of one expert with so many rows, ``beside`` a device or on the compute lane."""

    def __init__(
        self,
        spec: ModelSpec,
        placement: WeightPlacement,
        one_expert: Callable[[float, bool], float],
        transfer: Callable[[Lane], Transfer],
    ):
        self._spec, self._placement, self._one, self._transfer = spec, placement, one_expert, transfer
        experts = spec.experts
        self.share_per_token = experts.experts_per_token / experts.num_experts if experts else 1.0
        self._beside = lru_cache(maxsize=4096)(lambda experts, tokens: self.seconds(experts, tokens, beside=True))

    def seconds(self, experts: int, tokens: int, *, beside: bool = False) -> float:
        """``experts`` routed experts, each over its share of so many tokens; one that none chose is not computed."""
        hit = chosen_share(self.share_per_token, tokens)
        rows = max(tokens * self.share_per_token / hit, 1.0)
        return experts * hit * self._one(rows, beside)

    def of_step(self, step: Step, compute_lane: Lane) -> float:
        """Of an EXPERTS step."""
        if step.lane is not compute_lane:
            return self.seconds(self._beside_device[step.layer], step.rows, beside=True)
        unit = self._placement.units[step.unit]
        return self.seconds(unit.experts - unit.cpu_experts, step.rows)

    @cached_property
    def _beside_device(self) -> list[int]:
        """Of each layer, how many the CPU runs."""
        counts = [0] * (self._spec.num_layers + 1)
        for unit in self._placement.units:
            counts[unit.layer] += unit.cpu_experts
        return counts

    def add_beside(self, seconds: dict[Lane, numpy.ndarray], rows: Iterable[tuple[int, Sequence[int]]]) -> None:
        """Adds what those beside a device take to the seconds of each lane, [passes]; also of their rows' way there and
        back. rows: (number of a pass, tokens of each of its parts)."""
        if not (experts := self._placement.cpu_experts):
            return
        layers = sum(1 for count in self._beside_device if count)
        moves = ((Lane.D2H, normed_row_bytes(self._spec)), (Lane.H2D, 4 * self._spec.hidden_size))
        for number, parts in rows:
            for tokens in filter(None, parts):
                seconds[Lane.CPU][number] += self._beside(experts, tokens)
                for lane, row_bytes in moves:
                    seconds[lane][number] += layers * self._transfer(lane).seconds(tokens * row_bytes)
