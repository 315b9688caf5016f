"""The exact memory account: what a run holds on each tier, by kind, in bytes.

Both the planner and the executor read it, so that a plan's bytes are the run's bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

from flexrun.attention import LATENT_BUFFERS, LATENT_BYTES
from flexrun.compress import DEQUANTISE_BYTES
from flexrun.config import Policy
from flexrun.core import PAGE_BYTES, Lane, Tier, align_up
from flexrun.models.rope import rope_table_bytes
from flexrun.models.spec import ModelSpec
from flexrun.placement.dense_slot import dense_slot_bytes
from flexrun.placement.kv_bits import coded_kv_bytes, kv_room, kv_token_bytes
from flexrun.placement.weights import WeightPlacement, compressed_bytes

RING_BYTES = 4 << 30  # rings of models with huge layers need not hold three of them
LOGITS_ROWS = 128  # rows of logits computed and sampled at once, so that a large vocabulary stays bounded
FEWEST_LOGITS_ROWS = 16  # room for them where few sequences are in flight: scored prompts take many
SHARE_PARTS = 1 << 16  # shares of tokens are taken in whole parts, exactly
CPU_EXPERT_ROWS = 256  # of one call of an expert on a CPU: its inner rows, the widest there are, stay in the cache
KV_SLOTS = 2  # staging slots on the device for KV that comes there to be attended
HOST_KV_SLOTS = 4  # on the host for KV from disk, at least: one is read, one attended, two wait for their rows' write
MOST_HOST_KV_SLOTS = 16
KV_IN_FLIGHT_BYTES = 64 << 20  # in those slots: a disk with its queue full takes 20 ms to answer
KV_BLOCK_BYTES = 16 << 10  # at most: a disk takes as long for less, and RAM holds so much of every sequence and layer
KV_BLOCK_TOKENS = 16  # enough


@dataclass(frozen=True)
class KVMicroBatch:
    """Home tier of one attention micro-batch's KV, its room in tokens, and the lane that attends it.

    device_share: of each sequence's room, the share that lives on the device though its home is the host.
    shared: not of sequences but of prefixes that they share.
    """

    home: Tier
    capacity_tokens: int
    attend_lane: Lane
    device_share: float = 0.0
    shared: bool = False

    def device_tokens(self, tokens):
        """How many of the first ``tokens`` tokens of its room (a number or an int64 array) are room on the device.

        Both this and the rest grow with ``tokens`` by 0 or 1 at a time: a contiguous run of the room is one on the
        device and one on the host, and runs that do not overlap do so nowhere.
        """
        return tokens * round(self.device_share * SHARE_PARTS) // SHARE_PARTS

    def split(self, start, capacity):
        """(first token on the host, first token on the device, border) of the run ``[start, start + capacity)``.

        The sequence's tokens below the border, the oldest, live on the host, those from it on on the device.
        """
        device_start = self.device_tokens(start)
        return start - device_start, device_start, capacity - (self.device_tokens(start + capacity) - device_start)


def kv_micro_batches(
    policy: Policy, kv_tokens: int, *, on_device: bool, prefix_tokens: int = 0
) -> tuple[KVMicroBatch, ...]:
    """The policy's KV fractions as whole micro-batches of equal room, GPU-resident ones first.

    Where prefixes are shared, before all others the one that these have to themselves, ``prefix_tokens`` of room in the
    memory of the compute lane: their rows come first in a pass, and the rows of all others attend them there.

    For two half-batches, each half has its share of every kind: all GPU-resident ones first would leave the CPU nothing
    to attend in one of them.
    """
    count = max(-(-policy.sequences_in_flight // policy.attention_micro_batch), 1)
    capacity_tokens = kv_room(policy, -(-kv_tokens // count))
    on_gpu = int(count * policy.kv.gpu + 1e-9) if on_device else 0
    on_disk = min(math.ceil(count * policy.kv.disk - 1e-9), count - on_gpu)
    on_host = count - on_gpu - on_disk

    def homes(tier: Tier, number: int) -> tuple[KVMicroBatch, ...]:
        on_cpu_lane = round(number * policy.cpu_attention_share) if on_device else number
        lanes = (Lane.CPU,) * on_cpu_lane + (Lane.GPU,) * (number - on_cpu_lane)
        shares = {Lane.CPU: policy.kv_device_tokens_share if on_device and tier is Tier.CPU else 0.0}
        return tuple(KVMicroBatch(tier, capacity_tokens, lane, shares.get(lane, 0.0)) for lane in lanes)

    on_device_ones = (KVMicroBatch(Tier.GPU, capacity_tokens, Lane.GPU),) * on_gpu
    places = on_device_ones + homes(Tier.CPU, on_host) + homes(Tier.DISK, on_disk)
    places = places[0::2] + places[1::2] if policy.half_batches and on_device else places
    if not prefix_tokens:
        return places
    home, lane = (Tier.GPU, Lane.GPU) if on_device else (Tier.CPU, Lane.CPU)
    return KVMicroBatch(home, prefix_tokens, lane, shared=True), *places


def attended_on_host(micro_batch: KVMicroBatch) -> bool:
    """Whether the CPU attends it, by itself or beside a device."""
    return micro_batch.home is not Tier.GPU and micro_batch.attend_lane is Lane.CPU


def coded_kv_of(
    spec: ModelSpec, policy: Policy, micro_batches: tuple[KVMicroBatch, ...], *, on_device: bool
) -> dict[Tier, dict[str, int]]:
    """See coded_kv_bytes. What sequences share is not compressed."""
    micro_batches = tuple(micro_batch for micro_batch in micro_batches if not micro_batch.shared)
    on_host = sum(map(attended_on_host, micro_batches))
    away = on_device * sum(micro_batch.home is not Tier.GPU for micro_batch in micro_batches)
    return coded_kv_bytes(spec, policy, len(micro_batches), on_host, away, on_device=on_device)


def micro_batch_sequences(policy: Policy) -> int:
    """Most sequences of one attention micro-batch."""
    return min(policy.attention_micro_batch, policy.sequences_in_flight)


def rotary_positions(micro_batches: tuple[KVMicroBatch, ...]) -> int:
    """Positions a run needs rotary tables for: the longest sequence that the cache can hold, behind
    the longest prefix, and its last token."""
    before = sum(micro_batch.capacity_tokens for micro_batch in micro_batches if micro_batch.shared)
    return before + max(micro_batch.capacity_tokens for micro_batch in micro_batches if not micro_batch.shared) + 1


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes a run holds on each tier, by kind; ``total(tier)`` is what the tier's budget must cover."""

    bytes_by_kind: dict[Tier, dict[str, int]] = field(default_factory=dict)
    host_ring_bytes: int = 0
    device_ring_bytes: int = 0
    host_kv_slots: int = HOST_KV_SLOTS
    wanted_ring_bytes: tuple[int, int] = (0, 0)  # (host, device) with room to spare

    def total(self, tier: Tier) -> int:
        return sum(self.bytes_by_kind.get(tier, {}).values())


def pass_row_bytes(spec: ModelSpec) -> int:
    """Activations of one token row that live through a pass: hidden state, branch, query, key, value, rotary rows."""
    return device_row_bytes(spec) + spec.head_dim * 4 * 2


def device_row_bytes(spec: ModelSpec) -> int:
    """The same without the rotary rows, which are there for all rows of a pass wherever its hidden states wait."""
    return (2 * spec.hidden_size + spec.qkv_size + spec.attended_size) * spec.dtype_bytes


def expert_batch_rows(policy: Policy) -> int:
    """Rows of the largest call of a routed expert."""
    return min(policy.expert_batch or policy.tokens_per_pass, policy.tokens_per_pass)


def routed_row_bytes(spec: ModelSpec) -> int:
    """Bytes of one token row between a router and the last expert: what they work on, their sum in float32, the logits,
    and experts, weights and rows of each choice, as chosen and as sorted."""
    if spec.experts is None:
        return 0
    choices = spec.experts.experts_per_token * 5 * 8
    return spec.hidden_size * (spec.dtype_bytes + 4) + spec.experts.num_experts * 4 + choices


def expert_buffer_bytes(spec: ModelSpec, rows: int) -> int:
    """Inputs and inner activations of an expert with so many rows, its two products (packed matrices put them in
    memory of their own, beside the buffers) and the results in float32."""
    if spec.experts is None:
        return 0
    wide = 2 * spec.experts.intermediate_size + spec.hidden_size
    kept = spec.hidden_size + spec.experts.intermediate_size
    return rows * ((kept + 2 * wide) * spec.dtype_bytes + 4 * spec.hidden_size)


def cpu_expert_rows(policy: Policy) -> int:
    """Rows of the largest call of an expert that the CPU runs beside a device."""
    return min(expert_batch_rows(policy), CPU_EXPERT_ROWS)


def normed_row_bytes(spec: ModelSpec) -> int:
    """Bytes of one token row on its way to experts on the CPU: what they work on, and its choices' rows and weights."""
    return spec.hidden_size * spec.dtype_bytes + spec.experts.experts_per_token * (8 + 4) if spec.experts else 0


class CPUExpertsBytes(NamedTuple):
    """What only experts on the CPU beside a device need. rows: on the host, what goes down and, in float32, what they
    make of it. working: there as well. returned: on the device, where that comes back to."""

    rows: int
    working: int
    returned: int


def cpu_experts_bytes(spec: ModelSpec, policy: Policy) -> CPUExpertsBytes:
    returned = policy.tokens_per_pass * spec.hidden_size * 4
    working = expert_buffer_bytes(spec, cpu_expert_rows(policy)) + _brought_back_bytes(policy)
    rows = policy.tokens_per_pass * normed_row_bytes(spec) + returned
    return CPUExpertsBytes(align_up(rows), align_up(working), align_up(returned))


def workspace_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Activations of the largest pass: rows that live through it, plus the widest micro-batch inside a module."""
    rows = min(policy.token_micro_batch, policy.tokens_per_pass)
    widest = max(spec.intermediate_size, spec.experts.shared_intermediate_size if spec.experts else 0)
    inside = rows * (2 * spec.hidden_size + max(spec.qkv_size, 3 * widest)) * spec.dtype_bytes
    logits = logits_block_rows(policy) * (spec.vocab_size * 3 * 4 + spec.hidden_size * spec.dtype_bytes)
    elsewhere = hidden_rows_elsewhere(policy)
    through_pass = policy.tokens_per_pass * pass_row_bytes(spec) - elsewhere * device_row_bytes(spec)
    if elsewhere:  # rows that are sampled wait for the head
        through_pass += policy.sequences_in_flight * spec.hidden_size * spec.dtype_bytes
    latent = LATENT_BUFFERS * LATENT_BYTES if spec.latent else 0
    routed = policy.tokens_per_pass * routed_row_bytes(spec) + expert_buffer_bytes(spec, expert_batch_rows(policy))
    return align_up(through_pass + latent + max(inside, logits) + routed + _brought_back_bytes(policy))


def _brought_back_bytes(policy: Policy) -> int:
    return DEQUANTISE_BYTES if policy.weight_bits < 16 or policy.keep else 0


def logits_block_rows(policy: Policy) -> int:
    """Rows that the head takes at once: all that are sampled, and more where prompts are scored."""
    return min(LOGITS_ROWS, max(policy.sequences_in_flight, FEWEST_LOGITS_ROWS), policy.tokens_per_pass)


def hidden_rows_elsewhere(policy: Policy) -> int:
    """Rows of a full pass that the compute device has no room for; there is some for two token micro-batches at least.

    A pass of more rows than fit comes and goes in parts, so that all its hidden states pass through the host.
    """
    at_work = 2 * min(policy.token_micro_batch, policy.tokens_per_pass)
    elsewhere = int((1.0 - policy.hidden.gpu) * max(policy.tokens_per_pass - at_work, 0))
    return elsewhere + (policy.tokens_per_pass - elsewhere) % 2 if elsewhere else 0  # two places of equal size


def part_tokens(policy: Policy) -> int:
    """Rows of the largest part, and of the largest micro-batch, of a pass under a policy whose hidden states may wait
    off the compute device; 0 where every pass fits it."""
    elsewhere = hidden_rows_elsewhere(policy)
    return (policy.tokens_per_pass - elsewhere) // 2 if elsewhere else 0


def waiting_hidden_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Host rows of hidden states of a pass in parts."""
    return align_up(policy.tokens_per_pass * spec.hidden_size * spec.dtype_bytes) if part_tokens(policy) else 0


def offloaded_query_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Host rows of q, k, v and attention output for micro-batches that the CPU attends beside a device."""
    width = spec.qkv_size + spec.attended_size
    return align_up(policy.tokens_per_pass * width * spec.dtype_bytes)


def merge_bytes(spec: ModelSpec, policy: Policy) -> tuple[int, int]:
    """(host, device) bytes of rows that only KV split by token needs: log-sum-exps of both parts, what the host found
    beside what the device did, and new rows on their way to the host apart from those that stay."""
    lse = spec.num_heads * 4
    on_device = spec.attended_size * spec.dtype_bytes + 2 * lse + spec.kv_bytes_per_token
    there = policy.tokens_per_pass - hidden_rows_elsewhere(policy)
    return align_up(policy.tokens_per_pass * lse), align_up(there * on_device)


def prefix_row_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Rows that only shared prefixes need: what is found in a prefix, and the log-sum-exps of either side."""
    a_row = spec.attended_size * spec.dtype_bytes + 2 * 4 * spec.num_heads
    return align_up(policy.tokens_per_pass * a_row)


def kv_bytes_per_token(spec: ModelSpec, bits: int = 16) -> int:
    """All layers, keys and values; with fewer bits in groups of 64 elements, as FlexGen has them."""
    if bits == 16:
        return spec.num_layers * spec.kv_bytes_per_token
    return spec.num_layers * compressed_bytes(spec.kv_elements_per_token, bits)


def kv_block_bytes(spec: ModelSpec) -> int:
    """What is written at once, at least, of KV that lives on disk, a power of two of pages: the last rows of each
    sequence wait in RAM until they fill it."""
    wanted = min(KV_BLOCK_TOKENS * spec.kv_bytes_per_token, KV_BLOCK_BYTES)
    return PAGE_BYTES << max(-(-wanted // PAGE_BYTES) - 1, 0).bit_length()


def host_kv_slots(slot_bytes: int, slabs: int) -> int:
    """Staging slots of the host for ``slabs`` slabs on disk of at most ``slot_bytes``: more where they are small, but
    not for more than a quarter of what is on disk."""
    return max(min(KV_IN_FLIGHT_BYTES // max(slot_bytes, 1), MOST_HOST_KV_SLOTS, slabs // 4), HOST_KV_SLOTS)


def least_ring_bytes(placement: WeightPlacement, *, in_parts: bool = False) -> tuple[int, int]:
    """(host, device) bytes that the streaming rings must have.

    The largest unit must fit. Where passes run in parts, a layer's weights stay on the device until the last part has
    used them; the largest unit more, for what is left unused at the end of a ring.
    """
    host, device = placement.max_unit_stream_bytes
    layer = placement.max_layer_stream_bytes[1]
    return host, layer + device if in_parts and layer else device


def ring_bytes(
    placement: WeightPlacement, spare: tuple[int | None, int | None] = (None, None), *, in_parts: bool = False
) -> tuple[int, int]:
    """(host, device) bytes of the streaming rings: two layers read ahead of the one in use, where ``spare`` allows.

    ``spare`` is what each tier has left for its ring (None: plenty).
    """
    rings = []
    for layer_bytes, unit_bytes, least, room in zip(
        placement.max_layer_stream_bytes,
        placement.max_unit_stream_bytes,
        least_ring_bytes(placement, in_parts=in_parts),
        spare,
    ):
        wanted = max(min(3 * layer_bytes, max(8 * unit_bytes, RING_BYTES)), least)
        rings.append(max(min(wanted, wanted if room is None else room // PAGE_BYTES * PAGE_BYTES), least))
    return rings[0], rings[1]


def memory_account(
    spec: ModelSpec,
    policy: Policy,
    placement: WeightPlacement,
    kv_tokens: int,
    *,
    on_device: bool,
    gpu_budget_bytes: int | None = None,
    cpu_budget_bytes: int | None = None,
    prefix_tokens: int = 0,
) -> MemoryAccount:
    """What a run with ``kv_tokens`` tokens of KV room, and ``prefix_tokens`` for shared prefixes, holds on each tier.

    Rings take two layers where the budgets allow, less where they do not. The interpreter and its
    libraries (about 0.3 GiB) are outside the account.
    """
    micro_batches = kv_micro_batches(policy, kv_tokens, on_device=on_device, prefix_tokens=prefix_tokens)
    token_bytes = spec.num_layers * kv_token_bytes(spec, policy)
    kv = dict.fromkeys(Tier, 0)
    slot_bytes = align_up(micro_batches[-1].capacity_tokens * token_bytes // spec.num_layers)
    for micro_batch in micro_batches:
        if micro_batch.home is Tier.DISK:  # every layer's slab begins on a page
            kv[Tier.DISK] += spec.num_layers * slot_bytes
        else:
            there = micro_batch.device_tokens(micro_batch.capacity_tokens)
            a_token = spec.num_layers * spec.kv_bytes_per_token if micro_batch.shared else token_bytes
            kv[micro_batch.home] += align_up((micro_batch.capacity_tokens - there) * a_token)
            kv[Tier.GPU] += align_up(there * token_bytes)
    slabs = spec.num_layers * sum(micro_batch.home is Tier.DISK for micro_batch in micro_batches)
    slots = host_kv_slots(slot_bytes, slabs)
    kinds = {tier: {"weights": placement.bytes_on(tier), "kv": kv[tier]} for tier in (Tier.GPU, Tier.CPU)}
    kinds[Tier.DISK] = {"weights": placement.stored_bytes, "kv": kv[Tier.DISK]}
    kinds[Tier.GPU if on_device else Tier.CPU]["workspace"] = workspace_bytes(spec, policy)
    if prefix_tokens:
        kinds[Tier.GPU if on_device else Tier.CPU]["prefix_rows"] = prefix_row_bytes(spec, policy)
    in_parts = bool(part_tokens(policy))
    if in_parts:
        tier = Tier.DISK if policy.hidden.disk > policy.hidden.cpu else Tier.CPU
        kinds[tier]["hidden"] = waiting_hidden_bytes(spec, policy)
    kinds[Tier.CPU]["rotary"] = align_up(rope_table_bytes(spec, rotary_positions(micro_batches)))
    if placement.embedding_on_disk:
        row_bytes = spec.embedding_size * spec.dtype_bytes
        kinds[Tier.CPU]["embedding_rows"] = align_up(policy.tokens_per_pass * row_bytes)
    for tier, parts in coded_kv_of(spec, policy, micro_batches, on_device=on_device).items():
        kinds[tier] |= parts
    if kv[Tier.DISK]:
        kinds[Tier.CPU]["kv_staging"] = slots * slot_bytes
        kinds[Tier.CPU]["kv_tails"] = slabs * micro_batch_sequences(policy) * kv_block_bytes(spec)
    if on_device:
        if slot := dense_slot_bytes(spec, policy):
            kinds[Tier.GPU]["dense_weights"] = slot
        lanes = {micro_batch.attend_lane for micro_batch in micro_batches if micro_batch.home is not Tier.GPU}
        if Lane.GPU in lanes:
            kinds[Tier.GPU]["kv_staging"] = KV_SLOTS * slot_bytes
        if Lane.CPU in lanes:
            kinds[Tier.CPU]["offloaded_query"] = offloaded_query_bytes(spec, policy)
            if prefix_tokens:
                kinds[Tier.CPU]["prefix_rows"] = merge_bytes(spec, policy)[0]
        if any(micro_batch.device_share for micro_batch in micro_batches):
            kinds[Tier.CPU]["kv_merge"], kinds[Tier.GPU]["kv_merge"] = merge_bytes(spec, policy)
        if placement.cpu_experts:
            sizes = cpu_experts_bytes(spec, policy)
            kinds[Tier.CPU]["cpu_experts"] = sizes.rows + sizes.working
            kinds[Tier.GPU]["cpu_experts"] = sizes.returned
    used = {tier: sum(parts.values()) for tier, parts in kinds.items()}
    spare = tuple(
        None if budget is None else max(budget - used[tier], 0)
        for tier, budget in ((Tier.CPU, cpu_budget_bytes), (Tier.GPU, gpu_budget_bytes))
    )
    host_ring, device_ring = ring_bytes(placement, spare, in_parts=in_parts)
    device_ring = device_ring if on_device else 0
    kinds[Tier.CPU]["ring"], kinds[Tier.GPU]["ring"] = host_ring, device_ring
    return MemoryAccount(kinds, host_ring, device_ring, slots, ring_bytes(placement, in_parts=in_parts))
