"""HELM's statistics as a few metrics, and runs as tables, without HELM."""

from __future__ import annotations

import csv
import io
import json

import pytest

from flexrun.cli import main
from flexrun.evals.helm_results import Execution, HelmRun, metrics_of, render


def stat(name, mean, split="test", **more):
    return {"name": {"name": name, "split": split, **more}, "mean": mean}


def test_metrics_are_those_of_unperturbed_test_instances():
    stats = [
        stat("exact_match", 0.5),
        stat("exact_match", 0.9, "valid"),
        stat("exact_match", 0.1, perturbation={"name": "robustness"}),
        stat("f1", 0.25, "valid"),
        stat("num_output_tokens", 7.0),
        stat("inference_runtime", 3.0),
        stat("training_co2_cost", None),
        stat("empty", None),
        stat("exact_match", 0.7, "train"),
    ]
    assert metrics_of(stats) == {"exact_match": 0.5, "f1": 0.25}


RUNS = [
    HelmRun("a:mode=x,model=m", Execution(20, 4.0, 1000, 100), {"exact_match": 0.5}),
    HelmRun("b", Execution(1, 2.0, 10, 0), {}),
]


def test_a_table_in_three_forms():
    heads, rule, first, second = render(RUNS, "md").splitlines()
    assert heads.count("|") == rule.count("|") == second.count("|")
    assert "| 20 | 4.00 | 5.00 | 25.0 | 275.0 | exact_match 0.500 |" in first
    rows = list(csv.DictReader(io.StringIO(render(RUNS, "csv"))))
    assert [row["requests/s"] for row in rows] == ["5.00", "0.50"]
    found = json.loads(render(RUNS, "json"))
    assert found[0]["engine"]["prompt_tokens"] == 1000 and found[0]["metrics"] == {"exact_match": 0.5}


def test_the_command_wants_entries_and_refuses_none(capsys):
    assert main(["bench", "helm", "--model", "m"]) == 2
    assert "ENTRY" in capsys.readouterr().err
    assert main(["bench", "helm", "x", "--model", "m", "--max-eval-instances", "0"]) == 2
    assert "at least 1" in capsys.readouterr().err


def test_without_helm_the_remedy_is_named(capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "helm", None)
    if main(["bench", "helm", "x", "--model", "m"]) == 2:
        assert "pip install 'flexrun[helm]'" in capsys.readouterr().err
    else:
        pytest.fail("it ran without HELM")


def test_the_entry_point_is_light_until_a_model_is_named(monkeypatch):
    import importlib
    import sys

    monkeypatch.delenv("FLEXRUN_HELM_MODELS", raising=False)
    sys.modules.pop("flexrun.evals.helm_plugin", None)
    assert importlib.import_module("flexrun.evals.helm_plugin").MODELS == []
