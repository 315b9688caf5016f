"""What each step of a model asks for, and the scheduler of a run: built once for executor and simulator."""

from __future__ import annotations

from flexrun.config import Policy
from flexrun.core import Lane
from flexrun.models.spec import ModelSpec
from flexrun.placement.kv_bits import kv_moved
from flexrun.placement.memory import KV_SLOTS, MemoryAccount, normed_row_bytes, part_tokens
from flexrun.placement.weights import WeightPlacement
from flexrun.schedule import Scheduler
from flexrun.steps import KVBytes, ModelWork


def model_work(spec: ModelSpec, kv: KVBytes | None = None) -> ModelWork:
    """FLOPs and bytes a token of each kind of step. kv: of a cache that is compressed."""

    def flops(part: str, layer: int = 0) -> int:
        return 2 * sum(inputs * outputs for inputs, outputs in spec.linear_shapes(part, layer))

    experts = spec.experts
    return ModelWork(
        attention_inputs_flops_per_token=flops("attention_inputs"),
        attend_flops_per_pair=spec.decode_attention_flops_per_pair,
        attention_output_flops_per_token=flops("attention_output"),
        mlp_flops_per_token=tuple(flops("mlp", layer) for layer in range(spec.num_layers)),
        logits_flops_per_row=flops("head"),
        kv=kv or KVBytes(spec.kv_bytes_per_token, spec.kv_bytes_per_token),
        query_bytes_per_token=spec.query_size * spec.dtype_bytes,
        hidden_bytes_per_token=spec.hidden_size * spec.dtype_bytes,
        embedding_row_bytes=spec.embedding_size * spec.dtype_bytes,
        flops_per_expert_and_token=flops("expert") * experts.experts_per_token / experts.num_experts
        if experts
        else 0.0,
        experts_share_per_token=experts.experts_per_token / experts.num_experts if experts else 1.0,
        lse_bytes_per_token=spec.num_heads * 4,
        normed_bytes_per_token=normed_row_bytes(spec),
        routed_bytes_per_token=spec.hidden_size * 4,
    )


def build_scheduler(
    spec: ModelSpec,
    placement: WeightPlacement,
    account: MemoryAccount,
    *,
    on_device: bool,
    policy: Policy | None = None,
) -> Scheduler:
    """The scheduler of a run; the executor and the simulator build theirs here, so that both see the same steps.

    policy: of which it takes how passes are cut (None: not at all).
    """
    return Scheduler(
        placement.units,
        model_work(spec, None if policy is None else kv_moved(spec, policy)),
        spec.num_layers,
        compute_lane=Lane.GPU if on_device else Lane.CPU,
        host_ring_bytes=account.host_ring_bytes,
        device_ring_bytes=account.device_ring_bytes,
        read_embedding_rows=placement.embedding_on_disk,
        kv_slots=KV_SLOTS,
        host_kv_slots=account.host_kv_slots,
        half_batches=policy is not None and policy.half_batches,
        part_tokens=0 if policy is None else part_tokens(policy),
    )
