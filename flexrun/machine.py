"""What this machine offers a process: cores and RAM, as limited by the control group it runs in, and disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

_UNLIMITED_BYTES = 1 << 60  # control groups spell "no limit" as a huge number


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def available_memory_bytes() -> int:
    """RAM a new allocation can count on: free memory of the host, or what the control group still allows."""
    available = psutil.virtual_memory().available
    return min([available, *_control_group_rooms_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def free_disk_bytes(folder: str | Path) -> int:
    """Bytes free for a folder that may not be there yet."""
    folder = Path(folder).absolute()
    return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


def peak_resident_bytes() -> int:
    """Largest resident set this process ever had."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _control_group_rooms_bytes(membership: Path, mount: Path) -> list[int]:
    """What each limited control group around this process still allows, page cache counted as free.

    membership: /proc/self/cgroup. mount: where the hierarchies (v2, or v1's one a controller) are mounted. In a
    container the mount is the container's own group, so a path that is not there is looked for at the root.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            roots, names = (mount, mount / "unified"), ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            roots, names = (mount / "memory",), ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
        else:
            continue
        group = Path(path.lstrip("/"))
        folders = [root / folder for root in roots for folder in (group, *group.parents)]
        rooms += [room for folder in dict.fromkeys(folders) if (room := _room_bytes(folder, *names)) is not None]
    return rooms


def _room_bytes(folder: Path, limit_file: str, usage_file: str, cache_key: str) -> int | None:
    """Bytes a group may still take; None where it has no limit or is not there."""
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / usage_file).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= _UNLIMITED_BYTES:
        return None
    return max(int(limit) - max(used - int(statistics.get(cache_key, 0)), 0), 0)
