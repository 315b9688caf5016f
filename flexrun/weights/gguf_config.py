"""Rebuilds config.json from GGUF metadata, so that no other room learns llama.cpp's names for settings.

Rows of data say which metadata key is which config key; the functions below them hold what a table cannot.
A setting that has no Hugging Face counterpart here is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy

from flexrun.errors import CheckpointError, UnsupportedError
from flexrun.gguf_header import DAMAGED, GgufHeader
from flexrun.weights.gguf_names import GgufFamily

_COMMON = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_RMS = {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
_WINDOW = {"attention.sliding_window": "sliding_window"}
_WHOLE = (*_COMMON.values(), "num_key_value_heads", "sliding_window")

# Settings whose presence (with another value) changes the model in a way nothing here runs.
_REFUSED = {
    "expert_count": 0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "attention.causal": True,
}
_LLAMA3_FACTORS = (8.0, 32.0, 16.0, 4.0, 2.0, 64.0)  # Llama 3.1 has 8, Llama 3.2 has 32
_TOKEN_IDS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}


@dataclass(frozen=True)
class _Source:
    """What a family's own rule may look at."""

    header: GgufHeader
    arch: str
    config: dict
    settings: Mapping[str, numpy.ndarray]

    def get(self, key: str, default=None):
        return self.header.metadata.get(f"{self.arch}.{key}", default)

    def has(self, tensor: str) -> bool:
        return tensor in self.header.tensors

    def refuse(self, what: str) -> UnsupportedError:
        return UnsupportedError(f"{self.header.path}: {what}", "use the safetensors files of this model")


def hf_config(header: GgufHeader, family: GgufFamily, settings: Mapping[str, numpy.ndarray]) -> dict:
    """The config.json that transformers would write for this model.

    settings: float32 values of the tensors that hold settings (rope_freqs, rope_factors_*).
    Raises CheckpointError for missing or contradictory metadata, UnsupportedError for settings that do not run here.
    """
    arch = header.metadata["general.architecture"]
    source = _Source(header, arch, {"architectures": [family.architecture], "model_type": family.model_type}, settings)
    config = source.config
    for key, harmless in _REFUSED.items():
        if source.get(key, harmless) != harmless:
            raise source.refuse(f"{arch}.{key}={source.get(key)} does not run here")
    rule = _RULES[arch]
    for key, name in {**_COMMON, **rule.required}.items():
        if source.get(key) is None:
            raise CheckpointError(f"{header.path}: the metadata lack {arch}.{key}", DAMAGED)
        config[name] = source.get(key)
    config["num_key_value_heads"] = source.get("attention.head_count_kv", config["num_attention_heads"])
    for key, name in rule.optional.items():
        if source.get(key) is not None:
            config[name] = source.get(key)
    config.update(rule.constants)
    _check_whole(source)
    _sizes_from_tensors(source)
    config["rope_theta"] = source.get("rope.freq_base", 10_000.0)
    if scaling := _rope_scaling(source):
        config["rope_scaling"] = scaling
    for key, name in _TOKEN_IDS.items():
        config[name] = header.metadata.get(f"tokenizer.ggml.{key}")
    rule.finish(source)
    return config


def hf_generation_config(metadata: Mapping[str, object]) -> dict:
    """eos_token_id lists every id that the metadata call an end: of the text, of a turn, of a message."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    ends = [token_id for token_id in dict.fromkeys(ends) if isinstance(token_id, int)]
    return {"eos_token_id": ends} if ends else {}


def _check_whole(source: _Source) -> None:
    for name in _WHOLE:
        value = source.config.get(name, 1)
        if isinstance(value, list) and len(set(value)) == 1:
            value = source.config[name] = value[0]
        if isinstance(value, list):
            raise source.refuse(f"{name} differs from layer to layer")
        if not isinstance(value, int) or isinstance(value, bool) or value < (name != "sliding_window"):
            raise CheckpointError(f"{source.header.path}: the metadata give {name} as {value!r}", DAMAGED)


def _sizes_from_tensors(source: _Source) -> None:
    """vocab_size, head_dim, biases and tying: told by the tensors themselves."""
    config, tensors = source.config, source.header.tensors
    for name in ("token_embd.weight", "blk.0.attn_output.weight"):
        if name not in tensors or len(tensors[name].shape) != 2:
            raise CheckpointError(f"{source.header.path}: tensor {name!r} is missing or misshapen", DAMAGED)
    config["vocab_size"] = tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in tensors
    attention_width, heads = tensors["blk.0.attn_output.weight"].shape[1], config["num_attention_heads"]
    head_dim = attention_width // heads
    if attention_width % heads or source.get("attention.key_length", head_dim) != head_dim or head_dim % 2:
        raise CheckpointError(
            f"{source.header.path}: tensor 'blk.0.attn_output.weight' is {attention_width} wide, which does not fit "
            f"{heads} heads of {source.get('attention.key_length', 'equal, even')} channels",
            DAMAGED,
        )
    config["head_dim"] = head_dim


def _rope_scaling(source: _Source) -> dict | None:
    config, kind = source.config, source.get("rope.scaling.type", "none")
    factor = source.get("rope.scaling.factor", 0.0)
    if source.get("rope.scale_linear"):  # the older name
        kind, factor = "linear", source.get("rope.scale_linear")
    stretched = source.settings.keys() & {"rope_factors_long.weight", "rope_factors_short.weight"}
    if (stretched or kind == "longrope") and source.arch != "phi3":
        raise source.refuse(f"rope scaling 'longrope' in a {source.arch} model does not run here")
    if source.arch not in ("phi3", "gptneox") and source.get("rope.dimension_count", 0) not in (0, config["head_dim"]):
        raise source.refuse(f"rotating only part of a head in a {source.arch} model does not run here")
    if "rope_freqs.weight" in source.settings:
        if kind != "none":
            raise source.refuse(f"rope_freqs.weight together with rope scaling {kind!r} does not run here")
        return _llama3_scaling(source, source.settings["rope_freqs.weight"])
    if kind in ("none", "longrope") or (kind == "linear" and factor in (0.0, 1.0)):
        return None  # longrope: the factors are tensors, see _finish_phi3
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind != "yarn" or factor <= 0.0:
        raise source.refuse(f"rope scaling {kind!r} with factor {factor} does not run here")
    scaling = {"rope_type": "yarn", "factor": factor}
    names = {"original_context_length": "original_max_position_embeddings"}
    names |= {"yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}
    for key, name in names.items():
        if (value := source.get(f"rope.scaling.{key}")) is not None:
            scaling[name] = value
    if source.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):
        raise source.refuse("rope.scaling.yarn_ext_factor does not run here")
    for key in ("attn_factor", "yarn_attn_factor"):
        if (extra := source.get(f"rope.scaling.{key}", 1.0)) != 1.0:  # multiplies YaRN's own
            scaling["attention_factor"] = extra * (0.1 * math.log(factor) + 1.0)
    return scaling


def llama3_frequency_divisors(
    head_dim: int, theta: float, factor: float, low: float = 1.0, high: float = 4.0, original: int = 8192
) -> numpy.ndarray:
    """[head_dim / 2] float32: what Llama 3's rope scaling divides each frequency by (arXiv 2407.21783, and
    transformers' _compute_llama3_parameters)."""
    wavelength = 2 * math.pi * theta ** (numpy.arange(0, head_dim, 2, dtype=numpy.float64) / head_dim)
    smooth = (original / wavelength - low) / (high - low)
    between = 1.0 / ((1.0 - smooth) / factor + smooth)
    divisors = numpy.where(wavelength > original / low, factor, between)
    return numpy.where(wavelength < original / high, 1.0, divisors).astype(numpy.float32)


def _llama3_scaling(source: _Source, stored: numpy.ndarray) -> dict | None:
    """The settings that the stored divisors were made from. GGUF keeps only the divisors."""
    if numpy.all(stored == 1.0):
        return None
    head_dim, theta = source.config["head_dim"], source.config["rope_theta"]
    if len(stored) == head_dim // 2 and numpy.isfinite(stored).all():
        for factor in (*_LLAMA3_FACTORS, float(str(stored.max()))):
            if factor > 1.0 and numpy.allclose(
                stored, llama3_frequency_divisors(head_dim, theta, factor), rtol=1e-4, atol=0.0
            ):
                return {
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                }
    raise source.refuse("tensor 'rope_freqs.weight' follows no rope scaling that runs here")


def _no_finish(source: _Source) -> None:
    pass


def _finish_llama(source: _Source) -> None:
    """Biases are all or nothing in this family; a window makes it Mistral."""
    config = source.config
    for setting, stems in {
        "attention_bias": ("attn_q", "attn_k", "attn_v", "attn_output"),
        "mlp_bias": ("ffn_gate", "ffn_up", "ffn_down"),
    }.items():
        present = {source.has(f"blk.0.{stem}.bias") for stem in stems}
        if len(present) == 2:
            raise source.refuse(f"biases on only some of {', '.join(stems)} do not run here")
        config[setting] = present.pop()
    if config.get("sliding_window") and source.arch == "llama":
        config.update(architectures=["MistralForCausalLM"], model_type="mistral")


def _finish_smollm3(source: _Source) -> None:
    _finish_llama(source)
    layers = range(1, source.config["num_hidden_layers"] + 1)
    source.config["no_rope_layer_interval"] = 4  # fixed in llama.cpp too
    source.config["no_rope_layers"] = [int(layer % 4 != 0) for layer in layers]


def _finish_granite(source: _Source) -> None:
    _finish_llama(source)
    source.config.setdefault("attention_multiplier", source.config["head_dim"] ** -0.5)


def _finish_gemma(source: _Source, pattern: int, largest_layers: int) -> None:
    config = source.config
    layers = config["num_hidden_layers"]
    if config.setdefault("sliding_window", 0) == 0:
        config["sliding_window"], pattern = None, 1
    kinds = ("full_attention", "sliding_attention")
    config["layer_types"] = [kinds[(layer + 1) % pattern != 0] for layer in range(layers)]
    # Only the 27B models scale queries by hidden_size / heads; like llama.cpp, they are told by their depth.
    scalar = config["hidden_size"] // config["num_attention_heads"] if layers == largest_layers else config["head_dim"]
    config["query_pre_attn_scalar"] = scalar


def _finish_gemma2(source: _Source) -> None:
    _finish_gemma(source, pattern=2, largest_layers=46)


def _finish_gemma3(source: _Source) -> None:
    _finish_gemma(source, pattern=6, largest_layers=62)
    source.config["rope_local_base_freq"] = source.get("rope.freq_base_swa", 10_000.0)


def _finish_olmo2(source: _Source) -> None:
    if source.config.pop("sliding_window", None):
        raise source.refuse("olmo2 with a sliding window (OLMo 3) does not run here")


def _finish_phi3(source: _Source) -> None:
    config, head_dim = source.config, source.config["head_dim"]
    config["partial_rotary_factor"] = _fraction(source.get("rope.dimension_count", head_dim), head_dim)
    config["sliding_window"] = config.get("sliding_window") or None
    short, long = (source.settings.get(f"rope_factors_{length}.weight") for length in ("short", "long"))
    original = source.get("rope.scaling.original_context_length", config["max_position_embeddings"])
    config["original_max_position_embeddings"] = original
    if short is None and long is None:
        if source.get("rope.scaling.type") == "longrope":
            raise CheckpointError(f"{source.header.path}: tensor 'rope_factors_long.weight' is missing", DAMAGED)
        return
    if short is None or long is None or len(short) != len(long):
        raise CheckpointError(f"{source.header.path}: rope_factors_long and _short do not belong together", DAMAGED)
    scaling = {"rope_type": "longrope"}
    scaling |= {
        f"{name}_factor": [float(str(value)) for value in values] for name, values in (("short", short), ("long", long))
    }
    stretch = config["max_position_embeddings"] / original
    usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    if not math.isclose(stored := source.get("rope.scaling.attn_factor", usual), usual, rel_tol=1e-5):
        scaling["attention_factor"] = stored
    config["rope_scaling"] = scaling


def _finish_gptneox(source: _Source) -> None:
    config = source.config
    rotary = source.get("rope.dimension_count", config["head_dim"])
    config["rotary_pct"] = _fraction(rotary, config["head_dim"])
    config["rotary_emb_base"] = config.pop("rope_theta")
    del config["num_key_value_heads"]


def _fraction(part: int, whole: int) -> float:
    """A fraction from which ``int(whole * fraction)`` gives ``part`` back."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


@dataclass(frozen=True)
class _Rule:
    """One architecture: metadata it must and may have, constants of its config, and what remains to be worked out."""

    required: Mapping[str, str]
    optional: Mapping[str, str]
    constants: Mapping[str, object]
    finish: Callable[[_Source], None] = _no_finish


_SOFTCAPS = {"attn_logit_softcapping": "attn_logit_softcapping", "final_logit_softcapping": "final_logit_softcapping"}
_GRANITE = {
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}
_SILU = {"hidden_act": "silu"}
_GELU = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False}
_RULES: dict[str, _Rule] = {
    "llama": _Rule(_RMS, _WINDOW, _SILU, _finish_llama),
    "smollm3": _Rule(_RMS, {}, _SILU, _finish_smollm3),
    "granite": _Rule(_RMS, _GRANITE, _SILU, _finish_granite),
    "qwen2": _Rule(_RMS, {}, _SILU),
    "qwen3": _Rule(_RMS, {}, {**_SILU, "attention_bias": False}),
    "gemma2": _Rule({**_RMS, **_WINDOW}, _SOFTCAPS, _GELU, _finish_gemma2),
    "gemma3": _Rule(_RMS, {**_WINDOW, **_SOFTCAPS}, _GELU, _finish_gemma3),
    "olmo2": _Rule(_RMS, _WINDOW, {**_SILU, "attention_bias": False}, _finish_olmo2),
    "phi3": _Rule(_RMS, _WINDOW, _SILU, _finish_phi3),
    "gptneox": _Rule(
        {"attention.layer_norm_epsilon": "layer_norm_eps"},
        {"use_parallel_residual": "use_parallel_residual"},
        {"hidden_act": "gelu", "attention_bias": True},
        _finish_gptneox,
    ),
}
