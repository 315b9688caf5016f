"""The model families with mixture-of-experts layers, one declarative row each.

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
_MIXTRAL_EXPERTS = {
    "router": "block_sparse_moe.gate",
    "expert_gate_up": ("block_sparse_moe.experts.{expert}.w1", "block_sparse_moe.experts.{expert}.w3"),
    "expert_down": "block_sparse_moe.experts.{expert}.w2",
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
_STEP_DEFAULTS = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": None,
    "use_sliding_window": False,
    "norm_topk_prob": False,
}
_RENORMALISES = {"renormalise": From("norm_topk_prob")}
_GROUP_LIMITED = {
    "float32_logits": True,
    "groups": From("n_group"),
    "groups_kept": From("topk_group"),
    "scaling_factor": From("routed_scaling_factor"),
}
_DEEPSEEK_V3_ROUTING = {
    **_GROUP_LIMITED,
    **_RENORMALISES,
    "score": "sigmoid",
    "group_score": "top2_sum",
    "epsilon": 1e-20,
}
_DEEPSEEK_V3_OPTIONS = {"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)}
# Layers behind the last one predict further tokens at once; text generation does not need them.
_IGNORED = ("*.rotary_emb.inv_freq", "model.layers.{num_layers}.*")


def _qwen(architecture: str, model_type: str, defaults: dict, shared: str | None = None, **differences) -> Family:
    return like_llama(
        architecture,
        model_type,
        {**_STEP_DEFAULTS, **defaults},
        experts=ExpertKeys(
            ("num_experts", "num_local_experts"),
            shared_intermediate_size=shared,
            layers="step",
            routing=_RENORMALISES,
        ),
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
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
        layer={**LLAMA_LAYER, **_ROUTED, **_SHARED, **_CORRECTION, **(HEAD_NORMS if use_qk_norm else {})},
        when={"use_qk_norm": True} if use_qk_norm else {},
        ignored_sources=_IGNORED,
        experts=ExpertKeys(
            ("n_routed_experts",),
            num_shared_experts="n_shared_experts",
            layers="after",
            routing=_DEEPSEEK_V3_ROUTING,
            routing_options=_DEEPSEEK_V3_OPTIONS,
        ),
        qkv_bias=From("attention_bias"),
        rope={"partial": True},
    )


def _phimoe(architecture: str) -> Family:
    return like_llama(
        architecture,
        "phimoe",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "sliding_window": None,
            "router_jitter_noise": 0.01,
            "lm_head_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        layer={**_ATTENTION, **_MIXTRAL_EXPERTS},
        experts=ExpertKeys(
            ("num_local_experts",),
            intermediate_size="intermediate_size",
            routing={"score": "sparsemixer", "near": From("router_jitter_noise")},
        ),
        norm_kind="layer",
        windows="all",
        head_bias=From("lm_head_bias"),
        rope={"kinds": {"default": "default", "longrope": "longrope"}, "scale_keys": ("short_mscale", "long_mscale")},
        **ATTENTION_BIASES,
    )


def _deepseek(
    architecture: str, model_type: str, defaults: dict, correction: dict, routing: dict, options: dict
) -> tuple[Family, Family]:
    """The rows without and with a latent of the query."""
    return tuple(
        like_llama(
            architecture,
            model_type,
            {"q_lora_rank": 1536, "moe_layer_freq": 1, **defaults},
            layer={**_LATENT, **query, **_ROUTED, **_SHARED, **correction},
            when=when,
            ignored_sources=_IGNORED,
            experts=ExpertKeys(
                ("n_routed_experts",),
                num_shared_experts="n_shared_experts",
                layers="after",
                routing=routing,
                routing_options=options,
            ),
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
        layer={**_ATTENTION, **_MIXTRAL_EXPERTS},
        experts=ExpertKeys(
            ("num_local_experts",), intermediate_size="intermediate_size", routing={"renormalise": True}
        ),
        windows="all",
    ),
    like_llama(
        "OlmoeForCausalLM",
        "olmoe",
        {
            "rms_norm_eps": 1e-5,
            "pad_token_id": 1,
            "eos_token_id": 50279,
            "norm_topk_prob": False,
        },
        layer={**_ATTENTION, **HEAD_NORMS, **_ROUTED},
        query_key_norm_width="full",
        qkv_limit=From("clip_qkv"),
        experts=ExpertKeys(("num_experts",), intermediate_size="intermediate_size", routing=_RENORMALISES),
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
            "swiglu_limit": 7.0,
            "swiglu_alpha": 1.702,
            "dtype": "bfloat16",  # of the model; its config.json names none beside the 4-bit experts
        },
        layer={
            **_ATTENTION,
            "sinks": "self_attn.sinks",
            "router": "mlp.router",
            "expert_gate_up": "mlp.experts.gate_up_proj",  # all experts in one (4-bit: _blocks, _scales)
            "expert_down": "mlp.experts.down_proj",
        },
        experts=ExpertKeys(
            ("num_local_experts",),
            intermediate_size="intermediate_size",
            routing={"score": "chosen_softmax"},
            gate_limits={"gate_limit": "swiglu_limit", "gate_slope": "swiglu_alpha"},
        ),
        mlp_bias=True,
        windows="pattern",
        **ATTENTION_BIASES,
    ),
    _glm(use_qk_norm=True),
    _glm(use_qk_norm=False),
    *_deepseek(
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        {
            "n_shared_experts": 2,
            "first_k_dense_replace": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
        correction={},
        routing=_GROUP_LIMITED,
        options={
            "scoring_func": ("softmax",),
            "topk_method": ("greedy", "group_limited_greedy"),
            "norm_topk_prob": (False,),
        },
    ),
    *_deepseek(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        {
            "n_shared_experts": 1,
            "first_k_dense_replace": 3,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
        },
        correction=_CORRECTION,
        routing=_DEEPSEEK_V3_ROUTING,
        options=_DEEPSEEK_V3_OPTIONS,
    ),
    like_llama(
        "GraniteMoeForCausalLM",
        "granitemoe",
        {
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        layer={
            **_ATTENTION,
            "router": "block_sparse_moe.router.layer",
            "expert_gate_up": "block_sparse_moe.input_linear.weight",  # all experts in one, outputs before inputs
            "expert_down": "block_sparse_moe.output_linear.weight",
        },
        experts=ExpertKeys(
            ("num_local_experts",), intermediate_size="intermediate_size", routing={"score": "chosen_softmax"}
        ),
        fused_experts="fused_expert_rows",
        attention_scale=From("attention_multiplier"),
        embedding_scale=From("embedding_multiplier"),
        logits_divisor=From("logits_scaling"),
        residual_scale=From("residual_multiplier"),
        **ATTENTION_BIASES,
    ),
    *(_phimoe(architecture) for architecture in ("PhimoeForCausalLM", "PhiMoEForCausalLM")),  # new and old spelling
)
