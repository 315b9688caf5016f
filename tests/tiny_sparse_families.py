"""Tiny configurations of the families with experts, for tiny_families to make checkpoints of.

More experts than tests have tokens in a decoding pass, so that some are chosen by none.
"""

from __future__ import annotations

SIZES = {
    "vocab_size": 131,
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
    "num_experts_per_tok": 2,
}
_WHOLE_HEADS = {key: value for key, value in SIZES.items() if key != "head_dim"} | {"hidden_size": 48}
_QWEN_EXPERTS = {"num_experts": 10, "moe_intermediate_size": 26, "num_experts_per_tok": 3}
_GLM = {
    **SIZES,
    "n_routed_experts": 12,
    "moe_intermediate_size": 26,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.4,
}

_DEEPSEEK = {
    **{key: value for key, value in _GLM.items() if key not in ("head_dim", "num_key_value_heads")},
    "hidden_size": 48,
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 22,
    "qk_nope_head_dim": 14,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 4,
    "topk_group": 2,
    "n_shared_experts": 2,
}

# name -> (transformers configuration class, keyword arguments)
SPARSE: dict[str, tuple[str, dict]] = {
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 8}),
    "mixtral_window": ("MixtralConfig", {**SIZES, "num_local_experts": 5, "sliding_window": 11}),
    "olmoe": (
        "OlmoeConfig",
        {**_WHOLE_HEADS, "num_key_value_heads": 6, "num_experts": 16, "num_experts_per_tok": 4, "clip_qkv": 1.2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {**_WHOLE_HEADS, **_QWEN_EXPERTS, "shared_expert_intermediate_size": 33, "decoder_sparse_step": 2},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, **_QWEN_EXPERTS, "mlp_only_layers": [1], "norm_topk_prob": True}),
    "glm4_moe": ("Glm4MoeConfig", {**_GLM, "attention_bias": True, "n_shared_experts": 2}),
    "glm4_moe_groups": (
        "Glm4MoeConfig",
        {**_GLM, "use_qk_norm": True, "n_group": 4, "topk_group": 2, "partial_rotary_factor": 0.4},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        {
            **SIZES,
            "num_local_experts": 9,
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.21,
            "residual_multiplier": 0.37,
            "logits_scaling": 1.7,
        },
    ),
    "phimoe": (
        "PhimoeConfig",
        {**SIZES, "num_local_experts": 8, "attention_bias": True, "lm_head_bias": True, "router_jitter_noise": 0.3},
    ),
    "phimoe_longrope": (
        "PhimoeConfig",
        {
            **SIZES,
            "num_local_experts": 6,
            "sliding_window": 13,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 500.0,
                "short_factor": [1.0, 1.1, 1.3, 1.7, 1.9],
                "long_factor": [1.5, 2.0, 3.0, 6.0, 7.0],
                "short_mscale": 1.2,
                "long_mscale": 1.2,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "gpt_oss_whole_blocks": (  # sizes that fill the blocks of MXFP4
        "GptOssConfig",
        {**SIZES, "hidden_size": 64, "intermediate_size": 32, "num_local_experts": 6, "sliding_window": 9},
    ),
    "gpt_oss": ("GptOssConfig", {**SIZES, "num_local_experts": 9, "sliding_window": 11, "swiglu_limit": 1.1}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_DEEPSEEK, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0, "q_lora_rank": 30},
    ),
    "deepseek_v2_lite": ("DeepseekV2Config", _DEEPSEEK),
    "deepseek_v3": ("DeepseekV3Config", {**_DEEPSEEK, "routed_scaling_factor": 2.5}),
}
