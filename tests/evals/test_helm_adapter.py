"""HELM's metrics on flexrun equal those on HELM's own Hugging Face client, instance by instance."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENTRIES = (
    "synthetic_reasoning:mode=pattern_match",
    "synthetic_reasoning_natural:difficulty=easy",
    "dyck_language:num_parenthesis_pairs=3",
    "mmlu:subject=anatomy,method=multiple_choice_separate_original",
)
METRICS = (
    "exact_match",
    "quasi_exact_match",
    "prefix_exact_match",
    "exact_match_indicator",
    "f1_set_match",
    "iou_set_match",
    "num_prompt_tokens",
    "num_output_tokens",
)
INSTANCES = 6


def stage_mmlu(output: Path) -> None:
    """A small subject in the CSV layout that HELM downloads."""
    for split, count in (("dev", 5), ("val", 2), ("test", 6), ("auxiliary_train", 2)):
        folder = output / "scenarios" / "mmlu" / "data" / split
        folder.mkdir(parents=True)
        with open(folder / f"anatomy_{split}.csv", "w", newline="") as file:
            for row in range(count):
                choices = [f"bone {row + choice}" for choice in range(4)]
                csv.writer(file).writerow([f"Which bone has the number {row}?", *choices, "ABCD"[row % 4]])


def runs_of(output: Path) -> dict[str, dict]:
    """By run entry: the states of its requests, and its statistics."""
    runs = {}
    for folder in sorted((output / "runs" / "s1").glob("*model=*")):
        name = folder.name.split("model=")[0].rstrip(",:")
        states = json.loads((folder / "scenario_state.json").read_text())["request_states"]
        runs[name] = {"states": states, "stats": json.loads((folder / "stats.json").read_text())}
    return runs


def check_printed(printed: list[dict], runs: dict[str, dict]) -> None:
    """What the command printed is what HELM wrote down."""
    assert len(printed) == len(ENTRIES)
    for row in printed:
        run = runs[row["name"].split("model=")[0].rstrip(",:")]
        assert row["engine"]["requests"] == len(run["states"]) and row["engine"]["seconds"] > 0
        tokens = sum(len(state["result"]["completions"][0]["tokens"]) for state in run["states"])
        assert row["engine"]["generated_tokens"] >= tokens or not run["states"][0]["request"]["max_tokens"]
        means = {
            stat["name"]["name"]: stat.get("mean")
            for stat in run["stats"]
            if stat["name"]["split"] == "test" and "perturbation" not in stat["name"]
        }
        assert row["metrics"] and all(means.get(name, value) == value for name, value in row["metrics"].items())
        assert "num_instances" not in row["metrics"]


@pytest.mark.slow
def test_metrics_equal_those_of_helms_hugging_face_client(python_with, bytes_model, run_offline, tmp_path):
    python = python_with("helm", "crfm-helm==0.5.16")
    found, printed = {}, []
    shared = ["--suite", "s1", "--max-eval-instances", str(INSTANCES)]
    for name in ("flexrun", "huggingface"):
        folder = tmp_path / name
        stage_mmlu(folder / "benchmark_output")
        if name == "flexrun":
            command = ["-m", "flexrun", "bench", "helm", *ENTRIES, "--model", str(bytes_model), *shared, "-o", "json"]
            command += ["--dtype", "float32", "--cpu-memory", "1GiB", "--cache-dir", str(tmp_path)]
            printed = json.loads(run_offline([python, *command], folder).stdout)
        else:
            command = ["-m", "helm.benchmark.run", "--enable-local-huggingface-models", str(bytes_model), *shared]
            command += ["-n", "1", "--disable-cache", "--run-entries"]
            command += [f"{entry},model=huggingface/bytes-llama" for entry in ENTRIES]
            run_offline([python, *command], folder)
        found[name] = runs_of(folder / "benchmark_output")
    check_printed(printed, found["flexrun"])
    assert len(found["flexrun"]) == len(ENTRIES) and found["flexrun"].keys() == found["huggingface"].keys()
    texts = set()
    for name, ours in found["flexrun"].items():
        theirs = found["huggingface"][name]
        assert len(ours["states"]) == len(theirs["states"]) >= 6
        for one, other in zip(ours["states"], theirs["states"]):
            assert one["request"]["prompt"] == other["request"]["prompt"]
            (mine,), (reference,) = one["result"]["completions"], other["result"]["completions"]
            assert mine["text"] == reference["text"]
            assert [token["text"] for token in mine["tokens"]] == [token["text"] for token in reference["tokens"]]
            texts.add(mine["text"])
            assert one["result"]["batch_size"] == len(ours["states"])
            if (
                one["request"]["max_tokens"] == 0
            ):  # its log-probabilities of generated tokens are of another temperature
                for token, expected in zip(mine["tokens"], reference["tokens"]):
                    assert abs(token["logprob"] - expected["logprob"]) < 1e-3
        pairs = {json.dumps(stat["name"], sort_keys=True): stat.get("mean") for stat in theirs["stats"]}
        compared = [stat for stat in ours["stats"] if stat["name"]["name"] in METRICS]
        assert compared
        for stat in compared:
            assert stat.get("mean") == pytest.approx(pairs[json.dumps(stat["name"], sort_keys=True)])
    assert len(texts) > 6


@pytest.mark.slow
def test_helm_run_itself_finds_the_model_through_the_entry_point(python_with, bytes_model, run_offline, tmp_path):
    """What setup.py says of the package lies beside it in the path, as if it were installed."""
    python = python_with("helm", "crfm-helm==0.5.16")
    subprocess.run(
        [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    settings = {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]),
        "FLEXRUN_HELM_MODELS": str(bytes_model),
        "FLEXRUN_HELM_OPTIONS": f"dtype=float32 cpu_memory=1GiB cache_dir={tmp_path}",
    }
    command = [python, "-m", "helm.benchmark.run", "--disable-cache"]
    command += ["--runner-class-name", "flexrun.evals.helm_adapter.WholeScenarioRunner", "--suite", "s1"]
    command += ["--max-eval-instances", "4", "--run-entries", f"{ENTRIES[0]},model=flexrun/{bytes_model.name}"]
    run_offline(command, tmp_path, settings)
    (run,) = runs_of(tmp_path / "benchmark_output").values()
    assert {state["result"]["batch_size"] for state in run["states"]} == {len(run["states"])}


@pytest.mark.slow
def test_greedy_completions_come_as_often_as_asked_for(python_with, bytes_model, run_offline, tmp_path):
    python = python_with("helm", "crfm-helm==0.5.16")
    program = f"""
from helm.common.request import Request
from flexrun.evals.helm_adapter import FlexrunClient
client = FlexrunClient({str(bytes_model)!r}, dtype="float32", cpu_memory="1GiB", cache_dir={str(tmp_path)!r})
ask = dict(model="flexrun/m", model_deployment="flexrun/m", prompt="The bone", max_tokens=4)
results = client.make_requests([Request(**ask, temperature=0, num_completions=3),
                                Request(**ask, temperature=1.0, num_completions=2, random="1")])
print([[completion.text for completion in result.completions] for result in results])
"""
    greedy, drawn = eval(run_offline([python, "-c", program], tmp_path).stdout.splitlines()[-1])
    assert len(greedy) == 3 and len(set(greedy)) == 1 and len(drawn) == 2
