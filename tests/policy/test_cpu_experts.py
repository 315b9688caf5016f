"""The search gives the CPU experts to run where few tokens wait for a slow link, and leaves them where many do."""

from __future__ import annotations

import dataclasses

import pytest
from planned_models import CONFIGS, GIB, T4, known, planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane
from flexrun.hardware import Hardware
from flexrun.llm.model_files import read_model_plan
from flexrun.policy.explain import format_plan
from flexrun.policy.features import RUNNABLE
from flexrun.policy.layout import Budgets
from flexrun.policy.moves import moves
from flexrun.policy.programs import Programs
from flexrun.policy.search import Plan, search
from flexrun.workload import Workload

NONE, ON_DEVICE = {"cpu_experts_share": 0.0}, Budgets(8 * GIB, GIB)


def plans(model: str, machine: str, prompts: int) -> list[Plan]:
    """Without experts on the CPU, and as the search likes it."""
    spec = read_model_plan(known(model)).spec
    hardware = Hardware.load(CONFIGS / "hardware" / f"{machine}.json")
    budgets = Budgets(int(0.9 * hardware.cpu_memory_bytes), int(0.9 * hardware.gpu_memory_bytes))
    return [search(spec, hardware, Workload.uniform(prompts, 128, 64), budgets, fixed=fixed) for fixed in (NONE, {})]


@pytest.mark.parametrize(
    ("model", "machine", "prompts", "least_gain"),
    [
        ("mixtral-8x7b", "t4-gcp-208gb", 16, 1.5),
        ("deepseek-v2-lite", "rtx-4090", 8, 1.4),
    ],
)
def test_few_sequences_behind_a_slow_link_have_experts_run_where_they_lie(model, machine, prompts, least_gain):
    without, chosen = plans(model, machine, prompts)
    assert chosen.policy.cpu_experts_share > 0 == without.policy.cpu_experts_share
    assert without.forecast.seconds > least_gain * chosen.forecast.seconds
    assert chosen.forecast.lane_seconds[Lane.H2D] < without.forecast.lane_seconds[Lane.H2D]
    share = chosen.policy.cpu_experts_share
    assert f"{share:.0%} of the experts in RAM run by the CPU" in format_plan(chosen)
    assert "cpu experts" in format_plan(chosen) and "experts in RAM" not in format_plan(without)


def test_where_many_rows_wait_for_each_expert_the_cpu_runs_none():
    spec = planned("mixtral", num_hidden_layers=2)
    plan = search(spec, T4, Workload.uniform(400, 200, 8), Budgets(8 * GIB, GIB // 4))
    assert plan.policy.cpu_experts_share == 0 < plan.policy.weights.cpu


def test_a_share_that_was_decided_is_kept():
    fixed = {"cpu_experts_share": 0.25, "weights": Placement(0.0, 1.0)}
    plan = search(planned("mixtral"), T4, Workload.uniform(4, 20, 20), Budgets(8 * GIB, GIB), fixed=fixed)
    assert plan.policy.cpu_experts_share == 0.25
    assert plan.layout.placement.cpu_experts == 6 * 8 // 4


def shares_tried(name: str, machine: Hardware = T4, budgets: Budgets = ON_DEVICE, **policy) -> set[float]:
    programs = Programs(planned(name), machine, Workload.uniform(4, 20, 20), budgets, {}, RUNNABLE)
    tried = moves(Policy(**policy), programs)
    return {change["cpu_experts_share"] for change in tried if "cpu_experts_share" in change}


def test_shares_are_tried_where_a_device_has_experts_beside_it():
    assert shares_tried("mixtral") == {1.0, 0.5, 0.125}
    assert shares_tried("mixtral", cpu_experts_share=0.5) == {1.0, 0.625, 0.375, 0.0}
    assert not shares_tried("llama")
    assert not shares_tried("mixtral", budgets=Budgets(8 * GIB))
    assert not shares_tried("mixtral", weights=Placement(0.5, 0.0, 0.5))


def test_compressed_experts_are_tried_where_the_profile_says_what_they_take():
    unknown = dataclasses.replace(T4, cpu=dataclasses.replace(T4.cpu, dequantise_bytes_per_second=0.0))
    assert not unknown.cpu.rates_of("float16").compressed
    assert shares_tried("mixtral", weight_bits=4) and shares_tried("mixtral", unknown)
    assert not shares_tried("mixtral", unknown, weight_bits=4)
    assert not shares_tried("mixtral", unknown, keep=("*expert*=8",))
