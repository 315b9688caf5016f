"""Whole jobs over a counting engine: answers, order, refill, resume, stopping."""

import collections
import io
import json
import os
import signal
import threading
import tracemalloc

import pytest

from flexrun.errors import BudgetError, ConfigError, ExecutionError
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.sampling import SamplingParams


def prompts(count, **extra):
    return [{"prompt": "word " * (number % 9 + 1), "custom_id": f"id-{number}", **extra} for number in range(count)]


def by_id(records):
    found = {record["custom_id"]: record for record in records}
    assert len(found) == len(records)
    return found


def text_of(record):
    return record["response"]["body"]["choices"][0]["text"]


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


class Crash(Exception):
    pass


def crash_after(passes):
    def on_pass(llm):
        on_pass.passes += 1
        if on_pass.passes > passes:
            raise Crash

    on_pass.passes = 0
    return on_pass


@pytest.mark.parametrize("torn_bytes", [0, 25])
def test_a_crashed_job_resumes_to_exactly_the_same_answers(run, make_llm, tmp_path, torn_bytes):
    lines = [*prompts(60), "bad"]
    _, uninterrupted = run(lines)
    os.remove(tmp_path / "out.jsonl")
    with pytest.raises(Crash):
        run(None, make_llm(on_pass=crash_after(12)))
    output = tmp_path / "out.jsonl"
    if torn_bytes:
        os.truncate(output, output.stat().st_size - torn_bytes)
    answered = {json.loads(line)["custom_id"] for line in output.read_bytes().split(b"\n")[:-1]}
    assert 5 < len(answered) < 60
    llm = make_llm()
    summary, records = run(None, llm, resume=True)
    assert {request.request_id for request in llm.seen} == {f"id-{number}" for number in range(60)} - answered
    assert not (tmp_path / "out.jsonl.tokens").exists()
    assert {key: text_of(record) for key, record in by_id(records).items() if record["error"] is None} == {
        key: text_of(record) for key, record in by_id(uninterrupted).items() if record["error"] is None
    }
    assert len(records) == 61 and summary["requests"]["left"] == 0
    assert summary["requests"]["failed_before"] == 1 and summary["requests"]["failed"] == 0


def test_no_token_is_generated_twice_however_often_a_job_stops(run, make_llm, tmp_path):
    lines = [{"prompt": "w " * (3 + number % 7), "custom_id": f"id-{number}", "max_tokens": 5} for number in range(40)]
    whole = make_llm()
    _, uninterrupted = run(lines, whole)
    os.remove(tmp_path / "out.jsonl")
    generated, started = 0, False
    while True:
        llm = make_llm(on_pass=crash_after(3))
        try:
            _, records = run(None, llm, resume=started)
            break
        except Crash:
            started = True
        finally:
            generated += llm.generated
    assert generated == whole.generated
    assert {key: text_of(record) for key, record in by_id(records).items()} == {
        key: text_of(record) for key, record in by_id(uninterrupted).items()
    }


def test_answers_with_log_probabilities_are_generated_again(run, make_llm):
    lines = [{"prompt": "w " * 9, "logprobs": 1, "max_tokens": 5, "custom_id": f"id-{number}"} for number in range(9)]
    first, second = make_llm(on_pass=crash_after(2)), make_llm()
    with pytest.raises(Crash):
        run(lines, first)
    _, records = run(None, second, resume=True)
    assert all(not request.partial for request in second.seen)
    assert all(record["response"]["body"]["choices"][0]["logprobs"]["tokens"] for record in records)


def test_what_is_left_is_planned_as_it_is(run, make_llm):
    lines = [{"prompt": "w " * 9, "max_tokens": 5, "n": 2, "temperature": 1.0, "custom_id": "a"}]
    with pytest.raises(Crash):
        run(lines, make_llm(on_pass=crash_after(2)))
    llm = make_llm()
    run(None, llm, resume=True)
    assert llm.prepared_for.prompt_tokens.tolist() == [12, 12]  # nine words, BOS, and two tokens generated
    assert llm.prepared_for.max_tokens.tolist() == [3, 3]


def test_what_an_engine_chose_is_given_to_the_one_that_goes_on(run, make_llm, model, tmp_path):
    first = make_llm(on_pass=crash_after(2))
    first.chosen = {"weight_bits": 4}
    with pytest.raises(Crash):
        run(prompts(9), first)
    config = JobConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "counting", resume=True)
    for crashes in (True, False):  # a resumed job is resumed as well
        given = []

        def build(_, given=given, crashes=crashes, **chosen):
            given.append(chosen)
            return make_llm(on_pass=crash_after(1) if crashes else None)

        try:
            run_job(config, lambda: model, build, io.StringIO())
        except Crash:
            assert crashes
        assert given == [{"weight_bits": 4}]


def test_resuming_a_finished_job_builds_no_engine(run, tmp_path, model):
    _, records = run(prompts(5))
    config = JobConfig(str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "counting", resume=True)
    summary = run_job(config, lambda: model, lambda files: pytest.fail("weights were loaded"), io.StringIO())
    assert summary["requests"]["answered_before"] == 5 and summary["requests"]["left"] == 0
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == records


def test_resume_skips_failures_unless_they_are_to_be_retried(run, make_llm):
    run(prompts(6), make_llm(fail_ids=["id-1", "id-4"]))
    llm = make_llm()
    summary, _ = run(None, llm, resume=True)
    assert llm.seen == [] and summary["requests"]["failed_before"] == 2
    summary, records = run(None, llm, resume=True, retry_errors=True)
    assert {request.request_id for request in llm.seen} == {"id-1", "id-4"}
    assert len(by_id(records)) == 6 and all(record["error"] is None for record in records)
    assert summary["requests"]["failed_before"] == 0


def test_a_limited_job_can_be_resumed_without_the_limit(run, make_llm):
    run(prompts(20), limit=5)
    llm = make_llm()
    _, records = run(None, llm, resume=True)
    assert len(llm.seen) == 15 and len(by_id(records)) == 20


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_name": "other"}, "model"),
        ({"sampling": SamplingParams(temperature=0.0, max_tokens=3)}, "max_tokens"),
        ({"identity": {"dtype": "float32"}}, "dtype"),
    ],
)
def test_resume_with_other_settings_is_refused(run, change, named):
    run(prompts(2))
    with pytest.raises(ConfigError, match=named):
        run(None, resume=True, **change)


def test_resume_with_another_input_is_refused(run):
    run(prompts(2))
    with pytest.raises(ConfigError, match="input_sha256"):
        run(prompts(3), resume=True)


def test_ctrl_c_stops_in_order_and_resume_goes_on(run, make_llm, tmp_path):
    def on_pass(llm):
        if len(llm.seen) > 20 and not on_pass.sent:
            on_pass.sent = True
            os.kill(os.getpid(), signal.SIGINT)

    on_pass.sent = False
    before = signal.getsignal(signal.SIGINT)
    llm = make_llm(slots=8, on_pass=on_pass)
    summary, records = run(prompts(60), llm)
    assert signal.getsignal(signal.SIGINT) is before
    assert summary["interrupted"] and llm.closed
    assert len(records) == summary["requests"]["answered"] and summary["requests"]["left"] == 60 - len(records) > 0
    # whatever the pass of the signal finished is written: nothing shorter than what still ran is missing
    summary, records = run(None, resume=True)
    assert not summary["interrupted"] and len(by_id(records)) == 60


def test_a_second_ctrl_c_does_not_wait_for_an_answer(run, make_llm):
    def on_pass(llm):
        if len(llm.seen) > 20:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            on_pass.went_on = True

    on_pass.went_on = False
    summary, records = run(prompts(60), make_llm(on_pass=on_pass))
    assert summary["interrupted"] and not on_pass.went_on
    assert 0 < len(records) < 60


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
