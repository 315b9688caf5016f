"""Turns one family row and one config.json into a ModelSpec, refusing by name whatever would change the result."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch

from flexrun.core import DTYPES, nearest_name
from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.family import Family, From
from flexrun.models.quantization import check_quantization
from flexrun.models.rope_config import layer_type_rope_specs, rope_spec
from flexrun.models.routing import read_experts
from flexrun.models.spec import NO_ROPE, LatentAttention, ModelSpec, RopeSpec

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
}

# Options that change the result, with the values that mean "off". A row that reads the key itself is exempt.
_OFF = (None, False, 0, 0.0, [], {})
_ONE = (None, 1, 1.0)
_REFUSED: dict[str, tuple] = {
    **dict.fromkeys(
        (
            "compression_config", "per_layer_config",
            "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "kv_lora_rank",
            "clip_qkv", "attention_sink", "attention_sinks", "use_attention_sinks", "use_sinks",
            "add_full_attention_sink_bias", "add_swa_attention_sink_bias", "attention_chunk_size",
            "use_bidirectional_attention", "add_cross_attention", "is_encoder_decoder",
            "alibi", "use_alibi", "rope_interleave", "rope_interleaved", "use_mrope", "attn_temperature_tuning",
            "use_qk_norm", "qk_layernorm", "attn_logit_softcapping", "final_logit_softcapping",
            "num_kv_shared_layers", "lm_head_bias", "hidden_size_per_layer_input", "enable_moe_block", "logit_scale",
        ),
        _OFF,
    ),
    **dict.fromkeys(
        ("attention_multiplier", "residual_multiplier", "embedding_multiplier", "logits_scaling"), _ONE
    ),
    "position_embedding_type": (None, "rope", "rotary"),
}  # fmt: skip
_HINT = "this version would compute something else than the model's authors; it runs no such option"


def build_spec(family: Family, config: Mapping, dtype: str | None) -> ModelSpec:
    """See families.spec_from_config."""
    inner = config.get("text_config") or {} if family.text_config else config
    settings = {**family.defaults, **inner}
    _refuse_options(family, config, settings)
    _check_quantizations(family, config, settings)

    def value(setting, default=None):
        if not isinstance(setting, From):
            return setting
        given = settings.get(setting.key)
        return default if given is None else given

    def number(setting, default: float | None = None) -> float:
        given = value(setting, default)
        if not isinstance(given, (int, float)) or isinstance(given, bool):
            raise ConfigError(f"the model's config.json gives {setting.key}={given!r}; a number is needed")
        return float(given)

    def size(key: str) -> int:
        key = family.renamed.get(key, key)
        given = settings.get(key)
        if not isinstance(given, int) or isinstance(given, bool) or given < 1:
            raise ConfigError(f"the model's config.json gives {key}={given!r}; a whole number of at least 1 is needed")
        return given

    num_layers, hidden_size, num_heads = size("num_hidden_layers"), size("hidden_size"), size("num_attention_heads")
    latent = _latent_attention(settings, size) if family.latent_attention else None
    head_dim = latent.nope_head_dim + latent.rope_head_dim if latent else _head_dim(settings, hidden_size, num_heads)
    num_kv_heads = num_heads if settings.get("num_key_value_heads") is None else size("num_key_value_heads")
    if num_heads % num_kv_heads:
        raise ConfigError(f"num_attention_heads={num_heads} is not a multiple of num_key_value_heads={num_kv_heads}")
    if family.qkv_assembler == "neox_qkv" and num_kv_heads != num_heads:
        raise UnsupportedError(f"num_key_value_heads={num_kv_heads} in {family.architecture}")
    experts, sparse_layers = read_experts(family, settings, size, num_layers)
    dtype = dtype or _config_dtype(config, settings)
    if dtype not in DTYPES:
        raise UnsupportedError(f"dtype {dtype!r}", nearest_name(dtype, DTYPES))
    max_position_embeddings = size("max_position_embeddings")
    layer_types, windows = _windows(family, settings, num_layers)
    rotated_dim = latent.rope_head_dim if latent else head_dim
    ropes, layer_ropes = _ropes(family, settings, rotated_dim, num_layers, layer_types)
    if family.query_pre_attention_scalar is not None:
        attention_scale = number(family.query_pre_attention_scalar) ** -0.5
    elif family.attention_scale is not None:
        attention_scale = number(family.attention_scale)
    else:
        attention_scale = head_dim**-0.5
    if latent:
        attention_scale *= _latent_attention_factor(ropes[0])

    def outer(key: str):
        return config[key] if key in config else settings.get(key)

    return ModelSpec(
        architecture=family.architecture,
        dtype=dtype,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=size("intermediate_size"),
        vocab_size=size("vocab_size"),
        max_position_embeddings=max_position_embeddings,
        embedding_size=hidden_size if settings.get("word_embed_proj_dim") is None else size("word_embed_proj_dim"),
        tie_word_embeddings=bool(outer("tie_word_embeddings")),
        norms=frozenset(stem for stem in (*family.layer, *family.model) if stem.endswith("_norm")),
        layer_sources=_layer_sources(family),
        model_sources=tuple(family.model.items()),
        layer_windows=windows,
        layer_ropes=layer_ropes,
        ropes=ropes,
        norm_kind=family.norm_kind,
        norm_eps=number(family.norm_eps),
        norm_offset=family.norm_offset,
        norm_affine=bool(value(family.norm_affine)),
        query_key_norm_width=family.query_key_norm_width,
        parallel_residual=bool(value(family.parallel_residual)),
        activation=_activation(family, settings),
        gated=family.gated,
        qkv_bias=bool(value(family.qkv_bias)),
        output_bias=bool(value(family.output_bias)),
        mlp_bias=bool(value(family.mlp_bias)),
        head_bias=bool(value(family.head_bias)),
        learned_positions=family.learned_positions,
        position_offset=family.position_offset,
        attention_scale=attention_scale,
        attention_softcap=number(family.attention_softcap, 0.0),
        qkv_limit=number(family.qkv_limit, 0.0),
        embedding_scale=_embedding_scale(value(family.embedding_scale, 1.0), hidden_size, dtype),
        residual_scale=number(family.residual_scale, 1.0),
        logits_divisor=number(family.logits_divisor, 1.0),
        logits_softcap=number(family.logits_softcap, 0.0),
        qkv_assembler=family.qkv_assembler,
        source_prefixes=family.source_prefixes,
        ignored_sources=tuple(pattern.format(num_layers=num_layers) for pattern in family.ignored_sources),
        eos_token_ids=_token_ids(outer("eos_token_id")),
        bos_token_id=next(iter(_token_ids(outer("bos_token_id"))), None),
        pad_token_id=next(iter(_token_ids(outer("pad_token_id"))), None),
        experts=experts,
        fused_experts=family.fused_experts,
        sparse_layers=sparse_layers,
        latent=latent,
    )


def _latent_attention(settings: Mapping, size: Callable[[str], int]) -> LatentAttention:
    return LatentAttention(
        q_lora_rank=0 if settings.get("q_lora_rank") is None else size("q_lora_rank"),
        kv_lora_rank=size("kv_lora_rank"),
        nope_head_dim=size("qk_nope_head_dim"),
        rope_head_dim=size("qk_rope_head_dim"),
        value_head_dim=size("v_head_dim"),
        interleaved=settings.get("rope_interleave") is not False,
    )


def _latent_attention_factor(rope: RopeSpec) -> float:
    """Where YaRN gives ``mscale_all_dim`` it scales the scores: once for the query, once for the key (DeepSeek)."""
    if not rope.mscale_all_dim or not rope.factor or rope.factor <= 1:
        return 1.0
    return (0.1 * rope.mscale_all_dim * math.log(rope.factor) + 1.0) ** 2


def _check_quantizations(family: Family, config: Mapping, settings: Mapping) -> None:
    transposed = isinstance(family.layer.get("expert_gate_up"), str) and family.fused_experts == "fused_expert"
    for given in (config.get("quantization_config"), settings.get("quantization_config")):
        if given and check_quantization(given) == "mxfp4" and not transposed:
            raise UnsupportedError(f"config option quantization_config (quant_method 'mxfp4') in {family.architecture}")


def _refuse_options(family: Family, config: Mapping, settings: Mapping) -> None:
    for key, off in _REFUSED.items():
        if key in family.config_keys:
            continue
        for given in (config.get(key), settings.get(key)):
            if given not in off:
                shown = f"={given!r}" if isinstance(given, (bool, int, float, str)) else ""
                raise UnsupportedError(f"config option {key}{shown} in {family.architecture}", _HINT)
    if settings.get("no_rope_layers") and not family.nope_layers:
        raise UnsupportedError(f"config option no_rope_layers in {family.architecture}", _HINT)


def _head_dim(settings: Mapping, hidden_size: int, num_heads: int) -> int:
    head_dim = settings.get("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
        return hidden_size // num_heads
    if not isinstance(head_dim, int) or head_dim < 1:
        raise ConfigError(f"the model's config.json gives head_dim={head_dim!r}")
    return head_dim


def _config_dtype(config: Mapping, settings: Mapping) -> str:
    for place in (config, settings):
        for key in ("dtype", "torch_dtype"):
            if place.get(key):
                return str(place[key]).removeprefix("torch.")
    return "float32"


def _activation(family: Family, settings: Mapping) -> str:
    name = settings.get(family.renamed.get("hidden_act", "hidden_act"))
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"activation {name!r}", f"activations that run: {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[name]


def _windows(family: Family, settings: Mapping, num_layers: int) -> tuple[list[str], tuple[int, ...]]:
    """Each layer's type (full_attention, sliding_attention) and its window in tokens (0 = unlimited)."""
    window = settings.get("sliding_window")
    if family.windows in ("none", "upper") and not settings.get("use_sliding_window", family.windows == "none"):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ConfigError(f"the model's config.json gives sliding_window={window!r}")
    layer_types = settings.get("layer_types")
    if layer_types is None or family.windows in ("none", "all"):
        by_rule = [_layer_type(family, settings, window, layer) for layer in range(num_layers)]
        if layer_types is not None and list(layer_types) != by_rule:
            raise UnsupportedError(f"config option layer_types in {family.architecture}", _HINT)
        layer_types = by_rule
    if len(layer_types) != num_layers:
        raise ConfigError(f"layer_types lists {len(layer_types)} layers, num_hidden_layers is {num_layers}")
    for layer_type in layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise UnsupportedError(f"layer type {layer_type!r}")
        if layer_type == "sliding_attention" and window is None:
            raise ConfigError("layer_types lists sliding_attention but no sliding_window is in effect")
    if family.windows == "none" and window is not None:
        raise UnsupportedError(f"config option sliding_window={window} in {family.architecture}", _HINT)
    return list(layer_types), tuple(window if kind == "sliding_attention" else 0 for kind in layer_types)


def _layer_type(family: Family, settings: Mapping, window: int | None, layer: int) -> str:
    if family.windows == "pattern":
        sliding = bool((layer + 1) % settings["sliding_window_pattern"])
    elif family.windows == "upper":
        sliding = window is not None and layer >= settings["max_window_layers"]
    elif family.windows == "nope":
        sliding = bool(settings["use_sliding_window"]) and window is not None and not _rotates(settings, layer)
    else:
        sliding = family.windows == "all" and window is not None
    return "sliding_attention" if sliding else "full_attention"


def _rotates(settings: Mapping, layer: int) -> bool:
    listed = settings.get("no_rope_layers")  # despite the name, 1 marks the layers that do rotate
    if listed is not None:
        if layer >= len(listed):
            raise ConfigError(f"no_rope_layers lists {len(listed)} layers, too few")
        return bool(listed[layer])
    return (layer + 1) % settings["no_rope_layer_interval"] != 0


def _ropes(
    family: Family, settings: Mapping, head_dim: int, num_layers: int, layer_types: list[str]
) -> tuple[tuple[RopeSpec, ...], tuple[int, ...]]:
    if family.learned_positions:
        return (), (NO_ROPE,) * num_layers
    if family.rope_per_layer_type:
        specs = layer_type_rope_specs(settings, head_dim)
        kinds = list(specs)
        return tuple(specs.values()), tuple(kinds.index(layer_type) for layer_type in layer_types)
    rotating = (not family.nope_layers or _rotates(settings, layer) for layer in range(num_layers))
    return (rope_spec(settings, head_dim, **family.rope),), tuple(0 if yes else NO_ROPE for yes in rotating)


def _layer_sources(family: Family) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(
        (stem, tuple(family.layer_prefix + source for source in ((sources,) if isinstance(sources, str) else sources)))
        for stem, sources in family.layer.items()
    )


def _embedding_scale(scale: float | str, hidden_size: int, dtype: str) -> float:
    if scale != "sqrt_hidden":
        return float(scale)
    # Gemma was trained with the factor rounded to the weights' dtype (sqrt(3072) is 55.5 in bfloat16)
    return torch.tensor(hidden_size**0.5, dtype=DTYPES[dtype]).item()


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)
