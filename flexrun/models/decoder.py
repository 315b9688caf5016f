"""The only forward of every family: pure functions over token rows, driven by a ModelSpec.

Each function may be called on any contiguous slice of a pass's token rows, with the weights of its own module under
their packed names. One layer is, with the norms that ``spec.norms`` names (an absent norm is the identity):

    branch  = attention_branch_norm(output(attend(qkv(attention_norm(hidden)))))
    hidden  = residual_norm(hidden + residual_scale * branch)
    hidden  = output_norm(hidden + residual_scale * mlp_branch_norm(down(act(up(mlp_norm(hidden))))))

In a sparse layer the MLP is the sum of the shared experts and, each by its weight, of those a token is sent to.
With ``spec.parallel_residual`` the MLP reads the hidden state from before the attention branch was added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flexrun.models import ops
from flexrun.models.rope import Rotary
from flexrun.models.spec import NO_ROPE, ModelSpec

LATENT_NORM_EPS = 1e-6  # of the norms of latents, whatever rms_norm_eps says (as DeepSeek's own code has it)

Weights = Mapping[str, Tensor]  # packed name -> tensor


def embed(spec: ModelSpec, weights: Weights, token_ids: Tensor, positions: Tensor) -> Tensor:
    """Embedding weights, token_ids [T] and positions [T] int64 -> hidden [T, hidden_size] in the model's dtype."""
    hidden = ops.embed_rows(weights["token_embedding.weight"], token_ids)
    if spec.embedding_scale != 1.0:
        hidden *= spec.embedding_scale
    if "project_in.weight" in weights:
        hidden = ops.linear(hidden, weights["project_in.weight"])
    if spec.learned_positions:
        hidden += ops.embed_rows(weights["position_embedding.weight"], positions + spec.position_offset)
    return hidden


def attention_inputs(
    spec: ModelSpec, layer: int, weights: Weights, hidden: Tensor, rotary: Rotary
) -> tuple[Tensor, ...]:
    """Attention weights, hidden [T, hidden_size] -> query [T, H, D], key and value [T, KV, D], normed and rotated.

    The three are views of one buffer: rows are ``spec.qkv_size`` elements apart. Of latent attention there are two:
    the query, and rows [T, 1, rank + rope] of normed latents with their rotated keys.
    """
    normed = _norm(spec, weights, "attention_norm", hidden)
    if spec.latent is not None:
        return _latent_inputs(spec, layer, weights, normed, rotary)
    qkv = ops.linear(normed, weights["qkv.weight"], weights.get("qkv.bias"))
    tokens = hidden.shape[0]
    heads = qkv.view(tokens, spec.num_heads + 2 * spec.num_kv_heads, spec.head_dim)
    query, key, value = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    if "query_norm" in spec.norms:
        if spec.query_key_norm_width == "head":
            _norm(spec, weights, "query_norm", query, out=query)
            _norm(spec, weights, "key_norm", key, out=key)
        else:
            flat_query, flat_key, _ = qkv.split((spec.query_size, spec.kv_size, spec.kv_size), dim=1)
            _norm(spec, weights, "query_norm", flat_query, out=flat_query)
            _norm(spec, weights, "key_norm", flat_key, out=flat_key)
    if spec.qkv_limit:
        qkv.clamp_(-spec.qkv_limit, spec.qkv_limit)
    kind = spec.layer_ropes[layer] if spec.ropes else NO_ROPE
    if kind != NO_ROPE:
        ops.apply_rope(heads[:, : spec.num_heads + spec.num_kv_heads], rotary.cos[kind], rotary.sin[kind])
    return query, key, value


def _latent_inputs(
    spec: ModelSpec, layer: int, weights: Weights, normed: Tensor, rotary: Rotary
) -> tuple[Tensor, Tensor]:
    latent, tokens = spec.latent, normed.shape[0]
    if latent.q_lora_rank:
        inner = ops.linear(normed, weights["q_a.weight"], weights.get("q_a.bias"))
        inner = ops.rms_norm(inner, weights["q_a_norm.weight"], LATENT_NORM_EPS, out=inner)
        query = ops.linear(inner, weights["q_b.weight"])
    else:
        query = ops.linear(normed, weights["q.weight"])
    query = query.view(tokens, spec.num_heads, spec.head_dim)
    rows = ops.linear(normed, weights["kv_a.weight"], weights.get("kv_a.bias")).unsqueeze(1)
    content, shared_key = rows[..., : latent.kv_lora_rank], rows[..., latent.kv_lora_rank :]
    ops.rms_norm(content, weights["kv_a_norm.weight"], LATENT_NORM_EPS, out=content)
    kind = spec.layer_ropes[layer]
    for rotated in (query[..., latent.nope_head_dim :], shared_key):
        ops.apply_rope(rotated, rotary.cos[kind], rotary.sin[kind])
    return query, rows


def attention_output(spec: ModelSpec, layer: int, weights: Weights, attended: Tensor) -> Tensor:
    """Attention weights, attended [T, H, attended_head_dim] -> the attention branch [T, hidden_size], not yet added."""
    flat = attended.reshape(attended.shape[0], spec.attended_size)
    branch = ops.linear(flat, weights["output.weight"], weights.get("output.bias"))
    return _norm(spec, weights, "attention_branch_norm", branch, out=branch)


def mlp(spec: ModelSpec, layer: int, weights: Weights, hidden: Tensor, branch: Tensor) -> None:
    """MLP weights; adds the attention branch and the MLP branch to hidden [T, hidden_size] in place.

    ``branch`` is what attention_output returned for the same rows.
    """
    if spec.parallel_residual:
        inner = _mlp_branch(spec, weights, _norm(spec, weights, "mlp_norm", hidden))
        ops.add(hidden, ops.add(inner, branch), spec.residual_scale)
    else:
        if "residual_norm" in spec.norms:
            ops.add(hidden, branch, spec.residual_scale)
            _norm(spec, weights, "residual_norm", hidden, out=hidden)
            normed = _norm(spec, weights, "mlp_norm", hidden)
        else:
            normed = _add_norm(spec, weights, "mlp_norm", hidden, branch)
        ops.add(hidden, _mlp_branch(spec, weights, normed), spec.residual_scale)
    _norm(spec, weights, "output_norm", hidden, out=hidden)


def sparse_mlp(
    spec: ModelSpec, layer: int, weights: Weights, hidden: Tensor, branch: Tensor, normed: Tensor, routed: Tensor
) -> Tensor:
    """MLP weights of a sparse layer -> the router's logits [T, num_experts], of which experts are chosen.

    Adds the attention branch to hidden [T, hidden_size] in place. normed: filled with what the experts work on, in the
    model's dtype; routed: float32, filled with what the shared experts make of it (zeros where there are none), for the
    chosen ones to add to. When all have, add_routed ends the layer.
    """
    ops.add(hidden, branch, spec.residual_scale)
    _norm(spec, weights, "mlp_norm", hidden, out=normed)
    if spec.experts.shared_intermediate_size:
        shared = _gated(spec, weights, normed, "shared_")
        if "shared_router.weight" in weights:
            gate = ops.linear(normed, weights["shared_router.weight"]).float().sigmoid_()
            torch.mul(shared, gate, out=routed)
        else:
            routed.copy_(shared)
    else:
        routed.zero_()
    rows, weight, bias = normed, weights["router.weight"], weights.get("router.bias")
    if spec.experts.routing.float32_logits:
        rows, weight = rows.float(), weight.float()
    return ops.linear(rows, weight, bias)


def add_routed(spec: ModelSpec, hidden: Tensor, routed: Tensor) -> None:
    """hidden [T, hidden_size] += what all experts made of it (float32, see sparse_mlp), in place."""
    ops.add(hidden, routed, spec.residual_scale)


def logits(spec: ModelSpec, weights: Weights, hidden: Tensor) -> Tensor:
    """Head weights, hidden [N, hidden_size] -> float32 logits [N, vocab_size]; ``hidden`` is left as it is.

    ``weights["lm_head.weight"]`` is needed for tied heads too: pass the token embedding.
    """
    hidden = _norm(spec, weights, "final_norm", hidden)
    if "project_out.weight" in weights:
        hidden = ops.linear(hidden, weights["project_out.weight"])
    scores = ops.linear(hidden, weights["lm_head.weight"], weights.get("lm_head.bias")).float()
    if spec.logits_divisor != 1.0:
        scores /= spec.logits_divisor
    if spec.logits_softcap:
        ops.soft_cap(scores, spec.logits_softcap)
    return scores


def _mlp_branch(spec: ModelSpec, weights: Weights, normed: Tensor) -> Tensor:
    if spec.gated:
        branch = _gated(spec, weights, normed, "")
    else:
        inner = ops.activation(ops.linear(normed, weights["up.weight"], weights.get("up.bias")), spec.activation)
        branch = ops.linear(inner, weights["down.weight"], weights.get("down.bias"))
    return _norm(spec, weights, "mlp_branch_norm", branch, out=branch)


def _gated(spec: ModelSpec, weights: Weights, normed: Tensor, prefix: str) -> Tensor:
    gate_up = ops.linear(normed, weights[f"{prefix}gate_up.weight"], weights.get(f"{prefix}gate_up.bias"))
    inner = ops.gated_activation(gate_up, spec.activation)
    return ops.linear(inner, weights[f"{prefix}down.weight"], weights.get(f"{prefix}down.bias"))


def _norm(spec: ModelSpec, weights: Weights, stem: str, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The norm named ``stem`` over the last dimension, or x itself where the family has none there."""
    if stem not in spec.norms:
        return x
    weight = weights.get(f"{stem}.weight")
    if spec.norm_kind == "rms":
        return ops.rms_norm(x, weight, spec.norm_eps, spec.norm_offset, out)
    return ops.layer_norm(x, weight, weights.get(f"{stem}.bias"), spec.norm_eps, out)


def _add_norm(spec: ModelSpec, weights: Weights, stem: str, hidden: Tensor, branch: Tensor) -> Tensor:
    """hidden += residual_scale * branch in place, then the norm named ``stem`` of the sum."""
    if stem not in spec.norms:
        return ops.add(hidden, branch, spec.residual_scale)
    weight, scale = weights.get(f"{stem}.weight"), spec.residual_scale
    if spec.norm_kind == "rms":
        return ops.add_rms_norm(hidden, branch, weight, spec.norm_eps, spec.norm_offset, scale)
    return ops.add_layer_norm(hidden, branch, weight, weights.get(f"{stem}.bias"), spec.norm_eps, scale)
