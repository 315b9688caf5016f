"""What compressed matrices weigh in each part of a layer: patterns may give every layer other bits."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from flexrun.compress import GroupFormat, WeightBits
from flexrun.models.spec import ModelSpec, PackedTensor
from flexrun.placement import stored_bytes


@lru_cache(maxsize=256)
def compressed_part(spec: ModelSpec, bits: WeightBits, part: str, layer: int) -> tuple[float, float] | None:
    """(bytes of all matrices, elements of the compressed ones) of a part (see ModelSpec.linear_shapes), or None where
    none is compressed; averaged over the layers that are sparse, or dense, like ``layer``."""
    layers, nbytes, elements = set(), 0, 0
    for number, tensor, form in _matrices(spec, bits, part, layer):
        layers.add(number)
        nbytes += stored_bytes(spec, tensor, form)
        elements += tensor.elements if form else 0
    return (nbytes / len(layers), elements / len(layers)) if elements else None


def _matrices(
    spec: ModelSpec, bits: WeightBits, part: str, layer: int
) -> Iterator[tuple[int, PackedTensor, GroupFormat | None]]:
    if part == "head":
        tensors = [(spec.num_layers, tensor) for tensor in spec.head_tensors()]
        if spec.tie_word_embeddings:
            tensors += [(spec.num_layers, tensor) for tensor in spec.embedding_tensors()[:1]]
    else:
        everywhere = part.startswith("attention")
        alike = [n for n in range(spec.num_layers) if everywhere or spec.is_sparse(n) == spec.is_sparse(layer)]
        if part == "expert":
            alike = [number for number in alike if spec.is_sparse(number)]
        tensors = [(number, tensor) for number in alike for tensor in spec.layer_tensors(number)]
        tensors = [(number, tensor) for number, tensor in tensors if _part_of(tensor) == part]
    for number, tensor in tensors:
        if len(tensor.shape) == 2:
            yield number, tensor, bits.of(number, tensor)


def _part_of(tensor: PackedTensor) -> str | None:
    if tensor.module == "attention":
        absorbed = tensor.name == "kv_b.weight"  # its products are counted beside the projections
        return None if absorbed else "attention_output" if tensor.name == "output.weight" else "attention_inputs"
    if tensor.module == "experts":
        return "expert" if tensor.name.startswith("expert.0.") else None
    return tensor.module
