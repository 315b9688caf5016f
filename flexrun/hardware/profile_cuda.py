"""Times a CUDA GPU and its links, on CUDA events, so that launches overlap as they do in a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from flexrun.hardware.effort import Bench
from flexrun.hardware.profile_lanes import fit_readings
from flexrun.hardware.rates import Transfer

WARM_UP = 4  # libraries choose their kernels in the first calls


def cuda_clock(call: Callable[[], object]) -> float:
    """Seconds from the first to the last thing ``call`` puts on the current stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def cuda_bench(bench: Bench) -> Bench:
    """The same effort on the GPU."""
    properties = torch.cuda.get_device_properties(0)
    return replace(
        bench,
        label="gpu",
        device=_device(),
        stopwatch=cuda_clock,
        warm_up=WARM_UP,
        cache_bytes=getattr(properties, "L2_cache_size", 0),
    )


def free_memory_bytes() -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(0)[0]


def links(bench: Bench) -> dict:
    """h2d, d2h: (transfer, misfit, spread) with pinned memory, and duplex_share."""
    bench.advance("links")
    nbytes = max(bench.effort.link_sizes)
    host, device = _pinned_bytes(nbytes), _device_bytes(nbytes)
    back, source = _pinned_bytes(nbytes), _device_bytes(nbytes)
    return {
        "h2d": _link(bench, host, device),
        "d2h": _link(bench, source, back),
        "duplex_share": _duplex_share(bench, (host, device), (source, back)),
    }


def _device() -> torch.device:
    return torch.device("cuda", 0)


def _device_bytes(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, device=_device())


def _pinned_bytes(nbytes: int) -> Tensor:
    return torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)


def _link(bench: Bench, source: Tensor, target: Tensor) -> tuple[Transfer, float, float]:
    sizes = bench.effort.link_sizes
    calls = [partial(target[:size].copy_, source[:size], non_blocking=True) for size in sizes]
    return fit_readings(sizes, bench.read_all(calls))


def _duplex_share(bench: Bench, *pairs: tuple[Tensor, Tensor]) -> float:
    """Speed each direction keeps while both run, averaged over the two."""
    streams = [torch.cuda.Stream() for _ in pairs]

    def copy(*places: int) -> float:
        def run() -> None:
            for place in places:
                source, target = pairs[place]
                with torch.cuda.stream(streams[place]):
                    target.copy_(source, non_blocking=True)
            for place in places:
                streams[place].synchronize()

        return bench.read_all([run], stopwatch=_synchronised_clock)[0].seconds

    both = copy(0, 1)
    return min((copy(0) + copy(1)) / (2 * both), 1.0)


def _synchronised_clock(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start_seconds = time.perf_counter()
    call()
    return time.perf_counter() - start_seconds


def link_call(nbytes: int) -> Callable[[], object]:
    """Copies pinned memory to the GPU on a stream of its own and waits for it, for use on any thread."""
    host, device = _pinned_bytes(nbytes), _device_bytes(nbytes)
    stream = torch.cuda.Stream()

    def copy() -> None:
        with torch.cuda.stream(stream):
            device.copy_(host, non_blocking=True)
        stream.synchronize()

    return copy
