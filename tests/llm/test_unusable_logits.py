"""One prompt whose logits are NaN fails alone: the others' tokens are those of a run without it."""

import json
import math
import shutil

import pytest
from safetensors.torch import load_file, save_file

from flexrun import LLM, SamplingParams
from flexrun.errors import ExecutionError
from flexrun.jobs.runner import JobConfig, run_job
from flexrun.llm import open_model

BAD = 8  # the token whose embedding is NaN
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)


@pytest.fixture(scope="module")
def broken(checkpoint, tmp_path_factory):
    """broken(tokens) -> a checkpoint in which these tokens are NaN."""

    def make(*tokens):
        folder = tmp_path_factory.mktemp("broken") / "model"
        shutil.copytree(checkpoint("llama"), folder)
        weights = load_file(folder / "model.safetensors")
        assert "lm_head.weight" in weights  # of its own: the token alone is spoilt
        weights["model.embed_tokens.weight"][list(tokens)] = math.nan
        save_file(weights, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def open_broken(broken, tmp_path):
    opened = []

    def build(*tokens, **options):
        options = {"dtype": "float32", "threads": 1, "cpu_memory": "256MiB", "disk_dir": tmp_path, **options}
        opened.append(LLM(broken(*tokens), **options))
        return opened[-1]

    yield build
    for llm in opened:
        llm.close()


def prompts():
    good = [[10 + (11 * number + place) % 70 for place in range(3 + 7 * number % 23)] for number in range(14)]
    bad = [[20, BAD], [BAD, *range(30, 60)], [*range(40, 80), BAD, 11]]
    return [bad[0], *good[:6], bad[1], *good[6:], bad[2]], good


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 3}, {"max_num_seqs": 3, "gpu_memory": "64MiB"}])
def test_a_prompt_that_overflows_fails_alone(run, open_broken, options):
    mixed, good = prompts()
    expected = [output.outputs[0].token_ids for output in run("llama", good, GREEDY)]
    assert not any(BAD in tokens for tokens in expected)
    llm = open_broken(BAD, **options)
    outputs = llm.generate(mixed, GREEDY, use_tqdm=False)
    failed = [output for output in outputs if output.error is not None]
    assert [output.prompt_token_ids for output in failed] == [prompt for prompt in mixed if BAD in prompt]
    assert all(output.error.code == "unusable_logits" and "bfloat16" in output.error.hint for output in failed)
    assert [output.outputs[0].token_ids for output in outputs if output.error is None] == expected
    assert llm.summary()["generated_tokens"] == 9 * len(good)


def test_choices_and_scores_fail_with_their_request(open_broken):
    llm = open_broken(BAD)
    several = SamplingParams(temperature=0.8, max_tokens=4, n=3, logprobs=1, seed=5)
    bad, good = llm.generate([[5, BAD, 9], [5, 6, 9]], several, use_tqdm=False)
    assert bad.error.code == "unusable_logits" and len(good.outputs) == 3
    bad, good = llm.score([[5, 6, BAD, 9, 10], [5, 6, 7, 9, 10]], use_tqdm=False)
    assert bad.error.code == "unusable_logits" and good.error is None and len(good.token_logprobs) == 4


def test_a_model_that_fails_every_prompt_ends_the_run(open_broken):
    llm = open_broken(*range(90), max_num_seqs=3)
    with pytest.raises(ExecutionError, match="NaN or infinite logits") as caught:
        llm.generate([[5, number] for number in range(12)], GREEDY, use_tqdm=False)
    assert "checkpoint" in caught.value.hint


def test_a_job_goes_on_past_it_and_is_complete(broken, tmp_path):
    mixed, good = prompts()
    model, source, output = broken(BAD), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in mixed))
    options = {"disk_dir": tmp_path / "disk", "cpu_memory": "256MiB", "threads": 1, "max_num_seqs": 3}
    summary = run_job(
        JobConfig(str(source), str(output), "llama", GREEDY, progress=False),
        lambda: open_model(model, dtype="float32"),
        lambda files: LLM(files, **options),
    )
    assert (summary["requests"]["answered"], summary["requests"]["failed"]) == (len(good), 3)
    assert summary["errors"] == {"unusable_logits": 3}
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(records) == len(mixed)
