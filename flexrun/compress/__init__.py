"""Compressed matrices: the format, which tensors take it, and what multiplies by them."""

from flexrun.compress.bits import WeightBits, can_compress
from flexrun.compress.groupwise import GroupFormat, quantise
from flexrun.compress.kv_groups import GROUP_TOKENS, KVFormat, dequantise_kv, quantise_kv
from flexrun.compress.matrix import DEQUANTISE_BYTES, GroupwiseMatrix

__all__ = [
    "DEQUANTISE_BYTES",
    "GROUP_TOKENS",
    "GroupFormat",
    "GroupwiseMatrix",
    "KVFormat",
    "WeightBits",
    "can_compress",
    "dequantise_kv",
    "quantise",
    "quantise_kv",
]
