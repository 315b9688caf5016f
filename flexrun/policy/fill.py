"""Gives the weights the room that all else of a policy leaves, fastest tier first; says what is short if none."""

from __future__ import annotations

import dataclasses

from flexrun.config import Placement, Policy
from flexrun.core import Tier, format_bytes
from flexrun.errors import BudgetError
from flexrun.models.spec import ModelSpec
from flexrun.policy.layout import Budgets, Layout
from flexrun.workload import Workload

STEP = 1 / 128  # whole tensors take a little more or less than a fraction says
REMEDIES = {
    Tier.GPU: "raise --gpu-memory",
    Tier.CPU: "raise --cpu-memory",
    Tier.DISK: "free space on the disk, name another --disk-dir or raise --disk-memory",
}


class NoFit(BudgetError):
    """No policy fits the budgets; the message says which is short and by how much."""


def fill_weights(
    spec: ModelSpec,
    policy: Policy,
    workload: Workload,
    budgets: Budgets,
    *,
    keep: bool = False,
    least_rings: bool = False,
) -> Layout | None:
    """The layout of ``policy`` with as many weights as fit on the GPU, then in RAM; None where none fit.

    least_rings: leave the streaming rings no more than they must have, instead of all that they want; more weights are
    resident then, and less is read ahead. keep: take the policy's weights as they are.
    """
    if keep:
        layout = Layout.of(spec, policy, workload, budgets)
        return layout if layout.fits else None
    layout = _with_weights(spec, policy, workload, budgets, 0.0, 0.0)
    if not layout.fits:
        return None
    if budgets.on_device:
        layout = _fullest(layout, workload, Tier.GPU, least_rings)
    return _fullest(layout, workload, Tier.CPU, least_rings)


def _fullest(layout: Layout, workload: Workload, tier: Tier, least_rings: bool) -> Layout:
    """The layout with the largest share of the weights on ``tier`` that leaves its ring whole; they leave the disk."""
    share = _share(layout, tier, least_rings)
    while share > 0:
        gpu, cpu = (share, 0.0) if tier is Tier.GPU else (layout.policy.weights.gpu, share)
        filled = _with_weights(layout.spec, layout.policy, workload, layout.budgets, gpu, cpu)
        if filled.fits and (least_rings or _ring_is_full(filled, tier)):
            return filled
        share = max(share - STEP, 0.0)
    return layout


def _with_weights(spec, policy, workload, budgets, gpu: float, cpu: float) -> Layout:
    weights = Placement(gpu, cpu, max(1.0 - gpu - cpu, 0.0))
    return Layout.of(spec, dataclasses.replace(policy, weights=weights), workload, budgets)


def _ring_is_full(layout: Layout, tier: Tier) -> bool:
    account, device = layout.account, tier is Tier.GPU
    return (account.device_ring_bytes if device else account.host_ring_bytes) >= account.wanted_ring_bytes[device]


def _share(layout: Layout, tier: Tier, least_rings: bool) -> float:
    """Share of the weights that fits on a tier beside all else; its ring shrinks with the share that streams."""
    kinds, account = layout.account.bytes_by_kind[tier], layout.account
    room = layout.budgets.of(tier) - sum(size for kind, size in kinds.items() if kind != "ring")
    weights = layout.placement.bytes_on(Tier.DISK)
    left = layout.policy.weights.disk
    if weights <= room:
        return left
    units = layout.placement.max_unit_stream_bytes
    ring = units[tier is Tier.GPU] if least_rings else account.wanted_ring_bytes[tier is Tier.GPU]
    return max((room - ring) / max(weights - ring, 1), 0.0) * left


def refuse(spec: ModelSpec, policy: Policy, workload: Workload, budgets: Budgets) -> None:
    """Raise NoFit: the smallest form of the policy, and the budget it exceeds."""
    smallest = dataclasses.replace(policy, weights=Placement(0.0, 0.0, 1.0))
    layout = Layout.of(spec, smallest, workload, budgets)
    for tier in Tier:
        excess = layout.excess_bytes(tier)
        if excess:
            parts = ", ".join(
                f"{kind} {format_bytes(size)}" for kind, size in layout.account.bytes_by_kind[tier].items() if size
            )
            raise NoFit(
                f"{tier.value} memory is short by {format_bytes(excess)}: even with every weight on disk the run needs "
                f"{format_bytes(layout.account.total(tier))} ({parts}) and has {format_bytes(budgets.of(tier))}",
                f"{REMEDIES[tier]}, lower --max-tokens or --max-model-len, or use a smaller dtype",
            )
    raise NoFit(
        "no policy with the settings that were given fits the budgets",
        "leave more of them to the search, or raise --cpu-memory or --gpu-memory",
    )
