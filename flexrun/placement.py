"""Where each weight goes and what a run costs in bytes on each tier: the exact memory account.

The policy speaks in fractions; the executor needs whole tensors. Both the planner and the executor read
this one account, so that a plan's bytes are the run's bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from flexrun.config import Policy
from flexrun.core import PAGE_BYTES, Lane, Tier, align_up
from flexrun.errors import BudgetError
from flexrun.models.rope import rope_table_bytes
from flexrun.models.spec import ModelSpec, PackedTensor
from flexrun.schedule import Scheduler
from flexrun.steps import ModelWork, WeightUnit

SMALL_TENSOR_BYTES = 64 << 10  # norms and biases: never worth a transfer
EXPERT_UNIT_BYTES = 96 << 20  # routed experts that move together: a copy this large runs at the link's full rate
EXPERT_UNITS = 16  # at most so many of them a layer
RING_BYTES = 4 << 30  # rings of models with huge layers need not hold three of them
COMPRESSION_GROUP = 64  # elements that share a 16-bit scale and a 16-bit minimum
LOGITS_ROWS = 128  # rows of logits computed and sampled at once, so that a large vocabulary stays bounded
KV_SLOTS = 2  # device staging slots for host-resident KV


@dataclass(frozen=True)
class PlacedTensor:
    """A packed tensor, its layer (-1: embedding, num_layers: head) and its tier; ``nbytes`` unpadded."""

    tensor: PackedTensor
    layer: int
    tier: Tier
    nbytes: int


@dataclass(frozen=True)
class WeightPlacement:
    tensors: tuple[PlacedTensor, ...]
    units: tuple[WeightUnit, ...]
    embedding_on_disk: bool

    def bytes_on(self, tier: Tier) -> int:
        """Page-aligned bytes of the weights whose home is ``tier``."""
        return sum(align_up(placed.nbytes) for placed in self.tensors if placed.tier is tier)

    @property
    def max_layer_stream_bytes(self) -> tuple[int, int]:
        """Largest (disk, disk + host) bytes that one layer moves in each pass."""
        layers: dict[int, list[int]] = {}
        for unit in self.units:
            if unit.module == "head":
                continue
            sums = layers.setdefault(unit.layer, [0, 0])
            sums[0] += unit.disk_bytes
            sums[1] += unit.disk_bytes + unit.host_bytes
        return max(sums[0] for sums in layers.values()), max(sums[1] for sums in layers.values())

    @property
    def max_unit_stream_bytes(self) -> tuple[int, int]:
        return (
            max(unit.disk_bytes for unit in self.units),
            max(unit.disk_bytes + unit.host_bytes for unit in self.units),
        )


def place_weights(spec: ModelSpec, policy: Policy, *, on_device: bool) -> WeightPlacement:
    """Give every tensor a tier so that each tier holds at most its fraction and all layers stream alike.

    Works like error diffusion: each tensor adds its share to a tier's credit, and a tensor goes to the
    fastest tier whose credit covers it, so the moved bytes spread evenly over the layers. Tensors under
    64 KiB live with the compute device. An untied token embedding is gathered by rows, so it is the
    first to leave RAM and never counts towards the fractions.
    """
    compute_tier = Tier.GPU if on_device else Tier.CPU
    fractions = policy.weights
    if not on_device and fractions.gpu:
        raise BudgetError(
            f"the policy places {fractions.gpu:.0%} of the weights on a GPU, but there is no GPU memory",
            "give --gpu-memory, or a policy with weights.gpu = 0",
        )
    # The slowest tier in use takes what the credit of the faster ones does not cover.
    rest = Tier.DISK if fractions.disk > 1e-9 else (Tier.CPU if fractions.cpu > 1e-9 else Tier.GPU)
    credit = {Tier.GPU: 0.0, Tier.CPU: 0.0}
    placed = []
    for layer, tensor in spec.tensors_by_layer():
        nbytes = stored_bytes(spec, tensor, policy.weight_bits)
        if nbytes < SMALL_TENSOR_BYTES or (tensor.module == "embedding" and tensor.name != "token_embedding.weight"):
            tier = compute_tier
        elif tensor.module == "embedding" and not spec.tie_word_embeddings:
            tier = rest if rest is not Tier.GPU or not on_device else Tier.GPU
        else:
            credit[Tier.GPU] += fractions.gpu * nbytes
            credit[Tier.CPU] += fractions.cpu * nbytes
            tier = rest
            for faster in (Tier.GPU, Tier.CPU):
                if faster is rest or credit[faster] >= nbytes * (1 - 1e-9):
                    tier = faster
                    break
            if tier in credit:
                credit[tier] -= nbytes
        placed.append(PlacedTensor(tensor, layer, tier, nbytes))
    embedding_on_disk = any(item.tier is Tier.DISK for item in placed if item.tensor.name == "token_embedding.weight")
    return WeightPlacement(tuple(placed), _units(spec, placed, on_device), embedding_on_disk)


def stored_bytes(spec: ModelSpec, tensor: PackedTensor, bits: int) -> int:
    """Bytes of a tensor as it is stored: matrices in ``bits`` bits with their group scales, the rest in the dtype."""
    if bits == 16 or len(tensor.shape) < 2 or tensor.module == "embedding":
        return tensor.elements * spec.dtype_bytes
    return compressed_bytes(tensor.elements, bits)


def compressed_bytes(elements: int, bits: int) -> int:
    """Group-wise compression (FlexGen, section 5): ``bits`` an element, a scale and a minimum a group."""
    return elements * bits // 8 + -(-elements // COMPRESSION_GROUP) * 4


def unit_of(spec: ModelSpec, placed: PlacedTensor) -> tuple[int, str] | None:
    """(layer, module) of the unit a tensor moves with; None for an embedding that is gathered by rows.

    A tied token embedding moves with the head, which multiplies by the whole of it.
    """
    if placed.tensor.module == "embedding":
        tied = spec.tie_word_embeddings and placed.tensor.name == "token_embedding.weight"
        return (spec.num_layers, "head") if tied else None
    module = placed.tensor.module
    if module == "experts":
        module = f"experts.{expert_number(placed.tensor) // _experts_a_unit(spec)}"
    return placed.layer, module


def expert_number(tensor: PackedTensor) -> int:
    """Which routed expert a tensor of module ``experts`` belongs to (``expert.7.down.weight`` -> 7)."""
    return int(tensor.name.split(".", 2)[1])


def _experts_a_unit(spec: ModelSpec) -> int:
    one = sum(inputs * outputs for inputs, outputs in spec.linear_shapes("expert")) * spec.dtype_bytes
    return max(EXPERT_UNIT_BYTES // one, -(-spec.experts.num_experts // EXPERT_UNITS))


def _units(spec: ModelSpec, tensors: list[PlacedTensor], on_device: bool) -> tuple[WeightUnit, ...]:
    moved: dict[tuple[int, str], dict[Tier, int]] = {}
    experts: dict[tuple[int, str], set[int]] = {}
    for placed in tensors:
        key = unit_of(spec, placed)
        if key is None:
            continue
        sums = moved.setdefault(key, {Tier.DISK: 0, Tier.CPU: 0, Tier.GPU: 0})
        sums[placed.tier] += align_up(placed.nbytes)
        if placed.tensor.module == "experts":
            experts.setdefault(key, set()).add(expert_number(placed.tensor))
    head = (spec.num_layers, "head")  # a tied one was met with the embedding
    sums = moved.pop(head, {Tier.DISK: 0, Tier.CPU: 0, Tier.GPU: 0})
    return tuple(
        WeightUnit(
            index,
            layer,
            module,
            sums[Tier.DISK],
            sums[Tier.CPU] if on_device else 0,
            len(experts.get((layer, module), ())),
        )
        for index, ((layer, module), sums) in enumerate([*moved.items(), (head, sums)])
    )


def model_work(spec: ModelSpec) -> ModelWork:
    """FLOPs and bytes a token of each kind of step."""

    def flops(part: str, layer: int = 0) -> int:
        return 2 * sum(inputs * outputs for inputs, outputs in spec.linear_shapes(part, layer))

    experts = spec.experts
    return ModelWork(
        attention_inputs_flops_per_token=flops("attention_inputs"),
        attend_flops_per_pair=spec.decode_attention_flops_per_pair,
        attention_output_flops_per_token=flops("attention_output"),
        mlp_flops_per_token=tuple(flops("mlp", layer) for layer in range(spec.num_layers)),
        logits_flops_per_row=flops("head"),
        kv_bytes_per_token=spec.kv_bytes_per_token,
        query_bytes_per_token=spec.query_size * spec.dtype_bytes,
        hidden_bytes_per_token=spec.hidden_size * spec.dtype_bytes,
        embedding_row_bytes=spec.embedding_size * spec.dtype_bytes,
        flops_per_expert_and_token=flops("expert") * experts.experts_per_token / experts.num_experts
        if experts
        else 0.0,
    )


def build_scheduler(
    spec: ModelSpec, placement: WeightPlacement, account: MemoryAccount, *, on_device: bool
) -> Scheduler:
    """The scheduler of a run; the executor and the simulator build theirs here, so that both see the same steps."""
    return Scheduler(
        placement.units,
        model_work(spec),
        spec.num_layers,
        compute_lane=Lane.GPU if on_device else Lane.CPU,
        host_ring_bytes=account.host_ring_bytes,
        device_ring_bytes=account.device_ring_bytes,
        read_embedding_rows=placement.embedding_on_disk,
        kv_slots=KV_SLOTS,
    )


@dataclass(frozen=True)
class KVMicroBatch:
    """Home tier of one attention micro-batch's KV, its room in tokens, and the lane that attends it."""

    home: Tier
    capacity_tokens: int
    attend_lane: Lane


def kv_micro_batches(policy: Policy, kv_tokens: int, *, on_device: bool) -> tuple[KVMicroBatch, ...]:
    """The policy's KV fractions as whole micro-batches of equal room, GPU-resident ones first."""
    count = max(-(-policy.sequences_in_flight // policy.attention_micro_batch), 1)
    capacity_tokens = -(-kv_tokens // count)
    on_gpu = int(count * policy.kv.gpu + 1e-9) if on_device else 0
    on_disk = min(math.ceil(count * policy.kv.disk - 1e-9), count - on_gpu)
    on_host = count - on_gpu - on_disk

    def homes(tier: Tier, number: int) -> tuple[KVMicroBatch, ...]:
        on_cpu_lane = round(number * policy.cpu_attention_share) if on_device else number
        lanes = (Lane.CPU,) * on_cpu_lane + (Lane.GPU,) * (number - on_cpu_lane)
        return tuple(KVMicroBatch(tier, capacity_tokens, lane) for lane in lanes)

    on_device_ones = (KVMicroBatch(Tier.GPU, capacity_tokens, Lane.GPU),) * on_gpu
    return on_device_ones + homes(Tier.CPU, on_host) + homes(Tier.DISK, on_disk)


def rotary_positions(micro_batches: tuple[KVMicroBatch, ...]) -> int:
    """Positions a run needs rotary tables for: the longest sequence that the cache can hold, and its last token."""
    return max(micro_batch.capacity_tokens for micro_batch in micro_batches) + 1


@dataclass(frozen=True)
class MemoryAccount:
    """Bytes a run holds on each tier, by kind; ``total(tier)`` is what the tier's budget must cover."""

    bytes_by_kind: dict[Tier, dict[str, int]] = field(default_factory=dict)
    host_ring_bytes: int = 0
    device_ring_bytes: int = 0
    wanted_ring_bytes: tuple[int, int] = (0, 0)  # (host, device) with room to spare

    def total(self, tier: Tier) -> int:
        return sum(self.bytes_by_kind.get(tier, {}).values())


def pass_row_bytes(spec: ModelSpec) -> int:
    """Activations of one token row that live through a pass: hidden state, branch, query, key, value, rotary rows."""
    return (2 * spec.hidden_size + spec.qkv_size + spec.attended_size) * spec.dtype_bytes + spec.head_dim * 4 * 2


def _widest_inner_size(spec: ModelSpec) -> int:
    experts = spec.experts
    return max(
        spec.intermediate_size, *((experts.intermediate_size, experts.shared_intermediate_size) if experts else (0,))
    )


def workspace_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Activations of the largest pass: rows that live through it, plus the widest micro-batch inside a module."""
    rows = min(policy.token_micro_batch, policy.tokens_per_pass)
    inside = rows * (2 * spec.hidden_size + max(spec.qkv_size, 3 * _widest_inner_size(spec))) * spec.dtype_bytes
    logits_rows = min(LOGITS_ROWS, policy.sequences_in_flight)
    logits = logits_rows * (spec.vocab_size * 3 * 4 + spec.hidden_size * spec.dtype_bytes)
    through_pass = (policy.tokens_per_pass - hidden_rows_elsewhere(policy)) * pass_row_bytes(spec)
    return align_up(through_pass + max(inside, logits))


def hidden_rows_elsewhere(policy: Policy) -> int:
    """Rows of a full pass that wait off the compute device, two micro-batches of them being worked on excepted."""
    at_work = 2 * min(policy.token_micro_batch, policy.tokens_per_pass)
    return int((1.0 - policy.hidden.gpu) * max(policy.tokens_per_pass - at_work, 0))


def offloaded_query_bytes(spec: ModelSpec, policy: Policy) -> int:
    """Host rows of q, k, v and attention output for micro-batches that the CPU attends beside a device."""
    width = spec.qkv_size + spec.attended_size
    return align_up(policy.tokens_per_pass * width * spec.dtype_bytes)


def kv_bytes_per_token(spec: ModelSpec, bits: int = 16) -> int:
    """All layers, keys and values."""
    if bits == 16:
        return spec.num_layers * spec.kv_bytes_per_token
    return spec.num_layers * compressed_bytes(spec.kv_elements_per_token, bits)


def ring_bytes(placement: WeightPlacement, spare: tuple[int | None, int | None] = (None, None)) -> tuple[int, int]:
    """(host, device) bytes of the streaming rings: two layers read ahead of the one in use, where ``spare`` allows.

    At least the largest unit must fit; ``spare`` is what each tier has left for its ring (None: plenty).
    """
    rings = []
    for layer_bytes, unit_bytes, room in zip(placement.max_layer_stream_bytes, placement.max_unit_stream_bytes, spare):
        wanted = max(min(3 * layer_bytes, max(8 * unit_bytes, RING_BYTES)), unit_bytes)
        rings.append(max(min(wanted, wanted if room is None else room // PAGE_BYTES * PAGE_BYTES), unit_bytes))
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
) -> MemoryAccount:
    """What a run with ``kv_tokens`` tokens of KV room holds on each tier.

    Rings take two layers where the budgets allow, less where they do not. The interpreter and its
    libraries (about 0.3 GiB) are outside the account.
    """
    micro_batches = kv_micro_batches(policy, kv_tokens, on_device=on_device)
    token_bytes = kv_bytes_per_token(spec, policy.kv_bits)
    kv = dict.fromkeys(Tier, 0)
    for micro_batch in micro_batches:
        kv[micro_batch.home] += align_up(micro_batch.capacity_tokens * token_bytes)
    kinds = {tier: {"weights": placement.bytes_on(tier), "kv": kv[tier]} for tier in (Tier.GPU, Tier.CPU)}
    kinds[Tier.DISK] = {"weights": sum(align_up(placed.nbytes) for placed in placement.tensors), "kv": kv[Tier.DISK]}
    kinds[Tier.GPU if on_device else Tier.CPU]["workspace"] = workspace_bytes(spec, policy)
    if rows := hidden_rows_elsewhere(policy):
        tier = Tier.DISK if policy.hidden.disk > policy.hidden.cpu else Tier.CPU
        kinds[tier]["hidden"] = align_up(rows * pass_row_bytes(spec))
    kinds[Tier.CPU]["rotary"] = align_up(rope_table_bytes(spec, rotary_positions(micro_batches)))
    if placement.embedding_on_disk:
        row_bytes = spec.embedding_size * spec.dtype_bytes
        kinds[Tier.CPU]["embedding_rows"] = align_up(policy.tokens_per_pass * row_bytes)
    slot_bytes = align_up(micro_batches[0].capacity_tokens * token_bytes // spec.num_layers)
    if kv[Tier.DISK]:
        kinds[Tier.CPU]["kv_staging"] = KV_SLOTS * slot_bytes
    if on_device:
        lanes = {micro_batch.attend_lane for micro_batch in micro_batches if micro_batch.home is not Tier.GPU}
        if Lane.GPU in lanes:
            kinds[Tier.GPU]["kv_staging"] = KV_SLOTS * slot_bytes
        if Lane.CPU in lanes:
            kinds[Tier.CPU]["offloaded_query"] = offloaded_query_bytes(spec, policy)
    used = {tier: sum(parts.values()) for tier, parts in kinds.items()}
    spare = tuple(
        None if budget is None else max(budget - used[tier], 0)
        for tier, budget in ((Tier.CPU, cpu_budget_bytes), (Tier.GPU, gpu_budget_bytes))
    )
    host_ring, device_ring = ring_bytes(placement, spare)
    device_ring = device_ring if on_device else 0
    kinds[Tier.CPU]["ring"], kinds[Tier.GPU]["ring"] = host_ring, device_ring
    return MemoryAccount(kinds, host_ring, device_ring, ring_bytes(placement))
