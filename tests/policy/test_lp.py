"""The program's optimum is the one that a person finds by hand, and its prices are what a byte more would save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import GIB, LAPTOP, MIB, T4, planned

from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError
from flexrun.hardware import Hardware, Processor, Transfer
from flexrun.placement import kv_bytes_per_token, kv_micro_batches, merge_bytes, place_weights
from flexrun.policy.features import PLANNABLE, RUNNABLE, Features
from flexrun.policy.kinds import PassKind, pass_kinds
from flexrun.policy.layout import Budgets
from flexrun.policy.lp import KV_HOMES, Solution, placement_of, solve_placement
from flexrun.policy.passes import job_passes
from flexrun.workload import Workload

SPEC = planned("llama", num_hidden_layers=12)  # 325 MiB of weights, 48 KiB of KV a token
JOB = Workload.uniform(64, 100, 20)
POLICY = Policy(sequences_in_flight=16, attention_micro_batch=4, tokens_per_pass=400)
ROOM = 16 * 119
KV_BYTES = ROOM * kv_bytes_per_token(SPEC)
STREAMED = Placement(0.0, 0.0, 1.0)


def kinds_of(policy: Policy, job: Workload = JOB) -> list[PassKind]:
    alone = dataclasses.replace(policy, attention_micro_batch=policy.sequences_in_flight)
    (home,) = kv_micro_batches(alone, ROOM, on_device=False)
    split = dataclasses.replace(home, device_share=policy.kv_device_tokens_share)
    return pass_kinds(job_passes(job, alone, [split]))


def streamed(policy: Policy, on_device: bool):
    return place_weights(SPEC, dataclasses.replace(policy, weights=STREAMED), on_device=on_device)


def solve(
    machine: Hardware,
    budgets: Budgets,
    policy: Policy = POLICY,
    features: Features = RUNNABLE,
    fixed: Mapping | None = None,
    kv_home: str | None = None,
) -> Solution | None:
    weights = streamed(policy, budgets.on_device)
    return solve_placement(
        SPEC, policy, kinds_of(policy), ROOM, machine, budgets, weights, features, fixed or {}, kv_home
    )


WEIGHT_BYTES = streamed(POLICY, True).stored_bytes


def fast_but(**slow: Transfer) -> Hardware:
    """A machine on which nothing takes time but the links that are named."""
    rates = dataclasses.replace(
        T4.cpu.rates["float16"],
        matmul_flops_per_second=1e18,
        weight_bytes_per_second=1e18,
        activation_bytes_per_second=1e18,
        decode_kv_bytes_per_second=1e18,
        prefill_attention_flops_per_second=1e18,
    )
    instant, processor = Transfer(1e18), Processor({"float16": rates})
    links = {name: slow.get(name, instant) for name in ("h2d", "d2h", "disk_read", "disk_write", "host_copy")}
    return dataclasses.replace(T4, cpu=processor, gpu=processor, duplex_share=1.0, contention={}, **links)


IN_MEMORY = Features(kv_on_disk=False)
passes = sum(kind.count for kind in kinds_of(POLICY))


# Optima that are known ----------------------------------------------------------------------------------


def test_what_fits_the_gpu_stays_there():
    solution = solve(T4, Budgets(8 * GIB, 8 * GIB), kv_home="gpu")
    assert solution.weights == Placement(1.0, 0.0, 0.0)
    assert solution.kv_placement == Placement(1.0, 0.0, 0.0)
    assert solution.prices == {Tier.GPU: 0.0, Tier.CPU: 0.0}
    assert solution.seconds < solve(T4, Budgets(8 * GIB, 300 * MIB), kv_home="cpu_to_gpu").seconds


def test_what_fits_in_ram_stays_there():
    solution = solve(LAPTOP, Budgets(8 * GIB))
    assert (solution.weights, solution.kv["cpu_on_cpu"], solution.cpu_attention_share) == (Placement(), 1.0, 1.0)


def test_where_only_the_link_takes_time_the_gpu_is_filled_with_weights():
    """Attention on the CPU costs nothing here, so that no KV takes room on the GPU or crosses the link."""
    link = Transfer(1e9)
    budgets = Budgets(8 * GIB, 300 * MIB)
    solution = solve(fast_but(h2d=link), budgets)
    assert 0.5 < solution.weights.gpu < 1.0
    assert solution.kv["cpu_on_cpu"] == pytest.approx(1.0, abs=1e-4)
    moved = sum(unit.disk_bytes for unit in streamed(POLICY, True).units)
    least = passes * moved * (1 - solution.weights.gpu) / link.bytes_per_second
    attended = sum(kind.count * kind.shape.micro_batches[0].cached.query_tokens for kind in kinds_of(POLICY))
    assert attended < int(JOB.kv_tokens.sum()) / 2, "prompts that start in a pass send no queries"
    query_bytes = SPEC.num_layers * SPEC.query_size * 2 * attended
    assert solution.seconds == pytest.approx(least + query_bytes / link.bytes_per_second, rel=0.01)


def test_where_only_the_disk_takes_time_ram_is_filled_with_weights():
    disk = Transfer(1e9)
    budget = WEIGHT_BYTES // 2 + KV_BYTES
    solution = solve(fast_but(disk_read=disk), Budgets(budget), features=IN_MEMORY)
    assert 0.2 < solution.weights.cpu < 0.5
    assert solution.weights.gpu == 0.0
    moved = sum(unit.disk_bytes for unit in streamed(POLICY, False).units)
    assert solution.seconds == pytest.approx(passes * moved * solution.weights.disk / disk.bytes_per_second, rel=1e-3)


def test_kv_in_ram_is_attended_where_that_is_cheap():
    """A CPU that attends slowly leaves it to the GPU, a slow link leaves it to the CPU."""
    budgets, fixed = Budgets(8 * GIB, 8 * GIB), {"kv": Placement(0.0, 1.0)}
    slow = dataclasses.replace(
        T4.cpu.rates["float16"], decode_kv_bytes_per_second=1e8, prefill_attention_flops_per_second=1e9
    )
    to_gpu = solve(dataclasses.replace(T4, cpu=Processor({"float16": slow})), budgets, fixed=fixed)
    assert to_gpu.kv["cpu_to_gpu"] > 0.9
    on_cpu = solve(dataclasses.replace(T4, h2d=Transfer(1e8), d2h=Transfer(1e9)), budgets, fixed=fixed)
    assert on_cpu.kv["cpu_on_cpu"] > 0.9


def test_in_two_half_batches_the_cpu_attends_beside_the_matmuls():
    """As a whole, a pass takes the sum of both; in halves, the longer, and the GPU reads its weights twice."""
    seconds = {}
    for speed in (6e9, 1e18):
        rates = dataclasses.replace(T4.cpu.rates["float16"], decode_kv_bytes_per_second=speed)
        machine = dataclasses.replace(T4, cpu=dataclasses.replace(T4.cpu, rates={"float16": rates}))
        for halves in (False, True):
            policy = dataclasses.replace(POLICY, half_batches=halves)
            solution = solve(machine, Budgets(8 * GIB, 8 * GIB), policy, kv_home="cpu_on_cpu")
            seconds[speed, halves] = solution.seconds
    assert seconds[6e9, True] < 0.8 * seconds[6e9, False]
    assert seconds[1e18, True] > 1.2 * seconds[1e18, False], "nothing to hide: the second reading is all that is left"


def test_the_newest_tokens_on_the_device_take_room_from_weights_and_work_from_the_cpu():
    policies = POLICY, dataclasses.replace(POLICY, kv_device_tokens_share=0.5)
    link, budgets = fast_but(h2d=Transfer(1e9)), Budgets(8 * GIB, 300 * MIB)
    whole, split = (solve(link, budgets, policy, kv_home="cpu_on_cpu") for policy in policies)
    ring = streamed(POLICY, True).max_unit_stream_bytes[1]  # shrinks with what streams
    taken = (0.5 * KV_BYTES + merge_bytes(SPEC, POLICY)[1]) / (WEIGHT_BYTES - ring)
    assert whole.weights.gpu - split.weights.gpu == pytest.approx(taken, rel=0.02)
    slow = dataclasses.replace(T4.cpu.rates["float16"], decode_kv_bytes_per_second=1e6)
    reading = dataclasses.replace(fast_but(), cpu=Processor({"float16": slow}))
    whole, split = (solve(reading, Budgets(8 * GIB, 8 * GIB), policy, kv_home="cpu_on_cpu") for policy in policies)
    border, decoding = 119 - 119 // 2, (100 + 119) / 2  # each prompt ends above it; tokens attended on average
    assert split.seconds == pytest.approx(border / decoding * whole.seconds, rel=0.02)


def test_kv_goes_to_disk_only_where_that_is_offered():
    small = Budgets(KV_BYTES // 2 + 60 * MIB)
    assert solve(LAPTOP, small, features=IN_MEMORY) is None
    solution = solve(LAPTOP, small, features=RUNNABLE)
    assert solution.kv["disk_on_cpu"] > 0.1
    assert solution.kv_placement.disk == pytest.approx(solution.kv["disk_on_cpu"], abs=1e-6)


# What must hold of every solution -----------------------------------------------------------------------

budgets_of_any_size = st.builds(
    Budgets,
    st.integers(40, 700).map(lambda size: size * MIB),
    st.one_of(st.just(0), st.integers(30, 600).map(lambda size: size * MIB)),
    st.one_of(st.none(), st.integers(300, 900).map(lambda size: size * MIB)),
)


@settings(deadline=None, derandomize=True, max_examples=50)
@given(budgets_of_any_size, st.sampled_from([LAPTOP, T4]), st.sampled_from([IN_MEMORY, RUNNABLE, PLANNABLE]))
def test_solutions_satisfy_what_was_asked(budgets, machine, features):
    solution = solve(machine, budgets, features=features)
    if solution is None:
        return
    weights, kv = solution.weights, solution.kv_placement
    for placement in (weights, kv, solution.hidden):
        assert placement.gpu + placement.cpu + placement.disk == pytest.approx(1.0)
    assert sum(solution.kv.values()) == pytest.approx(1.0, abs=1e-5)
    assert set(solution.kv) == set(KV_HOMES)
    near = 1 * MIB  # the solver's tolerance
    assert WEIGHT_BYTES * weights.cpu + KV_BYTES * kv.cpu <= budgets.cpu_bytes + near
    if budgets.on_device:
        assert WEIGHT_BYTES * weights.gpu + KV_BYTES * kv.gpu <= budgets.gpu_bytes + near
    else:
        assert (weights.gpu, kv.gpu) == (0.0, 0.0)
        assert solution.cpu_attention_share == 1.0
    if budgets.disk_bytes is not None:
        assert WEIGHT_BYTES + KV_BYTES * kv.disk <= budgets.disk_bytes + near
    if not features.kv_on_disk:
        assert kv.disk == 0.0
    if not features.hidden_off_device:
        assert solution.hidden == Placement(1.0, 0.0)
    assert all(price >= 0 for price in solution.prices.values())
    assert set(solution.prices) == {tier for tier in Tier if budgets.of(tier) is not None and budgets.of(tier) > 0}
    assert solution.seconds > 0


@settings(deadline=None, derandomize=True, max_examples=30)
@given(budgets_of_any_size, st.sampled_from([LAPTOP, T4]), st.sampled_from(["cpu", "gpu"]))
def test_a_price_is_what_a_byte_more_saves(budgets, machine, name):
    """Time falls ever slower with a budget, so that the price is the most any byte more can save."""
    solution = solve(machine, budgets)
    if solution is None or not getattr(budgets, f"{name}_bytes"):
        return
    tier, more = Tier(name), MIB // 2
    richer, richest = (
        solve(machine, dataclasses.replace(budgets, **{f"{name}_bytes": getattr(budgets, f"{name}_bytes") + extra}))
        for extra in (more, 100 * more)
    )
    near = 1e-5 * solution.seconds
    assert richer.seconds <= solution.seconds + near
    assert richer.seconds >= solution.seconds - solution.prices[tier] * more - near
    assert richest.seconds >= solution.seconds - solution.prices[tier] * 100 * more - near


@pytest.mark.parametrize(
    "machine, budgets, tier",
    [
        (T4, Budgets(8 * GIB, 200 * MIB), Tier.GPU),
        (T4, Budgets(8 * GIB, 250 * MIB), Tier.GPU),
        (LAPTOP, Budgets(KV_BYTES + 200 * MIB), Tier.CPU),
    ],
)
def test_a_little_more_of_the_scarce_tier_saves_its_price(machine, budgets, tier):
    name, more = f"{tier.value}_bytes", 4 * MIB
    now = solve(machine, budgets)
    later = solve(machine, dataclasses.replace(budgets, **{name: getattr(budgets, name) + more}))
    saved = now.seconds - later.seconds
    assert saved > 0
    assert saved == pytest.approx(now.prices[tier] * more, rel=0.02)


# Fixed fields and nothing at all -----------------------------------------------------------------------


@pytest.mark.parametrize("weights", [Placement(0.25, 0.5, 0.25), Placement(0.0, 0.0, 1.0)])
def test_weights_that_are_fixed_are_kept(weights):
    solution = solve(T4, Budgets(8 * GIB, 8 * GIB), fixed={"weights": weights})
    found = solution.weights
    assert (found.gpu, found.cpu, found.disk) == pytest.approx((weights.gpu, weights.cpu, weights.disk), abs=1e-6)


def test_kv_and_its_share_that_are_fixed_are_kept():
    fixed = {"kv": Placement(0.5, 0.5), "cpu_attention_share": 0.25}
    solution = solve(T4, Budgets(8 * GIB, 8 * GIB), fixed=fixed)
    assert solution.kv["gpu"] == pytest.approx(0.5)
    assert solution.kv["cpu_on_cpu"] == pytest.approx(0.125)
    assert solution.kv["cpu_to_gpu"] == pytest.approx(0.375)
    assert solution.cpu_attention_share == pytest.approx(0.25)


def test_what_the_user_fixes_may_be_what_this_version_does_not_run():
    solution = solve(LAPTOP, Budgets(8 * GIB), fixed={"kv": Placement(0.0, 0.5, 0.5)})
    assert solution.kv_placement.disk == pytest.approx(0.5)
    solution = solve(T4, Budgets(8 * GIB, 8 * GIB), fixed={"hidden": Placement(0.25, 0.75)})
    assert (solution.hidden.gpu, solution.hidden.cpu) == pytest.approx((0.25, 0.75))


@pytest.mark.parametrize("home", ["gpu", "cpu_to_gpu", "cpu_on_cpu"])
def test_all_kv_may_be_sent_to_one_home(home):
    solution = solve(T4, Budgets(8 * GIB, 8 * GIB), kv_home=home)
    assert solution.kv[home] == pytest.approx(1.0)
    free = solve(T4, Budgets(8 * GIB, 8 * GIB))
    assert free.seconds <= solution.seconds * (1 + 1e-6)


def test_what_fits_nowhere_has_no_solution():
    assert solve(LAPTOP, Budgets(20 * MIB)) is None
    assert solve(T4, Budgets(8 * GIB, 8 * MIB)) is None
    assert solve(T4, Budgets(8 * GIB, 100 * MIB), fixed={"weights": Placement(1.0, 0.0)}) is None
    assert solve(LAPTOP, Budgets(8 * GIB, disk_bytes=100 * MIB)) is None, "packed weights stay on disk"


def test_bits_need_a_machine_that_brings_them_back():
    with pytest.raises(ConfigError, match="no dequantise_bytes_per_second"):
        solve(fast_but(), Budgets(8 * GIB), dataclasses.replace(POLICY, weight_bits=8))


def test_fewer_bits_take_less_time_where_bytes_matter():
    budgets = Budgets(8 * GIB, 200 * MIB)
    machine = dataclasses.replace(T4, h2d=Transfer(1e9))
    full = solve(machine, budgets)
    four = solve(machine, budgets, dataclasses.replace(POLICY, weight_bits=4))
    assert four.seconds < full.seconds / 2
    assert four.weights.gpu > full.weights.gpu


@given(st.floats(-1e-9, 1), st.floats(-1e-9, 1), st.floats(1e-3, 1))
def test_fractions_sum_to_one_whatever_the_solver_leaves(gpu, cpu, disk):
    placed = placement_of(gpu, cpu, disk)
    assert placed.gpu + placed.cpu + placed.disk == pytest.approx(1.0, abs=1e-12)
    assert min(placed.gpu, placed.cpu, placed.disk) >= 0
