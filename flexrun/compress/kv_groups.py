"""KV cache in 8 or 4 bits: what attention reads of it, every lane moves, and every tier holds.

Keys are rounded per channel, over groups of 64 neighbouring tokens, values per token, over the channels of a head: a
few channels of keys are far larger than all others, and no token of values is (KIVI, arXiv 2402.02750). What a group of
tokens has of one layer is a record, one run of bytes, the same on disk, in RAM and on a device; tokens whose group is
not complete stay in the model's dtype, elsewhere. A record holds the keys of head after head, ``width`` being the
channels of a head filled up to a whole 16:

* codes. 8 bits: [channel][64 tokens] bytes. 4 bits: for each pair of channels 16 words of 32 bits; bits 4 i of
  word l are token 16 i + l of the even channel, bits 16 + 4 i the same of the odd one.
* float16 scales of the channels, then their float16 minima.

and behind them the values of head after head:

* codes. 8 bits: for each 16 channels [64 tokens][16] bytes. 4 bits: for each 16 channels, for each 8 tokens,
  16 words of 32 bits; bits 4 i of word l are token 2 i of channel l, bits 16 + 4 i token 2 i + 1.
* float16 scales of the tokens, then their float16 minima.

So a word is a pair of neighbours along what a product sums over, in the halves that bfloat16 products take, and lanes
are what it does not sum over. A value comes back as scale * code + minimum in float32, rounded once to the dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexrun.compress.groupwise import LARGEST, factors_of
from flexrun.errors import ExecutionError

GROUP_TOKENS = 64
LANES = 16  # channels or tokens of one vector
_FACTOR_BYTES = 4  # a float16 scale and a float16 minimum


@dataclass(frozen=True)
class KVFormat:
    """The records of a cache of ``heads`` KV heads of ``head_dim`` channels; 8 or 4 bits a key and a value."""

    key_bits: int
    value_bits: int
    heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Channels of a head as stored."""
        return -(-self.head_dim // LANES) * LANES

    @property
    def key_bytes(self) -> int:
        """Of the keys of one head of a record, codes and factors; a multiple of 64, as value_bytes."""
        return self.width * (GROUP_TOKENS * self.key_bits // 8 + _FACTOR_BYTES)

    @property
    def value_bytes(self) -> int:
        """Of the values of one head."""
        return GROUP_TOKENS * (self.width * self.value_bits // 8 + _FACTOR_BYTES)

    @property
    def record_bytes(self) -> int:
        return self.heads * (self.key_bytes + self.value_bytes)

    @property
    def token_bytes(self) -> int:
        """Of a token, its share of the factors included."""
        return self.record_bytes // GROUP_TOKENS

    def split(self, records: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """uint8 [groups, record_bytes] -> views: codes uint8 [groups, heads, bytes] and factors float16
        [groups, heads, 2, width] of keys, then of values, [groups, heads, 2, 64]."""
        keys, values = records.split((self.heads * self.key_bytes, self.heads * self.value_bytes), 1)
        keys, key_factors = _by_head(keys, self.heads, self.width)
        values, value_factors = _by_head(values, self.heads, GROUP_TOKENS)
        return keys, key_factors, values, value_factors


def _by_head(data: Tensor, heads: int, count: int) -> tuple[Tensor, Tensor]:
    """Codes, and the factors of ``count`` channels or tokens, of each head."""
    data = data.unflatten(1, (heads, -1))
    codes, factors = data.split((data.shape[2] - count * _FACTOR_BYTES, count * _FACTOR_BYTES), 2)
    return codes, factors.view(torch.float16).unflatten(-1, (2, -1))


def quantise_kv(keys: Tensor, values: Tensor, form: KVFormat, records: Tensor, name: str = "KV cache") -> None:
    """Fill ``records``, uint8 [groups, record_bytes], with keys and values [groups, 64, heads, head_dim].

    Each value comes back within half a step of itself (and the rounding of the dtype it comes back in).
    Raises ExecutionError, with ``name``, for NaN, infinity and values beyond what float16 factors hold.
    """
    key_codes, key_factors, value_codes, value_factors = form.split(records)
    missing = form.width - form.head_dim
    for what, plane, dim in (("keys", keys, 1), ("values", values, 3)):
        plane = plane.float()
        low, high = plane.amin(dim, keepdim=True), plane.amax(dim, keepdim=True)
        most = torch.maximum(high, -low).amax()  # NaN passes through
        if not most <= LARGEST:
            reason = f"beyond {LARGEST:.0f}" if torch.isfinite(most) else "that are NaN or infinite"
            raise ExecutionError(
                f"{name}: {what} {reason}", "the weights or the dtype do not suit the model; or set --kv-bits 16"
            )
        bits = form.key_bits if dim == 1 else form.value_bits
        scale, minimum = factors_of(low, high, (1 << bits) - 1)
        step = torch.where(scale == 0, torch.ones_like(scale), scale)
        codes = ((plane - minimum) / step).round_().clamp_(0, (1 << bits) - 1).to(torch.uint8)
        codes = torch.nn.functional.pad(codes, (0, missing))
        if dim == 1:
            both = torch.nn.functional.pad(torch.stack((scale, minimum), 2).squeeze(1), (0, missing))
            key_factors.copy_(both.transpose(1, 2))  # [groups, 2, heads, width] -> heads first
            key_codes.copy_(_packed_keys(codes, bits).flatten(2))
        else:
            value_factors.copy_(torch.stack((scale, minimum), 1).squeeze(-1).permute(0, 3, 1, 2))
            value_codes.copy_(_packed_values(codes, bits).flatten(2))


def dequantise_kv(records: Tensor, form: KVFormat, dtype: torch.dtype) -> Tensor:
    """Records uint8 [groups, record_bytes] -> keys and values [2, groups * 64, heads, head_dim] by torch alone, on
    their device: the oracle of the kernels."""
    key_codes, key_factors, value_codes, value_factors = form.split(records)
    keys = _unpacked_keys(key_codes, form).float()  # [groups, heads, 64, width]
    keys = keys * key_factors[:, :, 0, None].float() + key_factors[:, :, 1, None].float()
    values = _unpacked_values(value_codes, form).float()
    values = values * value_factors[:, :, 0, :, None].float() + value_factors[:, :, 1, :, None].float()
    planes = torch.stack((keys, values))[..., : form.head_dim].to(dtype)
    return planes.transpose(2, 3).reshape(2, -1, form.heads, form.head_dim)


# Codes are uint8 [groups, 64, heads, width] -----------------------------------------------------------------


def _packed_keys(codes: Tensor, bits: int) -> Tensor:
    """[groups, heads, ...] in the order of the format."""
    if bits == 8:
        return codes.permute(0, 2, 3, 1)
    parts = codes.unflatten(3, (-1, 2)).unflatten(1, (2, 2, LANES))  # [groups, half, nibble, lane, heads, pair, odd]
    return (parts[:, :, 0] | parts[:, :, 1] << 4).permute(0, 3, 4, 2, 5, 1)


def _unpacked_keys(codes: Tensor, form: KVFormat) -> Tensor:
    """[groups, heads, bytes] -> [groups, heads, 64, width]."""
    if form.key_bits == 8:
        return codes.unflatten(2, (form.width, GROUP_TOKENS)).transpose(2, 3)
    codes = codes.unflatten(2, (form.width // 2, LANES, 2, 2))  # pair, lane, odd, half
    nibbles = torch.stack((codes & 15, codes >> 4), 2)  # [groups, heads, nibble, pair, lane, odd, half]
    return nibbles.permute(0, 1, 6, 2, 4, 3, 5).reshape(*codes.shape[:2], GROUP_TOKENS, form.width)


def _packed_values(codes: Tensor, bits: int) -> Tensor:
    blocks = codes.unflatten(3, (-1, LANES))  # [groups, 64, heads, block, lane]
    if bits == 8:
        return blocks.permute(0, 2, 3, 1, 4)
    parts = blocks.unflatten(1, (8, 2, 2, 2))  # [groups, eight, half, nibble, odd, heads, block, lane]
    return (parts[:, :, :, 0] | parts[:, :, :, 1] << 4).permute(0, 4, 5, 1, 6, 3, 2)


def _unpacked_values(codes: Tensor, form: KVFormat) -> Tensor:
    blocks = form.width // LANES
    if form.value_bits == 8:
        found = codes.unflatten(2, (blocks, GROUP_TOKENS, LANES)).transpose(2, 3)
    else:
        codes = codes.unflatten(2, (blocks, 8, LANES, 2, 2))  # block, eight, lane, odd, half
        nibbles = torch.stack((codes & 15, codes >> 4), 2)  # [groups, heads, nibble, block, eight, lane, odd, half]
        found = nibbles.permute(0, 1, 4, 7, 2, 6, 3, 5)
    return found.reshape(*codes.shape[:2], GROUP_TOKENS, form.width)
