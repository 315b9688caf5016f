"""What a user decides about the policy before one is searched: all of it, or the bits of weights and KV cache alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexrun.compress import GROUP_TOKENS, WeightBits
from flexrun.config import Policy
from flexrun.core import Lane
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware
from flexrun.models.spec import ModelSpec
from flexrun.placement import weight_bits_of
from flexrun.policy.features import AUTO_CHOICES, RUNNABLE, Features
from flexrun.policy.forecast import forecast
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.search import Plan
from flexrun.workload import Workload

AUTO = "auto"


def given_policy(
    spec: ModelSpec,
    policy: Policy | str | Path | None,
    weight_bits: int | str | None,
    keep: Sequence[str] | None,
    weight_group: int | None,
    kv_bits: int | str | None = None,
    activation_bits: int | None = None,
) -> tuple[Policy | None, dict[str, Any], WeightBits, Features]:
    """(the policy, or None for the best one; fields of it that are decided; the bits of the weights; what a search may
    use).

    weight_bits, keep, weight_group, kv_bits, activation_bits: where given, in place of the policy's own; bits that are
    "auto" are found with the policy.
    Raises ConfigError for a rule that fits no matrix, for bits to be found where there is nothing to search, and for
    activations rounded for no matrix.
    """
    if policy == "auto":
        policy = None
    features = RUNNABLE
    for name, bits in (("weight_bits", weight_bits), ("kv_bits", kv_bits)):
        if bits == AUTO:
            if policy is not None:
                raise ConfigError(
                    f"{name} 'auto' are found with the policy, but a policy is given",
                    "name the bits, or leave the policy out",
                )
            features = dataclasses.replace(features, **{name: AUTO_CHOICES[name]})
    if isinstance(policy, (str, Path)):
        policy = Policy.from_json(policy)
    rules = None if keep is None else tuple(keep)
    given = {"weight_bits": weight_bits, "keep": rules, "weight_group": weight_group, "kv_bits": kv_bits}
    given["activation_bits"] = activation_bits
    fixed = {name: value for name, value in given.items() if value not in (None, AUTO)}
    decided = dataclasses.replace(policy or Policy(), **fixed)
    bits = weight_bits_of(decided)
    bits.check(spec.tensors_by_layer())
    if weight_bits != AUTO:
        check_activations(decided)
    return None if policy is None else decided, fixed, bits, features


def check_activations(policy: Policy) -> None:
    """Raise ConfigError where activations are to be rounded and no matrix is compressed."""
    if policy.activation_bits < 16 and policy.weight_bits == 16 and not policy.keep:
        raise ConfigError(
            f"activation_bits={policy.activation_bits} rounds what compressed matrices are multiplied by, and none is "
            "compressed",
            "set weight_bits to 8 or 4 as well",
        )


def found_bits(features: Features, policy: Policy) -> dict[str, Any]:
    """Those that were left to the search, as arguments: all of an LLM's answers come from the same ones."""
    return {name: getattr(policy, name) for name in AUTO_CHOICES if len(getattr(features, name)) > 1}


def given_plan(
    spec: ModelSpec, policy: Policy, max_num_seqs: int | None, workload: Workload, budgets: Budgets, hardware: Hardware
) -> Plan:
    """The plan of a policy that is given. Raises BudgetError where it does not fit."""
    if max_num_seqs is not None:
        sequences = min(policy.sequences_in_flight, max_num_seqs)
        policy = dataclasses.replace(policy, sequences_in_flight=sequences)
    layout = Layout.of(spec, policy, workload, budgets)
    layout.check()
    return Plan(policy, layout, forecast(layout, workload, hardware))


def check_runnable(spec: ModelSpec, layout: Layout, *, on_gpu: bool) -> None:
    """Raise UnsupportedError for a plan that cannot be run; see Policy.check_runnable."""
    latents = spec.latent is not None
    on_cpu = layout.on_device and any(place.attend_lane is Lane.CPU for place in layout.micro_batches)
    layout.policy.check_runnable(
        on_device=layout.on_device, on_gpu=on_gpu, latents=latents, latents_on_cpu=on_cpu and latents
    )


def prefix_unit(policy: Policy | None, fixed: dict[str, Any], features: Features) -> int:
    """Tokens of which shared prefixes are to be whole multiples: of a cache that may be compressed, its groups."""
    kv_bits = (fixed.get("kv_bits", 16), 16 if policy is None else policy.kv_bits, *features.kv_bits)
    return 1 if set(kv_bits) == {16} else GROUP_TOKENS
