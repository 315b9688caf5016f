"""The shipped config.json documents against the sizes that the models' authors publish, and the time a spec takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from flexrun.models.families import spec_from_config

CONFIGS = Path(__file__).parents[2] / "configs" / "models"
# name -> published billions of parameters in all, and of those that a token meets (None: all, or not published)
PUBLISHED = {
    "opt-6.7b": (6.66, None),
    "opt-13b": (12.85, None),
    "opt-30b": (29.97, None),
    "opt-175b": (174.6, None),
    "llama-3.1-8b": (8.03, None),
    "llama-3.1-70b": (70.55, None),
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.0),
    "olmoe-1b-7b": (6.92, 1.28),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.1, 22.0),
    "gpt-oss-120b": (116.83, 5.13),
    "glm-4.5-air": (106.0, 12.0),
    "glm-4.5": (355.0, 32.0),
    "deepseek-v2-lite": (15.7, 2.4),
    "deepseek-v2": (235.7, 21.0),
    "deepseek-v3": (671.0, 37.0),
    "deepseek-r1": (671.0, 37.0),
}
# whose authors leave the token embedding (and GLM's the head) out of the active parameters
ACTIVE_WITHOUT = {"gpt-oss-120b": 1, "deepseek-v2-lite": 1, "deepseek-v3": 1, "deepseek-r1": 1, "glm-4.5": 2}
ACTIVE_WITHOUT["glm-4.5-air"] = 2
SPARSE = [name for name, (_, active) in PUBLISHED.items() if active]
# Billions in the checkpoint with its layer for further tokens, which brings an embedding and a head of its own.
WITH_FURTHER_TOKENS = {"deepseek-v3": 684.5, "glm-4.5": 358.3, "glm-4.5-air": 110.5}


def spec_of(name: str):
    return spec_from_config(json.loads((CONFIGS / f"{name}.json").read_text()))


def test_every_document_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name):
    spec = spec_of(name)
    total, active = PUBLISHED[name]
    assert spec.parameter_count / 1e9 == pytest.approx(total, rel=0.01 if name.startswith("glm") else 0.002)
    embedding = ACTIVE_WITHOUT.get(name, 0) * spec.vocab_size * spec.hidden_size
    assert (spec.active_parameter_count - embedding) / 1e9 == pytest.approx(active or total, rel=0.025)
    assert spec.weight_bytes == 2 * spec.parameter_count


@pytest.mark.parametrize("name", WITH_FURTHER_TOKENS)
def test_the_layer_that_predicts_further_tokens_is_all_that_is_left_out(name):
    spec = spec_of(name)
    hidden = spec.hidden_size
    further = spec.layer_bytes(spec.num_layers - 1) // 2 + 2 * hidden * hidden + 3 * hidden
    further += 2 * spec.vocab_size * hidden
    assert (spec.parameter_count + further) / 1e9 == pytest.approx(WITH_FURTHER_TOKENS[name], abs=0.05)


@pytest.mark.parametrize(
    ("name", "dense", "experts", "kv_elements"),
    [
        ("mixtral-8x7b", 0, (8, 2, 14336, 0), 2048),
        ("qwen3-235b-a22b", 0, (128, 8, 1536, 0), 1024),
        ("gpt-oss-120b", 0, (128, 4, 2880, 0), 1024),
        ("glm-4.5", 3, (160, 8, 1536, 1536), 2048),
        ("glm-4.5-air", 1, (128, 8, 1408, 1408), 2048),
        ("deepseek-v2-lite", 1, (64, 6, 1408, 2816), 576),
        ("deepseek-v2", 1, (160, 6, 1536, 3072), 576),
        ("deepseek-r1", 3, (256, 8, 2048, 2048), 576),
    ],
)
def test_sparse_layers_and_cache(name, dense, experts, kv_elements):
    spec = spec_of(name)
    assert spec.sparse_layers == (False,) * dense + (True,) * (spec.num_layers - dense)
    assert (
        spec.experts.num_experts,
        spec.experts.experts_per_token,
        spec.experts.intermediate_size,
        spec.experts.shared_intermediate_size,
    ) == experts
    assert spec.kv_elements_per_token == kv_elements


def test_the_latent_cache_of_deepseek_v2_is_71_times_smaller_than_its_heads():
    spec = spec_of("deepseek-v2")
    expanded = spec.query_size + spec.attended_size  # a key and a value for each head
    assert expanded / spec.kv_elements_per_token == pytest.approx(71, abs=0.2)
    intensity = spec.decode_attention_flops_per_pair / spec.kv_bytes_per_token
    assert intensity == pytest.approx(242, abs=1)  # FLOPs a byte of cache


@pytest.mark.parametrize("name", SPARSE)
def test_flops_of_a_token_are_two_for_each_parameter_it_meets(name):
    spec = spec_of(name)
    layers = range(spec.num_layers)
    flops = sum(spec.flops_per_token(module, layer) for layer in layers for module in ("attention", "mlp", "experts"))
    flops += spec.flops_per_token("head")
    embedding = spec.vocab_size * spec.hidden_size
    assert flops / 2 == pytest.approx(spec.active_parameter_count - embedding, rel=0.001)  # norms and biases aside


def test_thirty_thousand_tensors_are_listed_in_no_time_and_once():
    spec = spec_of("deepseek-r1")
    start = time.perf_counter()
    tensors = spec.tensors_by_layer()
    assert time.perf_counter() - start < 1.0  # about 0.1 s on an idle core
    assert len(tensors) == 1 + 61 * 9 + 3 * 2 + 58 * (4 + 2 * 256) + 2
    again = spec.tensors_by_layer()
    assert all(first is second for first, second in zip(tensors, again))
