"""The CUDA device. Its code runs here over a stand-in for torch.cuda; what only a GPU can show is marked ``gpu``.

pytest -m gpu          # where there is one: kernels, streams and events, pinned memory, budgets, tokens
"""

from __future__ import annotations

import contextlib
import gc
import time
from types import SimpleNamespace

import numpy
import pytest
import torch
from attention_oracle import make, oracle

from flexrun import LLM, SamplingParams
from flexrun.attention import attend
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError, ConfigError
from flexrun.offload import cuda
from flexrun.offload.cuda import CudaDevice, CudaMemory, PinnedMemory
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.engine import Engine
from flexrun.offload.tiers import MemoryTier
from flexrun.placement import memory_account, place_weights

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20
KV_TOKENS = 300
SLEEP_CYCLES = 200_000_000  # some tenths of a second on any GPU
POLICIES = {
    "all on the GPU": {"weights": Placement(1, 0, 0), "kv": Placement(1, 0, 0)},
    "weights in RAM": {"weights": Placement(0, 1, 0), "kv": Placement(1, 0, 0)},
    "weights on disk, KV copied": {
        "weights": Placement(0, 0, 1),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.0,
        "token_micro_batch": 5,
    },
    "weights on all tiers, KV attended on the CPU": {
        "weights": Placement(0.3, 0.3, 0.4),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 1.0,
    },
    "KV in two places, half attended on the CPU": {
        "weights": Placement(0.5, 0.2, 0.3),
        "kv": Placement(0.34, 0.66, 0),
        "cpu_attention_share": 0.5,
    },
    "half-batches": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.5,
        "half_batches": True,
    },
    "KV split by token": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0.34, 0.66, 0),
        "kv_device_tokens_share": 0.5,
    },
    "KV split by token, in half-batches": {
        "weights": Placement(0.3, 0.7, 0),
        "kv": Placement(0, 1, 0),
        "cpu_attention_share": 0.67,
        "kv_device_tokens_share": 0.7,
        "half_batches": True,
        "token_micro_batch": 5,
    },
    "KV on disk": {"weights": Placement(0, 1, 0), "kv": Placement(0.34, 0, 0.66), "cpu_attention_share": 0.5},
}


def run_engine(packed, make_group, device, device_waits=lambda: 0, **settings):
    """(tokens by request, the closed engine) of a tiny model on ``device``. device_waits: how often the host waited
    for the whole device so far; it must not while passes run."""
    spec, cache = packed("llama")
    policy = Policy(**{"sequences_in_flight": 6, "tokens_per_pass": 16, "attention_micro_batch": 2} | settings)
    placed = place_weights(spec, policy, on_device=True)
    account = memory_account(spec, policy, placed, KV_TOKENS, on_device=True)
    engine = Engine(
        spec,
        cache,
        policy,
        placed,
        account,
        KV_TOKENS,
        cpu_budget_bytes=account.total(Tier.CPU),
        gpu_budget_bytes=account.total(Tier.GPU),
        accelerator=device,
        trace=True,
    )
    groups = [
        make_group([3 + number] * (5 + 9 * (number % 3)), temperature=0, max_tokens=4 + number, ignore_eos=True)
        for number in range(8)
    ]
    before = device_waits()
    try:
        outputs = list(engine.run(iter(groups)))
        assert device_waits() == before
    finally:
        engine.close()
    assert all(tier.used_bytes == 0 for tier in engine.tiers.values())
    numbers = {group.request.request_id: number for number, (group, _) in enumerate(groups)}
    return {numbers[output.request_id]: output.outputs[0].token_ids for output in outputs}, engine


# Over a stand-in: everything is done at once, on the host -----------------------------------------------


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


# On a GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def device():
    opened = CudaDevice(1 << 30)
    yield opened
    opened.close()


class OnGPU:
    pytestmark = on_gpu


class TestKernels(OnGPU):
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("heads", [(8, 8, 64), (8, 2, 128), (6, 2, 80), (4, 2, 256)], ids=str)
    @pytest.mark.parametrize("form", [{}, {"window": 37}, {"softcap": 20.0}], ids=["plain", "window", "softcap"])
    def test_attention_is_that_of_float64(self, dtype, heads, form):
        num_heads, num_kv_heads, head_dim = heads
        query, keys, values, segments = make(
            (1, 1, 9, 1, 64, 1),
            (1, 700, 9, 33, 130, 257),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=dtype,
        )
        expected, expected_lse = oracle(query, keys, values, segments, scale=head_dim**-0.5, **form)
        there = [tensor.cuda() for tensor in (query, keys, values)]
        bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
        out = torch.empty_like(there[0])
        attend(*there, segments, scale=head_dim**-0.5, **form, out=out)
        assert (out.double().cpu() - expected).abs().max() < bound * expected.abs().max()
        lse = torch.empty(query.shape[:2], device="cuda")
        attend(*there, segments, scale=head_dim**-0.5, **form, out=out, lse=lse)
        assert (out.double().cpu() - expected).abs().max() < bound * expected.abs().max()
        assert (lse.double().cpu() - expected_lse).abs().max() < bound * expected_lse.abs().max()


class TestQueues(OnGPU):
    def test_a_copy_from_pinned_memory_does_not_hold_up_the_host(self, device):
        source = MemoryTier(Tier.CPU, None, device.host_memory).allocate("kv", 64 * MIB)
        assert source.data.is_pinned()
        target = torch.empty(64 * MIB, dtype=torch.uint8, device=device.place)
        source.data.fill_(7)
        torch.cuda.synchronize()
        queue = device.queue(Lane.H2D)
        with queue.active():
            torch.cuda._sleep(SLEEP_CYCLES)
            start = time.perf_counter()
            device.copy(target, source.data)
            mark = queue.mark()
            assert time.perf_counter() - start < 0.02 and not mark.query()
        mark.synchronize()
        assert mark.query() and bool((target == 7).all())
        source.close()

    def test_a_queue_waits_for_another_ones_mark(self, device):
        first, second = device.queue(Lane.H2D), device.queue(Lane.GPU)
        value = torch.zeros(1, device=device.place)
        torch.cuda.synchronize()
        with first.active():
            torch.cuda._sleep(SLEEP_CYCLES)
            value += 1
            mark = first.mark()
        second.wait(mark)
        with second.active():
            doubled = value * 2
            behind = second.mark()
        assert not behind.query(), "the host went on"
        behind.synchronize()
        assert doubled.item() == 2

    def test_times_of_marks_are_on_the_clock_of_the_host(self, device):
        queue = device.queue(Lane.GPU)
        torch.cuda.synchronize()
        before = time.perf_counter()
        with queue.active():
            start = queue.mark()
            torch.cuda._sleep(SLEEP_CYCLES)
            end = queue.mark()
        end.synchronize()
        after = time.perf_counter()
        assert before - 0.001 <= queue.seconds_of(start) < queue.seconds_of(end) <= after + 0.001
        assert queue.seconds_of(end) - queue.seconds_of(start) > 0.02

    def test_large_copies_are_bounded(self, device):
        queue = device.queue(Lane.H2D, bulk=True)
        with queue.active():
            start = time.perf_counter()
            torch.cuda._sleep(SLEEP_CYCLES)
            for _ in range(cuda.COPIES_AHEAD):
                queue.bound()
            assert time.perf_counter() - start < 0.02
            queue.bound()  # the first of them must be over now
            assert time.perf_counter() - start > 0.02

    def test_rows_on_the_host_have_arrived(self, device):
        queue = device.queue(Lane.D2H)
        tensors = [torch.zeros(1000, 4, 64, device=device.place) for _ in range(2)]
        torch.cuda.synchronize()
        with queue.active():
            torch.cuda._sleep(SLEEP_CYCLES)
            for number, tensor in enumerate(tensors):
                tensor.fill_(number + 1)
            for _, copies in device.rows_on_host(*tensors):
                assert [bool((copy == number + 1).all()) for number, copy in enumerate(copies)] == [True, True]

    def test_uploads_arrive(self, device):
        queue = device.queue(Lane.GPU)
        with queue.active():
            for length in (3, 5000, 70):
                values = torch.randn(length, 3)
                assert torch.equal(device.upload("table", values).cpu(), values)


class TestMemory(OnGPU):
    def test_pinned_memory_takes_what_it_was_asked_for_and_goes_again(self, device):
        tier = MemoryTier(Tier.CPU, 200 * MIB, device.host_memory)
        buffer = tier.allocate("weights", 130 * MIB)
        assert tier.used_bytes == buffer.nbytes == 130 * MIB and buffer.data.is_pinned()
        address = buffer.data.data_ptr()
        buffer.close()
        assert tier.used_bytes == 0
        again = tier.allocate("weights", 130 * MIB)  # would fail were the old range still registered
        assert again.data.is_pinned() or again.data.data_ptr() != address
        again.close()

    def test_nothing_can_take_more_than_the_budget(self, device):
        tier = MemoryTier(Tier.GPU, 900 * MIB, device.memory)
        held = tier.allocate("kv", 800 * MIB)
        with pytest.raises(BudgetError):
            tier.allocate("kv", 200 * MIB)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(512 * MIB, dtype=torch.uint8, device=device.place)
        held.close()

    def test_an_engine_gives_everything_back(self, packed, make_group):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        run_engine(packed, make_group, CudaDevice(1 << 30), **POLICIES["half-batches"])
        gc.collect()
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - before <= 64 * MIB, "only what libraries keep"


@pytest.mark.usefixtures("matrices_move")
class TestTokens(OnGPU):
    @pytest.mark.parametrize("settings", POLICIES.values(), ids=POLICIES)
    def test_every_policy_gives_those_of_the_emulated_device(self, packed, make_group, settings):
        expected, _ = run_engine(packed, make_group, EmulatedDevice(), **settings)
        found, engine = run_engine(packed, make_group, CudaDevice(1 << 30), **settings)
        assert found == expected
        assert all(event.start_seconds <= event.end_seconds for event in engine.events)

    def test_no_pass_waits_for_the_whole_device(self, packed, make_group, monkeypatch):
        waits, synchronize = [], torch.cuda.synchronize

        def counted(*place):
            waits.append(place)
            synchronize(*place)

        monkeypatch.setattr(torch.cuda, "synchronize", counted)
        settings = POLICIES["KV in two places, half attended on the CPU"]
        run_engine(packed, make_group, CudaDevice(1 << 30), lambda: len(waits), **settings)
        assert waits, "loading and closing do wait"

    def test_the_budget_holds_through_a_run(self, checkpoint, packed_cache):
        budget = 768 * MIB
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_reserved()
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        prompts = [numpy.arange(3, 40).tolist()] * 20
        with LLM(checkpoint("llama"), dtype="float32", device="cuda", gpu_memory=budget, disk_dir=packed_cache) as llm:
            outputs = llm.generate(prompts, params, use_tqdm=False)
            summary = llm.summary()
        assert all(len(output.outputs[0].token_ids) == 12 for output in outputs)
        assert torch.cuda.max_memory_reserved() - before <= budget
        assert summary["tiers"]["gpu"]["peak_bytes"] <= budget - cuda.LIBRARY_BYTES
