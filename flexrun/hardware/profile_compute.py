"""Times the decoder's own functions, so that norms, rotations, activations and the interpreter are in the rates.

Everything runs on ``bench.device``, in the engine's layouts, over more weights and KV than a cache holds.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import fmean, geometric_mean, median

import numpy
import torch
from torch import Tensor

from flexrun.attention import Segments, attend
from flexrun.core import DTYPES
from flexrun.hardware.curves import LinearFit, LinearReading, fit_linear
from flexrun.hardware.effort import MIB, TINY, Bench, Shape
from flexrun.hardware.rates import LinearWork
from flexrun.hardware.timing import Reading
from flexrun.models import decoder
from flexrun.models.families import spec_from_config
from flexrun.models.ops import can_pack, pack_matrix
from flexrun.models.rope import rope_tables
from flexrun.models.spec import ModelSpec
from flexrun.sampling import SamplingParams, sample
from flexrun.sampling.sampler import SamplerRow

MODULES = {  # the part of a layer -> names of its weights
    "attention_inputs": ("attention_norm.weight", "qkv.weight"),
    "attention_output": ("output.weight",),
    "mlp": ("mlp_norm.weight", "gate_up.weight", "down.weight"),
}
ATTENTION_FORMS = ((32, 8, 64), (32, 8, 128), (16, 16, 64), (16, 16, 128))  # heads, KV heads, head_dim
PROMPTS = 2  # of one prefill call
SMALL_VOCABULARY_SHARE = 16  # the second vocabulary that sampling is timed with is so much smaller
_TILE_ELEMENTS = 1 << 20
_MAX_POOL_SHARE = 0.2  # of the free memory


def layer_spec(shape: Shape, dtype: str) -> ModelSpec:
    """One llama layer of that shape."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "vocab_size": 256,
        "tie_word_embeddings": True,
    }
    return spec_from_config(config, dtype)


def work_of(spec: ModelSpec, module: str) -> LinearWork:
    return LinearWork.of(spec.linear_shapes(module))


class Pool:
    """Random numbers in one dtype, of which weights and KV are views."""

    def __init__(self, nbytes: int, dtype: torch.dtype, device: torch.device):
        self.elements = nbytes // dtype.itemsize
        tile = torch.empty(min(_TILE_ELEMENTS, self.elements), device=device).normal_(0, 0.02).to(dtype)
        self.data = torch.empty(self.elements, dtype=dtype, device=device)
        for start in range(0, self.elements, len(tile)):
            part = self.data[start : start + len(tile)]
            part.copy_(tile[: len(part)])

    def module_copies(self, spec: ModelSpec, module: str, pack: Callable[[Tensor], Tensor] | None) -> list[dict]:
        """The weights of one module over and over, until the pool is used up; at least one."""
        shapes = {tensor.name: tensor.shape for tensor in spec.layer_tensors(0) if tensor.name in MODULES[module]}
        copies, offset = [], 0
        while not copies or offset + work_of(spec, module).weight_elements <= self.elements:
            weights = {}
            for name, shape in shapes.items():
                if len(shape) == 1:
                    weights[name] = torch.ones(shape, dtype=self.data.dtype, device=self.data.device)
                    continue
                count = math.prod(shape)
                matrix = self.data[offset : offset + count].view(shape)
                weights[name] = matrix if pack is None else pack(matrix)
                offset += count
            copies.append(weights)
        return copies


def module_call(
    spec: ModelSpec, module: str, copies: list[dict], rows: int, device: torch.device
) -> Callable[[], object]:
    """A call of one decoder function over ``rows`` token rows, each time with the next copy of its weights."""
    weights = itertools.cycle(copies)
    dtype = spec.torch_dtype
    hidden = torch.randn(rows, spec.hidden_size, device=device).to(dtype)
    if module == "attention_inputs":
        rotary = rope_tables(spec, rows, device).gather(torch.arange(rows, device=device))
        return lambda: decoder.attention_inputs(spec, 0, next(weights), hidden, rotary)
    if module == "attention_output":
        attended = torch.randn(rows, spec.num_heads, spec.head_dim, device=device).to(dtype)
        return lambda: decoder.attention_output(spec, 0, next(weights), attended)
    branch = torch.zeros_like(hidden)
    return lambda: decoder.mlp(spec, 0, next(weights), hidden, branch)


def module_overheads(bench: Bench, dtype: str) -> dict[str, Reading]:
    """Of each module with next to no work: launches and interpreter."""
    spec = layer_spec(TINY, dtype)
    pool = Pool(MIB, spec.torch_dtype, bench.device)
    calls = [
        module_call(spec, module, pool.module_copies(spec, module, packer(bench, spec))[:1], 1, bench.device)
        for module in MODULES
    ]
    return dict(zip(MODULES, bench.read_all(calls, least=16, most=256)))


def linear_fit(bench: Bench, dtype: str, memory_bytes: int) -> tuple[LinearFit, float, float]:
    """(fit, seconds of overhead of a step, median spread) of every module, shape and row count.

    memory_bytes: free on the device; shapes that would take too much of it are left out (but for the first).
    """
    overheads = [module_overheads(bench, dtype)]
    taken: list[LinearReading] = []
    spreads: list[float] = []
    for shape in bench.effort.shapes:
        spec = layer_spec(shape, dtype)
        largest_bytes = work_of(spec, "mlp").weight_elements * spec.dtype_bytes
        if taken and largest_bytes > _MAX_POOL_SHARE * memory_bytes:
            continue
        bench.advance(f"{bench.label} {dtype} matmul, width {shape.hidden_size}")
        pool = Pool(max(min(bench.pool_bytes, memory_bytes // 8), largest_bytes), spec.torch_dtype, bench.device)
        pack = packer(bench, spec)
        for module, plain in itertools.product(MODULES, (False,) if pack is None else (False, True)):
            copies = pool.module_copies(spec, module, None if plain else pack)
            rows = bench.effort.rows
            readings = bench.read_all([module_call(spec, module, copies, count, bench.device) for count in rows])
            work = work_of(spec, module)
            taken += [LinearReading(module, count, work, each.seconds, plain) for count, each in zip(rows, readings)]
            spreads += [each.spread for each in readings]
    overheads.append(module_overheads(bench, dtype))  # a while later: one of the two was not disturbed
    least = {module: min(each[module].seconds for each in overheads) for module in MODULES}
    fit = fit_linear(taken, least, spec.dtype_bytes)
    return fit, fit.overhead_factor * fmean(least.values()), median(spreads)


def packer(bench: Bench, spec: ModelSpec) -> Callable[[Tensor], Tensor] | None:
    """As the engine lays out matrices that reside on the compute device."""
    return pack_matrix if bench.device.type == "cpu" and can_pack(spec.torch_dtype) else None


def attention_rates(bench: Bench, dtype: str) -> tuple[float, float, float, float]:
    """(KV bytes a second of decoding, FLOP/s of prompts, and the spread of each), over GQA and MHA forms.

    FLOPs count the causal pairs alone: 4 * heads * head_dim each.
    """
    bench.advance(f"{bench.label} {dtype} attention")
    pool = Pool(bench.pool_bytes, DTYPES[dtype], bench.device)
    tokens = bench.effort.context_tokens
    decode_bytes, prefill_flops, decode, prefill = [], [], [], []
    for heads, kv_heads, head_dim in ATTENTION_FORMS:
        token_elements = 2 * kv_heads * head_dim
        sequences = max(pool.elements // (token_elements * tokens), 1)
        decode.append(decode_call(pool, heads, kv_heads, head_dim, sequences, tokens))
        decode_bytes.append(sequences * tokens * token_elements * pool.data.itemsize)
        sequences = min(sequences, PROMPTS)
        prefill.append(prefill_call(pool, heads, kv_heads, head_dim, sequences, tokens))
        prefill_flops.append(sequences * tokens * (tokens + 1) // 2 * 4 * heads * head_dim)
    rates, spreads = [], []
    for calls, amounts in ((decode, decode_bytes), (prefill, prefill_flops)):
        readings = bench.read_all(calls)
        rates.append(geometric_mean([amount / each.seconds for amount, each in zip(amounts, readings)]))
        spreads.append(median(each.spread for each in readings))
    return (*rates, *spreads)


def decode_call(pool: Pool, heads: int, kv_heads: int, head_dim: int, sequences: int, tokens: int):
    """Attention of one new token of each sequence over ``tokens`` cached ones."""
    ones = numpy.ones(sequences, dtype=numpy.int64)
    starts = numpy.arange(sequences)
    segments = Segments(starts, ones, starts * tokens, ones * tokens)
    return _attention_call(pool, heads, kv_heads, head_dim, sequences, sequences * tokens, segments)


def prefill_call(pool: Pool, heads: int, kv_heads: int, head_dim: int, sequences: int, tokens: int):
    """Attention of whole prompts of ``tokens`` tokens."""
    lengths = numpy.full(sequences, tokens)
    starts = numpy.arange(sequences) * tokens
    rows = sequences * tokens
    return _attention_call(pool, heads, kv_heads, head_dim, rows, rows, Segments(starts, lengths, starts, lengths))


def _attention_call(pool: Pool, heads, kv_heads, head_dim, rows, kv_rows, segments) -> Callable[[], object]:
    slab = pool.data[: 2 * kv_rows * kv_heads * head_dim].view(2, kv_rows, kv_heads, head_dim)
    query = torch.randn(rows, heads, head_dim, device=slab.device).to(slab.dtype)
    out = torch.empty_like(query)
    return lambda: attend(query, slab[0], slab[1], segments, scale=head_dim**-0.5, out=out)


def sampling_costs(bench: Bench, dtype: str) -> tuple[float, float]:
    """(seconds of a row, seconds of a logit) of greedy sampling, with the cast of the logits to float32."""
    bench.advance(f"{bench.label} sampling")
    rows = bench.effort.sampled_rows
    states = [SamplerRow(SamplingParams(temperature=0.0)) for _ in range(rows)]
    large = bench.effort.vocabulary
    small = large // SMALL_VOCABULARY_SHARE
    calls = []
    for vocabulary in (small, large):
        scores = torch.randn(rows, vocabulary, device=bench.device).to(DTYPES[dtype])
        calls.append(lambda scores=scores: sample(scores.float(), states))
    few, many = bench.read_all(calls)
    element = max(many.seconds - few.seconds, 0.0) / (rows * (large - small))
    return max(few.seconds / rows - element * small, 0.0), element
