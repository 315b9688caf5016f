"""Token runs never overlap, freed ones merge, and slabs are where their micro-batch lives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError
from flexrun.offload.kv_store import KVStore, TokenSpace
from flexrun.offload.tiers import MemoryTier
from flexrun.placement import KVMicroBatch


def first_fit(bitmap: list[bool], tokens: int) -> int | None:
    return next((start for start in range(len(bitmap) - tokens + 1) if not any(bitmap[start : start + tokens])), None)


@settings(deadline=None, derandomize=True, max_examples=300)
@given(st.integers(0, 40), st.lists(st.tuples(st.booleans(), st.integers(1, 15)), max_size=60))
def test_token_space_does_what_a_bitmap_does(capacity, actions):
    space, bitmap, held = TokenSpace(capacity), [False] * capacity, []
    for is_release, number in actions:
        if is_release and held:
            start, tokens = held.pop(number % len(held))
            space.release(start, tokens)
            bitmap[start : start + tokens] = [False] * tokens
        elif not is_release:
            start = space.allocate(number)
            assert start == first_fit(bitmap, number)
            if start is not None:
                bitmap[start : start + number] = [True] * number
                held.append((start, number))
        assert space.free_tokens == bitmap.count(False)
        edges = [edge for run in space._free for edge in run]
        assert edges == sorted(set(edges)), "free runs are sorted, apart and not empty"
    for start, tokens in held:
        space.release(start, tokens)
    assert space._free == ([(0, capacity)] if capacity else [])


@pytest.fixture
def store(packed):
    """store(*micro-batches) -> (KVStore of the tiny llama, host tier, device tier)."""
    made = []

    def make(*places: KVMicroBatch, limit: int | None = None):
        host, device = MemoryTier(Tier.CPU, limit), MemoryTier(Tier.GPU, limit)
        made.append(KVStore(packed("llama")[0], places, host, device))
        return made[-1], host, device

    yield make
    for kv in made:
        kv.close()


ON_GPU = KVMicroBatch(Tier.GPU, 30, Lane.GPU)
ON_HOST = KVMicroBatch(Tier.CPU, 30, Lane.CPU)
STAGED = KVMicroBatch(Tier.CPU, 30, Lane.GPU)


def test_sequences_go_to_the_emptiest_micro_batch_that_has_room(store):
    kv, _, _ = store(ON_HOST, ON_HOST)
    regions = [kv.allocate(12, 2) for _ in range(4)]
    assert [region.micro_batch for region in regions] == [0, 1, 0, 1]
    assert [region.start for region in regions] == [0, 0, 12, 12]
    assert kv.allocate(1, 2) is None, "both hold the most sequences they may"
    assert kv.allocate(7, 3) is None, "no run is long enough"
    assert kv.allocate(6, 3).start == 24
    kv.release(regions[3])
    assert kv.allocate(12, 2).micro_batch == 1
    assert kv.largest_sequence_tokens == 30


def test_slabs_are_apart_and_writable(store):
    kv, _, _ = store(ON_GPU, ON_HOST, STAGED)
    spec = kv._spec
    slabs = [kv.slab(layer, index) for layer in range(spec.num_layers) for index in range(3)]
    slabs += [kv.staging(0, 2), kv.staging(1, 2)]
    for number, slab in enumerate(slabs):
        assert slab.shape == (2, 30, spec.num_kv_heads, spec.head_dim)
        assert slab.is_contiguous()
        slab.fill_(number)
    assert all(torch.all(slab == number) for number, slab in enumerate(slabs))


def test_each_slab_counts_on_its_home_tier(store):
    kv, host, device = store(ON_GPU, ON_HOST, STAGED)
    assert set(host.used_by_kind) == {"kv"}
    assert set(device.used_by_kind) == {"kv", "kv_staging"}
    assert host.used_bytes == 2 * device.used_by_kind["kv"]
    kv.close()
    assert host.used_bytes == device.used_bytes == 0


def test_a_budget_too_small_for_the_cache_raises(store):
    with pytest.raises(BudgetError, match="kv needs"):
        store(ON_HOST, limit=4096)
