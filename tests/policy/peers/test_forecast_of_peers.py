"""The forecasts of other engines: where their matrices lie, what waits for what, and what a calibration finds."""

from __future__ import annotations

import dataclasses

import pytest

from flexrun.config import Placement
from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware, Processor, Rates, Transfer
from flexrun.models.families import spec_from_config
from flexrun.policy.peers.cost import ATTENTION, MLP, PeerCosts
from flexrun.policy.peers.forecast import calibrate, peer_forecast, sequences_held
from flexrun.policy.peers.traits import FLEXGEN, MOE_GEN, EngineTraits, PeerRun

CPU, GPU, DISK = Placement(0.0, 1.0, 0.0), Placement(1.0, 0.0, 0.0), Placement(0.0, 0.0, 1.0)
LAYERS, HIDDEN = 4, 1024


@pytest.fixture(scope="module")
def spec():
    config = {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "ffn_dim": 4 * HIDDEN,
        "vocab_size": 1000,
        "max_position_embeddings": 2048,
        "torch_dtype": "float16",
    }
    return spec_from_config(config, "auto")


@pytest.fixture(scope="module")
def hardware():
    """Every lane so slow, and compute so fast, that a test can tell which one it pays for."""
    rates = Rates(1e15, 1e12, 1e15, 1e12, 1e15)
    processor = Processor({"float16": rates, "float32": rates})
    link = Transfer(1e9)
    return Hardware(
        "test", processor, int(1e9), Transfer(1e8), Transfer(2e8), Transfer(5e8), processor, int(1e9), link, link
    )


def run_of(**changes) -> PeerRun:
    values = {"sequences": 4, "micro_batch": 2, "prompt_tokens": 64, "generated_tokens": 8, "kv": CPU, **changes}
    return PeerRun(**values)


@pytest.mark.parametrize(
    "placement, attention, mlp",
    [
        (Placement(0.2, 0.8, 0.0), (0, 3, 1), (0, 8, 0)),  # only the output projection's middle lies beyond 80 %
        (Placement(0.0, 0.5, 0.5), (2, 2, 0), (4, 4, 0)),
        (Placement(0.1, 0.9, 0.0), (0, 4, 0), (0, 8, 0)),
        (GPU, (0, 0, 4), (0, 0, 8)),
    ],
)
def test_whole_matrices_lie_where_their_middle_falls(spec, hardware, placement, attention, mlp):
    costs = PeerCosts(FLEXGEN, spec, hardware, run_of(weights=placement))
    for half, expected in ((ATTENTION, attention), (MLP, mlp)):
        nbytes = costs._bytes_by_tier(costs._matrices(half, 0))
        assert [nbytes[tier] / (2 * HIDDEN**2) for tier in (Tier.DISK, Tier.CPU, Tier.GPU)] == list(expected)


def test_the_first_micro_batch_waits_for_the_weights_of_the_next_half_layer(spec, hardware):
    """Moving weights costs a block what it costs one micro-batch, as nothing else takes long here."""
    moved_bytes = LAYERS * 12 * HIDDEN**2 * 2
    for sequences in (2, 8):
        pass_ = peer_forecast(EngineTraits("streams"), spec, hardware, run_of(sequences=sequences, kv=GPU)).prefill
        assert pass_.lane_seconds[Lane.H2D] == pytest.approx(moved_bytes / 1e9)
        assert pass_.seconds == pytest.approx(moved_bytes / 1e9, rel=0.05)


def test_unpinned_weights_pass_through_the_launching_thread(spec, hardware):
    pinned, unpinned = (
        peer_forecast(FLEXGEN, spec, hardware, run_of(kv=GPU, pinned_weights=pinned)).prefill
        for pinned in (True, False)
    )
    copy_seconds = LAYERS * 12 * HIDDEN**2 * 2 / 5e8
    assert unpinned.lane_seconds[Lane.CPU] - pinned.lane_seconds[Lane.CPU] == pytest.approx(copy_seconds, rel=0.1)
    assert unpinned.seconds > pinned.seconds


def test_without_overlap_the_parts_take_turns(spec, hardware):
    run = run_of(weights=CPU, cpu_attention=1.0, hidden=CPU)
    beside = peer_forecast(FLEXGEN, spec, hardware, run)
    in_turns = peer_forecast(FLEXGEN, spec, hardware, dataclasses.replace(run, overlap=False))
    for phase in (in_turns.prefill, in_turns.decode):
        assert phase.seconds == pytest.approx(sum(phase.part_seconds.values()))
    assert beside.whole.seconds < in_turns.whole.seconds


def test_a_projection_decodes_at_the_context_of_the_first_token(spec, hardware):
    run = run_of(kv=DISK, weights=GPU, cpu_attention=1.0, prompt_tokens=100, generated_tokens=101)
    whole, projected = (
        peer_forecast(FLEXGEN, spec, hardware, dataclasses.replace(run, projected=value)).decode.lane_seconds
        for value in (False, True)
    )
    assert whole[Lane.DISK_READ] / projected[Lane.DISK_READ] == pytest.approx(150.5 / 101)


def test_four_bits_move_fewer_bytes_and_are_unpacked_for_every_micro_batch(spec, hardware):
    traits = dataclasses.replace(FLEXGEN, dequantise_bytes=1e6)  # so that nothing else counts
    plain = peer_forecast(traits, spec, hardware, run_of())
    one, four = (
        peer_forecast(traits, spec, hardware, run_of(weight_bits=4, projected=True, sequences=sequences)).decode
        for sequences in (2, 8)
    )
    assert one.lane_seconds[Lane.H2D] < 0.3 * plain.decode.lane_seconds[Lane.H2D]
    assert four.lane_seconds[Lane.GPU] == pytest.approx(4 * one.lane_seconds[Lane.GPU], rel=0.01)


def test_cpu_attention_moves_the_cache_off_the_link_and_blocks(spec, hardware):
    on_gpu, on_cpu = (
        peer_forecast(FLEXGEN, spec, hardware, run_of(weights=GPU, cpu_attention=share)).decode for share in (0.0, 1.0)
    )
    assert on_gpu.lane_seconds[Lane.H2D] > 10 * on_cpu.lane_seconds[Lane.H2D]
    in_turns = on_cpu.lane_seconds[Lane.CPU] + on_cpu.lane_seconds[Lane.GPU]
    assert on_cpu.seconds == pytest.approx(in_turns, rel=0.01)


def test_module_batching_streams_weights_once_and_takes_its_busiest_lane(spec, hardware):
    traits = dataclasses.replace(MOE_GEN, sync_seconds=0.0)
    forecast = peer_forecast(traits, spec, hardware, run_of(sequences=16, micro_batch=4, prefill_sequences=8))
    passes = forecast.run.generated_tokens - 1
    streamed = LAYERS * 12 * HIDDEN**2 * 2 / 1e9
    cache = 16 * (64 + 4) * LAYERS * 2 * HIDDEN * 2 / 1e9
    assert forecast.decode.lane_seconds[Lane.H2D] == pytest.approx(passes * (streamed + cache))
    assert forecast.prefill.lane_seconds[Lane.H2D] == pytest.approx(2 * streamed)  # two groups of eight
    assert forecast.decode.seconds == max(forecast.decode.lane_seconds.values())
    assert forecast.whole.binding_lane is forecast.decode.binding_lane is Lane.H2D


def test_sequences_follow_from_host_memory(spec, hardware):
    run = run_of(sequences=0)
    held = sequences_held(spec, hardware, run)
    kv_bytes = LAYERS * 2 * HIDDEN * 2 * (64 + 8)
    assert spec.weight_bytes + held * kv_bytes <= 1e9 < spec.weight_bytes + (held + 1) * kv_bytes
    assert peer_forecast(MOE_GEN, spec, hardware, run).run.sequences == held


def test_calibration_finds_the_rates_that_made_the_figures(spec, hardware):
    run = run_of(weights=GPU, cpu_attention=1.0, prompt_tokens=512)
    hardware = dataclasses.replace(hardware, gpu=Processor({"float16": Rates(1e10, 1e12, 1e15, 1e12, 1e15)}))
    true = dataclasses.replace(FLEXGEN, matmul_share=0.6, cpu_bytes_per_second=3e9)
    figures = peer_forecast(true, spec, hardware, run)

    def ratios(traits):
        forecast = peer_forecast(traits, spec, hardware, run)
        return [forecast.prefill.seconds / figures.prefill.seconds, forecast.decode.seconds / figures.decode.seconds]

    found = calibrate(FLEXGEN, ("matmul_share", "cpu_bytes_per_second"), ratios)
    assert found.matmul_share == pytest.approx(0.6, rel=1e-3)
    assert found.cpu_bytes_per_second == pytest.approx(3e9, rel=1e-3)
