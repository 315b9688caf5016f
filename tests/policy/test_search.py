"""The plan always fits its budgets, uses what they allow, keeps what the user decided, and says what is short."""

from __future__ import annotations

import dataclasses
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, LAPTOP, MIB, NO_GPU, T4, planned

from flexrun.config import Placement, Policy
from flexrun.core import Tier, parse_bytes
from flexrun.errors import BudgetError, ConfigError
from flexrun.hardware import CompressedRates, Hardware, Transfer
from flexrun.placement import memory_account, place_weights
from flexrun.policy.features import AUTO_CHOICES, Features
from flexrun.policy.fill import NoFit
from flexrun.policy.forecast import FULL, forecast
from flexrun.policy.layout import Budgets, Layout, room_for
from flexrun.policy.search import Plan, search, search_worth
from flexrun.workload import Workload

SPEC = planned("gqa", num_hidden_layers=8, hidden_size=512, intermediate_size=1408, vocab_size=4000)  # 45 MiB
UNIFORM = Workload.uniform


def plan_for(workload: Workload, cpu_bytes: int, gpu_bytes: int = 0, machine: Hardware = LAPTOP, **options) -> Plan:
    return search(SPEC, machine, workload, Budgets(cpu_bytes, gpu_bytes), **options)


def assert_fits(plan: Plan, workload: Workload, budgets: Budgets) -> None:
    """The account made anew, by the executor's own function, is the plan's, and within the budgets."""
    policy, layout = plan.policy, plan.layout
    account = memory_account(
        layout.spec,
        policy,
        place_weights(layout.spec, policy, on_device=budgets.on_device),
        policy.kv_tokens or room_for(policy, workload),
        on_device=budgets.on_device,
        gpu_budget_bytes=budgets.gpu_bytes or None,
        cpu_budget_bytes=budgets.cpu_bytes,
    )
    assert account == layout.account
    for tier in Tier:
        if budgets.of(tier):
            assert account.total(tier) <= budgets.of(tier)
    assert layout.policy == policy
    assert policy.sequences_in_flight <= max(len(workload), 1)
    room = min(micro_batch.capacity_tokens for micro_batch in layout.micro_batches)
    assert room >= workload.longest_tokens, "a micro-batch holds the longest sequence"


# Budgets -----------------------------------------------------------------------------------------------


@settings(deadline=None, derandomize=True, max_examples=14)
@given(
    st.integers(1, 60),
    st.integers(1, 400),
    st.integers(1, 20),
    st.integers(1, 100),
    st.one_of(st.just(0), st.just(0), st.integers(1, 60)),
    st.sampled_from([LAPTOP, T4]),
)
def test_a_plan_fits_its_budgets_or_says_what_is_short(sequences, prompt_tokens, max_tokens, cpu, gpu, machine):
    workload, budgets = UNIFORM(sequences, prompt_tokens, max_tokens), Budgets(cpu * MIB, gpu * MIB)
    try:
        plan = search(SPEC, machine, workload, budgets)
    except NoFit as error:
        # the size is what is missing: with so much more there is a plan
        tier, size = re.search(r"^(\w+) memory is short by ([\d.,]+ \w+)", error.message).groups()
        assert tier in ("cpu", "gpu")
        assert budgets.of(Tier(tier)) > 0
        assert f"--{tier}-memory" in error.hint
        assert 0 < parse_bytes(size.replace(",", "")) < 600 * MIB
        return
    assert_fits(plan, workload, budgets)
    assert plan.policy.hidden == Placement(1.0, 0.0), "what this version does not run is not planned unasked"
    assert (plan.policy.weight_bits, plan.policy.kv_bits) == (16, 16)


def test_what_is_short_is_short_by_so_much():
    """The message's number is exact: so much more and the smallest policy fits."""
    workload = UNIFORM(4, 500, 50)
    budget = 4 * MIB
    with pytest.raises(NoFit) as refusal:
        plan_for(workload, budget)
    missing = parse_bytes(re.search(r"short by ([\d.]+ \w+)", refusal.value.message).group(1))
    rounding = MIB // 10
    plan_for(workload, budget + missing + rounding)
    with pytest.raises(NoFit):
        plan_for(workload, budget + missing - rounding)
    assert "even with every weight on disk" in refusal.value.message
    for kind in ("kv_staging", "workspace", "ring", "rotary"):
        assert re.search(rf"{kind} [\d.]+ \w+", refusal.value.message), "it says what takes the bytes"


def test_a_gpu_that_is_short_is_named():
    with pytest.raises(NoFit, match=r"^gpu memory is short by") as refusal:
        plan_for(UNIFORM(4, 500, 50), 8 * GIB, MIB, machine=T4)
    assert "--gpu-memory" in refusal.value.hint


def test_a_disk_that_cannot_hold_the_weights_is_named():
    with pytest.raises(NoFit, match=r"^disk memory is short by") as refusal:
        search(SPEC, LAPTOP, UNIFORM(4, 50, 5), Budgets(8 * GIB, disk_bytes=20 * MIB))
    assert "--disk-memory" in refusal.value.hint


def test_no_fit_is_a_budget_error():
    assert issubclass(NoFit, BudgetError)


# Using what there is -----------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [LAPTOP, NO_GPU])
def test_a_model_that_fits_in_ram_stays_there(machine):
    plan = plan_for(UNIFORM(32, 100, 20), GIB, machine=machine)
    assert plan.policy.weights == Placement()
    assert plan.policy.sequences_in_flight == 32
    assert plan.layout.account.host_ring_bytes == 0


@pytest.mark.parametrize(
    "name, workload",
    [
        ("gqa", UNIFORM(32, 100, 20)),
        ("gqa", UNIFORM(64, 500, 1)),
        ("llama", UNIFORM(64, 10, 30)),
        ("llama", Workload.of(range(300, 10, -10), [9, 30, 17] * 9 + [4, 4])),
    ],
)
def test_nothing_is_offloaded_from_a_gpu_that_holds_all(name, workload):
    plan = search(planned(name), T4, workload, Budgets(8 * GIB, 8 * GIB))
    assert plan.policy.weights == Placement(1.0, 0.0)
    assert plan.policy.kv == Placement(1.0, 0.0)
    moved = {Tier.GPU: 0, Tier.CPU: 0}
    assert (plan.layout.account.device_ring_bytes, plan.layout.account.host_ring_bytes) == tuple(moved.values())


def test_a_model_that_does_not_fit_keeps_what_it_can():
    budget = SPEC.weight_bytes * 3 // 4
    plan = plan_for(UNIFORM(16, 30, 10), budget)
    assert 0 < plan.policy.weights.disk < 1
    assert plan.layout.account.total(Tier.CPU) > 0.85 * budget


def test_the_gpu_is_filled_before_ram():
    plan = plan_for(UNIFORM(16, 30, 10), 400 * MIB, 45 * MIB, machine=T4)
    assert plan.policy.weights.gpu > 0.2
    assert plan.policy.weights.disk == 0


def test_more_memory_never_makes_a_plan_much_slower():
    workload = UNIFORM(32, 100, 8)
    times = [plan_for(workload, GIB, size * MIB, machine=T4).forecast.seconds for size in (12, 30, 300)]
    for less, more in pairwise(times):
        assert more <= less * 1.03
    assert times[-1] < times[0] / 1.5


def test_the_most_expensive_budget_has_a_price():
    """Where weights stream, a byte of the GPU is worth something, and one of a RAM that holds all is not."""
    spec = planned("llama", num_hidden_layers=16)
    plan = search(spec, T4, UNIFORM(64, 200, 20), Budgets(8 * GIB, 150 * MIB))
    assert plan.gains[Tier.GPU] > 0.2
    assert plan.gains[Tier.CPU] == pytest.approx(0.0, abs=1e-6)
    assert plan.solution.prices[Tier.GPU] > 0
    all_fits = search(spec, T4, UNIFORM(16, 20, 5), Budgets(8 * GIB, 8 * GIB))
    assert all_fits.gains == {Tier.GPU: pytest.approx(0.0, abs=0.01), Tier.CPU: pytest.approx(0.0, abs=0.01)}


# What the user decided ----------------------------------------------------------------------------------


FIXABLE = {
    "sequences_in_flight": 5,
    "tokens_per_pass": 300,
    "attention_micro_batch": 7,
    "token_micro_batch": 77,
    "kv_tokens": 4000,
    "weights": Placement(0.25, 0.5, 0.25),
    "kv": Placement(0.5, 0.5),
    "hidden": Placement(0.5, 0.5),
    "cpu_attention_share": 0.5,
    "weight_bits": 8,
    "kv_bits": 4,
}


@pytest.mark.parametrize("field", FIXABLE)
def test_a_field_that_is_fixed_is_kept_and_the_others_are_chosen(field):
    plan = plan_for(UNIFORM(20, 100, 8), 8 * GIB, 40 * MIB, machine=T4, fixed={field: FIXABLE[field]})
    assert getattr(plan.policy, field) == FIXABLE[field]
    chosen = dataclasses.replace(plan.policy, **{field: getattr(Policy(), field)})
    assert chosen != Policy(), "the rest is the search's"
    assert plan.forecast.seconds > 0


def test_all_fields_may_be_fixed():
    policy = Policy(
        sequences_in_flight=6,
        tokens_per_pass=200,
        attention_micro_batch=2,
        token_micro_batch=64,
        weights=Placement(0.5, 0.5),
        kv=Placement(0.0, 1.0),
        cpu_attention_share=0.0,
    )
    workload = UNIFORM(60, 100, 20)
    fixed = {each.name: getattr(policy, each.name) for each in dataclasses.fields(Policy)}
    plan = plan_for(workload, 8 * GIB, 8 * GIB, machine=T4, fixed=fixed)
    assert plan.policy == policy
    layout = Layout.of(SPEC, policy, workload, Budgets(8 * GIB, 8 * GIB))
    assert plan.forecast == forecast(layout, workload, T4, FULL)


def test_fixed_fields_that_fit_nowhere_are_refused():
    with pytest.raises(NoFit):
        plan_for(UNIFORM(60, 100, 20), 20 * MIB, fixed={"weights": Placement()})
    with pytest.raises(NoFit):
        plan_for(UNIFORM(400, 2000, 20), 60 * MIB, fixed={"sequences_in_flight": 400, "kv": Placement()})


def test_fields_that_are_none_are_refused():
    with pytest.raises(ConfigError, match="unknown policy field 'slots'"):
        plan_for(UNIFORM(4, 10, 2), GIB, fixed={"slots": 3})
    with pytest.raises(ConfigError, match="sequences_in_flight=0"):
        plan_for(UNIFORM(4, 10, 2), GIB, fixed={"sequences_in_flight": 0})


def test_more_slots_than_rows_are_never_chosen():
    plan = plan_for(UNIFORM(3, 30, 10), GIB)
    assert plan.policy.sequences_in_flight == 3
    plan = plan_for(UNIFORM(100, 30, 10), GIB, fixed={"sequences_in_flight": 7})
    assert plan.policy.sequences_in_flight == 7


# Features ----------------------------------------------------------------------------------------------


def test_kv_goes_to_disk_where_it_may_and_must():
    """Two long sequences: the cache of one is larger than the RAM, which holds the rest."""
    workload, budget = UNIFORM(2, 30_000, 100), 80 * MIB
    with pytest.raises(NoFit):
        plan_for(workload, budget, features=Features(kv_on_disk=False))
    plan = plan_for(workload, budget)
    assert plan.policy.kv.disk > 0
    assert_fits(plan, workload, Budgets(budget))


def test_fewer_bits_are_taken_where_they_are_offered_and_pay():
    spec, workload, budgets = planned("llama", num_hidden_layers=16), UNIFORM(32, 100, 8), Budgets(8 * GIB, 150 * MIB)
    fixed, either = {"cpu_attention_share": 1.0, "token_micro_batch": 1024}, Features(weight_bits=(16, 4))
    full = search(spec, T4, workload, budgets, fixed=fixed)
    offered = search(spec, T4, workload, budgets, fixed=fixed, features=either)
    assert (full.policy.weight_bits, offered.policy.weight_bits) == (16, 4)
    assert offered.forecast.seconds < 1.02 * full.forecast.seconds
    roomy = search(spec, T4, workload, Budgets(8 * GIB, 8 * GIB), fixed=fixed, features=either)
    assert roomy.policy.weight_bits == 16, "dequantising what fits anyway costs time"


ANY_BITS = Features(weight_bits=AUTO_CHOICES["weight_bits"])


def with_kernels(machine: Hardware, **compressed: CompressedRates) -> Hardware:
    """Its CPU multiplies straight from codes of these bits, and from no others."""
    found = {name.removeprefix("bits_"): each for name, each in compressed.items()}
    rates = {dtype: dataclasses.replace(each, compressed=found) for dtype, each in machine.cpu.rates.items()}
    return dataclasses.replace(
        machine, cpu=dataclasses.replace(machine.cpu, rates=rates, dequantise_bytes_per_second=0.0)
    )


def test_on_a_cpu_fewer_bits_must_save_a_tenth_of_the_time():
    kernel = CompressedRates(1.2e11, 1.4e10, 5e9, few_rows=6)
    machine = with_kernels(LAPTOP, bits_4=kernel, bits_8=kernel)
    few = UNIFORM(4, 16, 64)  # which waits for the weights, in RAM and on disk
    large = planned("gqa", num_hidden_layers=8, hidden_size=2048, intermediate_size=5632, vocab_size=4000)
    for cpu_bytes in (2 * GIB, GIB // 2):
        plain, best = (
            search(large, machine, few, Budgets(cpu_bytes), features=each) for each in (Features(), ANY_BITS)
        )
        assert plain.policy.weight_bits == 16 and best.policy.weight_bits == 4
        assert best.forecast.seconds < plain.forecast.seconds / 1.1
    many = UNIFORM(200, 400, 1)  # which computes all the time: there are no fewer products with fewer bits
    assert search(large, machine, many, Budgets(2 * GIB), features=ANY_BITS).policy.weight_bits == 16


def test_a_cache_is_compressed_where_that_is_offered_and_pays():
    """Over a link that is the bottleneck; not in RAM that has room, nor of latents."""
    offered, slow = Features(kv_bits=AUTO_CHOICES["kv_bits"]), dataclasses.replace(T4, h2d=Transfer(1e9))
    here = {"kv": Placement(0, 1, 0), "cpu_attention_share": 0.0, "sequences_in_flight": 16}
    plain, best = (
        plan_for(UNIFORM(16, 1000, 64), 64 * GIB, 8 * GIB, machine=slow, fixed=here, features=each)
        for each in (Features(), offered)
    )
    assert plain.policy.kv_bits == 16 != best.policy.kv_bits
    assert best.forecast.seconds < 0.98 * plain.forecast.seconds
    assert plan_for(UNIFORM(4, 16, 8), GIB, features=offered).policy.kv_bits == 16
    latent = search(planned("deepseek"), LAPTOP, UNIFORM(4, 16, 8), Budgets(GIB), features=offered)
    assert latent.policy.kv_bits == 16


def test_bits_that_were_decided_are_kept():
    assert plan_for(UNIFORM(4, 16, 64), GIB, features=ANY_BITS, fixed={"weight_bits": 8}).policy.weight_bits == 8


def test_a_model_that_fits_in_few_bits_only_takes_them():
    budgets = Budgets(32 * MIB, 0, 30 * MIB)  # on disk, of 45
    with pytest.raises(NoFit):
        search(SPEC, LAPTOP, UNIFORM(4, 16, 8), budgets)
    assert search(SPEC, LAPTOP, UNIFORM(4, 16, 8), budgets, features=ANY_BITS).policy.weight_bits < 16


def test_bits_without_rates_are_not_weighed():
    fast = CompressedRates(1e13, 1e13, 1e13)
    for machine, bits in ((with_kernels(LAPTOP), 16), (with_kernels(LAPTOP, bits_8=fast), 8)):
        assert plan_for(UNIFORM(4, 16, 64), GIB, machine=machine, features=ANY_BITS).policy.weight_bits == bits


# Whatever the model ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, machine, gpu_bytes",
    [
        *((name, LAPTOP, 0) for name in ("window", "windows", "mixtral", "deepseek")),
        ("window", T4, 100 * MIB),
        ("mixtral", T4, 400 * MIB),
        ("deepseek", T4, 200 * MIB),
        ("deepseek", LAPTOP, 120 * MIB),
    ],
)
def test_every_kind_of_model_is_planned(name, machine, gpu_bytes):
    spec, workload = planned(name, num_hidden_layers=4), UNIFORM(16, 100, 10)
    budgets = Budgets(spec.weight_bytes * 3 // 4, gpu_bytes)
    plan = search(spec, machine, workload, budgets)
    assert_fits(plan, workload, budgets)
    assert plan.forecast.generated_tokens == 160
    assert plan.solution is None or plan.forecast.seconds > 0.8 * plan.solution.seconds, "a program is a lower bound"


def test_one_row_one_token_one_layer():
    spec = planned("llama", num_hidden_layers=1)
    for budgets in (Budgets(GIB), Budgets(GIB, GIB)):
        plan = search(spec, LAPTOP, UNIFORM(1, 1, 1), budgets)
        assert (plan.policy.sequences_in_flight, plan.forecast.passes) == (1, 1)


def test_a_search_gives_the_same_plan_each_time():
    workload, fixed = Workload.of(range(200, 20, -10), [9, 17, 30] * 6), {"cpu_attention_share": 1.0}
    first, second = (plan_for(workload, 40 * MIB, 30 * MIB, machine=T4, fixed=fixed) for _ in range(2))
    assert (first.policy, first.forecast) == (second.policy, second.forecast)
    assert (first.programs, first.simulations) == (second.programs, second.simulations)


def test_a_job_of_hours_is_worth_a_longer_search(monkeypatch):
    """Another search of more effort, and the better of what both find."""
    found = []

    def recorded(*job, effort: float = 1.0, **options) -> Plan:
        found.append((effort, search(*job, effort=effort, **options)))
        return found[-1][1]

    monkeypatch.setattr("flexrun.policy.search.search", recorded)
    monkeypatch.setattr("flexrun.policy.search.MOST_EFFORT", 2.0)
    short = search_worth(SPEC, LAPTOP, UNIFORM(60, 120, 20), Budgets(80 * MIB))
    assert found == [(1.0, short)] and short.forecast.seconds < 60
    found.clear()
    long = search_worth(SPEC, LAPTOP, UNIFORM(3_000_000, 120, 20), Budgets(80 * MIB))
    (_, usual), (effort, longer) = found
    assert effort == 2.0 and usual.forecast.seconds > 1200
    assert long.forecast.seconds == min(usual.forecast.seconds, longer.forecast.seconds)


def test_a_machine_without_the_dtype_is_refused():
    rates = {"float32": LAPTOP.cpu.rates["float32"]}
    machine = dataclasses.replace(LAPTOP, cpu=dataclasses.replace(LAPTOP.cpu, rates=rates))
    with pytest.raises(ConfigError, match="no rates for float16"):
        search(SPEC, machine, UNIFORM(4, 10, 2), Budgets(GIB))
