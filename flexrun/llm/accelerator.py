"""Which accelerator a run has: none, an emulated one or a CUDA GPU, its budget, and lanes held to a bandwidth."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from flexrun.core import Lane, format_bytes, nearest_name, parse_bytes
from flexrun.errors import ConfigError, UnsupportedError
from flexrun.offload.cuda import LIBRARY_BYTES, CudaDevice, default_budget_bytes, require_cuda
from flexrun.offload.device import EmulatedDevice

ENVIRONMENT_VARIABLE = "FLEXRUN_LANE_BANDWIDTHS"  # for example h2d=2GiB,d2h=2GiB,disk_read=500MB; an argument wins
DISK_LANES = (Lane.DISK_READ, Lane.DISK_WRITE)
LINK_LANES = (Lane.H2D, Lane.D2H)


@dataclass(frozen=True)
class Accelerator:
    """What was asked for, checked. budget_bytes: 0 without an accelerator."""

    is_cuda: bool
    budget_bytes: int
    bytes_per_second: Mapping[Lane, float]

    @classmethod
    def of(
        cls,
        device: str,
        gpu_memory: int | str | None = None,
        lane_bandwidths: Mapping[str, int | str] | None = None,
    ) -> Accelerator:
        """Raises UnsupportedError for a device that is not run, ConfigError for what cannot work on this machine."""
        if device not in ("cpu", "cuda"):
            raise UnsupportedError(
                f"device={device!r} is not run in this version",
                "use device='cuda', or device='cpu', where gpu_memory emulates an accelerator",
            )
        budget_bytes = 0 if gpu_memory is None else parse_bytes(gpu_memory)
        if device == "cuda":
            require_cuda()
            if gpu_memory is None:
                budget_bytes = default_budget_bytes()
            if budget_bytes <= 2 * LIBRARY_BYTES:
                raise ConfigError(
                    f"gpu_memory of {format_bytes(budget_bytes)} is too small: the CUDA libraries alone get "
                    f"{format_bytes(LIBRARY_BYTES)} of it",
                    f"give more than {format_bytes(2 * LIBRARY_BYTES)}, or device='cpu'",
                )
        rates = _bandwidths(lane_bandwidths)
        if not set(rates) <= set(DISK_LANES) and (device == "cuda" or not budget_bytes):
            raise ConfigError(
                "lane_bandwidths of h2d and d2h are for an emulated accelerator",
                "give device='cpu' and gpu_memory, or only disk_read and disk_write",
            )
        return cls(device == "cuda", budget_bytes, rates)

    @property
    def planned_bytes(self) -> int:
        """What a plan may use of the budget."""
        return self.budget_bytes - (LIBRARY_BYTES if self.is_cuda else 0)

    def open(self) -> EmulatedDevice:
        return CudaDevice(self.budget_bytes) if self.is_cuda else EmulatedDevice()


def _bandwidths(given: Mapping[str, int | str] | None) -> dict[Lane, float]:
    """Bytes a second by lane, from the argument or else from the environment."""
    if given is None:
        pairs = [pair.partition("=") for pair in os.environ.get(ENVIRONMENT_VARIABLE, "").split(",") if pair.strip()]
        given = {name.strip(): rate for name, _, rate in pairs}
    known = {lane.value: lane for lane in (*LINK_LANES, *DISK_LANES)}
    rates = {}
    for name, rate in given.items():
        if name not in known:
            raise ConfigError(f"lane_bandwidths: no lane {name!r} moves bytes", nearest_name(name, known))
        rates[known[name]] = float(parse_bytes(rate))
        if not rates[known[name]]:
            raise ConfigError(f"lane_bandwidths: {name} needs more than 0 bytes a second", "leave it out for no limit")
    return rates
