"""Room on a device for the compressed matrices of one step, made dense once for all calls that its rows take."""

from __future__ import annotations

from functools import lru_cache

from flexrun.compress import WeightBits
from flexrun.config import Policy
from flexrun.core import align_up
from flexrun.models.spec import ModelSpec
from flexrun.placement.weights import weight_bits_of
from flexrun.steps import StepKind


def dense_slot_bytes(spec: ModelSpec, policy: Policy) -> int:
    """For the largest step; 0 where a step is one call, which brings back a part of a matrix at a time."""
    if policy.tokens_per_pass <= policy.token_micro_batch:
        return 0
    return _largest_step_bytes(spec, weight_bits_of(policy))


def is_multiplied(kind: StepKind, name: str) -> bool:
    """Whether a step of that kind multiplies by the matrix ``name`` of its unit."""
    return kind is StepKind.MLP or (kind is StepKind.ATTENTION_OUTPUT) == (name == "output.weight")


@lru_cache(maxsize=64)
def _largest_step_bytes(spec: ModelSpec, bits: WeightBits) -> int:
    sizes: dict[tuple, int] = {}
    for layer, tensor in spec.tensors_by_layer():
        if tensor.module in ("attention", "mlp") and bits.of(layer, tensor) is not None:
            key = layer, tensor.module, tensor.module == "attention" and tensor.name == "output.weight"
            sizes[key] = sizes.get(key, 0) + align_up(tensor.elements * spec.dtype_bytes)
    return max(sizes.values(), default=0)
