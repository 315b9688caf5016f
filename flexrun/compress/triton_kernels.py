"""Compressed matrices become dense on a GPU in one launch, where torch's operations would take ten.

Triton is optional, and takes a second to import: that is done when a matrix on a GPU is first met.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from flexrun.compress.groupwise import PANEL_TILES, TILE_ROWS, GroupFormat, split

BLOCK_COLUMNS = 128
tl = None  # triton.language, where kernels look for it


def dequantise(data: Tensor, shape: tuple[int, int], form: GroupFormat, out: Tensor, rows: slice = slice(None)) -> None:
    """Rows of the matrix, from a whole panel on, to ``out`` [rows, columns], contiguous, on the device of ``data``.

    data: uint8 as flexrun.compress.groupwise lays it out. The values are those of its ``dequantise``. Raises
    ImportError without triton.
    """
    start, stop, _ = rows.indices(shape[0])
    panel_rows = PANEL_TILES * TILE_ROWS
    if start % panel_rows or not out.is_contiguous():
        raise ValueError(f"rows from {start} on into memory of strides {out.stride()}")
    codes, factors = split(data, shape, form)
    grid = (-(-(stop - start) // panel_rows), -(-shape[1] // BLOCK_COLUMNS))
    with torch.cuda.device(data.device) if data.is_cuda else torch.inference_mode():
        _compiled()[grid](
            codes,
            factors,
            out,
            start,
            stop,
            shape[1],
            codes.shape[0],
            codes.shape[1],
            factors.shape[1],
            GROUP=form.group,
            BITS=form.bits,
            SYMMETRIC=form.symmetric,
            BLOCK=BLOCK_COLUMNS,
        )


@cache
def _compiled():
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_dequantise)


def _dequantise(
    codes,
    factors,
    out,
    start,
    stop,
    columns,
    all_tiles,
    tile_bytes,
    groups,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A panel of four tiles of 16 rows, the last one maybe of fewer, by BLOCK columns."""
    first = start // 16 + tl.program_id(0) * 4
    tiles = tl.minimum(all_tiles - first, 4)
    place = tl.arange(0, 64)[:, None]
    tile, lane = place // 16, place % 16
    row = first * 16 + place
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < stop) & (column < columns)
    run = column // (16 // BITS)  # of 32 bytes a tile
    code_at = first.to(tl.int64) * tile_bytes + (run * tiles + tile) * 32 + 2 * lane + column % 2
    byte = tl.load(codes + code_at, mask=inside, other=0).to(tl.int32)
    if BITS == 4:
        byte = (byte >> (column // 2 % 2 * 4)) & 15
    factor_at = (first.to(tl.int64) * groups + column // GROUP * tiles + tile) * 16
    if not SYMMETRIC:
        factor_at *= 2
    scale = tl.load(factors + factor_at + lane, mask=inside, other=0.0).to(tl.float32)
    if SYMMETRIC:
        minimum = scale * -(2.0 ** (BITS - 1))
    else:
        minimum = tl.load(factors + factor_at + 16 + lane, mask=inside, other=0.0).to(tl.float32)
    weight = byte.to(tl.float32) * scale + minimum
    tl.store(out + (row - start).to(tl.int64) * columns + column, weight.to(out.dtype.element_ty), mask=inside)
