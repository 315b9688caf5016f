"""What compressed weights and a compressed cache cost, on a CPU and on a GPU."""

from __future__ import annotations

import dataclasses

import pytest
from planned_costs import DISK, POLICY, RAM, costs_of, decoding, layout_of
from planned_models import LAPTOP, T4, planned

from flexrun.config import Placement
from flexrun.core import Lane, Tier
from flexrun.hardware import CompressedRates, Hardware
from flexrun.placement import LOGITS_ROWS
from flexrun.policy.coded_cost import CODING_ACCESSES


def test_only_resident_weights_have_the_layout_that_the_cpu_likes():
    """plain_weight_share is 0.5 on this machine: a pass of one token, bound by reading weights, takes twice as long."""
    spec = planned("llama", vocab_size=300)
    resident, streamed = (
        costs_of(layout_of(spec, dataclasses.replace(POLICY, weights=weights), False), LAPTOP).lane_seconds(
            decoding(1, 1)
        )[Lane.CPU]
        for weights in (RAM, DISK)
    )
    fixed = costs_of(layout_of(spec, POLICY, False), LAPTOP).device.step_overhead_seconds * (4 * 6 + 2)
    assert streamed - fixed == pytest.approx(2 * (resident - fixed), rel=0.02)


def test_a_cpu_multiplies_by_compressed_weights_in_every_call():
    """Few rows wait for fewer bytes, many for the products; codes become weights once a micro-batch."""
    spec = planned("llama")
    plain = costs_of(layout_of(spec, POLICY, False), LAPTOP)
    packed = costs_of(layout_of(spec, dataclasses.replace(POLICY, weight_bits=4), False), LAPTOP)
    elements = sum(tensor.elements for _, tensor in spec.tensors_by_layer() if len(tensor.shape) == 2)
    elements -= spec.embedding_tensors()[0].elements * (1 if spec.tie_word_embeddings else 2)  # and the head, by itself
    once = elements * spec.dtype_bytes / LAPTOP.cpu.dequantise_bytes_per_second
    saved = elements * spec.dtype_bytes * (1 - 0.28125) / LAPTOP.cpu.rates_of(spec.dtype).weight_bytes_per_second
    few, many = decoding(1, 10), decoding(4 * POLICY.token_micro_batch, 10)
    more = [packed.lane_seconds(each)[Lane.CPU] - plain.lane_seconds(each)[Lane.CPU] for each in (few, many)]
    assert more[0] == pytest.approx(once - saved, rel=0.4)
    assert more[1] == pytest.approx(4 * once, rel=0.4)
    kept = costs_of(layout_of(spec, dataclasses.replace(POLICY, weight_bits=4, keep=("*=16",)), False), LAPTOP)
    assert kept.lane_seconds(few) == plain.lane_seconds(few)


def with_compressed(machine: Hardware, found: dict[str, CompressedRates]) -> Hardware:
    rates = {dtype: dataclasses.replace(each, compressed=found) for dtype, each in machine.cpu.rates.items()}
    return dataclasses.replace(machine, cpu=dataclasses.replace(machine.cpu, rates=rates))


def test_compressed_products_take_what_was_measured_for_their_bits():
    """4 and 8 bits by their own rates, those of few rows up to few_rows; what is kept as it would be alone."""
    spec = planned("llama")
    slow = {
        "4": CompressedRates(1e10, 1e9, 2e8, few_rows=4, rows_at_once=100),
        "8": CompressedRates(1e10, 5e8, 1e8, few_rows=4),
    }
    machine = with_compressed(LAPTOP, slow)
    elements, outputs = (
        sum(tensor.elements for tensor in spec.layer_tensors(0) if tensor.name in names)
        for names in (("qkv.weight", "output.weight", "gate_up.weight", "down.weight"), ("output.weight",))
    )

    def layer_seconds(rows: int, keep: tuple[str, ...] = (), bits: int = 4) -> float:
        policy = dataclasses.replace(POLICY, weight_bits=bits, keep=keep)
        costs = costs_of(layout_of(spec, policy, False), machine)
        return sum(costs._linear(part, 0, rows, 0.0) for part in ("attention_inputs", "attention_output", "mlp"))

    stored = elements * (0.5 + 4 / 64)
    for rows, speed in ((1, 1e9), (4, 1e9), (5, 2e8), (100, 2e8), (101, 1e8)):
        assert layer_seconds(rows) == pytest.approx(stored / speed + 2 * rows * elements / 1e10, rel=0.1)
    share = outputs / elements
    eight = share * (layer_seconds(100, bits=8) - layer_seconds(100)) + layer_seconds(100)
    assert layer_seconds(100, keep=("*.o_proj=8",)) == pytest.approx(eight, rel=0.02)
    plain = layer_seconds(100, bits=16)
    assert layer_seconds(100, keep=("*.o_proj=16",)) == pytest.approx(
        layer_seconds(100) * (1 - share) + plain * share, rel=0.02
    )


def test_a_gpu_brings_compressed_weights_back_once_for_all_calls_of_a_step():
    spec = planned("llama")
    plain, packed = (
        costs_of(layout_of(spec, dataclasses.replace(POLICY, weight_bits=bits), True), T4) for bits in (16, 4)
    )
    elements = sum(spec.layer_bytes(layer) for layer in range(spec.num_layers)) / spec.dtype_bytes
    once = elements * spec.dtype_bytes / T4.gpu.dequantise_bytes_per_second
    head = spec.vocab_size * spec.hidden_size * spec.dtype_bytes / T4.gpu.dequantise_bytes_per_second
    for tokens in (1, 100, 8 * POLICY.token_micro_batch):
        shape = decoding(tokens, 10)
        more = packed.lane_seconds(shape)[Lane.GPU] - plain.lane_seconds(shape)[Lane.GPU]
        blocks = -(-tokens // LOGITS_ROWS)  # each of which the head is brought back for
        assert more == pytest.approx(once + blocks * head, rel=0.1)


def test_compressed_cache_is_read_in_its_bits():
    spec = planned("llama")
    (part,) = decoding(8, 4000).micro_batches
    full, four = (
        costs_of(layout_of(spec, dataclasses.replace(POLICY, kv_bits=bits), False), LAPTOP).attend_pass_seconds(
            LAPTOP.cpu, part
        )
        for bits in (16, 4)
    )
    assert full / 4 < four < full / 2.8  # scales come beside the bits, and the products stay


def test_compressing_a_cache_takes_time_with_every_new_token_and_spares_a_disk_its_bytes():
    spec = planned("llama")
    full, four = (
        costs_of(layout_of(spec, dataclasses.replace(POLICY, kv=Placement(0, 0, 1), kv_bits=bits), False), LAPTOP)
        for bits in (16, 4)
    )
    coded = four.attention_inputs_seconds(1000, 0, 1.0) - full.attention_inputs_seconds(1000, 0, 1.0)
    moved = coded * LAPTOP.cpu.rates_of(spec.dtype).activation_bytes_per_second
    assert moved == pytest.approx(1000 * spec.kv_elements_per_token * 4 * CODING_ACCESSES)
    shape = decoding(8, 4000, home=Tier.DISK)
    parts = tuple(dataclasses.replace(each, there_groups=8 * (3999 // 64)) for each in shape.micro_batches)
    shape = dataclasses.replace(shape, micro_batches=parts)
    whole, packed = (costs.lane_seconds(shape)[Lane.DISK_READ] for costs in (full, four))
    assert whole / 4 < packed < whole / 3
