"""The tensor operations a decoder is made of, one function each, so that a native kernel can replace any of them.

Every function works on rows: a row's result never depends on the other rows of the call beyond rounding.
Norms and rotations compute in float32 and round once to the dtype of ``x``.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flexrun import native

ACTIVATIONS = {
    "silu": lambda x: F.silu(x),
    "gelu": lambda x: F.gelu(x),
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": lambda x: F.relu(x),
}
_ACTIVATIONS_INTO = {
    "silu": lambda x, out: torch.ops.aten.silu.out(x, out=out),
    "gelu": lambda x, out: torch.ops.aten.gelu.out(x, out=out),
    "gelu_tanh": lambda x, out: torch.ops.aten.gelu.out(x, approximate="tanh", out=out),
    "relu": lambda x, out: torch.clamp(x, min=0, out=out),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: x [T, K], weight [N, K], bias [N] -> [T, N], all of one dtype.

    weight may be what ``pack_matrix`` made of it, or a compressed matrix, which multiplies by itself.
    out: memory that the result may take; it can come in its own.
    """
    if not isinstance(weight, Tensor):
        return weight.multiply(x, bias, out)
    if weight.is_mkldnn or (weight.dtype is torch.float32 and weight.is_cpu and can_pack(torch.float32)):
        return _onednn_linear(x, weight, bias)
    if out is None:
        return F.linear(x, weight, bias)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """oneDNN's matmul, in float32 too: torch's own, MKL, leaves AVX512 unused on CPUs of other makers than Intel.

    In float32 its rows come out the same to the bit in calls of any number of rows but one, so there are always two.
    """
    if x.shape[0] != 1 or x.dtype is not torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x.repeat(2, 1), weight, bias, "none", [], "")[:1]


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether the CPU has a matmul of this dtype that likes its weights packed."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype is torch.float32 or (dtype is torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_matrix(weight: Tensor) -> Tensor:
    """A weight [N, K] in the blocked form of oneDNN's matmul, which otherwise rearranges it at every call.

    Worth a third at 64 rows, little at 512; in float32 a quarter and nothing, but three times at 4. The blocks take
    the bytes of the matrix, padded to whole blocks.
    """
    return torch.ops.mkldnn._reorder_linear_weight(weight, 64)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, out: Tensor | None = None) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension; ``out`` may be ``x``."""
    result = torch.empty_like(x) if out is None else out
    if native.rms_norm(x, weight, eps, offset, result):
        return result
    wide = x.float()
    scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    result = wide * scale if wide is x else wide.mul_(scale)
    if weight is not None:
        result *= weight.float() + offset if offset else weight
    if out is None:
        return result.to(x.dtype)
    return out.copy_(result)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor | None = None) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension; ``out`` may be ``x``."""
    result = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    return result if out is None else out.copy_(result)


def add(hidden: Tensor, branch: Tensor, scale: float = 1.0) -> Tensor:
    """``hidden += scale * branch``, in place."""
    return hidden.add_(branch, alpha=scale)


def add_rms_norm(
    hidden: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    eps: float,
    offset: float = 0.0,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``hidden += scale * branch`` in place, then the RMS norm of the sum as the result."""
    result = torch.empty_like(hidden) if out is None else out
    if native.rms_norm(hidden, weight, eps, offset, result, branch, scale):
        return result
    return rms_norm(add(hidden, branch, scale), weight, eps, offset, out)


def add_layer_norm(
    hidden: Tensor,
    branch: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: float = 1.0,
    out: Tensor | None = None,
) -> Tensor:
    """``hidden += scale * branch`` in place, then the layer norm of the sum as the result."""
    return layer_norm(add(hidden, branch, scale), weight, bias, eps, out)


def gated_activation(gate_up: Tensor, kind: str, out: Tensor | None = None) -> Tensor:
    """``act(gate) * up`` of gate_up [T, 2I], gate first -> [T, I]. May overwrite ``gate_up``."""
    result = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2) if out is None else out
    if native.gated_activation(gate_up, kind, result):
        return result
    gate, up = gate_up.chunk(2, dim=-1)
    activated = ACTIVATIONS[kind](gate) if out is None else _ACTIVATIONS_INTO[kind](gate, out)
    return activated.mul_(up)


def activation(x: Tensor, kind: str) -> Tensor:
    """``act(x)``, in place."""
    return _ACTIVATIONS_INTO[kind](x, x)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [T, heads, D] in place: channel ``c`` of the first half pairs with ``c + half`` (GPT-NeoX convention).

    cos, sin: float32 [T, half]; the first ``2 * half`` channels rotate and the rest pass. x may be strided.
    """
    if native.apply_rope(x, cos, sin):
        return x
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = first * cos  # float32 by promotion
    rotated.addcmul_(second, sin, value=-1)
    second.copy_((second * cos).addcmul_(first, sin))
    first.copy_(rotated)
    return x


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """``cap * tanh(x / cap)``, in place."""
    return x.div_(cap).tanh_().mul_(cap)


def embed_rows(table: Tensor, rows: Tensor) -> Tensor:
    """table [N, K], rows [T] int64 -> [T, K]."""
    return F.embedding(rows, table)
