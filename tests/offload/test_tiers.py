"""A tier never holds more than its budget, and says so before it allocates."""

from __future__ import annotations

import mmap

import pytest
import torch

from flexrun.core import PAGE_BYTES, Tier
from flexrun.errors import BudgetError
from flexrun.offload.tiers import Buffer, MemoryTier


def test_a_reservation_over_the_budget_raises_and_holds_nothing():
    tier = MemoryTier(Tier.CPU, 1000)
    tier.reserve("kv", 600)
    with pytest.raises(BudgetError, match="cpu tier: weights needs 401 B, but 600 B of its 1000 B") as error:
        tier.reserve("weights", 401)
    assert "--cpu-memory" in error.value.hint
    assert (tier.used_bytes, tier.peak_bytes, tier.used_by_kind) == (600, 600, {"kv": 600})
    tier.reserve("weights", 400)
    assert tier.used_bytes == 1000


def test_the_peak_outlives_what_is_released():
    tier = MemoryTier(Tier.GPU, 1000)
    tier.reserve("kv", 700)
    tier.release("kv", 700)
    tier.reserve("weights", 100)
    assert (tier.used_bytes, tier.peak_bytes) == (100, 700)


def test_without_a_limit_all_is_counted():
    tier = MemoryTier(Tier.CPU, None)
    tier.reserve("kv", 1 << 50)
    assert tier.peak_bytes == 1 << 50


def test_memory_is_taken_only_after_the_budget_agrees(monkeypatch):
    asked = []
    real = mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *args, **options: asked.append(args) or real(*args, **options))
    tier = MemoryTier(Tier.CPU, 2 * PAGE_BYTES)
    with pytest.raises(BudgetError):
        tier.allocate("ring", 2 * PAGE_BYTES + 1)
    assert asked == []
    tier.allocate("ring", 2 * PAGE_BYTES).close()
    assert len(asked) == 1


@pytest.mark.parametrize("touch", [False, True])
@pytest.mark.parametrize("nbytes", [0, 1, PAGE_BYTES, PAGE_BYTES + 1, 5 << 20])
def test_buffers_are_page_aligned_zeroed_and_counted_in_whole_pages(nbytes, touch):
    tier = MemoryTier(Tier.CPU, None)
    buffer = tier.allocate("ring", nbytes, touch=touch)
    assert buffer.data.data_ptr() % PAGE_BYTES == 0
    assert buffer.nbytes % PAGE_BYTES == 0
    assert max(nbytes, 1) <= buffer.nbytes < max(nbytes, 1) + PAGE_BYTES
    assert tier.used_bytes == buffer.nbytes == buffer.data.numel()
    assert not buffer.data.any()
    buffer.close()
    buffer.close()
    assert tier.used_bytes == 0


def test_touching_works_on_kernels_that_cannot_populate(monkeypatch):
    class OldKernelMap(mmap.mmap):
        def madvise(self, *args):
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", OldKernelMap)
    buffer = MemoryTier(Tier.CPU, None).allocate("kv", 3 * PAGE_BYTES, touch=True)
    assert not buffer.data.any()


def test_a_view_shares_the_bytes_and_keeps_them_alive():
    buffer = MemoryTier(Tier.CPU, None).allocate("weights", PAGE_BYTES)
    view = buffer.view(16, (2, 3), torch.float32)
    view.fill_(1.5)
    assert buffer.data[16:40].view(torch.float32).tolist() == [1.5] * 6
    buffer.close()
    assert view.tolist() == [[1.5] * 3] * 2


def test_scratch_is_outside_every_budget():
    buffer = Buffer.outside_budget(10)
    assert buffer.nbytes == PAGE_BYTES
    buffer.close()
