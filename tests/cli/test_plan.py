"""flexrun plan: from a config.json and lengths to a plan in words, as JSON, as a policy file and as a picture."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flexrun.cli import main
from flexrun.config import Policy
from flexrun.hardware import Hardware
from flexrun.llm.planning import search_plan
from flexrun.workload import Workload

CONFIGS = Path(__file__).parents[2] / "configs"
MODEL = CONFIGS / "models" / "opt-6.7b.json"
T4 = CONFIGS / "hardware" / "t4-gcp-208gb.json"
JOB = ("--num-prompts", "64", "--prompt-len", "128", "--gen-len", "16")
SOON = ("--max-num-seqs", "16", "--fix", "tokens_per_pass=512")  # little is left to search


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


def test_bits_are_weighed_where_they_are_left_to_the_plan(plan):
    _, out, _ = plan("--json", "--weight-bits", "auto", "--gpu-memory", "6GiB", *SOON)
    _, plain, _ = plan("--json", "--gpu-memory", "6GiB", *SOON)
    few, all_bits = (json.loads(text) for text in (out, plain))
    assert few["policy"]["weight_bits"] < all_bits["policy"]["weight_bits"] == 16
    assert few["forecast"]["seconds"] < all_bits["forecast"]["seconds"]


def test_the_policy_file_is_a_policy_and_forecasts_alike(plan, tmp_path):
    path = tmp_path / "policy.json"
    _, out, _ = plan("--json", "-o", path, *SOON)
    policy = Policy.from_json(path)
    policy.check_runnable()
    searched = json.loads(out)["forecast"]["seconds"]
    _, again, _ = plan("--json", "--policy", path)
    assert json.loads(again)["policy"] == json.loads(out)["policy"]
    assert json.loads(again)["forecast"]["seconds"] == pytest.approx(searched, rel=1e-6)


def test_the_picture_is_svg(plan, tmp_path):
    path = tmp_path / "timeline.svg"
    plan("--plot", path, *SOON)
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


def test_a_model_with_experts_is_planned_from_its_config_alone(plan):
    code, out, _ = plan(*SOON, model=CONFIGS / "models" / "deepseek-v2.json")
    assert code == 0
    assert "generated tokens/s" in out


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
        (("--policy", "nowhere.json", "--weight-bits", "auto"), "--policy says there is none"),
        (("--weight-bits", "5"), "none of 4, 8, 16 and auto"),
        (("-o", "no/such/folder/policy.json"), "cannot be written"),
    ],
)
def test_bad_input_is_named(plan, arguments, complaint):
    code, _, error = plan(*SOON, *arguments)
    assert code == 2
    assert complaint in error


def test_a_hardware_file_that_is_not_there_is_named(plan):
    code, _, error = plan(hardware="nowhere.json")
    assert code == 2 and "nowhere.json" in error


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--gpu-memory", "lots"), "lots"),
        (("--plot", "no/such/folder/plan.svg"), "cannot be written"),
        (("--fix", "weights=half"), "--fix"),
        (("--fix", 'weights={"gpu":1,"cpu":1,"disk":0}'), "sum to 1"),
        (("--max-num-seqs", "0"), "sequences_in_flight"),
        (("--activation-bits", "8"), "none is compressed"),
        (("--gen-len", "0"), "--gen-len"),
        (("--tokenizer", "nowhere"), "nowhere"),
    ],
)
def test_more_bad_input_is_named(plan, arguments, complaint):
    code, _, error = plan(*SOON, *arguments)
    assert code == 2
    assert error.startswith("error:") and complaint in error


@pytest.mark.parametrize("text", ["{", "[]", '{"architectures": ["NoSuchModel"], "model_type": "none"}'])
def test_a_config_that_is_no_models_is_named(plan, tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    code, _, error = plan(model=path)
    assert code == 2
    assert error.startswith("error:")


def test_a_config_alone_is_enough(plan, tmp_path):
    """A folder with nothing but a config.json; no weight is looked for."""
    (tmp_path / "config.json").write_text(MODEL.read_text())
    code, out, _ = plan("--json", *SOON, model=tmp_path)
    assert code == 0
    assert json.loads(out)["model"]["weight_bytes"] > 12e9


def test_without_a_hardware_file_this_machine_is_planned_for(capsys):
    """The tests name it in the environment, so that nothing is measured."""
    arguments = ["plan", "--model", str(MODEL), *JOB, "--json", *SOON]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["hardware"] == Hardware.load(os.environ["FLEXRUN_HARDWARE"]).name


def test_a_prompt_file_without_a_good_line_is_named(plan, checkpoint, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "this model has no tokenizer"}\n')
    code, _, error = plan("-i", prompts, "--dtype", "float32", model=checkpoint("llama"), job=())
    assert code == 2
    assert "holds no prompt that can be planned" in error


def test_a_policy_that_does_not_fit_is_refused_by_its_bytes(plan, tmp_path):
    path = tmp_path / "policy.json"
    path.write_text(Policy(sequences_in_flight=64, kv_tokens=10_000_000).to_json())
    code, _, error = plan("--policy", path)
    assert code == 2
    assert "the policy needs" in error and "kv" in error


def test_kv_goes_to_a_disk_that_has_room_for_it(plan):
    tight = ("--json", "--gpu-memory", "0", "--cpu-memory", "2GiB", "--fix", "tokens_per_pass=512")
    job = ("--num-prompts", "8", "--prompt-len", "1900", "--gen-len", "100", "--max-num-seqs", "8")
    code, _, error = plan(*tight, "--disk-memory", "14GiB", job=job)
    assert code == 2 and "short by" in error
    code, out, _ = plan(*tight, "--disk-memory", "200GiB", job=job)
    assert code == 0
    assert json.loads(out)["policy"]["kv"]["disk"] > 0


def test_features_of_a_later_version_are_planned_on_request(plan):
    hidden = ("--json", *SOON, "--fix", 'hidden={"gpu":0.5,"cpu":0.5,"disk":0}')
    code, out, _ = plan(*hidden, "--all-features")
    assert code == 0
    assert json.loads(out)["policy"]["hidden"]["cpu"] == 0.5


def test_a_plan_is_run_by_its_policy_file(plan, checkpoint, packed_cache, tmp_path):
    """flexrun plan -o FILE, then flexrun run --policy FILE: the run forecasts what the plan did."""
    prompts, policy, answers = (tmp_path / name for name in ("prompts.jsonl", "policy.json", "answers.jsonl"))
    prompts.write_text("".join(json.dumps({"prompt": [5, 6, 7 + row], "max_tokens": 4}) + "\n" for row in range(5)))
    model, budgets = checkpoint("llama"), ("--cpu-memory", "64MiB", "--gpu-memory", "0")
    code, out, _ = plan("-i", prompts, "--dtype", "float32", "-o", policy, "--json", *budgets, model=model, job=())
    assert code == 0
    told = json.loads(out)
    run = ["run", "--model", model, "-i", prompts, "-o", answers, "--policy", policy, "--dtype", "float32"]
    run += ["--cpu-memory", "64MiB", "--disk-dir", packed_cache, "--output-json", tmp_path / "summary.json"]
    code = main([str(word) for word in (*run, "--hardware", T4)])
    assert code == 0
    assert len(answers.read_text().splitlines()) == 5
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["engine"]["policy"] == told["policy"]
    assert summary["engine"]["forecast"]["planned"]["seconds"] == pytest.approx(told["forecast"]["seconds"])


def cpu_seconds() -> float:
    """Of this process and of the solver's: what a load on the machine does not change."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.mark.parametrize("model", ["opt-175b", "deepseek-r1", "qwen3-235b-a22b"])
def test_giants_are_planned_in_seconds(model):
    hardware, workload = Hardware.load(T4), Workload.uniform(1000, 512, 64)
    started = cpu_seconds()
    plan = search_plan(CONFIGS / "models" / f"{model}.json", hardware, workload)
    assert cpu_seconds() - started < 6.0
    assert plan.policy.weights.disk > 0
    assert plan.forecast.generated_tokens == 64_000
