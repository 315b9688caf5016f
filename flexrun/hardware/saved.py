"""The profile of this machine that ``flexrun profile`` or a first run left in the cache folder."""

from __future__ import annotations

from pathlib import Path

from flexrun.errors import ConfigError
from flexrun.hardware.hardware import Hardware
from flexrun.hardware.identity import fingerprint


def profile_path(cache_dir: str | Path) -> Path:
    return Path(cache_dir) / "hardware.json"


def saved_profile(cache_dir: str | Path, disk_dir: str | Path | None = None) -> Hardware | None:
    """The saved profile, or None where there is none that can be used.

    That is: none was saved, it is of another machine or other software, or cannot be read, or (with ``disk_dir``, the
    folder that weights will be streamed from) its disk is another one.
    """
    try:
        hardware = Hardware.load(profile_path(cache_dir))
    except ConfigError:  # absent, or of a version with other fields: measured again like any outdated one
        return None
    if hardware.fingerprint != fingerprint():
        return None
    if disk_dir is not None and not _on_one_disk(Path(disk_dir), Path(hardware.disk_folder)):
        return None
    return hardware


def _on_one_disk(first: Path, second: Path) -> bool:
    return _device(first) == _device(second)


def _device(folder: Path) -> int:
    """Of the folder, or of the nearest one above it that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder.stat().st_dev
