"""A pass larger than the device: its hidden states wait on the host, and every byte is accounted for."""

from __future__ import annotations

import dataclasses
import json

import pytest
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import BudgetError, UnsupportedError
from flexrun.outputs import RequestOutput
from flexrun.policy.passes import job_passes
from flexrun.workload import Workload

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
WIDE = Policy(
    sequences_in_flight=64,
    tokens_per_pass=2048,
    attention_micro_batch=1,
    token_micro_batch=16,
    weights=Placement(0.0, 0.5, 0.5),
    kv=Placement(0.0, 1.0),
)


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_pass_larger_than_the_device_runs_with_its_hidden_states_on_the_host(open_llm, run, share, tmp_path):
    """Everything counted: what tiers hold is the account, what lanes move is what the plan says."""
    asked = prompts(tuple(range(12, 44)), 2)
    policy = dataclasses.replace(WIDE, cpu_attention_share=share)
    with pytest.raises(BudgetError, match="workspace"):
        open_llm("llama", policy=policy, gpu_memory="700KiB").generate(asked, GREEDY, use_tqdm=False)
    away, trace = dataclasses.replace(policy, hidden=Placement(0.0, 1.0)), tmp_path / "trace.json"
    llm = open_llm("llama", policy=away, gpu_memory="700KiB", trace=trace)
    tokens = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
    assert tokens == tokens_of(run("llama", asked, GREEDY))
    account, tiers = llm._plan.layout.account, llm.summary()["tiers"]
    for tier in (Tier.GPU, Tier.CPU):
        assert tiers[tier.value]["peak_bytes"] == account.total(tier)
        assert tiers[tier.value]["by_kind"]["workspace" if tier is Tier.GPU else "hidden"] > 0
    llm.close()
    steps = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    spec, layout = llm.spec, llm._plan.layout
    row_bytes = spec.hidden_size * spec.dtype_bytes
    passes = job_passes(Workload.of(list(map(len, asked)), [5] * len(asked)), layout.policy, layout.micro_batches)
    crossing = [shape.tokens for shape in passes if shape.tokens > 2 * 16]  # what fits stays
    assert 0 < len(crossing) < len(passes)
    for name in ("load_hidden", "save_hidden"):
        moved = [step["args"]["bytes"] for step in steps if step["name"] == name]
        assert sum(moved) == (spec.num_layers - 1) * sum(crossing) * row_bytes
        assert len(moved) > 2 * (spec.num_layers - 1) * len(crossing)


def test_experts_and_hidden_states_off_the_device_are_refused_by_name(open_llm):
    llm = open_llm("mixtral", policy=dataclasses.replace(WIDE, hidden=Placement(0.0, 1.0)), gpu_memory="64MiB")
    with pytest.raises(UnsupportedError, match="mixture of experts with hidden states off"):
        llm.generate(prompts((5,)), GREEDY, use_tqdm=False)


def test_without_a_device_hidden_states_have_nowhere_to_go(open_llm):
    llm = open_llm("llama", policy=dataclasses.replace(WIDE, hidden=Placement(0.0, 1.0)))
    with pytest.raises(UnsupportedError, match="hidden states off the CPU"):
        llm.generate(prompts((5,)), GREEDY, use_tqdm=False)
