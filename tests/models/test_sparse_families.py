"""Mixture-of-experts and latent-attention families, held against the checkpoints that transformers writes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
import transformers
from safetensors.torch import load_file

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.families import SPARSE_FAMILIES, spec_from_config
from flexrun.models.spec import Experts, LatentAttention

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 77,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
}
HEADS = {"head_dim": 10}
QWEN = {"num_experts": 5, "moe_intermediate_size": 22, **SIZES}
GLM = {"n_routed_experts": 5, "n_shared_experts": 2, "moe_intermediate_size": 22, "n_group": 1, **SIZES, **HEADS}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 40.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.6,
    "original_max_position_embeddings": 64,
}
DEEPSEEK = {
    **{key: value for key, value in GLM.items() if key not in ("head_dim", "n_group")},
    "num_key_value_heads": 6,
    "q_lora_rank": 30,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
}
# name -> (transformers configuration class, keyword arguments)
TINY = {
    "mixtral": ("MixtralConfig", {**SIZES, **HEADS, "num_local_experts": 5}),
    "mixtral_window": ("MixtralConfig", {**SIZES, "num_local_experts": 5, "sliding_window": 9}),
    "olmoe": ("OlmoeConfig", {**SIZES, "num_experts": 5}),
    "qwen2_moe": ("Qwen2MoeConfig", {**QWEN, "shared_expert_intermediate_size": 33}),
    "qwen2_moe_plain": (
        "Qwen2MoeConfig",
        {**QWEN, "shared_expert_intermediate_size": 33, "qkv_bias": False, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**QWEN, **HEADS}),
    "qwen3_moe_some_dense": (
        "Qwen3MoeConfig",
        {**QWEN, **HEADS, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
    ),
    "gpt_oss": ("GptOssConfig", {**SIZES, **HEADS, "num_local_experts": 5}),
    "glm4_moe": ("Glm4MoeConfig", {**GLM, "attention_bias": True}),
    "glm4_moe_norms": ("Glm4MoeConfig", {**GLM, "use_qk_norm": True, "first_k_dense_replace": 3}),
    "granitemoe": ("GraniteMoeConfig", {**SIZES, "num_local_experts": 5, "attention_bias": True}),
    "phimoe": (
        "PhimoeConfig",
        {**SIZES, "num_local_experts": 5, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True},
    ),
    "deepseek_v2": ("DeepseekV2Config", {**DEEPSEEK, "first_k_dense_replace": 1, "rope_parameters": YARN}),
    "deepseek_v2_lite": ("DeepseekV2Config", {**DEEPSEEK, "q_lora_rank": None, "attention_bias": True}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, "rope_parameters": YARN, "n_group": 1, "topk_group": 1}),
    "deepseek_v3_no_query_latent": (
        "DeepseekV3Config",
        {**DEEPSEEK, "q_lora_rank": None, "first_k_dense_replace": 2, "n_group": 1, "topk_group": 1},
    ),
}
LATENT = [name for name in TINY if name.startswith("deepseek")]
SPARSE_LAYERS = {
    "qwen2_moe_plain": (False, True, False, True),
    "qwen3_moe_some_dense": (False, True, False, False),
    "glm4_moe": (False, True, True, True),
    "glm4_moe_norms": (False, False, False, True),
    "deepseek_v2": (False, True, True, True),
    "deepseek_v3": (False, False, False, True),
    "deepseek_v3_no_query_latent": (False, False, True, True),
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """tiny(name) -> (config.json as a dict, checkpoint tensors by name, transformers model)."""

    @cache
    def load(name: str):
        class_name, arguments = TINY[name]
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, class_name)(**arguments))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), model

    return load


def test_every_planned_architecture_has_a_tiny_checkpoint(tiny):
    tested = {tiny(name)[0]["architectures"][0] for name in TINY}
    assert tested == {family.architecture for family in SPARSE_FAMILIES} - {"PhiMoEForCausalLM"}


def test_the_older_name_of_phi_means_the_same(tiny):
    config = tiny("phimoe")[0]
    older = spec_from_config({**config, "architectures": ["PhiMoEForCausalLM"]})
    assert replace(older, architecture="PhimoeForCausalLM") == spec_from_config(config)


@pytest.mark.parametrize("name", TINY)
def test_every_checkpoint_tensor_is_listed_with_its_shape(tiny, name):
    config, tensors, _ = tiny(name)
    spec = spec_from_config(config)
    shapes = {
        source: shape
        for tensor in spec.all_tensors()
        for source, shape in zip(tensor.sources, tensor.source_shapes, strict=True)
    }
    assert shapes == {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    assert spec.unread_sources(tensors) == []
    assert spec.parameter_count == sum(tensor.numel() for tensor in tensors.values())
    assert spec.weight_bytes == 4 * spec.parameter_count
    for layer in range(spec.num_layers):
        places = [(tensor.module, tensor.name) for tensor in spec.layer_tensors(layer)]
        order = [module for module, _ in places]
        assert order == sorted(order, key=["attention", "mlp", "experts"].index)
        assert len(set(places)) == len(places)
        assert spec.layer_bytes(layer) == sum(spec.layer_bytes(layer, module) for module in set(order))


@pytest.mark.parametrize("name", TINY)
def test_packed_tensors_are_built_of_the_checkpoint(tiny, name):
    config, tensors, _ = tiny(name)
    spec = spec_from_config(config)
    for tensor in spec.layer_tensors(3):
        packed = tensor.build([tensors[source] for source in tensor.sources])
        assert packed.shape == tensor.shape
        if tensor.assemble == "concat":
            whole = torch.cat([tensors[source] for source in tensor.sources])
            assert torch.equal(packed, whole.view(tensor.shape))


def test_experts_fused_by_rows_come_out_one_by_one(tiny):
    config, tensors, model = tiny("granitemoe")
    experts = model.model.layers[2].block_sparse_moe.experts
    for tensor in spec_from_config(config).layer_tensors(2):
        if tensor.name.startswith("expert.3."):
            built = tensor.build([tensors[source] for source in tensor.sources])
            assert torch.equal(built, (experts.gate_up_proj if "gate_up" in tensor.name else experts.down_proj)[3])


def test_the_correction_of_scores_keeps_its_precision(tiny):
    config, _, _ = tiny("glm4_moe")
    (tensor,) = [each for each in spec_from_config(config, "bfloat16").layer_tensors(2) if "correction" in each.name]
    value = torch.tensor([8.001, 8.002, 8.003, 8.004, 8.005])
    assert torch.equal(tensor.build([value], torch.bfloat16), value)
    assert tensor.dtype_bytes(torch.bfloat16) == 4


def test_experts_fused_in_the_checkpoint_come_out_one_by_one(tiny):
    config, tensors, model = tiny("gpt_oss")
    spec = spec_from_config(config)
    experts, packed = model.model.layers[2].mlp.experts, {tensor.name: tensor for tensor in spec.layer_tensors(2)}
    x = torch.randn(7, SIZES["hidden_size"])

    def linear(inputs, name):
        weight, bias = (packed[f"expert.3.{name}.{part}"] for part in ("weight", "bias"))
        return torch.nn.functional.linear(
            inputs, *(tensor.build([tensors[source] for source in tensor.sources]) for tensor in (weight, bias))
        )

    whole = x @ experts.gate_up_proj[3] + experts.gate_up_proj_bias[3]
    torch.testing.assert_close(linear(x, "gate_up"), torch.cat((whole[:, ::2], whole[:, 1::2]), dim=1))
    inner = torch.randn(7, SIZES["intermediate_size"])
    torch.testing.assert_close(linear(inner, "down"), inner @ experts.down_proj[3] + experts.down_proj_bias[3])


@pytest.mark.parametrize("name", TINY)
def test_which_layers_are_sparse(tiny, name):
    spec = spec_from_config(tiny(name)[0])
    expected = SPARSE_LAYERS.get(name, (True,) * 4)
    assert tuple(spec.is_sparse(layer) for layer in range(4)) == expected
    for layer, sparse in enumerate(expected):
        assert (spec.layer_bytes(layer, "experts") > 0) == sparse
        assert any("router" in tensor.name for tensor in spec.layer_tensors(layer)) == sparse


@pytest.mark.parametrize("name", TINY)
def test_a_config_that_leaves_out_defaults_means_the_same(name):
    class_name, arguments = TINY[name]
    config = getattr(transformers, class_name)(**arguments)
    given = {**arguments, "model_type": config.model_type, "pad_token_id": 5, "bos_token_id": 3, "eos_token_id": 4}
    assert spec_from_config(given, "float32") == spec_from_config({**config.to_dict(), **given}, "float32")


@pytest.mark.parametrize("name", TINY)
def test_linear_shapes_are_those_of_the_matrices(tiny, name):
    spec = spec_from_config(tiny(name)[0])
    per_token = spec.experts.experts_per_token
    for layer in range(spec.num_layers):
        tensors = [tensor for tensor in spec.layer_tensors(layer) if len(tensor.shape) > 1]

        def shapes(module, tensors=tensors, skip=()):
            chosen = [tensor for tensor in tensors if tensor.module == module and tensor.name not in skip]
            return [(tensor.shape[-1], tensor.elements // tensor.shape[-1]) for tensor in chosen]

        attention = spec.linear_shapes("attention_inputs", layer) + spec.linear_shapes("attention_output", layer)
        assert list(attention) == shapes("attention", skip=("kv_b.weight",))
        assert list(spec.linear_shapes("mlp", layer)) == shapes("mlp")
        experts = spec.experts.num_experts if spec.is_sparse(layer) else 0
        assert list(spec.linear_shapes("expert")) * experts == shapes("experts")
        assert spec.flops_per_token("mlp", layer) == 2 * products(shapes("mlp"))
        assert spec.flops_per_token("experts", layer) * 5 == per_token * 2 * products(shapes("experts"))
        assert spec.flops_per_token("attention", layer) == 2 * products(shapes("attention"))
    idle = (5 - per_token) * products(spec.linear_shapes("expert")) * sum(spec.sparse_layers)
    if name != "gpt_oss":  # whose experts have biases
        assert spec.active_parameter_count == spec.parameter_count - idle


def products(shapes) -> int:
    return sum(inputs * outputs for inputs, outputs in shapes)


@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_by_its_formulas(tiny, name):
    config, _, model = tiny(name)
    spec = spec_from_config(config)
    heads, rank, nope, rope, value = 6, 20, 14, 8, 12
    assert spec.latent == LatentAttention(config["q_lora_rank"] or 0, rank, nope, rope, value, interleaved=True)
    assert (spec.query_size, spec.attended_size) == (heads * (nope + rope), heads * value)
    assert spec.kv_elements_per_token == rank + rope
    assert spec.kv_bytes_per_token == 4 * (rank + rope)
    assert spec.qkv_size == spec.query_size + rank + rope
    assert spec.decode_attention_flops_per_pair == 2 * heads * ((rank + rope) + rank)
    assert spec.prefill_attention_flops_per_pair == 2 * heads * ((nope + rope) + value)
    assert products(spec.decode_absorption_shapes) == heads * (nope * rank + rank * value)
    (expansion,) = spec.prefill_expansion_shapes
    (kv_b,) = [tensor for tensor in spec.layer_tensors(0) if tensor.name == "kv_b.weight"]
    assert expansion == kv_b.source_shapes[0][::-1]
    assert kv_b.shape == (heads, nope + value, rank)
    assert products([expansion]) == products(spec.decode_absorption_shapes)
    attention = model.model.layers[0].self_attn
    assert spec.attention_scale == pytest.approx(attention.scaling, rel=1e-12)
    assert [spec.ropes[0].rotary_dim, *spec.layer_ropes] == [rope, 0, 0, 0, 0]


@pytest.mark.parametrize("name", LATENT)
def test_rotated_pairs_are_packed_as_halves(tiny, name):
    config, tensors, _ = tiny(name)
    spec = spec_from_config(config)
    packed = {tensor.name: tensor for tensor in spec.layer_tensors(1)}
    query, latents = (packed["q_b.weight" if config["q_lora_rank"] else "q.weight"], packed["kv_a.weight"])
    for tensor, heads, plain in ((query, 6, 14), (latents, 1, 20)):
        (source,) = [tensors[name] for name in tensor.sources]
        built = tensor.build([source]).view(heads, plain + 8, -1)
        source = source.view(heads, plain + 8, -1)
        assert torch.equal(built[:, :plain], source[:, :plain])
        order = [plain + channel for channel in (0, 2, 4, 6, 1, 3, 5, 7)]
        assert torch.equal(built[:, plain:], source[:, order])
    halves = spec_from_config({**config, "rope_interleave": False})
    assert {tensor.assemble for tensor in halves.layer_tensors(1) if tensor.module == "attention"} == {"concat"}


def test_grouped_query_attention_keeps_its_formulas(tiny):
    spec = spec_from_config(tiny("gpt_oss")[0])
    assert spec.decode_attention_flops_per_pair == spec.prefill_attention_flops_per_pair == 4 * 60
    assert spec.decode_absorption_shapes == spec.prefill_expansion_shapes == ()
    assert spec.kv_elements_per_token == 2 * 2 * 10
    assert spec.layer_windows == (128, 0, 128, 0)


def test_shared_experts(tiny):
    for name, expected in (("qwen2_moe", (5, 3, 22, 33)), ("glm4_moe", (5, 3, 22, 44)), ("mixtral", (5, 3, 77, 0))):
        found = spec_from_config(tiny(name)[0]).experts
        assert found == Experts(*expected, routing=found.routing)


FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("qwen3_moe", FP8), ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}})],
)
def test_quantised_checkpoints_have_the_bytes_of_the_dtype_they_run_in(tiny, name, quantization):
    plain, changed = (spec_from_config({**tiny(name)[0], **keys}) for keys in ({}, quantization))
    assert changed.weight_bytes == plain.weight_bytes


def test_all_layers_may_be_dense(tiny):
    spec = spec_from_config({**tiny("qwen3_moe")[0], "mlp_only_layers": [0, 1, 2, 3]})
    assert (spec.experts, spec.sparse_layers, spec.linear_shapes("expert")) == (None, (), ())
    assert spec.active_parameter_count == spec.parameter_count
    assert spec.linear_shapes("mlp", 2) == ((48, 2 * 77), (77, 48))


def test_gpt_oss_is_bfloat16_beside_its_4_bit_experts():
    arguments = {**TINY["gpt_oss"][1], "architectures": ["GptOssForCausalLM"]}
    assert spec_from_config(arguments).dtype == "bfloat16"
    assert spec_from_config(arguments, "float32").dtype == "float32"


def test_layers_that_predict_further_tokens_are_left_unread(tiny):
    config, tensors, _ = tiny("deepseek_v3")
    spec = spec_from_config(config)
    further = ["model.layers.4.eh_proj.weight", "model.layers.4.mlp.experts.0.up_proj.weight"]
    assert spec.unread_sources([*tensors, *further]) == []
    scales = ["model.layers.3.mlp.experts.0.up_proj.weight_scale_inv"]
    assert spec.unread_sources([*tensors, *scales]) == scales


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("mixtral", {"quantization_config": {"quant_method": "awq"}}, "'awq'"),
        ("qwen3_moe", {"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
        ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "weight_block_size None"),
        ("mixtral", {"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ("mixtral", {"kv_lora_rank": 512}, "kv_lora_rank=512"),
        ("mixtral", {"n_routed_experts": 8}, "n_routed_experts=8"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32}, "sliding_window=32"),
        ("glm4_moe", {"rope_parameters": {"rope_type": "llama4", "rope_theta": 1.0}}, "llama4"),
    ],
)
def test_refused_by_name(tiny, name, change, named):
    with pytest.raises(UnsupportedError) as caught:
        spec_from_config({**tiny(name)[0], **change})
    assert named in caught.value.message


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("mixtral", {"num_local_experts": None}, "num_local_experts"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size"),
        ("glm4_moe", {"num_experts_per_tok": 6}, "num_experts_per_tok=6"),
        ("deepseek_v2", {"qk_rope_head_dim": None}, "qk_rope_head_dim"),
        ("deepseek_v3", {"q_lora_rank": 0}, "q_lora_rank"),
        ("deepseek_v3", {"first_k_dense_replace": "3"}, "first_k_dense_replace"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers"),
    ],
)
def test_contradictory_or_incomplete_configs(tiny, name, change, named):
    with pytest.raises(ConfigError) as caught:
        spec_from_config({**tiny(name)[0], **change})
    assert named in caught.value.message
