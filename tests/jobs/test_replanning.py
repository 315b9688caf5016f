"""Whole jobs on a real engine that change their plan in the middle: same answers, and totals of all of it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from flexrun import LLM, SamplingParams
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.llm import open_model, replanning

HARDWARE = Path(__file__).parents[2] / "configs" / "hardware" / "laptop-cpu.json"
LIMIT = 40


@pytest.fixture(scope="module")
def lines(checkpoint, packed_cache):
    """Most answers end after a few tokens, by a stop token of their own; some go to the limit."""
    draw = random.Random(4)
    header = [draw.randrange(3, 90) for _ in range(30)]
    prompts = [header * (number % 2) + [draw.randrange(3, 90) for _ in range(5)] for number in range(80)]
    free = SamplingParams(temperature=0.0, max_tokens=LIMIT, ignore_eos=True)
    with LLM(checkpoint("llama"), dtype="float32", disk_dir=packed_cache, cpu_memory="256MiB", threads=1) as llm:
        answers = [output.outputs[0].token_ids for output in llm.generate(prompts, free, use_tqdm=False)]
    return [
        {"prompt": prompt, "custom_id": f"id-{row}", "stop_token_ids": answer[row % 7 : row % 7 + 1] * (row % 20 != 3)}
        for row, (prompt, answer) in enumerate(zip(prompts, answers))
    ]


@pytest.fixture
def answer(tmp_path, checkpoint, packed_cache, lines):
    """answer(name) -> (token ids by custom_id, summary)."""
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = {"disk_dir": packed_cache, "cpu_memory": "256MiB", "threads": 1, "max_num_seqs": 6}

    def answer(name):
        config = JobConfig(
            str(tmp_path / "in.jsonl"),
            str(tmp_path / name),
            "llama",
            SamplingParams(temperature=0.0, max_tokens=LIMIT, ignore_eos=True),
            return_token_ids=True,
            progress=False,
            report_dir=str(tmp_path / "report"),
        )
        summary = run_job(
            config,
            lambda: open_model(checkpoint("llama"), dtype="float32"),
            lambda files: LLM(files, hardware=HARDWARE, **options),
        )
        records = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        return {
            record["custom_id"]: record["response"]["body"]["choices"][0]["token_ids"] for record in records
        }, summary

    return answer


def test_a_job_that_changes_its_plan_has_the_same_answers_and_whole_totals(answer, lines, monkeypatch, capsys):
    expected, steady = answer("steady.jsonl")
    said = capsys.readouterr().err
    assert "another plan" not in said and steady["engine"]["paused_sequences"] == 0  # too short to be worth it
    monkeypatch.setattr(replanning, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(replanning, "WORTH", 1e9)
    found, changed = answer("changed.jsonl")
    assert "48 lines are left; by the answers so far another plan" in capsys.readouterr().err
    assert found == expected and len(found) == len(lines)
    engine = changed["engine"]
    assert engine["generated_tokens"] == steady["engine"]["generated_tokens"]
    assert engine["prompt_tokens"] > steady["engine"]["prompt_tokens"]  # what was under way is prefilled again
    assert engine["passes"] > 10 and engine["lanes"]["cpu"]["busy_seconds"] > 0
    assert engine["forecast"]["planned"]["generated_tokens"] == LIMIT * len(lines)
    assert engine["forecast"]["as_it_came"]["generated_tokens"] == engine["generated_tokens"]
    assert engine["seconds"] == pytest.approx(changed["run_seconds"], rel=0.7)
