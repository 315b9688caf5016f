"""The workload read from a prompt file is the one that a job over that file runs by."""

from __future__ import annotations

import gzip
import json

import pytest

import flexrun
import flexrun.workload
from flexrun.errors import FlexrunError
from flexrun.jobs.workload import Workload
from flexrun.sampling import SamplingParams

LINES = [
    {"prompt": "one two three"},
    {"prompt": "four", "max_tokens": 20},
    {"prompt": [5, 6, 7, 8, 9, 10], "n": 3, "temperature": 1.0},
    {"prompt": "word " * 30, "max_tokens": 2},
    "not json",
    {"prompt": "word " * 70},
    {"messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4},
    {"prompt": "six seven"},
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in LINES))
    return path


def columns(workload):
    return workload.prompt_tokens.tolist(), workload.max_tokens.tolist()


@pytest.mark.parametrize("order", ["longest", "input"])
@pytest.mark.parametrize("max_tokens", [8, 1000])
def test_it_is_what_a_job_prepares_for(run, make_llm, model, prompts, order, max_tokens):
    """The same rows, n a line, in the same order, without the lines that are refused."""
    sampling, llm = SamplingParams(temperature=0.0, max_tokens=max_tokens), make_llm()
    run(llm=llm, input_file=str(prompts), sampling=sampling, order=order)
    assert columns(Workload.from_jsonl(prompts, model, sampling=sampling, order=order)) == columns(llm.prepared_for)


def test_every_good_line_is_a_row_a_choice(model, prompts):
    workload = Workload.from_jsonl(prompts, model, sampling=SamplingParams(max_tokens=8), order="input")
    assert columns(workload) == ([4, 2, 6, 6, 6, 31, 4, 3], [8, 20, 8, 8, 8, 2, 4, 8])
    longest = Workload.from_jsonl(prompts, model, sampling=SamplingParams(max_tokens=8))
    assert columns(longest) == ([2, 6, 6, 6, 4, 3, 4, 31], [20, 8, 8, 8, 8, 8, 4, 2])
    assert len(longest) == 8


def test_answers_end_where_the_model_does(model, prompts):
    workload = Workload.from_jsonl(prompts, model, sampling=SamplingParams(max_tokens=500), order="input")
    assert (workload.prompt_tokens + workload.max_tokens).max() == model.max_model_len


def test_greedy_answers_of_128_tokens_unless_told_otherwise(model, tmp_path):
    path = tmp_path / "one.jsonl"
    path.write_text('{"prompt": "a"}\n')
    model.max_model_len = 1000
    assert columns(Workload.from_jsonl(path, model)) == ([2], [128])


def test_the_first_lines_only(model, prompts):
    workload = Workload.from_jsonl(prompts, model, sampling=SamplingParams(max_tokens=8), order="input", limit=2)
    assert workload.prompt_tokens.tolist() == [4, 2]


def test_a_packed_file_is_read_too(model, tmp_path, prompts):
    path = tmp_path / "prompts.jsonl.gz"
    path.write_bytes(gzip.compress(prompts.read_bytes()))
    assert columns(Workload.from_jsonl(path, model)) == columns(Workload.from_jsonl(prompts, model))


def test_a_model_may_be_named_by_its_path(checkpoint, tmp_path):
    """Without a tokenizer beside it, a model takes token ids."""
    path = tmp_path / "ids.jsonl"
    path.write_text('{"prompt": [3, 4, 5], "max_tokens": 7}\n{"prompt": "text"}\n')
    assert columns(Workload.from_jsonl(path, checkpoint("llama"))) == ([3], [7])
    assert columns(Workload.from_jsonl(str(path), str(checkpoint("llama") / "config.json"))) == ([3], [7])


def test_what_a_job_would_refuse_is_refused(model, tmp_path):
    with pytest.raises(FlexrunError, match=r"nowhere\.jsonl"):
        Workload.from_jsonl(tmp_path / "nowhere.jsonl", model)
    one = tmp_path / "one.jsonl"
    one.write_text('{"prompt": "a"}\n')
    with pytest.raises(FlexrunError, match="nowhere"):
        Workload.from_jsonl(one, tmp_path / "nowhere")


def test_it_is_a_workload_like_any_other():
    assert flexrun.Workload is Workload
    uniform = Workload.uniform(3, 5, 7)
    assert isinstance(uniform, Workload) and isinstance(uniform, flexrun.workload.Workload)
    assert columns(uniform) == ([5, 5, 5], [7, 7, 7])
    assert columns(Workload.of([1, 2], [3, 4])) == ([1, 2], [3, 4])
