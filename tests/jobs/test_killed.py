"""A real job killed at any moment, again and again: every line answered once, nothing different, little done twice."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal

import pytest

from flexrun.jobs.runner import JobConfig, run_job
from flexrun.jobs.token_log import KEY_BYTES, MAGIC, TokenLog

KILLS = 30


def work(model: str, folder: str, packed: str, resume: bool) -> None:
    """One life of the job, in a process of its own."""
    import torch

    from flexrun.config import Policy
    from flexrun.llm import LLM, open_model
    from flexrun.sampling import SamplingParams

    torch.set_num_threads(1)
    policy = Policy(sequences_in_flight=8, tokens_per_pass=32, attention_micro_batch=8)  # a search takes longer
    config = JobConfig(
        f"{folder}/in.jsonl",
        f"{folder}/out.jsonl",
        "tiny",
        SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True),
        resume=resume,
        progress=False,
    )

    def build(files):
        return LLM(files, threads=1, cpu_memory="256MiB", disk_dir=packed, policy=policy)

    with open(f"{folder}/log.txt", "a") as log:
        run_job(config, lambda: open_model(model, dtype="float32"), build, log)


@pytest.fixture(scope="module")
def process():
    """process(*arguments of work) -> a started process; the server it is forked from has imported all there is."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "flexrun.llm.llm", "flexrun.jobs.runner", "scipy.optimize"])

    def start(*arguments):
        child = context.Process(target=work, args=arguments)
        child.start()
        return child

    return start


def texts_of(path) -> dict[str, list[int]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    texts = {record["custom_id"]: record["response"]["body"]["choices"][0]["token_ids"] for record in records}
    assert len(texts) == len(records), "a line was answered twice"
    return texts


def kept_tokens(folder) -> int:
    """Tokens that a resume need not generate: in whole records, and in the log of what is under way."""
    tokens, done = 0, set()
    for raw in (folder / "out.jsonl").read_bytes().split(b"\n")[:-1]:
        record = json.loads(raw)
        done.add(int(record["id"].rsplit("_", 1)[1]))
        tokens += record["response"]["body"]["usage"]["completion_tokens"]
    log = folder / "out.jsonl.tokens"
    if log.exists():
        partial = TokenLog(log, log.read_bytes()[len(MAGIC) : len(MAGIC) + KEY_BYTES]).read()
        tokens += sum(len(row) for line, rows in partial.items() if line not in done for row in rows.values())
    return tokens


@pytest.mark.slow
def test_a_job_killed_thirty_times_ends_with_every_answer_once(checkpoint, packed_cache, process, tmp_path):
    moments, kills, expected = random.Random(3), 0, None
    model, round_number = str(checkpoint("llama")), 0
    lines = [
        json.dumps(
            {
                "prompt_token_ids": [5 + number % 80, 6, 7 + number % 50],
                "custom_id": f"id-{number}",
                "return_token_ids": True,
            }
        )
        for number in range(32)
    ]
    while kills < KILLS or expected is None:
        folder = tmp_path / str(round_number)
        folder.mkdir()
        (folder / "in.jsonl").write_text("\n".join(lines) + "\n")
        round_number, resume, kept = round_number + 1, False, 0
        while True:
            child = process(model, str(folder), str(packed_cache), resume)
            may_kill = expected is not None and kills < KILLS
            child.join(moments.uniform(0.02, 0.6) if may_kill else 120)
            if child.exitcode is None:
                assert may_kill, "the job hangs"
                os.kill(child.pid, signal.SIGKILL)
                child.join()
                kills += 1
                if (folder / "out.jsonl.manifest.json").exists():
                    resume = True
                    assert kept_tokens(folder) >= kept, "tokens that had been kept are lost"
                    kept = kept_tokens(folder)
                continue
            assert child.exitcode == 0, (folder / "log.txt").read_text()
            break
        texts = texts_of(folder / "out.jsonl")
        assert len(texts) == len(lines) and not (folder / "out.jsonl.tokens").exists()
        expected = expected or texts
        assert texts == expected
