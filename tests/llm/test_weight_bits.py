"""Models of 4- and 8-bit weights: the tokens of a model with exactly these weights, wherever they are."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tiny_families import prompts

from flexrun import SamplingParams
from flexrun.compress import GroupFormat, quantise
from flexrun.compress.groupwise import dequantise
from flexrun.config import Placement, Policy
from flexrun.core import Tier
from flexrun.errors import ConfigError

pytestmark = pytest.mark.usefixtures("matrices_move")
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
IN_RAM = Policy(sequences_in_flight=16, tokens_per_pass=1024)
KEEP = ("layers.0.*=16", "*.down_proj=8")
THREE_TIERS = Policy(
    sequences_in_flight=3,
    tokens_per_pass=16,
    attention_micro_batch=2,
    token_micro_batch=7,
    weights=Placement(0.3, 0.3, 0.4),
    kv=Placement(0.5, 0.5, 0.0),
)


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def rounded(model, bits_of):
    """A copy of a transformers model whose matrices went through the format of ``bits_of(name)`` bits."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and bits_of(name) < 16:
                form, shape = GroupFormat(bits_of(name)), tuple(module.weight.shape)
                module.weight.copy_(dequantise(quantise(module.weight, form), shape, form, torch.float32))
    return model


@pytest.mark.parametrize("keep", [(), KEEP])
@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_those_of_transformers_with_the_same_weights(run, oracle, bits, keep):
    def bits_of(name):
        if keep and name.startswith("model.layers.0."):
            return 16
        return 8 if keep and name.endswith("down_proj") else bits

    model = rounded(oracle("llama"), bits_of)
    asked = prompts((5, 23))
    found = tokens_of(run("llama", asked, GREEDY, policy=THREE_TIERS, gpu_memory="64MiB", weight_bits=bits, keep=keep))
    for prompt, tokens in zip(asked, found, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
        assert (logits.amax(-1) - chosen < 1e-4).all()


@pytest.mark.parametrize("activation_bits", [16, 8])
def test_without_kernels_the_tokens_are_the_same(run, monkeypatch, activation_bits):
    asked, bits = prompts((5, 23)), {"weight_bits": 4, "activation_bits": activation_bits}
    expected = tokens_of(run("llama", asked, GREEDY, policy=IN_RAM, **bits))
    monkeypatch.setattr("flexrun.native.available", False)
    assert tokens_of(run("llama", asked, GREEDY, policy=IN_RAM, **bits)) == expected
    assert tokens_of(run("llama", asked, GREEDY, policy=THREE_TIERS, gpu_memory="64MiB", **bits)) == expected


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_bytes_held_are_those_planned(open_llm, name, gpu):
    weights = Placement(0.3, 0.3, 0.4) if gpu else Placement(0, 0.5, 0.5)
    policy = Policy(sequences_in_flight=4, tokens_per_pass=30, weights=weights, weight_bits=4)
    llm = open_llm(name, policy=policy, gpu_memory="64MiB" if gpu else 0)
    llm.generate(prompts((20,) * 6, 1), GREEDY, use_tqdm=False)
    layout = llm.plan.layout
    for tier, told in llm.summary()["tiers"].items():
        assert told["peak_bytes"] == layout.account.total(Tier(tier))
    compressed = [placed for placed in layout.placement.tensors if placed.form]
    assert compressed
    for placed in compressed:
        assert placed.nbytes == llm.pack().entry(placed.layer, placed.tensor.name).nbytes
    # what the disk holds is what is planned
    assert sum(file.stat().st_size for file in llm.pack().folder.glob("*.bin")) == layout.placement.stored_bytes


def test_a_search_takes_the_bits_that_are_given(open_llm):
    llm = open_llm("llama", weight_bits=4, keep=["*.down_proj=8"])
    llm.generate(prompts((20,) * 3, 1), GREEDY, use_tqdm=False)
    policy = llm.plan.policy
    assert (policy.weight_bits, policy.keep) == (4, ("*.down_proj=8",))
    assert Policy.from_json is not None and policy == type(policy)(**{**policy.__dict__, "keep": list(policy.keep)})


def test_bits_left_to_the_search_hold_for_all_later_calls(open_llm, monkeypatch):
    """4 bits where they save enough, by the first plan; the tokens are those of the bits by name."""
    asked = prompts((20,) * 3, 1)
    for cost, bits in ((0.0, 4), (9.0, 16)):
        monkeypatch.setattr("flexrun.policy.programs.BITS_COST", {16: 0.0, 8: 9.0, 4: cost})
        llm = open_llm("llama", weight_bits="auto")
        assert llm.chosen == {}
        found = tokens_of(llm.generate(asked, GREEDY, use_tqdm=False))
        assert llm.plan.policy.weight_bits == bits and llm.chosen == {"weight_bits": bits}
        assert llm.pack().folder.name.count("-w4") == (bits == 4)
        assert tokens_of(open_llm("llama", weight_bits=bits).generate(asked, GREEDY, use_tqdm=False)) == found
        monkeypatch.setattr("flexrun.policy.programs.BITS_COST", {16: 5.0, 8: 0.0, 4: 5.0})
        llm.generate(prompts((60,) * 12, 1), GREEDY, use_tqdm=False)
        assert llm.plan.policy.weight_bits == bits


def test_bits_cannot_be_left_to_a_search_that_is_none(open_llm):
    with pytest.raises(ConfigError, match="a policy is given"):
        open_llm("llama", policy=IN_RAM, weight_bits="auto")


def test_a_rule_that_fits_no_matrix_is_refused_by_name(open_llm):
    for rule in ("*.down_project=8", "embed_tokens=8", "*layernorm=4"):
        with pytest.raises(ConfigError, match="no matrix that can be compressed"):
            open_llm("llama", weight_bits=4, keep=[rule])
    with pytest.raises(ConfigError, match="PATTERN=BITS"):
        open_llm("llama", weight_bits=4, keep=["*.down_proj"])


@pytest.mark.parametrize("name", ["llama", "mixtral"])
@pytest.mark.parametrize("bits", [4, 8])
def test_activations_are_rounded_alike_wherever_weights_are(run, name, bits):
    asked = prompts((5, 23, 40))
    settings = {"weight_bits": bits, "activation_bits": 8}
    expected = tokens_of(run(name, asked, GREEDY, policy=IN_RAM, **settings))
    assert tokens_of(run(name, asked, GREEDY, policy=THREE_TIERS, gpu_memory="64MiB", **settings)) == expected
    from_disk = dataclasses.replace(IN_RAM, weights=Placement(0, 0.2, 0.8), token_micro_batch=5)
    assert tokens_of(run(name, asked, GREEDY, policy=from_disk, **settings)) == expected


@pytest.mark.parametrize("policy", [None, IN_RAM])
def test_activations_are_rounded_and_a_little_is_lost(open_llm, policy):
    asked = prompts((60,) * 4, 1)
    exact, fewer = (
        open_llm("llama", policy=policy, weight_bits=8, activation_bits=bits).score(asked) for bits in (16, 8)
    )
    apart = [abs(one.logprob - other.logprob) for one, other in zip(exact, fewer, strict=True)]
    assert 0 < max(apart) < 0.02 * abs(exact[0].logprob)


def test_activations_of_matrices_in_the_dtype_are_not_rounded(open_llm):
    with pytest.raises(ConfigError, match="none is compressed") as error:
        open_llm("llama", activation_bits=8)
    assert "weight_bits to 8 or 4" in error.value.hint
    assert open_llm("llama", activation_bits=8, keep=["*.down_proj=8"])
