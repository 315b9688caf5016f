"""Which packed tensors a model consists of: the names, shapes and checkpoint sources that follow from its spec."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from flexrun.models.tensors import PackedTensor

if TYPE_CHECKING:
    from flexrun.models.spec import ModelSpec


class Layout:
    """Lists the packed tensors of ``spec``; each method gives them in the order of use."""

    def __init__(self, spec: ModelSpec):
        self._spec = spec
        self._layer_sources = dict(spec.layer_sources)
        self._model_sources = dict(spec.model_sources)

    def layer(self, layer: int) -> Iterator[PackedTensor]:
        """Those of module ``attention`` first, then those of ``mlp``."""
        spec, hidden = self._spec, self._spec.hidden_size
        yield from self._norm("attention", "attention_norm", hidden, layer)
        yield from self._attention(layer)
        yield from self._norm("attention", "attention_branch_norm", hidden, layer)
        yield from self._norm("mlp", "residual_norm", hidden, layer)
        yield from self._norm("mlp", "mlp_norm", hidden, layer)
        yield from self._gated("mlp", "", spec.intermediate_size, layer)
        yield from self._norm("mlp", "mlp_branch_norm", hidden, layer)
        yield from self._norm("mlp", "output_norm", hidden, layer)

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

    def _attention(self, layer: int) -> Iterator[PackedTensor]:
        spec, hidden = self._spec, self._spec.hidden_size
        per_head = spec.query_key_norm_width == "head"
        qkv_rows = (spec.query_size, spec.kv_size, spec.kv_size)
        yield from self._linear("attention", "qkv", qkv_rows, hidden, spec.qkv_bias, layer, spec.qkv_assembler)
        yield from self._norm("attention", "query_norm", spec.head_dim if per_head else spec.query_size, layer)
        yield from self._norm("attention", "key_norm", spec.head_dim if per_head else spec.kv_size, layer)
        yield from self._linear("attention", "output", (hidden,), spec.query_size, spec.output_bias, layer)

    def _gated(self, module: str, prefix: str, inner: int, layer: int) -> Iterator[PackedTensor]:
        """The matrices into and out of ``inner`` channels; ``prefix`` tells those of shared experts apart."""
        spec, hidden = self._spec, self._spec.hidden_size
        stem, rows = ("gate_up", (inner, inner)) if spec.gated else ("up", (inner,))
        yield from self._linear(module, prefix + stem, rows, hidden, spec.mlp_bias, layer)
        yield from self._linear(module, prefix + "down", (hidden,), inner, spec.mlp_bias, layer)

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
    ) -> Iterator[PackedTensor]:
        stems = self._stems(stem, layer)
        total = sum(rows)
        source_rows = rows if len(stems) == len(rows) else (total,)  # fused in the checkpoint already
        groups = self._spec.num_heads if assemble == "neox_qkv" else 1
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
