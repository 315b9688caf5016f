"""The code of the CUDA device over a stand-in for torch.cuda: everything is done at once, on the host."""

from __future__ import annotations

import contextlib
import gc
import time
from types import SimpleNamespace

import pytest
import torch
from small_engine import POLICIES, run_engine

from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError, ConfigError
from flexrun.offload import cuda
from flexrun.offload.cuda import CudaDevice, CudaMemory, PinnedMemory
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.tiers import MemoryTier

MIB = 1 << 20


class HostEvent:
    def __init__(self, enable_timing=False, blocking=False):
        self.seconds = None

    def record(self, stream=None):
        self.seconds = time.perf_counter()

    def query(self):
        return self.seconds is not None

    def synchronize(self):
        assert self.seconds is not None, "waits for an event that was never recorded"

    def elapsed_time(self, end):
        return 1000 * (end.seconds - self.seconds)


class HostStream:
    def __init__(self, device=None):
        self.waited = []

    def wait_event(self, event):
        event.synchronize()
        self.waited.append(event)


class StandInDevice(CudaDevice):
    """Its tensors are on the host, though it says that they are not."""

    is_separate = True

    def __init__(self, budget_bytes):
        super().__init__(budget_bytes)
        self.place = torch.device("cpu")
        self.memory = CudaMemory(self.place)


@pytest.fixture
def stand_in(monkeypatch):
    """torch.cuda with one GPU of 16 GiB, 12 of them free. registered: host ranges pinned at the moment."""
    state = SimpleNamespace(registered={}, fractions=[], synchronised=0, refuse_bytes=None)

    def register(address, nbytes, flags):
        if state.refuse_bytes is not None and nbytes >= state.refuse_bytes:
            return 2
        assert address not in state.registered and flags == 0
        state.registered[address] = nbytes
        return 0

    def unregister(address):
        del state.registered[address]
        return 0

    def synchronize(place=None):
        state.synchronised += 1

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "Event": HostEvent,
        "Stream": HostStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "synchronize": synchronize,
        "empty_cache": lambda: None,
        "mem_get_info": lambda place=None: (12 << 30, 16 << 30),
        "set_per_process_memory_fraction": lambda share, place: state.fractions.append(share),
        "cudart": lambda: runtime,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


@pytest.mark.usefixtures("matrices_move")
@pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
def test_a_run_gives_the_same_tokens_and_everything_back(stand_in, packed, make_group, settings):
    expected, _ = run_engine(packed, make_group, EmulatedDevice(), **settings)
    device = StandInDevice(8 << 30)
    found, engine = run_engine(packed, make_group, device, lambda: stand_in.synchronised, **settings)
    assert found == expected
    assert stand_in.registered == {}, "host pages stay pinned"
    assert stand_in.fractions == [0.5, 1.0]
    assert engine.lane_statistics()["gpu"]["busy_seconds"] > 0
    assert all(event.start_seconds <= event.end_seconds for event in engine.events)


def test_host_memory_is_pinned_to_the_byte(stand_in):
    tier = MemoryTier(Tier.CPU, 10 * MIB, PinnedMemory())
    buffer = tier.allocate("weights", 5 * MIB + 1)
    assert list(stand_in.registered.values()) == [5 * MIB + 4096] == [tier.used_bytes]
    assert buffer.data.data_ptr() in stand_in.registered
    buffer.close()
    assert stand_in.registered == {} and tier.used_bytes == 0


def test_large_host_memory_is_pinned_in_pieces(stand_in, monkeypatch):
    monkeypatch.setattr(cuda, "REGISTER_BYTES", 2 * MIB)
    pages = PinnedMemory().take(5 * MIB, True)
    assert sorted(stand_in.registered.values()) == [1 * MIB, 2 * MIB, 2 * MIB]
    del pages
    gc.collect()
    assert stand_in.registered == {}, "pages that an engine left behind are unpinned before they go"


def test_pinning_that_is_refused_names_the_budget(stand_in, monkeypatch):
    monkeypatch.setattr(cuda, "REGISTER_BYTES", 2 * MIB)
    stand_in.refuse_bytes = 2 * MIB
    tier = MemoryTier(Tier.CPU, 10 * MIB, PinnedMemory())
    with pytest.raises(BudgetError, match="cudaHostRegister"):
        tier.allocate("kv", 5 * MIB)
    assert tier.used_bytes == 0 and stand_in.registered == {}


def test_a_budget_beyond_what_is_free_is_refused(stand_in):
    with pytest.raises(BudgetError, match=r"has 12\.0 GiB free"):
        CudaDevice(13 << 30)
    assert stand_in.fractions == []


def test_tables_grow_and_keep_their_pinned_memory(stand_in):
    device = StandInDevice(1 << 30)
    for length in (3, 5, 5000, 10):
        values = torch.arange(length)
        assert torch.equal(device.upload("rows", values), values)
    assert len(stand_in.registered) == 1
    empty = device.upload("none", torch.empty(0, 4, dtype=torch.int64))
    assert empty.shape == (0, 4)
    device.close()
    assert stand_in.registered == {}


def test_rows_come_down_in_pieces_of_the_scratch_memory(stand_in, monkeypatch):
    monkeypatch.setattr(cuda, "SCRATCH_BYTES", 8192)
    device = StandInDevice(1 << 30)
    tensors = torch.randn(2, 100, 3, 8).unbind()
    found = [torch.zeros(100, 3, 8) for _ in tensors]
    pieces = 0
    for rows, copies in device.rows_on_host(*tensors):
        pieces += 1
        for target, copy in zip(found, copies):
            target[rows] = copy
    assert pieces == 3 and all(map(torch.equal, found, tensors))
    device.close()


def test_the_host_runs_only_so_far_ahead(stand_in):
    device = StandInDevice(1 << 30)
    bulk, small = device.queue(Lane.H2D, bulk=True), device.queue(Lane.H2D)
    assert bulk is not small and device.queue(Lane.H2D) is small and device.queue(Lane.DISK_READ) is None
    for _ in range(5):
        bulk.bound()
        small.bound()
    assert len(bulk._bounds) == cuda.COPIES_AHEAD and not small._bounds
    device.close()


def test_without_a_gpu_there_is_no_device():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        CudaDevice(1 << 30)
