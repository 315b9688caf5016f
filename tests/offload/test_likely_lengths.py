"""Lengths learnt from answers: what survives tells, not only what has ended."""

from __future__ import annotations

import random

import numpy
import pytest

from flexrun.offload.likely_lengths import LEAST_ANSWERS, MOST_ANSWERS, LikelyLengths


def learnt(lengths, ended=True):
    known = LikelyLengths()
    for tokens in lengths:
        known.add(tokens, ended)
    return known


def test_nothing_is_guessed_from_few_answers():
    assert learnt(range(LEAST_ANSWERS - 1)).likely([]) is None
    assert learnt([7] * LEAST_ANSWERS).likely([]) == 7


def test_of_answers_that_all_ended_it_is_the_quantile():
    lengths = list(range(1, 101))
    random.Random(1).shuffle(lengths)
    assert learnt(lengths).likely([]) == 90


def test_answers_that_were_cut_or_go_on_are_at_least_that_long():
    assert learnt([50] * 100, ended=False).likely([]) is None
    known = learnt([5] * 50)
    assert known.likely([]) == 5
    assert known.likely([40] * 50) is None  # half of all are longer, and nobody knows by how much
    known.add(60, True)
    assert known.likely([1] * 400) == 5  # those have only begun: they say nothing


def test_short_answers_that_end_first_do_not_fool_it():
    """Answers of 10 to 200 tokens, seen at the time when only those below 50 have ended."""
    draw = random.Random(2)
    lengths = [draw.randint(10, 200) for _ in range(300)]
    known = learnt([tokens for tokens in lengths if tokens < 50])
    assert known.likely([50] * sum(tokens >= 50 for tokens in lengths)) is None


@pytest.mark.parametrize("before, after", [(10, 90), (90, 10)])
def test_old_answers_are_forgotten(before, after):
    assert learnt([before] * 2000 + [after] * MOST_ANSWERS).likely([]) == after


def test_what_is_expected_is_the_mean_up_to_each_limit():
    limits = numpy.array([0, 1, 4, 10, 500])
    assert learnt([3] * 5).expected(limits).tolist() == limits.tolist()  # too few: the limits are all that is known
    assert learnt([3] * 50).expected(limits).tolist() == [0, 1, 3, 3, 3]
    assert learnt([2, 6] * 50).expected(limits) == pytest.approx([0, 1, 3, 4, 4])


def test_what_was_cut_or_goes_on_may_still_get_long():
    known = learnt([5] * 50)
    for _ in range(50):
        known.add(20, False)  # cut at their limit
    assert known.expected(numpy.array([20, 40])) == pytest.approx([12.5, 22.5])
    assert learnt([5] * 50).expected(numpy.array([40]), running=[8] * 50) == pytest.approx([22.5])
