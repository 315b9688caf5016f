"""Jobs over a counting engine that crash or are stopped, and go on."""

import io
import json
import os
import signal

import pytest
from word_jobs import by_id, prompts, text_of

from flexrun.errors import ConfigError
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.sampling import SamplingParams


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
        ({"error_file": "errors.jsonl"}, "error_file"),
    ],
)
def test_resume_with_other_settings_is_refused(run, change, named):
    run(prompts(2))
    with pytest.raises(ConfigError, match=named):
        run(None, resume=True, **change)


def test_resume_with_other_weights_at_the_same_place_is_refused(run, model, tmp_path):
    run(prompts(4), limit=2)
    model.weights_digest = lambda: "other"
    with pytest.raises(ConfigError, match='weights="w", this command has weights="other"'):
        run(None, resume=True)
    path = tmp_path / "out.jsonl.manifest.json"
    earlier = json.loads(path.read_text())
    del earlier["weights"]  # as versions before this one wrote it
    path.write_text(json.dumps(earlier))
    _, records = run(None, resume=True)
    assert len(by_id(records)) == 4 and json.loads(path.read_text())["weights"] == "other"


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


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_closed_terminal_stops_in_order_however_often_it_says_so(run, make_llm, is_ignored):
    def on_pass(llm):
        if len(llm.seen) > 20:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        summary, records = run(prompts(60), make_llm(slots=8, on_pass=on_pass))
    finally:
        after = signal.signal(signal.SIGHUP, before)
    assert after is (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    assert summary["interrupted"] is not is_ignored and (len(records) == 60) is is_ignored  # ignored: under nohup
    _, records = run(None, resume=True)
    assert len(by_id(records)) == 60


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
