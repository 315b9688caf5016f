"""The tensors of a model as flexrun stores them: named, shaped, and built from those of the checkpoint."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexrun.core import DTYPES

FUSED = ("fused_expert", "fused_expert_rows", "fused_expert_pairs")


@dataclass(frozen=True)
class PackedTensor:
    """One tensor as flexrun stores it, and the checkpoint tensors it is made of.

    name: for example ``"qkv.weight"``, unique within its module.
    module: ``"attention"``, ``"mlp"``, ``"experts"``, ``"embedding"`` or ``"head"``.
    shape: of the packed tensor.
    sources: checkpoint tensor names in the Hugging Face naming, with the layer filled in.
    source_shapes: what the checkpoint must hold, one shape a source.
    assemble: key into ASSEMBLERS.
    groups: what the assembler needs beside the tensors (``"neox_qkv"``: the number of heads; ``"fused_expert..."``:
        which expert; ``"rope_pairs"``: how many heads, and the last rows of each that are rotated).
    dtype: where not None, the one it keeps whatever the model's.
    """

    name: str
    module: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    assemble: str = "concat"
    groups: int | tuple[int, int] = 1
    dtype: str | None = None

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def part(self) -> int | None:
        """The entry along the first dimension of its source that the tensor is made of; None: of all."""
        return self.groups if self.assemble in FUSED else None

    def dtype_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of an element in a model of ``dtype``."""
        return (DTYPES[self.dtype] if self.dtype else dtype).itemsize

    def build(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The packed tensor, contiguous, from the source tensors in order, cast to ``dtype`` if given.

        Where ``part`` says so, a source may be that entry of it alone. May share memory with a lone source that needs
        no change.
        """
        if self.part is not None:
            whole = len(self.source_shapes[0])
            tensors = [tensor[self.part] if tensor.dim() == whole else tensor for tensor in tensors]
        dtype = DTYPES[self.dtype] if self.dtype else dtype or tensors[0].dtype
        packed = ASSEMBLERS[self.assemble](tensors, self.groups, dtype)
        return packed.reshape(self.shape).contiguous()


def _concat(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].to(dtype)
    packed = torch.empty((sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:]), dtype=dtype)
    row = 0
    for tensor in tensors:
        packed[row : row + len(tensor)].copy_(tensor)  # casts and concatenates in one copy
        row += len(tensor)
    return packed


def _neox_qkv(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """GPT-NeoX stores [head 0: q k v, head 1: q k v, ...]; the decoder wants all q, all k, all v."""
    (fused,) = tensors
    by_head = fused.reshape(groups, 3, -1, *fused.shape[1:])  # [heads, 3, head_dim, ...]
    return by_head.transpose(0, 1).reshape(fused.shape).to(dtype)


def _fused_expert(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """gpt-oss stores all experts in one tensor, [experts, inputs, outputs] or [experts, outputs]; this is one of it."""
    (fused,) = tensors
    return fused.t().to(dtype)


def _fused_expert_rows(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """Granite stores all experts in one tensor as well, [experts, outputs, inputs], all gates before all ups."""
    (fused,) = tensors
    return fused.to(dtype)


def _fused_expert_pairs(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """The same where the outputs are gate 0, up 0, gate 1, up 1, ...; the decoder wants all gates, then all ups."""
    packed = _fused_expert(tensors, groups, dtype)
    return torch.cat((packed[0::2], packed[1::2]))


def _rope_pairs(tensors: Sequence[Tensor], groups: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """DeepSeek rotates neighbouring channels, the decoder halves: even rows of a head's rotated ones come first."""
    (tensor,), (heads, rotated) = tensors, groups
    packed = tensor.to(dtype, copy=True)
    by_head, source = packed.view(heads, -1, *tensor.shape[1:]), tensor.view(heads, -1, *tensor.shape[1:])
    middle, half = by_head.shape[1] - rotated, rotated // 2
    by_head[:, middle : middle + half] = source[:, middle::2]
    by_head[:, middle + half :] = source[:, middle + 1 :: 2]
    return packed


ASSEMBLERS: dict[str, Callable[[Sequence[Tensor], int | tuple[int, int], torch.dtype], Tensor]] = {
    "concat": _concat,
    "neox_qkv": _neox_qkv,
    "rope_pairs": _rope_pairs,
    "fused_expert": _fused_expert,
    "fused_expert_rows": _fused_expert_rows,
    "fused_expert_pairs": _fused_expert_pairs,
}
