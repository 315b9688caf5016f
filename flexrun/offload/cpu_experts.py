"""Experts that the CPU runs beside a device: few tokens cost less to carry to the weights than the weights to them.

The idea of Fiddler (arXiv 2402.07033) and KTransformers. What these experts make of a row is summed apart from what
the device's do, and added last.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flexrun.config import Policy
from flexrun.models.spec import ModelSpec
from flexrun.moe import Assignment, ExpertBuffers, run_experts
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.weight_store import WeightStore
from flexrun.placement import cpu_expert_rows, cpu_experts_bytes
from flexrun.steps import Step


class CPUExperts:
    """Rows on their way to such experts and back, allocated once for the largest pass.

    On the host: normed [tokens, hidden_size], the rows and weights of each choice [tokens * k] (see moe.Assignment),
    routed: float32 [tokens, hidden_size], what the experts made of them. On the device: returned, the same.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        weights: WeightStore,
        host: MemoryTier,
        device: MemoryTier,
        accelerator: EmulatedDevice,
    ):
        self._spec, self._weights, self._accelerator = spec, weights, accelerator
        tokens, self._choices = policy.tokens_per_pass, spec.experts.experts_per_token
        shape, sizes = (tokens, spec.hidden_size), cpu_experts_bytes(spec, policy)
        self._rows = host.allocate("cpu_experts", sizes.rows)
        self._reserved = [(host, sizes.working), (device, sizes.returned)]
        for tier, nbytes in self._reserved:
            tier.reserve("cpu_experts", nbytes)
        offset, views = 0, []  # the widest numbers first, so that all of them lie at multiples of their size
        for of_view, dtype in (
            ((tokens * self._choices,), torch.int64),
            ((tokens * self._choices,), torch.float32),
            (shape, torch.float32),
            (shape, spec.torch_dtype),
        ):
            views.append(self._rows.view(offset, of_view, dtype))
            offset += views[-1].nbytes
        self._chosen_rows, self._chosen_weights, self._routed, self._normed = views
        self._returned = torch.empty(shape, dtype=torch.float32, device=accelerator.place)
        self._buffers = ExpertBuffers(spec, cpu_expert_rows(policy))
        self._assignments: dict[int, Assignment] = {}  # first row of a part of the pass -> its tokens by expert

    def offload(self, step: Step, normed: Tensor, assignment: Assignment) -> None:
        """The rows of a step and who chose what to the host. normed: those rows on the device."""
        copy, part = self._accelerator.copy, slice(step.start * self._choices, step.stop * self._choices)
        rows, weights = self._chosen_rows[part], self._chosen_weights[part]
        copy(self._normed[step.start : step.stop], normed)
        copy(rows, assignment.rows)
        copy(weights, assignment.weights)
        self._assignments[step.start] = replace(assignment, rows=rows, weights=weights)
        self._accelerator.landed()

    def run(self, step: Step) -> None:
        """All of a layer's experts that are here, on the rows of a step."""
        part = slice(step.start, step.stop)
        experts, weights = self._weights.cpu_experts(step.layer)
        assignment, routed = self._assignments.pop(step.start), self._routed[part].zero_()
        run_experts(self._spec, weights, experts, assignment, self._normed[part], routed, self._buffers)

    def bring_back(self, step: Step) -> None:
        part = slice(step.start, step.stop)
        self._accelerator.copy(self._returned[part], self._routed[part])

    def add(self, step: Step, routed: Tensor) -> None:
        """What came back of a step's rows, to the sums of the device's experts."""
        routed += self._returned[step.start : step.stop]

    def close(self) -> None:
        while self._reserved:
            tier, nbytes = self._reserved.pop()
            tier.release("cpu_experts", nbytes)
        self._rows.close()
