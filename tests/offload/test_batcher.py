"""Every pass is as full as it may be, and each row knows its token, position and cache row."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.config import Policy
from flexrun.core import Tier
from flexrun.errors import RequestError
from flexrun.offload.batcher import Batcher
from flexrun.offload.kv_store import KVStore
from flexrun.offload.sequence import Group, Sequence
from flexrun.offload.tiers import MemoryTier
from flexrun.placement import kv_micro_batches


@pytest.fixture(scope="session")
def make_batcher(packed):
    """make_batcher(kv_tokens, **policy) -> Batcher over a real KV store on the host."""
    spec, _ = packed("llama")

    def make(kv_tokens: int = 1000, **settings) -> Batcher:
        policy = Policy(**{"sequences_in_flight": 4, "attention_micro_batch": 2, "tokens_per_pass": 10, **settings})
        places = kv_micro_batches(policy, kv_tokens, on_device=False)
        return Batcher(policy, KVStore(spec, places, MemoryTier(Tier.CPU, None), None))

    return make


def chunks(plan) -> list[tuple[int, int, int]]:
    """(micro-batch, query_len, kv_len) of each segment, in row order."""
    return [
        (batch.index, int(query), int(kv))
        for batch in plan.micro_batches
        for query, kv in zip(batch.segments.query_len, batch.segments.kv_len, strict=True)
    ]


def finish(batcher: Batcher, plan, token: int = 30) -> list[Sequence]:
    """Give every sampled sequence a token; those that end are retired."""
    ended = [sequence for sequence in plan.sampled if sequence.append(token, None, None, None)]
    for sequence in ended:
        batcher.retire(sequence)
    return ended


def test_long_prompts_prefill_in_chunks(make_batcher, make_group):
    batcher = make_batcher()
    batcher.feed(iter([make_group(range(23), max_tokens=2)]))
    plans = []
    while (plan := batcher.next_pass()) is not None:
        plans.append((chunks(plan), plan.prefill_tokens, plan.decode_tokens, len(plan.sampled), plan.shape.more))
        finish(batcher, plan)
    assert plans == [
        ([(0, 10, 10)], 10, 0, 0, True),
        ([(0, 10, 20)], 10, 0, 0, True),
        ([(0, 3, 23)], 3, 0, 1, True),
        ([(0, 1, 24)], 0, 1, 1, False),
    ]


def test_decoding_sequences_go_first_and_prompts_fill_the_rest(make_batcher, make_group):
    batcher = make_batcher(attention_micro_batch=4)
    batcher.feed(iter([make_group(range(4), max_tokens=9), make_group(range(20), max_tokens=9)]))
    first = batcher.next_pass()
    assert chunks(first) == [(0, 4, 4), (0, 6, 6)]
    finish(batcher, first)
    second = batcher.next_pass()
    assert chunks(second) == [(0, 1, 5), (0, 9, 15)]
    assert (second.decode_tokens, second.prefill_tokens) == (1, 9)
    assert second.token_ids.tolist() == [30, *range(6, 15)]
    assert second.positions.tolist() == [4, *range(6, 15)]


def test_a_freed_slot_is_refilled_in_the_next_pass(make_batcher, make_group):
    batcher = make_batcher(sequences_in_flight=2, tokens_per_pass=100)
    batcher.feed(iter([make_group([number] * 5, max_tokens=1 + number) for number in range(4)]))
    lengths = []
    while (plan := batcher.next_pass()) is not None:
        lengths.append(plan.shape.tokens)
        assert batcher.in_flight == len(plan.sampled)
        finish(batcher, plan)
    # 0 ends at once; 2 enters beside 1's second token; 3 beside 2's second
    assert lengths == [10, 6, 6, 2, 1, 1]


def test_a_prompt_waits_for_cache_room(make_batcher, make_group):
    batcher = make_batcher(kv_tokens=20, attention_micro_batch=4, tokens_per_pass=100)
    batcher.feed(iter([make_group(range(12), max_tokens=1), make_group(range(9), max_tokens=1)]))
    first = batcher.next_pass()
    assert first.shape.tokens == 12
    assert first.shape.more
    finish(batcher, first)
    second = batcher.next_pass()
    assert second.shape.tokens == 9
    finish(batcher, second)
    assert batcher.next_pass() is None


def test_what_can_never_fit_is_an_error_not_a_hang(make_batcher, make_group):
    batcher = make_batcher(kv_tokens=8)
    batcher.feed(iter([make_group(range(9), max_tokens=1)]))
    with pytest.raises(RequestError, match="a sequence of 9 tokens fits no KV micro-batch"):
        batcher.next_pass()


def test_more_is_false_once_nothing_can_follow(make_batcher, make_group):
    batcher = make_batcher(tokens_per_pass=100)
    batcher.feed(iter([make_group(range(5), max_tokens=1), make_group(range(7), max_tokens=2)]))
    first = batcher.next_pass()
    assert first.shape.more, "the second goes on"
    finish(batcher, first)
    last = batcher.next_pass()
    assert not last.shape.more
    finish(batcher, last)
    assert batcher.next_pass() is None


def test_the_source_is_drawn_from_only_as_slots_free_up(make_batcher, make_group):
    drawn = itertools.count()
    batcher = make_batcher(tokens_per_pass=100)
    batcher.feed((make_group([3, 4], max_tokens=2), next(drawn))[0] for _ in itertools.count())
    finish(batcher, batcher.next_pass())
    assert next(drawn) == 4
    finish(batcher, batcher.next_pass())
    finish(batcher, batcher.next_pass())
    assert next(drawn) == 4 + 1 + 4
    batcher.abandon()


def test_abandoning_gives_all_room_back(make_batcher, make_group):
    batcher = make_batcher()
    batcher.feed(iter([make_group(range(9), max_tokens=5) for _ in range(9)]))
    batcher.next_pass()
    batcher.abandon()
    assert batcher.in_flight == 0
    assert batcher.next_pass() is None
    assert [space.free_tokens for space in batcher._kv._spaces] == [500, 500]


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.data())
def test_whatever_is_asked_every_pass_is_in_order(make_batcher, make_group, data):
    """Drives whole runs; each pass is compared with what is known of every sequence in it."""
    in_flight, micro_batch, per_pass = (data.draw(st.integers(1, top)) for top in (6, 4, 25))
    batcher = make_batcher(
        120, sequences_in_flight=in_flight, attention_micro_batch=micro_batch, tokens_per_pass=per_pass
    )
    longest = batcher._kv.largest_sequence_tokens
    asked = []
    for _ in range(data.draw(st.integers(1, 8))):
        prompt = data.draw(st.integers(1, min(30, longest)))
        asked.append((prompt, data.draw(st.integers(1, min(8, longest + 1 - prompt)))))
    groups: list[tuple[Group, list[Sequence]]] = [
        make_group(range(100 * number, 100 * number + prompt), max_tokens=tokens)
        for number, (prompt, tokens) in enumerate(asked)
    ]
    batcher.feed(iter(groups))
    cached = {id(sequence): 0 for _, (sequence,) in groups}
    more = True
    while (plan := batcher.next_pass()) is not None:
        assert more, "a pass follows one that said it was the last"
        more = plan.shape.more
        assert plan.shape.tokens == len(plan.token_ids) == plan.decode_tokens + plan.prefill_tokens
        assert 1 <= plan.shape.tokens <= per_pass
        assert batcher.in_flight <= in_flight
        row = 0
        running = {(s.region.micro_batch, s.region.start): s for s in batcher._running}
        sampled = {}
        indices = [batch.index for batch in plan.micro_batches]
        assert indices == sorted(set(indices))
        for batch, shape in zip(plan.micro_batches, plan.shape.micro_batches, strict=True):
            assert batch.start == row
            assert len(batch.segments) <= micro_batch
            pairs = 0
            for start, count, kv_start, kv_len in batch.segments.rows:
                assert start == row - batch.start
                sequence = running.pop((batch.index, kv_start))
                before = cached[id(sequence)]
                assert kv_len == before + count <= sequence.region.capacity
                known = [*sequence.group.prompt_ids.tolist(), *sequence.output_ids]
                rows = slice(row, row + count)
                assert plan.token_ids[rows].tolist() == known[before:kv_len]
                assert plan.positions[rows].tolist() == list(range(before, kv_len))
                own = batch.kv_rows[row - batch.start : row - batch.start + count]
                assert own.tolist() == list(range(kv_start + before, kv_start + kv_len))
                cached[id(sequence)] = kv_len
                row += count
                pairs += sum(range(before + 1, kv_len + 1))
                if kv_len == len(known):
                    sampled[row - 1] = sequence
            assert batch.stop == row
            assert (shape.query_tokens, shape.query_kv_pairs) == (batch.stop - batch.start, pairs)
            assert shape.kv_tokens == int(batch.segments.kv_len.sum())
        assert dict(zip(plan.logits_rows.tolist(), plan.sampled, strict=True)) == sampled
        if running:
            assert plan.shape.tokens == per_pass, "a sequence waits although the pass has room"
        finish(batcher, plan)
    assert not any(group.unfinished for group, _ in groups)
    assert [len(group.done[0].token_ids) for group, _ in groups] == [tokens for _, tokens in asked]
    assert batcher.in_flight == 0
