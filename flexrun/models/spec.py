"""What the decoder, the weight store and the planner must know of one model, as plain frozen data.

A ModelSpec holds no tensor and reads no file: shapes, names, bytes and FLOPs all follow from it.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from flexrun.core import DTYPES
from flexrun.models.layout import Layout
from flexrun.models.routing import Experts
from flexrun.models.tensors import PackedTensor

NO_ROPE = -1  # in ModelSpec.layer_ropes: this layer sees no positions


@dataclass(frozen=True)
class AttentionForm:
    """How one layer attends.

    scale: factor of the query-key products. window: how many tokens a query sees, itself included (0 = all).
    softcap: scores become ``softcap * tanh(scores / softcap)`` after scaling, before the mask (0 = none).
    """

    scale: float
    window: int = 0
    softcap: float = 0.0


@dataclass(frozen=True)
class RopeSpec:
    """One kind of rotary embedding: the fields of ``rope_parameters`` that its ``kind`` reads. See rope.py."""

    kind: str  # default, linear, dynamic, yarn, llama3, longrope
    theta: float
    rotary_dim: int  # channels of a head the frequencies are spread over; odd values round up when applied
    max_positions: int  # the config's max_position_embeddings
    original_max_positions: int  # before the scaling stretched it
    factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mscale: float | None = None
    mscale_all_dim: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): the cache holds one latent for all heads.

    q_lora_rank: width of the query's own latent, 0 where the query is projected directly. A head's query and key are
    ``nope_head_dim`` channels without positions and ``rope_head_dim`` rotated ones, whose key all heads share.
    interleaved: the checkpoint's rotated channels are neighbours in pairs; packed, they are halves.
    """

    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int
    interleaved: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """Everything the decoder needs. Built by families.spec_from_config.

    Which norms a layer has is told by ``norms`` (see decoder.py for where each one sits):
    ``attention_norm``, ``attention_branch_norm``, ``residual_norm``, ``mlp_norm``, ``mlp_branch_norm``,
    ``output_norm``, ``query_norm``, ``key_norm``, ``q_a_norm``, ``kv_a_norm``, ``final_norm``.
    """

    architecture: str
    dtype: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    embedding_size: int  # width of the token embedding and of the head; differs from hidden_size in OPT-350m
    tie_word_embeddings: bool
    norms: frozenset[str]
    layer_sources: tuple[tuple[str, tuple[str, ...]], ...]  # packed stem -> checkpoint stems, with {layer}
    model_sources: tuple[tuple[str, str], ...]  # the same outside the layers
    layer_windows: tuple[int, ...]  # 0 = unlimited
    layer_ropes: tuple[int, ...] = ()  # index into ropes, or NO_ROPE
    ropes: tuple[RopeSpec, ...] = ()
    norm_kind: str = "rms"  # rms, layer
    norm_eps: float = 1e-6
    norm_offset: float = 0.0  # added to every norm weight (Gemma: 1)
    norm_affine: bool = True
    query_key_norm_width: str = "head"  # head: each head by itself; full: all heads together
    parallel_residual: bool = False
    activation: str = "silu"  # silu, gelu, gelu_tanh, relu
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    learned_positions: bool = False
    position_offset: int = 0  # rows before position 0 in a learned position table
    attention_scale: float = 1.0
    attention_softcap: float = 0.0
    qkv_limit: float = 0.0  # query, key and value are cut off beyond it, above and below (0 = not)
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0
    qkv_assembler: str = "concat"
    source_prefixes: tuple[tuple[str, str], ...] = ()
    ignored_sources: tuple[str, ...] = ()  # patterns of checkpoint tensors that text generation does not need
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    experts: Experts | None = None
    fused_experts: str = "fused_expert"
    sparse_layers: tuple[bool, ...] = ()  # one a layer; () = all dense
    expert_counts: tuple[tuple[int, ...], ...] = ()  # [layer][expert], tokens of an earlier run; () = unknown
    latent: LatentAttention | None = None  # then head_dim is that of query and key

    # ------------------------------------------------------------------ sizes

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def dtype_bytes(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def query_size(self) -> int:
        """Width of a token's query, all heads."""
        return self.num_heads * self.head_dim

    @property
    def attended_size(self) -> int:
        """Width of a token's attention result, all heads: what enters the output projection."""
        return self.num_heads * self.attended_head_dim

    @property
    def kv_size(self) -> int:
        """Width of a token's keys, and of its values, all heads; latent attention has neither in its cache."""
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Width of a token's query and of what it adds to the cache."""
        return self.query_size + self.kv_elements_per_token

    @property
    def kv_elements_per_token(self) -> int:
        """Elements one token adds to the cache of one layer: keys and values, or a latent and its rotated key."""
        return self.latent.kv_lora_rank + self.latent.rope_head_dim if self.latent else 2 * self.kv_size

    @property
    def kv_planes(self) -> tuple[int, int, int]:
        """A cached token as (planes, heads, width): keys and values of its KV heads, or one latent for all heads."""
        return (1, 1, self.kv_elements_per_token) if self.latent else (2, self.num_kv_heads, self.head_dim)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token adds to the cache of one layer, in the model's dtype."""
        return self.kv_elements_per_token * self.dtype_bytes

    @property
    def max_length_tokens(self) -> int | None:
        """The hard limit of a sequence, or None where only quality ends (rotary positions go on)."""
        return self.max_position_embeddings if self.learned_positions else None

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer routes its tokens to experts."""
        return bool(self.sparse_layers) and self.sparse_layers[layer]

    @property
    def attended_head_dim(self) -> int:
        """Width of one head's attention result."""
        return self.latent.value_head_dim if self.latent else self.head_dim

    def attention_form(self, layer: int) -> AttentionForm:
        return AttentionForm(self.attention_scale, self.layer_windows[layer], self.attention_softcap)

    # ---------------------------------------------------------------- tensors

    def layer_tensors(self, layer: int) -> tuple[PackedTensor, ...]:
        """Every tensor of one layer: those of module ``attention``, then of ``mlp``, then of ``experts``.

        In a sparse layer ``mlp`` holds the router and the shared experts, and ``experts`` the routed ones one after
        another: ``expert.7.gate_up.weight``, ``expert.7.down.weight``.
        """
        return self._layers[layer]

    @cached_property
    def _layers(self) -> tuple[tuple[PackedTensor, ...], ...]:
        layout = Layout(self)
        return tuple(tuple(layout.layer(layer)) for layer in range(self.num_layers))

    def embedding_tensors(self) -> tuple[PackedTensor, ...]:
        """``token_embedding.weight`` [vocab, embedding_size] and, for OPT, the positions and ``project_in``."""
        return tuple(Layout(self).embedding())

    def head_tensors(self) -> tuple[PackedTensor, ...]:
        """The final norm, ``project_out`` and ``lm_head.weight`` [vocab, embedding_size], absent when tied."""
        return tuple(Layout(self).head())

    def all_tensors(self) -> tuple[PackedTensor, ...]:
        return tuple(tensor for _, tensor in self.tensors_by_layer())

    def tensors_by_layer(self) -> list[tuple[int, PackedTensor]]:
        """Every tensor with its layer (-1: embedding, num_layers: head), in order of use; a tied head is not listed."""
        return list(self._tensors_by_layer)

    @cached_property
    def _tensors_by_layer(self) -> tuple[tuple[int, PackedTensor], ...]:
        layers = [(layer, tensor) for layer, tensors in enumerate(self._layers) for tensor in tensors]
        embedding = [(-1, tensor) for tensor in self.embedding_tensors()]
        return (*embedding, *layers, *((self.num_layers, tensor) for tensor in self.head_tensors()))

    def source_names(self, source: str) -> tuple[str, ...]:
        """Names under which a checkpoint may hold ``source``, the usual one first.

        Checkpoints saved from a bare base model, or by another transformers version, differ in a prefix only.
        """
        others = (other + source[len(usual) :] for usual, other in self.source_prefixes if source.startswith(usual))
        return (source, *others)

    def find_source(self, source: str, available: Container[str]) -> str | None:
        """The name under which ``available`` holds ``source``, or None."""
        return next((name for name in self.source_names(source) if name in available), None)

    def unread_sources(self, available: Iterable[str]) -> list[str]:
        """Checkpoint tensors this spec would leave unread although they belong to the model.

        Not empty means that the checkpoint computes something this spec does not: do not run it.
        """
        names = sorted(available)
        known = set(names)
        read = {self.find_source(source, known) for tensor in self.all_tensors() for source in tensor.sources}
        ignored = list(self.ignored_sources)
        if self.tie_word_embeddings:
            ignored += [f"{name}.weight" for name in self.source_names(dict(self.model_sources)["lm_head"])]
        return [
            name
            for name in names
            if name not in read and not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored)
        ]

    # ----------------------------------------------------------- bytes, FLOPs

    def layer_bytes(self, layer: int, module: str | None = None) -> int:
        """Bytes of one layer's weights, or of one of its modules, in the model's dtype."""
        tensors = self.layer_tensors(layer)
        return self.dtype_bytes * sum(tensor.elements for tensor in tensors if module in (None, tensor.module))

    @cached_property
    def parameter_count(self) -> int:
        """Elements of all tensors as stored; a tied head counts once."""
        return sum(tensor.elements for _, tensor in self._tensors_by_layer)

    @property
    def weight_bytes(self) -> int:
        return self.parameter_count * self.dtype_bytes

    @cached_property
    def active_parameter_count(self) -> int:
        """Parameters that one token meets: all but the routed experts it is not sent to."""
        if self.experts is None:
            return self.parameter_count
        routed = sum(tensor.elements for _, tensor in self._tensors_by_layer if tensor.module == "experts")
        idle_experts = self.experts.num_experts - self.experts.experts_per_token
        return self.parameter_count - routed * idle_experts // self.experts.num_experts

    def linear_shapes(self, part: str, layer: int = 0) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of each matrix that a token row meets in one part of a layer, in order of use.

        part: ``attention_inputs``, ``attention_output``, ``mlp`` (of a sparse layer: router and shared experts),
        ``expert`` (one routed expert; () where there are none) or ``head`` (of the model). Norms have no matrix.
        Between the projections of latent attention and its cache stand decode_absorption_shapes or
        prefill_expansion_shapes.
        """
        hidden, experts, latent = self.hidden_size, self.experts, self.latent
        if part == "attention_inputs":
            if latent is None:
                return ((hidden, self.qkv_size),)
            rank = latent.q_lora_rank
            query = ((hidden, rank), (rank, self.query_size)) if rank else ((hidden, self.query_size),)
            return (*query, (hidden, self.kv_elements_per_token))
        if part == "attention_output":
            return ((self.attended_size, hidden),)
        if part == "mlp":
            if not self.is_sparse(layer):
                return self._mlp_shapes(self.intermediate_size)
            shared = self._mlp_shapes(experts.shared_intermediate_size) if experts.shared_intermediate_size else ()
            shared_router = ((hidden, 1),) if shared and "shared_router" in dict(self.layer_sources) else ()
            return ((hidden, experts.num_experts), *shared, *shared_router)
        if part == "expert":
            return self._mlp_shapes(experts.intermediate_size) if experts else ()
        if part == "head":
            project_out = ((hidden, self.embedding_size),) if self.embedding_size != hidden else ()
            return (*project_out, (self.embedding_size, self.vocab_size))
        raise KeyError(f"no part {part!r}: attention_inputs, attention_output, mlp, expert or head")

    def _mlp_shapes(self, inner: int) -> tuple[tuple[int, int], ...]:
        return ((self.hidden_size, inner * (2 if self.gated else 1)), (inner, self.hidden_size))

    def flops_per_token(self, module: str, layer: int = 0) -> int:
        """FLOPs of the matrix products of one module for one token, two a multiply-add.

        module: ``attention``, ``mlp``, ``experts`` (those the token is sent to), or ``head``. Attention over the cache
        is attention_flops_per_token.
        """
        if module == "attention":
            shapes = self.linear_shapes("attention_inputs") + self.linear_shapes("attention_output")
            shapes += self.decode_absorption_shapes  # as many as those of prefill_expansion_shapes
        elif module == "experts":
            shapes = self.linear_shapes("expert") * self.experts.experts_per_token if self.is_sparse(layer) else ()
        elif module in ("mlp", "head"):
            shapes = self.linear_shapes(module, layer)
        else:
            raise KeyError(f"no module {module!r}: attention, mlp, experts or head")
        return 2 * sum(inputs * outputs for inputs, outputs in shapes)

    @property
    def decode_attention_flops_per_pair(self) -> int:
        """FLOPs of score and weighted value of one (query token, cached token) pair of one layer, all heads.

        Latent attention scores the latent and its rotated key with the absorbed query, and sums latents.
        """
        if self.latent is None:
            return 4 * self.query_size
        return 2 * self.num_heads * (2 * self.latent.kv_lora_rank + self.latent.rope_head_dim)

    @property
    def prefill_attention_flops_per_pair(self) -> int:
        """The same for the tokens of a prompt, whose keys and values are there for each head."""
        return 2 * (self.query_size + self.attended_size)

    @property
    def decode_absorption_shapes(self) -> tuple[tuple[int, int], ...]:
        """Matrices between the projections of a decoded token and a latent cache, (inputs, outputs); else ().

        The two halves of ``kv_b``, one head beside the other: the query comes to the latent's space, the sum of
        latents leaves it.
        """
        if self.latent is None:
            return ()
        rank, heads = self.latent.kv_lora_rank, self.num_heads
        return ((heads * self.latent.nope_head_dim, rank), (rank, heads * self.latent.value_head_dim))

    @property
    def prefill_expansion_shapes(self) -> tuple[tuple[int, int], ...]:
        """The matrix that expands the latent of a prompt token to keys and values, (inputs, outputs); else ()."""
        if self.latent is None:
            return ()
        rank, expanded = self.latent.kv_lora_rank, self.latent.nope_head_dim + self.latent.value_head_dim
        return ((rank, self.num_heads * expanded),)

    def attention_flops_per_token(self, context_tokens: int) -> int:
        """FLOPs of scores and weighted values of one layer for one query over ``context_tokens`` keys."""
        return self.decode_attention_flops_per_pair * context_tokens
