import dataclasses
from array import array

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from transformers import RepetitionPenaltyLogitsProcessor

from flexrun.errors import ExecutionError
from flexrun.sampling import SamplerRow, SamplingParams, sample, sampler
from flexrun.sampling.draw import draw

GREEDY = SamplingParams(temperature=0.0)


def random_logits(rows, vocab, seed=0, scale=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def kept_tokens(logits, params):
    """{token id: probability} after temperature, top_k, top_p, min_p: the definition, written as loops."""
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    order = sorted((token for token in range(len(scaled)) if scaled[token] > -np.inf), key=lambda t: (-scaled[t], t))
    if params.top_k > 0:
        order = order[: params.top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    probabilities = weights / weights.sum()
    nucleus, reached = [], 0.0
    for token, probability in zip(order, probabilities):
        if params.top_p < 1.0 and reached >= params.top_p:
            break
        nucleus.append((token, probability))
        reached += probability
    highest = nucleus[0][1]
    likely = {token: probability for token, probability in nucleus if probability >= params.min_p * highest}
    total = sum(likely.values())
    return {token: probability / total for token, probability in likely.items()}


def tokens(logits, rows):
    return sample(logits, rows).token_ids.tolist()


# Greedy


def test_greedy_is_argmax_and_leaves_logits_alone():
    logits = random_logits(5, 301)
    before = logits.clone()
    sampled = sample(logits, [SamplerRow(GREEDY)] * 5)
    assert torch.equal(sampled.token_ids, before.argmax(dim=-1)) and sampled.token_ids.dtype == torch.int64
    assert sampled.logprobs == [None] * 5 and sampled.top == [None] * 5
    assert torch.equal(logits, before)


def test_greedy_ties_go_to_the_lowest_id():
    logits = torch.zeros(2, 1000)
    logits[1, [17, 500, 999]] = 2.0
    assert tokens(logits, [SamplerRow(GREEDY)] * 2) == [0, 17]
    penalised = SamplerRow(SamplingParams(temperature=0, presence_penalty=1.0), output_ids=[17])
    assert tokens(logits, [SamplerRow(GREEDY), penalised]) == [0, 500]


def test_all_greedy_batch_takes_only_the_fast_path(monkeypatch):
    def refuse(*_):
        raise AssertionError("a plain greedy row reached the slow path")

    monkeypatch.setattr(sampler, "_sample_special", refuse)
    assert tokens(torch.eye(4), [SamplerRow(GREEDY, step=3, stop_ids=(2,))] * 4) == [0, 1, 2, 3]


def test_empty_batch():
    assert tokens(torch.zeros(0, 11), []) == []


# Distribution


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=1.7),
        SamplingParams(temperature=0.6, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, top_k=9, top_p=0.9, min_p=0.05),
    ],
    ids=lambda params: f"t{params.temperature}-k{params.top_k}-p{params.top_p}-m{params.min_p}",
)
def test_draws_follow_the_filtered_distribution(params):
    draws, vocab = 6000, 24
    logits = random_logits(1, vocab, seed=4, scale=1.5)
    rows = [SamplerRow(params, seed=99, choice_index=draw % 3, step=draw // 3) for draw in range(draws)]
    counts = np.bincount(sample(logits.expand(draws, -1), rows).token_ids.numpy(), minlength=vocab)
    expected = kept_tokens(logits[0], params)
    assert set(np.nonzero(counts)[0]) <= set(expected)
    likely = [token for token, probability in expected.items() if probability * draws >= 5]
    observed = [counts[token] for token in likely] + [draws - sum(counts[token] for token in likely)]
    wanted = [expected[token] * draws for token in likely]
    wanted.append(draws - sum(wanted))
    if wanted[-1] < 1e-6:
        observed.pop(), wanted.pop()
    assert len(wanted) > 2
    assert stats.chisquare(observed, wanted).pvalue > 1e-3


def test_each_coordinate_of_the_draw_changes_the_token():
    logits = torch.zeros(1, 4096)
    start = SamplerRow(SamplingParams(), seed=1, choice_index=0, step=0)
    changed = [dataclasses.replace(start, **{name: 2}) for name in ("seed", "choice_index", "step")]
    assert len(set(tokens(logits.expand(4, -1), [start, *changed]))) == 4


# Filters


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, -1, 1, 2, 7, 40, 10_000]),
    top_p=st.sampled_from([1e-6, 0.3, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    logprobs=st.sampled_from([None, 0, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    min_tokens=st.sampled_from([0, 3]),
)
ids_strategy = st.lists(st.integers(0, 60), max_size=9)
row_strategy = st.builds(
    SamplerRow,
    params=params_strategy,
    seed=st.integers(0, 2**64 - 1),
    choice_index=st.integers(0, 3),
    step=st.integers(0, 500),
    prompt_ids=ids_strategy,
    output_ids=ids_strategy,
    stop_ids=st.sampled_from([(), (1,), (4, 60)]),
)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rows=st.lists(row_strategy, min_size=1, max_size=9), seed=st.integers(0, 9), data=st.data())
def test_a_row_depends_on_nothing_but_itself(rows, seed, data):
    """Alone, in any order, in any company and in chunks of any size, a row gives the same token and logprobs."""
    logits = random_logits(len(rows), 61, seed).mul(4).round().div(4)  # coarse, so that equals are common
    together = sample(logits, rows)
    order = data.draw(st.permutations(range(len(rows))))[: data.draw(st.integers(1, len(rows)))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "HOST_SCRATCH_ELEMENTS", 61 * data.draw(st.integers(1, 4)))
        subset = sample(logits[order], [rows[row] for row in order])
    for place, row in enumerate(order):
        assert subset.token_ids[place] == together.token_ids[row]
        assert subset.logprobs[place] == together.logprobs[row]
        assert subset.top[place] == together.top[row]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 10, 37, 38, 39, 500]),
    top_p=st.sampled_from([0.05, 0.513, 0.917, 1.0]),
    min_p=st.sampled_from([0.0, 0.0313, 0.417, 1.0]),
    seed=st.integers(0, 50),
)
def test_filters_keep_exactly_what_the_definition_keeps(temperature, top_k, top_p, min_p, seed):
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    # Halves, so that equal logits are common; the odd shares above keep sums away from rounding boundaries.
    logits = random_logits(1, 38, seed).mul(2).round().div(2)
    expected = kept_tokens(logits[0], params)
    draws = 400
    rows = [SamplerRow(params, seed=seed, step=step) for step in range(draws)]
    drawn = tokens(logits.expand(draws, -1), rows)
    assert set(drawn) <= set(expected)
    certain = {token for token, probability in expected.items() if probability > 0.05}
    assert certain <= set(drawn)


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
def test_nucleus_of_a_wide_vocabulary(top_p):
    params = SamplingParams(top_p=top_p)
    logits = random_logits(3, 5000, seed=2, scale=1.0)
    for row in range(3):
        expected = kept_tokens(logits[row], params)
        steps = [SamplerRow(params, seed=row, step=step) for step in range(3000)]
        drawn = set(tokens(logits[row].expand(3000, -1), steps))
        assert drawn <= set(expected)
        assert len(drawn) > 0.2 * min(len(expected), 3000)


def test_top_k_one_and_tiny_top_p_equal_greedy_even_in_ties():
    logits = random_logits(40, 500, seed=3).round()
    greedy = tokens(logits, [SamplerRow(GREEDY)] * 40)
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(top_k=30, top_p=1e-9)):
        assert tokens(logits, [SamplerRow(params, seed=row) for row in range(40)]) == greedy
    cold = SamplingParams(temperature=1e-5)
    distinct = random_logits(40, 500, seed=3)
    assert tokens(distinct, [SamplerRow(cold, seed=row) for row in range(40)]) == distinct.argmax(dim=-1).tolist()


def test_a_rounding_error_in_the_logits_does_not_change_the_text():
    """Two placements may differ in the last bit; with equals about, a draw by rank would jump between them."""
    logits = random_logits(1, 2000, seed=8, scale=1.0).mul(8).round().div(8).expand(400, -1)
    noise = torch.randn(400, 2000, generator=torch.Generator().manual_seed(1)) * 1e-6
    rows = [SamplerRow(SamplingParams(temperature=0.9), seed=row) for row in range(400)]
    changed = sum(before != after for before, after in zip(tokens(logits, rows), tokens(logits + noise, rows)))
    assert changed <= 1


def test_impossible_tokens_are_never_drawn():
    logits = torch.full((600, 50), -torch.inf)
    logits[:, [3, 20]] = 0.0
    for params in (SamplingParams(), SamplingParams(top_k=10), SamplingParams(top_p=0.99), SamplingParams(min_p=0.5)):
        assert set(tokens(logits, [SamplerRow(params, seed=row) for row in range(600)])) == {3, 20}


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=3), SamplingParams(top_p=0.999999)])
def test_the_ends_of_the_unit_interval_give_possible_tokens(params):
    logits = torch.tensor([[-torch.inf, -torch.inf, 0.3, 1.7, -torch.inf, 0.1, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, [params] * 2, ends).tolist() == [2, 5]


# Penalties and masks


def test_repetition_penalty_equals_transformers():
    logits = random_logits(6, 97, seed=5)
    prompts = [[1, 5, 5, 96], [], [0], [2, 3], list(range(97)), [8] * 30]
    outputs = [[5, 7], [9, 9], [], [2, 2, 2], [4], array("q", [1, 2, 3])]
    penalties = [1.3, 0.8, 2.0, 1.0, 1.1, 5.0]
    rows = [
        SamplerRow(SamplingParams(temperature=0, repetition_penalty=penalty), prompt_ids=prompt, output_ids=output)
        for penalty, prompt, output in zip(penalties, prompts, outputs)
    ]
    expected = logits.clone()
    for row, (penalty, prompt, output) in enumerate(zip(penalties, prompts, outputs)):
        said = torch.tensor([[*prompt, *output]], dtype=torch.int64)
        expected[row] = RepetitionPenaltyLogitsProcessor(penalty)(said, expected[row : row + 1].clone())[0]
    adjusted = logits.clone()
    sampler.apply_penalties(adjusted, rows)
    torch.testing.assert_close(adjusted, expected, rtol=1e-6, atol=0)
    assert tokens(logits, rows) == expected.argmax(dim=-1).tolist()


def test_presence_and_frequency_penalties_count_the_output_only():
    logits = random_logits(4, 50, seed=6)
    outputs = [[3, 3, 3, 9], [], np.array([1, 1, 2], dtype=np.int64), [7]]
    rates = [(0.5, 0.25), (1.0, 1.0), (0.0, -0.5), (-1.5, 0.0)]
    rows = [
        SamplerRow(
            SamplingParams(presence_penalty=presence, frequency_penalty=frequency), prompt_ids=[9, 3], output_ids=o
        )
        for (presence, frequency), o in zip(rates, outputs)
    ]
    expected = logits.clone()
    for row, ((presence, frequency), output) in enumerate(zip(rates, outputs)):
        for token in range(50):
            count = list(output).count(token)
            expected[row, token] -= frequency * count + presence * (count > 0)
    sampler.apply_penalties(logits, rows)
    torch.testing.assert_close(logits, expected)


def test_penalties_touch_only_the_rows_that_ask():
    logits = torch.tensor([[0.0, 2.0, 1.9]] * 3)
    said = SamplerRow(SamplingParams(temperature=0, frequency_penalty=0.2), prompt_ids=[1], output_ids=[1, 0])
    free = SamplerRow(GREEDY, prompt_ids=[1], output_ids=[1, 0])
    assert tokens(logits, [free, said, free]) == [1, 2, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_stop_tokens_are_impossible_before_min_tokens(temperature):
    params = SamplingParams(temperature=temperature, min_tokens=2)
    logits = torch.tensor([[9.0, 0.0, 30.0, -40.0]] * 4)
    rows = [SamplerRow(params, seed=1, step=step, stop_ids=(2, 0)) for step in range(4)]
    assert tokens(logits, rows) == [1, 1, 2, 2]


# Log-probabilities


def test_logprobs_are_of_the_raw_logits():
    logits = random_logits(5, 120, seed=7)
    kinds = [
        SamplingParams(temperature=0, logprobs=0),
        SamplingParams(temperature=3.0, top_k=4, logprobs=2),
        SamplingParams(temperature=0, repetition_penalty=9.0, logprobs=5),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, min_tokens=5, logprobs=500),
    ]
    stop_id = int(logits[4].argmax())
    rows = [SamplerRow(kind, seed=3, prompt_ids=range(60), stop_ids=(stop_id,)) for kind in kinds]
    sampled = sample(logits, rows)
    reference = torch.log_softmax(logits, dim=-1)
    assert sampled.logprobs[3] is None and sampled.top[3] is None
    for row in (0, 1, 2, 4):
        chosen = sampled.logprobs[row]
        assert chosen.token_id == sampled.token_ids[row]
        assert chosen.logprob == pytest.approx(reference[row, chosen.token_id].item(), abs=1e-6)
        ranking = reference[row].argsort(descending=True, stable=True).tolist()
        assert ranking[chosen.rank - 1] == chosen.token_id
        count = min(kinds[row].logprobs, 120)
        assert [entry.token_id for entry in sampled.top[row]] == ranking[:count]
        assert [entry.rank for entry in sampled.top[row]] == list(range(1, count + 1))
        values = torch.tensor([entry.logprob for entry in sampled.top[row]])
        torch.testing.assert_close(values, reference[row, ranking[:count]])
    assert sampled.token_ids[4] != stop_id and sampled.logprobs[4].rank > 1


def test_top_alternatives_among_equals_are_the_lowest_ids():
    params = SamplingParams(temperature=0, logprobs=4)
    logits = torch.zeros(2, 3000)
    logits[1, [40, 2999]] = 1.0
    top = sample(logits, [SamplerRow(params)] * 2).top
    assert [[entry.token_id for entry in row] for row in top] == [[0, 1, 2, 3], [40, 2999, 0, 1]]


# Errors


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [GREEDY, SamplingParams(top_p=0.5)])
def test_broken_logits_are_named_by_row(value, params):
    logits = random_logits(4, 30)
    logits[2, 11] = value
    with pytest.raises(ExecutionError, match="row 2:") as caught:
        sample(logits, [SamplerRow(params)] * 4)
    assert caught.value.rows == [2]


def test_a_row_with_no_possible_token_is_an_error():
    logits = torch.zeros(3, 2)
    row = SamplerRow(SamplingParams(min_tokens=3), stop_ids=(0, 1))
    with pytest.raises(ExecutionError, match=r"row 1: .*no possible token"):
        sample(logits, [SamplerRow(GREEDY), row, SamplerRow(SamplingParams())])


def test_rows_must_match_the_logits():
    with pytest.raises(ValueError, match="2 rows"):
        sample(torch.zeros(3, 5), [SamplerRow(GREEDY)] * 2)
