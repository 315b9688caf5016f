"""flexrun plan: from a config.json and lengths to a plan in words, as JSON, as a policy file and as a picture."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flexrun.cli import main
from flexrun.config import Policy

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = CONFIGS / "models" / "opt-6.7b.json"
T4 = CONFIGS / "hardware" / "t4-gcp-208gb.json"
JOB = ("--num-prompts", "64", "--prompt-len", "128", "--gen-len", "16")


@pytest.fixture
def plan(capsys):
    """plan(arguments...) -> (exit code, stdout, stderr), for OPT-6.7B on a T4 unless told otherwise."""

    def run(*arguments, model=MODEL, job=JOB, hardware=T4):
        code = main(["plan", "--model", str(model), "--hardware", str(hardware), *job, *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_page_says_what_goes_where_how_long_and_what_binds(plan):
    code, out, _ = plan()
    assert code == 0
    for word in ("opt-6.7b", "T4", "weights", "kv", "workspace", "total", "budget", "sequences in flight"):
        assert word in out
    for word in ("generated tokens/s", "prefill", "decode", "GPU compute", "copies to the GPU", "bound:", "more RAM"):
        assert word in out


def test_json_holds_everything_and_adds_up(plan):
    code, out, _ = plan("--json", "--gpu-memory", "6GiB")
    document = json.loads(out)
    assert code == 0
    assert sum(document["bytes"]["gpu"].values()) <= document["budgets"]["gpu_bytes"] == 6 << 30
    forecast = document["forecast"]
    assert forecast["generated_tokens"] == 64 * 16 and forecast["prompt_tokens"] == 64 * 128
    assert abs(forecast["prefill_seconds"] + forecast["decode_seconds"] - forecast["seconds"]) < 1e-6
    assert forecast["bound_seconds"] <= forecast["seconds"]
    assert max(lane["utilisation"] for lane in forecast["lanes"].values()) <= 1.0


def test_the_policy_file_is_a_policy_and_forecasts_alike(plan, tmp_path):
    path = tmp_path / "policy.json"
    _, out, _ = plan("--json", "-o", path)
    policy = Policy.from_json(path)
    policy.check_runnable()
    searched = json.loads(out)["forecast"]["seconds"]
    _, again, _ = plan("--json", "--policy", path)
    assert json.loads(again)["policy"] == json.loads(out)["policy"]
    assert json.loads(again)["forecast"]["seconds"] == pytest.approx(searched, rel=1e-6)


def test_the_picture_is_svg(plan, tmp_path):
    path = tmp_path / "timeline.svg"
    plan("--plot", path)
    assert ElementTree.parse(path).getroot().tag.endswith("svg")


def test_fixed_fields_are_kept(plan):
    _, out, _ = plan(
        "--json", "--max-num-seqs", "8", "--fix", "tokens_per_pass=512", "--fix", "cpu_attention_share=0.5"
    )
    policy = json.loads(out)["policy"]
    assert (policy["sequences_in_flight"], policy["tokens_per_pass"], policy["cpu_attention_share"]) == (8, 512, 0.5)


def test_a_prompt_file_gives_the_lengths(plan, checkpoint, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": [1, 2, 3, 4], "max_tokens": 5}\n{"prompt": [1, 2], "max_tokens": 7, "n": 2, "temperature": 1}\n'
    )
    code, out, _ = plan("--json", "-i", prompts, "--dtype", "float32", model=checkpoint("llama"), job=())
    forecast = json.loads(out)["forecast"]
    assert code == 0
    assert (forecast["prompt_tokens"], forecast["generated_tokens"]) == (4 + 2 + 2, 5 + 7 + 7)


def test_a_model_that_is_not_run_yet_is_planned_and_says_so(plan):
    code, out, _ = plan(model=CONFIGS / "models" / "qwen3-30b-a3b.json")
    assert code == 0
    assert "does not run: mixture of experts" in out


def test_budgets_that_are_too_small_say_which_and_by_how_much(plan):
    code, _, error = plan("--cpu-memory", "10MiB", "--gpu-memory", "0")
    assert code == 2
    assert "cpu memory is short by" in error and "--cpu-memory" in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--fix", "tokens_per_pass"), "--fix"),
        (("--fix", "sequences=3"), "sequences"),
        (("--fix", "tokens_per_pass=0"), "tokens_per_pass"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--prompt-len", "5000"), "2048"),
        (("--policy", "nowhere.json"), "nowhere.json"),
        (("-i", "nowhere.jsonl"), "nowhere.jsonl"),
        (("-o", "no/such/folder/policy.json"), "cannot be written"),
    ],
)
def test_bad_input_is_named(plan, arguments, complaint):
    code, _, error = plan(*arguments)
    assert code == 2
    assert complaint in error


def test_a_hardware_file_that_is_not_there_is_named(plan):
    code, _, error = plan(hardware="nowhere.json")
    assert code == 2 and "nowhere.json" in error
