"""flexrun run with KV cache on disk: whatever ends it, answers stay, nothing else does, and --resume goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_families import prompts

from flexrun.cli import main

POLICY = {
    "sequences_in_flight": 4,
    "tokens_per_pass": 60,
    "attention_micro_batch": 2,
    "weights": {"gpu": 0.0, "cpu": 1.0, "disk": 0.0},
    "kv": {"gpu": 0.0, "cpu": 0.0, "disk": 1.0},
}


@pytest.fixture
def job(checkpoint, tmp_path):
    """job(output, flags...) -> words of a flexrun run whose lines take 2 to 30 passes; its disk folder is disk/."""
    prompts_file, policy = tmp_path / "prompts.jsonl", tmp_path / "policy.json"
    lines = [
        {"prompt": ids, "max_tokens": 2 + 4 * number, "ignore_eos": True}
        for number, ids in enumerate(prompts((9,) * 8))
    ]
    prompts_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    policy.write_text(json.dumps(POLICY))

    def words(output: str, *flags) -> list[str]:
        run = ["run", "--model", checkpoint("llama"), "-i", prompts_file, "-o", tmp_path / output, "--policy", policy]
        run += ["--dtype", "float32", "--cpu-memory", "64MiB", "--disk-dir", tmp_path / "disk", "--order", "input"]
        return [str(word) for word in (*run, "--threads", 1, "--return-token-ids", *flags)]

    return words


def test_a_disk_too_small_is_told_before_the_run(job, tmp_path, capsys):
    assert main(job("answers.jsonl", "--disk-memory", "300KiB")) == 2
    told = capsys.readouterr().err
    assert "of disk memory (weights" in told and "budget is 300.0 KiB" in told
    assert not (tmp_path / "answers.jsonl").exists()


def test_a_killed_run_leaves_weights_and_answers_and_nothing_else(job, tmp_path):
    """Slow lanes, so that the run is in the middle of its KV cache when it is killed."""
    slow = {**os.environ, "FLEXRUN_LANE_BANDWIDTHS": "disk_read=200KB,disk_write=20KB"}
    command = [sys.executable, "-m", "flexrun", *job("killed.jsonl")]
    child = subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    answers = tmp_path / "killed.jsonl"
    try:
        deadline = time.monotonic() + 60
        while not (answers.exists() and answers.read_text().count("\n")) and time.monotonic() < deadline:
            assert child.poll() is None, child.stderr.read()
            time.sleep(0.02)
        held = [os.readlink(f"/proc/{child.pid}/fd/{name}") for name in os.listdir(f"/proc/{child.pid}/fd")]
        assert any(path.startswith(str(tmp_path / "disk")) and "deleted" in path for path in held), "the KV cache"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    assert child.returncode == -signal.SIGKILL
    kept = answers.read_text().splitlines()
    assert 1 <= len(kept) < 8
    files = {path.suffix or path.name for path in (tmp_path / "disk").rglob("*") if path.is_file()}
    assert files == {".bin", ".json", ".lock"}, "packed weights alone"
    assert main(job("killed.jsonl", "--resume")) == 0
    assert answers.read_text().count("\n") == 8
