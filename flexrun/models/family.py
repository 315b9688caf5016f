"""The shape of a family row: everything by which one model family differs from Llama, as data. And Llama itself.

A setting is either the value itself or ``From("key")``: the config.json key that decides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class From:
    """A setting that the config.json key ``key`` decides; an explicit null switches it off."""

    key: str


@dataclass(frozen=True)
class ExpertKeys:
    """The config keys that shape a family's sparse layers; ``num_experts`` has several spellings.

    Shared experts have a width of their own (``shared_intermediate_size``) or are ``num_shared_experts`` routed ones.
    layers: which ones are sparse: ``all``; ``after`` (every moe_layer_freq-th, from first_k_dense_replace on); ``step``
    (every decoder_sparse_step-th but mlp_only_layers).
    """

    num_experts: tuple[str, ...]
    intermediate_size: str = "moe_intermediate_size"
    experts_per_token: str = "num_experts_per_tok"
    shared_intermediate_size: str | None = None
    num_shared_experts: str | None = None
    layers: str = "all"
    routing: Mapping = field(default_factory=dict)  # fields of routing.RoutingRule
    routing_options: Mapping[str, tuple] = field(default_factory=dict)  # config key -> its values that run
    gate_limits: Mapping[str, str] = field(default_factory=dict)  # fields of routing.Experts -> config keys


@dataclass(frozen=True)
class Family:
    """One row. ``when``: config values that select this row among those of one architecture."""

    architecture: str
    model_type: str
    layer: Mapping[str, str | tuple[str, ...]]  # packed stem -> checkpoint stems below layer_prefix; norms included
    model: Mapping[str, str]  # packed stem -> checkpoint stem, outside the layers
    layer_prefix: str
    source_prefixes: tuple[tuple[str, str], ...] = ()  # (usual, other): prefixes a checkpoint may carry instead
    # patterns, with {num_layers}; old files carry the rope buffers
    ignored_sources: tuple[str, ...] = ("*.rotary_emb.inv_freq",)
    when: Mapping = field(default_factory=dict)
    defaults: Mapping = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)  # our config key -> this family's
    text_config: bool = False  # the settings sit in config["text_config"]
    # what differs from Llama
    norm_kind: str = "rms"
    norm_eps: float | From = From("rms_norm_eps")
    norm_offset: float = 0.0
    norm_affine: bool | From = True
    query_key_norm_width: str = "head"
    parallel_residual: bool | From = False
    gated: bool = True
    qkv_bias: bool | From = False
    output_bias: bool | From = False
    mlp_bias: bool | From = False
    head_bias: bool | From = False
    qkv_assembler: str = "concat"
    learned_positions: bool = False
    position_offset: int = 0
    # which layers see a sliding window: none, all, or by layer_types with this rule where the config lists none:
    # pattern (every n-th layer is full), upper (from max_window_layers on), nope (the layers without rope)
    windows: str = "none"
    nope_layers: bool = False  # no_rope_layers decides which layers rotate
    rope: Mapping = field(default_factory=dict)  # arguments of rope_config.rope_spec
    rope_per_layer_type: bool = False
    attention_scale: float | From | None = None  # None: head_dim ** -0.5
    query_pre_attention_scalar: From | None = None  # attention_scale is this ** -0.5
    attention_softcap: float | From = 0.0
    qkv_limit: float | From = 0.0
    logits_softcap: float | From = 0.0
    logits_divisor: float | From = 1.0
    embedding_scale: float | From | str = 1.0  # "sqrt_hidden": sqrt(hidden_size) rounded to the model's dtype
    residual_scale: float | From = 1.0
    experts: ExpertKeys | None = None
    fused_experts: str = "fused_expert"  # assembler of one expert where the checkpoint has all in one tensor
    latent_attention: bool = False

    @property
    def config_keys(self) -> frozenset[str]:
        """The config keys this row itself reads, among those that a row which does not would refuse."""
        values = (getattr(self, item.name) for item in fields(self))
        keys = {value.key for value in values if isinstance(value, From)} | set(self.when)
        if self.experts is not None:
            keys |= set(self.experts.num_experts)
        if self.latent_attention:
            keys |= {"kv_lora_rank", "rope_interleave"}
        return frozenset(keys)


LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": "mlp.down_proj",
}
HEAD_NORMS = {"query_norm": "self_attn.q_norm", "key_norm": "self_attn.k_norm"}
ATTENTION_BIASES = {"qkv_bias": From("attention_bias"), "output_bias": From("attention_bias")}


def like_llama(architecture: str, model_type: str, defaults: Mapping, **differences) -> Family:
    """The row of a family that names its tensors as Llama does, but for ``differences``."""
    settings = {
        "layer": LLAMA_LAYER,
        "model": {"token_embedding": "model.embed_tokens", "final_norm": "model.norm", "lm_head": "lm_head"},
        "layer_prefix": "model.layers.{layer}.",
        "source_prefixes": (("model.", ""),),
        "defaults": {
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10_000.0,
            "tie_word_embeddings": False,
            "attention_bias": False,
            "mlp_bias": False,
            **defaults,
        },
        **differences,
    }
    return Family(architecture, model_type, **settings)
