"""Which machine to plan for: the one that is named, or this one, measured once and remembered."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch

from flexrun.errors import ConfigError, FlexrunError
from flexrun.hardware import Hardware
from flexrun.hardware.saved import profile_path, saved_profile
from flexrun.machine import available_cores
from flexrun.weights.catalog import default_cache_dir

ENVIRONMENT_VARIABLE = "FLEXRUN_HARDWARE"  # path of a hardware document, in place of this machine's own profile


def use_threads(threads: int | None) -> None:
    """Compute with so many threads; None or 0 is one a core. Raises ConfigError below that."""
    if threads is not None and threads < 0:
        raise ConfigError(f"threads={threads} must be at least 1", "leave it out for one a core")
    torch.set_num_threads(threads or available_cores())


def settle_hardware(
    hardware: Hardware | str | Path | None = None,
    cache_dir: str | Path | None = None,
    disk_dir: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> Hardware:
    """The hardware to plan for; measures this machine quickly (some seconds) where no profile of it is saved.

    disk_dir: folder that weights will be streamed from. say: told before and after measuring.
    Raises ConfigError for a document that cannot be read.
    """
    hardware = hardware or os.environ.get(ENVIRONMENT_VARIABLE)
    if hardware:
        return hardware if isinstance(hardware, Hardware) else Hardware.load(hardware)
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    disk = Path(disk_dir) if disk_dir is not None else folder
    saved = saved_profile(folder, disk)
    if saved is not None:
        return saved
    say = say or (lambda text: None)
    say("measuring this machine once, a few seconds; flexrun profile measures it more exactly")
    measured = Hardware.measure(disk, quick=True)
    if measured.disturbed:
        say("warning: other programs were busy meanwhile, so this profile is not kept; run flexrun profile later")
        return measured
    try:
        measured.save(profile_path(folder))
    except (OSError, FlexrunError) as error:
        say(f"warning: the profile cannot be kept, so the next run measures again: {error}")
    return measured


def with_device(hardware: Hardware, is_cuda: bool, say: Callable[[str], None]) -> Hardware:
    """The hardware without a GPU unless one is used (``is_cuda``); ``say`` is told where the one used is not known."""
    if is_cuda:
        if hardware.gpu is None:
            say("warning: the hardware profile knows no GPU, so the plan is poor; run flexrun profile")
    elif hardware.gpu is not None:
        return dataclasses.replace(hardware, gpu=None, h2d=None, d2h=None)
    return hardware
