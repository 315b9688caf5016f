"""FP8 and MXFP4 checkpoints end to end: the tokens of transformers on a plain checkpoint of the same values."""

from __future__ import annotations

import pytest
import torch
import transformers
from quantized_files import to_fp8, to_mxfp4
from tiny_families import EAGER, prompts

from flexrun import LLM, SamplingParams
from flexrun.config import Placement, Policy

GENERATED_TOKENS = 24
POLICY = Policy(
    sequences_in_flight=3,
    tokens_per_pass=20,
    attention_micro_batch=2,
    token_micro_batch=9,
    weights=Placement(cpu=0.5, disk=0.5),
)
FILES = {
    "deepseek_v2_dense": lambda *folders: to_fp8(*folders, block=(128, 128)),
    "deepseek_v3": lambda *folders: to_fp8(*folders, block=(16, 16)),
    "gpt_oss_whole_blocks": to_mxfp4,
    "qwen3": lambda *folders: to_fp8(*folders, block=(32, 8)),
}


@pytest.mark.usefixtures("matrices_move")
@pytest.mark.parametrize("name", FILES)
def test_greedy_tokens_equal_transformers(checkpoint, tmp_path, packed_cache, name):
    FILES[name](checkpoint(name), tmp_path / "quantised", tmp_path / "plain")
    oracle = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", **EAGER, dtype=torch.float32).eval()
    asked, greedy = prompts((5, 1, 23, 12)), SamplingParams(temperature=0, max_tokens=GENERATED_TOKENS, ignore_eos=True)
    options = {"dtype": "float32", "threads": 1, "cpu_memory": "256MiB", "disk_dir": packed_cache, "policy": POLICY}
    with LLM(tmp_path / "quantised", **options) as llm:
        outputs = llm.generate(asked, greedy, use_tqdm=False)
    for prompt, output in zip(asked, outputs, strict=True):
        answer = output.outputs[0].token_ids
        with torch.inference_mode():
            logits = oracle(torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        assert answer == logits.argmax(-1).tolist()
        assert len(set(answer)) > 3
