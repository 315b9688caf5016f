"""What only a GPU can show of the CUDA device: kernels, streams and events, pinned memory, budgets, tokens.

pytest -m gpu          # where there is one
"""

from __future__ import annotations

import gc
import time

import numpy
import pytest
import torch
from attention_oracle import make, oracle
from small_engine import POLICIES, run_engine

from flexrun import LLM, SamplingParams
from flexrun.attention import attend
from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError
from flexrun.offload import cuda
from flexrun.offload.cuda import CudaDevice
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.tiers import MemoryTier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
MIB = 1 << 20
SLEEP_CYCLES = 200_000_000  # some tenths of a second on any GPU


@pytest.fixture
def device():
    opened = CudaDevice(1 << 30)
    yield opened
    opened.close()


class TestKernels:
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


class TestQueues:
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


class TestMemory:
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
class TestTokens:
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
