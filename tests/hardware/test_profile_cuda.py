"""The GPU's part of a measurement over a stand-in for CUDA: what is read, and how it is put together."""

import contextlib
import time
from types import SimpleNamespace

import pytest
import torch

from flexrun.hardware import Hardware, profile_cuda
from flexrun.hardware.effort import Bench


class Event:
    """A CUDA event on a device that does everything at once."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return (end.seconds - self.seconds) * 1000


@pytest.fixture
def cuda(monkeypatch):
    """torch.cuda with one GPU whose memory is the host's; says how often its unused memory was handed back."""
    cuda = SimpleNamespace(emptied=0)

    def empty_cache():
        cuda.emptied += 1

    stand_ins = {
        "is_available": lambda: True,
        "Event": Event,
        "Stream": lambda: SimpleNamespace(synchronize=lambda: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "get_device_properties": lambda index: SimpleNamespace(L2_cache_size=1 << 20),
        "get_device_name": lambda index: "Stand-in",
        "mem_get_info": lambda index: (8 << 30, 16 << 30),
        "empty_cache": empty_cache,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(profile_cuda, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(profile_cuda, "_pinned_bytes", lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    return cuda


def test_a_gpu_is_measured_beside_the_cpu(cuda, tiny_effort, tmp_path):
    hardware = Hardware.measure(tmp_path, effort=tiny_effort, dtypes=("float32",))
    assert set(hardware.gpu.rates) == set(hardware.cpu.rates) == {"float32"}
    assert "Stand-in" in hardware.name and "Stand-in" in hardware.fingerprint
    assert hardware.gpu_memory_bytes == 8 << 30 and cuda.emptied == 2
    assert hardware.h2d.bytes_per_second > 1e6 and hardware.d2h.bytes_per_second > 1e6
    assert {"h2d", "d2h", "gpu matmul float32", "cpu matmul float32", "gpu decode attention float32"} <= set(
        hardware.noise
    )
    assert set(hardware.contention) == {"host_attention", "h2d", "disk_read"}


@pytest.mark.parametrize("one, both, share", [(1.0, 2.0, 0.5), (1.0, 1.0, 1.0), (1.0, 0.5, 1.0)])
def test_the_duplex_share_compares_one_direction_with_both(cuda, tiny_effort, monkeypatch, one, both, share):
    copies = []

    class Part:
        def copy_(self, source, non_blocking):
            assert non_blocking
            copies.append(source)

    def clock(call):
        copies.clear()
        call()
        return one if len(copies) == 1 else both

    monkeypatch.setattr(profile_cuda, "_synchronised_clock", clock)
    pairs = (("up", Part()), ("down", Part()))
    assert profile_cuda._duplex_share(Bench(tiny_effort), *pairs) == pytest.approx(share)


def test_the_clock_counts_milliseconds(cuda):
    assert 0.01 < profile_cuda.cuda_clock(lambda: time.sleep(0.02)) < 0.2
