"""A planned pass is the pass that the batcher will run: the same tokens in the same micro-batches."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable

import numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from planned_models import planned

from flexrun.config import Placement, Policy
from flexrun.core import Lane, Tier
from flexrun.offload.batcher import Batcher
from flexrun.offload.kv_store import KVStore, Region
from flexrun.offload.sequence import Group, Sequence
from flexrun.offload.tiers import MemoryTier
from flexrun.outputs import Request
from flexrun.placement import KVMicroBatch, kv_format, kv_micro_batches, micro_batch_sequences, room_of_groups
from flexrun.policy.passes import ABOVE, COLUMNS, job_passes
from flexrun.prefixes import NONE, Prefixes
from flexrun.sampling import SamplingParams
from flexrun.steps import PassShape
from flexrun.workload import Workload

SMALL = planned("llama", hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)


class GapCounter(KVStore):
    """Tells when a gap in a slab changed where, or whether, a sequence was admitted."""

    gaps = 0

    def allocate(self, tokens: int, max_sequences: int) -> Region | None:
        tokens = tokens if self.form is None else room_of_groups(tokens)
        enough = [
            (count, -space.free_tokens, index)
            for index, (count, space) in enumerate(zip(self.sequences, self._spaces))
            if count < max_sequences and space.free_tokens >= tokens and not self.micro_batches[index].shared
        ]
        region = super().allocate(tokens, max_sequences)
        if (region.micro_batch if region else None) != (min(enough)[2] if enough else None):
            self.gaps += 1
        return region

    def allocate_prefix(self, tokens: int) -> int | None:
        start = super().allocate_prefix(tokens)
        self.gaps += start is None and self._spaces[0].free_tokens >= tokens
        return start


def run_batcher(
    policy: Policy,
    places: tuple[KVMicroBatch, ...],
    asked: list[tuple[int, int, int]],
    prefixes: Prefixes | None = None,
    prefix: Iterable[int] = (),
) -> tuple[list[PassShape], int]:
    """The shapes of a whole job, and the pass before which no gap had mattered yet.

    asked: of each sequence the tokens of its prompt, how many it generates, and how many of its prompt are scored.
    """
    tiers, sequences = (MemoryTier(Tier.CPU, None), MemoryTier(Tier.GPU, None)), micro_batch_sequences(policy)
    store = GapCounter(SMALL, places, *tiers, max_sequences=sequences, form=kv_format(SMALL, policy))
    batcher = Batcher(policy, store)
    groups = []
    for row, ((prompt, limit, scored), shared) in enumerate(
        zip(asked, itertools.chain(prefix, itertools.repeat(NONE)))
    ):
        params = SamplingParams(temperature=1.0, max_tokens=limit, prompt_logprobs=0)
        ids = numpy.zeros(prompt, dtype=numpy.int64)
        start = prompt - scored if scored else None
        group = Group(
            Request(str(row), params=params), params, ids, None, frozenset(), limit, unfinished=1, score_start=start
        )
        if shared != NONE:
            group.prefix, group.prefix_tokens = shared, int(prefixes.depths[shared])
        groups.append((group, [Sequence(group, 0, 0, None)]))
    batcher.feed(iter(groups), prefixes)
    shapes, exact = [], None
    while (plan := batcher.next_pass()) is not None:
        if store.gaps and exact is None:
            exact = len(shapes)
        shapes.append(plan.shape)
        assert len(plan.logits_rows) == plan.shape.logits_rows == len(plan.sampled) + len(plan.scored)
        for sequence in [*plan.ended, *(each for each in plan.sampled if each.append(7, None, None, None))]:
            batcher.retire(sequence)
    assert batcher.in_flight == 0
    shapes[-1] = dataclasses.replace(shapes[-1], more=False)  # it does not look whether its source has more
    return shapes, len(shapes) if exact is None else exact


def whole(shape: PassShape) -> PassShape:
    """The same without what it says about KV that is split by token."""
    nothing = dict.fromkeys(COLUMNS[ABOVE], 0)
    return dataclasses.replace(
        shape, micro_batches=tuple(dataclasses.replace(part, **nothing) for part in shape.micro_batches)
    )


@st.composite
def policies(draw, on_device: bool) -> Policy:
    gpu = draw(st.sampled_from([0.0, 0.5, 1.0])) if on_device else 0.0
    return Policy(
        sequences_in_flight=draw(st.integers(1, 9)),
        tokens_per_pass=draw(st.integers(1, 60)),
        attention_micro_batch=draw(st.integers(1, 5)),
        token_micro_batch=draw(st.integers(1, 8)),
        hidden=draw(st.sampled_from([Placement(1.0, 0.0), Placement(0.25, 0.75), Placement(0.0, 1.0)])),
        kv=Placement(gpu, 1 - gpu, 0.0),
        cpu_attention_share=draw(st.sampled_from([0.0, 0.5, 1.0])),
        kv_device_tokens_share=draw(st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0])) if on_device else 0.0,
    )


generating = st.tuples(st.integers(1, 40), st.integers(1, 12), st.just(0))
scoring = st.tuples(st.integers(2, 40), st.sampled_from([0, 0, 3]), st.integers(1, 40)).map(
    lambda row: (*row[:2], min(row[2], row[0] - 1))
)
rows = st.lists(generating, min_size=1, max_size=25) | st.lists(generating | scoring, min_size=1, max_size=25)


def as_workload(asked: list[tuple[int, int, int]]) -> Workload:
    return Workload.of(*zip(*asked))


@settings(deadline=None, derandomize=True, max_examples=120)
@given(st.booleans().flatmap(lambda on: st.tuples(st.just(on), policies(on))), rows, st.integers(0, 150))
def test_a_planned_job_has_the_passes_of_the_batcher(drawn, lengths, spare):
    (on_device, policy), workload = drawn, as_workload(lengths)
    count = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    places = kv_micro_batches(policy, count * workload.longest_tokens + spare, on_device=on_device)
    real, exact = run_batcher(policy, places, lengths)
    planned_passes = list(job_passes(workload, policy, places))
    if policy.kv_device_tokens_share in (0.0, 1.0):
        assert planned_passes[:exact] == real[:exact]
    assert [whole(shape) for shape in planned_passes[:exact]] == [whole(shape) for shape in real[:exact]]
    for told, found in zip(planned_passes[:exact], real[:exact]):
        for ours, theirs in zip(told.micro_batches, found.micro_batches):  # borders are one token off at most
            assert abs(ours.above_kv_tokens - theirs.above_kv_tokens) <= policy.attention_micro_batch
            assert abs(ours.above_new_tokens - theirs.above_new_tokens) <= policy.attention_micro_batch
            assert abs(ours.above_decode_kv_tokens - theirs.above_decode_kv_tokens) <= policy.attention_micro_batch
            assert abs(ours.above_decode_tokens - theirs.above_decode_tokens) <= policy.attention_micro_batch
            assert abs(ours.above_pairs - theirs.above_pairs) <= theirs.query_tokens
    for passes in (real, planned_passes):
        decoded = sum(part.decode_tokens for shape in passes for part in shape.micro_batches)
        assert sum(shape.tokens for shape in passes) == int(workload.kv_tokens.sum())
        assert sum(shape.logits_rows for shape in passes) == int((workload.max_tokens + workload.scored_tokens).sum())
        assert decoded >= int((workload.max_tokens - 1).sum())
        assert [shape.more for shape in passes] == [True] * (len(passes) - 1) + [False]


@settings(deadline=None, derandomize=True, max_examples=40)
@given(policies(False), st.integers(1, 40), st.integers(1, 30), st.integers(1, 8))
def test_rows_of_one_length_leave_no_gaps_so_every_pass_is_exact(policy, count, prompt_tokens, max_tokens):
    workload = Workload.uniform(count, prompt_tokens, max_tokens)
    places = kv_micro_batches(policy, policy.sequences_in_flight * workload.longest_tokens, on_device=False)
    real, exact = run_batcher(policy, places, [(prompt_tokens, max_tokens, 0)] * count)
    assert exact == len(real)
    assert list(job_passes(workload, policy, places)) == real


@settings(deadline=None, derandomize=True, max_examples=25)
@given(
    policies(True), st.lists(st.tuples(st.integers(1, 200), st.integers(1, 90), st.just(0)), min_size=1, max_size=12)
)
def test_groups_of_a_compressed_cache_are_those_of_the_batcher(policy, lengths):
    whole = Placement(1.0, 0.0)
    policy = dataclasses.replace(
        policy, kv_bits=4, kv_device_tokens_share=0.0, hidden=whole, tokens_per_pass=4 * policy.tokens_per_pass
    )
    workload = as_workload(lengths)
    count = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    places = kv_micro_batches(policy, count * (workload.longest_tokens + 100), on_device=True)
    real, exact = run_batcher(policy, places, lengths)
    assert list(job_passes(workload, policy, places))[:exact] == real[:exact]
    completed = sum(part.new_groups for shape in real for part in shape.micro_batches)
    assert completed == sum((prompt + generated - 1) // 64 for prompt, generated, _ in lengths)


def test_a_pass_counts_what_attention_must_read():
    """Two prompts of 3 and 5 tokens and a pass of 6: the second is cut, and goes on beside the first's decoding."""
    policy = Policy(sequences_in_flight=2, tokens_per_pass=6, attention_micro_batch=2)
    places = (KVMicroBatch(Tier.CPU, 40, Lane.CPU),)
    first, second, third = itertools.islice(job_passes(Workload.of([3, 5], [3, 2]), policy, places), 3)
    (part,) = first.micro_batches
    assert (first.tokens, first.logits_rows, part.query_tokens, part.kv_tokens) == (6, 1, 6, 6)
    assert (part.query_kv_pairs, part.decode_tokens) == (1 + 2 + 3 + 1 + 2 + 3, 0)
    (part,) = second.micro_batches  # 1 token over 4 cached, 2 more of the prompt over 4 and 5
    assert (second.tokens, second.logits_rows, part.kv_tokens) == (3, 2, 4 + 5)
    assert (part.query_kv_pairs, part.decode_tokens, part.decode_kv_tokens) == (4 + 4 + 5, 1, 4)
    (part,) = third.micro_batches
    assert (third.tokens, part.decode_tokens, part.decode_kv_tokens, third.more) == (2, 2, 5 + 6, False)


def test_rows_that_no_slab_holds_are_left_out():
    policy = Policy(sequences_in_flight=4, tokens_per_pass=50, attention_micro_batch=2)
    places = kv_micro_batches(policy, 40, on_device=False)
    passes = list(job_passes(Workload.of([10, 21, 10], [1, 1, 1]), policy, places))
    assert [(shape.tokens, shape.logits_rows, shape.more) for shape in passes] == [(20, 2, False)]
    assert list(job_passes(Workload.of([21], [1]), policy, places)) == []


@st.composite
def forests(draw) -> Prefixes:
    """Prefixes of any tokens; only their lengths count here."""
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    parents = [draw(st.integers(NONE, number - 1)) for number in range(len(lengths))]
    tokens = [numpy.zeros(length, dtype=numpy.int32) for length in lengths]
    return Prefixes(numpy.array(parents), numpy.array(lengths), tokens, numpy.ones(len(lengths), dtype=numpy.int64))


@settings(deadline=None, derandomize=True, max_examples=40)
@given(policies(False), forests(), rows, st.data())
def test_so_have_jobs_that_share_prefixes(policy, prefixes, own, data):
    policy = dataclasses.replace(policy, hidden=Placement(1.0, 0.0))
    prefix = [data.draw(st.integers(NONE, len(prefixes) - 1)) for _ in own]
    order = prefixes.order(prefix).tolist()
    prefix = [prefix[row] for row in order]
    asked = [(own[row][0] + int(prefixes.depths[prefix[at]]), *own[row][1:]) for at, row in enumerate(order)]
    workload = as_workload(asked).sharing(prefixes, prefix)
    count = -(-policy.sequences_in_flight // policy.attention_micro_batch)
    room, prefix_tokens = count * workload.longest_tokens, workload.prefix_tokens_of(policy.sequences_in_flight)
    places = kv_micro_batches(policy, room, on_device=False, prefix_tokens=prefix_tokens)
    real, exact = run_batcher(policy, places, asked, prefixes, prefix)
    told = list(job_passes(workload, policy, places))
    for ours, theirs in zip(told[:exact], real[:exact]):
        for part, other in zip(ours.micro_batches, theirs.micro_batches, strict=True):
            # neighbours of one prefix are counted once, and which rows are neighbours is not told
            assert bool(part.prefix_kv_tokens) == bool(other.prefix_kv_tokens)
            assert dataclasses.replace(part, prefix_kv_tokens=0) == dataclasses.replace(other, prefix_kv_tokens=0)
    if exact == len(real):
        assert len(told) == len(real)
        if not (workload.prefix_spans[1] >= 0).any() or prefix_tokens >= int(prefixes.lengths.sum()):
            assert sum(shape.tokens for shape in real) == workload.prefill_tokens + int((workload.max_tokens - 1).sum())
