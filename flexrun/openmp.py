"""Imports torch so that its threads do not burn the cores that other work of the machine, or our own lanes, could use.

At the end of every parallel operation GNU's OpenMP lets a thread spin for the others, by default through 300,000 rounds
or some 10 ms. Where one of the cores is busy with something else, the thread that is waited for stands still behind
another that only spins: a matmul of 8 rows then took 8 ms instead of 0.15. Threads that sleep at once cost 5 to 20 % on
a quiet machine. The rounds are read once, when the library is loaded.
"""

from __future__ import annotations

import os
import sys

ROUNDS = 2000
_RULED_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what the environment says comes first


def import_torch() -> None:
    """For whoever comes first: without effect once torch is there. The environment stays as it was."""
    if "torch" in sys.modules or any(name in os.environ for name in _RULED_BY):
        return
    os.environ[_RULED_BY[0]] = str(ROUNDS)
    try:
        import torch  # noqa: F401
    finally:
        del os.environ[_RULED_BY[0]]
