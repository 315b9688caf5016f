"""Matrices in 4 or 8 bits an element, so that every lane moves a quarter or half of the bytes.

Round-to-nearest in groups of neighbours along the input dimension, as FlexGen does (arXiv 2303.06865, section 5). One
matrix [outputs, inputs] is one run of bytes, the same on disk, in RAM and on a device. Rows go in tiles of 16 (absent
rows of the last one are 0), four tiles are a panel (the last one may have fewer), columns are filled up to whole 32s
with 0. Panel after panel, so that a product reads the matrix once from its first byte to its last:

* codes, 32 bytes of each tile of the panel in turn. With 8 bits, 32 bytes are two columns: byte 2 r + e is row r of
  column 2 p + e. With 4 bits they are four: the low half of byte 2 r + e is column 4 q + e, the high half 4 q + 2 + e.
* factors, from the next multiple of 64 bytes: for each group and tile the float16 scales of its 16 rows, then their
  float16 minima, which are absent where the format is symmetric.

weight = scale * code + minimum, in float32, rounded once to the model's dtype; where symmetric, the minimum is
-scale * 2^(bits-1). scale * code is exact in float32, so every way to compute a weight gives the same one. In groups
of 32, weights that lie on such a grid come through as they are: GGUF's Q4_0 and Q4_1 in 4 bits, Q8_0 and MXFP4 in 8
(whose numbers are no even steps, so that 4 bits do not hold them). A scale may be negative, as some of Q4_0 are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexrun.errors import CheckpointError, ConfigError

TILE_ROWS = 16
PANEL_TILES = 4
COLUMNS_MULTIPLE = 32
GROUPS = (32, 64, 128)
BITS = (4, 8)
FACTORS_ALIGNMENT = 64
LARGEST = 6e4  # of a weight: what float16 holds
GRID_GROUP = 32  # neighbours that share a scale in GGUF's blocks of 4 and 8 bits, and in MXFP4
CLIPS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)  # shares of a group's range that clipped scales are tried for
_BLOCK_ELEMENTS = 4 << 20  # weights quantised or brought back at a time


@dataclass(frozen=True)
class GroupFormat:
    """How a matrix is compressed: ``bits`` an element, ``group`` neighbours of a row that share their factors."""

    bits: int = 4
    group: int = 64
    symmetric: bool = False

    def __post_init__(self):
        if self.bits not in BITS:
            raise ConfigError(f"weights of {self.bits!r} bits", "give 4 or 8, or 16 for the model's dtype")
        if self.group not in GROUPS:
            raise ConfigError(f"groups of {self.group!r} weights", "give 32, 64 or 128")

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def factor_count(self) -> int:
        return 1 if self.symmetric else 2

    def tile_bytes(self, columns: int) -> int:
        """Bytes of the codes of 16 rows."""
        return TILE_ROWS * _up(columns, COLUMNS_MULTIPLE) * self.bits // 8

    def group_count(self, columns: int) -> int:
        """Groups of one row; the last may be smaller."""
        return -(-columns // self.group)

    def factors_offset(self, shape: tuple[int, int]) -> int:
        return _up(_tiles(shape[0]) * self.tile_bytes(shape[1]), FACTORS_ALIGNMENT)

    def nbytes(self, shape: tuple[int, int]) -> int:
        """Bytes of a matrix of ``shape``, codes and factors."""
        factors = _tiles(shape[0]) * TILE_ROWS * self.group_count(shape[1]) * self.factor_count
        return self.factors_offset(shape) + factors * 2


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def _tiles(rows: int) -> int:
    return -(-rows // TILE_ROWS)


def split(data: Tensor, shape: tuple[int, int], form: GroupFormat) -> tuple[Tensor, Tensor]:
    """uint8 [nbytes] -> views of codes uint8 [tiles, tile bytes] and factors float16 [tiles, groups, 1 or 2, 16].

    Of a panel the sizes are right, the order is that of the format.
    """
    tiles, tile_bytes = _tiles(shape[0]), form.tile_bytes(shape[1])
    codes = data[: tiles * tile_bytes].view(tiles, tile_bytes)
    factors = data[form.factors_offset(shape) : form.nbytes(shape)].view(torch.float16)
    return codes, factors.view(tiles, form.group_count(shape[1]), form.factor_count, TILE_ROWS)


def quantise(matrix: Tensor, form: GroupFormat, *, clip: bool = False, name: str = "matrix") -> Tensor:
    """matrix [rows, columns] of any float dtype -> uint8 [nbytes]. Each value comes back within half a step of itself.

    clip: of each group take the range, of CLIPS, whose squared error is least; values beyond it err by more.
    Raises CheckpointError, with ``name``, for NaN, infinity and weights beyond LARGEST.
    """
    shape = tuple(matrix.shape)
    data = torch.zeros(form.nbytes(shape), dtype=torch.uint8)
    codes, factors = split(data, shape, form)
    for rows, tiles, together in _parts(shape, _BLOCK_ELEMENTS):
        chosen, found = _quantised(matrix[rows].float(), form, clip, name)
        missing = _up(len(found), TILE_ROWS) - len(found)
        chosen = torch.nn.functional.pad(chosen, (0, 0, 0, 0, 0, missing))
        by_group = chosen.view(-1, together, TILE_ROWS, *chosen.shape[1:]).permute(0, 3, 1, 4, 2)
        factors[tiles].view(by_group.shape).copy_(by_group)
        wide = _up(shape[1], COLUMNS_MULTIPLE) - shape[1]
        _pack(torch.nn.functional.pad(found.to(torch.uint8), (0, wide, 0, missing)), form, together, codes[tiles])
    return data


def dequantise(
    data: Tensor, shape: tuple[int, int], form: GroupFormat, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """The matrix [rows, columns] in ``dtype``, by torch alone, on the device of ``data``: the oracle of the kernels."""
    out = torch.empty(shape, dtype=dtype, device=data.device) if out is None else out
    for rows, weights in dequantised_parts(data, shape, form, dtype):
        out[rows] = weights
    return out


def dequantised_parts(
    data: Tensor, shape: tuple[int, int], form: GroupFormat, dtype: torch.dtype, elements: int = _BLOCK_ELEMENTS
) -> Iterator[tuple[slice, Tensor]]:
    """The same part by part, of ``elements`` or one panel: which rows, and these rows in ``dtype``."""
    codes, factors = split(data, shape, form)
    for rows, tiles, together in _parts(shape, elements):
        by_group = factors[tiles].view(-1, form.group_count(shape[1]), together, form.factor_count, TILE_ROWS)
        own = by_group.float().permute(0, 2, 4, 1, 3).flatten(0, 2)  # [rows, groups, 1 or 2]
        weights = _weights(_unpacked(codes[tiles], form, together), own, form)
        yield rows, weights[: rows.stop - rows.start, : shape[1]].to(dtype)


def _parts(shape: tuple[int, int], elements: int) -> Iterator[tuple[slice, slice, int]]:
    """Rows, tiles, and tiles of a panel, worked on at a time."""
    tiles = _tiles(shape[0])
    whole = tiles - tiles % PANEL_TILES
    step = max(elements // (PANEL_TILES * TILE_ROWS * max(shape[1], 1)), 1) * PANEL_TILES
    starts = [*range(0, whole, step), *([whole] if whole < tiles else [])]
    for start, stop in zip(starts, [*starts[1:], tiles]):
        rows = slice(start * TILE_ROWS, min(stop * TILE_ROWS, shape[0]))
        yield rows, slice(start, stop), PANEL_TILES if start < whole else tiles - whole


def _quantised(matrix: Tensor, form: GroupFormat, clip: bool, name: str) -> tuple[Tensor, Tensor]:
    """matrix float32 [rows, columns] -> factors [rows, groups, 1 or 2], codes [rows, columns], both float32."""
    grouped = _grouped(matrix, form)  # [rows, groups, group]
    low, high = grouped.amin(-1), grouped.amax(-1)
    if not (low.isfinite().all() and high.isfinite().all()):  # amin and amax pass NaN on
        raise CheckpointError(f"{name} holds NaN or infinite weights", "the checkpoint is damaged: get it again")
    if max(float(high.max()), -float(low.min())) > LARGEST:
        raise CheckpointError(f"{name} holds weights beyond {LARGEST:.0f}", "keep it in 16 bits")
    chosen = _factors(low, high, form)
    found = _codes(grouped, chosen, form)
    if clip:
        least = _squared_error(grouped, found, chosen, form)
        for share in CLIPS:
            trial = _factors(low * share, high * share, form)
            attempt = _codes(grouped, trial, form)
            error = _squared_error(grouped, attempt, trial, form)
            better = (error < least).unsqueeze(-1)
            least = torch.minimum(error, least)
            chosen, found = torch.where(better, trial, chosen), torch.where(better, attempt, found)
    if form.group == GRID_GROUP:
        exact = _is_exact(grouped, found, chosen, form)
        for trial in _grids(grouped, form):
            attempt = _codes(grouped, trial, form)
            hit = _is_exact(grouped, attempt, trial, form) & ~exact
            chosen, found, exact = torch.where(hit, trial, chosen), torch.where(hit, attempt, found), exact | hit
    return chosen, found.flatten(1)[:, : matrix.shape[1]]


def _grids(grouped: Tensor, form: GroupFormat) -> Iterator[Tensor]:
    """Factors [rows, groups, 1 or 2] of the grids on which the weights may lie already, told by the largest of each
    group: Q4_0 has it at -8 steps of either sign, Q8_0 at 127, and MXFP4's numbers are multiples of a power of two."""
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
    steps = [largest / -8]
    if form.bits == 8:
        steps += [largest.abs() / 127, torch.exp2(largest.abs().log2().floor() - 3)]
    half = float(1 << (form.bits - 1))
    for step in steps:
        step = step.to(torch.float16).float().nan_to_num(0.0, 0.0, 0.0).unsqueeze(-1)
        factors = step if form.symmetric else torch.cat((step, (step * -half).to(torch.float16).float()), -1)
        yield factors.nan_to_num(0.0, 0.0, 0.0)


def _grouped(matrix: Tensor, form: GroupFormat) -> Tensor:
    """[rows, groups, group], the last group filled up with its row's last weight."""
    rows, columns = matrix.shape
    missing = form.group_count(columns) * form.group - columns
    if missing:
        matrix = torch.cat((matrix, matrix[:, -1:].expand(rows, missing)), 1)
    return matrix.view(rows, -1, form.group)


def _factors(low: Tensor, high: Tensor, form: GroupFormat) -> Tensor:
    """float32 [..., 1 or 2], exact in float16: rounded so that the levels reach from low to high."""
    if form.symmetric:  # half a step beyond the outermost levels rounds to them
        half = 1 << (form.bits - 1)
        scale = torch.maximum(high.double() / (half - 0.5), -low.double() / (half + 0.5))
        return _float16_above(scale.clamp_min(0)).unsqueeze(-1)
    return torch.stack(factors_of(low, high, form.levels), -1)


def factors_of(low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """(scale, minimum) of groups from ``low`` to ``high``, float32 and exact in float16, that reach that far."""
    minimum = -_float16_above(-low.double())
    return _float16_above((high.double() - minimum.double()).clamp_min_(0) / levels), minimum


def _float16_above(value: Tensor) -> Tensor:
    """The least float16 number that is not below a float64, as float32."""
    near = value.to(torch.float16)
    steps = near.view(torch.int16)
    # one up, away from zero or towards it, where rounding went down; -0 and 0 are not told apart by a comparison
    up = torch.where(near > 0, steps + 1, torch.where(near < 0, steps - 1, torch.ones_like(steps)))
    return torch.where(near.double() < value, up.view(torch.float16), near).float()


def _codes(grouped: Tensor, factors: Tensor, form: GroupFormat) -> Tensor:
    """float32 [rows, groups, group] of whole numbers from 0 to ``levels``."""
    scale = factors[..., :1]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if form.symmetric:
        codes = grouped / scale + (1 << (form.bits - 1))
    else:
        codes = (grouped - factors[..., 1:]) / scale
    return codes.round_().clamp_(0, form.levels)


def _weights(codes: Tensor, factors: Tensor, form: GroupFormat) -> Tensor:
    """codes float32 [rows, groups * group or less], factors float32 [rows, groups, 1 or 2] -> float32 weights."""
    rows, columns = codes.shape
    padded = factors.shape[1] * form.group
    if columns < padded:
        codes = torch.nn.functional.pad(codes, (0, padded - columns))
    grouped = codes[:, :padded].view(rows, -1, form.group)
    scale = factors[..., :1]
    minimum = scale * -float(1 << (form.bits - 1)) if form.symmetric else factors[..., 1:]
    return (grouped * scale + minimum).flatten(1)


def _squared_error(grouped: Tensor, codes: Tensor, factors: Tensor, form: GroupFormat) -> Tensor:
    return (_weights(codes.flatten(1), factors, form).view_as(grouped) - grouped).square_().sum(-1)


def _is_exact(grouped: Tensor, codes: Tensor, factors: Tensor, form: GroupFormat) -> Tensor:
    """bool [rows, groups, 1]"""
    return (_weights(codes.flatten(1), factors, form).view_as(grouped) == grouped).all(-1, keepdim=True)


def _pack(codes: Tensor, form: GroupFormat, together: int, out: Tensor) -> None:
    """codes uint8 [tiles * 16, padded columns] -> bytes [tiles, tile bytes], ``together`` tiles a panel."""
    split = (len(out) // together, together, TILE_ROWS, -1)
    if form.bits == 8:
        pairs = codes.view(*split, 2)
    else:
        low, high = codes.view(*split, 2, 2).unbind(4)
        pairs = low | high << 4
    out.copy_(pairs.permute(0, 3, 1, 2, 4).reshape(out.shape))


def _unpacked(codes: Tensor, form: GroupFormat, together: int) -> Tensor:
    """bytes [tiles, tile bytes], ``together`` tiles a panel -> float32 [tiles * 16, padded columns]."""
    pairs = codes.view(len(codes) // together, -1, together, TILE_ROWS, 2).permute(0, 2, 3, 1, 4)
    if form.bits == 4:
        pairs = torch.stack((pairs & 15, pairs >> 4), 4)
    return pairs.flatten(3).flatten(0, 2).float()
