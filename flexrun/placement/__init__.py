"""A policy in whole tensors, micro-batches and bytes: read by the planner and the executor alike."""

from flexrun.placement.memory import (
    HOST_KV_SLOTS,
    KV_SLOTS,
    LOGITS_ROWS,
    KVMicroBatch,
    MemoryAccount,
    expert_batch_rows,
    expert_buffer_bytes,
    kv_bytes_per_token,
    kv_micro_batches,
    memory_account,
    offloaded_query_bytes,
    pass_row_bytes,
    ring_bytes,
    rotary_positions,
    workspace_bytes,
)
from flexrun.placement.weights import (
    PlacedTensor,
    WeightPlacement,
    compressed_bytes,
    expert_number,
    place_weights,
    unit_of,
)
from flexrun.placement.work import build_scheduler, model_work

__all__ = [
    "HOST_KV_SLOTS",
    "KV_SLOTS",
    "LOGITS_ROWS",
    "KVMicroBatch",
    "MemoryAccount",
    "PlacedTensor",
    "WeightPlacement",
    "build_scheduler",
    "compressed_bytes",
    "expert_batch_rows",
    "expert_buffer_bytes",
    "expert_number",
    "kv_bytes_per_token",
    "kv_micro_batches",
    "memory_account",
    "model_work",
    "offloaded_query_bytes",
    "pass_row_bytes",
    "place_weights",
    "ring_bytes",
    "rotary_positions",
    "unit_of",
    "workspace_bytes",
]
