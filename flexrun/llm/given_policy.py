"""What a user decides about the policy before one is searched: all of it, or the bits of weights and KV cache alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexrun.compress import WeightBits
from flexrun.config import Policy
from flexrun.errors import ConfigError
from flexrun.models.spec import ModelSpec
from flexrun.placement import weight_bits_of
from flexrun.policy.features import AUTO_BITS, RUNNABLE, Features

AUTO = "auto"


def given_policy(
    spec: ModelSpec,
    policy: Policy | str | Path | None,
    weight_bits: int | str | None,
    keep: Sequence[str] | None,
    weight_group: int | None,
    kv_bits: int | str | None = None,
) -> tuple[Policy | None, dict[str, Any], WeightBits, Features]:
    """(the policy, or None for the best one; fields of it that are decided; the bits of the weights; what a search may
    use).

    weight_bits, keep, weight_group, kv_bits: where given, in place of the policy's own; of "auto", bits of weights are
    found with the policy.
    Raises ConfigError for a rule that fits no matrix, and for bits to be found where there is nothing to search.
    """
    if policy == "auto":
        policy = None
    features = RUNNABLE
    if weight_bits == AUTO:
        if policy is not None:
            raise ConfigError(
                "weight_bits 'auto' are found with the policy, but a policy is given",
                "name the bits, or leave the policy out",
            )
        weight_bits, features = None, dataclasses.replace(RUNNABLE, weight_bits=AUTO_BITS)
    if isinstance(policy, (str, Path)):
        policy = Policy.from_json(policy)
    rules = None if keep is None else tuple(keep)
    given = {"weight_bits": weight_bits, "keep": rules, "weight_group": weight_group, "kv_bits": kv_bits}
    fixed = {name: value for name, value in given.items() if value is not None}
    decided = dataclasses.replace(policy or Policy(), **fixed)
    bits = weight_bits_of(decided)
    bits.check(spec.tensors_by_layer())
    return None if policy is None else decided, fixed, bits, features
