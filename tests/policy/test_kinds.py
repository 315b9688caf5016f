"""A job's passes are summed up in a few kinds without losing tokens, cache or attention."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.config import Policy
from flexrun.core import Lane, Tier
from flexrun.placement import KVMicroBatch
from flexrun.policy.kinds import kind_of, pass_kinds
from flexrun.policy.passes import job_passes
from flexrun.steps import MicroBatchShape, PassShape
from flexrun.workload import Workload


def shape(*parts: tuple[int, int]) -> PassShape:
    """(query tokens, decode tokens) of each micro-batch."""
    micro_batches = tuple(
        MicroBatchShape(index, query, 3 * query, 2 * query, Tier.CPU, Lane.CPU, decode, 3 * decode)
        for index, (query, decode) in enumerate(parts)
    )
    return PassShape(0, sum(query for query, _ in parts), len(parts), micro_batches, True)


@pytest.mark.parametrize(
    "parts, kind",
    [
        ([(8, 8)], "decode"),
        ([(8, 8), (4, 4)], "decode"),
        ([(8, 8), (4, 0)], "mixed"),
        ([(10, 5)], "mixed"),
        ([(11, 5)], "prefill"),
        ([(100, 0), (3, 3)], "prefill"),
    ],
)
def test_a_pass_is_named_for_what_most_of_its_tokens_are(parts, kind):
    assert kind_of(shape(*parts)) == kind


def test_each_kind_is_the_mean_of_its_passes_and_counts_them():
    kinds = pass_kinds([shape((100, 0)), shape((8, 8), (4, 4)), shape((6, 6)), shape((120, 2), (60, 0))], times=2.5)
    decode, prefill = sorted(kinds, key=lambda kind: kind.shape.tokens)
    assert (prefill.count, decode.count) == (5.0, 5.0)
    assert (prefill.shape.tokens, decode.shape.tokens) == (140, 9)
    (whole,) = prefill.shape.micro_batches
    assert (whole.query_tokens, whole.kv_tokens, whole.query_kv_pairs) == (140, 420, 280)
    assert (whole.decode_tokens, whole.decode_kv_tokens) == (1, 3)
    (whole,) = decode.shape.micro_batches
    assert (whole.query_tokens, whole.decode_tokens) == (9, 9)
    assert decode.shape.logits_rows == 2  # of 2 and 1, rounded to even


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(4, 200),
)
def test_kinds_keep_the_totals_of_a_job(rows, sequences, tokens):
    job = Workload.of(*zip(*rows))
    policy = Policy(sequences_in_flight=sequences, tokens_per_pass=tokens, attention_micro_batch=sequences)
    passes = list(job_passes(job, policy, (KVMicroBatch(Tier.CPU, 10_000, Lane.CPU),)))
    kinds = pass_kinds(passes)
    assert 1 <= len(kinds) <= 3
    assert sum(kind.count for kind in kinds) == len(passes)
    near = len(passes) / 2  # each mean is rounded
    assert sum(kind.count * kind.shape.tokens for kind in kinds) == pytest.approx(job.kv_tokens.sum(), abs=near)
    told = sum(kind.count * kind.shape.micro_batches[0].query_kv_pairs for kind in kinds)
    assert told == pytest.approx(sum(part.query_kv_pairs for each in passes for part in each.micro_batches), abs=near)
    assert len({kind_of(kind.shape) for kind in kinds}) == len(kinds)


def test_no_pass_has_no_kind():
    assert pass_kinds([]) == []
