"""Routed experts at work: each one once over all of its rows, in chunks, its results added to the rows' sums."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flexrun.models import ops
from flexrun.models.spec import ModelSpec
from flexrun.moe.batching import Assignment, add_weighted, chunks

CAN_GROUP = hasattr(torch.nn.functional, "grouped_mm")


class ExpertBuffers:
    """Memory that every chunk of every expert uses again: fresh pages would cost as much as a matmul of few rows.

    rows: of the largest chunk.
    """

    def __init__(self, spec: ModelSpec, rows: int, device: torch.device | str = "cpu"):
        self.rows = rows
        inner, hidden = spec.experts.intermediate_size, spec.hidden_size

        def buffer(width: int) -> Tensor:
            return torch.empty(rows, width, dtype=spec.torch_dtype, device=device)

        self.inputs, self.gate_up, self.inner, self.results = map(buffer, (hidden, 2 * inner, inner, hidden))


def run_experts(
    spec: ModelSpec,
    weights: Mapping[str, Tensor],
    experts: Iterable[int],
    assignment: Assignment,
    normed: Tensor,
    routed: Tensor,
    buffers: ExpertBuffers,
) -> None:
    """Adds to routed [T, H] float32 what ``experts``, in ascending order, make of their rows of normed [T, H].

    weights: the experts' tensors under their packed names; those of experts without rows are not looked at.
    """
    chosen = [expert for expert in experts if assignment.count(expert)]
    if normed.is_cuda and normed.dtype is torch.bfloat16 and CAN_GROUP and len(chosen) > 1:
        runs = _runs_in_one_buffer(weights, chosen, assignment, buffers.rows)
    else:
        runs = [[expert] for expert in chosen]
    for run in runs:
        if len(run) > 1:
            _run_group(spec, weights, run, assignment, normed, routed, buffers)
        else:
            _run_one(spec, weights, run[0], assignment, normed, routed, buffers)


def _run_one(spec, weights, expert, assignment, normed, routed, buffers) -> None:
    stem = f"expert.{expert}."
    gate_up, down = weights[stem + "gate_up.weight"], weights[stem + "down.weight"]
    gate_up_bias, down_bias = weights.get(stem + "gate_up.bias"), weights.get(stem + "down.bias")
    for start, stop in chunks(assignment.starts[expert], assignment.starts[expert + 1], buffers.rows):
        rows, count = assignment.rows[start:stop], stop - start
        inputs = torch.index_select(normed, 0, rows, out=buffers.inputs[:count])
        inner = ops.linear(inputs, gate_up, gate_up_bias, buffers.gate_up[:count])
        inner = gate(spec, inner, out=buffers.inner[:count])
        results = ops.linear(inner, down, down_bias, buffers.results[:count])
        add_weighted(routed, rows, assignment.weights[start:stop], results)


def gate(spec: ModelSpec, gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """gate_up [T, 2I], gate first -> [T, I]: the model's gated activation, or gpt-oss's. May overwrite gate_up."""
    limit, slope = spec.experts.gate_limit, spec.experts.gate_slope
    if not limit:
        return ops.gated_activation(gate_up, spec.activation, out)
    gate, up = gate_up.chunk(2, dim=-1)
    gate.clamp_(max=limit)
    up.clamp_(-limit, limit).add_(1)
    result = torch.mul(gate, slope, out=out).sigmoid_()
    return result.mul_(gate).mul_(up)


# CUDA -------------------------------------------------------------------------------------------------


def _runs_in_one_buffer(
    weights: Mapping[str, Tensor], chosen: list[int], assignment: Assignment, limit: int
) -> list[list[int]]:
    """``chosen`` cut to runs whose matrices lie at equal distances in one buffer, of at most ``limit`` rows a run.

    An expert with more rows than that is a run of its own.
    """
    runs: list[list[int]] = []
    rows = 0
    for expert in chosen:
        count = assignment.count(expert)
        if runs and rows + count <= limit and _stack(weights, [*runs[-1], expert], "gate_up") is not None:
            runs[-1].append(expert)
            rows += count
        else:
            runs.append([expert])
            rows = count
    return runs


def _stack(weights: Mapping[str, Tensor], experts: list[int], name: str) -> Tensor | None:
    """The matrices of ``experts`` as one strided tensor [experts, outputs, inputs], or None if they lie otherwise."""
    matrices = [weights[f"expert.{expert}.{name}.weight"] for expert in experts]
    first = matrices[0]
    if not all(isinstance(matrix, Tensor) for matrix in matrices):
        return None  # compressed ones multiply by themselves
    if len(matrices) == 1:
        return first.unsqueeze(0)
    distance = matrices[1].storage_offset() - first.storage_offset()
    for number, matrix in enumerate(matrices):
        if matrix.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or not matrix.is_contiguous():
            return None
        if matrix.storage_offset() != first.storage_offset() + number * distance:
            return None
    if distance < first.numel() or any(step * first.element_size() % 16 for step in (distance, first.stride(0))):
        return None  # grouped_mm asks for multiples of 16 bytes
    return first.as_strided((len(matrices), *first.shape), (distance, *first.stride()))


def _run_group(spec, weights, experts, assignment, normed, routed, buffers) -> None:
    """Two grouped products over the rows of neighbouring experts; each expert then adds its own results, in order.

    One addition over all of them would add a row's results in any order, for rows are there once an expert.
    """
    starts, stops = ([assignment.starts[expert + more] for expert in experts] for more in (0, 1))
    first, count = starts[0], stops[-1] - starts[0]  # experts between them have no rows
    ends = torch.tensor([stop - first for stop in stops], dtype=torch.int32).to(normed.device, non_blocking=True)
    inputs = torch.index_select(normed, 0, assignment.rows[first : stops[-1]], out=buffers.inputs[:count])
    inner = gate(spec, _grouped(weights, experts, "gate_up", inputs, ends), out=buffers.inner[:count])
    results = _grouped(weights, experts, "down", inner, ends)
    for start, stop in zip(starts, stops):
        part = slice(start - first, stop - first)
        add_weighted(routed, assignment.rows[start:stop], assignment.weights[start:stop], results[part])


def _grouped(weights, experts: list[int], name: str, inputs: Tensor, ends: Tensor) -> Tensor:
    stacked = _stack(weights, experts, name)
    outputs = torch.nn.functional.grouped_mm(inputs, stacked.transpose(1, 2), offs=ends)
    if f"expert.{experts[0]}.{name}.bias" in weights:
        starts = [0, *ends.tolist()]
        for expert, start, stop in zip(experts, starts, starts[1:]):
            outputs[start:stop] += weights[f"expert.{expert}.{name}.bias"]
    return outputs
