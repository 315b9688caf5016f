"""Every family against transformers on the same random checkpoint: the same tokens, the same logits."""

from __future__ import annotations

import copy

import pytest
import torch
from reference_runner import ReferenceRunner
from tiny_families import ALL, VOCABULARY, prompts

from flexrun.models.families import spec_from_config

GENERATED_TOKENS = 64
LENGTH_DEPENDENT = {"rope_dynamic"}  # transformers itself answers differently with and without a cache


def oracle_logits(model, token_ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].float()


def oracle_greedy(model, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=tokens,
        eos_token_id=VOCABULARY,  # never generated
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return result.sequences[0, len(prompt) :].tolist(), torch.cat(result.logits)


@pytest.mark.parametrize("name", ALL)
def test_same_tokens_and_logits_as_transformers(tiny, name):
    config, tensors, model = tiny(name)
    spec = spec_from_config(config)
    asked = prompts((5, 1, 23))
    runner = ReferenceRunner(spec, tensors, max_positions=96)
    generated, logits = runner.generate(asked, GENERATED_TOKENS)

    tokens, step_logits = oracle_greedy(model, asked[0], GENERATED_TOKENS)
    assert generated[0] == tokens
    torch.testing.assert_close(logits[0][len(asked[0]) - 1 :], step_logits, atol=1e-4, rtol=0)
    assert len(set(tokens)) > 3, "a degenerate checkpoint tests nothing"

    if name in LENGTH_DEPENDENT:
        return
    for prompt, answer, scores in zip(asked, generated, logits, strict=True):
        expected = oracle_logits(model, (prompt + answer)[:-1])
        torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
        assert answer == expected[len(prompt) - 1 :].argmax(dim=-1).tolist()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "name",
    ["llama", "gemma3", "gpt_neox", "opt_350m", "granite", "olmo2", "mixtral", "granitemoe", "deepseek_v3_dense"],
)
def test_half_precision_is_as_close_to_float32_as_transformers_is(tiny, name, dtype):
    config, tensors, model = tiny(name)
    (prompt,) = prompts((40,))
    exact = oracle_logits(model, prompt)
    half = copy.deepcopy(model).to(getattr(torch, dtype))
    oracle_error = (oracle_logits(half, prompt) - exact).square().mean().sqrt()
    runner = ReferenceRunner(spec_from_config(config, dtype), tensors, max_positions=64)
    (logits,) = runner.run([[]], [prompt])
    assert logits.dtype == torch.float32
    assert (logits - exact).square().mean().sqrt() < 1.25 * oracle_error


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "gpt_neox", "opt_350m", "olmo2", "qwen2_moe", "glm4_moe", "deepseek_v2_dense"]
)
def test_row_slices_and_prompt_chunks_change_nothing(tiny, name):
    config, tensors, _ = tiny(name)
    spec = spec_from_config(config)
    asked = prompts((9, 17))
    (whole, _) = ReferenceRunner(spec, tensors, 64).run([[], []], asked)
    sliced = ReferenceRunner(spec, tensors, 64, rows_per_call=4)
    caches = [[], []]
    first, _ = sliced.run(caches, [asked[0][:3], asked[1][:12]])
    second, _ = sliced.run(caches, [asked[0][3:], asked[1][12:]])
    torch.testing.assert_close(torch.cat([first, second]), whole, atol=2e-5, rtol=0)
