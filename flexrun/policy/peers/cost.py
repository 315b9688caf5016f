"""Seconds of another engine's half layers, lane by lane: its own bytes and products at the rates of our cost model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware, LinearWork
from flexrun.models.spec import ModelSpec
from flexrun.placement import compressed_bytes
from flexrun.policy.peers.traits import EngineTraits, PeerRun

ATTENTION, MLP = "attention", "mlp"
HALVES = {ATTENTION: ("attention",), MLP: ("mlp", "experts")}  # half layer -> modules of ModelSpec.layer_tensors

# Lane -> seconds. Where the engine's CPU blocks, the CPU lane is the one thread that launches everything.
Work = Counter


class PeerCosts:
    """Durations of one engine's modules in one run. Raises ConfigError where the machine has no rates for the dtype."""

    def __init__(self, traits: EngineTraits, spec: ModelSpec, hardware: Hardware, run: PeerRun):
        self.traits, self.spec, self.hardware, self.run = traits, spec, hardware, run
        rates = hardware.gpu.rates_of(spec.dtype)
        reached = rates.matmul_flops_per_second * traits.matmul_share
        self.rates = dataclasses.replace(rates, matmul_flops_per_second=reached)
        self.kv_bytes = spec.kv_elements_per_token * _element_bytes(spec, run.kv_bits)
        self._linear_work = lru_cache(maxsize=None)(lambda part, layer: LinearWork.of(spec.linear_shapes(part, layer)))

    @property
    def layer_kinds(self) -> list[tuple[int, int]]:
        """(a layer, how many are like it): dense ones and sparse ones."""
        kinds: dict[bool, list[int]] = {}
        for layer in range(self.spec.num_layers):
            kinds.setdefault(self.spec.is_sparse(layer), []).append(layer)
        return [(layers[0], len(layers)) for layers in kinds.values()]

    # Weights ------------------------------------------------------------------------------------------

    def load_weights(self, half: str, layer: int) -> Work:
        """Bringing the weights of a half layer to the GPU."""
        return self._load(self._matrices(half, layer))

    def load_ends(self) -> Work:
        """Bringing embedding and head."""
        if self.traits.ends_resident:
            return Work()
        ends = [self.spec.vocab_size * self.spec.embedding_size]
        return self._load(ends) + self._load(ends)

    def _matrices(self, half: str, layer: int) -> list[float]:
        """Elements of each matrix of a checkpoint, in its order."""
        tensors = [
            tensor
            for tensor in self.spec.layer_tensors(layer)
            if tensor.module in HALVES[half] and len(tensor.shape) == 2
        ]
        return [tensor.elements / len(tensor.sources) for tensor in tensors for _ in tensor.sources]

    def _load(self, matrices: Sequence[float]) -> Work:
        run, hardware, work = self.run, self.hardware, Work()
        nbytes = self._bytes_by_tier(matrices)
        moved = nbytes[Tier.CPU] + nbytes[Tier.DISK]
        if moved:
            work[Lane.H2D] += hardware.h2d.seconds(moved)
        if nbytes[Tier.CPU] and not run.pinned_weights:
            work[Lane.CPU] += hardware.host_copy.seconds(nbytes[Tier.CPU])
        if nbytes[Tier.DISK]:
            work[Lane.DISK_READ] += self._read_seconds(nbytes[Tier.DISK], sent=True)
        return work

    def _read_seconds(self, nbytes: float, *, sent: bool) -> float:
        """Of the threads that read from disk, and send what they read to the GPU."""
        seconds = self.hardware.disk_read.seconds(nbytes)
        return seconds + self.hardware.h2d.seconds(nbytes) if sent and self.traits.reads_then_sends else seconds

    def _bytes_by_tier(self, matrices: Sequence[float]) -> dict[Tier, float]:
        total, element_bytes = sum(matrices), _element_bytes(self.spec, self.run.weight_bits)
        shares = {tier: getattr(self.run.weights, tier.value) for tier in (Tier.DISK, Tier.CPU, Tier.GPU)}
        if not self.traits.whole_tensors:
            return {tier: share * total * element_bytes for tier, share in shares.items()}
        nbytes, start = dict.fromkeys(shares, 0.0), 0.0
        for elements in matrices:
            middle, end = (start + elements / 2) / total, 0.0
            for tier, share in shares.items():
                end += share
                if middle < end or tier is Tier.GPU:
                    nbytes[tier] += elements * element_bytes
                    break
            start += elements
        return nbytes

    # Computing ----------------------------------------------------------------------------------------

    def attention(self, layer: int, sequences: float, *, decode: bool) -> Work:
        """Projections and attention of one micro-batch in one layer."""
        run = self.run
        rows = sequences * (1 if decode else run.prompt_tokens)
        seconds = self._linear(("attention_inputs", "attention_output"), layer, rows)
        seconds += self._unpack(self._matrices(ATTENTION, layer))
        if not decode:
            return Work({Lane.GPU: self._launched(seconds + self._prompt_attention(sequences))})
        cached_tokens = sequences * run.decode_context_tokens
        seconds += self._gpu_attention(cached_tokens * (1.0 - run.cpu_attention))
        on_cpu = self._cpu_attention(cached_tokens * run.cpu_attention)
        return Work({Lane.GPU: self._launched(seconds), Lane.CPU: on_cpu})

    def mlp(self, layer: int, sequences: float, *, decode: bool) -> Work:
        """The dense MLP, or router, shared and routed experts, over the rows of ``sequences``."""
        rows = sequences * (1 if decode else self.run.prompt_tokens)
        seconds = self._linear(("mlp",), layer, rows) + self._unpack(self._matrices(MLP, layer))
        if self.spec.is_sparse(layer):
            seconds += self._experts(layer, rows)
        return Work({Lane.GPU: self._launched(seconds)})

    def ends(self, sequences: float, *, decode: bool) -> Work:
        """Head of one micro-batch."""
        every_row = self.traits.full_prompt_logits and not decode
        rows = sequences * (self.run.prompt_tokens if every_row else 1)
        elements = 0 if self.traits.ends_resident else self.spec.vocab_size * self.spec.embedding_size
        return Work({Lane.GPU: self._linear(("head",), 0, rows) + self._unpack([elements])})

    def _launched(self, seconds: float) -> float:
        """Kernels of a step and their launches, which hide behind earlier kernels where nothing waits for a step."""
        overhead = self.hardware.gpu.step_overhead_seconds
        return seconds + overhead if self.run.overlap else max(seconds, overhead)

    def _linear(self, parts: Iterable[str], layer: int, rows: float) -> float:
        return sum(
            self.rates.linear_seconds(rows, self._linear_work(part, layer), self.spec.dtype_bytes) for part in parts
        )

    def _experts(self, layer: int, rows: float) -> float:
        """Every expert over its share of the rows, in calls of at most ``expert_rows``."""
        experts = self.spec.experts
        rows_each = rows * experts.experts_per_token / experts.num_experts
        calls = max(-(-rows_each // self.traits.expert_rows), 1) if self.traits.expert_rows else 1
        one = self._linear(("expert",), layer, rows_each / calls) + self.hardware.gpu.step_overhead_seconds
        return experts.num_experts * calls * one

    def _touch(self, nbytes: float) -> float:
        """GPU kernels that only move memory."""
        return nbytes / self.rates.weight_bytes_per_second

    def _unpack(self, matrices: Sequence[float]) -> float:
        return self._touch(sum(matrices) * self.traits.dequantise_bytes) if self.run.weight_bits < 16 else 0.0

    def _prompt_attention(self, sequences: float) -> float:
        spec, traits, tokens = self.spec, self.traits, self.run.prompt_tokens
        score_bytes = traits.latent_score_bytes if spec.latent else traits.score_bytes
        pairs = sequences * tokens * (tokens if score_bytes else (tokens + 1) / 2)
        seconds = pairs * spec.prefill_attention_flops_per_pair / self.rates.prefill_attention_flops_per_second
        seconds += self._touch(pairs * spec.num_heads * score_bytes)
        if spec.latent:
            seconds += self._expand(sequences * tokens)
        if self.run.kv_bits < 16:
            seconds += self._touch(sequences * tokens * spec.kv_elements_per_token * traits.compress_bytes)
        return seconds

    def _gpu_attention(self, cached_tokens: float) -> float:
        """Attention of single queries over tokens that are on the GPU by now."""
        spec, traits = self.spec, self.traits
        if spec.latent and traits.expands_latent:
            return self._expand(cached_tokens)
        group = spec.num_heads / spec.num_kv_heads
        reads = traits.kv_copies + (1 + 2 * group if traits.expands_groups else 1)
        element_bytes = reads * spec.dtype_bytes + (traits.dequantise_bytes if self.run.kv_bits < 16 else 0.0)
        return self._touch(cached_tokens * spec.kv_elements_per_token * element_bytes)

    def _expand(self, tokens: float) -> float:
        """Keys and values of all heads from latents: products, joining key parts, a copy of the values, reading all."""
        spec, latent = self.spec, self.spec.latent
        products = tokens * self._expansion_flops / self.rates.matmul_flops_per_second
        nope, value = (spec.num_heads * width for width in (latent.nope_head_dim, latent.value_head_dim))
        elements = (nope + value) + nope + 2 * spec.query_size + 3 * value
        return products + self._touch(tokens * elements * spec.dtype_bytes)

    @property
    def _expansion_flops(self) -> int:
        return 2 * sum(inputs * outputs for inputs, outputs in self.spec.prefill_expansion_shapes)

    def _cpu_attention(self, cached_tokens: float) -> float:
        spec, traits, cpu = self.spec, self.traits, self.hardware.cpu
        rates, exact = cpu.rates_of(spec.dtype), cpu.rates_of("float32")
        element_bytes = traits.cpu_attention_bytes + (traits.cpu_convert_bytes if self.run.kv.cpu else 0.0)
        elements = cached_tokens * spec.kv_elements_per_token
        memory = elements * element_bytes / (traits.cpu_bytes_per_second or rates.decode_kv_bytes_per_second)
        flops = cached_tokens * spec.decode_attention_flops_per_pair
        seconds = max(memory, flops / exact.prefill_attention_flops_per_second)
        if spec.latent and traits.expands_latent:
            seconds += cached_tokens * self._expansion_flops / exact.matmul_flops_per_second
        return seconds

    # Cache and hidden states --------------------------------------------------------------------------

    def load_cache(self, sequences: float) -> Work:
        """What a decoding micro-batch needs of its cache in one layer, where it does not lie with its processor."""
        run, hardware, work = self.run, self.hardware, Work()
        nbytes = sequences * run.decode_context_tokens * self.kv_bytes
        to_gpu = nbytes * (1.0 - run.kv.gpu) * (1.0 - run.cpu_attention)
        if run.kv.disk:
            work[Lane.DISK_READ] += self._read_seconds(nbytes * run.kv.disk, sent=bool(to_gpu))
        if to_gpu:
            work[Lane.H2D] += hardware.h2d.seconds(to_gpu)
            if not run.cpu_attention:
                work[Lane.H2D] += self.traits.sync_seconds
            if run.kv.cpu and not self.traits.kv_pinned:
                work[Lane.CPU] += hardware.host_copy.seconds(to_gpu * run.kv.cpu / (1.0 - run.kv.gpu))
        return work

    def store_cache(self, sequences: float, *, decode: bool) -> Work:
        """Bringing the new keys and values of one layer to where they live."""
        run, hardware, work = self.run, self.hardware, Work()
        nbytes = sequences * (1 if decode else run.prompt_tokens) * self.kv_bytes * (1.0 - run.kv.gpu)
        if not nbytes:
            return work
        work[Lane.D2H] += hardware.d2h.seconds(nbytes)
        if not self.traits.kv_pinned and not decode:
            work[Lane.D2H] += hardware.host_copy.seconds(nbytes)
        if run.kv.disk:
            work[Lane.DISK_WRITE] += hardware.disk_write.seconds(nbytes * run.kv.disk / (1.0 - run.kv.gpu))
        return work

    def move_hidden(self, sequences: float, *, decode: bool) -> Work:
        """Hidden states that wait in host memory come and go on the stream that computes."""
        rows = sequences * (1 if decode else self.run.prompt_tokens)
        nbytes = rows * self.spec.hidden_size * self.spec.dtype_bytes * (1.0 - self.run.hidden.gpu)
        if not nbytes:
            return Work()
        return Work({Lane.GPU: self.hardware.h2d.seconds(nbytes) + self.hardware.d2h.seconds(nbytes)})


def _element_bytes(spec: ModelSpec, bits: int) -> float:
    return spec.dtype_bytes if bits == 16 else compressed_bytes(1 << 12, bits) / (1 << 12)
