"""Requests without a model behind them: prompts of chosen lengths that end when the test says so."""

from __future__ import annotations

import numpy
import pytest

from flexrun.offload.sequence import Group, Sequence
from flexrun.outputs import Request
from flexrun.sampling import SamplingParams

EOS = 2


@pytest.fixture(scope="session")
def make_group():
    """make_group(prompt ids, decoder=None, stop_ids=..., **sampling) -> (Group, its sequences)."""
    count = 0

    def make(ids, decoder=None, stop_ids=frozenset({EOS}), **sampling):
        nonlocal count
        params = SamplingParams(**{"temperature": 1.0, **sampling})
        request = Request(f"request-{count}", token_ids=list(ids), params=params)
        count += 1
        prompt_ids = numpy.array(ids, dtype=numpy.int64)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else stop_ids)
        group = Group(request, params, prompt_ids, None, stops, params.max_tokens, unfinished=params.n)
        return group, [Sequence(group, choice, 0, decoder() if decoder else None) for choice in range(params.n)]

    return make
