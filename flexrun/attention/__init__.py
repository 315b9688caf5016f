"""Attention over ragged sequences: one signature whatever executes it, so that callers never know."""

from flexrun.attention.device import prepare
from flexrun.attention.host import attend
from flexrun.attention.merge import KVPart, attend_split, merge
from flexrun.attention.segments import Segments

__all__ = ["KVPart", "Segments", "attend", "attend_split", "merge", "prepare"]
