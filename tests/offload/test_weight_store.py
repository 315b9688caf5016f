"""Weights are the packed bytes wherever they come from: resident, streamed from disk, or copied to a device."""

from __future__ import annotations

import pytest
import torch

from flexrun.config import Placement, Policy
from flexrun.core import DTYPES, Lane, Tier
from flexrun.errors import BudgetError
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.weight_store import WeightStore
from flexrun.placement import memory_account, place_weights
from flexrun.schedule import Scheduler
from flexrun.steps import KVBytes, MicroBatchShape, ModelWork, PassShape, StepKind

pytestmark = pytest.mark.usefixtures("matrices_move")
WORK = ModelWork(1, 1, 1, (1,) * 8, 1, KVBytes(1, 1), 1, 1, 1)
USES_WEIGHTS = (StepKind.ATTENTION_INPUTS, StepKind.ATTENTION_OUTPUT, StepKind.MLP, StepKind.LOGITS)


@pytest.fixture
def open_store(packed):
    """open_store(name, weights, gpu) -> (WeightStore, scheduler of its units, host tier, device tier or None)."""
    opened = []

    def build(name: str, weights: Placement, on_device: bool, host_limit: int | None = None):
        spec, cache = packed(name)
        policy = Policy(weights=weights)
        placed = place_weights(spec, policy, on_device=on_device)
        account = memory_account(spec, policy, placed, 1, on_device=on_device)
        host = MemoryTier(Tier.CPU, host_limit)
        device = MemoryTier(Tier.GPU, None) if on_device else None
        store = WeightStore(spec, cache, placed, account, host, device)
        opened.append(store)
        scheduler = Scheduler(
            placed.units,
            WORK,
            spec.num_layers,
            compute_lane=Lane.GPU if on_device else Lane.CPU,
            host_ring_bytes=account.host_ring_bytes,
            device_ring_bytes=account.device_ring_bytes,
        )
        return store, scheduler, host, device

    yield build
    for store in opened:
        store.close()


def stored(cache, layer: int, name: str, dtype) -> torch.Tensor:
    entry = cache.entry(layer, name)
    with open(cache.path(entry), "rb") as file:
        file.seek(entry.offset)
        return torch.frombuffer(bytearray(file.read(entry.nbytes)), dtype=dtype).view(entry.shape)


CASES = [
    ("llama", Placement(0, 1, 0), False),
    ("llama", Placement(0, 0.4, 0.6), False),
    ("gemma2", Placement(0, 0, 1), False),
    ("llama", Placement(1, 0, 0), True),
    ("llama", Placement(0, 1, 0), True),
    ("gemma2", Placement(0.3, 0.3, 0.4), True),
    ("opt_350m", Placement(0.3, 0.3, 0.4), True),
]


@pytest.mark.parametrize(("name", "weights", "on_device"), CASES)
def test_every_step_sees_the_packed_weights(open_store, packed, name, weights, on_device):
    spec, cache = packed(name)
    store, scheduler, _, _ = open_store(name, weights, on_device)
    layers = {layer: spec.layer_tensors(layer) for layer in range(spec.num_layers)}
    layers[spec.num_layers] = spec.head_tensors()
    micro_batches = (MicroBatchShape(0, 1, 1, 1, Tier.GPU if on_device else Tier.CPU, Lane.GPU),)
    moved = 0
    for index in range(2):
        for step in scheduler.pass_steps(PassShape(index, 1, 1, micro_batches, index == 0)):  # emission order is safe
            for part in {StepKind.READ_WEIGHTS: store.read_parts, StepKind.COPY_WEIGHTS: store.copy_parts}.get(
                step.kind, lambda _: []
            )(step):
                part()
                moved += 1
            if step.kind not in USES_WEIGHTS:
                continue
            module = {StepKind.MLP: "mlp", StepKind.LOGITS: "head"}.get(step.kind, "attention")
            expected = {
                tensor.name: (step.layer, tensor.name) for tensor in layers[step.layer] if tensor.module == module
            }
            if module == "head" and spec.tie_word_embeddings:
                expected["lm_head.weight"] = (-1, "token_embedding.weight")
            found = store.unit_weights(step)
            assert set(found) == set(expected)
            for key, (layer, packed_name) in expected.items():
                assert torch.equal(found[key], stored(cache, layer, packed_name, DTYPES[spec.dtype])), (layer, key)
    assert bool(moved) == (weights.disk > 0 or (on_device and weights.cpu > 0))


def test_embedding_rows_come_from_disk_where_it_lives_there(open_store, packed):
    _, cache = packed("llama")
    store, _, _, _ = open_store("llama", Placement(0, 0, 1), False)
    assert "token_embedding.weight" not in store.embedding
    rows = torch.zeros(3, store.embedding_rows.row_bytes, dtype=torch.uint8)
    store.embedding_rows.read_rows([130, 0, 7], rows)
    table = stored(cache, -1, "token_embedding.weight", torch.float32)
    assert torch.equal(rows.view(torch.float32), table[[130, 0, 7]])
    resident, _, _, _ = open_store("llama", Placement(), False)
    assert resident.embedding_rows is None
    assert torch.equal(resident.embedding["token_embedding.weight"], table)


def test_closing_gives_every_byte_back(open_store):
    store, _, host, device = open_store("gemma2", Placement(0.3, 0.3, 0.4), True)
    assert host.used_bytes and device.used_bytes
    store.close()
    store.close()
    assert host.used_bytes == device.used_bytes == 0


def test_a_budget_too_small_for_the_weights_raises(open_store):
    with pytest.raises(BudgetError, match="cpu tier: weights needs"):
        open_store("llama", Placement(), False, host_limit=10_000)


def test_packed_matrices_take_the_bytes_of_their_account(packed):
    """A matrix that is rearranged for the host's matmul is counted like any other, and given back."""
    spec, cache = packed("llama")
    placed = place_weights(spec, Policy(), on_device=False)
    account = memory_account(spec, Policy(), placed, 1, on_device=False)
    host, seen = MemoryTier(Tier.CPU, None), []

    def pack(matrix):
        seen.append(tuple(matrix.shape))
        return matrix.clone()

    store = WeightStore(spec, cache, placed, account, host, None, pack=pack)
    assert len(seen) == 3 * 4 + 1, "four matrices a layer, and the head"
    assert host.used_bytes == account.bytes_by_kind[Tier.CPU]["weights"]
    store.close()
    assert host.used_bytes == 0
