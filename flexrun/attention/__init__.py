"""Attention over ragged sequences: one signature whatever executes it, so that callers never know."""

from flexrun.attention.device import prepare
from flexrun.attention.host import attend
from flexrun.attention.latent import LATENT_BUFFERS, LATENT_BYTES, attend_latent
from flexrun.attention.merge import KVPart, attend_split, merge
from flexrun.attention.segments import Segments

__all__ = [
    "LATENT_BUFFERS",
    "LATENT_BYTES",
    "KVPart",
    "Segments",
    "attend",
    "attend_latent",
    "attend_split",
    "merge",
    "prepare",
]
