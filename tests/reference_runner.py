"""The plainest possible driver of the decoder: all in RAM, eager attention. What parity tests compare with.

It carries ragged sequences in one flat pass, as the executor does, and nothing else of the executor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flexrun import moe
from flexrun.models import decoder
from flexrun.models.rope import rope_tables
from flexrun.models.spec import AttentionForm, ModelSpec


def expand(spec: ModelSpec, kv_b: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Latent rows [N, 1, rank + rope] -> the keys [N, H, nope + rope] and values [N, H, value] of every head."""
    rank, nope = spec.latent.kv_lora_rank, spec.latent.nope_head_dim
    both = torch.einsum("nr,hor->nho", rows[:, 0, :rank], kv_b)
    shared_key = rows[..., rank:].expand(-1, spec.num_heads, -1)
    return torch.cat([both[..., :nope], shared_key], dim=-1), both[..., nope:]


def attend(form: AttentionForm, sinks: Tensor | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """query [T, H, D] are the last T of N positions; key, value [N, KV, D], sinks [H] -> [T, H, D]."""
    queries, keys = query.shape[0], key.shape[0]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = torch.einsum("thd,nhd->htn", query.float(), key.float()) * form.scale
    if form.softcap:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    distance = torch.arange(keys - queries, keys).unsqueeze(1) - torch.arange(keys)
    visible = (distance >= 0) & ((distance < form.window) if form.window else True)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:  # one more key, which has no value
        scores = torch.cat((scores, sinks.float().view(-1, 1, 1).expand(-1, queries, 1)), dim=-1)
    weights = scores.softmax(dim=-1)[..., :keys]
    return torch.einsum("htn,nhd->thd", weights, value.float()).to(query.dtype)


class ReferenceRunner:
    """Runs sequences through every layer with ``rows_per_call`` token rows a decoder call (0: all)."""

    def __init__(self, spec: ModelSpec, tensors: Mapping[str, Tensor], max_positions: int, rows_per_call: int = 0):
        self.spec = spec
        self.rows_per_call = rows_per_call
        self.tables = rope_tables(spec, max_positions)
        self.layers = [self._pack(spec.layer_tensors(layer), tensors) for layer in range(spec.num_layers)]
        self.embedding = self._pack(spec.embedding_tensors(), tensors)["embedding"]
        self.head = dict(self._pack(spec.head_tensors(), tensors).get("head", {}))
        if spec.tie_word_embeddings:
            self.head["lm_head.weight"] = self.embedding["token_embedding.weight"]

    def _pack(self, packed_tensors, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        modules: dict[str, dict[str, Tensor]] = {"attention": {}, "mlp": {}, "embedding": {}}
        for packed in packed_tensors:
            names = [self.spec.find_source(source, tensors) for source in packed.sources]
            assert all(names), f"checkpoint lacks {packed.sources}"
            sources = [tensors[name] for name in names]
            assert [tuple(source.shape) for source in sources] == list(packed.source_shapes), packed
            built = packed.build(sources, self.spec.torch_dtype)
            assert tuple(built.shape) == packed.shape
            modules.setdefault(packed.module, {})[packed.name] = built
        return modules

    def _slices(self, rows: int):
        step = self.rows_per_call or rows
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def run(self, caches: Sequence[list], token_ids: Sequence[Sequence[int]]) -> list[Tensor]:
        """Feed each sequence its next tokens. A cache is a list that starts empty; logits [tokens, vocab] of each."""
        spec = self.spec
        starts = [cache[0][0].shape[0] if cache else 0 for cache in caches]
        counts = [len(ids) for ids in token_ids]
        ids = torch.tensor([token for ids in token_ids for token in ids])
        positions = torch.cat([torch.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
        for cache in caches:
            if not cache:
                planes, heads, width = spec.kv_planes
                empty = torch.empty(0, heads, width, dtype=spec.torch_dtype)
                cache += [[empty] * planes for _ in range(spec.num_layers)]
        slices = self._slices(len(ids))
        rotary = self.tables.gather(positions)
        hidden = torch.cat([decoder.embed(spec, self.embedding, ids[rows], positions[rows]) for rows in slices])
        for layer, modules in enumerate(self.layers):
            attention, form = modules["attention"], spec.attention_form(layer)
            inputs = [
                decoder.attention_inputs(spec, layer, attention, hidden[rows], rotary.rows(rows.start, rows.stop))
                for rows in slices
            ]
            query, *new = (torch.cat(part) for part in zip(*inputs, strict=True))
            attended = query.new_empty(len(query), spec.num_heads, spec.attended_head_dim)
            row = 0
            for cache, count in zip(caches, counts, strict=True):
                mine = slice(row, row + count)
                cache[layer] = [torch.cat((old, rows[mine])) for old, rows in zip(cache[layer], new, strict=True)]
                seen = expand(spec, attention["kv_b.weight"], *cache[layer]) if spec.latent else cache[layer]
                attended[mine] = attend(form, attention.get("sinks"), query[mine], *seen)
                row += count
            for rows in slices:
                branch = decoder.attention_output(spec, layer, attention, attended[rows])
                if spec.is_sparse(layer):
                    self._sparse_mlp(layer, modules, hidden[rows], branch)
                else:
                    decoder.mlp(spec, layer, modules["mlp"], hidden[rows], branch)
        scores = torch.cat([decoder.logits(spec, self.head, hidden[rows]) for rows in slices])
        return list(scores.split(counts))

    def _sparse_mlp(self, layer: int, modules, hidden: Tensor, branch: Tensor) -> None:
        spec, normed, routed = self.spec, torch.empty_like(hidden), torch.empty_like(hidden, dtype=torch.float32)
        logits = decoder.sparse_mlp(spec, layer, modules["mlp"], hidden, branch, normed, routed)
        chosen = moe.route(spec.experts.routing, logits, modules["mlp"].get("router.correction"))
        assignment = moe.assign(*chosen, spec.experts.num_experts)
        buffers = moe.ExpertBuffers(spec, len(hidden))
        numbers = range(spec.experts.num_experts)
        moe.run_experts(spec, modules["experts"], numbers, assignment, normed, routed, buffers)
        decoder.add_routed(spec, hidden, routed)

    def generate(self, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[list[list[int]], list[Tensor]]:
        """Greedy: (new token ids, logits [prompt + tokens - 1, vocab] of every position) a sequence."""
        caches: list[list] = [[] for _ in prompts]
        outputs: list[list[int]] = [[] for _ in prompts]
        logits: list[list[Tensor]] = [[] for _ in prompts]
        feed: list[Sequence[int]] = list(prompts)
        for _ in range(tokens):
            for index, scores in enumerate(self.run(caches, feed)):
                logits[index].append(scores)
                outputs[index].append(int(scores[-1].argmax()))
            feed = [[ids[-1]] for ids in outputs]
        return outputs, [torch.cat(scores) for scores in logits]
