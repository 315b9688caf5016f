"""The account of what is planned but not run yet: fewer bits, KV on disk, hidden rows elsewhere, latent caches."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import planned

from flexrun.config import Placement, Policy
from flexrun.core import PAGE_BYTES, Lane, Tier, align_up
from flexrun.placement import (
    KV_SLOTS,
    KVMicroBatch,
    compressed_bytes,
    device_row_bytes,
    kv_block_bytes,
    kv_bytes_per_token,
    kv_micro_batches,
    kv_room,
    kv_scratch_bytes,
    memory_account,
    offloaded_query_bytes,
    part_tokens,
    pass_row_bytes,
    place_weights,
    workspace_bytes,
)
from flexrun.placement.memory import hidden_rows_elsewhere, host_kv_slots

SPEC = planned("llama")
POLICY = Policy(sequences_in_flight=8, attention_micro_batch=2, tokens_per_pass=1000, token_micro_batch=100)
KV_TOKENS = 800


def account(policy: Policy, on_device: bool = False, spec=SPEC):
    return memory_account(
        spec, policy, place_weights(spec, policy, on_device=on_device), KV_TOKENS, on_device=on_device
    )


# Bits --------------------------------------------------------------------------------------------------


def test_a_group_of_64_elements_shares_its_scale_and_its_minimum():
    assert compressed_bytes(64, 4) == 32 + 4
    assert compressed_bytes(65, 4) == 32 + 8
    assert compressed_bytes(6400, 8) == 6400 + 400


@pytest.mark.parametrize("bits, share", [(16, 1.0), (8, 0.5 + 1 / 32), (4, 0.25 + 1 / 32)])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek"])
def test_matrices_take_their_bits_and_the_embedding_stays(bits, share, name):
    spec = planned(name)
    placed = place_weights(spec, Policy(weight_bits=bits), on_device=False)
    for item in placed.tensors:
        full = item.tensor.elements * spec.dtype_bytes
        name, module = item.tensor.name, item.tensor.module
        stays = len(item.tensor.shape) < 2 or module == "embedding" or "router" in name or name == "kv_b.weight"
        if stays or bits == 16:
            assert item.nbytes == full and item.form is None
        else:
            assert item.nbytes == pytest.approx(share * full, rel=1e-3)
    assert placed.stored_bytes == sum(align_up(item.nbytes) for item in placed.tensors)


@pytest.mark.parametrize("bits, share", [(8, 0.5 + 1 / 32), (4, 0.25 + 1 / 32)])
def test_the_cache_takes_its_bits(bits, share):
    assert kv_bytes_per_token(SPEC, bits) == pytest.approx(share * kv_bytes_per_token(SPEC))
    policy = dataclasses.replace(POLICY, kv_bits=bits)
    places = kv_micro_batches(policy, KV_TOKENS, on_device=False)
    assert [place.capacity_tokens for place in places] == [256] * 4, "whole groups of 64"
    kv = sum(place.capacity_tokens for place in places) * kv_bytes_per_token(SPEC)
    kinds = account(policy).bytes_by_kind[Tier.CPU]
    assert kinds["kv"] <= (share + 0.001) * kv + 4 * PAGE_BYTES
    assert kinds["kv_recent"] == pytest.approx(8 * 64 * kv_bytes_per_token(SPEC), abs=PAGE_BYTES)
    assert kinds["kv_scratch"] == kv_scratch_bytes(SPEC, policy) > 0 == kv_scratch_bytes(SPEC, POLICY)


def test_a_small_sequence_takes_a_group_of_compressed_kv():
    policy = dataclasses.replace(POLICY, kv_bits="k8v4")
    assert kv_room(policy, 65) == kv_room(policy, 1) == 2 * 64
    assert kv_room(policy, 129) == 3 * 64
    assert kv_room(POLICY, 129) == 129


def test_a_latent_cache_is_counted_once_for_all_heads():
    spec = planned("deepseek")
    assert kv_bytes_per_token(spec) == spec.num_layers * (128 + 32) * spec.dtype_bytes
    assert account(POLICY, spec=spec).bytes_by_kind[Tier.CPU]["kv"] == pytest.approx(
        KV_TOKENS * kv_bytes_per_token(spec), abs=4 * PAGE_BYTES
    )


# KV on disk --------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.integers(1, 20),
    st.integers(1, 8),
    st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)).filter(sum),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.booleans(),
)
def test_every_micro_batch_has_one_home_and_its_bytes_there(sequences, micro_batch, parts, share, on_device):
    gpu, cpu, disk = parts if on_device else (0, parts[0] + parts[1], parts[2])
    total = gpu + cpu + disk
    policy = dataclasses.replace(
        POLICY,
        sequences_in_flight=sequences,
        attention_micro_batch=micro_batch,
        kv=Placement(gpu / total, cpu / total, disk / total),
        cpu_attention_share=share,
    )
    places = kv_micro_batches(policy, KV_TOKENS, on_device=on_device)
    told = account(policy, on_device)
    token_bytes = kv_bytes_per_token(SPEC)
    for tier in Tier:
        slabs = [place for place in places if place.home is tier]
        layers = SPEC.num_layers if tier is Tier.DISK else 1  # a slab on disk begins on a page in every layer
        assert told.bytes_by_kind[tier].get("kv", 0) == sum(
            layers * align_up(place.capacity_tokens * token_bytes // layers) for place in slabs
        )
    assert (
        len(places) * disk / total - 1
        < sum(place.home is Tier.DISK for place in places)
        < len(places) * disk / total + 1
    )
    slot = align_up(places[0].capacity_tokens * token_bytes // SPEC.num_layers)
    elsewhere = [place for place in places if place.home is not Tier.GPU]
    staged = {
        Tier.CPU: any(place.home is Tier.DISK for place in places),
        Tier.GPU: on_device and any(place.attend_lane is Lane.GPU for place in elsewhere),
    }
    for tier, slots in ((Tier.CPU, told.host_kv_slots), (Tier.GPU, KV_SLOTS)):
        assert told.bytes_by_kind[tier].get("kv_staging", 0) == (slots * slot if staged[tier] else 0)
    tails = sum(place.home is Tier.DISK for place in places) * min(micro_batch, sequences) * kv_block_bytes(SPEC)
    assert told.bytes_by_kind[Tier.CPU].get("kv_tails", 0) == SPEC.num_layers * tails
    attends_beside = on_device and any(place.attend_lane is Lane.CPU for place in elsewhere)
    offloaded = told.bytes_by_kind[Tier.CPU].get("offloaded_query", 0)
    assert offloaded == (offloaded_query_bytes(SPEC, policy) if attends_beside else 0)


def test_small_slots_are_many():
    mib = 1 << 20
    assert [host_kv_slots(size, 1000) for size in (mib, 4 * mib, 8 * mib, 16 * mib, 1024 * mib)] == [16, 16, 8, 4, 4]
    assert [host_kv_slots(mib, slabs) for slabs in (3, 20, 44, 88)] == [4, 5, 11, 16], "no more than a quarter"


def test_a_block_takes_16_rows_or_16_kib():
    for kv_heads, pages in ((1, 1), (2, 2), (3, 4), (4, 4), (64, 4)):  # 256 bytes a token and head
        spec = dataclasses.replace(SPEC, num_kv_heads=kv_heads, head_dim=64, dtype="bfloat16")
        assert spec.kv_bytes_per_token == 256 * kv_heads
        assert kv_block_bytes(spec) == pages * PAGE_BYTES


# Hidden rows -------------------------------------------------------------------------------------------


def test_hidden_rows_wait_elsewhere_but_for_those_at_work():
    assert hidden_rows_elsewhere(POLICY) == 0
    away = dataclasses.replace(POLICY, hidden=Placement(0.25, 0.75))
    assert hidden_rows_elsewhere(away) == 600  # three quarters of what is left of 1000 rows beside 2 x 100
    assert hidden_rows_elsewhere(dataclasses.replace(away, tokens_per_pass=150)) == 0
    saved = workspace_bytes(SPEC, POLICY) - workspace_bytes(SPEC, away)
    sampled = POLICY.sequences_in_flight * SPEC.hidden_size * SPEC.dtype_bytes
    assert saved == pytest.approx(600 * device_row_bytes(SPEC) - sampled, abs=PAGE_BYTES)
    assert (part_tokens(POLICY), part_tokens(away)) == (0, 200)
    assert part_tokens(dataclasses.replace(away, tokens_per_pass=1001)) == 200, "two places of equal size"


@pytest.mark.parametrize("hidden, tier", [(Placement(0.25, 0.75), Tier.CPU), (Placement(0.2, 0.3, 0.5), Tier.DISK)])
def test_what_hidden_rows_leave_on_the_device_they_take_elsewhere(hidden, tier):
    here, away = account(POLICY, True), account(dataclasses.replace(POLICY, hidden=hidden), True)
    assert away.bytes_by_kind[tier]["hidden"] == align_up(1000 * SPEC.hidden_size * SPEC.dtype_bytes)
    assert away.bytes_by_kind[Tier.GPU]["workspace"] < here.bytes_by_kind[Tier.GPU]["workspace"]
    assert sum("hidden" in kinds for kinds in away.bytes_by_kind.values()) == 1


def test_the_ring_of_passes_in_parts_holds_a_whole_layer():
    """Its units stay until the last part has used them."""
    policy = dataclasses.replace(POLICY, hidden=Placement(0.0, 1.0))
    placed = place_weights(SPEC, policy, on_device=True)
    sizes = {}
    for each in (POLICY, policy):
        sizes[each] = memory_account(
            SPEC, each, placed, KV_TOKENS, on_device=True, gpu_budget_bytes=1, cpu_budget_bytes=1
        ).device_ring_bytes
    unit, layer = placed.max_unit_stream_bytes[1], placed.max_layer_stream_bytes[1]
    assert (sizes[POLICY], sizes[policy]) == (unit, unit + layer)


# KV split by token -------------------------------------------------------------------------------------


@given(st.floats(0.0, 1.0), st.lists(st.integers(1, 50), min_size=1, max_size=12))
@settings(deadline=None, derandomize=True, max_examples=200)
def test_runs_of_a_split_slab_are_apart_in_both_places_and_fill_them(share, capacities):
    room = sum(capacities)
    place = KVMicroBatch(Tier.CPU, room, Lane.CPU, share)
    starts = numpy.cumsum([0, *capacities[:-1]])
    hosts, devices, borders = place.split(starts, numpy.array(capacities))
    there = numpy.array(capacities) - borders
    assert (borders >= 0).all() and (there >= 0).all()
    assert hosts.tolist() == [0, *numpy.cumsum(borders)[:-1]]
    assert devices.tolist() == [0, *numpy.cumsum(there)[:-1]]
    assert (borders.sum(), there.sum()) == (room - place.device_tokens(room), place.device_tokens(room))
    assert (numpy.abs(there - share * numpy.array(capacities)) <= 1 + 1e-3).all()


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_the_newest_tokens_of_what_the_cpu_attends_take_room_on_the_device(share):
    policy = dataclasses.replace(POLICY, kv=Placement(0.25, 0.75), cpu_attention_share=0.67)
    whole, split = (
        account(each, True).bytes_by_kind
        for each in (policy, dataclasses.replace(policy, kv_device_tokens_share=share))
    )
    moved = split[Tier.GPU]["kv"] - whole[Tier.GPU]["kv"]
    assert moved == pytest.approx(share * 2 * 200 * kv_bytes_per_token(SPEC), abs=4 * PAGE_BYTES)  # 2 of 4, 200 each
    assert whole[Tier.CPU]["kv"] - split[Tier.CPU]["kv"] == pytest.approx(moved, abs=4 * PAGE_BYTES)
    assert "kv_merge" not in whole[Tier.GPU] and split[Tier.GPU]["kv_merge"] > split[Tier.CPU]["kv_merge"] > 0
    assert account(dataclasses.replace(policy, kv_device_tokens_share=share, cpu_attention_share=0.0), True) == account(
        dataclasses.replace(policy, cpu_attention_share=0.0), True
    ), "what the device attends is not split"


# Workspace ---------------------------------------------------------------------------------------------


def test_the_workspace_covers_the_widest_expert():
    spec = planned("mixtral")
    assert workspace_bytes(spec, POLICY) > workspace_bytes(planned("mixtral", intermediate_size=700), POLICY)
    deepseek = planned("deepseek")
    wide = planned("deepseek", moe_intermediate_size=4000)
    assert workspace_bytes(wide, POLICY) > workspace_bytes(deepseek, POLICY)


@given(st.integers(1, 4000), st.integers(1, 3000), st.integers(1, 200))
@settings(deadline=None, derandomize=True, max_examples=60)
def test_the_workspace_grows_with_the_pass(tokens, more, sequences):
    policy = dataclasses.replace(POLICY, tokens_per_pass=tokens, sequences_in_flight=sequences)
    larger = dataclasses.replace(policy, tokens_per_pass=tokens + more)
    grown = workspace_bytes(SPEC, larger) - workspace_bytes(SPEC, policy)
    assert grown >= more * pass_row_bytes(SPEC) - PAGE_BYTES


def test_an_embedding_on_disk_needs_rows_for_a_pass():
    policy = dataclasses.replace(POLICY, weights=Placement(0.0, 0.5, 0.5))
    rows = account(policy).bytes_by_kind[Tier.CPU]["embedding_rows"]
    assert rows == align_up(1000 * SPEC.embedding_size * SPEC.dtype_bytes)
    assert "embedding_rows" not in account(POLICY).bytes_by_kind[Tier.CPU]


def test_a_device_has_room_for_the_matrices_of_a_step_where_it_takes_several_calls():
    largest = max(
        sum(align_up(tensor.elements * SPEC.dtype_bytes) for tensor in SPEC.layer_tensors(0) if tensor.name in names)
        for names in (("qkv.weight",), ("output.weight",), ("gate_up.weight", "down.weight"))
    )

    def slot(on_device: bool = True, **changes) -> int | None:
        policy = dataclasses.replace(POLICY, **{"weight_bits": 4} | changes)
        return account(policy, on_device).bytes_by_kind[Tier.GPU].get("dense_weights")

    assert slot() == slot(weight_bits=8) == largest
    assert slot(keep=("*.down_proj=16", "*.o_proj=16")) < largest
    for none in ({"weight_bits": 16}, {"token_micro_batch": 1000}, {"on_device": False}):
        assert slot(**none) is None, none
