"""Routed experts against a loop over tokens, one by one, in float32."""

from __future__ import annotations

import pytest
import torch

from flexrun.models import ops
from flexrun.models.families import spec_from_config
from flexrun.moe import ExpertBuffers, assign, experts, route, run_experts

NUM_EXPERTS, TOKENS, HIDDEN, INNER = 5, 41, 64, 96
CONFIG = {
    "vocab_size": 11,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": INNER,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "num_local_experts": NUM_EXPERTS,
}


def spec_of(family: str, dtype: str = "float32"):
    return spec_from_config({**CONFIG, "model_type": family}, dtype)


def weights_of(spec, gap: int = 128) -> dict[str, torch.Tensor]:
    """The experts of a layer in one buffer, one after another, with ``gap`` elements after each matrix."""
    generator = torch.Generator().manual_seed(1)
    buffer = (torch.randn(NUM_EXPERTS * 4 * (INNER * HIDDEN + gap), generator=generator) * 0.2).to(spec.torch_dtype)
    weights, offset = {}, 0
    for expert in range(NUM_EXPERTS):
        for name, rows, columns in (("gate_up", 2 * INNER, HIDDEN), ("down", HIDDEN, INNER)):
            stem = f"expert.{expert}.{name}."
            weights[stem + "weight"] = buffer[offset : offset + rows * columns].view(rows, columns)
            offset += rows * columns + gap
            if spec.mlp_bias:
                weights[stem + "bias"] = torch.randn(rows, generator=generator).to(spec.torch_dtype)
    return weights


def tokens_of(spec, favourite: int | None = None):
    """(normed rows, their assignment); with a favourite, all choose it and nobody the last two."""
    generator = torch.Generator().manual_seed(2)
    normed = torch.randn(TOKENS, HIDDEN, generator=generator).to(spec.torch_dtype)
    logits = torch.randn(TOKENS, NUM_EXPERTS, generator=generator)
    if favourite is not None:
        logits[:, favourite] = 9.0
        logits[:, -2:] = -9.0
    return normed, *route(spec.experts.routing, logits)


def reference(spec, weights, normed, chosen, token_weights) -> torch.Tensor:
    """Token by token, in float64."""
    result = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)

    def linear(x, stem):
        bias = weights.get(stem + ".bias")
        return torch.nn.functional.linear(
            x, weights[stem + ".weight"].double(), None if bias is None else bias.double()
        )

    for token in range(TOKENS):
        for expert, weight in zip(chosen[token].tolist(), token_weights[token].tolist()):
            gate, up = linear(normed[token].double(), f"expert.{expert}.gate_up").chunk(2)
            if spec.experts.gate_limit:
                gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
                inner = (up + 1) * gate * torch.sigmoid(1.702 * gate)
            else:
                inner = torch.nn.functional.silu(gate) * up
            result[token] += weight * linear(inner, f"expert.{expert}.down")
    return result


@torch.inference_mode()
@pytest.mark.parametrize("rows", [TOKENS, 9, 1])
@pytest.mark.parametrize("favourite", [None, 1])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_do_what_a_loop_over_tokens_does(family, favourite, rows):
    spec = spec_of(family)
    weights = weights_of(spec)
    normed, chosen, token_weights = tokens_of(spec, favourite)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    routed = torch.ones(TOKENS, HIDDEN)
    buffers = ExpertBuffers(spec, rows)
    for group in (range(0, 2), range(2, 3), range(3, 5)):
        run_experts(spec, weights, group, assignment, normed, routed, buffers)
    torch.testing.assert_close(
        routed.double() - 1, reference(spec, weights, normed, chosen, token_weights), atol=2e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_experts_that_nobody_chose_need_no_weights():
    spec = spec_of("mixtral")
    weights = weights_of(spec)
    normed, chosen, token_weights = tokens_of(spec, favourite=0)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    assert assignment.counts[0] == TOKENS and assignment.counts[3:] == [0, 0]
    present = {name: tensor for name, tensor in weights.items() if int(name.split(".")[1]) < 3}
    routed = torch.zeros(TOKENS, HIDDEN)
    run_experts(spec, present, range(NUM_EXPERTS), assignment, normed, routed, ExpertBuffers(spec, TOKENS))
    torch.testing.assert_close(
        routed.double(), reference(spec, weights, normed, chosen, token_weights), atol=2e-4, rtol=1e-4
    )


@torch.inference_mode()
def test_which_experts_run_together_changes_no_bit():
    spec = spec_of("mixtral")
    weights, (normed, chosen, token_weights) = weights_of(spec), tokens_of(spec)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    sums = []
    for groups in ([range(5)], [range(0, 3), range(3, 5)], [[expert] for expert in range(5)]):
        routed = torch.zeros(TOKENS, HIDDEN)
        for group in groups:
            run_experts(spec, weights, group, assignment, normed, routed, ExpertBuffers(spec, TOKENS))
        sums.append(routed)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@torch.inference_mode()
@pytest.mark.skipif(not experts.CAN_GROUP, reason="this torch has no grouped_mm")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_grouped_products_are_those_of_single_experts(family):
    """The way of a GPU, over this machine's grouped_mm."""
    spec = spec_of(family, "bfloat16")
    weights = weights_of(spec)
    normed, chosen, token_weights = tokens_of(spec)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    single, grouped = torch.zeros(2, TOKENS, HIDDEN)
    buffers = ExpertBuffers(spec, 2 * TOKENS)
    run_experts(spec, weights, range(NUM_EXPERTS), assignment, normed, single, buffers)
    runs = experts._runs_in_one_buffer(weights, list(range(NUM_EXPERTS)), assignment, 2 * TOKENS)
    assert runs == [list(range(NUM_EXPERTS))]
    experts._run_group(spec, weights, runs[0], assignment, normed, grouped, buffers)
    torch.testing.assert_close(grouped, single, atol=0.15, rtol=0.02)  # biases are added after rounding


def test_runs_end_where_buffers_or_rows_do():
    spec = spec_of("mixtral", "bfloat16")
    weights = weights_of(spec)
    _, chosen, token_weights = tokens_of(spec)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    counts = assignment.counts
    together = experts._runs_in_one_buffer(weights, [0, 1, 2, 3, 4], assignment, counts[0] + counts[1])
    assert together[0] == [0, 1] and [expert for run in together for expert in run] == [0, 1, 2, 3, 4]
    apart = {**weights, "expert.2.gate_up.weight": weights["expert.2.gate_up.weight"].clone()}
    assert experts._runs_in_one_buffer(apart, [0, 1, 2, 3, 4], assignment, 999) == [[0, 1], [2], [3, 4]]
    assert experts._runs_in_one_buffer(weights, [0, 2, 4], assignment, 999) == [[0, 2, 4]]
    assert experts._runs_in_one_buffer(weights, [0, 1, 3], assignment, 999) == [[0, 1], [3]]
    odd = weights_of(spec, gap=3)
    assert experts._runs_in_one_buffer(odd, [0, 1], assignment, 999) == [[0], [1]]


@torch.inference_mode()
@pytest.mark.skipif(not ops.can_pack(torch.bfloat16), reason="this CPU packs no bfloat16 matrices")
def test_packed_matrices_give_the_same():
    spec = spec_of("mixtral", "bfloat16")
    weights = weights_of(spec)
    normed, chosen, token_weights = tokens_of(spec)
    assignment = assign(chosen, token_weights, NUM_EXPERTS)
    plain, packed = torch.zeros(2, TOKENS, HIDDEN)
    buffers = ExpertBuffers(spec, 16)
    run_experts(spec, weights, range(NUM_EXPERTS), assignment, normed, plain, buffers)
    blocked = {name: ops.pack_matrix(weight.clone()) for name, weight in weights.items()}
    run_experts(spec, blocked, range(NUM_EXPERTS), assignment, normed, packed, buffers)
    torch.testing.assert_close(packed, plain, atol=0.05, rtol=0.02)
