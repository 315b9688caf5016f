"""What this machine offers a process: cores and RAM, as limited by the control group it runs in."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_UNLIMITED_BYTES = 1 << 60  # control groups spell "no limit" as a huge number


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int:
    """RAM a new allocation can count on: free memory of the host, or what the control group still allows."""
    available = psutil.virtual_memory().available
    limit, used = _control_group_memory_bytes()
    return min(available, max(limit - used, 0)) if limit < _UNLIMITED_BYTES else available


def peak_resident_bytes() -> int:
    """Largest resident set this process ever had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _control_group_memory_bytes() -> tuple[int, int]:
    """(limit, used without page cache) of this process's control group, v2 or v1; no limit: (2^62, 0)."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return 1 << 62, 0
    for line in lines:
        _, controllers, path = line.split(":", 2)
        relative = path.lstrip("/")
        if controllers == "":
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/unified"):
                found = _read_limit(Path(root) / relative, "memory.max", "memory.current", "file")
                if found:
                    return found
        elif "memory" in controllers.split(","):
            root = Path("/sys/fs/cgroup/memory")
            found = _read_limit(root / relative, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
            if found:
                return found
    return 1 << 62, 0


def _read_limit(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> tuple[int, int] | None:
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED_BYTES:
        return None
    return int(limit), max(used - int(statistics.get(cache_key, 0)), 0)
