"""What a step costs follows from the machine's rates, and the sums that the search uses are sums of steps."""

from __future__ import annotations

import dataclasses
import itertools

import numpy
import pytest
from planned_costs import DISK, POLICY, RAGGED, RAM, alone, costs_of, decoding, layout_of, whole
from planned_models import LAPTOP, NO_GPU, T4, planned

from flexrun.config import Placement
from flexrun.core import Lane, Tier
from flexrun.placement import part_tokens
from flexrun.policy.kv_writes import BLOCK_WRITE_SECONDS
from flexrun.policy.passes import job_passes
from flexrun.prefixes import NONE, Prefixes
from flexrun.steps import MicroBatchShape, PassShape, StepKind

HALF_DISK, MIX = Placement(0.0, 0.5, 0.5), Placement(0.3, 0.4, 0.3)
IN_PARTS = dataclasses.replace(POLICY, hidden=Placement(0.0, 1.0), token_micro_batch=32, half_batches=True)


SPLIT = [(POLICY, 0.3), (POLICY, 1.0), (dataclasses.replace(POLICY, half_batches=True), 0.8), (IN_PARTS, 0.8)]
ON_DEVICE = [
    (RAM, RAM, 0.0),
    (RAM, RAM, 0.5),
    (RAM, RAM, 1.0),
    (DISK, Placement(1.0, 0.0), 1.0),
    (Placement(1.0, 0.0), Placement(0.5, 0.5), 0.0),
    (MIX, Placement(0.25, 0.5, 0.25), 0.5),
    (HALF_DISK, Placement(0.0, 0.5, 0.5), 0.0),
    (DISK, DISK, 1.0),
]
ON_CPU = [(RAM, RAM, 1.0), (HALF_DISK, RAM, 1.0), (DISK, HALF_DISK, 1.0)]
CPU_EXPERTS = [
    dataclasses.replace(POLICY, cpu_experts_share=share, half_batches=halves)
    for share, halves in ((0.4, False), (1.0, False), (0.4, True))
]
SPLIT_MODELS = ("gqa", "windows")
MODELS = ("llama", "gqa", "window", "windows", "mixtral", "deepseek")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("machine, on_device", [(T4, True), (LAPTOP, True), (LAPTOP, False)])
def test_the_seconds_of_a_lane_are_those_of_its_steps(name, machine, on_device):
    """Approximate only where it is said to be: on the CPU, streamed and resident weights are averaged over a model."""
    spec = planned(name)
    places = ON_DEVICE if on_device else ON_CPU
    cases = [(*case, POLICY) for case in places]
    if spec.latent is None:
        coded = [dataclasses.replace(POLICY, kv_bits=bits) for bits in (4, "k8v4")]
        cases += [(RAM, kv, share, base) for base in coded for _, kv, share in places]
    cases += [(*case, IN_PARTS) for case in places[:5] if on_device and spec.experts is None]  # not run with them
    split = [dataclasses.replace(base, kv_device_tokens_share=share) for base, share in SPLIT]
    cases += [(RAM, kv, 1.0, base) for kv in (RAM, MIX) for base in split if on_device and name in SPLIT_MODELS]
    if on_device and spec.experts:
        cases += [(*places[number], each) for number in (0, 2, 5) for each in CPU_EXPERTS]
    for weights, kv, share, base in cases:
        policy = dataclasses.replace(base, weights=weights, kv=kv, cpu_attention_share=share)
        layout = layout_of(spec, policy, on_device)
        costs = costs_of(layout, machine)
        averaged = not on_device and weights is not RAM
        for shape in itertools.islice(job_passes(RAGGED, policy, layout.micro_batches), 0, None, 15):
            steps, shape = alone(costs, layout, shape)
            sums = dict.fromkeys(Lane, 0.0)
            for step in steps:
                sums[step.lane] += costs.seconds(step, shape)
            told = costs.lane_seconds(shape)
            for lane, seconds in sums.items():
                near = 1e-6 if not averaged else 0.02 if spec.experts is None else 0.07
                assert told[lane] == pytest.approx(seconds, rel=near, abs=1e-12), (lane, weights, kv, share)


@pytest.mark.parametrize("machine, on_device", [(T4, True), (LAPTOP, False)])
@pytest.mark.parametrize("name", ["gqa", "windows"])
def test_so_are_those_of_shared_prefixes(name, machine, on_device):
    """A header, and a second level behind it for half of the rows."""
    prefixes = Prefixes(numpy.array([NONE, 0]), numpy.array([50, 20]), (), numpy.array([20, 10]))
    job = RAGGED.sharing(prefixes, [0] * 10 + [1] * 10)
    for weights, kv, share in [case for case in (ON_DEVICE if on_device else ON_CPU) if case[0] is RAM or on_device]:
        policy = dataclasses.replace(POLICY, weights=weights, kv=kv, cpu_attention_share=share)
        layout = layout_of(planned(name), policy, on_device, job)
        costs = costs_of(layout, machine)
        shapes = list(job_passes(job, policy, layout.micro_batches))
        assert shapes[0].micro_batches[0].query_tokens == 50
        assert sum(shape.tokens for shape in shapes) == job.prefill_tokens + int((job.max_tokens - 1).sum())
        for shape in shapes[::15]:
            steps, shape = alone(costs, layout, shape)
            assert any(step.kind is StepKind.ATTEND_PREFIX for step in steps)
            sums = dict.fromkeys(Lane, 0.0)
            for step in steps:
                sums[step.lane] += costs.seconds(step, shape)
            assert costs.lane_seconds(shape) == pytest.approx(sums, rel=1e-6)


# One step at a time ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("machine, on_device", [(T4, True), (LAPTOP, False), (NO_GPU, False)])
def test_more_tokens_and_more_cache_never_cost_less(name, machine, on_device):
    policy = dataclasses.replace(POLICY, token_micro_batch=64, kv=Placement(0.0, 1.0), cpu_attention_share=0.0)
    costs = costs_of(layout_of(planned(name), policy, on_device), machine)
    lane = Lane.GPU if on_device else Lane.CPU
    by_tokens = [costs.lane_seconds(decoding(tokens, 64, lane=lane)) for tokens in (1, 2, 3, 8, 63, 64, 65, 200, 2000)]
    by_cache = [costs.lane_seconds(decoding(16, context, lane=lane)) for context in (1, 2, 50, 100, 101, 5000)]
    by_prompt = [costs.lane_seconds(whole(64, kv, lane=lane)) for kv in (64, 65, 200, 2000)]
    for growing in (by_tokens, by_cache, by_prompt):
        for less, more in itertools.pairwise(growing):
            for each in Lane:
                assert less[each] <= more[each] * (1 + 1e-9), each
    assert by_tokens[0][lane] < by_tokens[-1][lane]


def test_a_window_bounds_what_attention_reads():
    costs = costs_of(layout_of(planned("windows"), POLICY, False), LAPTOP)
    for context in (65, 640, 6400):
        (part,) = decoding(4, context).micro_batches
        unlimited, windowed = (costs.attend_seconds(LAPTOP.cpu, layer, part) for layer in (0, 5))
        assert unlimited > windowed
        spec, rates = planned("windows"), LAPTOP.cpu.rates["float16"]
        read = 4 * 64 * spec.kv_bytes_per_token / rates.decode_kv_bytes_per_second
        products = 4 * 64 * spec.decode_attention_flops_per_pair / rates.prefill_attention_flops_per_second
        assert windowed == pytest.approx(LAPTOP.cpu.step_overhead_seconds + read + products / 2)


def test_decoding_with_latent_attention_may_be_bound_by_its_products():
    """The latent is read once for all heads, so that few bytes go with many products."""
    spec = planned("deepseek")
    costs = costs_of(layout_of(spec, POLICY, False), LAPTOP)
    (part,) = decoding(4, 1000).micro_batches
    rates = LAPTOP.cpu.rates["float16"]
    products = 4000 * spec.decode_attention_flops_per_pair / rates.prefill_attention_flops_per_second
    read = 4000 * spec.kv_bytes_per_token / rates.decode_kv_bytes_per_second
    assert products > read
    assert costs.attend_seconds(LAPTOP.cpu, 0, part) == pytest.approx(products + LAPTOP.cpu.step_overhead_seconds)


def test_attention_counts_where_it_runs():
    layout = layout_of(planned("llama"), dataclasses.replace(POLICY, kv=RAM), True)
    costs = costs_of(layout, T4)
    here, there = (costs.lane_seconds(decoding(16, 4000, lane=lane)) for lane in (Lane.GPU, Lane.CPU))
    assert here[Lane.CPU] == 0 < there[Lane.CPU]
    assert here[Lane.GPU] > there[Lane.GPU]
    assert here[Lane.H2D] > there[Lane.H2D], "the cache comes over the link, or only the results do"
    kv_bytes = 16 * 4000 * planned("llama").kv_bytes_per_token
    assert here[Lane.H2D] - there[Lane.H2D] == pytest.approx(6 * kv_bytes / T4.h2d.bytes_per_second, rel=0.01)
    on_gpu = costs.lane_seconds(decoding(16, 4000, home=Tier.GPU, lane=Lane.GPU))
    assert on_gpu[Lane.GPU] == here[Lane.GPU]
    assert on_gpu[Lane.D2H] == on_gpu[Lane.CPU] == 0


def test_kv_split_by_token_is_attended_in_both_places_at_once():
    """Of 4000 tokens each 1000 on the device: it does a quarter of the CPU's work, for log-sum-exps that come back."""
    spec = planned("llama")
    costs = costs_of(layout_of(spec, dataclasses.replace(POLICY, kv=RAM), True), T4)
    shape = decoding(16, 4000)
    counts = dict.fromkeys(("above_kv_tokens", "above_pairs", "above_decode_kv_tokens"), 16_000)
    part = dataclasses.replace(shape.micro_batches[0], above_new_tokens=16, above_decode_tokens=16, **counts)
    whole, split = (costs.lane_seconds(each) for each in (shape, dataclasses.replace(shape, micro_batches=(part,))))
    on_gpu = costs.lane_seconds(decoding(16, 1000, home=Tier.GPU, lane=Lane.GPU))
    nothing = costs.lane_seconds(decoding(16, 1, home=Tier.GPU, lane=Lane.GPU))
    assert split[Lane.CPU] == pytest.approx(0.75 * whole[Lane.CPU], rel=0.01)
    assert split[Lane.GPU] - whole[Lane.GPU] > on_gpu[Lane.GPU] - nothing[Lane.GPU] > 0
    assert split[Lane.H2D] - whole[Lane.H2D] == pytest.approx(6 * 16 * spec.num_heads * 4 / T4.h2d.bytes_per_second)
    new_rows = 6 * 16 * spec.kv_bytes_per_token / T4.d2h.bytes_per_second
    assert whole[Lane.D2H] - split[Lane.D2H] == pytest.approx(new_rows)


def test_a_window_sees_what_is_on_the_device_first():
    costs = costs_of(layout_of(planned("windows"), POLICY, True), T4)
    layer = next(layer for layer, window in enumerate(planned("windows").layer_windows) if window)
    (part,) = decoding(4, 1000).micro_batches
    for above, left in ((10, 54), (64, 0), (500, 0)):  # of a window of 64
        counts = dict.fromkeys(("above_kv_tokens", "above_pairs", "above_decode_kv_tokens"), 4 * above)
        split = dataclasses.replace(part, above_decode_tokens=4, **counts)
        overhead = T4.cpu.step_overhead_seconds
        found = costs.attend_seconds(T4.cpu, layer, split) - overhead
        assert found == pytest.approx(left / 64 * (costs.attend_seconds(T4.cpu, layer, part) - overhead), abs=1e-12)


def test_kv_on_disk_is_read_before_and_written_after():
    layout = layout_of(planned("llama"), POLICY, False)
    costs, (one, four) = costs_of(layout, LAPTOP), (planned("llama").kv_bytes_per_token * count for count in (1, 4))
    seconds = costs.lane_seconds(decoding(4, 100, home=Tier.DISK))
    assert seconds[Lane.DISK_READ] == pytest.approx(6 * LAPTOP.disk_read.seconds(400 * one - four))
    assert one == 4096, "four rows fill a block"
    requests = 4 * BLOCK_WRITE_SECONDS / 4
    assert seconds[Lane.DISK_WRITE] == pytest.approx(6 * (LAPTOP.disk_write.seconds(four) + requests))


def test_streamed_weights_take_the_links_at_their_rate():
    spec = planned("llama")
    layout = layout_of(spec, dataclasses.replace(POLICY, weights=DISK), True)
    seconds = costs_of(layout, T4).lane_seconds(decoding(1, 1))
    units = layout.placement.units
    moved = sum(unit.disk_bytes for unit in units)
    assert moved > 0.9 * spec.weight_bytes - spec.vocab_size * spec.hidden_size * 2  # all but the embedding's rows
    latency = len(units) * T4.disk_read.latency_seconds
    rows = seconds[Lane.DISK_READ] - latency - moved / T4.disk_read.bytes_per_second
    assert 0 < rows < 1e-4, "an embedding on disk is read row by row"
    in_ram = costs_of(layout_of(spec, dataclasses.replace(POLICY, weights=RAM), True), T4).lane_seconds(decoding(1, 1))
    assert in_ram[Lane.DISK_READ] == 0
    assert in_ram[Lane.H2D] == pytest.approx(seconds[Lane.H2D], rel=0.01), "the link carries them from either"


# Emulation --------------------------------------------------------------------------------------------


def test_an_emulated_device_computes_and_copies_with_the_host():
    layout = layout_of(planned("llama"), POLICY, True)
    emulated = costs_of(layout, LAPTOP)
    assert emulated.device is LAPTOP.cpu
    assert emulated.h2d is emulated.d2h is LAPTOP.host_copy
    real = costs_of(layout, T4)
    assert (real.device, real.h2d, real.d2h) == (T4.gpu, T4.h2d, T4.d2h)


def test_hidden_states_of_a_pass_larger_than_the_device_cross_the_link_both_ways():
    spec = planned("llama")
    assert part_tokens(IN_PARTS) == 32
    layouts = [layout_of(spec, policy, True) for policy in (POLICY, IN_PARTS)]
    micro_batches = tuple(MicroBatchShape(index, 30, 30, 465, Tier.GPU, Lane.GPU) for index in range(4))
    small, large = decoding(8, 10), PassShape(0, 120, 4, micro_batches, True)
    for shape, parts in ((small, 0), (large, 4)):
        plain, moved = (costs_of(layout, T4).lane_seconds(shape) for layout in layouts)
        nbytes = shape.tokens * spec.hidden_size * spec.dtype_bytes
        for lane, link in ((Lane.H2D, T4.h2d), (Lane.D2H, T4.d2h)):
            crossing = parts and (spec.num_layers - 1) * (parts * link.seconds(0) + nbytes / link.bytes_per_second)
            assert moved[lane] - plain[lane] == pytest.approx(crossing)
