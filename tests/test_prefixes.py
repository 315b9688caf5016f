"""Shared prefixes are those of a job's prompts, chosen where they pay, in an order that keeps sharers together."""

from __future__ import annotations

import itertools

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexrun.prefixes import LEAST_TOKENS, NONE, PrefixTree
from flexrun.workload import Workload


def run_of(name: int, tokens: int) -> list[int]:
    """Tokens of its own for each name."""
    return [1000 * name + place for place in range(tokens)]


def found(prompts, rows=None, tree=None):
    tree = tree or PrefixTree()
    nodes = [tree.add(prompt, count) for prompt, count in zip(prompts, rows or itertools.repeat(1))]
    prefixes, of_node = tree.chosen()
    return prefixes, of_node[nodes]


def test_a_common_header_is_one_prefix():
    header = run_of(1, 40)
    prefixes, prefix = found([header + run_of(name, 20) for name in range(2, 8)])
    assert prefixes.lengths.tolist() == [40] and prefixes.parents.tolist() == [NONE]
    assert prefixes.tokens[0].tolist() == header and prefixes.rows.tolist() == [6]
    assert prefix.tolist() == [0] * 6


def test_prefixes_nest_and_the_choices_of_a_prompt_share_all_of_it():
    system, shots = run_of(1, 150), [run_of(2, 80), run_of(3, 80)]
    prompts = [system + shot + run_of(name, 20) for shot in shots for name in range(4, 8)]
    prefixes, prefix = found(prompts, [3] * len(prompts))
    lengths = [sum(prefixes.lengths[link] for link in prefixes.chain(each)) for each in prefix]
    assert lengths == [250] * 8  # three choices of each
    assert [len(prefixes.chain(each)) for each in prefix] == [3] * 8
    assert sorted(prefixes.lengths.tolist()) == [20] * 8 + [80, 80, 150]
    assert prefixes.rows[0] == 24


def test_what_is_too_short_belongs_to_what_follows_it():
    few = run_of(9, LEAST_TOKENS - 1)
    prompts = [few + run_of(group, 40) + run_of(name, 30) for group in (1, 2) for name in range(3, 8)]
    prefixes, prefix = found(prompts)
    assert prefixes.parents.tolist() == [NONE, NONE]
    assert prefixes.lengths.tolist() == [len(few) + 40] * 2
    assert all(prefixes.tokens[number][: len(few)].tolist() == few for number in (0, 1))
    assert prefix.tolist() == [0] * 5 + [1] * 5


def test_sharing_that_does_not_pay_is_left_alone():
    # a split into two of LEAST_TOKENS, deep under each many rows: the attention in parts costs more than it spares
    prompts = [
        run_of(1, LEAST_TOKENS) + run_of(group, 60) + run_of(name, 20) for group in (2, 3) for name in range(4, 30)
    ]
    prefixes, _ = found(prompts)
    assert prefixes.lengths.tolist() == [LEAST_TOKENS + 60] * 2
    assert len(found([run_of(name, 50) for name in range(9)])[0]) == 0


def test_a_prefix_is_checked_against_the_prompt():
    prefixes, prefix = found([run_of(1, 40) + run_of(name, 9) for name in (2, 3)])
    prompt = numpy.array(run_of(1, 40) + run_of(2, 9))
    assert prefixes.begins(prefix[0], prompt) and prefixes.begins(NONE, prompt)
    assert not prefixes.begins(prefix[0], prompt[:40])  # a token must be left to run
    prompt[17] += 1
    assert not prefixes.begins(prefix[0], prompt)


def test_sharers_follow_each_other():
    system = run_of(1, 150)
    prompts = [system + run_of(2 + number % 2, 40) + run_of(4 + number, 20) for number in range(8)]
    prompts[5] = run_of(99, 70)
    prefixes, prefix = found(prompts)
    assert prefixes.order(prefix).tolist() == [0, 2, 4, 6, 1, 3, 7, 5]
    assert prefixes.order([NONE] * 4).tolist() == [0, 1, 2, 3]


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=24), st.booleans())
def test_every_prompt_begins_with_its_prefixes(words, forgets):
    """Against the definition: prompts of runs of 16 tokens, so that any of them may share."""
    prompts = [[token for word in prompt for token in run_of(word, 16)] for prompt in words]
    tree = PrefixTree(most_tokens=200, most_leaves=8) if forgets else PrefixTree()
    prefixes, prefix = found(prompts, tree=tree)
    for prompt, each in zip(prompts, prefix):
        assert prefixes.begins(each, numpy.array([*prompt, -1]))
    rows = [sum(number in prefixes.chain(each) for each in prefix) for number in range(len(prefixes))]
    assert rows == prefixes.rows.tolist() and min(rows, default=2) > 1
    order = prefixes.order(prefix)
    for number in range(len(prefixes)):
        places = [place for place, row in enumerate(order) if number in prefixes.chain(prefix[row])]
        assert places == list(range(places[0], places[-1] + 1))


def test_memory_is_bounded_and_the_common_header_found_all_the_same():
    tree = PrefixTree(most_tokens=4000, most_leaves=50)
    header = run_of(1, 64)
    nodes = [tree.add(header + run_of(name, 40)) for name in range(2, 1000)]
    assert tree._used <= 4000 and len(tree._children) <= 52
    prefixes, of_node = tree.chosen()
    assert prefixes.lengths.tolist() == [64] and prefixes.rows.tolist() == [998]
    assert (of_node[nodes] == 0).all()


def test_a_workload_counts_what_is_shared_once():
    header, other = run_of(1, 40), run_of(2, 30)
    prompts = [(header if number < 4 else other) + run_of(3 + number, 10) for number in range(7)] + [run_of(50, 20)]
    prefixes, prefix = found(prompts)
    jobs = Workload.of([len(prompt) for prompt in prompts], [5] * 8).sharing(prefixes, prefix)
    assert jobs.shares and jobs.kv_tokens.tolist() == [14] * 7 + [24]
    assert jobs.prefill_tokens == 40 + 30 + 7 * 10 + 20
    assert [jobs.prefix_tokens_of(sequences) for sequences in (1, 2, 5)] == [40, 70, 70]
    assert jobs.rows(numpy.array([0, 1, 7])).prefill_tokens == 40 + 2 * 10 + 20
    assert not jobs.apart().shares and jobs.apart().prefill_tokens == sum(map(len, prompts))
    assert jobs.own().prompt_tokens.tolist() == [10] * 7 + [20]


@pytest.mark.parametrize("rows", [1, 5])
def test_a_workload_without_prefixes_needs_no_room_for_them(rows):
    jobs = Workload.uniform(rows, 30, 4)
    assert not jobs.shares and jobs.prefix_tokens_of(3) == 0 and jobs.prefill_tokens == 30 * rows


def test_prefixes_of_whole_units_end_where_units_do():
    """Of 100 shared tokens 64; of 60 more, in two of three, what there is up to 128."""
    tree, draw = PrefixTree(unit=64), numpy.random.default_rng(0)
    header, more, *tails = (draw.integers(0, 1000, count) for count in (100, 60, 30, 20, 40, 7, 50))
    asked = [
        numpy.concatenate(parts)
        for parts in (*[(header, tail) for tail in tails[:2]], *[(header, more, tail) for tail in tails[2:]])
    ]
    nodes = [tree.add(ids) for ids in asked]
    prefixes, of_node = tree.chosen()
    assert prefixes.lengths.tolist() == [64, 64] and prefixes.parents.tolist() == [NONE, 0]
    assert of_node[nodes].tolist() == [0, 0, 1, 1, 1]
    assert all(prefixes.begins(prefix, ids) for prefix, ids in zip(of_node[nodes].tolist(), asked))
