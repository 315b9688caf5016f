"""HELM's metrics on flexrun equal those on HELM's own Hugging Face client, instance by instance."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

ENTRIES = (
    "synthetic_reasoning:mode=pattern_match",
    "mmlu:subject=anatomy,method=multiple_choice_separate_original",
)
METRICS = ("exact_match", "quasi_exact_match", "prefix_exact_match", "num_prompt_tokens", "num_output_tokens")


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


@pytest.mark.slow
def test_metrics_equal_those_of_helms_hugging_face_client(python_with, bytes_model, run_offline, tmp_path):
    python = python_with("helm", "crfm-helm==0.5.16")
    found = {}
    shared = ["--suite", "s1", "--max-eval-instances", "6", "-n", "1", "--run-entries"]
    for name in ("flexrun", "huggingface"):
        folder = tmp_path / name
        stage_mmlu(folder / "benchmark_output")
        if name == "flexrun":
            command = ["-m", "flexrun.evals.helm_adapter", "--model", str(bytes_model), *shared, *ENTRIES]
            command += ["--llm", "dtype=float32", "cpu_memory=1GiB", f"cache_dir={tmp_path}"]
        else:
            command = ["-m", "helm.benchmark.run", "--enable-local-huggingface-models", str(bytes_model), *shared]
            command += [f"{entry},model=huggingface/bytes-llama" for entry in ENTRIES]
            command += ["--disable-cache"]
        run_offline([python, *command], folder)
        found[name] = runs_of(folder / "benchmark_output")
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
