"""flexrun run finds what the lines of a file begin with in common, says what that spared, and answers as without."""

from __future__ import annotations

import json

import pytest
from tiny_families import prompts

from flexrun.cli import main

LINES = 12


@pytest.fixture
def job(checkpoint, tmp_path):
    """job(output, flags...) -> words of a flexrun run over lines with a header of 40 tokens, two choices of each."""
    header, *questions = prompts((40, *range(5, 5 + LINES)))
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": header + ids, "max_tokens": 4, "n": 2, "temperature": 1.0, "seed": 3} for ids in questions]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken\n")

    def words(output: str, *flags) -> list[str]:
        run = ["run", "--model", checkpoint("llama"), "-i", file, "-o", tmp_path / output, "--ignore-eos"]
        run += ["--dtype", "float32", "--cpu-memory", "64MiB", "--disk-dir", tmp_path / "disk", "--threads", 1]
        return [str(word) for word in (*run, "--return-token-ids", *flags)]

    return words


def answers(path) -> dict[str, list]:
    records = map(json.loads, path.read_text().splitlines())
    bodies = {record["custom_id"]: record.get("response") for record in records}
    return {
        name: [choice["token_ids"] for choice in response["body"]["choices"]]
        for name, response in bodies.items()
        if response
    }


def test_a_header_is_run_once_and_the_answers_are_the_same(job, tmp_path, capsys):
    shared, apart = tmp_path / "shared.json", tmp_path / "apart.json"
    assert main(job("shared.jsonl", "--output-json", str(shared))) == 1  # one line is broken
    told = capsys.readouterr().err
    assert main(job("apart.jsonl", "--no-shared-prefixes", "--output-json", str(apart))) == 1
    assert "shared prefixes" in told and "shared prefixes" not in capsys.readouterr().err
    assert answers(tmp_path / "shared.jsonl") == answers(tmp_path / "apart.jsonl")
    assert len(answers(tmp_path / "shared.jsonl")) == LINES
    engines = [json.loads(path.read_text())["engine"] for path in (shared, apart)]
    run, spared = engines[0]["prompt_tokens"], engines[0]["shared_prefixes"]["spared_prompt_tokens"]
    assert run + spared == engines[1]["prompt_tokens"] == 2 * sum(range(45, 45 + LINES))
    own = sum(range(5, 5 + LINES))
    assert run <= 40 + 2 * own and f"{spared:,} of {run + spared:,} prompt tokens not prefilled" in told
    assert engines[0]["forecast"]["as_it_came"]["prompt_tokens"] == run


def test_a_resumed_job_shares_what_is_left(job, tmp_path):
    whole, left = tmp_path / "whole.jsonl", tmp_path / "left.jsonl"
    main(job("whole.jsonl"))
    main(job("left.jsonl"))
    kept = left.read_text().splitlines(keepends=True)
    left.write_text("".join(kept[:5]))
    summary = tmp_path / "left.json"
    main(job("left.jsonl", "--resume", "--output-json", str(summary)))
    assert answers(left) == answers(whole)
    assert json.loads(summary.read_text())["engine"]["shared_prefixes"]["prefixes"] > 0
