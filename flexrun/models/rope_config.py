"""Reads the rotary settings out of a config.json, in the old layout (rope_theta, rope_scaling) and the new one.

Old: ``rope_theta`` and ``rope_scaling: {"type" | "rope_type": ..., ...}`` beside the other keys.
New: everything in ``rope_parameters``; Gemma 3 nests one such dict a layer type.
"""

from __future__ import annotations

from collections.abc import Mapping

from flexrun.errors import ConfigError, UnsupportedError
from flexrun.models.rope import ROPE_KINDS
from flexrun.models.spec import RopeSpec

_REQUIRED = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}
_READ = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings", "factor",
    "attention_factor", "beta_fast", "beta_slow", "truncate", "mscale", "mscale_all_dim", "low_freq_factor",
    "high_freq_factor", "short_factor", "long_factor",
}  # fmt: skip
_WITHOUT_EFFECT = {"finetuned", "short_mscale", "long_mscale"}  # transformers reads none of them
_LAYER_TYPES = ("full_attention", "sliding_attention")


def rope_spec(
    config: Mapping,
    head_dim: int,
    kinds: Mapping[str, str] | None = None,
    partial: bool = False,
    theta_key: str = "rope_theta",
    partial_key: str = "partial_rotary_factor",
    scale_keys: tuple[str, str] | None = None,
) -> RopeSpec:
    """The one rope of a model whose layers all rotate alike.

    config: the whole config, defaults filled in. kinds: rope types this family runs, mapped to ours (None: all).
    partial: whether the family rotates only part of a head when ``partial_key`` says so.
    scale_keys: factors of cos and sin with longrope, of short texts and of long ones; they must be one.
    Raises UnsupportedError naming the type or key, ConfigError for a missing one.
    """
    parameters = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    nested = [key for key in _LAYER_TYPES if key in parameters]
    if nested:
        raise UnsupportedError(f"rope_parameters with a set for each layer type ({', '.join(nested)})")
    parameters.setdefault("rope_theta", config.get(theta_key))
    parameters.setdefault("partial_rotary_factor", config.get(partial_key))
    scales = {parameters.get(key) for key in scale_keys or ()} - {None}
    if len(scales) > 1:
        raise UnsupportedError(f"rope parameters {' and '.join(scale_keys)} that differ")
    if scales:
        parameters["attention_factor"] = scales.pop()
    return _parse(parameters, config, head_dim, kinds, partial)


def layer_type_rope_specs(config: Mapping, head_dim: int) -> dict[str, RopeSpec]:
    """Gemma 3: full attention has its own base and scaling, sliding attention its own base."""
    nested = config.get("rope_parameters") or {}
    if nested and not any(key in nested for key in _LAYER_TYPES):
        raise UnsupportedError("rope_parameters without full_attention and sliding_attention in this architecture")
    full = {**(nested.get("full_attention") or {}), **(config.get("rope_scaling") or {})}
    full.setdefault("rope_theta", config.get("rope_theta"))
    sliding = dict(nested.get("sliding_attention") or {})
    sliding.setdefault("rope_theta", config.get("rope_local_base_freq"))
    return {
        "full_attention": _parse(full, config, head_dim, None, partial=False),
        "sliding_attention": _parse(sliding, config, head_dim, None, partial=False),
    }


def _parse(
    parameters: Mapping, config: Mapping, head_dim: int, kinds: Mapping[str, str] | None, partial: bool
) -> RopeSpec:
    written = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = written if kinds is None else kinds.get(written)
    if kind not in ROPE_KINDS:
        known = ", ".join(sorted(ROPE_KINDS if kinds is None else kinds))
        raise UnsupportedError(f"rope type {written!r}", f"rope types that run here: {known}")
    unknown = sorted(key for key in parameters if key not in _READ | _WITHOUT_EFFECT)
    if unknown:
        raise UnsupportedError(f"rope parameter {unknown[0]!r} (rope type {written!r})")
    for key in _REQUIRED[kind]:
        if parameters.get(key) is None:
            raise ConfigError(f"rope type {written!r} needs {key!r}, which the model's config.json does not give")
    theta = parameters.get("rope_theta")
    if theta is None:
        raise ConfigError("the model's config.json gives no rope_theta")
    share = parameters.get("partial_rotary_factor")
    share = 1.0 if share is None else float(share)
    if share != 1.0 and not partial:
        raise UnsupportedError(f"partial_rotary_factor {share} in this architecture")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or 2 * ((rotary_dim + 1) // 2) > head_dim:
        raise UnsupportedError(f"rotary embedding of {rotary_dim} channels in heads of {head_dim}")
    longest = config["max_position_embeddings"]
    original = config.get("original_max_position_embeddings") or parameters.get("original_max_position_embeddings")
    numbers = {
        key: float(parameters[key])
        for key in ("factor", "attention_factor", "mscale", "mscale_all_dim", "low_freq_factor", "high_freq_factor")
        if parameters.get(key) is not None
    }
    factors = {}
    if kind == "longrope":
        factors = {key: tuple(map(float, parameters[key])) for key in ("short_factor", "long_factor")}
        for key, values in factors.items():
            if len(values) != (rotary_dim + 1) // 2:
                raise ConfigError(f"rope {key} has {len(values)} numbers where {(rotary_dim + 1) // 2} are needed")
    return RopeSpec(
        kind=kind,
        theta=float(theta),
        rotary_dim=rotary_dim,
        max_positions=longest,
        original_max_positions=original or longest,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        truncate=bool(parameters.get("truncate", True)),
        **numbers,
        **factors,
    )
