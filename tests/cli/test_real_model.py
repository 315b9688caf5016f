"""``flexrun run`` over a real engine: a tiny random checkpoint, prompts as token ids, a kill, a resume."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from flexrun import LLM, SamplingParams
from flexrun.cli import main

PROMPTS = [[(7 * number + position) % 90 for position in range(3 + 5 * number % 17)] for number in range(24)]


@pytest.fixture
def job(tmp_path, checkpoint):
    """(input file, output file, flags) of a job over the tiny Llama."""
    source = tmp_path / "in.jsonl"
    lines = [{"prompt": prompt, "custom_id": f"id-{number}"} for number, prompt in enumerate(PROMPTS)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out.jsonl"
    flags = ["run", "--model", str(checkpoint("llama")), "-i", str(source), "-o", str(output), "--return-token-ids"]
    flags += ["--cache-dir", str(tmp_path / "cache"), "--max-tokens", "12", "--ignore-eos", "--threads", "1"]
    return source, output, flags


def answers(path):
    records = [json.loads(line) for line in path.read_text().splitlines()]
    found = {record["custom_id"]: record["response"]["body"]["choices"][0]["token_ids"] for record in records}
    assert len(found) == len(records)
    return found


def test_the_command_and_the_python_face_agree(job, checkpoint, tmp_path, capsys):
    _, output, flags = job
    assert main([*flags, "--dtype", "float32", "--output-json", "-"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["generated_tokens"] == summary["engine"]["generated_tokens"] == 12 * len(PROMPTS)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(checkpoint("llama"), dtype="float32", cache_dir=tmp_path / "cache", threads=1) as llm:
        expected = llm.generate(PROMPTS, params, use_tqdm=False)
    assert answers(output) == {f"id-{number}": out.outputs[0].token_ids for number, out in enumerate(expected)}


def test_bad_lines_and_logprobs_over_the_real_engine(job):
    source, output, flags = job
    source.write_text(
        '{"prompt": [1, 2, 3], "logprobs": 2, "max_tokens": 3}\n'
        '{"prompt": [1, 100000]}\n'
        '{"prompt": "text without a tokenizer"}\n'
    )
    assert main(flags) == 1
    records = {record["custom_id"]: record for record in map(json.loads, output.read_text().splitlines())}
    assert records["line-2"]["error"]["code"] == "invalid_token_id"
    assert records["line-3"]["error"]["code"] == "no_tokenizer"
    logprobs = records["line-1"]["response"]["body"]["choices"][0]["logprobs"]
    assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs")] == [3, 3, 3]
    for chosen, top in zip(logprobs["token_logprobs"], logprobs["top_logprobs"]):
        assert chosen == max(top.values()) and len(top) == 2  # greedy


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_stopped_job_resumes_to_the_same_tokens(job, number, code):
    _, output, flags = job
    # One sequence at a time and long answers: there is time to stop in the middle.
    flags += ["--max-num-seqs", "1", "--max-tokens", "40"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flexrun", *flags], stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(number)
    _, words = process.communicate(timeout=60)
    assert process.returncode == code, words.decode()
    before = answers(output)
    assert 0 < len(before) < len(PROMPTS)
    if code == 130:
        assert b"--resume" in words
    assert main([*flags, "--resume"]) == 0
    after = answers(output)
    assert len(after) == len(PROMPTS) and before.items() <= after.items()
    assert main([*flags, "--overwrite"]) == 0
    assert answers(output) == after


def test_a_job_whose_terminal_is_closed_stops_in_order(job):
    _, output, flags = job
    flags += ["--max-num-seqs", "1", "--max-tokens", "40"]
    ours, terminal = os.openpty()
    owning = (
        "import fcntl, sys, termios; from flexrun.cli import main\n"
        "fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.exit(main(sys.argv[1:]))"
    )
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    process = subprocess.Popen([sys.executable, "-c", owning, *flags], **streams, start_new_session=True)
    os.close(terminal)
    deadline = time.monotonic() + 60
    while not (output.exists() and output.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.002)
    os.close(ours)
    assert process.wait(timeout=60) == 130
    before = answers(output)
    assert 0 < len(before) < len(PROMPTS) and not output.with_name("out.jsonl.lock").exists()
    assert main([*flags, "--resume"]) == 0
    assert len(answers(output)) == len(PROMPTS) and before.items() <= answers(output).items()
