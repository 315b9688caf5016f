"""Numerics of an accelerator: its attention and its decoder against float64, and the same tokens under every policy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
import torch
from torch import Tensor

from flexrun import LLM, SamplingParams
from flexrun.attention import Segments, attend
from flexrun.config import Placement, Policy
from flexrun.llm import open_model
from flexrun.models import decoder
from flexrun.models.rope import Rotary, rope_tables
from flexrun.models.spec import ModelSpec

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}  # of the largest value of the result
TIE_MARGIN = 1e-4  # log-probabilities closer than this may change places by rounding

# (query heads, KV heads, head_dim, window, softcap)
FORMS = (
    (8, 8, 64, 0, 0.0),
    (8, 8, 80, 0, 0.0),
    (8, 2, 128, 0, 0.0),
    (12, 4, 96, 0, 0.0),
    (4, 2, 256, 0, 0.0),
    (8, 2, 64, 37, 0.0),
    (8, 4, 128, 0, 30.0),
)
QUERY_LENS = (1, 1, 1, 9, 1, 64, 1)
KV_LENS = (1, 33, 700, 9, 257, 130, 64)


@dataclass(frozen=True)
class Check:
    """One comparison. error: the largest difference, as a share of the largest value."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance


def attention_reference(query, keys, values, segments: Segments, scale, window, softcap) -> tuple[Tensor, Tensor]:
    """(out, lse) by definition, in float64."""
    out = torch.zeros(query.shape, dtype=torch.float64)
    lse = torch.full(query.shape[:2], -math.inf, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    keys, values = (slab.double().repeat_interleave(group, dim=1) for slab in (keys, values))
    for (query_start, query_len, kv_start, kv_len), first in zip(segments.rows, segments.query_position.tolist()):
        rows, kv_rows = slice(query_start, query_start + query_len), slice(kv_start, kv_start + kv_len)
        position, seen = torch.arange(first, first + query_len)[:, None], torch.arange(kv_len)
        visible = (seen <= position) & (seen > position - (window or 1 << 40))
        scores = torch.einsum("qhd,khd->hqk", query[rows].double(), keys[kv_rows]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -math.inf)
        lse[rows] = scores.logsumexp(-1).T
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[kv_rows])
    return out, lse


def attention_checks(place: torch.device) -> Iterator[Check]:
    """Ragged decode and prefill rows in one call, over a slab that holds other sequences too; and its log-sum-exp."""
    generator = torch.Generator().manual_seed(0)
    query_start = numpy.cumsum([0, *QUERY_LENS[:-1]])
    kv_start = numpy.cumsum([5, *(length + 3 for length in KV_LENS[:-1])])
    segments = Segments(query_start, QUERY_LENS, kv_start, KV_LENS)
    for dtype, (heads, kv_heads, head_dim, window, softcap) in itertools.product(TOLERANCE, FORMS):
        query = torch.randn(segments.query_end, heads, head_dim, generator=generator).to(dtype)
        slab = torch.randn(2, segments.kv_end + 7, kv_heads, head_dim, generator=generator).to(dtype)
        form = {"scale": head_dim**-0.5, "window": window, "softcap": softcap}
        expected, expected_lse = attention_reference(query, slab[0], slab[1], segments, *form.values())
        query, slab = query.to(place), slab.to(place)
        name = f"attention {str(dtype)[6:]}, {heads}:{kv_heads} heads of {head_dim}"
        name += f", window {window}" * bool(window) + f", softcap {softcap:g}" * bool(softcap)
        # Segments keep their tables on the device: a new object for every form
        segments = Segments(query_start, QUERY_LENS, kv_start, KV_LENS)
        out = torch.empty_like(query)
        attend(query, slab[0], slab[1], segments, **form, out=out)
        yield Check(name, _difference(out, expected), TOLERANCE[dtype])
        out, lse = torch.empty_like(query), torch.empty(query.shape[:2], device=place)
        attend(query, slab[0], slab[1], segments, **form, out=out, lse=lse)
        error = max(_difference(out, expected), _difference(lse, expected_lse))
        yield Check(f"{name}, with log-sum-exp", error, TOLERANCE[dtype])


def decoder_checks(model: Path, place: torch.device) -> Iterator[Check]:
    """One layer and the head of a checkpoint's shape, random weights, on the device against float64 on the CPU."""
    with closing(open_model(model, dtype="float32")) as files:
        spec = files.spec
    generator = torch.Generator().manual_seed(1)
    tensors = {each.name: each.shape for each in (*spec.layer_tensors(0), *spec.head_tensors())}
    if spec.tie_word_embeddings:
        tensors["lm_head.weight"] = (spec.vocab_size, spec.embedding_size)
    weights = {name: _weight(name, shape, generator) for name, shape in tensors.items()}
    hidden = torch.randn(50, spec.hidden_size, generator=generator)
    rotary = rope_tables(spec, 512).gather(torch.arange(400, 450))
    for dtype, tolerance in TOLERANCE.items():
        rounded = {name: weight.to(dtype) for name, weight in weights.items()}
        wide = {name: weight.double() for name, weight in rounded.items()}
        expected = _layer(spec, wide, hidden.to(dtype).double(), rotary)
        on_device = {name: weight.to(place) for name, weight in rounded.items()}
        there = Rotary(*(tuple(each.to(place) for each in part) for part in (rotary.cos, rotary.sin)))
        found = _layer(spec, on_device, hidden.to(dtype).to(place), there)
        for name, result in found.items():
            yield Check(
                f"{spec.architecture} {name} {str(dtype)[6:]}", _difference(result, expected[name]), 2 * tolerance
            )


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if "norm" in name:
        return 1 + 0.1 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)


def _layer(spec: ModelSpec, weights: dict[str, Tensor], hidden: Tensor, rotary: Rotary) -> dict[str, Tensor]:
    """Query, key and value; the hidden rows behind the MLP; the logits. The query stands for what was attended."""
    query, key, value = decoder.attention_inputs(spec, 0, weights, hidden, rotary)
    results = {"query": query.clone(), "key": key.clone(), "value": value.clone()}
    rows = hidden.clone()
    decoder.mlp(spec, 0, weights, rows, decoder.attention_output(spec, 0, weights, results["query"]))
    return results | {"hidden": rows, "logits": decoder.logits(spec, weights, rows)}


def _difference(found: Tensor, expected: Tensor) -> float:
    found = found.double().cpu()
    return ((found - expected).abs().max() / expected.abs().max()).item() if found.isfinite().all() else math.inf


# The same tokens under every policy ---------------------------------------------------------------------

WEIGHTS = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.25, 0.25))
KV = ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0.5, 0.5, 0), (0.25, 0.5, 0.25))
PROMPT_TOKENS = (3, 40, 17, 64, 1, 29, 50, 8)
OUTPUT_TOKENS = 10


def policies() -> list[Policy]:
    """Weights and KV on every mix of tiers, attended on the GPU, the CPU or both, whole or in half-batches."""
    chosen = []
    for weights, kv, share, half in itertools.product(WEIGHTS, KV, (0.0, 0.5, 1.0), (False, True)):
        if kv[0] == 1 and share < 1:
            continue  # there is nothing for the CPU to attend: once is enough
        chosen.append(
            Policy(
                sequences_in_flight=8,
                tokens_per_pass=96,
                attention_micro_batch=2,
                token_micro_batch=64,
                weights=Placement(*weights),
                kv=Placement(*kv),
                cpu_attention_share=share,
                half_batches=half,
            )
        )
    attended_below = [policy for policy in chosen if policy.kv.cpu and policy.cpu_attention_share == 1]
    return chosen + [replace(policy, kv_device_tokens_share=0.5) for policy in attended_below]


def prompts(vocab_size: int) -> list[list[int]]:
    generator = numpy.random.default_rng(7)
    return [generator.integers(10, vocab_size, length).tolist() for length in PROMPT_TOKENS]


@dataclass(frozen=True)
class Answers:
    """Greedy tokens of each prompt, and how far the second likeliest token was behind at each."""

    tokens: list[list[int]]
    margins: list[list[float]]


def answers(model: Path, cache_dir: Path, policy: Policy | None, **engine) -> Answers:
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT_TOKENS, ignore_eos=True, logprobs=2)
    with LLM(model, dtype="float32", policy=policy, cache_dir=cache_dir, cpu_memory="1GiB", **engine) as llm:
        outputs = llm.generate(prompts(llm.spec.vocab_size), params, use_tqdm=False)
    tokens, margins = [], []
    for output in outputs:
        if output.error is not None:
            raise output.error
        (choice,) = output.outputs
        ranked = [sorted((each.logprob for each in step.values()), reverse=True) for step in choice.logprobs]
        tokens.append(choice.token_ids)
        margins.append([first - second for first, second, *_ in ranked])
    return Answers(tokens, margins)


def first_difference(expected: Answers, found: Answers) -> str | None:
    """Where two runs part, in words; None where only ties closer than rounding do it."""
    for row, (tokens, others) in enumerate(zip(expected.tokens, found.tokens)):
        step = next((step for step, pair in enumerate(zip(tokens, others)) if pair[0] != pair[1]), None)
        if step is not None and expected.margins[row][step] > TIE_MARGIN:
            margin = expected.margins[row][step]
            return f"prompt {row}, token {step}: {tokens[step]} became {others[step]} (margin {margin:.2g})"
    return None


def policy_checks(model: Path, cache_dir: Path, chosen: Iterable[Policy], **engine) -> Iterator[tuple[Policy, str]]:
    """(policy, what went wrong or nothing) for each. engine: device, gpu_memory and so on of ``LLM``."""
    hardware = engine.get("hardware")
    in_ram = Policy(sequences_in_flight=8, tokens_per_pass=512, attention_micro_batch=8, token_micro_batch=512)
    expected = answers(model, cache_dir, in_ram, hardware=hardware)
    for policy in chosen:
        yield policy, first_difference(expected, answers(model, cache_dir, policy, **engine)) or ""
