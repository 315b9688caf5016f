"""Whole jobs over a counting engine: answers, order, refill, errors."""

import collections
import io
import json
import os
import threading
import tracemalloc

import pytest
from word_jobs import by_id, prompts

from flexrun.errors import BudgetError, ConfigError, ExecutionError
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.sampling import SamplingParams


def test_every_line_is_answered_once_whatever_its_shape(run):
    lines = [
        {"prompt": "two words", "custom_id": "a", "topic": "t"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {
            "custom_id": "c",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": [3, 4], "max_tokens": 2, "return_token_ids": True},
        },
        "not json",
    ]
    summary, records = run(lines)
    found = by_id(records)
    assert set(found) == {"a", "line-2", "c", "line-4"}
    assert found["a"]["metadata"] == {"topic": "t"}
    assert found["line-2"]["response"]["body"]["choices"][0]["message"]["role"] == "assistant"
    choice = found["c"]["response"]["body"]["choices"][0]
    assert choice["token_ids"] == [7, 8] and choice["text"] == "7 8" and choice["finish_reason"] == "length"
    assert found["line-4"]["error"]["line"] == 4 and found["line-4"]["response"] is None
    assert summary["requests"] == {
        "total": 4,
        "answered": 3,
        "failed": 1,
        "answered_before": 0,
        "failed_before": 0,
        "left": 0,
    }
    assert summary["errors"] == {"invalid_json": 1}
    assert summary["engine"] == {"generated_tokens": summary["generated_tokens"]}


def test_counts_of_the_summary_are_those_of_the_records(run):
    summary, records = run(prompts(50))
    usage = [record["response"]["body"]["usage"] for record in records]
    assert summary["generated_tokens"] == sum(row["completion_tokens"] for row in usage)
    assert summary["prompt_tokens"] == sum(row["prompt_tokens"] for row in usage)
    assert sum(summary["finish_reasons"].values()) == 50
    assert summary["generated_tokens_per_second"] > 0


def test_requests_are_drawn_lazily_longest_first(run, make_llm):
    llm = make_llm(slots=3)
    run(prompts(100, max_tokens=8), llm)
    lengths = [len(request.token_ids) for request in llm.seen]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 100
    assert llm.most_in_flight == 3 and llm.closed


def test_the_engine_is_told_what_is_left(run, make_llm):
    llm = make_llm()
    run([{"prompt": "a b", "max_tokens": 7, "n": 2, "temperature": 1.0}, {"prompt": "c", "max_tokens": 500}], llm)
    assert sorted(llm.prepared_for.prompt_tokens.tolist()) == [2, 3, 3]  # a row a choice
    assert sorted(llm.prepared_for.max_tokens.tolist()) == [7, 7, 62]  # never past the context of 64


def test_input_order_runs_in_file_order(run, make_llm):
    llm = make_llm()
    run(prompts(40), llm, order="input")
    assert [request.request_id for request in llm.seen] == [f"id-{number}" for number in range(40)]


def test_output_appears_while_the_job_runs(run, make_llm, tmp_path):
    sizes = []
    output = tmp_path / "out.jsonl"
    run(prompts(60), make_llm(on_pass=lambda llm: sizes.append(output.stat().st_size)))
    assert sizes[0] == 0 and 0 < sizes[len(sizes) // 2] < output.stat().st_size


def test_preserve_order_writes_input_order(run):
    lines = prompts(70)
    lines[10] = "bad"
    _, records = run(lines, preserve_order=True)
    expected = [f"id-{number}" for number in range(70)]
    expected[10] = "line-11"
    assert [record["custom_id"] for record in records] == expected


def test_error_file_separates_refusals_and_failures(run, make_llm, tmp_path):
    summary, records = run(["bad", *prompts(5)], make_llm(fail_ids=["id-2"]), error_file=str(tmp_path / "errors.jsonl"))
    assert {record["custom_id"] for record in records} == {"id-0", "id-1", "id-3", "id-4"}
    errors = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert [(record["custom_id"], record["error"]["code"], record["error"]["line"]) for record in errors] == [
        ("line-1", "invalid_json", 1),
        ("id-2", "engine_error", 4),
    ]
    assert summary["requests"]["failed"] == 2


def test_defaults_reach_lines_that_say_nothing(run, make_llm):
    llm = make_llm()
    run(
        [{"prompt": "a"}, {"prompt": "a", "max_tokens": 9}],
        llm,
        sampling=SamplingParams(temperature=0.5, max_tokens=2),
    )
    assert sorted(request.params.max_tokens for request in llm.seen) == [2, 9]
    assert {request.params.temperature for request in llm.seen} == {0.5}


def test_return_token_ids_is_a_default_that_lines_override(run):
    _, records = run([{"prompt": "a"}, {"prompt": "b", "return_token_ids": False}], return_token_ids=True)
    found = by_id(records)
    assert "token_ids" in found["line-1"]["response"]["body"]["choices"][0]
    assert "token_ids" not in found["line-2"]["response"]["body"]["choices"][0]


def test_strict_stops_before_the_engine_is_built(tmp_path, model):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\nbad\n')
    log = io.StringIO()
    config = JobConfig(str(source), str(tmp_path / "out.jsonl"), "m", strict=True, progress=False)
    with pytest.raises(ConfigError, match=r"1 lines .* --strict"):
        run_job(config, lambda: model, lambda files: pytest.fail("weights were loaded"), log)
    assert "line 2 refused (invalid_json)" in log.getvalue()
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_nothing_to_run_builds_no_engine_but_writes_the_refusals(tmp_path, model):
    source = tmp_path / "in.jsonl"
    source.write_text("bad\n\n[]\n")
    config = JobConfig(str(source), str(tmp_path / "out.jsonl"), "m", progress=False)
    summary = run_job(config, lambda: model, lambda files: pytest.fail("weights were loaded"), io.StringIO())
    assert summary["requests"]["failed"] == 2 and summary["engine"] is None
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 2


def test_an_engine_that_cannot_be_built_leaves_no_output(tmp_path, model):
    def no_memory(files):
        raise BudgetError("too small", "raise --cpu-memory")

    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\nbad\n')
    config = JobConfig(str(source), str(tmp_path / "out.jsonl"), "m", progress=False)
    with pytest.raises(BudgetError):
        run_job(config, lambda: model, no_memory, io.StringIO())
    assert os.listdir(tmp_path) == ["in.jsonl"]


def test_an_existing_output_stops_the_job_before_the_model_is_opened(run, tmp_path):
    run(prompts(2))
    config = JobConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "m")
    with pytest.raises(ConfigError, match="already exists"):
        run_job(config, lambda: pytest.fail("model was opened"), None)


def test_an_engine_that_forgets_a_request_is_found_out(run, make_llm):
    llm = make_llm()
    answers = llm.generate_iter
    llm.generate_iter = lambda *arguments: (out for out in answers(*arguments) if out.request_id != "id-3")
    with pytest.raises(ExecutionError, match="without an answer to 1 requests"):
        run(prompts(6), llm)


def test_jobs_run_outside_the_main_thread(run):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(prompts(4))))
    thread.start()
    thread.join(20)
    assert len(results[0][1]) == 4


def test_sampled_logprobs_reach_the_record(run):
    _, records = run([{"prompt": "a", "logprobs": 1, "max_tokens": 1}])
    assert records[0]["response"]["body"]["choices"][0]["logprobs"]["token_logprobs"] == [-0.5]


@pytest.mark.parametrize(
    "settings, match",
    [
        ({"order": "random"}, "order"),
        ({"limit": 0}, "limit"),
        ({"retry_errors": True}, "--resume"),
        ({"preserve_order": True, "output_file": "-"}, "stdout"),
        ({"output_file": "in"}, "same"),
    ],
)
def test_settings_that_cannot_work(settings, match):
    with pytest.raises(ConfigError, match=match):
        JobConfig(**{"input_file": "in", "output_file": "out", "model_name": "m", **settings})


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_an_output_that_would_replace_the_input_is_refused(tmp_path, link):
    source, other = tmp_path / "in.jsonl", tmp_path / "other.jsonl"
    source.write_text('{"prompt": "a"}\n')
    link(source, other)
    for settings in ({"output_file": str(other)}, {"output_file": "out", "error_file": f"{tmp_path}/./in.jsonl"}):
        with pytest.raises(ConfigError, match="are the same"):
            JobConfig(str(source), model_name="m", overwrite=True, **settings)
    JobConfig("/dev/null", "/dev/null", "m")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_requests(model, make_llm, tmp_path):
    def peak_bytes(count):
        for name in ("out.jsonl", "out.jsonl.manifest.json"):
            (tmp_path / name).unlink(missing_ok=True)
        llm = make_llm(slots=64)
        llm.seen = collections.deque(maxlen=1)
        with open(tmp_path / "in.jsonl", "w") as file:
            for number in range(count):
                file.write(json.dumps({"custom_id": f"id-{number}", "prompt": "a b c " * 5, "max_tokens": 1}) + "\n")
        tracemalloc.start()
        summary = run_job(
            JobConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "counting", progress=False),
            lambda: model,
            lambda files: llm,
            io.StringIO(),
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert summary["requests"]["answered"] == count
        return peak

    small, large = peak_bytes(2_000), peak_bytes(10_000)
    assert large - small < 8_000 * 56 * 4  # only the index grows, and its copies while it is sorted
