"""What writing rows of KV to disk takes beside their bytes: a request whenever those of a sequence fill a block."""

from __future__ import annotations

from flexrun.models.spec import ModelSpec
from flexrun.placement import kv_block_bytes

BLOCK_WRITE_SECONDS = 25e-6  # several requests being under way at once


def row_write_seconds(spec: ModelSpec, kv_bytes: float) -> float:
    """Of one decoding sequence and layer, whose row has ``kv_bytes``, in the mean over many passes."""
    return BLOCK_WRITE_SECONDS * min(kv_bytes / kv_block_bytes(spec), 1.0)
