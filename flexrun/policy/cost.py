"""Seconds of each kind of step on a given machine: what the simulator schedules and the linear program sums up.

Beyond FlexGen's model (arXiv 2303.06865, section 4.3) it counts: reading weights and KV out of the compute device's own
memory, embeddings and head, fixed overheads, dequantisation, attention on the device over KV that lives elsewhere,
MLA and routed experts, and ragged lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial

import numpy

from flexrun.config import Policy
from flexrun.core import Lane, Tier
from flexrun.hardware import Hardware, LinearWork, Processor, Transfer
from flexrun.models.spec import ModelSpec
from flexrun.placement import LOGITS_ROWS, WeightPlacement, kv_moved, part_tokens, weight_bits_of
from flexrun.policy.attention_cost import attention_seconds, counts_above, counts_of, layers_seconds
from flexrun.policy.coded_cost import brought_back_seconds, coding_seconds
from flexrun.policy.compressed import Compressed, compressed_part
from flexrun.policy.expert_cost import ExpertCosts
from flexrun.policy.kv_writes import row_write_seconds
from flexrun.policy.matmul_cost import dequantise_seconds, matmul_seconds
from flexrun.policy.passes import ABOVE, GROUPS, PREFIX, Passes
from flexrun.policy.prefix_cost import prefix_layers_seconds, prefix_step_seconds
from flexrun.steps import ATTENDS, MicroBatchShape, PassShape, Step, StepKind, experts_moved_share

ROW_READ_SECONDS = 1e-5  # one of many embedding rows that the page cache lacks; one that it has takes 2e-6
SEQUENCE_SECONDS = 22e-6  # planning one sequence's part of a pass
PASS_SECONDS = 1.2e-3  # planning a pass, apart from its sequences
TOKEN_SECONDS = 30e-6  # appending one sampled token and making its text
STORE_SECONDS, STORE_SEQUENCE_SECONDS = 6e-5, 3e-7  # the executor's own work around the projections of a layer
# Steps in a run against each timed by itself, measured on a CPU by benchmarks/forecast.py: modules find other data in
# the cache, reads begin and end a moment late.
CPU_IN_RUN, DISK_IN_RUN = 1.09, 1.08
MERGE_ACCESSES = 4  # of each value in float32, where what was attended in two places is joined


class StepCosts:
    """Durations of the steps of one model under one policy on one machine, each as if its lane ran alone."""

    def __init__(
        self, spec: ModelSpec, policy: Policy, placement: WeightPlacement, hardware: Hardware, *, on_device: bool
    ):
        """on_device: the policy uses a GPU; where ``hardware`` has none, the CPU and its copy threads emulate it."""
        self.spec, self.policy, self.placement, self.hardware = spec, policy, placement, hardware
        self.on_device = on_device
        self.device: Processor = hardware.gpu if on_device and hardware.gpu else hardware.cpu
        self.h2d: Transfer = hardware.h2d or hardware.host_copy
        self.d2h: Transfer = hardware.d2h or hardware.host_copy
        self.kv = kv_moved(spec, policy)
        self.kv_bytes = float(self.kv.token)
        self._coded = policy.key_value_bits is not None
        self._experts = ExpertCosts(spec, placement, self._one_expert_seconds, self.transfer)
        self.experts_seconds = self._experts.seconds
        self._rates, self._bits = self.device.rates_of(spec.dtype), weight_bits_of(policy)
        self._work = lru_cache(maxsize=None)(lambda part, layer: LinearWork.of(spec.linear_shapes(part, layer)))
        self._compressed = partial(compressed_part, spec, self._bits, activation_bits=policy.activation_bits)
        absorbing, expanding = spec.decode_absorption_shapes, spec.prefill_expansion_shapes
        self._absorption, self._expansion = LinearWork.of(absorbing), LinearWork.of(expanding)
        self._linear = lru_cache(maxsize=4096)(self._linear_seconds)
        self._compute = lru_cache(maxsize=None)(self._compute_seconds)
        self._part = lru_cache(maxsize=4096)(self._part_seconds)
        self._hidden_row_bytes = spec.hidden_size * spec.dtype_bytes
        self._part_tokens = part_tokens(policy) if on_device else 0
        self._seconds = {
            StepKind.READ_ROWS: lambda step, shape: shape.tokens * ROW_READ_SECONDS,
            StepKind.EMBED: lambda step, shape: self.embed_seconds(step.rows),
            StepKind.KEEP_SAMPLED: lambda step, shape: self.device.step_overhead_seconds,
            StepKind.ATTENTION_INPUTS: self._attention_inputs_step,
            StepKind.ATTEND: self._attend_step,
            StepKind.ATTEND_FRESH: self._attend_step,
            StepKind.ATTEND_PREFIX: lambda step, shape: prefix_step_seconds(self, step, shape),
            StepKind.MERGE: lambda step, shape: self.merge_seconds(step.rows),
            StepKind.ATTENTION_OUTPUT: lambda step, shape: self._linear(
                "attention_output", 0, step.rows, self._plain(step)
            ),
            StepKind.MLP: lambda step, shape: self._linear("mlp", step.layer, step.rows, self._plain(step)),
            StepKind.WRITE_KV: self._write_kv_step,
            StepKind.EXPERTS: lambda step, shape: self._experts.of_step(step, Lane.GPU if on_device else Lane.CPU),
            StepKind.LOGITS: lambda step, shape: self.logits_seconds(shape.logits_rows, self._plain(step)),
        }

    def seconds(self, step: Step, shape: PassShape) -> float:
        """Duration of one step of a pass of ``shape``, at the rates of the profile."""
        seconds = self._seconds.get(step.kind)
        return seconds(step, shape) if seconds else self.transfer(step.lane).seconds(step.bytes)

    def alike(self, step: Step) -> tuple:
        """Steps of a pass for which this is the same take equally long."""
        window = self.spec.layer_windows[step.layer] if step.kind in ATTENDS else 0
        plain = 1.0 if self.on_device else self._plain(step)
        start = step.start if self.spec.latent else 0  # of two halves, one may decode more
        return step.kind, step.lane, step.bytes, step.flops, step.micro_batch, window, plain, start

    def seconds_in_run(self, step: Step, shape: PassShape) -> float:
        """The same with what a run adds to it: how long the step will really take while nothing else slows it down."""
        seconds = self.seconds(step, shape)
        if step.kind in (StepKind.READ_WEIGHTS, StepKind.READ_KV):
            return seconds * DISK_IN_RUN
        on_cpu = step.lane is Lane.CPU or (step.lane is Lane.GPU and self.device is self.hardware.cpu)
        if step.kind is StepKind.ATTENTION_INPUTS and on_cpu:
            seconds += STORE_SECONDS + STORE_SEQUENCE_SECONDS * min(step.rows, self.policy.sequences_in_flight)
        return seconds * CPU_IN_RUN if on_cpu else seconds

    def transfer(self, lane: Lane) -> Transfer:
        """What moves bytes on a lane."""
        return {
            Lane.H2D: self.h2d,
            Lane.D2H: self.d2h,
            Lane.DISK_READ: self.hardware.disk_read,
            Lane.DISK_WRITE: self.hardware.disk_write,
        }[lane]

    def between_passes_seconds(self, sequences: int) -> float:
        """What the engine does between two passes, on no lane."""
        return PASS_SECONDS + sequences * SEQUENCE_SECONDS

    # Compute ------------------------------------------------------------------------------------------

    def _chunks(self, tokens: int) -> list[tuple[int, int]]:
        """(calls, rows of each) of a module over the pass."""
        rows = min(self.policy.token_micro_batch, tokens)
        full, rest = divmod(tokens, rows) if rows else (0, 0)
        return [(full, rows), *([(1, rest)] if rest else [])]

    def _linear_seconds(self, part: str, layer: int, tokens: int, plain: float) -> float:
        work, compressed = self._work(part, layer), self._compressed(part, layer)
        brought_back = self._brought_back_seconds(compressed) if tokens else 0.0
        return brought_back + sum(
            count * (self._matmul_seconds(rows, work, plain, compressed) + self.device.step_overhead_seconds)
            for count, rows in self._chunks(tokens)
        )

    def _matmul_seconds(
        self, rows: float, work: LinearWork, plain: float, compressed: tuple[Compressed, ...] | None = None
    ) -> float:
        return matmul_seconds(self.spec, self.hardware, self.device, rows, work, plain, compressed)

    def _plain(self, step: Step) -> float:
        return self._plain_shares[step.unit] if step.unit >= 0 else self._plain_share

    @cached_property
    def _plain_shares(self) -> list[float]:
        """Of each unit: only weights resident on a CPU that computes are brought into the matmul's own layout."""
        return [1.0] * len(self.placement.units) if self.on_device else self.placement.moved_shares

    @cached_property
    def _plain_share(self) -> float:
        return 1.0 if self.on_device else self.placement.moved_share

    def _brought_back_seconds(self, compressed: tuple[Compressed, ...] | None) -> float:
        on_gpu = self.device is not self.hardware.cpu  # there, once for all calls of a step
        dequantises = compressed and on_gpu
        return dequantise_seconds(self.spec, self.hardware, self.device, compressed) if dequantises else 0.0

    def embed_seconds(self, tokens: int) -> float:
        moved = 2 * tokens * self.spec.hidden_size * self.spec.dtype_bytes
        return moved / self._rates.activation_bytes_per_second + self.device.step_overhead_seconds

    def _attention_inputs_step(self, step: Step, shape: PassShape) -> float:
        decode_tokens, row = 0, 0
        for micro_batch in shape.micro_batches:
            decode_tokens += micro_batch.decode_tokens if step.start <= row < step.stop else 0
            row += micro_batch.query_tokens
        return self.attention_inputs_seconds(step.rows, decode_tokens, self._plain(step))

    def attention_inputs_seconds(self, tokens: int, decode_tokens: int, plain: float) -> float:
        """Norm, projections, rotary, storing K and V; for MLA also the absorbed or expanded products."""
        seconds = self._linear("attention_inputs", 0, tokens, plain)
        seconds += tokens * self.spec.kv_bytes_per_token / self._rates.activation_bytes_per_second
        seconds += coding_seconds(self.spec, self.device, tokens) if self._coded else 0.0
        if self.spec.latent is not None:
            for work, rows in ((self._absorption, decode_tokens), (self._expansion, tokens - decode_tokens)):
                if rows:
                    seconds += self._matmul_seconds(rows, work, plain)
        return seconds

    def _one_expert_seconds(self, rows: float, beside: bool) -> float:
        """One routed expert. beside: on the CPU beside a device, where its weights stay in the layout that it likes."""
        work, compressed = self._work("expert", 0), self._compressed("expert", 0)
        processor, plain = (self.hardware.cpu, 0.0) if beside else (self.device, self._plain_share)
        seconds = matmul_seconds(self.spec, self.hardware, processor, rows, work, plain, compressed)
        seconds += processor.step_overhead_seconds
        return seconds if beside else seconds + self._brought_back_seconds(compressed)

    def logits_seconds(self, rows: int, plain: float) -> float:
        """Head and sampling, in blocks of LOGITS_ROWS rows."""
        if not rows:
            return self.device.step_overhead_seconds
        work, compressed = self._work("head", 0), self._compressed("head", 0)
        full, rest = divmod(rows, LOGITS_ROWS)
        brought_back = self._brought_back_seconds(compressed)
        seconds = sum(
            count * (self._matmul_seconds(block, work, plain, compressed) + brought_back)
            for count, block in ((full, LOGITS_ROWS), (1, rest))
            if count and block
        )
        sampling = self.spec.vocab_size * self.device.sample_element_seconds + self.device.row_overhead_seconds
        return seconds + rows * (sampling + TOKEN_SECONDS) + self.device.step_overhead_seconds

    def attend_seconds(self, processor: Processor, layer: int, micro_batch: MicroBatchShape) -> float:
        """softmax(QK^T)V of one micro-batch in one layer; where its KV is split, of what is below the borders."""
        above = counts_of(micro_batch.above) if micro_batch.above_kv_tokens else None
        window, counts = self.spec.layer_windows[layer], counts_of(micro_batch)
        seconds = float(attention_seconds(self.spec, processor, self.kv_bytes, window, counts, above))
        return seconds + (brought_back_seconds(self.spec, processor, counts) if self._brings_back(processor) else 0.0)

    def _brings_back(self, processor: Processor) -> bool:
        """Whether what it attends is compressed, and it cannot read codes."""
        return self._coded and processor is self.hardware.gpu

    def _attend_step(self, step: Step, shape: PassShape) -> float:
        micro_batch = next(each for each in shape.micro_batches if each.index == step.micro_batch)
        on_host = self.on_device and step.lane is Lane.CPU
        if step.kind is StepKind.ATTEND_FRESH:
            micro_batch = micro_batch.fresh
        elif self.on_device and micro_batch.home is not Tier.GPU:
            of_split = step.lane is not micro_batch.attend_lane  # what the device has of it, attends the CPU the rest
            micro_batch = micro_batch.above if of_split else micro_batch.cached
        if not on_host:
            return self.attend_seconds(self.device, step.layer, micro_batch)
        seconds = self.attend_seconds(self.hardware.cpu, step.layer, micro_batch)
        taken_in = micro_batch.query_tokens * self._coded
        return seconds + coding_seconds(self.spec, self.hardware.cpu, taken_in)

    def merge_seconds(self, rows):
        """Joining what two places found for the rows (a number or an array) of one micro-batch in one layer."""
        moved = MERGE_ACCESSES * 4 * self.spec.attended_size / self._rates.activation_bytes_per_second
        return rows * moved - (-rows // self.policy.token_micro_batch) * self.device.step_overhead_seconds

    def _write_kv_step(self, step: Step, shape: PassShape) -> float:
        micro_batch = next(each for each in shape.micro_batches if each.index == step.micro_batch)
        return self.write_kv_seconds(step.bytes, micro_batch.decode_tokens)

    def write_kv_seconds(self, nbytes: float, decode_tokens: float) -> float:
        """New rows of one layer to disk. Those of a decoding sequence are a request whenever they fill a block."""
        return self.hardware.disk_write.seconds(nbytes) + decode_tokens * row_write_seconds(self.spec, self.kv_bytes)

    # Sums of a pass -----------------------------------------------------------------------------------

    def compute_seconds(self, shape: PassShape, half_batches: bool = False) -> float:
        """Everything of a pass that runs on the compute lane whatever the KV placement is: all but attention.

        half_batches: in two equal halves, which read the weights twice out of the device's memory.
        """
        decode_tokens = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches)
        half = (shape.tokens // 2, decode_tokens // 2) if half_batches else (0, 0)
        return self._compute(shape.tokens, shape.logits_rows, decode_tokens, *half)

    def _compute_seconds(
        self, tokens: int, logits_rows: int, decode_tokens: int, half_tokens: int = 0, half_decode_tokens: int = 0
    ) -> float:
        """half_tokens: of the first half of the pass, 0 where it runs as a whole."""
        plain = self._plain_share
        total = self.embed_seconds(tokens) + self.logits_seconds(logits_rows, plain)
        if half_tokens:
            total += self._layers_seconds(half_tokens, half_decode_tokens)
        return total + self._layers_seconds(tokens - half_tokens, decode_tokens - half_decode_tokens)

    def _part_seconds(self, tokens: int, decode_tokens: int) -> float:
        """One part of a pass that runs in parts, apart from the head."""
        layers = self._layers_seconds(tokens, decode_tokens * bool(self.spec.latent))
        return self.embed_seconds(tokens) + layers + self.device.step_overhead_seconds

    def _layers_seconds(self, tokens: int, decode_tokens: int) -> float:
        spec, plain = self.spec, self._plain_share
        total = spec.num_layers * (
            self.attention_inputs_seconds(tokens, decode_tokens, plain)
            + self._linear("attention_output", 0, tokens, plain)
        )
        for layer, count in self._layer_kinds:
            total += count * self._linear("mlp", layer, tokens, plain)
            if spec.is_sparse(layer):
                on_device = count * spec.experts.num_experts - self.placement.cpu_experts
                total += self.experts_seconds(on_device, tokens)
        return total

    @cached_property
    def _layer_kinds(self) -> list[tuple[int, int]]:
        """(a layer, how many are like it): dense ones and sparse ones."""
        sparse = [layer for layer in range(self.spec.num_layers) if self.spec.is_sparse(layer)]
        dense = [layer for layer in range(self.spec.num_layers) if not self.spec.is_sparse(layer)]
        return [(layers[0], len(layers)) for layers in (dense, sparse) if layers]

    @cached_property
    def _weight_seconds(self) -> dict[Lane, tuple[float, float]]:
        """Moving the weights of one pass: all of them, and what of it is the bytes of routed experts."""
        moved = {Lane.DISK_READ: [(unit.disk_bytes, unit.experts) for unit in self.placement.units]}
        if self.on_device:
            moved[Lane.H2D] = [(unit.disk_bytes + unit.host_bytes, unit.experts) for unit in self.placement.units]
        result = dict.fromkeys(Lane, (0.0, 0.0))
        for lane, units in moved.items():
            link = self.transfer(lane)
            of_experts = [link.seconds(nbytes) - link.seconds(0) for nbytes, experts in units if nbytes and experts]
            result[lane] = sum(link.seconds(nbytes) for nbytes, _ in units if nbytes), sum(of_experts)
        return result

    def _moved_weight_seconds(self, tokens: numpy.ndarray, halved: numpy.ndarray) -> dict[Lane, numpy.ndarray]:
        """The same for passes of so many tokens; few move the chosen experts alone, but in halves."""
        spared = (1.0 - experts_moved_share(self._experts.share_per_token, tokens)) * ~halved
        return {lane: whole - spared * of_experts for lane, (whole, of_experts) in self._weight_seconds.items()}

    def attend_pass_seconds(self, processor: Processor, micro_batch: MicroBatchShape) -> float:
        """One micro-batch through all layers; nothing where it has no rows."""
        above = counts_of(micro_batch.above) if micro_batch.above_kv_tokens else None
        return float(self._attend_layers(processor, counts_of(micro_batch), above))

    def _attend_layers(self, processor: Processor, counts: Sequence, above: Sequence | None = None):
        """The same for counts as numbers or arrays, less what is ``above``."""
        seconds = layers_seconds(self.spec, processor, self.kv_bytes, counts, above)
        if self._brings_back(processor):
            seconds += self.spec.num_layers * brought_back_seconds(self.spec, processor, counts)
        return seconds

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes that cross the link each way in a pass whose hidden states wait off the device between its layers."""
        return (self.spec.num_layers - 1) * tokens * self._hidden_row_bytes

    def lane_seconds(self, shape: PassShape) -> dict[Lane, float]:
        """Seconds each lane works in one pass: the durations of all its steps, without any waiting."""
        return dict(zip(Lane, self.lane_seconds_of(Passes.of([shape]))[0].tolist()))

    def lane_seconds_of(self, passes: Passes) -> numpy.ndarray:
        """The same for many passes: float64 [passes, lanes], lanes in the order of Lane."""
        spec, layers = self.spec, self.spec.num_layers
        compute = Lane.GPU if self.on_device else Lane.CPU
        tokens = passes.tokens
        decode_tokens = passes.decode_tokens if spec.latent else numpy.zeros_like(tokens)
        halves = passes.halves(self.policy.half_batches and self.on_device) * (
            numpy.array([[1], [1 if spec.latent else 0]])
        )
        asked = zip(tokens.tolist(), passes.logits_rows.tolist(), decode_tokens.tolist(), *halves.tolist())
        cut = passes.parts(self._part_tokens) if self._part_tokens else {}
        seconds = self._moved_weight_seconds(tokens, (halves[0] > 0) | numpy.isin(numpy.arange(len(passes)), list(cut)))
        seconds[compute] += [0.0 if number in cut else self._compute(*each) for number, each in enumerate(asked)]
        for number, parts in cut.items():
            seconds[compute][number] += self.logits_seconds(int(passes.logits_rows[number]), self._plain_share)
            seconds[compute][number] += sum(itertools.starmap(self._part, parts))
            for lane, (rows, _) in itertools.product((Lane.H2D, Lane.D2H), parts):
                seconds[lane][number] += (layers - 1) * self.transfer(lane).seconds(rows * self._hidden_row_bytes)
        halved = zip((tokens - halves[0]).tolist(), halves[0].tolist())
        in_parts = {number: [rows for rows, _ in parts] for number, parts in cut.items()}
        self._experts.add_beside(seconds, {**dict(enumerate(halved)), **in_parts}.items())
        if self.placement.embedding_on_disk:
            seconds[Lane.DISK_READ] += tokens * ROW_READ_SECONDS
        for number, place in enumerate(passes.places):
            counts = passes.counts[:, number].T
            cached = counts[:5]
            there_groups, new_groups, fresh_groups = counts[GROUPS]
            new_bytes = self.kv.added(counts[0], new_groups)
            there_bytes = self.kv.there(counts[0], counts[1], there_groups)
            away = self.on_device and place.home is not Tier.GPU
            lane, moved, above = place.attend_lane if away else compute, [], None
            if away:
                fresh_tokens, fresh_pairs = counts[5], counts[6]
                cached = (counts[0] - fresh_tokens, counts[1] - fresh_tokens, counts[2] - fresh_pairs, *counts[3:5])
                fresh = (fresh_tokens, fresh_tokens, fresh_pairs, 0, 0)
                seconds[compute] += self._attend_layers(self.device, fresh)
                leaving_bytes = self.kv.to_host(counts[0] - counts[7], fresh_groups)
                query_bytes = cached[0] * (spec.query_size * spec.dtype_bytes)
                back_bytes = query_bytes + (counts[PREFIX][0] > 0) * cached[0] * (4 * spec.num_heads)
                if counts[8].any():  # split by token
                    above = counts_above(cached, counts[ABOVE])
                    below, merged = cached[1] > above[1], (cached[1] > above[1]) & (above[1] > 0)
                    seconds[compute] += self._attend_layers(self.device, above)
                    seconds[compute] += merged * layers * self.merge_seconds(cached[0])
                    query_bytes = below * query_bytes
                    back_bytes = query_bytes + merged * cached[0] * (4 * spec.num_heads)
                on_cpu = [(Lane.D2H, query_bytes + leaving_bytes), (Lane.H2D, back_bytes)]
                moved += on_cpu if lane is Lane.CPU else [(Lane.H2D, there_bytes), (Lane.D2H, new_bytes)]
            seconds[lane] += self._attend_layers(self.device if lane is compute else self.hardware.cpu, cached, above)
            if lane is not compute:
                seconds[lane] += layers * coding_seconds(spec, self.hardware.cpu, cached[0] * self._coded)
            seconds[compute] += prefix_layers_seconds(self, counts[PREFIX])
            if place.home is Tier.DISK:
                moved.append((Lane.DISK_READ, there_bytes))
                writes = self.write_kv_seconds(new_bytes, counts[3])
                seconds[Lane.DISK_WRITE] += (new_bytes > 0) * layers * writes
            for carrier, nbytes in moved:
                seconds[carrier] += (nbytes > 0) * layers * self.transfer(carrier).seconds(nbytes)
        return numpy.stack([seconds[lane] for lane in Lane], axis=1)
