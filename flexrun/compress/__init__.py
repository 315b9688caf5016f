"""Compressed matrices: the format, which tensors take it, and what multiplies by them."""

from flexrun.compress.bits import WeightBits, can_compress
from flexrun.compress.groupwise import GroupFormat, quantise
from flexrun.compress.matrix import DEQUANTISE_BYTES, GroupwiseMatrix

__all__ = ["DEQUANTISE_BYTES", "GroupFormat", "GroupwiseMatrix", "WeightBits", "can_compress", "quantise"]
