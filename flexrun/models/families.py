"""The dense model families, one declarative row each, and the way from a config.json to its row.

To add a dense family, add a row and a parity test: docs/add_a_family.md. Defaults are those of the transformers
configuration class; sizes have none and must be in config.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexrun.core import nearest_name
from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.family import ATTENTION_BIASES, HEAD_NORMS, LLAMA_LAYER, Family, From, like_llama
from flexrun.models.read_config import build_spec
from flexrun.models.sparse_families import SPARSE_FAMILIES
from flexrun.models.spec import ModelSpec

_BRANCH_NORMS = {
    "attention_branch_norm": "post_attention_layernorm",
    "mlp_branch_norm": "post_feedforward_layernorm",
}
_GEMMA_LAYER = {**LLAMA_LAYER, **_BRANCH_NORMS, "mlp_norm": "pre_feedforward_layernorm"}
_OLMO2_LAYER = {stem: source for stem, source in LLAMA_LAYER.items() if stem not in ("attention_norm", "mlp_norm")} | {
    **_BRANCH_NORMS,
    **HEAD_NORMS,
}
_WINDOW_DEFAULTS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

_GEMMA = {
    "norm_offset": 1.0,
    "windows": "pattern",
    "query_pre_attention_scalar": From("query_pre_attn_scalar"),
    "logits_softcap": From("final_logit_softcapping"),
    "embedding_scale": "sqrt_hidden",
    "renamed": {"hidden_act": "hidden_activation"},
    **ATTENTION_BIASES,
}
_GEMMA_DEFAULTS = {
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 4096,
    "query_pre_attn_scalar": 256,
    "head_dim": 256,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "pad_token_id": 0,
}
_GEMMA3_DEFAULTS = {
    **_GEMMA_DEFAULTS,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
    "sliding_window_pattern": 6,
}
_GEMMA3 = {**_GEMMA, "layer": {**_GEMMA_LAYER, **HEAD_NORMS}, "rope_per_layer_type": True}

_OPT_LAYER = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": "self_attn.out_proj",
    "up": "fc1",
    "down": "fc2",
}
_OPT_PRE_NORMS = {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"}
_OPT_POST_NORMS = {"residual_norm": "self_attn_layer_norm", "output_norm": "final_layer_norm"}
_OPT_MODEL = {
    "token_embedding": "model.decoder.embed_tokens",
    "position_embedding": "model.decoder.embed_positions",
    "project_in": "model.decoder.project_in",
    "project_out": "model.decoder.project_out",
    "lm_head": "lm_head",
}
_OPT = {
    "layer_prefix": "model.decoder.layers.{layer}.",
    "source_prefixes": (("model.decoder.", "decoder."),),
    "renamed": {"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    "norm_kind": "layer",
    "norm_eps": 1e-5,
    "norm_affine": From("layer_norm_elementwise_affine"),
    "gated": False,
    "qkv_bias": From("enable_bias"),
    "output_bias": From("enable_bias"),
    "mlp_bias": From("enable_bias"),
    "learned_positions": True,
    "position_offset": 2,
    "defaults": {
        "activation_function": "relu",
        "tie_word_embeddings": True,
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "eos_token_id": 2,
        "bos_token_id": 2,
        "pad_token_id": 1,
    },
}

DENSE_FAMILIES: tuple[Family, ...] = (
    like_llama("LlamaForCausalLM", "llama", {}, mlp_bias=From("mlp_bias"), **ATTENTION_BIASES),
    like_llama("MistralForCausalLM", "mistral", {"sliding_window": 4096}, windows="all"),
    like_llama(
        "SmolLM3ForCausalLM",
        "smollm3",
        {
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
            "use_sliding_window": False,
            "sliding_window": None,
        },
        mlp_bias=From("mlp_bias"),
        windows="nope",
        nope_layers=True,
        **ATTENTION_BIASES,
    ),
    like_llama("Qwen2ForCausalLM", "qwen2", _WINDOW_DEFAULTS, qkv_bias=True, windows="upper"),
    like_llama(
        "Qwen3ForCausalLM",
        "qwen3",
        {"head_dim": 128, **_WINDOW_DEFAULTS},
        layer={**LLAMA_LAYER, **HEAD_NORMS},
        windows="upper",
        **ATTENTION_BIASES,
    ),
    like_llama(
        "Gemma2ForCausalLM",
        "gemma2",
        {
            **_GEMMA_DEFAULTS,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        layer=_GEMMA_LAYER,
        attention_softcap=From("attn_logit_softcapping"),
        **_GEMMA,
    ),
    like_llama("Gemma3ForCausalLM", "gemma3_text", _GEMMA3_DEFAULTS, **_GEMMA3),
    like_llama(
        "Gemma3ForConditionalGeneration",  # its text part; nested text configs leave out what equals the default
        "gemma3",
        {
            **_GEMMA3_DEFAULTS,
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131_072,
        },
        text_config=True,
        **{
            **_GEMMA3,
            "logits_softcap": 0.0,
            "layer_prefix": "language_model.model.layers.{layer}.",
            "model": {
                "token_embedding": "language_model.model.embed_tokens",
                "final_norm": "language_model.model.norm",
                "lm_head": "language_model.lm_head",
            },
            "source_prefixes": (
                ("language_model.model.", "model.language_model."),
                ("language_model.lm_head.", "lm_head."),
            ),
            "ignored_sources": ("*vision_tower.*", "*multi_modal_projector.*"),
        },
    ),
    like_llama(
        "Phi3ForCausalLM",
        "phi3",
        {"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096, "sliding_window": None},
        layer={**LLAMA_LAYER, "qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"},
        windows="all",
        rope={
            "kinds": {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"},
            "partial": True,
        },
    ),
    like_llama(
        "Olmo2ForCausalLM",
        "olmo2",
        {"rms_norm_eps": 1e-5},
        layer=_OLMO2_LAYER,
        query_key_norm_width="full",
        **ATTENTION_BIASES,
    ),
    like_llama(
        "GraniteForCausalLM",
        "granite",
        {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0},
        mlp_bias=From("mlp_bias"),
        attention_scale=From("attention_multiplier"),
        embedding_scale=From("embedding_multiplier"),
        logits_divisor=From("logits_scaling"),
        residual_scale=From("residual_multiplier"),
        **ATTENTION_BIASES,
    ),
    Family(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        layer={
            "attention_norm": "input_layernorm",
            "qkv": "attention.query_key_value",
            "output": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        model={
            "token_embedding": "gpt_neox.embed_in",
            "final_norm": "gpt_neox.final_layer_norm",
            "lm_head": "embed_out",
        },
        layer_prefix="gpt_neox.layers.{layer}.",
        source_prefixes=(("gpt_neox.", ""), ("embed_out.", "lm_head.")),
        ignored_sources=("*.rotary_emb.inv_freq", "*.attention.bias", "*.attention.masked_bias"),
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "attention_bias": True,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10_000.0,
        },
        norm_kind="layer",
        norm_eps=From("layer_norm_eps"),
        parallel_residual=From("use_parallel_residual"),
        gated=False,
        mlp_bias=True,
        qkv_assembler="neox_qkv",
        rope={"partial": True, "theta_key": "rotary_emb_base", "partial_key": "rotary_pct"},
        **ATTENTION_BIASES,
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        layer={**_OPT_LAYER, **_OPT_POST_NORMS},
        model=_OPT_MODEL,
        when={"do_layer_norm_before": False},
        **_OPT,
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        layer={**_OPT_LAYER, **_OPT_PRE_NORMS},
        model=_OPT_MODEL,
        when={"_remove_final_layer_norm": True},
        **_OPT,
    ),
    Family(
        "OPTForCausalLM",
        "opt",
        layer={**_OPT_LAYER, **_OPT_PRE_NORMS},
        model={**_OPT_MODEL, "final_norm": "model.decoder.final_layer_norm"},
        **_OPT,
    ),
)

FAMILIES = DENSE_FAMILIES + SPARSE_FAMILIES
SUPPORTED_ARCHITECTURES: tuple[str, ...] = tuple(dict.fromkeys(family.architecture for family in FAMILIES))


def spec_from_config(config: Mapping, dtype: str | None = None) -> ModelSpec:
    """The ModelSpec of a Hugging Face config.json given as a dict.

    dtype: ``float32``, ``bfloat16``, ``float16``; None or ``"auto"``: the config's own, else float32.
    Raises UnsupportedError naming the architecture, option or value that does not run, ConfigError for a config that
    lacks what its architecture needs or contradicts itself.
    """
    rows = _rows_of(config)
    row = next(row for row in rows if all({**row.defaults, **config}.get(key) == row.when[key] for key in row.when))
    return build_spec(row, config, None if dtype == "auto" else dtype)


def _rows_of(config: Mapping) -> list[Family]:
    names = config.get("architectures") or []
    if names:
        rows = [family for family in FAMILIES if family.architecture == names[0]]
        if rows and len(names) == 1:
            return rows
        raise UnsupportedError(
            f"architecture {', '.join(map(str, names))}",
            nearest_name(str(names[0]), SUPPORTED_ARCHITECTURES),
        )
    model_type = config.get("model_type")
    if model_type is None:
        raise ConfigError("the model's config.json names neither architectures nor model_type")
    rows = [family for family in FAMILIES if family.model_type == model_type]
    if not rows:
        known = {family.model_type for family in FAMILIES}
        raise UnsupportedError(f"model type {model_type!r}", nearest_name(str(model_type), known))
    return rows
