"""Tiny random checkpoints of every family, with odd sizes, for parity tests here and end to end.

    config, model = make_model("qwen3")            # in memory
    folder = save_checkpoint("qwen3", tmp_path)    # config.json + model.safetensors

Every parameter is random, also the norms and biases a fresh model leaves at one and zero.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import transformers
from tiny_sparse_families import SPARSE

VOCABULARY = 131
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 42,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "intermediate_size": 77,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WHOLE_HEADS = {key: value for key, value in _SIZES.items() if key not in ("head_dim", "num_key_value_heads")}
_OPT = {
    **{key: value for key, value in _WHOLE_HEADS.items() if key not in ("intermediate_size", "initializer_range")},
    "ffn_dim": 77,
    "init_std": 0.2,
}
_NEOX = {**_WHOLE_HEADS, "hidden_size": 60}
_GEMMA = {**_SIZES, "num_hidden_layers": 4, "sliding_window": 9, "query_pre_attn_scalar": 13}


def _rope(rope_type: str, **values) -> dict:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **values}}


_LONGROPE = {
    **_SIZES,
    "hidden_size": 48,
    "head_dim": 8,  # the validation of Phi3Config knows no other head_dim for longrope
    **_rope("longrope", short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[1.5, 2.0, 3.0, 6.0]),
}

# name -> (transformers configuration class, keyword arguments)
TINY: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", _SIZES),
    "llama_biases_tied": (
        "LlamaConfig",
        {**_SIZES, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu_new"},
    ),
    "mistral": ("MistralConfig", {**_SIZES, "sliding_window": 11}),
    "mistral_full": ("MistralConfig", {**_SIZES, "sliding_window": None}),
    "smollm3": ("SmolLM3Config", {**_SIZES, "num_hidden_layers": 5, "head_dim": 10}),
    "smollm3_windows": (
        "SmolLM3Config",
        {**_SIZES, "no_rope_layers": [1, 0, 1], "use_sliding_window": True, "sliding_window": 7},
    ),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen2_windows": (
        "Qwen2Config",
        {**_SIZES, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", _SIZES),
    "qwen3_biases_windows": (
        "Qwen3Config",
        {
            **_SIZES,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "gemma2": (
        "Gemma2Config",
        {
            **_GEMMA,
            "initializer_range": 0.02,  # tied and scaled embeddings of a larger range repeat one token for ever
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2_untied": (
        "Gemma2Config",
        {**_GEMMA, "tie_word_embeddings": False, "attn_logit_softcapping": 0.7, "final_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "tie_word_embeddings": False,
            "attention_bias": True,
            "sliding_window_pattern": 3,
            "final_logit_softcapping": 6.0,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
            },
        },
    ),
    "gemma3_conditional": (
        "Gemma3Config",
        {
            "text_config": {**_GEMMA, "initializer_range": 0.02},
            "vision_config": {
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    "phi3": ("Phi3Config", {**_SIZES, "sliding_window": 12}),
    "phi3_partial": ("Phi3Config", {**_SIZES, **_rope("default", partial_rotary_factor=0.6)}),
    "olmo2": ("Olmo2Config", _SIZES),
    "granite": (
        "GraniteConfig",
        {
            **_SIZES,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.37,
            "logits_scaling": 1.7,
        },
    ),
    "gpt_neox": ("GPTNeoXConfig", {**_NEOX, **_rope("default", partial_rotary_factor=0.4)}),
    "gpt_neox_sequential": (
        "GPTNeoXConfig",
        {**_NEOX, "use_parallel_residual": False, **_rope("default", partial_rotary_factor=0.5)},  # odd rotary width
    ),
    "opt": ("OPTConfig", _OPT),
    "opt_350m": ("OPTConfig", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 26}),
    "opt_no_final_norm": ("OPTConfig", {**_OPT, "_remove_final_layer_norm": True, "activation_function": "gelu"}),
    "opt_no_affine": ("OPTConfig", {**_OPT, "enable_bias": False, "layer_norm_elementwise_affine": False}),
    "rope_linear": ("LlamaConfig", {**_SIZES, **_rope("linear", factor=3.0)}),
    "rope_dynamic": ("LlamaConfig", {**_SIZES, "max_position_embeddings": 32, **_rope("dynamic", factor=2.0)}),
    "rope_yarn": (
        "LlamaConfig",
        {**_SIZES, **_rope("yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=8.0)},
    ),
    "rope_yarn_mscale": (
        "LlamaConfig",
        {
            **_SIZES,
            **_rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=64,
                mscale=0.7,
                mscale_all_dim=0.4,
                truncate=False,
            ),
        },
    ),
    "rope_llama3": (
        "LlamaConfig",
        {
            **_SIZES,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        },
    ),
    "rope_longrope_short": ("Phi3Config", {**_LONGROPE, "original_max_position_embeddings": 128}),
    "rope_longrope_long": ("Phi3Config", {**_LONGROPE, "original_max_position_embeddings": 4}),
}


_LATENT = {
    **{key: value for key, value in _WHOLE_HEADS.items() if key != "hidden_size"},
    "hidden_size": 48,
    "num_key_value_heads": 6,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "rms_norm_eps": 1e-4,  # not that of the latents' norms
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 21,
    "n_shared_experts": 2,
}
_YARN = _rope("yarn", factor=40.0, original_max_position_embeddings=64, mscale=0.7, mscale_all_dim=0.6)
_ALL_DENSE = {"first_k_dense_replace": _LATENT["num_hidden_layers"]}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}

# latent attention, with no sparse layer
TINY_LATENT: dict[str, tuple[str, dict]] = {
    "deepseek_v2_dense": ("DeepseekV2Config", {**_LATENT, **_ALL_DENSE, **_YARN, "q_lora_rank": 30}),
    "deepseek_v2_lite_dense": (
        "DeepseekV2Config",
        {**_LATENT, **_ALL_DENSE, "q_lora_rank": None, "attention_bias": True},
    ),
    "deepseek_v3_dense": ("DeepseekV3Config", {**_LATENT, **_ALL_DENSE, **_ONE_GROUP, **_YARN, "q_lora_rank": 30}),
    "deepseek_v3_halves_dense": (
        "DeepseekV3Config",
        {**_LATENT, **_ALL_DENSE, **_ONE_GROUP, "q_lora_rank": None, "rope_interleave": False},
    ),
}

ALL = {**TINY, **TINY_LATENT, **SPARSE}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}  # grouped products want even sizes


def make_model(name: str, seed: int = 0):
    """(config dict as config.json would hold it, transformers model in float32) of one row of ALL."""
    class_name, arguments = ALL[name]
    config = getattr(transformers, class_name)(**copy.deepcopy(arguments))  # it edits nested dicts in place
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER).eval()
    randomise(model, seed)
    return config_dict(model), model


def randomise(model, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer += 0.1 * torch.randn(buffer.shape, generator=generator)


def config_dict(model) -> dict:
    return {**model.config.to_diff_dict(), "architectures": [type(model).__name__]}


def save_checkpoint(name: str, folder: Path, seed: int = 0) -> Path:
    """Write config.json and model.safetensors of one row as transformers writes them."""
    _, model = make_model(name, seed)
    model.save_pretrained(folder)
    return folder


def prompts(lengths: tuple[int, ...] = (5, 1, 23), seed: int = 0) -> list[list[int]]:
    """Random token ids, one list a length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
