"""``flexrun run``: flags reach the job and the engine, streams and exit codes are as promised."""

import json
import os
import shlex
import signal
import sys

import pytest

from flexrun.cli import style
from flexrun.errors import BudgetError, ExecutionError


def test_answers_go_to_the_file_and_words_to_stderr(flexrun, files):
    code, out, err = flexrun()
    assert code == 0 and out == ""
    records = [json.loads(line) for line in files.output.read_text().splitlines()]
    assert {record["response"]["body"]["choices"][0]["text"] for record in records} == {"3", "1"}
    for part in (
        "checked 2 lines",
        "2 answered, 0 failed",
        "2 generated",
        "prefill",
        "decode",
        "cpu 1.0 MiB",
        "stop 2",
    ):
        assert part in err


def test_stdout_carries_records_alone(flexrun):
    code, out, _ = flexrun(output="-")
    assert code == 0 and [json.loads(line)["custom_id"] for line in out.splitlines()] == ["line-1", "line-2"]


def test_output_json_is_one_object(flexrun, files):
    _, out, _ = flexrun("--output-json", "-")
    summary = json.loads(out)
    assert summary["requests"]["answered"] == 2 and summary["engine"]["process_peak_bytes"] == 1 << 21
    target = files.folder / "summary.json"
    flexrun("--overwrite", "--output-json", str(target))
    assert json.loads(target.read_text())["generated_tokens"] == 2


def test_flags_reach_the_engine(flexrun, engine, files):
    policy = files.folder / "p.json"
    policy.write_text("{}")
    flexrun(
        *shlex.split(
            "--dtype float32 --gpu-memory 1GiB --cpu-memory 2GiB --max-model-len 40 --max-num-seqs 7 --seed 3"
        ),
        *shlex.split(
            "--threads 2 --disk-memory 3GiB --disk-dir d --cache-dir c --trace t.json --tokenizer tok --policy"
        ),
        str(policy),
        *shlex.split(
            "--hardware hw.json --weight-bits 4 --kv-bits k8v4 --weight-group 32 --keep layers.0.*=16,*.down_proj=8"
        ),
        *shlex.split("--activation-bits 8 --expert-profile used.json --save-expert-profile new.json"),
    )
    assert callable(engine.built.pop("log"))
    assert engine.built == {
        "model": "echo",
        "policy": str(policy),
        "tokenizer": "tok",
        "chat_template": None,
        "dtype": "float32",
        "gpu_memory": "1GiB",
        "cpu_memory": "2GiB",
        "disk_memory": "3GiB",
        "disk_dir": "d",
        "cache_dir": "c",
        "max_model_len": 40,
        "max_num_seqs": 7,
        "seed": 3,
        "trace": "t.json",
        "device": "cpu",
        "threads": 2,
        "hardware": "hw.json",
        "weight_bits": 4,
        "weight_group": 32,
        "activation_bits": 8,
        "kv_bits": "k8v4",
        "keep": ["layers.0.*=16", "*.down_proj=8"],
        "expert_profile": "used.json",
        "save_expert_profile": "new.json",
        "progress": False,
    }


def test_flags_reach_the_requests(flexrun, engine):
    seen = []
    engine.on_request = staticmethod(seen.append)
    flexrun(
        *shlex.split("--max-new-tokens 5 --temperature 0.5 --top-p 0.9 --top-k 4 --min-p 0.1 --n 2 --logprobs 1"),
        *shlex.split("--ignore-eos --repetition-penalty 1.1 --presence-penalty 0.2 --frequency-penalty 0.3"),
        *("--stop", "END", "--stop", "\n", "--stop-token-ids", "7", "8", "--min-tokens", "2"),
    )
    params = seen[0].params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (5, 0.5, 0.9, 4, 0.1)
    assert (params.n, params.logprobs, params.ignore_eos, params.min_tokens) == (2, 1, True, 2)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.1, 0.2, 0.3)
    assert params.stop == ("END", "\n") and params.stop_token_ids == (7, 8)


def test_the_default_is_greedy_and_short(flexrun, engine):
    seen = []
    engine.on_request = staticmethod(seen.append)
    flexrun()
    assert (seen[0].params.temperature, seen[0].params.max_tokens, engine.built["policy"]) == (0.0, 128, "auto")


def test_some_failures_exit_with_one(flexrun, files):
    files.source.write_text('{"prompt": "a"}\nbad\n')
    code, _, err = flexrun("--error-file", str(files.errors))
    assert code == 1 and "line 2 refused (invalid_json)" in err
    assert json.loads(files.errors.read_text())["error"]["line"] == 2
    code, _, _ = flexrun("--error-file", str(files.errors), "--resume")
    assert code == 1  # the failure is still there


def test_strict_is_a_usage_error(flexrun, files, engine):
    files.source.write_text('{"prompt": "a"}\nbad\n')
    code, _, err = flexrun("--strict")
    assert code == 2 and err.rstrip().splitlines()[-1].startswith("hint: ") and engine.built is None


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--n", "2"], "n=2"),
        (["--temperature", "-1"], "temperature"),
        (["--limit", "0"], "limit"),
        (["--retry-errors"], "--resume"),
        (["--chat-template", "missing.jinja"], "missing.jinja"),
    ],
)
def test_settings_that_cannot_work(flexrun, flags, complaint):
    code, out, err = flexrun(*flags)
    assert code == 2 and out == "" and complaint in err
    assert err.rstrip("\n").split("\n")[-2:][0] == "" and "\nhint: " in err


def test_two_users_of_stdout_are_refused(flexrun):
    code, _, err = flexrun("--output-json", "-", output="-")
    assert code == 2 and "stdout" in err


@pytest.mark.parametrize("flag", ["--output-json", "--trace", "--save-expert-profile", "--error-file"])
def test_nothing_is_written_over_the_prompts_or_the_answers(flexrun, files, flag):
    for path in (files.source, files.output):
        code, _, err = flexrun(flag, str(path), "--overwrite")
        assert code == 2 and "are the same" in err and "hint: name another" in err


@pytest.mark.parametrize("flag", ["--output-json", "--trace", "--save-expert-profile"])
def test_a_place_that_cannot_be_written_is_told_before_the_run(flexrun, files, flag):
    code, _, err = flexrun(flag, str(files.folder / "gone" / "x.json"))
    assert code == 2 and "mkdir -p" in err and not files.output.exists()


@pytest.mark.parametrize(
    "error, expected", [(BudgetError("too small", "raise it"), 2), (ExecutionError("read", "h"), 1)]
)
def test_errors_of_the_engine_have_exit_codes(flexrun, engine, error, expected):
    def fail(request):
        raise error

    engine.on_request = staticmethod(fail)
    code, _, err = flexrun()
    assert code == expected and f"error: {error.message}\n\nhint: {error.hint}\n" in err


def test_ctrl_c_says_how_to_go_on_and_doing_so_ends_the_job(flexrun, engine, files):
    def interrupt(request):
        os.kill(os.getpid(), signal.SIGINT)

    engine.on_request = staticmethod(interrupt)
    code, _, err = flexrun("--overwrite")
    assert code == 130 and "1 left" in err
    command = err.rstrip().splitlines()[-1].split()
    assert command[:2] == ["flexrun", "run"] and command[-1] == "--resume" and "--overwrite" not in command
    engine.on_request = None
    code, _, _ = flexrun("--resume")
    assert code == 0 and len(files.output.read_text().splitlines()) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_weights_are_loaded_lets_go_of_the_output(flexrun, engine, files, monkeypatch, number):
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "prepare", lambda self, workload: os.kill(os.getpid(), number))
        code, _, err = flexrun()
    assert code == 130 and "--resume" in err and signal.getsignal(number) is before
    assert not list(files.folder.glob("*.lock"))
    assert flexrun("--resume")[0] == 0


def test_interrupt_before_any_answer(flexrun, engine):
    def interrupt(request):
        raise KeyboardInterrupt

    engine.on_request = staticmethod(interrupt)
    code, _, err = flexrun()
    assert code == 130 and "2 left" in err


def test_chat_template_is_read_from_the_file_and_part_of_the_job(flexrun, files, engine):
    template = files.folder / "chat.jinja"
    template.write_text("{{ messages }}")
    flexrun("--chat-template", str(template))
    assert engine.built["chat_template"] == "{{ messages }}"
    template.write_text("{{ other }}")
    code, _, err = flexrun("--chat-template", str(template), "--resume")
    assert code == 2 and "chat_template" in err


def manifest_of(flexrun, files, policy, *flags):
    """Of a job that ran with these fields as its policy file."""
    path = files.folder / "policy.json"
    path.write_text(json.dumps(policy))
    flexrun("--policy", str(path), "--overwrite", *flags)
    return json.loads(files.output.with_name("out.jsonl.manifest.json").read_text())


def test_bits_of_a_policy_file_are_part_of_the_job(flexrun, files):
    flexrun()
    plain = json.loads(files.output.with_name("out.jsonl.manifest.json").read_text())
    assert manifest_of(flexrun, files, {"weight_bits": 16, "kv_bits": 16, "tokens_per_pass": 64}) == plain
    assert flexrun("--resume")[0] == 0
    four = {"weight_bits": 4, "keep": ["layers.0.*=16", "lm_head=8"], "kv_bits": "k8v4"}
    found = manifest_of(flexrun, files, four)
    by_flags = shlex.split("--weight-bits 4 --keep layers.0.*=16,lm_head=8 --kv-bits k8v4")
    assert found == manifest_of(flexrun, files, {}, *by_flags) != plain
    assert found["weight_bits"] == [4, "layers.0.*=16,lm_head=8", None] and found["kv_bits"] == "k8v4"
    flags_win = manifest_of(
        flexrun, files, {**four, "activation_bits": 8}, "--weight-bits", "8", "--weight-group", "32"
    )
    assert (flags_win["weight_bits"], flags_win["activation_bits"]) == ([8, "layers.0.*=16,lm_head=8", 32], 8)


def test_a_resume_with_a_policy_of_other_bits_is_refused(flexrun, files):
    manifest_of(flexrun, files, {"weight_bits": 4})
    code, _, err = flexrun("--resume")
    assert code == 2 and "weight_bits" in err
    (files.folder / "other.json").write_text('{"weight_bits": 4, "sequences_in_flight": 3}')
    assert flexrun("--policy", str(files.folder / "other.json"), "--resume")[0] == 0
    files.folder.joinpath("other.json").write_text('{"weight_bits": 4, "weight_group": 32}')
    code, _, err = flexrun("--policy", str(files.folder / "other.json"), "--resume")
    assert code == 2 and "weight_bits" in err


@pytest.mark.parametrize("no_color, coloured", [("", True), ("1", False)])
def test_no_color_is_respected(no_color, coloured, monkeypatch, capsys):
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    style.print_error("bad", "good")
    assert ("\x1b[" in capsys.readouterr().err) is coloured
