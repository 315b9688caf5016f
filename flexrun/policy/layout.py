"""A policy made concrete: which tensor, which micro-batch and how many bytes go where, for one model and budgets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from flexrun.config import Policy
from flexrun.core import Tier, format_bytes
from flexrun.errors import BudgetError
from flexrun.models.spec import ModelSpec
from flexrun.placement import (
    KVMicroBatch,
    MemoryAccount,
    WeightPlacement,
    in_whole_groups,
    kv_micro_batches,
    least_ring_bytes,
    memory_account,
    part_tokens,
    place_weights,
    why_not_shared,
)
from flexrun.workload import Workload


@dataclass(frozen=True)
class Budgets:
    """Hard limits in bytes. gpu 0: no GPU. disk None: not limited."""

    cpu_bytes: int
    gpu_bytes: int = 0
    disk_bytes: int | None = None

    @property
    def on_device(self) -> bool:
        return self.gpu_bytes > 0

    def of(self, tier: Tier) -> int | None:
        return {Tier.GPU: self.gpu_bytes, Tier.CPU: self.cpu_bytes, Tier.DISK: self.disk_bytes}[tier]


@dataclass(frozen=True, eq=False)
class Layout:
    """What a run of ``policy`` holds and where. kv_tokens: room of the KV cache, all micro-batches together.

    prefix_tokens: room for prefixes that sequences share, beside it; 0: they share none.
    """

    spec: ModelSpec
    policy: Policy
    budgets: Budgets
    kv_tokens: int
    placement: WeightPlacement
    micro_batches: tuple[KVMicroBatch, ...]
    account: MemoryAccount
    prefix_tokens: int = 0

    @classmethod
    def of(cls, spec: ModelSpec, policy: Policy, workload: Workload, budgets: Budgets) -> Layout:
        """The layout of a policy. Raises BudgetError where it places something on a GPU that is not there."""
        on_device = budgets.on_device
        prefix_tokens = 0
        if (
            workload.shares
            and in_whole_groups(policy, workload.prefixes)
            and why_not_shared(spec, policy, on_device=on_device) is None
        ):
            prefix_tokens = workload.prefix_tokens_of(policy.sequences_in_flight)
        else:
            workload = workload.apart()
        kv_tokens = policy.kv_tokens or room_for(policy, workload)
        placement = place_weights(spec, policy, on_device=on_device)
        account = memory_account(
            spec,
            policy,
            placement,
            kv_tokens,
            on_device=on_device,
            gpu_budget_bytes=budgets.gpu_bytes or None,
            cpu_budget_bytes=budgets.cpu_bytes,
            prefix_tokens=prefix_tokens,
        )
        micro_batches = kv_micro_batches(policy, kv_tokens, on_device=on_device, prefix_tokens=prefix_tokens)
        return cls(spec, policy, budgets, kv_tokens, placement, micro_batches, account, prefix_tokens)

    def shallow(self, layers: int) -> Layout:
        """The same layout of a model with only its last ``layers`` layers: to simulate what every layer repeats.

        KV room and rings stay as they are, so the account is not that of the smaller model.
        """
        spec = self.spec
        parts = {
            name: getattr(spec, name)[-layers:]
            for name in ("layer_windows", "layer_ropes", "sparse_layers", "expert_counts")
            if getattr(spec, name)
        }
        spec = dataclasses.replace(spec, num_layers=layers, **parts)
        placement = place_weights(spec, self.policy, on_device=self.on_device)
        account, in_parts = self.account, bool(part_tokens(self.policy))
        host_least, device_least = least_ring_bytes(placement, in_parts=in_parts)
        if host_least > account.host_ring_bytes or (self.on_device and device_least > account.device_ring_bytes):
            account = dataclasses.replace(  # other tensors may move than in the whole model
                account,
                host_ring_bytes=max(account.host_ring_bytes, host_least),
                device_ring_bytes=max(account.device_ring_bytes, device_least),
            )
        return dataclasses.replace(self, spec=spec, placement=placement, account=account)

    @property
    def on_device(self) -> bool:
        return self.budgets.on_device

    def excess_bytes(self, tier: Tier) -> int:
        """By how much the layout exceeds the budget of a tier (0 where it fits)."""
        budget = self.budgets.of(tier)
        if budget is None or (tier is Tier.GPU and not self.on_device):
            return 0
        return max(self.account.total(tier) - budget, 0)

    @property
    def fits(self) -> bool:
        return not any(self.excess_bytes(tier) for tier in Tier)

    def check(self) -> None:
        """Raise BudgetError naming the tier that is short, by how much, and what takes its bytes."""
        for tier in Tier:
            if self.excess_bytes(tier):
                parts = ", ".join(
                    f"{kind} {format_bytes(size)}" for kind, size in self.account.bytes_by_kind[tier].items() if size
                )
                raise BudgetError(
                    f"the policy needs {format_bytes(self.account.total(tier))} of {tier.value} memory ({parts}); "
                    f"the budget is {format_bytes(self.budgets.of(tier))}",
                    "raise the budget, or use --policy auto",
                )


def room_for(policy: Policy, workload: Workload) -> int:
    """KV tokens for the longest ``sequences_in_flight`` sequences, with each micro-batch able to hold the longest."""
    micro_batches = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    return max(workload.kv_tokens_of(policy.sequences_in_flight), 1) + (micro_batches - 1) * workload.longest_tokens
