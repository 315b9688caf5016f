"""Tokens in the order of their experts, and back: nothing lost, nothing twice, one order of addition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.moe import add_weighted, assign, chunks


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(1, 50), st.integers(1, 9), st.integers(0, 5), st.integers(0, 99))
def test_every_choice_is_there_once_and_rows_ascend(tokens, num_experts, per_token, seed):
    per_token = max(min(per_token, num_experts), 1)
    generator = torch.Generator().manual_seed(seed)
    experts = torch.rand(tokens, num_experts, generator=generator).topk(per_token).indices
    weights = torch.rand(tokens, per_token, generator=generator)
    found = assign(experts, weights, num_experts)
    assert found.starts[0] == 0 and found.starts[-1] == tokens * per_token
    assert found.counts == [(experts == expert).sum().item() for expert in range(num_experts)]
    seen = torch.zeros(tokens, num_experts)
    for expert in range(num_experts):
        part = slice(found.starts[expert], found.starts[expert + 1])
        rows = found.rows[part].tolist()
        assert rows == sorted(set(rows))
        assert len(rows) == found.count(expert)
        seen[rows, expert] = found.weights[part]
    assert torch.equal(seen, torch.zeros_like(seen).scatter_(1, experts, weights))


@pytest.mark.parametrize(
    ("start", "stop", "limit", "expected"),
    [
        (0, 0, 4, []),
        (3, 8, 0, [(3, 8)]),
        (3, 8, 5, [(3, 8)]),
        (3, 9, 5, [(3, 6), (6, 9)]),
        (0, 7, 3, [(0, 2), (2, 4), (4, 7)]),
    ],
)
def test_chunks_are_few_and_alike(start, stop, limit, expected):
    assert chunks(start, stop, limit) == expected


def test_results_are_weighed_and_added_in_float32():
    routed = torch.ones(4, 3)
    results = torch.full((2, 3), 1 / 3, dtype=torch.bfloat16)
    add_weighted(routed, torch.tensor([0, 2]), torch.tensor([3.0, 0.001]), results)
    third = torch.tensor(1 / 3, dtype=torch.bfloat16).item()
    expected = torch.ones(4, 3)
    expected[0] += 3 * third
    expected[2] += 0.001 * third
    torch.testing.assert_close(routed, expected, rtol=1e-7, atol=0)
