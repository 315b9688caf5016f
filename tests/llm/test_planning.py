"""Plans from Python: by name or by object, with budgets in words; and what an LLM says of its own plan."""

from __future__ import annotations

import dataclasses
import json

import pytest
from planned_models import CONFIGS, GIB, LAPTOP, MIB, T4, T4_FILE, known, planned

import flexrun
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.errors import BudgetError, ConfigError, FlexrunError, UnsupportedError
from flexrun.llm.model_files import read_model_plan
from flexrun.llm.planning import as_budgets, as_spec, estimate, plan_of, search_plan, search_policy, simulate
from flexrun.policy.fill import NoFit
from flexrun.policy.layout import Budgets
from flexrun.sampling import SamplingParams
from flexrun.workload import Workload

SPEC = planned("llama")
JOB = Workload.uniform(24, 60, 12)
TIGHT = {"gpu": "120MiB", "cpu": "1GiB"}
RAM = {"gpu": 0, "cpu": "120MiB"}  # searched in no time


# Functions ---------------------------------------------------------------------------------------------


@pytest.fixture
def config_file(tmp_path):
    """The config of SPEC as a file; its folder holds nothing else."""
    path = tmp_path / "model" / "config.json"
    path.parent.mkdir()
    values = json.loads(known("llama-3.1-8b").read_text())
    values.update(
        hidden_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=2816,
        vocab_size=8000,
        torch_dtype="float16",
    )
    path.write_text(json.dumps(values))
    return path


def test_models_and_machines_may_be_objects_or_paths(config_file):
    spec = as_spec(config_file)
    assert as_spec(config_file.parent) == as_spec(str(config_file)) == spec
    assert as_spec(spec) is spec
    by_path = search_policy(config_file.parent, str(T4_FILE), JOB, RAM)
    assert search_policy(spec, T4, JOB, Budgets(120 * MIB, 0, int(T4.disk_bytes))) == by_path
    assert isinstance(by_path, Policy)


def test_the_best_policy_is_the_plans_and_forecast_alike():
    plan = search_plan(SPEC, T4, JOB, RAM)
    assert search_policy(SPEC, T4, JOB, RAM) == plan.policy
    assert estimate(plan.policy, SPEC, T4, JOB, RAM) == plan.forecast
    again = plan_of(plan.policy, SPEC, T4, JOB, RAM)
    assert (again.policy, again.forecast, again.gains) == (plan.policy, plan.forecast, {})


def test_a_policy_may_be_a_document(tmp_path):
    path = tmp_path / "policy.json"
    policy = Policy(sequences_in_flight=4, tokens_per_pass=100)
    path.write_text(policy.to_json())
    plan = plan_of(path, SPEC, T4, JOB, TIGHT)
    assert (plan.policy, plan.forecast) == (policy, estimate(policy, SPEC, T4, JOB, TIGHT))


def test_what_is_fixed_is_kept():
    assert search_policy(SPEC, T4, JOB, RAM, fixed={"sequences_in_flight": 5}).sequences_in_flight == 5


def test_a_timeline_is_of_the_passes_asked_for():
    policy = Policy(sequences_in_flight=8, attention_micro_batch=4, weights=Placement(0.0, 1.0))
    timeline = simulate(policy, SPEC, T4, JOB, TIGHT, passes=3)
    assert len(timeline.pass_ends_seconds) == 3
    assert {event.pass_index for event in timeline.events} == {0, 1, 2}
    assert {Lane.GPU, Lane.H2D} <= {event.lane for event in timeline.events}
    later = simulate(policy, SPEC, T4, JOB, TIGHT, passes=3, skip=20)
    flops = [sum(event.flops for event in each.events) for each in (timeline, later)]
    assert flops[0] > flops[1], "prompts are in the first passes"
    whole = simulate(policy, SPEC, T4, JOB, TIGHT, passes=10**6)
    assert whole.seconds == pytest.approx(estimate(policy, SPEC, T4, JOB, TIGHT).seconds, rel=0.04)


def test_the_package_offers_them():
    for name in ("search_policy", "search_plan", "estimate", "simulate", "Budgets", "Hardware", "Workload", "Policy"):
        assert name in flexrun.__all__
        assert getattr(flexrun, name) is not None
    assert flexrun.search_policy is search_policy


# Budgets -----------------------------------------------------------------------------------------------


def test_budgets_in_words_in_bytes_or_not_at_all():
    given = as_budgets({"gpu": "8GiB", "cpu": 10**9, "disk": "1TB"}, T4)
    assert given == Budgets(10**9, 8 * GIB, 10**12)
    most = as_budgets(None, T4)
    assert 0.8 * T4.cpu_memory_bytes < most.cpu_bytes < T4.cpu_memory_bytes
    assert 0.8 * T4.gpu_memory_bytes < most.gpu_bytes < T4.gpu_memory_bytes
    assert most.disk_bytes == T4.disk_bytes
    assert as_budgets({"gpu": None, "cpu": None}, T4) == most
    assert as_budgets(given, T4) is given


def test_no_gpu_may_be_asked_for_and_none_is_there_without_one():
    assert as_budgets({"gpu": 0}, T4).gpu_bytes == 0
    assert as_budgets(None, LAPTOP).gpu_bytes == 0
    assert as_budgets(None, dataclasses.replace(LAPTOP, disk_bytes=0)).disk_bytes is None


@pytest.mark.parametrize("budgets, complaint", [({"ram": 1}, "unknown budget 'ram'"), ({"cpu": "much"}, "much")])
def test_budgets_that_cannot_be_read_are_named(budgets, complaint):
    with pytest.raises(ConfigError, match=complaint):
        as_budgets(budgets, T4)


# What cannot be ----------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FlexrunError, match="nowhere"):
        search_policy(tmp_path / "nowhere", T4, JOB)
    with pytest.raises(ConfigError, match=r"nowhere\.json"):
        search_policy(SPEC, tmp_path / "nowhere.json", JOB)
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        search_policy(broken, T4, JOB)
    broken.write_text("[]")
    with pytest.raises(ConfigError, match="holds no object"):
        search_policy(broken, T4, JOB)
    with pytest.raises(ConfigError, match="unknown policy field"):
        search_policy(SPEC, T4, JOB, fixed={"speed": 3})


def test_what_does_not_fit_is_refused():
    with pytest.raises(NoFit, match="gpu memory is short by"):
        search_policy(SPEC, T4, JOB, {"gpu": "1MiB"})
    all_on_gpu = Policy(weights=Placement(1.0, 0.0))
    for function in (estimate, simulate, plan_of):
        with pytest.raises(BudgetError, match="of gpu memory"):
            function(all_on_gpu, SPEC, T4, JOB, TIGHT)
        with pytest.raises(BudgetError, match="on a GPU"):
            function(all_on_gpu, SPEC, LAPTOP, JOB)


def test_models_with_experts_are_planned():
    plan = search_plan(planned("deepseek"), T4, JOB, RAM)
    assert plan.layout.account.total(Tier.CPU) <= 120 * MIB
    assert plan.layout.spec.experts


def test_a_config_without_a_dtype_is_planned_in_bfloat16(tmp_path):
    values = json.loads(known("llama-3.1-8b").read_text())
    values.pop("torch_dtype", None)
    values.pop("dtype", None)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(values))
    plan = read_model_plan(path)
    assert (plan.spec.dtype, plan.tokenizer, plan.name) == ("bfloat16", None, "config")
    assert read_model_plan(path, dtype="float32", max_model_len=100).max_model_len == 100


# An LLM and its plan -----------------------------------------------------------------------------------


@pytest.fixture
def prompts():
    return [{"prompt_token_ids": [3 + number] * (4 + number)} for number in range(6)]


GREEDY = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)


def test_a_run_tells_its_forecast_and_what_came_of_it(open_llm, prompts):
    said = []
    llm = open_llm("llama", log=said.append)
    llm.generate(prompts, GREEDY, use_tqdm=False)
    summary = llm.summary()
    told = summary["forecast"]
    assert told["planned"]["generated_tokens"] == told["as_it_came"]["generated_tokens"] == 30
    assert told["planned"]["prompt_tokens"] == summary["prompt_tokens"] == sum(4 + number for number in range(6))
    assert told["planned"]["passes"] == summary["passes"]
    assert told["error"] == pytest.approx(told["as_it_came"]["seconds"] / summary["seconds"] - 1)
    assert told["share_of_bound"] == pytest.approx(told["as_it_came"]["bound_seconds"] / summary["seconds"])
    json.dumps(summary)
    (line,) = [text for text in said if text.startswith("plan:")]
    assert "6 sequences in flight" in line and "tokens/s" in line


def test_answers_that_end_early_are_forecast_by_their_real_lengths(open_llm, prompts):
    llm = open_llm("llama")
    outputs = llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=40, stop_token_ids=list(range(131))), False
    )
    made = sum(len(output.outputs[0].token_ids) for output in outputs)
    told = llm.summary()["forecast"]
    assert made < 6 * 40
    assert told["planned"]["generated_tokens"] == 6 * 40
    assert told["as_it_came"]["generated_tokens"] == made
    assert told["as_it_came"]["seconds"] < told["planned"]["seconds"]


def test_before_anything_is_generated_there_is_only_the_plan(open_llm):
    llm = open_llm("llama")
    assert llm.summary() == {}
    llm.prepare(Workload.uniform(4, 10, 5))
    assert set(llm.summary()["forecast"]) == {"planned"}


def test_a_policy_that_is_given_is_forecast_too(open_llm, prompts, tmp_path):
    policy = Policy(sequences_in_flight=2, tokens_per_pass=16, attention_micro_batch=1)
    path = tmp_path / "policy.json"
    path.write_text(policy.to_json())
    for given in (policy, path, str(path)):
        llm = open_llm("llama", policy=given)
        llm.generate(prompts, GREEDY, use_tqdm=False)
        assert llm.summary()["policy"]["sequences_in_flight"] == 2
        assert llm.summary()["forecast"]["planned"]["passes"] == llm.summary()["passes"]


def test_a_plan_follows_the_machine_that_is_named(open_llm, tmp_path, monkeypatch):
    """By its path, by the environment or as an object: the same forecast."""
    slow = dataclasses.replace(LAPTOP, cpu=dataclasses.replace(LAPTOP.cpu, step_overhead_seconds=1.0))
    path = tmp_path / "slow.json"
    slow.save(path)
    seconds = []
    for given in (path, str(path), slow):
        llm = open_llm("llama", hardware=given)
        llm.prepare(Workload.uniform(4, 10, 5))
        seconds.append(llm.summary()["forecast"]["planned"]["seconds"])
    monkeypatch.setenv("FLEXRUN_HARDWARE", str(path))
    llm = open_llm("llama")
    llm.prepare(Workload.uniform(4, 10, 5))
    seconds.append(llm.summary()["forecast"]["planned"]["seconds"])
    assert min(seconds) > 50, "five passes of three layers, each with steps of a second"
    assert len(set(seconds)) == 1


def test_an_emulated_device_is_planned_by_the_rates_of_the_cpu(open_llm, matrices_move):
    """A GPU of the named machine is none of ours."""
    seconds = []
    for hardware in (T4_FILE, T4, dataclasses.replace(T4, gpu=None, h2d=None, d2h=None)):
        llm = open_llm("llama", hardware=hardware, gpu_memory="32MiB")
        llm.prepare(Workload.uniform(4, 10, 5))
        seconds.append(llm.summary()["forecast"]["planned"]["seconds"])
    assert len(set(seconds)) == 1


def test_a_budget_of_nothing_is_no_default():
    with pytest.raises(ConfigError, match="0 bytes of cpu memory"):
        search_plan(planned("llama"), T4, Workload.uniform(4, 10, 5), {"cpu": 0})
    with pytest.raises(NoFit, match="disk memory is short"):
        search_plan(planned("llama"), T4, Workload.uniform(4, 10, 5), {"disk": 0})


def test_a_policy_that_only_can_be_planned_is_not_run(open_llm):
    llm = open_llm("llama", policy=Policy(hidden=Placement(0.5, 0.0, 0.5)))
    with pytest.raises(UnsupportedError, match="keeps hidden states on disk"):
        llm.prepare(Workload.uniform(4, 10, 5))


@pytest.mark.parametrize("machine", sorted((CONFIGS / "hardware").glob("*.json")), ids=lambda path: path.stem)
def test_the_machines_and_models_of_the_configs_go_together(machine):
    for model in ("opt-6.7b", "llama-3.1-8b", "mixtral-8x7b"):
        policy = Policy(sequences_in_flight=4, attention_micro_batch=4, tokens_per_pass=64, weights=Placement(0, 0, 1))
        told = estimate(policy, known(model), machine, Workload.uniform(4, 16, 2), {"cpu": "16GiB"})
        assert told.generated_tokens_per_second > 0
