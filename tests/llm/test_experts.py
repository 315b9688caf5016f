"""Mixtures of experts behind LLM: the same tokens with experts on three tiers, and no expert moved in vain."""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing

import pytest
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier, align_up
from flexrun.errors import ConfigError
from flexrun.offload.lanes import LaneMeter
from flexrun.offload.sparse import SparseLayers
from flexrun.placement.weights import expert_number

pytestmark = pytest.mark.usefixtures("matrices_move")
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024, attention_micro_batch=16, token_micro_batch=1024)
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)


@pytest.fixture
def routed(monkeypatch):
    """routed[layer]: of each time it was routed, how many tokens chose each expert."""
    seen = defaultdict(list)
    route = SparseLayers.route

    def watched(self, step, *rest):
        route(self, step, *rest)
        seen[step.layer].append(list(self.counts[step.layer]))

    monkeypatch.setattr(SparseLayers, "route", watched)
    return seen


@pytest.mark.parametrize("expert_batch", [0, 1, 3])
@pytest.mark.parametrize("half_batches", [False, True])
def test_experts_on_three_tiers(run, assert_same_but_for_ties, half_batches, expert_batch):
    asked = prompts((5, 1, 23, 40, 12, 3))
    expected = [output.outputs[0].token_ids for output in run("mixtral", asked, GREEDY, policy=IN_RAM)]
    policy = Policy(
        sequences_in_flight=6,
        tokens_per_pass=50,
        attention_micro_batch=2,
        token_micro_batch=7,
        expert_batch=expert_batch,
        weights=Placement(0.3, 0.4, 0.3),
        kv=Placement(0.34, 0.66, 0.0),
        cpu_attention_share=0.5,
        half_batches=half_batches,
    )
    found = [output.outputs[0].token_ids for output in run("mixtral", asked, GREEDY, policy=policy, gpu_memory="8MiB")]
    for prompt, tokens, other in zip(asked, expected, found, strict=True):
        assert_same_but_for_ties("mixtral", prompt, tokens, other)


def one_expert_bytes(spec) -> int:
    """As stored: each matrix begins on a page."""
    return sum(align_up(rows * columns * spec.dtype_bytes) for rows, columns in spec.linear_shapes("expert"))


@pytest.fixture
def expert_bytes(monkeypatch):
    """expert_bytes(llm, lane): what the lane reports to have moved of units of experts."""
    steps = []
    add = LaneMeter.add

    def watched(self, step, *times):
        add(self, step, *times)
        steps.append(step)

    monkeypatch.setattr(LaneMeter, "add", watched)

    def total(llm, lane: Lane) -> int:
        units = llm._engine.weights.placement.units
        return sum(step.bytes for step in steps if step.lane is lane and step.unit >= 0 and units[step.unit].experts)

    return total


@pytest.mark.parametrize("lane", [Lane.DISK_READ, Lane.H2D])
def test_few_tokens_move_the_chosen_experts_alone(open_llm, routed, expert_bytes, lane):
    """A prompt of one token, and one token a pass: of eight experts a layer, two are chosen."""
    policy = Policy(
        sequences_in_flight=1,
        tokens_per_pass=8,
        attention_micro_batch=1,
        weights=Placement(0, 0, 1) if lane is Lane.DISK_READ else Placement(0, 1, 0),
        kv=Placement(1, 0, 0),
    )
    with closing(open_llm("mixtral", policy=policy, gpu_memory="8MiB")) as llm:
        llm.generate(prompts((1,)), GREEDY, use_tqdm=False)
        layers, passes = llm.spec.num_layers, llm.summary()["passes"]
        assert passes == 10
        assert all(sorted(counts) == [0] * 6 + [1] * 2 for layer in routed.values() for counts in layer)
        assert len(routed) == layers
        assert expert_bytes(llm, lane) == passes * layers * 2 * one_expert_bytes(llm.spec)
        if lane is Lane.DISK_READ:
            assert expert_bytes(llm, Lane.H2D) == expert_bytes(llm, lane)
        events = llm._engine.lane_statistics()
        assert events[lane.value]["bytes"] < 0.7 * passes * llm.spec.weight_bytes


@pytest.mark.parametrize("micro_batch", [1, 3, 12])
def test_a_pass_reads_each_expert_once_whatever_the_micro_batches(open_llm, routed, expert_bytes, micro_batch):
    policy = Policy(
        sequences_in_flight=12,
        tokens_per_pass=300,
        attention_micro_batch=micro_batch,
        token_micro_batch=micro_batch,
        expert_batch=micro_batch,
        weights=Placement(0, 0, 1),
    )
    with closing(open_llm("mixtral", policy=policy)) as llm:
        llm.generate(prompts((20,) * 12), GREEDY, use_tqdm=False)
        layers, passes = llm.spec.num_layers, llm.summary()["passes"]
        once = layers * 8 * one_expert_bytes(llm.spec)
        assert passes * once <= expert_bytes(llm, Lane.DISK_READ) < (passes + 1) * once, (
            "some are read ahead at the end"
        )
        assert [len(layer) for layer in routed.values()] == [passes] * layers, "all tokens of a pass at once"


def test_the_busiest_experts_of_a_profile_live_on_the_device(open_llm, expert_bytes, tmp_path):
    """A run writes who was chosen; the next one of the same prompts moves fewer of them, for the same tokens."""
    profile = tmp_path / "experts.json"
    policy = Policy(
        sequences_in_flight=2,
        tokens_per_pass=8,
        attention_micro_batch=2,
        weights=Placement(0.5, 0.5, 0),
        kv=Placement(1, 0, 0),
    )
    asked = prompts((3, 1))
    with closing(open_llm("mixtral", policy=policy, gpu_memory="8MiB", save_expert_profile=profile)) as llm:
        even = [output.outputs[0].token_ids for output in llm.generate(asked, GREEDY, use_tqdm=False)]
        even_bytes = expert_bytes(llm, Lane.H2D)
        totals = llm._engine.expert_counts
        tokens = llm.summary()["prompt_tokens"] + llm.summary()["generated_tokens"] - len(asked)
        account = llm.plan.layout.account
    assert totals.shape == (llm.spec.num_layers, 8) and (totals.sum(axis=1) == 2 * tokens).all()
    with closing(open_llm("mixtral", policy=policy, gpu_memory="8MiB", expert_profile=profile)) as llm:
        hot = [output.outputs[0].token_ids for output in llm.generate(asked, GREEDY, use_tqdm=False)]
        hot_bytes = expert_bytes(llm, Lane.H2D) - even_bytes
        assert llm.plan.layout.account == account
        placed = llm.plan.layout.placement.tensors
    assert hot == even and 0 < hot_bytes < 0.9 * even_bytes
    for layer, counts in enumerate(totals):
        tiers = {
            expert_number(each.tensor): each.tier
            for each in placed
            if each.layer == layer and each.tensor.module == "experts"
        }
        there = [counts[expert] for expert, tier in tiers.items() if tier is Tier.GPU]
        assert 3 <= len(there) <= 5 and min(there) >= max(
            counts[expert] for expert, tier in tiers.items() if tier is Tier.CPU
        )


def test_a_dense_model_has_no_profile(open_llm, tmp_path):
    with pytest.raises(ConfigError, match="no experts"):
        open_llm("llama", save_expert_profile=tmp_path / "experts.json")
