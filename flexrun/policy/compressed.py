"""What compressed matrices weigh in each part of a layer, and what products with them take: patterns may give every
layer other bits."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from flexrun.compress import GroupFormat, WeightBits
from flexrun.hardware import CompressedRates, Hardware, LinearWork, Rates
from flexrun.models.spec import ModelSpec, PackedTensor
from flexrun.placement import stored_bytes
from flexrun.policy.features import Features
from flexrun.policy.layout import Budgets


def priced(features: Features, spec: ModelSpec, hardware: Hardware, budgets: Budgets) -> Features:
    """Without the bits of weights that the machine's profile has no rates for, and those of latent KV; 16 are always
    there."""
    device = hardware.gpu if budgets.on_device and hardware.gpu else hardware.cpu
    straight = device.rates_of(spec.dtype).compressed if device is hardware.cpu else {}
    every = device.dequantise_bytes_per_second > 0
    known = {16, *(bits for bits in (4, 8) if every or str(bits) in straight)}
    kv_bits = features.kv_bits if spec.latent is None else (16,)
    weight_bits = tuple(bits for bits in features.weight_bits if bits in known)
    return dataclasses.replace(features, weight_bits=weight_bits, kv_bits=kv_bits)


class Compressed(NamedTuple):
    """Matrices of a part of a layer, together: ``bits`` an element (16: in the dtype), with their factors, and of what
    they are multiplied by."""

    bits: int
    elements: float
    nbytes: float
    activation_bits: int = 16

    def rates_of(self, rates: Rates) -> CompressedRates | None:
        """Those of their products on a CPU; with activations in the dtype, where none of fewer bits are known."""
        known = rates.compressed.get(str(self.bits))
        return known if self.activation_bits == 16 else rates.compressed.get(f"w{self.bits}a8", known)


@lru_cache(maxsize=256)
def compressed_part(
    spec: ModelSpec, bits: WeightBits, part: str, layer: int, activation_bits: int = 16
) -> tuple[Compressed, ...] | None:
    """The matrices of a part (see ModelSpec.linear_shapes) by their bits, or None where none is compressed; averaged
    over the layers that are sparse, or dense, like ``layer``."""
    layers, elements, nbytes = set(), defaultdict(float), defaultdict(float)
    for number, tensor, form in _matrices(spec, bits, part, layer):
        layers.add(number)
        stored = form.bits if form else 16
        elements[stored] += tensor.elements
        nbytes[stored] += stored_bytes(spec, tensor, form)
    if not elements.keys() - {16}:
        return None
    count = len(layers)
    return tuple(Compressed(each, elements[each] / count, nbytes[each] / count, activation_bits) for each in elements)


def compressed_seconds(
    rates: Rates, rows: float, work: LinearWork, parts: Sequence[Compressed], dtype_bytes: int, plain: float
) -> float | None:
    """One call of a part's linear layers on a CPU, which multiplies straight from codes; None where ``rates`` do not
    say. plain: share of the matrices in the dtype that are in the layout of the checkpoint."""
    seconds, total = rates.activation_seconds(rows, work, dtype_bytes), sum(part.elements for part in parts)
    for part in parts:
        share = work.part(part.elements / total)
        if part.bits == 16:
            for is_plain, weight in ((True, plain), (False, 1 - plain)):
                seconds += weight * rates.product_seconds(rows, share, dtype_bytes, plain=is_plain)
        elif (known := part.rates_of(rates)) is not None:
            stored = part.nbytes * share.weight_elements / part.elements
            seconds += known.seconds(rows, share.weight_elements, stored)
        else:
            return None
    return seconds


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
