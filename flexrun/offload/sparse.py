"""Sparse layers of a pass: all its tokens are routed first, then each expert runs once on all of those sent to it."""

from __future__ import annotations

import numpy
import torch
from torch import Tensor

from flexrun.config import Policy
from flexrun.errors import UnsupportedError
from flexrun.models import decoder
from flexrun.models.spec import ModelSpec
from flexrun.moe import Assignment, ExpertBuffers, assign, route, run_experts
from flexrun.offload.cpu_experts import CPUExperts
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.weight_store import WeightStore
from flexrun.placement import expert_batch_rows
from flexrun.steps import Step


class SparseLayers:
    """What lives between the router of a layer and its last expert, allocated once for the largest pass.

    normed: [tokens, hidden_size], what experts work on. routed: the same in float32, what they made of it so far.
    counts: of each layer, how many tokens of the pass at hand (or of the half routed last) chose each expert; on the
    host, for the lanes that move experts. totals: int64 [layers, experts], the same of all passes so far. on_cpu: those
    experts that the CPU runs beside a device, if any.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        weights: WeightStore,
        host: MemoryTier,
        device: MemoryTier | None,
        accelerator: EmulatedDevice,
    ):
        if policy.hidden.gpu < 1:
            raise UnsupportedError(
                "a mixture of experts with hidden states off the compute device", "set hidden.gpu to 1"
            )
        self._spec, self._weights = spec, weights
        shape, place = (policy.tokens_per_pass, spec.hidden_size), accelerator.place
        self.normed = torch.empty(shape, dtype=spec.torch_dtype, device=place)
        self.routed = torch.empty(shape, dtype=torch.float32, device=place)
        self._buffers = ExpertBuffers(spec, expert_batch_rows(policy), place)
        self._assignments: dict[int, Assignment] = {}  # first row of a part of the pass -> its tokens by expert
        self.counts: dict[int, list[int]] = {}
        self.totals = numpy.zeros((spec.num_layers, spec.experts.num_experts), dtype=numpy.int64)
        self.on_cpu: CPUExperts | None = None
        if device is not None and weights.placement.cpu_experts:
            self.on_cpu = CPUExperts(spec, policy, weights, host, device, accelerator)

    def route(self, step: Step, hidden: Tensor, branches: list[Tensor], chunks: list[tuple[int, int]]) -> None:
        """The MLP step: adds the attention branches of the step's rows to hidden, runs router and shared experts."""
        spec, weights = self._spec, self._weights.unit_weights(step, len(chunks))
        chosen = []
        for start, stop in reversed(chunks):  # each branch is freed as it is used
            logits = decoder.sparse_mlp(
                spec,
                step.layer,
                weights,
                hidden[start:stop],
                branches.pop(),
                self.normed[start:stop],
                self.routed[start:stop],
            )
            chosen.append(route(spec.experts.routing, logits, weights.get("router.correction")))
        experts, shares = (torch.cat(part[::-1]) for part in zip(*chosen))
        assignment = assign(experts, shares, spec.experts.num_experts)
        self._assignments[step.start] = assignment
        self.counts[step.layer] = assignment.counts
        self.totals[step.layer] += assignment.counts

    def run(self, step: Step, hidden: Tensor) -> None:
        """An EXPERTS step; after the last one of the layer, hidden has everything."""
        part = slice(step.start, step.stop)
        run_experts(
            self._spec,
            self._weights.unit_weights(step),
            self._weights.experts_of(step.unit),
            self._assignments[step.start],
            self.normed[part],
            self.routed[part],
            self._buffers,
        )
        if self._weights.is_last_of_layer(step.unit):
            if self.on_cpu is not None and self._weights.cpu_experts(step.layer)[0]:
                self.on_cpu.add(step, self.routed[part])
            decoder.add_routed(self._spec, hidden[part], self.routed[part])
            del self._assignments[step.start]

    def offload(self, step: Step) -> None:
        """An OFFLOAD_NORMED step: to the experts on the CPU."""
        self.on_cpu.offload(step, self.normed[step.start : step.stop], self._assignments[step.start])

    def close(self) -> None:
        if self.on_cpu is not None:
            self.on_cpu.close()
