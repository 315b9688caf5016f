"""A forecast looks at a part of a job and must say what looking at all of it would."""

from __future__ import annotations

import dataclasses

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, LAPTOP, T4, known, planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane
from flexrun.llm.model_files import read_model_plan
from flexrun.policy.forecast import FULL, QUICK, Effort, Forecast, drawn, forecast, passes_guess
from flexrun.policy.layout import Budgets, Layout
from flexrun.policy.passes import job_passes
from flexrun.policy.simulator import simulate_layout
from flexrun.prefixes import NONE, Prefixes
from flexrun.workload import Workload

EXACT = Effort(10**9, 10**9, 10**9, 10**9)
ALL_PASSES = dataclasses.replace(FULL, passes=10**9)
ON_GPU, RAM, DISK = Placement(1.0, 0.0), Placement(), Placement(0.0, 0.0, 1.0)


def ragged(rows: int, seed: int = 3) -> Workload:
    """Longest prompt first, as a job runs; outputs of any length."""
    chooser = numpy.random.RandomState(seed)
    prompts = numpy.sort(chooser.randint(10, 300, rows))[::-1]
    return Workload.of(prompts.tolist(), chooser.randint(1, 40, rows).tolist())


def sharing(rows: int, group: int, tokens: int, own: int = 50) -> Workload:
    """Groups of rows that share the first ``tokens`` tokens of their prompts."""
    count = rows // group
    prefixes = Prefixes(*(numpy.full(count, number) for number in (NONE, tokens)), (), numpy.full(count, group))
    return Workload.uniform(rows, tokens + own, 16).sharing(prefixes, numpy.arange(rows) // group)


def layout_of(spec, policy: Policy, job: Workload, on_device: bool) -> Layout:
    return Layout.of(spec, policy, job, Budgets(8 * GIB, 8 * GIB if on_device else 0))


IN_RAM = Policy(sequences_in_flight=16, attention_micro_batch=4, tokens_per_pass=512)
STREAMED = Policy(sequences_in_flight=8, attention_micro_batch=2, tokens_per_pass=256, weights=DISK)
HALF = Policy(
    sequences_in_flight=24,
    attention_micro_batch=6,
    tokens_per_pass=1024,
    weights=Placement(0.0, 0.5, 0.5),
    cpu_attention_share=0.0,
)
GPU_KV = dataclasses.replace(IN_RAM, weights=Placement(0.5, 0.5), kv=ON_GPU, attention_micro_batch=16)
BOTH_ATTEND = dataclasses.replace(IN_RAM, weights=ON_GPU, kv=Placement(0.5, 0.5), cpu_attention_share=0.5)
COPIED = dataclasses.replace(IN_RAM, attention_micro_batch=3, tokens_per_pass=100, cpu_attention_share=0.0)
DEEP, SPARSE = planned("gqa", num_hidden_layers=24), planned("deepseek", num_hidden_layers=12)


@pytest.mark.parametrize(
    "spec, machine, on_device, policy, job",
    [
        (DEEP, LAPTOP, False, IN_RAM, Workload.uniform(400, 60, 16)),
        (DEEP, LAPTOP, False, STREAMED, Workload.uniform(32, 8, 100)),
        (DEEP, LAPTOP, True, STREAMED, ragged(100)),
        (DEEP, LAPTOP, True, HALF, Workload.uniform(100, 60, 16)),
        (DEEP, T4, True, GPU_KV, ragged(200)),
        (DEEP, T4, True, BOTH_ATTEND, ragged(100)),
        (DEEP, T4, True, COPIED, Workload.uniform(24, 60, 10)),
        (SPARSE, LAPTOP, False, HALF, ragged(200)),
        (SPARSE, T4, True, STREAMED, ragged(100)),
        (SPARSE, T4, True, BOTH_ATTEND, Workload.uniform(100, 60, 16)),
    ],
)
def test_a_part_tells_what_the_whole_would(spec, machine, on_device, policy, job):
    layout = layout_of(spec, policy, job, on_device)
    exact = forecast(layout, job, machine, EXACT)
    assert forecast(layout, job, machine, FULL).seconds == pytest.approx(exact.seconds, rel=0.03)
    assert forecast(layout, job, machine, QUICK).seconds == pytest.approx(exact.seconds, rel=0.14)


def test_an_exact_forecast_is_the_simulation_of_every_pass():
    job = ragged(30)
    layout = layout_of(SPARSE, BOTH_ATTEND, job, True)
    passes = list(job_passes(job, layout.policy, layout.micro_batches))
    exact = forecast(layout, job, T4, EXACT)
    assert exact.seconds == pytest.approx(simulate_layout(layout, T4, passes).seconds)
    assert exact.passes == len(passes)
    assert (exact.prompt_tokens, exact.generated_tokens) == (job.prompt_tokens.sum(), job.max_tokens.sum())


@pytest.mark.parametrize(
    "policy, job",
    [
        (IN_RAM, Workload.uniform(3000, 50, 16)),
        (IN_RAM, ragged(3000)),
        (dataclasses.replace(STREAMED, tokens_per_pass=64), Workload.uniform(1500, 100, 2)),
        (IN_RAM, sharing(3000, 3000, 400)),
        (IN_RAM, sharing(3000, 8, 120, 1)),
        (STREAMED, sharing(1600, 100, 300, 40)),
    ],
)
def test_a_long_job_follows_from_rows_drawn_from_it(policy, job):
    layout = layout_of(DEEP, policy, job, False)
    part, whole = forecast(layout, job, LAPTOP, FULL), forecast(layout, job, LAPTOP, ALL_PASSES)
    assert whole.passes > FULL.passes * 1.5, "only a part was looked at"
    for name in ("seconds", "passes", "bound_seconds", "prefill_seconds", "decode_seconds"):
        # of few large groups, how many are drawn makes a difference
        assert getattr(part, name) == pytest.approx(getattr(whole, name), rel=0.08 if job.shares else 0.03), name
    assert (part.prompt_tokens, part.generated_tokens) == (whole.prompt_tokens, whole.generated_tokens)


def test_sharing_a_header_is_forecast_to_pay():
    job = sharing(256, 256, 400, 60)
    shared, apart = (forecast(layout_of(DEEP, IN_RAM, each, False), each, LAPTOP) for each in (job, job.apart()))
    assert shared.prompt_tokens == 400 + 256 * 60 and apart.prompt_tokens == 256 * 460
    assert 2 * shared.seconds < apart.seconds and 4 * shared.prefill_seconds < apart.prefill_seconds


@pytest.mark.parametrize("effort", [QUICK, FULL])
def test_twice_the_rows_of_a_long_job_take_twice_as_long(effort):
    jobs = [Workload.uniform(rows, 60, 16) for rows in (20_000, 40_000)]
    one, two = (forecast(layout_of(DEEP, IN_RAM, job, False), job, LAPTOP, effort) for job in jobs)
    assert two.seconds == pytest.approx(2 * one.seconds, rel=0.005)
    assert two.generated_tokens_per_second == pytest.approx(one.generated_tokens_per_second, rel=0.005)
    assert two.lane_seconds[Lane.CPU] == pytest.approx(2 * one.lane_seconds[Lane.CPU], rel=0.005)


def test_a_long_job_of_a_shallow_model_is_forecast_too():
    """Its first part is simulated pass by pass, which says nothing yet of the passes of another part."""
    spec, policy = planned("llama", num_hidden_layers=1), Policy(sequences_in_flight=4, attention_micro_batch=4)
    job = ragged(500)
    layout = layout_of(spec, policy, job, False)
    exact = forecast(layout, job, LAPTOP, EXACT)
    assert exact.passes > QUICK.passes
    assert forecast(layout, job, LAPTOP, QUICK).seconds == pytest.approx(exact.seconds, rel=0.05)


@pytest.mark.parametrize("seed", range(4))
def test_it_matters_little_which_rows_are_drawn(seed):
    job = ragged(400, seed)
    layout = layout_of(DEEP, IN_RAM, job, True)
    exact = forecast(layout, job, T4, ALL_PASSES)
    assert forecast(layout, job, T4, QUICK).seconds == pytest.approx(exact.seconds, rel=0.15)


def test_a_million_rows_are_forecast_from_some():
    """Looking at all would be some hundred thousand passes."""
    job = Workload.uniform(1_000_000, 60, 16)
    layout = layout_of(DEEP, IN_RAM, job, False)
    shorter = Workload.uniform(1000, 60, 16)
    told = forecast(layout, job, LAPTOP, QUICK)
    assert told.seconds == pytest.approx(1000 * forecast(layout, shorter, LAPTOP, EXACT).seconds, rel=0.12)
    assert told.generated_tokens == 16_000_000


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    st.integers(1, 60),
    st.integers(0, 100),
    st.integers(1, 20),
    st.integers(1, 6),
    st.sampled_from([RAM, DISK, Placement(0.0, 0.5, 0.5)]),
    st.booleans(),
)
def test_the_numbers_of_a_forecast_agree_with_each_other(rows, seed, sequences, micro_batch, weights, on_device):
    policy = Policy(
        sequences_in_flight=sequences, attention_micro_batch=micro_batch, tokens_per_pass=128, weights=weights
    )
    job = ragged(rows, seed)
    layout = layout_of(planned("llama"), policy, job, on_device)
    told = forecast(layout, job, LAPTOP, QUICK)
    assert told.prefill_seconds + told.decode_seconds == pytest.approx(told.seconds)
    assert told.bound_seconds == max(told.lane_seconds.values()) <= told.seconds * (1 + 1e-9)
    assert told.lane_seconds[told.binding_lane] == told.bound_seconds
    assert all(0 <= told.utilisation(lane) <= 1 + 1e-9 for lane in Lane)
    assert told.generated_tokens_per_second == pytest.approx(job.max_tokens.sum() / told.seconds)
    assert told.total_tokens_per_second == pytest.approx((job.max_tokens + job.prompt_tokens).sum() / told.seconds)
    assert told.passes >= job.max_tokens.max()


def test_the_order_of_rows_matters():
    """Short ones last keep the slots full; a long one last runs alone."""
    job = Workload.of([20] * 31, [4] * 30 + [90])
    longest_first = Workload(job.prompt_tokens[::-1], job.max_tokens[::-1])
    last, first = (forecast(layout_of(DEEP, IN_RAM, each, False), each, LAPTOP) for each in (job, longest_first))
    assert first.seconds < last.seconds
    assert first.generated_tokens == last.generated_tokens


def test_rows_that_no_slab_holds_take_no_time():
    job = Workload.of([30, 30], [1, 1])
    layout = layout_of(DEEP, dataclasses.replace(IN_RAM, kv_tokens=16), job, False)
    assert forecast(layout, job, LAPTOP) == Forecast(0.0, 0.0, 0.0, 0, 0, 0, dict.fromkeys(Lane, 0.0))


def test_hidden_states_off_the_device_are_never_free():
    job = Workload.uniform(100, 200, 4)
    base = dataclasses.replace(GPU_KV, weights=ON_GPU, tokens_per_pass=8000, sequences_in_flight=100)
    machine = dataclasses.replace(T4, h2d=dataclasses.replace(T4.h2d, bytes_per_second=2e8))
    told = [
        forecast(layout_of(DEEP, dataclasses.replace(base, hidden=hidden), job, True), job, machine)
        for hidden in (ON_GPU, Placement(0.5, 0.5), Placement(0.0, 1.0))
    ]
    assert told[0].seconds < told[1].seconds < told[2].seconds
    assert told[2].binding_lane is Lane.H2D


def test_drawn_rows_are_evenly_spaced_and_in_order():
    job = Workload.of(range(100), range(1, 101))
    few = drawn(job, 4)
    assert few.prompt_tokens.tolist() == [12, 37, 62, 87]
    assert few.max_tokens.tolist() == [13, 38, 63, 88]
    assert drawn(job, 100) is job


def test_passes_are_bound_by_slots_or_by_the_tokens_of_a_pass():
    job = Workload.uniform(100, 90, 10)
    assert passes_guess(Policy(sequences_in_flight=10, tokens_per_pass=10_000), job) == 100  # 1000 tokens, 10 a pass
    assert passes_guess(Policy(sequences_in_flight=100, tokens_per_pass=100), job) == 100  # 10,000 tokens, 100 a pass
    assert passes_guess(Policy(sequences_in_flight=1000, tokens_per_pass=10_000), job) == 10  # no more slots than rows


@pytest.mark.parametrize("name, full, quick", [("deepseek-r1", 7, 4), ("opt-175b", 40, 8), ("qwen3-235b-a22b", 7, 4)])
def test_deep_models_are_simulated_in_part(name, full, quick):
    """A model of many experts has many weight units a layer, so that few of its layers are looked at."""
    spec = read_model_plan(known(name)).spec
    policy = Policy(sequences_in_flight=4, attention_micro_batch=4, weights=DISK, kv=RAM)
    layout = Layout.of(spec, policy, Workload.uniform(4, 10, 2), Budgets(200 * GIB, 15 * GIB))
    assert (FULL.layers_of(layout), QUICK.layers_of(layout)) == (full, quick)
    few = layout.shallow(full)
    assert few.spec.num_layers == full
    assert few.spec.sparse_layers == layout.spec.sparse_layers[-full:], "the layers that repeat"
    assert few.account is layout.account


def test_a_forecast_is_the_same_each_time():
    job = ragged(50)
    layout = layout_of(SPARSE, HALF, job, True)
    assert forecast(layout, job, T4) == forecast(layout, job, T4)
