"""Randomness that belongs to a request: a number is a function of (seed, choice, step), never of a shared state.

A generator with state would make a text depend on who else was in the batch. Here a draw is a hash of its own
coordinates, so a request gives the same text alone, in any batch, on any device, and after a resume.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_SEED_MASK = 2**64 - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def resolve_seed(seed: int | None, job_seed: int, request_key: str) -> int:
    """The 64-bit seed of a request: its own, or one derived from the job's seed and the request's id.

    The derivation is a cryptographic hash, so it is the same in every process and on every machine.
    """
    if seed is not None:
        return seed & _SEED_MASK
    digest = hashlib.blake2b(f"{job_seed}\0{request_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def uniforms(seeds: Sequence[int], choices: Sequence[int], steps: Sequence[int]) -> np.ndarray:
    """float64 [rows] in [0, 1), 53 bits each, from the coordinates (seed, choice, step) of each row.

    Three chained rounds of the SplitMix64 finaliser (Steele, Lea & Flood 2014), one a coordinate.
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    for coordinate in (seeds, choices, steps):
        state = _mix((state ^ np.array(coordinate, dtype=np.uint64)) + _GOLDEN)
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
