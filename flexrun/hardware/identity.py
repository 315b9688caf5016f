"""Which machine this is: its names, its caches, and a fingerprint that tells whether a saved profile is of it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from flexrun import native
from flexrun.machine import available_cores

METHOD = 8  # raised when profiles are measured in another way, so that saved ones are measured again
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_ASSUMED_CACHE_BYTES = 32 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown CPU"


def gpu_name() -> str | None:
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def machine_name() -> str:
    cores = f"{available_cores()} cores"
    return ", ".join(filter(None, (cpu_name(), cores, gpu_name())))


def fingerprint() -> str:
    """What a measurement depends on and that may change behind a saved file."""
    parts = (
        cpu_name(),
        f"{available_cores()} cores",
        gpu_name() or "no GPU",
        f"torch {torch.__version__}",
        f"native {native.instruction_set}",
        f"method {METHOD}",
    )
    return "; ".join(parts)


def cpu_cache_bytes(folder: Path = _CACHES) -> int:
    """The largest cache of a core, shared or not; an assumption where the system does not say."""
    sizes = []
    for entry in folder.glob("index*/size"):
        try:
            text = entry.read_text().strip()
            sizes.append(int(text.rstrip("KMG")) * _UNITS.get(text[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes, default=_ASSUMED_CACHE_BYTES)
