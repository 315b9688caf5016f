"""Benchmarks measure what they say: whole cells, warm, beside the plan's forecast, in three forms."""

from __future__ import annotations

import csv
import io
import json

import pytest
from tiny_families import save_checkpoint

from flexrun.cli import main
from flexrun.errors import ConfigError
from flexrun.evals.throughput import HELM_SHAPES, Cell, helm_suite, measure, render, sweep
from flexrun.llm import LLM


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_checkpoint("llama", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def llm(tiny, tmp_path_factory):
    with LLM(tiny, dtype="float32", threads=1, cpu_memory="256MiB", cache_dir=tmp_path_factory.mktemp("c")) as llm:
        yield llm


def test_prompts_share_their_beginning_and_nothing_else():
    first, second = (Cell("x", 6, 20, 3, shared_tokens=8).requests(97, seed) for seed in (1, 2))
    assert len({tuple(request.token_ids[:8]) for request in first}) == 1
    assert len({tuple(request.token_ids[8:]) for request in [*first, *second]}) == 12
    assert all(len(request.token_ids) == 20 and request.params.max_tokens == 3 for request in first)


def test_a_cell_runs_its_repetitions_and_counts_only_them(llm):
    cells = sweep(5, [6, 12], [1, 4])
    passes = []
    results = list(
        measure(llm, cells, repetitions=2, warmup=1, on_pass=lambda prompt, made: passes.append((prompt, made)))
    )
    assert [result.cell.name for result in results] == ["6+1", "6+4", "12+1", "12+4"]
    assert sum(prompt for prompt, _ in passes) == 3 * 5 * (6 + 6 + 12 + 12)
    assert sum(made for _, made in passes) == 3 * 5 * (1 + 4 + 1 + 4)
    for result in results:
        assert result.seconds > 0 and result.forecast_seconds > 0 and result.share_of_bound > 0
        assert result.requests_per_second == pytest.approx(5 / result.seconds)
        generated = result.requests_per_second * result.cell.output_tokens
        assert result.total_per_second == pytest.approx(generated + 5 * result.cell.prompt_tokens / result.seconds)
        assert (result.decode_per_second > 0) is (result.cell.output_tokens > 1)


def test_each_cell_has_its_own_plan_and_forecast(llm):
    large, small = measure(llm, [Cell("large", 40, 30, 6), Cell("small", 2, 5, 2)], repetitions=1, warmup=0)
    assert small.sequences_in_flight == 2 and small.forecast_seconds < large.forecast_seconds


def test_one_table_in_three_forms(llm):
    results = list(measure(llm, sweep(2, [4], [2, 3]), repetitions=1, warmup=0))
    assert [row["cell"]["output_tokens"] for row in json.loads(render(results, "json"))] == [2, 3]
    rows = list(csv.DictReader(io.StringIO(render(results, "csv"))))
    assert [row["name"] for row in rows] == ["4+2", "4+3"]
    assert [float(row["seconds"]) for row in rows] == [result.seconds for result in results]  # figures, not words
    table = render(results, "md").splitlines()
    assert len(table) == 4 and all(line.count("|") == table[0].count("|") for line in table)


def test_a_cell_longer_than_the_context_is_refused_before_anything_runs(llm):
    with pytest.raises(ConfigError, match="more than the context"):
        list(measure(llm, [Cell("x", 1, llm.max_model_len, 1)]))


def test_the_suite_has_the_papers_shapes():
    assert len(HELM_SHAPES) == 7 and sum(cell.prompts for cell in HELM_SHAPES) == 9488
    assert [cell.prompts for cell in helm_suite(0.01)] == [3, 26, 9, 10, 16, 16, 16]


def test_the_command_prints_a_table(tiny, tmp_path, capsys):
    flags = ["--dtype", "float32", "--threads", "1", "--cpu-memory", "256MiB", "--cache-dir", str(tmp_path)]
    sizes = ["--prompt-len", "4,8", "--gen-len", "2", "--num-prompts", "3", "--repetitions", "1", "--warmup", "0"]
    assert main(["bench", "--model", str(tiny), *sizes, *flags, "-o", "csv"]) == 0
    out, err = capsys.readouterr()
    assert [row["name"] for row in csv.DictReader(io.StringIO(out))] == ["4+2", "8+2"]
    assert "forecast" in err and "all 2 workloads: " in err
    assert main(["bench", "--model", str(tiny), "--prompt-len", "4,x", *flags]) == 2
    assert main(["bench", "--model", str(tiny), "--share", "2", *flags]) == 2
