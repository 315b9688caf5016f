"""What is learnt of answers while they come: the time that is left, the order, the room that is kept."""

import io
import json

import numpy as np
import pytest

from flexrun.jobs import outlook as outlook_module
from flexrun.jobs import stream as stream_module
from flexrun.jobs.encoder import PromptEncoder
from flexrun.jobs.index import index_job
from flexrun.jobs.outlook import FIRST_LOOK, Outlook
from flexrun.sampling import SamplingParams


@pytest.fixture
def outlook_of(model):
    def outlook_of(lines):
        source = io.BytesIO("".join(json.dumps(line) + "\n" for line in lines).encode())
        encoder = PromptEncoder(model.tokenizer, model.spec.vocab_size, model.max_model_len)
        index = index_job(source, encoder, SamplingParams(temperature=0.0))
        return Outlook(index, np.arange(len(index)))

    return outlook_of


def lines_with(*max_tokens):
    return [{"prompt": [5, 6, 7], "max_tokens": tokens} for tokens in max_tokens]


def answer(outlook, rows, tokens, ended=True):
    for row in rows:
        outlook.left[row] = False
        outlook.add(row, tokens, ended)


def test_at_first_answers_are_taken_to_go_to_their_limits(outlook_of):
    outlook = outlook_of([*lines_with(50, 7), {"prompt": [5], "max_tokens": 4, "n": 3, "temperature": 1.0}])
    assert outlook.answer_tokens.tolist() == [50, 7, 4] and outlook.kept_tokens.tolist() == [50, 7, 4]
    assert outlook.work_left == 3 + 3 + 1 + 50 + 7 + 12 and not outlook.knows
    outlook.cost(0.5, 2.0)
    assert outlook.work_left == 3.5 + 138 and outlook.work_of(2) == 0.5 + 24
    outlook.left[2] = False
    assert outlook.work_left == 3 + 114


def test_kinds_learn_from_their_own_and_others_from_all(outlook_of):
    outlook = outlook_of(lines_with(*[40] * 30, *[8] * 30, 20))
    answer(outlook, range(20), 6)
    answer(outlook, range(30, 50), 8, ended=False)
    assert outlook.due
    outlook.look()
    assert not outlook.due and outlook.knows
    assert set(outlook.answer_tokens[20:30]) == {6.0} and set(outlook.answer_tokens[50:60]) == {8.0}
    assert outlook.answer_tokens[60] == pytest.approx(0.5 * 6 + 0.5 * 20)  # half end, of the others nothing is known
    assert set(outlook.kept_tokens[20:30]) == {6} and set(outlook.kept_tokens[50:60]) == {8}
    assert outlook.kept_tokens[60] == 20


def test_what_is_under_way_keeps_short_answers_from_fooling_it(outlook_of):
    outlook = outlook_of(lines_with(*[60] * 100))
    answer(outlook, range(FIRST_LOOK), 3)
    outlook.look((row, 30) for row in range(FIRST_LOOK, 2 * FIRST_LOOK))
    assert outlook.answer_tokens[99] > 30 and outlook.kept_tokens[99] == 60


def test_the_workload_says_what_is_likely_beside_the_most(outlook_of):
    outlook = outlook_of(lines_with(*[60] * 40))
    answer(outlook, range(FIRST_LOOK), 3)
    outlook.look()
    workload = outlook.workload(np.flatnonzero(outlook.left))
    assert set(workload.max_tokens) == {60} and set(workload.likely_tokens) == set(workload.kept_tokens) == {3}
    assert workload.kv_tokens_of(4) == 62  # one may still get as long as it may
    assert workload.kv_tokens_of(40) == 62 and len(workload) == 8


def test_too_many_kinds_are_told_apart_by_their_limits_only(outlook_of, monkeypatch):
    lines = [{"prompt": [number] * 20 + [1, 2], "max_tokens": 9} for number in range(9) for _ in range(8)]
    assert len(set(outlook_of(lines)._kind)) == 9
    monkeypatch.setattr(outlook_module, "MOST_KINDS", 8)
    assert len(set(outlook_of(lines)._kind)) == 1


def mixed_job(count):
    """Half of the lines may answer with 40 tokens and stop after one; half go to their limit of 5."""
    short = [{"prompt": [5], "max_tokens": 40, "custom_id": f"short-{number}"} for number in range(count)]
    return [*short, *({"prompt": [4], "max_tokens": 5, "custom_id": f"long-{number}"} for number in range(count))]


def test_the_rest_of_a_job_is_put_into_the_order_that_answers_tell_of(run, make_llm, monkeypatch):
    monkeypatch.setattr(stream_module, "LOAD_ROWS", 4)
    llm = make_llm(slots=4)
    run(mixed_job(100), llm)
    names = [request.request_id.split("-")[0] for request in llm.seen]
    first = names.index("long")
    assert names[:first] == ["short"] * first and FIRST_LOOK <= first <= FIRST_LOOK + 8
    assert names[first : first + 100] == ["long"] * 100  # they are the long ones: they go first
    assert {request.kept_tokens for request in llm.seen[first:] if request.request_id.startswith("short")} == {1}
    assert {request.kept_tokens for request in llm.seen[:4]} == {None}
    llm = make_llm(slots=4)
    run(None, llm, overwrite=True, order="input")
    assert [request.request_id for request in llm.seen][50:150] == [
        *(f"short-{number}" for number in range(50, 100)),
        *(f"long-{number}" for number in range(50)),
    ]


def test_a_resumed_job_has_learnt_from_the_answers_of_before(run, make_llm):
    run(mixed_job(40), limit=60)
    llm = make_llm()
    summary, records = run(None, llm, resume=True)
    workload = llm.prepared_for
    assert set(workload.max_tokens) == {5} and set(workload.likely_tokens) == {5}
    assert len(records) == 80 and summary["requests"]["answered_before"] == 60
    lines = [{"prompt": [5], "max_tokens": 40, "custom_id": f"id-{number}"} for number in range(60)]
    run(lines, limit=40, overwrite=True)
    llm = make_llm()
    run(None, llm, resume=True)
    assert set(llm.prepared_for.max_tokens) == {40} and set(llm.prepared_for.likely_tokens) == {1}
    assert {request.kept_tokens for request in llm.seen} == {1}


def test_a_better_plan_goes_on_from_what_is_under_way(run, make_llm):
    lines = [
        {
            "prompt": [4 + number % 5],
            "max_tokens": 40,
            "custom_id": f"id-{number}",
            "logprobs": None if number % 9 else 0,
        }
        for number in range(100)
    ]
    _, expected = run(lines)
    steady = make_llm(slots=8)
    run(None, steady, overwrite=True)
    llm = make_llm(slots=8)
    llm.has_better = True
    summary, records = run(None, llm, overwrite=True)
    assert summary["requests"]["answered"] == 100 and not summary["interrupted"]
    found = {record["custom_id"]: record["response"]["body"]["choices"] for record in records}
    assert found == {record["custom_id"]: record["response"]["body"]["choices"] for record in expected}
    assert len(records) == 100
    left = llm.reconsidered
    assert len(left) == 100 - FIRST_LOOK and set(left.max_tokens) > {40}  # what is begun has less to go
    again = len(llm.seen) - 100
    assert 0 < again <= 8 and 0 < llm.generated - steady.generated <= 8 * 5  # what has log-probabilities
