"""Fractions become whole tensors, and the memory account is what an engine really takes."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexrun.config import Placement, Policy
from flexrun.core import PAGE_BYTES, Lane, Tier, align_up
from flexrun.errors import BudgetError
from flexrun.models.families import spec_from_config
from flexrun.offload.engine import Engine
from flexrun.placement import (
    PlacedTensor,
    WeightPlacement,
    kv_micro_batches,
    memory_account,
    place_weights,
    ring_bytes,
)
from flexrun.placement.weights import SMALL_TENSOR_BYTES

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 9,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 640,
    "vocab_size": 1000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
SPECS = {tied: spec_from_config({**LLAMA, "tie_word_embeddings": tied}) for tied in (False, True)}


@st.composite
def fractions(draw, gpu: bool = True) -> Placement:
    parts = [draw(st.integers(0, 8)) if gpu else 0, draw(st.integers(0, 8)), draw(st.integers(0, 8))]
    total = sum(parts) or 1
    shares = [part / total for part in parts]
    return Placement(shares[0], shares[1], shares[2]) if sum(parts) else Placement()


def place(tied: bool, weights: Placement, on_device: bool) -> WeightPlacement:
    return place_weights(SPECS[tied], Policy(weights=weights), on_device=on_device)


def counted(tied: bool, placed: WeightPlacement) -> list[PlacedTensor]:
    """The tensors that the fractions speak of: not the small ones, nor an embedding that is gathered by rows."""
    large = [item for item in placed.tensors if item.nbytes >= SMALL_TENSOR_BYTES]
    return [item for item in large if tied or item.tensor.module != "embedding"]


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.booleans(), st.booleans(), st.data())
def test_fractions_hold_within_a_tensor_and_are_never_exceeded(tied, on_device, data):
    weights = data.draw(fractions(gpu=on_device))
    placed = place(tied, weights, on_device)
    items = counted(tied, placed)
    total, largest = sum(item.nbytes for item in items), max(item.nbytes for item in items)
    shares = {Tier.GPU: weights.gpu, Tier.CPU: weights.cpu, Tier.DISK: weights.disk}
    slowest = [tier for tier in (Tier.GPU, Tier.CPU, Tier.DISK) if shares[tier]][-1]
    for faster, (tier, share) in enumerate(shares.items()):
        held = sum(item.nbytes for item in items if item.tier is tier)
        if tier is slowest:
            assert held >= share * total - 1
        else:
            late = (1 + faster) * largest  # each tier before it may have gone first once
            assert share * total - late < held <= share * total + 1


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.booleans(), st.booleans(), st.data())
def test_bytes_spread_evenly_over_the_layers(tied, on_device, data):
    """Up to any layer, a tier holds its share of what came before, within two tensors."""
    weights = data.draw(fractions(gpu=on_device))
    placed = place(tied, weights, on_device)
    by_layer = defaultdict(lambda: defaultdict(int))
    for item in counted(tied, placed):
        if 0 <= item.layer < SPECS[tied].num_layers:
            by_layer[item.layer][item.tier] += item.nbytes
    largest = max(item.nbytes for item in counted(tied, placed))
    for tier, share in ((Tier.GPU, weights.gpu), (Tier.CPU, weights.cpu), (Tier.DISK, weights.disk)):
        held = passed = 0
        for layer in range(SPECS[tied].num_layers):
            held += by_layer[layer][tier]
            passed += sum(by_layer[layer].values())
            assert abs(held - share * passed) <= 2 * largest


def test_small_tensors_stay_with_the_compute_device():
    for on_device, home in ((True, Tier.GPU), (False, Tier.CPU)):
        placed = place(False, Placement(0, 0, 1), on_device)
        small = [item for item in placed.tensors if item.nbytes < SMALL_TENSOR_BYTES]
        assert small
        assert {item.tier for item in small} == {home}


@pytest.mark.parametrize("on_device", [True, False])
def test_units_move_the_page_aligned_bytes_of_their_tensors(on_device):
    placed = place(True, Placement(0, 0.5, 0.5), on_device)
    moved = defaultdict(int)
    for item in placed.tensors:
        layer, module = (9, "head") if item.tensor.module == "embedding" else (item.layer, item.tensor.module)
        moved[layer, module, item.tier] += align_up(item.nbytes)
    assert [(unit.layer, unit.module) for unit in placed.units] == [
        *((layer, module) for layer in range(9) for module in ("attention", "mlp")),
        (9, "head"),
    ]
    for unit in placed.units:
        assert unit.disk_bytes == moved[unit.layer, unit.module, Tier.DISK]
        assert unit.host_bytes == (moved[unit.layer, unit.module, Tier.CPU] if on_device else 0)


def test_a_share_for_the_gpu_needs_one():
    with pytest.raises(BudgetError, match="50% of the weights on a GPU"):
        place(False, Placement(0.5, 0.5, 0), on_device=False)


def test_an_untied_embedding_leaves_ram_first_and_a_tied_one_moves_with_the_head():
    untied = place_weights(SPECS[False], Policy(weights=Placement(0, 0.9, 0.1)), on_device=False)
    assert untied.embedding_on_disk
    assert not place_weights(SPECS[False], Policy(), on_device=False).embedding_on_disk
    tied = place_weights(SPECS[True], Policy(weights=Placement(0, 0, 1)), on_device=False)
    assert tied.embedding_on_disk
    assert tied.units[-1].disk_bytes == 1000 * 256 * 4


# KV --------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 5000), st.floats(0, 1), st.floats(0, 1))
def test_kv_fractions_become_whole_micro_batches(sequences, micro_batch, kv_tokens, on_gpu, on_cpu_lane):
    policy = Policy(
        sequences_in_flight=sequences,
        attention_micro_batch=micro_batch,
        kv=Placement(on_gpu, 1 - on_gpu, 0),
        cpu_attention_share=on_cpu_lane,
    )
    places = kv_micro_batches(policy, kv_tokens, on_device=True)
    assert len(places) == -(-sequences // micro_batch)
    assert sum(place.capacity_tokens for place in places) >= kv_tokens
    assert len({place.capacity_tokens for place in places}) == 1
    gpu = [place for place in places if place.home is Tier.GPU]
    assert len(places) * on_gpu - 1 < len(gpu) <= len(places) * on_gpu + 1e-6
    assert all(place.attend_lane is Lane.GPU for place in gpu)
    host = [place for place in places if place.home is Tier.CPU]
    attended_here = sum(place.attend_lane is Lane.CPU for place in host)
    assert abs(attended_here - len(host) * on_cpu_lane) <= 0.5
    alone = kv_micro_batches(policy, kv_tokens, on_device=False)
    assert {(place.home, place.attend_lane) for place in alone} == {(Tier.CPU, Lane.CPU)}


# Rings -----------------------------------------------------------------------------------------------


def test_rings_hold_two_layers_or_what_the_budget_leaves():
    placed = place_weights(SPECS[True], Policy(weights=Placement(0, 0, 1)), on_device=True)
    layer, _ = placed.max_layer_stream_bytes
    unit, _ = placed.max_unit_stream_bytes
    assert ring_bytes(placed) == (max(3 * layer, unit),) * 2
    spare = layer + 5000
    assert ring_bytes(placed, (spare, None))[0] == spare // PAGE_BYTES * PAGE_BYTES
    assert ring_bytes(placed, (0, 0)) == (unit, unit), "the largest unit must fit whatever the budget says"


def test_no_ring_without_streaming():
    assert ring_bytes(place_weights(SPECS[True], Policy(), on_device=False)) == (0, 0)


# The account and the engine ---------------------------------------------------------------------------


@settings(
    deadline=None,
    derandomize=True,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_an_engine_takes_exactly_what_the_account_says(packed, matrices_move, data):
    spec, weights = packed(data.draw(st.sampled_from(["llama", "gemma2", "opt_350m"])))
    on_device = data.draw(st.booleans())
    sequences = data.draw(st.integers(1, 6))
    policy = Policy(
        sequences_in_flight=sequences,
        tokens_per_pass=data.draw(st.integers(sequences, 50)),
        attention_micro_batch=data.draw(st.integers(1, 4)),
        token_micro_batch=data.draw(st.integers(1, 60)),
        weights=data.draw(fractions(gpu=on_device)),
        kv=data.draw(fractions(gpu=on_device)),
        cpu_attention_share=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    kv_tokens = data.draw(st.integers(1, 300))
    placed = place_weights(spec, policy, on_device=on_device)
    unlimited = memory_account(spec, policy, placed, kv_tokens, on_device=on_device)
    squeeze = data.draw(st.integers(0, 60_000))  # the budgets may be short of the rings' wish
    budgets = {tier: max(unlimited.total(tier) - squeeze, 1) for tier in (Tier.CPU, Tier.GPU)}
    account = memory_account(
        spec,
        policy,
        placed,
        kv_tokens,
        on_device=on_device,
        cpu_budget_bytes=budgets[Tier.CPU],
        gpu_budget_bytes=budgets[Tier.GPU] if on_device else None,
    )
    limits = {tier: max(budgets[tier], account.total(tier)) for tier in budgets}
    engine = Engine(
        spec,
        weights,
        policy,
        placed,
        account,
        kv_tokens,
        cpu_budget_bytes=limits[Tier.CPU],
        gpu_budget_bytes=limits[Tier.GPU] if on_device else 0,
        direct=False,
    )
    try:
        kv_on_disk = account.bytes_by_kind[Tier.DISK]["kv"]
        assert set(engine.tiers) == {Tier.CPU} | ({Tier.GPU} if on_device else set()) | (
            {Tier.DISK} if kv_on_disk else set()
        )
        for tier, memory in engine.tiers.items():
            told = {kind: nbytes for kind, nbytes in account.bytes_by_kind[tier].items() if nbytes}
            assert {kind: nbytes for kind, nbytes in memory.used_by_kind.items() if nbytes} == told
            assert memory.used_bytes == memory.peak_bytes == account.total(tier)
        on_disk = sum(path.stat().st_size for path in weights.folder.glob("*.bin"))
        assert account.total(Tier.DISK) == on_disk + kv_on_disk
    finally:
        engine.close()
    assert all(memory.used_bytes == 0 for memory in engine.tiers.values())
