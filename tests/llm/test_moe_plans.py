"""Searches of seconds plan large mixtures of experts at least as fast as MoE-Gen (arXiv 2503.09716) was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexrun import Workload
from flexrun.llm.planning import search_plan

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("model", "prompts", "cpu_memory", "tokens_per_second"),
    [  # of whole jobs, out of its prefill and decode throughputs
        ("mixtral-8x7b", 8000, None, 351),
        ("mixtral-8x22b", 6000, None, 76),
        ("deepseek-v2", 6000, None, 29),
        ("deepseek-r1", 8000, "1000GiB", 15),
    ],
)
def test_plans_reach_what_moe_gen_measured_on_one_a5000(model, prompts, cpu_memory, tokens_per_second):
    machine, workload = CONFIGS / "hardware" / "a5000-512gb.json", Workload.uniform(prompts, 512, 256)
    budgets = {"cpu": cpu_memory} if cpu_memory else None
    plan = search_plan(CONFIGS / "models" / f"{model}.json", machine, workload, budgets)
    assert plan.forecast.generated_tokens_per_second >= tokens_per_second
