"""Attention over ragged sequences: one signature whatever executes it, so that callers never know."""

from flexrun.attention.host import attend
from flexrun.attention.segments import Segments

__all__ = ["Segments", "attend"]
