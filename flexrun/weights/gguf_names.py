"""Which GGUF tensor is which Hugging Face tensor, and what llama.cpp's converter did to it: data, one row a family.

Facts from llama.cpp's conversion scripts and the gguf package's tables (gguf.constants, gguf.tensor_mapping).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_MLP = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_BRANCH_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_LLAMA = {**_PRE_NORMS, **_ATTENTION, **_MLP}
_GEMMA = {**_LLAMA, **_BRANCH_NORMS, "ffn_norm": "pre_feedforward_layernorm"}

# Rotary weights are stored so that the two halves of a rotated pair are neighbours.
_PAIRED = {"attn_q": "query_pairs", "attn_k": "key_pairs"}

# Tensors that hold no weights: gguf_config.py turns them into settings.
SETTINGS = frozenset({"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"})


@dataclass(frozen=True)
class GgufFamily:
    """One GGUF architecture.

    outer, block: GGUF stem -> Hugging Face stem, outside the layers and below ``layer_prefix``.
    row_orders: block stem -> how its rows were reordered (see gguf_reader.row_order).
    norm_offset: what was added to every norm weight.
    """

    architecture: str
    model_type: str
    block: Mapping[str, str]
    outer: Mapping[str, str] = field(default_factory=lambda: _OUTER)
    layer_prefix: str = "model.layers.{layer}."
    row_orders: Mapping[str, str] = field(default_factory=dict)
    norm_offset: float = 0.0


FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily("LlamaForCausalLM", "llama", _LLAMA, row_orders=_PAIRED),  # and Mistral
    "smollm3": GgufFamily("SmolLM3ForCausalLM", "smollm3", _LLAMA, row_orders=_PAIRED),
    "granite": GgufFamily("GraniteForCausalLM", "granite", _LLAMA, row_orders=_PAIRED),
    "qwen2": GgufFamily("Qwen2ForCausalLM", "qwen2", _LLAMA),
    "qwen3": GgufFamily("Qwen3ForCausalLM", "qwen3", {**_LLAMA, **_HEAD_NORMS}),
    "gemma2": GgufFamily("Gemma2ForCausalLM", "gemma2", _GEMMA, norm_offset=1.0),
    "gemma3": GgufFamily("Gemma3ForCausalLM", "gemma3_text", {**_GEMMA, **_HEAD_NORMS}, norm_offset=1.0),
    "olmo2": GgufFamily("Olmo2ForCausalLM", "olmo2", {**_ATTENTION, **_MLP, **_BRANCH_NORMS, **_HEAD_NORMS}),
    "phi3": GgufFamily(
        "Phi3ForCausalLM",
        "phi3",
        {
            **_PRE_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "gptneox": GgufFamily(
        "GPTNeoXForCausalLM",
        "gpt_neox",
        {
            **_PRE_NORMS,
            "attn_qkv": "attention.query_key_value",
            "attn_output": "attention.dense",
            "ffn_up": "mlp.dense_h_to_4h",
            "ffn_down": "mlp.dense_4h_to_h",
        },
        outer={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
        layer_prefix="gpt_neox.layers.{layer}.",
        row_orders={"attn_qkv": "heads_together"},
    ),
}

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OUTER_NAME = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a GGUF tensor is: its Hugging Face name, how its rows lie, and what to add to its values."""

    name: str
    row_order: str | None = None
    offset: float = 0.0


def meaning(family: GgufFamily, gguf_name: str, num_layers: int) -> Meaning | None:
    """None for a tensor that the family does not have."""
    if match := _BLOCK_NAME.fullmatch(gguf_name):
        layer, stem, part = match.groups()
        if stem not in family.block or int(layer) >= num_layers:
            return None
        name = f"{family.layer_prefix.format(layer=int(layer))}{family.block[stem]}.{part}"
    elif match := _OUTER_NAME.fullmatch(gguf_name):
        stem, part = match.groups()
        if stem not in family.outer:
            return None
        name = f"{family.outer[stem]}.{part}"
    else:
        return None
    offset = -family.norm_offset if stem.endswith("norm") and part == "weight" else 0.0
    return Meaning(name, family.row_orders.get(stem), offset)
