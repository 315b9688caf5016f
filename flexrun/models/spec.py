"""What the decoder, the weight store and the planner must know of one model, as plain frozen data.

A ModelSpec holds no tensor and reads no file: shapes, names, bytes and FLOPs all follow from it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexrun.core import DTYPES

NO_ROPE = -1  # in ModelSpec.layer_ropes: this layer sees no positions


@dataclass(frozen=True)
class PackedTensor:
    """One tensor as flexrun stores it, and the checkpoint tensors it is made of.

    name: for example ``"qkv.weight"``, unique within its module.
    module: ``"attention"``, ``"mlp"``, ``"embedding"`` or ``"head"``.
    shape: of the packed tensor.
    sources: checkpoint tensor names in the Hugging Face naming, with the layer filled in.
    source_shapes: what the checkpoint must hold, one shape a source.
    assemble: key into ASSEMBLERS.
    groups: what the assembler needs beside the tensors (``"neox_qkv"``: the number of heads).
    """

    name: str
    module: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    assemble: str = "concat"
    groups: int = 1

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def build(self, tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
        """The packed tensor, contiguous, from the source tensors in order, cast to ``dtype`` if given.

        May share memory with a lone source that needs no change.
        """
        packed = ASSEMBLERS[self.assemble](tensors, self.groups, dtype or tensors[0].dtype)
        return packed.reshape(self.shape).contiguous()


def _concat(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    if len(tensors) == 1:
        return tensors[0].to(dtype)
    packed = torch.empty((sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:]), dtype=dtype)
    row = 0
    for tensor in tensors:
        packed[row : row + len(tensor)].copy_(tensor)  # casts and concatenates in one copy
        row += len(tensor)
    return packed


def _neox_qkv(tensors: Sequence[Tensor], groups: int, dtype: torch.dtype) -> Tensor:
    """GPT-NeoX stores [head 0: q k v, head 1: q k v, ...]; the decoder wants all q, all k, all v."""
    (fused,) = tensors
    by_head = fused.reshape(groups, 3, -1, *fused.shape[1:])  # [heads, 3, head_dim, ...]
    return by_head.transpose(0, 1).reshape(fused.shape).to(dtype)


ASSEMBLERS: dict[str, Callable[[Sequence[Tensor], int, torch.dtype], Tensor]] = {
    "concat": _concat,
    "neox_qkv": _neox_qkv,
}


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
class ModelSpec:
    """Everything the decoder needs. Built by families.spec_from_config.

    Which norms a layer has is told by ``norms`` (see decoder.py for where each one sits):
    ``attention_norm``, ``attention_branch_norm``, ``residual_norm``, ``mlp_norm``, ``mlp_branch_norm``,
    ``output_norm``, ``query_norm``, ``key_norm``, ``final_norm``.
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
    learned_positions: bool = False
    position_offset: int = 0  # rows before position 0 in a learned position table
    attention_scale: float = 1.0
    attention_softcap: float = 0.0
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

    # ------------------------------------------------------------------ sizes

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def dtype_bytes(self) -> int:
        return self.torch_dtype.itemsize

    @property
    def query_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        return self.query_size + 2 * self.kv_size

    @property
    def kv_elements_per_token(self) -> int:
        """Key and value elements one token adds to the cache of one layer."""
        return 2 * self.kv_size

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes one token adds to the cache of one layer, in the model's dtype."""
        return self.kv_elements_per_token * self.dtype_bytes

    @property
    def max_length_tokens(self) -> int | None:
        """The hard limit of a sequence, or None where only quality ends (rotary positions go on)."""
        return self.max_position_embeddings if self.learned_positions else None

    def attention_form(self, layer: int) -> AttentionForm:
        return AttentionForm(self.attention_scale, self.layer_windows[layer], self.attention_softcap)

    # ---------------------------------------------------------------- tensors

    def layer_tensors(self, layer: int) -> tuple[PackedTensor, ...]:
        """Every tensor of one layer: those of module ``attention`` first, then those of ``mlp``."""
        hidden, inner = self.hidden_size, self.intermediate_size
        per_head = self.query_key_norm_width == "head"
        query_norm = self.head_dim if per_head else self.query_size
        key_norm = self.head_dim if per_head else self.kv_size
        qkv_rows = (self.query_size, self.kv_size, self.kv_size)
        up_stem, up_rows = ("gate_up", (inner, inner)) if self.gated else ("up", (inner,))
        return (
            *self._norm("attention", "attention_norm", hidden, layer),
            *self._linear("attention", "qkv", qkv_rows, hidden, self.qkv_bias, layer, self.qkv_assembler),
            *self._norm("attention", "query_norm", query_norm, layer),
            *self._norm("attention", "key_norm", key_norm, layer),
            *self._linear("attention", "output", (hidden,), self.query_size, self.output_bias, layer),
            *self._norm("attention", "attention_branch_norm", hidden, layer),
            *self._norm("mlp", "residual_norm", hidden, layer),
            *self._norm("mlp", "mlp_norm", hidden, layer),
            *self._linear("mlp", up_stem, up_rows, hidden, self.mlp_bias, layer),
            *self._linear("mlp", "down", (hidden,), inner, self.mlp_bias, layer),
            *self._norm("mlp", "mlp_branch_norm", hidden, layer),
            *self._norm("mlp", "output_norm", hidden, layer),
        )

    def embedding_tensors(self) -> tuple[PackedTensor, ...]:
        """``token_embedding.weight`` [vocab, embedding_size] and, for OPT, the positions and ``project_in``."""
        tensors = [*self._outer("embedding", "token_embedding", self.vocab_size, self.embedding_size)]
        if self.learned_positions:
            rows = self.max_position_embeddings + self.position_offset
            tensors += self._outer("embedding", "position_embedding", rows, self.hidden_size)
        if self.embedding_size != self.hidden_size:
            tensors += self._outer("embedding", "project_in", self.hidden_size, self.embedding_size)
        return tuple(tensors)

    def head_tensors(self) -> tuple[PackedTensor, ...]:
        """The final norm, ``project_out`` and ``lm_head.weight`` [vocab, embedding_size], absent when tied."""
        tensors = [*self._norm("head", "final_norm", self.hidden_size)]
        if self.embedding_size != self.hidden_size:
            tensors += self._outer("head", "project_out", self.embedding_size, self.hidden_size)
        if not self.tie_word_embeddings:
            tensors += self._outer("head", "lm_head", self.vocab_size, self.embedding_size)
        return tuple(tensors)

    def all_tensors(self) -> tuple[PackedTensor, ...]:
        return tuple(tensor for _, tensor in self.tensors_by_layer())

    def tensors_by_layer(self) -> list[tuple[int, PackedTensor]]:
        """Every tensor with its layer (-1: embedding, num_layers: head), in order of use; a tied head is not listed."""
        layers = [(layer, tensor) for layer in range(self.num_layers) for tensor in self.layer_tensors(layer)]
        embedding = [(-1, tensor) for tensor in self.embedding_tensors()]
        return embedding + layers + [(self.num_layers, tensor) for tensor in self.head_tensors()]

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

    def _stems(self, stem: str, layer: int | None) -> tuple[str, ...]:
        if layer is None:
            return (dict(self.model_sources)[stem],)
        return tuple(source.format(layer=layer) for source in dict(self.layer_sources)[stem])

    def _norm(self, module: str, stem: str, width: int, layer: int | None = None):
        if stem not in self.norms or not self.norm_affine:
            return
        (source,) = self._stems(stem, layer)
        for part in ("weight", "bias") if self.norm_kind == "layer" else ("weight",):
            yield PackedTensor(f"{stem}.{part}", module, (width,), (f"{source}.{part}",), ((width,),))

    def _linear(
        self,
        module: str,
        stem: str,
        rows: tuple[int, ...],
        columns: int,
        bias: bool,
        layer: int,
        assemble: str = "concat",
    ):
        stems = self._stems(stem, layer)
        total = sum(rows)
        source_rows = rows if len(stems) == len(rows) else (total,)  # fused in the checkpoint already
        groups = self.num_heads if assemble == "neox_qkv" else 1
        for part, tail in (("weight", (columns,)), ("bias", ()))[: 2 if bias else 1]:
            yield PackedTensor(
                f"{stem}.{part}",
                module,
                (total, *tail),
                tuple(f"{source}.{part}" for source in stems),
                tuple((count, *tail) for count in source_rows),
                assemble,
                groups,
            )

    def _outer(self, module: str, stem: str, rows: int, columns: int) -> list[PackedTensor]:
        (source,) = self._stems(stem, None)
        shape = (rows, columns)
        return [PackedTensor(f"{stem}.weight", module, shape, (f"{source}.weight",), (shape,))]

    # ----------------------------------------------------------- bytes, FLOPs

    def layer_bytes(self, layer: int, module: str | None = None) -> int:
        """Bytes of one layer's weights, or of one of its modules, in the model's dtype."""
        tensors = self.layer_tensors(layer)
        return self.dtype_bytes * sum(tensor.elements for tensor in tensors if module in (None, tensor.module))

    @property
    def parameter_count(self) -> int:
        """Elements of all tensors as stored; a tied head counts once."""
        return sum(tensor.elements for tensor in self.all_tensors())

    @property
    def weight_bytes(self) -> int:
        return self.parameter_count * self.dtype_bytes

    def flops_per_token(self, module: str) -> int:
        """FLOPs of the matrix products of one module for one token: ``attention``, ``mlp`` (of one layer) or ``head``.

        Two FLOPs a multiply-add. Attention over the cache is attention_flops_per_token.
        """
        if module == "attention":
            return 2 * self.hidden_size * (self.qkv_size + self.query_size)
        if module == "mlp":
            return 2 * self.hidden_size * self.intermediate_size * (3 if self.gated else 2)
        if module == "head":
            project_out = self.hidden_size if self.embedding_size != self.hidden_size else 0
            return 2 * self.embedding_size * (self.vocab_size + project_out)
        raise KeyError(f"no module {module!r}: attention, mlp or head")

    def attention_flops_per_token(self, context_tokens: int) -> int:
        """FLOPs of scores and weighted values of one layer for one query over ``context_tokens`` keys."""
        return 4 * self.query_size * context_tokens
