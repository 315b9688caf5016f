"""The KV cache in the bits of a policy: what a token takes of it, and what waits beside it in the model's dtype."""

from __future__ import annotations

from flexrun.compress import GROUP_TOKENS, KVFormat
from flexrun.config import Policy
from flexrun.core import Tier, align_up
from flexrun.models.spec import ModelSpec
from flexrun.placement.weights import compressed_bytes
from flexrun.steps import KVBytes

DENSE_TOKENS = 2048  # of a compressed cache brought back, or compressed, at a time
SCRATCH_BYTES = 12  # of an element meanwhile


def kv_format(spec: ModelSpec, policy: Policy) -> KVFormat | None:
    """How the cache is compressed; None: not at all. Latent caches are planned in these bits, but not run."""
    if policy.key_value_bits is None or spec.latent is not None:
        return None
    return KVFormat(*policy.key_value_bits, spec.num_kv_heads, spec.head_dim)


def kv_token_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Bytes of a token in the cache of one layer, factors included."""
    form = kv_format(spec, policy)
    if form is not None:
        return form.token_bytes
    if policy.key_value_bits is not None:
        return compressed_bytes(spec.kv_elements_per_token, max(policy.key_value_bits))
    return spec.kv_bytes_per_token


def kv_moved(spec: ModelSpec, policy: Policy) -> KVBytes:
    """What lanes carry of the cache."""
    form = kv_format(spec, policy)
    return KVBytes(kv_token_bytes(spec, policy), spec.kv_bytes_per_token, 0 if form is None else form.record_bytes)


def kv_room(policy: Policy, tokens: int) -> int:
    """Room for ``tokens`` tokens of one micro-batch, in tokens: whole groups where it is compressed, one at least for
    each of its sequences."""
    if policy.key_value_bits is None:
        return tokens
    sequences = min(policy.attention_micro_batch, policy.sequences_in_flight)
    return max(-(-tokens // GROUP_TOKENS), sequences) * GROUP_TOKENS


def room_of_groups(tokens):
    """Of it, what a sequence of so many tokens (a number or an array) takes: those of a last group that is never
    complete wait elsewhere."""
    return (tokens // GROUP_TOKENS + (tokens < GROUP_TOKENS)) * GROUP_TOKENS


def kv_scratch_bytes(spec: ModelSpec, policy: Policy) -> int:
    """What bringing groups back, and compressing them, works in: codes, values in float32, values in the dtype."""
    if kv_format(spec, policy) is None:
        return 0
    return align_up(DENSE_TOKENS * spec.kv_elements_per_token * (SCRATCH_BYTES + spec.dtype_bytes))


def recent_kv_bytes(spec: ModelSpec, policy: Policy, micro_batches: int) -> int:
    """Bytes for the newest tokens of every sequence, whose group is not complete, in all layers."""
    if kv_format(spec, policy) is None:
        return 0
    sequences = min(policy.attention_micro_batch, policy.sequences_in_flight) * micro_batches
    return align_up(spec.num_layers * sequences * GROUP_TOKENS * spec.kv_bytes_per_token)


def new_groups_most(policy: Policy) -> int:
    """Most groups that one pass completes: one with the first token of each sequence, others every 64."""
    sequences = min(policy.sequences_in_flight, policy.tokens_per_pass)
    return sequences + (policy.tokens_per_pass - sequences) // GROUP_TOKENS


def new_groups_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Device rows of one layer's groups that a pass completes, before they go where the cache is."""
    form = kv_format(spec, policy)
    return 0 if form is None else align_up(new_groups_most(policy) * form.record_bytes)


def coded_kv_bytes(
    spec: ModelSpec, policy: Policy, micro_batches: int, attended_on_host: int, away: int, *, on_device: bool
) -> dict[Tier, dict[str, int]]:
    """What a compressed cache takes beside its groups, by tier and kind: nothing where it is none.

    Of so many micro-batches: those that the host attends keep their newest tokens there. away: those with a home off
    the device that there is.
    """
    kinds: dict[Tier, dict[str, int]] = {Tier.GPU: {}, Tier.CPU: {}}
    if kv_format(spec, policy) is None:
        return kinds
    counts = {Tier.GPU: micro_batches - attended_on_host, Tier.CPU: attended_on_host}
    for tier, count in counts.items():
        if count:
            kinds[tier]["kv_recent"] = recent_kv_bytes(spec, policy, count)
        if count or (tier is Tier.GPU and on_device):  # the device attends prompts that start, whoever has the rest
            kinds[tier]["kv_scratch"] = kv_scratch_bytes(spec, policy)
    if away:
        kinds[Tier.GPU]["kv_new"] = new_groups_bytes(spec, policy)
    return kinds
