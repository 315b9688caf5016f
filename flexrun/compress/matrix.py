"""A compressed matrix that stands where a tensor would: what multiplies by it need not know."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from flexrun import native
from flexrun.compress import triton_kernels
from flexrun.compress.groupwise import PANEL_TILES, TILE_ROWS, GroupFormat, dequantise, dequantised_parts, split

LARGEST_ACTIVATION = 127
DEQUANTISE_BYTES = 16 << 20  # at most, of what is brought back at a time where no kernel multiplies by codes
_TORCH_BYTES = 32  # that an element takes on the way in torch's form, in float32


class GroupwiseMatrix:
    """Weights [outputs, inputs] in memory as flexrun.compress.groupwise lays them out.

    data: uint8 [bytes of the matrix], on any device; dtype: of what it is multiplied by. activation_bits: 8 rounds
    that before, see ``round_activations``; a CPU with such dot products then adds up whole numbers.
    """

    is_mkldnn = False

    def __init__(
        self, data: Tensor, shape: tuple[int, int], form: GroupFormat, dtype: torch.dtype, activation_bits: int = 16
    ):
        self.data, self.shape, self.form, self.dtype = data, torch.Size(shape), form, dtype
        self.activation_bits = activation_bits
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
        if native.multiply(x, self._codes, self._factors, form.bits, form.group, bias, out, self.activation_bits):
            return out
        if self.activation_bits == 8:
            x = round_activations(x, form.group)
        for rows, weights in self._parts():
            out[:, rows] = F.linear(x, weights, None if bias is None else bias[rows])
        return out

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows, and their weights in memory that the next part takes again; DEQUANTISE_BYTES in all."""
        kernel = _gpu_kernel(self.device)
        if kernel is None:
            elements = DEQUANTISE_BYTES // _TORCH_BYTES
            yield from dequantised_parts(self.data, self.shape, self.form, self.dtype, elements)
            return
        rows, columns = self.shape
        panel = PANEL_TILES * TILE_ROWS
        step = min(max(DEQUANTISE_BYTES // (panel * columns * self.dtype.itemsize), 1) * panel, rows)
        scratch = torch.empty(step, columns, dtype=self.dtype, device=self.device)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            weights = scratch[: part.stop - start]
            kernel(self.data, self.shape, self.form, weights, part)
            yield part, weights

    @property
    def multiplies_codes(self) -> bool:
        """Whether a product is not simply one with dense weights."""
        return self.activation_bits < 16 or native.multiplies(self.data, self.dtype)

    def dequantised(self, out: Tensor | None = None) -> Tensor:
        """The weights [outputs, inputs] in the dtype, in ``out`` where given."""
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device) if out is None else out
        if native.dequantise(self._codes, self._factors, self.form.bits, self.form.group, out):
            return out
        if (kernel := _gpu_kernel(self.device)) is not None:
            kernel(self.data, self.shape, self.form, out)
            return out
        return dequantise(self.data, self.shape, self.form, self.dtype, out)


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [T, K] with ``group`` neighbours of a row at a time on 255 even steps, from minus to plus their largest.

    Symmetric round-to-nearest when it is needed, as ZeroQuant's (arXiv 2206.01861, section 4.2) but by group, so that
    one large activation costs its neighbours precision and not the whole row. Groups below 1e-28 become 0.
    """
    missing = -x.shape[1] % group
    grouped = F.pad(x.float(), (0, missing)).view(x.shape[0], -1, group)
    scale = grouped.abs().amax(-1, keepdim=True) / LARGEST_ACTIVATION
    scale = torch.where(scale > 1e-30, scale, scale * 0)  # the inverse of less overflows; NaN stays NaN
    inverse = torch.where(scale == 0, scale, 1 / scale)
    return ((grouped * inverse).round_() * scale).flatten(1)[:, : x.shape[1]].to(x.dtype)


@cache
def _gpu_kernel(device: torch.device) -> Callable[..., None] | None:
    """The Triton kernel (see triton_kernels.dequantise) where the device is a GPU and it runs there."""
    if device.type != "cuda":
        return None
    try:
        form, shape = GroupFormat(), (1, 32)
        data = torch.zeros(form.nbytes(shape), dtype=torch.uint8, device=device)
        triton_kernels.dequantise(data, shape, form, torch.empty(shape, dtype=torch.float16, device=device))
    except Exception:  # no triton, none for this GPU, or no C compiler for its launcher: torch does the same
        return None
    return triton_kernels.dequantise
