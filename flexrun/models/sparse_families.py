"""The model families with mixture-of-experts layers, one declarative row each: planned by this version, not yet run.

Defaults are those of the transformers configuration class; sizes have none and must be in config.json.
"""

from __future__ import annotations

from flexrun.models.family import ATTENTION_BIASES, HEAD_NORMS, LLAMA_LAYER, ExpertKeys, Family, From, like_llama

_ATTENTION = {stem: LLAMA_LAYER[stem] for stem in ("attention_norm", "qkv", "output", "mlp_norm")}
_ROUTED = {
    "router": "mlp.gate",
    "expert_gate_up": ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj"),
    "expert_down": "mlp.experts.{expert}.down_proj",
}
_SHARED = {
    "shared_gate_up": ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
    "shared_down": "mlp.shared_experts.down_proj",
}
_SHARED_ONE = {
    "shared_gate_up": ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj"),
    "shared_down": "mlp.shared_expert.down_proj",
    "shared_router": "mlp.shared_expert_gate",
}
_CORRECTION = {"router_correction": "mlp.gate.e_score_correction_bias"}
_LATENT = {stem: source for stem, source in LLAMA_LAYER.items() if stem != "qkv"} | {
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_a_norm": "self_attn.kv_a_layernorm",
    "kv_b": "self_attn.kv_b_proj",
}
_LATENT_QUERY = {
    "q_a": "self_attn.q_a_proj",
    "q_a_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
}
_STEP_DEFAULTS = {"decoder_sparse_step": 1, "mlp_only_layers": None, "use_sliding_window": False}
# Layers behind the last one predict further tokens at once; text generation does not need them.
_IGNORED = ("*.rotary_emb.inv_freq", "model.layers.{num_layers}.*")


def _qwen(architecture: str, model_type: str, defaults: dict, shared: str | None = None, **differences) -> Family:
    return like_llama(
        architecture,
        model_type,
        {**_STEP_DEFAULTS, **defaults},
        experts=ExpertKeys(("num_experts", "num_local_experts"), shared_intermediate_size=shared, layers="step"),
        **differences,
    )


def _glm(use_qk_norm: bool) -> Family:
    return like_llama(
        "Glm4MoeForCausalLM",
        "glm4_moe",
        {
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "use_qk_norm": False,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
        },
        layer={**LLAMA_LAYER, **_ROUTED, **_SHARED, **_CORRECTION, **(HEAD_NORMS if use_qk_norm else {})},
        when={"use_qk_norm": True} if use_qk_norm else {},
        ignored_sources=_IGNORED,
        experts=ExpertKeys(("n_routed_experts",), num_shared_experts="n_shared_experts", layers="after"),
        qkv_bias=From("attention_bias"),
        rope={"partial": True},
    )


def _deepseek(architecture: str, model_type: str, defaults: dict, correction: dict) -> tuple[Family, Family]:
    """The rows without and with a latent of the query."""
    return tuple(
        like_llama(
            architecture,
            model_type,
            {"q_lora_rank": 1536, "moe_layer_freq": 1, **defaults},
            layer={**_LATENT, **query, **_ROUTED, **_SHARED, **correction},
            when=when,
            ignored_sources=_IGNORED,
            experts=ExpertKeys(("n_routed_experts",), num_shared_experts="n_shared_experts", layers="after"),
            latent_attention=True,
            **ATTENTION_BIASES,
        )
        for when, query in (({"q_lora_rank": None}, {"q": "self_attn.q_proj"}), ({}, _LATENT_QUERY))
    )


SPARSE_FAMILIES: tuple[Family, ...] = (
    like_llama(
        "MixtralForCausalLM",
        "mixtral",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        layer={
            **_ATTENTION,
            "router": "block_sparse_moe.gate",
            "expert_gate_up": ("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
            "expert_down": "block_sparse_moe.experts.{expert}.w2",
        },
        experts=ExpertKeys(("num_local_experts",), intermediate_size="intermediate_size"),
        windows="all",
    ),
    like_llama(
        "OlmoeForCausalLM",
        "olmoe",
        {
            "rms_norm_eps": 1e-5,
            "pad_token_id": 1,
            "eos_token_id": 50279,
        },
        layer={**_ATTENTION, **HEAD_NORMS, **_ROUTED},
        query_key_norm_width="full",
        experts=ExpertKeys(("num_experts",), intermediate_size="intermediate_size"),
        **ATTENTION_BIASES,
    ),
    _qwen(
        "Qwen2MoeForCausalLM",
        "qwen2_moe",
        {"qkv_bias": True},
        shared="shared_expert_intermediate_size",
        layer={**LLAMA_LAYER, **_ROUTED, **_SHARED_ONE},
        qkv_bias=From("qkv_bias"),
    ),
    _qwen(
        "Qwen3MoeForCausalLM",
        "qwen3_moe",
        {},
        layer={**LLAMA_LAYER, **HEAD_NORMS, **_ROUTED},
        **ATTENTION_BIASES,
    ),
    like_llama(
        "GptOssForCausalLM",
        "gpt_oss",
        {
            "rms_norm_eps": 1e-5,
            "head_dim": 64,
            "attention_bias": True,
            "sliding_window": 128,
            "sliding_window_pattern": 2,
            "rope_theta": 150_000.0,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
            "dtype": "bfloat16",  # of the model; its config.json names none beside the 4-bit experts
        },
        layer={
            **_ATTENTION,
            "sinks": "self_attn.sinks",
            "router": "mlp.router",
            "expert_gate_up": "mlp.experts.gate_up_proj",  # all experts in one (4-bit: _blocks, _scales)
            "expert_down": "mlp.experts.down_proj",
        },
        experts=ExpertKeys(("num_local_experts",), intermediate_size="intermediate_size"),
        mlp_bias=True,
        windows="pattern",
        **ATTENTION_BIASES,
    ),
    _glm(use_qk_norm=True),
    _glm(use_qk_norm=False),
    *_deepseek(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {"n_shared_experts": 2, "first_k_dense_replace": 0, "bos_token_id": 1, "eos_token_id": 2},
        correction={},
    ),
    *_deepseek(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {"n_shared_experts": 1, "first_k_dense_replace": 3, "bos_token_id": 0, "eos_token_id": 1},
        correction=_CORRECTION,
    ),
)
