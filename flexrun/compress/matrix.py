"""A compressed matrix that stands where a tensor would: what multiplies by it need not know."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flexrun import native
from flexrun.compress.groupwise import GroupFormat, dequantise, dequantised_parts, split

DEQUANTISE_BYTES = 16 << 20  # at most, of what is brought back at a time where no kernel multiplies by codes
_PART_ELEMENTS = DEQUANTISE_BYTES // 32  # bytes an element takes on the way, in float32


class GroupwiseMatrix:
    """Weights [outputs, inputs] in memory as flexrun.compress.groupwise lays them out.

    data: uint8 [bytes of the matrix], on any device; dtype: of what it is multiplied by.
    """

    is_mkldnn = False

    def __init__(self, data: Tensor, shape: tuple[int, int], form: GroupFormat, dtype: torch.dtype):
        self.data, self.shape, self.form, self.dtype = data, torch.Size(shape), form, dtype
        self._codes, self._factors = split(data, shape, form)

    @property
    def device(self) -> torch.device:
        return self.data.device

    @property
    def is_cpu(self) -> bool:
        return self.data.is_cpu

    def multiply(self, x: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """``x @ weights.T + bias``: x [T, inputs], bias [outputs] -> [T, outputs], into ``out`` where given.

        A row's result does not depend on the others. The kernels multiply by the float32 values of the weights, torch
        by those rounded to the dtype.
        """
        if out is None:
            out = x.new_empty(x.shape[0], self.shape[0])
        form = self.form
        if native.multiply(x, self._codes, self._factors, form.bits, form.group, bias, out):
            return out
        for rows, weights in dequantised_parts(self.data, self.shape, form, self.dtype, _PART_ELEMENTS):
            out[:, rows] = F.linear(x, weights, None if bias is None else bias[rows])
        return out

    def dequantised(self) -> Tensor:
        """The weights [outputs, inputs] in the dtype."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        if native.dequantise(self._codes, self._factors, self.form.bits, self.form.group, out):
            return out
        return dequantise(self.data, self.shape, self.form, self.dtype, out)
