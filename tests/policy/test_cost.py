"""What a step costs follows from the machine's rates, and the sums that the search uses are sums of steps."""

from __future__ import annotations

import dataclasses
import itertools

import numpy
import pytest
from planned_models import GIB, LAPTOP, NO_GPU, T4, planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.hardware import CompressedRates, Hardware, LinearWork
from flexrun.models.spec import ModelSpec
from flexrun.placement import LOGITS_ROWS, build_scheduler, part_tokens
from flexrun.policy.coded_cost import CODING_ACCESSES
from flexrun.policy.cost import StepCosts
from flexrun.policy.kv_writes import BLOCK_WRITE_SECONDS
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.passes import job_passes
from flexrun.prefixes import NONE, Prefixes
from flexrun.steps import MicroBatchShape, PassShape, Step, StepKind
from flexrun.workload import Workload

RAGGED = Workload.of([200, 150, 300, 80] * 5, [20, 9, 30, 12] * 5)
POLICY = Policy(sequences_in_flight=8, tokens_per_pass=400, attention_micro_batch=2, token_micro_batch=128)
RAM, DISK, HALF_DISK = Placement(), Placement(0.0, 0.0, 1.0), Placement(0.0, 0.5, 0.5)
MIX = Placement(0.3, 0.4, 0.3)


def layout_of(spec: ModelSpec, policy: Policy, on_device: bool, job: Workload = RAGGED) -> Layout:
    return Layout.of(spec, policy, job, Budgets(8 * GIB, 8 * GIB if on_device else 0))


def costs_of(layout: Layout, machine: Hardware) -> StepCosts:
    return StepCosts(layout.spec, layout.policy, layout.placement, machine, on_device=layout.on_device)


IN_PARTS = dataclasses.replace(POLICY, hidden=Placement(0.0, 1.0), token_micro_batch=32, half_batches=True)


def alone(costs: StepCosts, layout: Layout, shape: PassShape) -> tuple[list[Step], PassShape]:
    """The steps of a pass that is the whole run, so that all it loads is its own."""
    shape = dataclasses.replace(shape, index=0, more=False)
    scheduler = build_scheduler(
        layout.spec, layout.placement, layout.account, on_device=layout.on_device, policy=layout.policy
    )
    return scheduler.pass_steps(shape), shape


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


def whole(query: int, kv: int, decode: int = 0, decode_kv: int = 0, home=Tier.CPU, lane=Lane.CPU) -> PassShape:
    pairs = decode_kv + (query - decode) * max(kv - decode_kv, 0)
    part = MicroBatchShape(0, query, kv, pairs, home, lane, decode, decode_kv)
    return PassShape(0, query, max(decode, 1), (part,), False)


def decoding(sequences: int, context: int, **place) -> PassShape:
    return whole(sequences, sequences * context, sequences, sequences * context, **place)


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


# Mixtures of experts -----------------------------------------------------------------------------------


def test_experts_that_no_token_chose_are_not_computed():
    spec = planned("deepseek", n_routed_experts=64, num_experts_per_tok=2)
    costs = costs_of(layout_of(spec, POLICY, False), LAPTOP)
    work, rates = LinearWork.of(spec.linear_shapes("expert")), LAPTOP.cpu.rates["float16"]

    def one_expert(rows: float) -> float:
        return rates.linear_seconds(rows, work, spec.dtype_bytes) + LAPTOP.cpu.step_overhead_seconds

    one = costs.experts_seconds(64, 1)
    assert one == pytest.approx(2 * one_expert(1)), "one token meets the experts it is sent to"
    assert costs.experts_seconds(64, 2) < 2 * one
    # many tokens meet them all, each expert its share of the rows
    assert costs.experts_seconds(64, 6400) == pytest.approx(64 * one_expert(6400 * 2 / 64), rel=1e-6)


@pytest.mark.parametrize("half_batches", [False, True])
def test_few_tokens_move_the_chosen_experts_alone(half_batches):
    """In sums as in steps; not in halves, of which the first cannot know what the second chooses."""
    spec = planned("deepseek", n_routed_experts=64, num_experts_per_tok=2)
    policy = dataclasses.replace(
        POLICY, weights=Placement(0.0, 0.5, 0.5), kv=Placement(0.5, 0.5), half_batches=half_batches
    )
    costs = costs_of(layout_of(spec, policy, True), T4)

    def passes(tokens: int) -> PassShape:
        there = MicroBatchShape(0, tokens, 9 * tokens, 9 * tokens, Tier.GPU, Lane.GPU, tokens, 9 * tokens)
        away = dataclasses.replace(there, index=1, home=Tier.CPU, attend_lane=Lane.CPU)
        return PassShape(0, 2 * tokens, 2 * tokens, (there, away), False)

    few, many = (costs.lane_seconds(passes(tokens)) for tokens in (2, 500))
    steps, shape = alone(costs, layout_of(spec, policy, True), passes(2))
    assert any(step.chosen for step in steps) is not half_batches
    for lane in (Lane.DISK_READ, Lane.H2D):
        assert few[lane] == pytest.approx(sum(costs.seconds(step, shape) for step in steps if step.lane is lane))
        assert (few[lane] < 0.5 * many[lane]) is not half_batches


def test_a_group_of_experts_takes_its_share_of_a_layer():
    costs = costs_of(layout_of(planned("mixtral"), POLICY, True), T4)
    for tokens in (1, 7, 300):
        layer = costs.experts_seconds(8, tokens)
        assert costs.experts_seconds(2, tokens) + costs.experts_seconds(6, tokens) == pytest.approx(layer)


def test_experts_on_the_cpu_leave_the_link_and_the_device():
    spec = planned("mixtral")
    alone_on_device, shared, by_cpu = (
        costs_of(
            layout_of(spec, dataclasses.replace(POLICY, kv=Placement(1.0, 0.0), cpu_experts_share=share), True), T4
        )
        for share in (0.0, 0.5, 1.0)
    )
    on_gpu = {"home": Tier.GPU, "lane": Lane.GPU}
    few, many = decoding(4, 10, **on_gpu), decoding(400, 10, **on_gpu)
    none, half, whole = (costs.lane_seconds(few) for costs in (alone_on_device, shared, by_cpu))
    assert none[Lane.CPU] == 0 < half[Lane.CPU] == pytest.approx(whole[Lane.CPU] / 2)
    for lane in (Lane.H2D, Lane.GPU):
        assert none[lane] > half[lane] > whole[lane]
        assert half[lane] == pytest.approx((none[lane] + whole[lane]) / 2, rel=0.01)
    work = LinearWork.of(spec.linear_shapes("expert"))
    hit = 8 * (1 - 0.75**4)
    one = T4.cpu.rates["float16"].linear_seconds(4 * 2 / hit, work, 2) + T4.cpu.step_overhead_seconds
    assert whole[Lane.CPU] == pytest.approx(spec.num_layers * hit * one), "those that were chosen, by their weights"
    assert by_cpu.lane_seconds(many)[Lane.CPU] > 3 * whole[Lane.CPU], "many rows wait for its products"


def test_only_sparse_layers_have_experts():
    spec = planned("deepseek")
    layout = layout_of(spec, POLICY, False)
    steps, _ = alone(costs_of(layout, LAPTOP), layout, decoding(4, 10))
    layers = {step.layer for step in steps if step.kind is StepKind.EXPERTS}
    assert layers == {layer for layer in range(spec.num_layers) if spec.is_sparse(layer)} == {1, 2, 3, 4, 5}


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
