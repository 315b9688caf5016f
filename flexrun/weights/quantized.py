"""Matrices that a checkpoint keeps in 8 or 4 bits a weight, beside their scales: which tensors, and what they hold.

Two formats are read, both to the dtype of the model:

* FP8 (DeepSeek-V3): ``X`` in float8 e4m3, ``X_scale_inv`` with one factor a block of rows and columns; the blocks at
  the edges are smaller. weight = stored * factor, in float32.
* MXFP4 (gpt-oss; OCP Microscaling Formats 1.0): ``X_blocks`` uint8 [experts, outputs, groups, 16], two 4-bit floats a
  byte, the low half first; ``X_scales`` uint8 [experts, outputs, groups], powers of two. Every weight is exact in
  bfloat16. As transformers names and shapes it, ``X`` is [experts, inputs, outputs].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flexrun.models.quantization import check_quantization

FP8_SCALE, MXFP4_BLOCKS, MXFP4_SCALES = "_scale_inv", "_blocks", "_scales"
MXFP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # then the same, negative
MXFP4_GROUP = 32  # weights of one scale
STAGING_BYTES = 1 << 20  # stored bytes converted at a time; float32 weights and lookups take up to 24 times as many

ReadBytes = Callable[[str, int, int], Tensor]  # (stored name, offset, bytes) -> uint8 [bytes]


class Stored(Protocol):
    """What the header of a file says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class QuantizedTensor:
    """One matrix (``fp8``) or stack of matrices (``mxfp4``) of ``shape``, made of two stored tensors."""

    kind: str
    shape: tuple[int, ...]
    values: str
    scales: str
    block: tuple[int, int] = (0, 0)  # rows and columns of a factor
    complaint: str | None = None  # why it cannot be read

    def read(self, part: int | None, dtype: torch.dtype, stored: Mapping[str, Stored], read_bytes: ReadBytes) -> Tensor:
        """The matrix, or entry ``part`` of a stack, in ``dtype``; of a stack as a transposed view."""
        if self.kind == "fp8":
            whole = self._read_fp8(dtype, stored[self.scales], read_bytes)
            return whole if part is None else whole[part]
        if part is None:
            parts = [self._read_mxfp4(each, dtype, read_bytes) for each in range(self.shape[0])]
            return torch.stack(parts).contiguous()
        return self._read_mxfp4(part, dtype, read_bytes)

    def _read_fp8(self, dtype: torch.dtype, scales: Stored, read_bytes: ReadBytes) -> Tensor:
        rows, columns = self.shape
        block_rows, block_columns = self.block
        scale_dtype = FP8_SCALE_DTYPES[scales.dtype]
        count = scales.shape[0] * scales.shape[1] * scale_dtype.itemsize
        factors = read_bytes(self.scales, 0, count).view(scale_dtype).view(scales.shape).float()
        result = torch.empty(rows, columns, dtype=dtype)
        step = max(STAGING_BYTES // (columns * block_rows), 1) * block_rows
        for first in range(0, rows, step):
            last = min(first + step, rows)
            weights = read_bytes(self.values, first * columns, (last - first) * columns).view(torch.float8_e4m3fn)
            own = factors[first // block_rows : -(-last // block_rows)]
            own = own.repeat_interleave(block_columns, 1)[:, :columns].repeat_interleave(block_rows, 0)
            result[first:last] = weights.view(-1, columns).float().mul_(own[: last - first])
        return result

    def _read_mxfp4(self, part: int, dtype: torch.dtype, read_bytes: ReadBytes) -> Tensor:
        _, inputs, outputs = self.shape
        groups = inputs // MXFP4_GROUP
        row_bytes = inputs // 2
        result = torch.empty(outputs, inputs, dtype=dtype)
        step = max(STAGING_BYTES // row_bytes, 1)
        for first in range(0, outputs, step):
            last = min(first + step, outputs)
            start, count = part * outputs + first, last - first
            blocks = read_bytes(self.values, start * row_bytes, count * row_bytes)
            powers = _POWERS[read_bytes(self.scales, start * groups, count * groups).int()]
            weights = _PAIRS[blocks.int()].view(count, groups, MXFP4_GROUP).mul_(powers.view(count, groups, 1))
            result[first:last] = weights.view(count, inputs)
        return result.t()


FP8_SCALE_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_HALVES = torch.tensor([*MXFP4_VALUES, *(-value for value in MXFP4_VALUES)])
_PAIRS = torch.stack([_HALVES.repeat(16), _HALVES.repeat_interleave(16)], dim=1)  # [256, 2]: low half, high half
# the powers of two of e8m0; 255 is no number
_POWERS = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [float("nan")], dtype=torch.float32)


def quantized_tensors(config: Mapping, stored: Mapping[str, Stored]) -> dict[str, QuantizedTensor]:
    """The quantised tensors of a checkpoint by the name of what they hold, as its config.json says.

    Raises UnsupportedError for a form of quantisation that is not read. A tensor whose parts do not fit together has a
    complaint, for whoever needs it.
    """
    settings = config.get("quantization_config")
    if not settings:
        return {}
    method = check_quantization(settings)
    if method == "mxfp4":
        names = [name.removesuffix(MXFP4_BLOCKS) for name in stored if name.endswith(MXFP4_BLOCKS)]
        return {name: _mxfp4(name, stored) for name in names}
    block = tuple(settings["weight_block_size"])
    return {name: _fp8(name, stored, block) for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"}


def parts_of(quantized: Iterable[QuantizedTensor]) -> set[str]:
    """The stored tensors that quantised ones are made of."""
    return {name for tensor in quantized for name in (tensor.values, tensor.scales)}


def _fp8(name: str, stored: Mapping[str, Stored], block: tuple[int, int]) -> QuantizedTensor:
    shape, scales = stored[name].shape, name + FP8_SCALE
    complaint = None
    if len(shape) != 2:
        complaint = f"is float8 of shape {list(shape)}; only matrices are read"
    elif scales not in stored:
        complaint = f"is float8 without {scales!r}"
    else:
        wanted = [-(-size // part) for size, part in zip(shape, block)]
        if list(stored[scales].shape) != wanted:
            complaint = f"has scales of shape {list(stored[scales].shape)}; blocks of {list(block)} need {wanted}"
        elif stored[scales].dtype not in FP8_SCALE_DTYPES:
            complaint = f"has scales stored as {stored[scales].dtype}"
    return QuantizedTensor("fp8", shape, name, scales, block, complaint)


def _mxfp4(name: str, stored: Mapping[str, Stored]) -> QuantizedTensor:
    values, scales = name + MXFP4_BLOCKS, name + MXFP4_SCALES
    shape = stored[values].shape
    complaint = None
    if len(shape) != 4 or shape[3] != MXFP4_GROUP // 2 or stored[values].dtype != "U8":
        complaint = f"has blocks {stored[values].dtype} {list(shape)}; U8 [experts, outputs, groups, 16] are read"
        return QuantizedTensor("mxfp4", shape, values, scales, complaint=complaint)
    if scales not in stored:
        complaint = f"is MXFP4 without {scales!r}"
    elif stored[scales].shape != shape[:3] or stored[scales].dtype != "U8":
        complaint = f"has scales {stored[scales].dtype} {list(stored[scales].shape)}; U8 {list(shape[:3])} are needed"
    return QuantizedTensor("mxfp4", (shape[0], shape[2] * MXFP4_GROUP, shape[1]), values, scales, complaint=complaint)
