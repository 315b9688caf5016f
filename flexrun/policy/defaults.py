"""A sensible policy without a search: keep what fits in the fastest memory, stream the rest, run as many as fit.

Weights are read once a pass whatever the pass carries, so sequences in flight come before resident weights,
until the KV cache would take more than half of the memory.
"""

from __future__ import annotations

import dataclasses

from flexrun.config import Placement, Policy
from flexrun.core import Tier, format_bytes
from flexrun.errors import BudgetError
from flexrun.models.spec import ModelSpec
from flexrun.placement import (
    kv_bytes_per_token,
    memory_account,
    place_weights,
    workspace_bytes,
)
from flexrun.workload import Workload

MAX_SEQUENCES = 256
TOKENS_PER_PASS = 2048
DEVICE_MICRO_BATCHES = 4  # so that copies of one overlap attention of another
FRACTION_STEPS = 64  # weight fractions are tried in 64ths


class NoFit(BudgetError):
    """No policy fits the budgets; the message says which is short and by how much."""


def default_policy(
    spec: ModelSpec,
    workload: Workload,
    cpu_budget_bytes: int,
    gpu_budget_bytes: int = 0,
    max_sequences: int | None = None,
) -> Policy:
    """A policy whose memory account fits both budgets. Raises NoFit where none does."""
    on_device = gpu_budget_bytes > 0
    compute_budget = gpu_budget_bytes if on_device else cpu_budget_bytes
    sequences = max(min(len(workload), max_sequences or MAX_SEQUENCES), 1)
    policy = Policy(sequences_in_flight=sequences, tokens_per_pass=max(TOKENS_PER_PASS, sequences))
    token_bytes = kv_bytes_per_token(spec)
    weights_fit = spec.weight_bytes + workload.kv_tokens_of(sequences) * token_bytes < 0.9 * compute_budget
    kv_share = 1.0 if weights_fit else 0.5
    while workspace_bytes(spec, policy) > 0.2 * compute_budget and policy.tokens_per_pass > 64:
        tokens = policy.tokens_per_pass // 2
        policy = dataclasses.replace(
            policy,
            tokens_per_pass=tokens,
            token_micro_batch=min(policy.token_micro_batch, tokens),
            sequences_in_flight=min(policy.sequences_in_flight, tokens),
        )
    kv_on_gpu = on_device and _kv_bytes(policy, workload, token_bytes) <= 0.5 * gpu_budget_bytes
    kv_budget = kv_share * (gpu_budget_bytes if kv_on_gpu else cpu_budget_bytes)
    while policy.sequences_in_flight > 1 and _kv_bytes(policy, workload, token_bytes) > kv_budget:
        policy = dataclasses.replace(policy, sequences_in_flight=max(policy.sequences_in_flight * 3 // 4, 1))
    micro_batches = min(DEVICE_MICRO_BATCHES, policy.sequences_in_flight) if on_device else 1
    policy = dataclasses.replace(
        policy,
        attention_micro_batch=-(-policy.sequences_in_flight // micro_batches),
        kv=Placement(gpu=1.0, cpu=0.0) if kv_on_gpu else Placement(),
    )
    policy = dataclasses.replace(policy, kv_tokens=room_for(policy, workload))
    while (placed := _place_weights(spec, policy, cpu_budget_bytes, gpu_budget_bytes)) is None:
        smaller = _smaller(policy)
        if smaller is None:
            _refuse(spec, policy, cpu_budget_bytes, gpu_budget_bytes)
        policy = dataclasses.replace(smaller, kv_tokens=room_for(smaller, workload))
    return placed


def _smaller(policy: Policy) -> Policy | None:
    """The next policy to try where not even the buffers fit: KV to the host, fewer sequences, shorter passes."""
    if policy.kv.gpu:
        return dataclasses.replace(policy, kv=Placement())
    if policy.sequences_in_flight > 1:
        sequences = policy.sequences_in_flight // 2
        micro_batch = min(policy.attention_micro_batch, sequences)
        return dataclasses.replace(policy, sequences_in_flight=sequences, attention_micro_batch=micro_batch)
    if policy.tokens_per_pass > 1:
        tokens = policy.tokens_per_pass // 2
        rows = min(policy.token_micro_batch, tokens)
        return dataclasses.replace(policy, tokens_per_pass=tokens, token_micro_batch=rows)
    return None


def room_for(policy: Policy, workload: Workload) -> int:
    """KV tokens for the longest ``sequences_in_flight`` sequences, with each micro-batch able to hold the longest."""
    micro_batches = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    return max(workload.kv_tokens_of(policy.sequences_in_flight), 1) + (micro_batches - 1) * workload.longest_tokens


def _kv_bytes(policy: Policy, workload: Workload, token_bytes: int) -> int:
    return room_for(policy, workload) * token_bytes


def _place_weights(spec: ModelSpec, policy: Policy, cpu_budget_bytes: int, gpu_budget_bytes: int) -> Policy | None:
    """As much on the GPU as fits, then as much in RAM as fits, the rest on disk; None where that is not enough.

    Reading ahead comes before residence: weights are resident beside full rings, and rings shrink only where
    nothing else fits.
    """
    budgets = (cpu_budget_bytes, gpu_budget_bytes)
    return _largest_share(spec, policy, *budgets, full_rings=True) or _largest_share(
        spec, policy, *budgets, full_rings=False
    )


def _largest_share(
    spec: ModelSpec, policy: Policy, cpu_budget_bytes: int, gpu_budget_bytes: int, *, full_rings: bool
) -> Policy | None:
    on_device = gpu_budget_bytes > 0

    def fits(weights: Placement) -> bool:
        candidate = dataclasses.replace(policy, weights=weights)
        placement = place_weights(spec, candidate, on_device=on_device)
        budgets = {} if full_rings else {"cpu_budget_bytes": cpu_budget_bytes, "gpu_budget_bytes": gpu_budget_bytes}
        account = memory_account(spec, candidate, placement, policy.kv_tokens, on_device=on_device, **budgets)
        gpu_fits = not on_device or account.total(Tier.GPU) <= gpu_budget_bytes
        return gpu_fits and account.total(Tier.CPU) <= cpu_budget_bytes

    def largest(make) -> Placement | None:
        low, high, best = 0, FRACTION_STEPS, None
        while low <= high:
            middle = (low + high) // 2
            placement = make(middle / FRACTION_STEPS)
            if fits(placement):
                best, low = placement, middle + 1
            else:
                high = middle - 1
        return best

    on_gpu = largest(lambda share: Placement(share, 0.0, 1.0 - share)) if on_device else Placement(0, 0, 1)
    best = on_gpu and largest(lambda share: _split(on_gpu.gpu, share * (1.0 - on_gpu.gpu)))
    return dataclasses.replace(policy, weights=best) if best else None


def _split(gpu: float, cpu: float) -> Placement:
    return Placement(gpu, cpu, max(1.0 - gpu - cpu, 0.0))


def _refuse(spec: ModelSpec, policy: Policy, cpu_budget_bytes: int, gpu_budget_bytes: int) -> None:
    on_device = gpu_budget_bytes > 0
    policy = dataclasses.replace(policy, weights=Placement(0, 0, 1))
    placement = place_weights(spec, policy, on_device=on_device)
    least = memory_account(
        spec,
        policy,
        placement,
        policy.kv_tokens,
        on_device=on_device,
        gpu_budget_bytes=gpu_budget_bytes,
        cpu_budget_bytes=cpu_budget_bytes,
    )
    for tier, budget, flag in (
        (Tier.GPU, gpu_budget_bytes, "--gpu-memory"),
        (Tier.CPU, cpu_budget_bytes, "--cpu-memory"),
    ):
        needed = least.total(tier)
        if (tier is Tier.CPU or gpu_budget_bytes) and needed > budget:
            parts = ", ".join(
                f"{kind} {format_bytes(size)}" for kind, size in least.bytes_by_kind[tier].items() if size
            )
            raise NoFit(
                f"{tier.value} memory is short by {format_bytes(needed - budget)}: even with every weight on disk the "
                f"run needs {format_bytes(needed)} ({parts}) and has {format_bytes(budget)}",
                f"raise {flag}, lower --max-tokens or --max-model-len, or use a smaller dtype",
            )
    raise NoFit("the budgets are too small for any placement", "raise --cpu-memory or --gpu-memory")
