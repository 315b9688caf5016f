"""Which packed tensors a model consists of: the names, shapes and checkpoint sources that follow from its spec."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from flexrun.models.tensors import PackedTensor

if TYPE_CHECKING:
    from flexrun.models.spec import ModelSpec


class _ExpertTensor(NamedTuple):
    """What one tensor of a routed expert has in common in all layers; its sources lack ``model.layers.<layer>``."""

    name: str
    shape: tuple[int, ...]
    source_tails: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    assemble: str
    groups: int


class Layout:
    """Lists the packed tensors of ``spec``; each method gives them in the order of use."""

    def __init__(self, spec: ModelSpec):
        self._spec = spec
        self._layer_sources = dict(spec.layer_sources)
        self._model_sources = dict(spec.model_sources)

    def layer(self, layer: int) -> Iterator[PackedTensor]:
        """Those of module ``attention`` first, then those of ``mlp``, then those of ``experts``."""
        spec, hidden = self._spec, self._spec.hidden_size
        yield from self._norm("attention", "attention_norm", hidden, layer)
        yield from self._latent_attention(layer) if spec.latent else self._attention(layer)
        yield from self._norm("attention", "attention_branch_norm", hidden, layer)
        yield from self._norm("mlp", "residual_norm", hidden, layer)
        yield from self._norm("mlp", "mlp_norm", hidden, layer)
        if spec.is_sparse(layer):
            yield from self._router_and_shared_experts(layer)
        else:
            yield from self._gated("", spec.intermediate_size, layer)
        yield from self._norm("mlp", "mlp_branch_norm", hidden, layer)
        yield from self._norm("mlp", "output_norm", hidden, layer)
        if spec.is_sparse(layer):
            yield from self._routed_experts(layer)

    def embedding(self) -> Iterator[PackedTensor]:
        spec = self._spec
        yield self._outer("embedding", "token_embedding", spec.vocab_size, spec.embedding_size)
        if spec.learned_positions:
            rows = spec.max_position_embeddings + spec.position_offset
            yield self._outer("embedding", "position_embedding", rows, spec.hidden_size)
        if spec.embedding_size != spec.hidden_size:
            yield self._outer("embedding", "project_in", spec.hidden_size, spec.embedding_size)

    def head(self) -> Iterator[PackedTensor]:
        spec = self._spec
        yield from self._norm("head", "final_norm", spec.hidden_size)
        if spec.embedding_size != spec.hidden_size:
            yield self._outer("head", "project_out", spec.embedding_size, spec.hidden_size)
        if not spec.tie_word_embeddings:
            yield self._outer("head", "lm_head", spec.vocab_size, spec.embedding_size)
        if spec.head_bias:
            (source,), shape = self._stems("lm_head", None), (spec.vocab_size,)
            yield PackedTensor("lm_head.bias", "head", shape, (f"{source}.bias",), (shape,))

    def _attention(self, layer: int) -> Iterator[PackedTensor]:
        spec, hidden = self._spec, self._spec.hidden_size
        per_head = spec.query_key_norm_width == "head"
        qkv_rows, heads = (spec.query_size, spec.kv_size, spec.kv_size), spec.num_heads
        yield from self._linear("attention", "qkv", qkv_rows, hidden, spec.qkv_bias, layer, spec.qkv_assembler, heads)
        yield from self._norm("attention", "query_norm", spec.head_dim if per_head else spec.query_size, layer)
        yield from self._norm("attention", "key_norm", spec.head_dim if per_head else spec.kv_size, layer)
        if "sinks" in self._layer_sources:  # a logit a head, which takes its share of the softmax and gives no value
            (source,), shape = self._stems("sinks", layer), (spec.num_heads,)
            yield PackedTensor("sinks", "attention", shape, (source,), (shape,))
        yield from self._linear("attention", "output", (hidden,), spec.query_size, spec.output_bias, layer)

    def _latent_attention(self, layer: int) -> Iterator[PackedTensor]:
        """``kv_b`` has for each head nope_head_dim rows that make its keys of the latent, then those of its values."""
        spec, hidden, latent = self._spec, self._spec.hidden_size, self._spec.latent
        query, rotated = (spec.query_size,), latent.rope_head_dim
        assemble = "rope_pairs" if latent.interleaved else "concat"
        if latent.q_lora_rank:
            yield from self._linear("attention", "q_a", (latent.q_lora_rank,), hidden, spec.qkv_bias, layer)
            yield from self._norm("attention", "q_a_norm", latent.q_lora_rank, layer)
            columns, stem = latent.q_lora_rank, "q_b"
        else:
            columns, stem = hidden, "q"
        groups = (spec.num_heads, rotated)
        yield from self._linear("attention", stem, query, columns, False, layer, assemble, groups)
        rows = (spec.kv_elements_per_token,)
        yield from self._linear("attention", "kv_a", rows, hidden, spec.qkv_bias, layer, assemble, (1, rotated))
        yield from self._norm("attention", "kv_a_norm", latent.kv_lora_rank, layer)
        expanded = (spec.num_heads, latent.nope_head_dim + latent.value_head_dim, latent.kv_lora_rank)
        (source,), shape = self._stems("kv_b", layer), (expanded[0] * expanded[1], expanded[2])
        yield PackedTensor("kv_b.weight", "attention", expanded, (f"{source}.weight",), (shape,))
        yield from self._linear("attention", "output", (hidden,), spec.attended_size, spec.output_bias, layer)

    def _router_and_shared_experts(self, layer: int) -> Iterator[PackedTensor]:
        """``shared_router`` weighs the shared experts; the correction of the router's scores only ranks the experts."""
        spec, experts, hidden = self._spec, self._spec.experts, self._spec.hidden_size
        yield from self._linear("mlp", "router", (experts.num_experts,), hidden, spec.mlp_bias, layer)
        if "router_correction" in self._layer_sources:
            (source,), shape = self._stems("router_correction", layer), (experts.num_experts,)
            yield PackedTensor("router.correction", "mlp", shape, (source,), (shape,), dtype="float32")
        if experts.shared_intermediate_size:
            yield from self._gated("shared_", experts.shared_intermediate_size, layer)
            if "shared_router" in self._layer_sources:
                yield from self._linear("mlp", "shared_router", (1,), hidden, False, layer)

    def _gated(self, prefix: str, inner: int, layer: int) -> Iterator[PackedTensor]:
        """The matrices into and out of ``inner`` channels; ``prefix`` tells those of shared experts apart."""
        spec, hidden = self._spec, self._spec.hidden_size
        stem, rows = ("gate_up", (inner, inner)) if spec.gated else ("up", (inner,))
        yield from self._linear("mlp", prefix + stem, rows, hidden, spec.mlp_bias, layer)
        yield from self._linear("mlp", prefix + "down", (hidden,), inner, spec.mlp_bias, layer)

    def _routed_experts(self, layer: int) -> Iterator[PackedTensor]:
        prefix, tensors = self._expert_tensors
        prefix = prefix.format(layer=layer)
        for name, shape, tails, source_shapes, assemble, groups in tensors:
            sources = tuple([prefix + tail for tail in tails])
            yield PackedTensor(name, "experts", shape, sources, source_shapes, assemble, groups)

    @cached_property
    def _expert_tensors(self) -> tuple[str, list[_ExpertTensor]]:
        """The common start of the experts' sources, and their tensors: layers share them, for there may be 30,000."""
        prefix = self._layer_sources["expert_down"][0].partition("{layer}")[0] + "{layer}"
        return prefix, [
            tensor for expert in range(self._spec.experts.num_experts) for tensor in self._expert(expert, len(prefix))
        ]

    def _expert(self, expert: int, prefix_length: int) -> Iterator[_ExpertTensor]:
        spec, hidden, inner = self._spec, self._spec.hidden_size, self._spec.experts.intermediate_size
        for stem, rows, columns in (("gate_up", (inner, inner), hidden), ("down", (hidden,), inner)):
            sources = self._layer_sources[f"expert_{stem}"]
            tails = [source.replace("{expert}", str(expert))[prefix_length:] for source in sources]
            fused = "{expert}" not in sources[0]
            for part, tail in (("weight", (columns,)), ("bias", ()))[: 2 if spec.mlp_bias else 1]:
                name, shape = f"expert.{expert}.{stem}.{part}", (sum(rows), *tail)
                if fused:
                    by_rows = spec.fused_experts == "fused_expert_rows"
                    whole = (spec.experts.num_experts, *(shape if by_rows else reversed(shape)))
                    names = (tails[0] + ("_bias" if part == "bias" else ""),)
                    pairs = stem == "gate_up" and not by_rows
                    assemble = "fused_expert_pairs" if pairs else spec.fused_experts
                    yield _ExpertTensor(name, shape, names, (whole,), assemble, expert)
                else:
                    names = tuple(f"{tail}.{part}" for tail in tails)
                    shapes = tuple((count, *tail) for count in rows)
                    yield _ExpertTensor(name, shape, names, shapes, "concat", 1)

    def _stems(self, stem: str, layer: int | None) -> tuple[str, ...]:
        if layer is None:
            return (self._model_sources[stem],)
        return tuple(source.format(layer=layer) for source in self._layer_sources[stem])

    def _norm(self, module: str, stem: str, width: int, layer: int | None = None) -> Iterator[PackedTensor]:
        spec = self._spec
        if stem not in spec.norms or not spec.norm_affine:
            return
        (source,) = self._stems(stem, layer)
        for part in ("weight", "bias") if spec.norm_kind == "layer" else ("weight",):
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
        groups: int | tuple[int, int] = 1,
    ) -> Iterator[PackedTensor]:
        stems = self._stems(stem, layer)
        total = sum(rows)
        source_rows = rows if len(stems) == len(rows) else (total,)  # fused in the checkpoint already
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

    def _outer(self, module: str, stem: str, rows: int, columns: int) -> PackedTensor:
        (source,) = self._stems(stem, None)
        shape = (rows, columns)
        return PackedTensor(f"{stem}.weight", module, shape, (f"{source}.weight",), (shape,))
