"""config.json to ModelSpec: layouts old and new, defaults, and everything that must be refused by name."""

from __future__ import annotations

import pytest
import transformers
from tiny_families import TINY

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.families import DENSE_FAMILIES, spec_from_config
from flexrun.models.spec import NO_ROPE

SIZES = {
    "vocab_size": 131,
    "hidden_size": 48,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "intermediate_size": 77,
    "max_position_embeddings": 512,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], **SIZES}
CONFIGURATIONS = {
    "LlamaForCausalLM": "LlamaConfig",
    "MistralForCausalLM": "MistralConfig",
    "SmolLM3ForCausalLM": "SmolLM3Config",
    "Qwen2ForCausalLM": "Qwen2Config",
    "Qwen3ForCausalLM": "Qwen3Config",
    "Gemma2ForCausalLM": "Gemma2Config",
    "Gemma3ForCausalLM": "Gemma3TextConfig",
    "Gemma3ForConditionalGeneration": "Gemma3Config",
    "Phi3ForCausalLM": "Phi3Config",
    "Olmo2ForCausalLM": "Olmo2Config",
    "GraniteForCausalLM": "GraniteConfig",
    "GPTNeoXForCausalLM": "GPTNeoXConfig",
    "OPTForCausalLM": "OPTConfig",
}


def test_every_architecture_has_a_tiny_checkpoint(tiny):
    dense = {family.architecture for family in DENSE_FAMILIES}
    assert dense == set(CONFIGURATIONS)
    assert {tiny(name)[0]["architectures"][0] for name in TINY} == dense


def sizes_for(architecture: str) -> dict:
    sizes = {**SIZES, "num_key_value_heads": 2}
    if architecture == "OPTForCausalLM":
        sizes["ffn_dim"] = sizes.pop("intermediate_size")
    if architecture in ("OPTForCausalLM", "GPTNeoXForCausalLM"):
        del sizes["num_key_value_heads"]
    return sizes


@pytest.mark.parametrize("architecture", CONFIGURATIONS)
def test_defaults_are_those_of_transformers(architecture):
    """A config.json that leaves out all but the sizes means what transformers takes it to mean."""
    sizes = sizes_for(architecture)
    short = {"text_config": sizes} if architecture == "Gemma3ForConditionalGeneration" else sizes
    full = getattr(transformers, CONFIGURATIONS[architecture])(**short).to_dict()
    special = {"eos_token_id": 3, "bos_token_id": 4, "pad_token_id": 5}
    architectures = {"architectures": [architecture], **special}
    assert spec_from_config({**short, **architectures}) == spec_from_config({**full, **architectures})


def test_nested_text_config_may_leave_out_every_size():
    config = transformers.Gemma3Config().to_dict()
    architectures = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    assert spec_from_config(architectures) == spec_from_config({**config, **architectures, "bos_token_id": 2})


ROPE_LAYOUTS = {
    "llama3": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            },
        },
        {"kind": "llama3", "theta": 5e5, "factor": 8.0, "original_max_positions": 64},
    ),
    "old key `type`": (
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"kind": "linear", "factor": 2.0, "theta": 1e4},
    ),
    "new layout": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 7e4}},
        {"kind": "dynamic", "theta": 7e4, "max_positions": 512},
    ),
    "yarn": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "finetuned": True}},
        {"kind": "yarn", "original_max_positions": 128, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True},
    ),
    "top-level original length wins": (
        {
            "original_max_position_embeddings": 96,
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
        },
        {"original_max_positions": 96},
    ),
}


@pytest.mark.parametrize("layout", ROPE_LAYOUTS)
def test_rope_layouts(layout):
    keys, expected = ROPE_LAYOUTS[layout]
    (rope,) = spec_from_config({**LLAMA, **keys}).ropes
    assert {key: getattr(rope, key) for key in expected} == expected
    rewritten = transformers.LlamaConfig(**SIZES, **keys).to_dict()  # the same settings, as transformers 5 saves them
    rewritten = {key: value for key, value in rewritten.items() if value is not None}
    assert spec_from_config({**rewritten, "architectures": ["LlamaForCausalLM"]}).ropes == (rope,)


def test_gemma3_old_rope_layout():
    config = {
        **SIZES,
        "architectures": ["Gemma3ForCausalLM"],
        "rope_theta": 1e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window": 32,
        "sliding_window_pattern": 3,
    }
    spec = spec_from_config(config)
    full, sliding = spec.ropes
    assert (full.kind, full.theta, full.factor) == ("linear", 1e6, 8.0)
    assert (sliding.kind, sliding.theta) == ("default", 3e4)
    assert spec.layer_ropes == (1, 1, 0, 1, 1, 0, 1)
    assert spec.layer_windows == (32, 32, 0, 32, 32, 0, 32)


def test_gpt_neox_old_rope_keys():
    config = {**SIZES, "architectures": ["GPTNeoXForCausalLM"], "rotary_pct": 0.5, "rotary_emb_base": 777}
    (rope,) = spec_from_config(config).ropes
    assert (rope.rotary_dim, rope.theta) == (4, 777.0)


def test_phi3_old_names_of_longrope():
    scaling = {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = {**SIZES, "architectures": ["Phi3ForCausalLM"], "rope_scaling": scaling}
    (rope,) = spec_from_config({**config, "original_max_position_embeddings": 128}).ropes
    assert (rope.kind, rope.original_max_positions, rope.long_factor) == ("longrope", 128, (2.0,) * 4)


def test_layer_patterns():
    smollm3 = spec_from_config({**SIZES, "architectures": ["SmolLM3ForCausalLM"]})
    assert smollm3.layer_ropes == (0, 0, 0, NO_ROPE, 0, 0, 0)
    qwen = {**SIZES, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 16, "max_window_layers": 5}
    assert spec_from_config(qwen).layer_windows == (0,) * 7
    assert spec_from_config({**qwen, "use_sliding_window": True}).layer_windows == (0, 0, 0, 0, 0, 16, 16)
    mistral = {**SIZES, "architectures": ["MistralForCausalLM"], "sliding_window": 16}
    assert spec_from_config(mistral).layer_windows == (16,) * 7
    form = spec_from_config({**mistral, "head_dim": 16}).attention_form(2)
    assert (form.scale, form.window, form.softcap) == (0.25, 16, 0.0)


@pytest.mark.parametrize(
    ("written", "asked", "expected"),
    [
        ({"torch_dtype": "bfloat16"}, None, "bfloat16"),
        ({"dtype": "float16"}, "auto", "float16"),
        ({"torch_dtype": "torch.float16"}, None, "float16"),
        ({"torch_dtype": "bfloat16"}, "float32", "float32"),
        ({}, None, "float32"),
    ],
)
def test_dtype(written, asked, expected):
    assert spec_from_config({**LLAMA, **written}, asked).dtype == expected


def test_gemma_embedding_scale_is_rounded_to_the_dtype():
    config = {**SIZES, "architectures": ["Gemma2ForCausalLM"], "hidden_size": 3072}
    assert spec_from_config(config, "bfloat16").embedding_scale == 55.5
    assert spec_from_config(config, "float32").embedding_scale == pytest.approx(3072**0.5, rel=1e-7)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["LlamaForCausalLn"]}, "LlamaForCausalLn"),
        ({"architectures": ["DbrxForCausalLM"]}, "DbrxForCausalLM"),
        ({"architectures": None, "model_type": "mamba"}, "mamba"),
        ({"hidden_act": "quick_gelu"}, "quick_gelu"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_local_experts": 8}, "num_local_experts=8"),
        ({"clip_qkv": 8.0}, "clip_qkv=8.0"),
        ({"kv_lora_rank": 512}, "kv_lora_rank"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"sliding_window": 64}, "sliding_window=64"),
        ({"layer_types": ["chunked_attention"] * 7}, "layer_types"),
        ({"no_rope_layers": [1] * 7}, "no_rope_layers"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ({"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "proportional"}}, "proportional"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, "mrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "alpha": 3.0}}, "alpha"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ({"architectures": ["Gemma3ForCausalLM"], "attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        (
            {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": {"final_logit_softcapping": 30.0}},
            "final_logit_softcapping",
        ),
        ({"architectures": ["Gemma3ForCausalLM"], "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"architectures": ["Gemma2ForCausalLM"], "layer_types": ["linear_attention"] * 7}, "linear_attention"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 7}, "layer_types"),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": 2}, "num_key_value_heads=2"),
    ],
)
def test_refused_by_name(change, named):
    with pytest.raises(UnsupportedError) as caught:
        spec_from_config({**LLAMA, **change})
    assert named in caught.value.message


@pytest.mark.parametrize(
    "harmless",
    [
        {"quantization_config": None, "sliding_window": None, "num_experts": 0, "clip_qkv": None},
        {"sliding_window": 4096, "use_sliding_window": False},
        {"pretraining_tp": 2, "use_cache": False, "torchscript": True, "residual_multiplier": 1.0},
        {"rope_scaling": None, "attention_dropout": 0.1},
    ],
)
def test_options_that_change_nothing_are_accepted(harmless):
    assert spec_from_config({**LLAMA, **harmless}) == spec_from_config(LLAMA)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": None}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"hidden_size": 50}, "num_attention_heads"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "su", "long_factor": [1.0]}}, "short_factor"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types"),
        ({"architectures": ["Qwen3ForCausalLM"], "layer_types": ["sliding_attention"] * 7}, "sliding_window"),
    ],
)
def test_contradictory_or_incomplete_configs(change, named):
    with pytest.raises(ConfigError) as caught:
        spec_from_config({**LLAMA, **change})
    assert named in caught.value.message


def test_unknown_architecture_hints_at_the_nearest():
    with pytest.raises(UnsupportedError) as caught:
        spec_from_config({**LLAMA, "architectures": ["Qwen22ForCausalLM"]})
    assert "Qwen2ForCausalLM" in caught.value.hint


def test_model_type_stands_in_for_architectures():
    assert spec_from_config({**LLAMA, "architectures": None, "model_type": "llama"}) == spec_from_config(LLAMA)
