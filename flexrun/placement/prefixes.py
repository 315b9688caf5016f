"""Under which policies prefixes are shared: under others a job runs as if its prompts had nothing in common."""

from __future__ import annotations

from flexrun.compress import GROUP_TOKENS
from flexrun.config import Policy
from flexrun.models.spec import ModelSpec
from flexrun.placement.memory import hidden_rows_elsewhere
from flexrun.prefixes import Prefixes


def why_not_shared(spec: ModelSpec, policy: Policy, *, on_device: bool) -> str | None:
    """What of a model or policy keeps prefixes from being shared; None: nothing does."""
    for reason, holds in (
        ("latent KV", spec.latent is not None),
        ("keys that depend on how long a text may become", any(rope.kind == "longrope" for rope in spec.ropes)),
        ("KV cache that is split by token", on_device and policy.kv_device_tokens_share > 0),
        ("hidden states that wait off the device", on_device and hidden_rows_elsewhere(policy) > 0),
    ):
        if holds:
            return reason
    return None


def in_whole_groups(policy: Policy, prefixes: Prefixes) -> bool:
    """Whether prefixes end where groups of a compressed cache do; where it is not compressed they may end anywhere."""
    return policy.key_value_bits is None or not (prefixes.lengths % GROUP_TOKENS).any()
