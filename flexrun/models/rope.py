"""Rotary position tables, computed once for a run so that a token's rotation depends on its position only.

Formulas: RoFormer (default), Chen et al. 2023 (linear), NTK-aware dynamic scaling, YaRN (arXiv 2309.00071),
Llama 3.1's frequency bands, LongRoPE (arXiv 2402.13753); constants and rounding as in transformers.

Two kinds depend on a length, which must not depend on what else is in a batch:

* ``longrope``: the long factors for a sequence that may reach past the original length (its prompt and all it may
  generate), else the short ones: one choice for its whole life. transformers starts with the short ones and, at the
  token that crosses the original length, computes the sequence anew with the long ones. So it agrees for sequences
  that stay within the original length, and for those whose prompts are longer than it.
* ``dynamic``: position p uses the frequencies of length ``max(p + 1, max_position_embeddings)``, which is what
  transformers does while it decodes. It agrees for every sequence whose prompt fits max_position_embeddings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flexrun.models.spec import ModelSpec, RopeSpec


@dataclass(frozen=True)
class Rotary:
    """cos and sin of the token rows of a pass, one pair a rope kind, each float32 [T, half]. Empty without RoPE."""

    cos: tuple[Tensor, ...] = ()
    sin: tuple[Tensor, ...] = ()

    def rows(self, start: int, stop: int) -> Rotary:
        """The rows [start, stop) as views."""
        return Rotary(tuple(c[start:stop] for c in self.cos), tuple(s[start:stop] for s in self.sin))


@dataclass(frozen=True)
class RopeTables:
    """cos and sin by position, one pair a rope kind, each float32 [max_positions, half].

    long_after: for each kind 0, or the length past which a sequence uses a second set of rows (longrope). That set
    stands behind the first, so the table is [2 * max_positions, half].
    """

    cos: tuple[Tensor, ...] = ()
    sin: tuple[Tensor, ...] = ()
    long_after: tuple[int, ...] = ()

    def gather(self, positions: Tensor, lengths: Tensor | None = None) -> Rotary:
        """The rows of ``positions`` [T] int64, all kinds. Once a pass, not once a layer.

        lengths: int64 [T], the most tokens that each row's sequence may reach; None: all as long as the tables.
        """
        rows = []
        for table, long_after in zip(self.cos, self.long_after):
            behind = len(table) // 2
            is_long = 1 if lengths is None else lengths > long_after
            rows.append(positions + is_long * behind if long_after else positions)
        return Rotary(
            tuple(table.index_select(0, row) for table, row in zip(self.cos, rows)),
            tuple(table.index_select(0, row) for table, row in zip(self.sin, rows)),
        )


def rope_tables(spec: ModelSpec, max_positions: int, device: torch.device | str = "cpu") -> RopeTables:
    """Tables for positions 0 .. max_positions - 1; ``max_positions`` is the longest sequence of the whole run."""
    pairs = [_table(rope, max_positions) for rope in spec.ropes]
    return RopeTables(
        tuple(cos.to(device) for cos, _ in pairs),
        tuple(sin.to(device) for _, sin in pairs),
        tuple(rope.original_max_positions if _has_long_rows(rope, max_positions) else 0 for rope in spec.ropes),
    )


def rope_table_bytes(spec: ModelSpec, max_positions: int) -> int:
    """Bytes of ``rope_tables(spec, max_positions)``."""
    rows = (max_positions * (2 if _has_long_rows(rope, max_positions) else 1) for rope in spec.ropes)
    return sum(2 * 4 * count * -(-rope.rotary_dim // 2) for count, rope in zip(rows, spec.ropes))


def _has_long_rows(rope: RopeSpec, max_positions: int) -> bool:
    return rope.kind == "longrope" and max_positions > rope.original_max_positions


def _table(rope: RopeSpec, max_positions: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(max_positions, dtype=torch.float32).unsqueeze(1)
    if rope.kind == "dynamic":
        frequencies, scale = _dynamic(rope, max_positions), 1.0
    elif rope.kind == "longrope":
        sets = (rope.short_factor, rope.long_factor) if _has_long_rows(rope, max_positions) else (rope.short_factor,)
        frequencies = torch.cat([_longrope_frequencies(rope, each).expand(max_positions, -1) for each in sets])
        positions, scale = positions.repeat(len(sets), 1), _longrope_scale(rope)
    else:
        frequencies, scale = _FREQUENCIES[rope.kind](rope)
    angles = positions * frequencies
    return angles.cos() * scale, angles.sin() * scale


def _exponents(rope: RopeSpec) -> Tensor:
    return torch.arange(0, rope.rotary_dim, 2, dtype=torch.int64).float() / rope.rotary_dim


def _default(rope: RopeSpec) -> tuple[Tensor, float]:
    return 1.0 / (rope.theta ** _exponents(rope)), 1.0


def _linear(rope: RopeSpec) -> tuple[Tensor, float]:
    return _default(rope)[0] / rope.factor, 1.0


def _dynamic(rope: RopeSpec, max_positions: int) -> Tensor:
    """[max_positions, half]: one row of frequencies a position."""
    lengths = torch.arange(1, max_positions + 1, dtype=torch.float32).clamp_(min=rope.max_positions)
    stretch = rope.factor * lengths / rope.max_positions - (rope.factor - 1)
    theta = rope.theta * stretch ** (rope.rotary_dim / (rope.rotary_dim - 2))
    return 1.0 / (theta.unsqueeze(1) ** _exponents(rope))


def _llama3(rope: RopeSpec) -> tuple[Tensor, float]:
    frequencies, _ = _default(rope)
    wavelengths = 2 * math.pi / frequencies
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelengths - low) / (high - low)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    is_long = wavelengths > rope.original_max_positions / low
    is_short = wavelengths < rope.original_max_positions / high
    return torch.where(is_long, frequencies / rope.factor, torch.where(is_short, frequencies, blended)), 1.0


def _yarn(rope: RopeSpec) -> tuple[Tensor, float]:
    factor = rope.factor if rope.factor is not None else rope.max_positions / rope.original_max_positions
    attention_factor = rope.attention_factor
    if attention_factor is None:
        if rope.mscale and rope.mscale_all_dim:
            attention_factor = _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
        else:
            attention_factor = _yarn_mscale(factor, 1.0)
    low, high = (_yarn_dimension(rope, rotations) for rotations in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.rotary_dim - 1)
    if low == high:
        high += 0.001  # a zero-width ramp would divide by zero
    ramp = ((torch.arange(rope.rotary_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp_(0, 1)
    wavelengths = rope.theta ** _exponents(rope)
    keep = 1 - ramp
    return (1.0 / (factor * wavelengths)) * (1 - keep) + (1.0 / wavelengths) * keep, attention_factor


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_dimension(rope: RopeSpec, rotations: float) -> float:
    """The (fractional) channel pair that turns ``rotations`` times over the original length."""
    turns = rope.original_max_positions / (rotations * 2 * math.pi)
    return rope.rotary_dim * math.log(turns) / (2 * math.log(rope.theta))


def _longrope_frequencies(rope: RopeSpec, factors: tuple[float, ...]) -> Tensor:
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * rope.theta ** _exponents(rope))


def _longrope_scale(rope: RopeSpec) -> float:
    factor = rope.factor if rope.factor is not None else rope.max_positions / rope.original_max_positions
    attention_factor = rope.attention_factor
    if attention_factor is None:
        log_ratio = math.log(factor) / math.log(rope.original_max_positions) if factor > 1 else 0.0
        attention_factor = math.sqrt(1 + log_ratio)
    return attention_factor


_FREQUENCIES = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
ROPE_KINDS = (*_FREQUENCIES, "dynamic", "longrope")
