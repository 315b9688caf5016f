"""One pass through the layers as data: the steps that the executor runs, the simulator times and the report draws.

A step depends only on steps emitted before it, and each lane runs its steps in the order of emission (weights on their
way in an order of their own), so any list this module emits runs to its end. Overlap is a property of the steps:
weights are read as far ahead as the ring that receives them has room, also across the border between two passes.

Two half-batches (the order of NEO, arXiv 2411.01142): where the CPU attends beside a device, a pass may be cut in
two, and while the CPU attends one half, the device runs the other half's matmuls. Each half in turn goes from the
attention of one layer to that of the next, so both use a layer's weights while they are there.

A pass larger than the device can hold is cut into more parts, whose hidden states wait on the host. Part after part
comes to one of two places on the device, goes through a layer and leaves again, while the next one comes to the other
place; the weights of the layer stay until its last part has used them.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from flexrun.attention_steps import AttentionSteps, Part
from flexrun.core import Lane, Tier
from flexrun.steps import STREAMING, Dependency, MicroBatchShape, ModelWork, PassShape, Step, StepKind, WeightUnit
from flexrun.streaming import WeightStream

DISK_LANES = (Lane.DISK_READ, Lane.DISK_WRITE)


@dataclass(frozen=True)
class _Stage:
    """A module of a layer: what both halves of a pass go through, one after the other."""

    kind: StepKind
    layer: int
    module: str
    flops_per_token: float
    ends_layer: bool = False


class Scheduler:
    """Emits the steps of one pass after another.

    units: every weight unit in the order of use: for each layer "attention", "mlp", then groups of routed experts
    (any other name); last "head".
    compute_lane: Lane.GPU when weights are copied to a device, Lane.CPU when host tensors are used in place.
    read_embedding_rows: the token embedding lives on disk and is gathered row by row.
    kv_slots: staging slots on the device for KV that comes there to be attended.
    host_kv_slots: those on the host for KV from disk (default: as many); more of them hide how long a write takes.
    half_batches: passes of several micro-batches, some attended on the CPU beside a device, run as two halves.
    part_tokens: rows in each of two places on a device, for all row buffers (0: room for any pass). Passes of more rows
        than both take run in parts of at most so many, which no micro-batch exceeds; the device's ring must then hold
        the weights of a whole layer, and the largest unit besides.
    """

    def __init__(
        self,
        units: Sequence[WeightUnit],
        work: ModelWork,
        num_layers: int,
        *,
        compute_lane: Lane,
        host_ring_bytes: int,
        device_ring_bytes: int = 0,
        read_embedding_rows: bool = False,
        kv_slots: int = 2,
        host_kv_slots: int | None = None,
        half_batches: bool = False,
        part_tokens: int = 0,
    ):
        self.work, self.num_layers = work, num_layers
        self.compute_lane = compute_lane
        self.on_device = compute_lane is Lane.GPU
        self.read_embedding_rows = read_embedding_rows
        self.half_batches = half_batches and self.on_device
        self.part_tokens = part_tokens if self.on_device else 0
        self.part_starts: list[int] = []  # first rows of the parts of the last pass, where it ran in parts
        self._stages = _stages(units, work, num_layers)
        self._cpu_experts = [sum(unit.cpu_experts for unit in units if unit.layer == n) for n in range(num_layers)]
        self._stages_of = [[stage for stage in self._stages if stage.layer == layer] for layer in range(num_layers)]
        self._last: Dependency | None = None  # step of a module
        self._stream = WeightStream(
            units,
            self._emit,
            on_device=self.on_device,
            host_ring_bytes=host_ring_bytes,
            device_ring_bytes=device_ring_bytes,
        )
        self._orders = dict.fromkeys(Lane, 0)
        self._copies: set[int] = set()  # orders of COPY_WEIGHTS of the pass at hand and of the one before
        self._copies_before: set[int] = set()
        self._attention = AttentionSteps(work, self._emit, compute_lane, kv_slots, host_kv_slots or kv_slots)
        self._steps: list[Step] = []
        self._shape: PassShape | None = None

    def pass_steps(self, shape: PassShape) -> list[Step]:
        """All steps of one pass, in an order in which every dependency comes before its dependents."""
        self._steps = []
        self._shape = shape
        self._copies_before, self._copies = self._copies, set()
        self._attention.begin()
        work, tokens = self.work, shape.tokens
        in_parts = 0 < 2 * self.part_tokens < tokens
        parts = self._small_parts(shape) if in_parts else self._parts(shape)
        self.part_starts = [part.start for part in parts] if in_parts else []
        self._halved = len(parts) > 1 and not in_parts
        self._stream.begin(shape, len(parts), 1.0 if len(parts) > 1 else work.moved_share(tokens))
        rows = ()
        if self.read_embedding_rows:
            rows = (
                self._emit(StepKind.READ_ROWS, Lane.DISK_READ, stop=tokens, bytes=tokens * work.embedding_row_bytes),
            )
        if in_parts:
            self._run_in_turn(parts, rows)
        else:
            self._embed(0, tokens, rows)
            self._run_layers(parts)
        # The next pass overwrites the rows that the last layer's copies read, so the pass ends after them; and no
        # pass leaves rows that are on neither the device nor the disk.
        waits = [wait for part in parts for wait in part.busy]
        waits += self._attention.unwritten
        loaded = self._stream.use(self.num_layers, "head")
        logits = self._emit(
            StepKind.LOGITS,
            self.compute_lane,
            (*loaded.ready, *waits),
            layer=self.num_layers,
            unit=loaded.unit,
            offset=loaded.offset,
            flops=shape.logits_rows * work.logits_flops_per_row,
        )
        self._stream.used(self.num_layers, "head", logits)
        self._stream.load_ahead()
        return self._steps

    def _embed(self, start: int, stop: int, waits: Sequence[Dependency]) -> Dependency:
        nbytes = (stop - start) * self.work.hidden_bytes_per_token
        return self._emit(StepKind.EMBED, self.compute_lane, waits, start=start, stop=stop, bytes=nbytes)

    def _parts(self, shape: PassShape) -> list[Part]:
        """The pass as a whole, or as two halves of consecutive micro-batches."""
        placed = _placed(shape)
        starts = [start for _, start in placed]
        cut = self._cut(shape) if self.half_batches else 0
        if not cut:
            return [Part(placed, 0, shape.tokens)]
        return [Part(placed[:cut], 0, starts[cut]), Part(placed[cut:], starts[cut], shape.tokens)]

    def _small_parts(self, shape: PassShape) -> list[Part]:
        placed, parts = _placed(shape), []
        for count in cut_rows([micro_batch.query_tokens for micro_batch in shape.micro_batches], self.part_tokens):
            chosen, placed = placed[:count], placed[count:]
            start, stop = chosen[0][1], placed[0][1] if placed else shape.tokens
            part = Part(chosen, start, stop, place=len(parts) % 2)
            if len(parts) > 1:
                part.busy = parts[-2].busy  # whose q, k, v rows it overwrites
            parts.append(part)
        return parts

    def _cut(self, shape: PassShape) -> int:
        """How many micro-batches make the first half; 0 where halves would not help.

        Best is what splits both the tokens, which is the device's work, and the KV attended on the CPU most evenly.
        """
        tokens, attended = [0], [0]
        for part in shape.micro_batches:
            on_cpu = part.home is not Tier.GPU and part.attend_lane is Lane.CPU
            tokens.append(tokens[-1] + part.query_tokens)
            attended.append(attended[-1] + (part.below.kv_tokens if on_cpu else 0))
        if not attended[-1] or len(shape.micro_batches) < 2:
            return 0

        def unevenness(cut: int) -> float:
            return abs(2 * tokens[cut] / tokens[-1] - 1) + abs(2 * attended[cut] / attended[-1] - 1)

        return min(range(1, len(shape.micro_batches)), key=unevenness)

    def _run_layers(self, parts: list[Part]) -> None:
        """Each part in turn, from its attention to that of the next layer.

        The first stops earlier where the ring has no room for the weights it needs; the second then comes to the same
        point, which frees room.
        """
        first = parts[0]
        while first.stage < len(self._stages):
            for part in parts:
                leads = part is first and len(parts) > 1
                if self._halved and self._stages[part.stage].kind is StepKind.ATTENTION_OUTPUT:
                    self._attention.load_ahead(part, self._stages[part.stage].layer)
                self._advance(part, first.stage if part is not first else len(self._stages), leads)

    def _advance(self, part: Part, end: int, leads: bool) -> None:
        """Through the stages before ``end``, but not past the inputs of an attention."""
        start = part.stage
        while part.stage < end:
            stage = self._stages[part.stage]
            if leads and not self._stream.ready(stage.layer, stage.module) and part.stage > start:
                return
            self._run_stage(part, stage)
            part.stage += 1
            if stage.kind is StepKind.ATTENTION_INPUTS:
                return

    def _run_in_turn(self, parts: list[Part], rows: Sequence[Dependency]) -> None:
        """One part after another through a layer, then through the next; ``rows``: what embeddings wait for."""
        visits = [(layer, part) for layer in range(self.num_layers) for part in parts]
        left: list[list[Dependency]] = [[], []]  # of each place: its last hidden rows are needed no more
        for (layer, part), (next_layer, following) in zip(visits, [*visits[1:], (0, None)]):
            if layer == 0:
                part.loaded = [self._embed(part.start, part.stop, (*rows, *left[part.place]))]
            loads = following is not None and next_layer > 0
            for stage in self._stages_of[layer]:
                if stage.kind is StepKind.ATTENTION_OUTPUT and loads and following.place != part.place:
                    self._load(following, next_layer, left)
                self._run_stage(part, stage)
            where = {"layer": layer, "start": part.start, "stop": part.stop}
            if layer == self.num_layers - 1:
                left[part.place] = [self._emit(StepKind.KEEP_SAMPLED, self.compute_lane, **where)]
            else:
                nbytes = (part.stop - part.start) * self.work.hidden_bytes_per_token
                part.saved = [self._emit(StepKind.SAVE_HIDDEN, Lane.D2H, (self._last,), bytes=nbytes, **where)]
                left[part.place] = part.saved
            if loads and following.place == part.place:
                self._load(following, next_layer, left)

    def _load(self, part: Part, layer: int, left: list[list[Dependency]]) -> None:
        """Hidden rows of a part to its place, once those of another have left it."""
        nbytes = (part.stop - part.start) * self.work.hidden_bytes_per_token
        where = {"layer": layer, "start": part.start, "stop": part.stop, "bytes": nbytes}
        part.loaded = [self._emit(StepKind.LOAD_HIDDEN, Lane.H2D, (*part.saved, *left[part.place]), **where)]

    def _run_stage(self, part: Part, stage: _Stage) -> None:
        waits: list[Dependency] = []
        if stage.kind is StepKind.ATTENTION_INPUTS:
            waits = [*part.busy, *part.loaded]
            part.busy.clear()
        elif stage.kind is StepKind.ATTENTION_OUTPUT:
            if self._halved:
                self._finish_attention(part, stage.layer)
            waits, part.attended = part.attended, []
        elif stage.kind is StepKind.EXPERTS and stage.ends_layer:
            waits, part.routed = part.routed, []
        loaded = self._stream.use(stage.layer, stage.module)
        step = self._emit(
            stage.kind,
            self.compute_lane,
            (*loaded.ready, *waits),
            layer=stage.layer,
            unit=loaded.unit,
            start=part.start,
            stop=part.stop,
            offset=loaded.offset,
            flops=int((part.stop - part.start) * stage.flops_per_token),
        )
        if stage.kind is StepKind.MLP:
            self._stream.routed(stage.layer, step)
            if self._cpu_experts[stage.layer]:
                self._run_on_cpu(part, stage.layer, step)
        self._last = step
        self._stream.used(stage.layer, stage.module, step)
        if stage.kind is StepKind.ATTENTION_INPUTS:
            part.inputs = step
            for micro_batch, start in part.micro_batches:
                self._attention.send(part, stage.layer, micro_batch, start)
                if not self._halved:
                    self._attention.receive(part, stage.layer, micro_batch, start)
                    self._attention.attend_staged(part, stage.layer, micro_batch, start)
            if not self._halved:
                self._attention.merge(part)

    def _run_on_cpu(self, part: Part, layer: int, router: Dependency) -> None:
        """Experts that run where they lie, beside the device's and the link's copies of those."""
        work, tokens = self.work, part.stop - part.start
        where = {"layer": layer, "start": part.start, "stop": part.stop}
        down = self._emit(
            StepKind.OFFLOAD_NORMED, Lane.D2H, (router,), bytes=tokens * work.normed_bytes_per_token, **where
        )
        flops = int(tokens * self._cpu_experts[layer] * work.flops_per_expert_and_token)
        done = self._emit(StepKind.EXPERTS, Lane.CPU, (down,), flops=flops, **where)
        nbytes = tokens * work.routed_bytes_per_token
        part.routed = [self._emit(StepKind.RETURN_ROUTED, Lane.H2D, (done,), bytes=nbytes, **where)]

    def _finish_attention(self, part: Part, layer: int) -> None:
        """What a half does when its turn comes: KV that must be copied first is attended last."""
        for micro_batch, start in part.micro_batches:
            self._attention.receive(part, layer, micro_batch, start)
        for micro_batch, start in part.micro_batches:
            self._attention.attend_staged(part, layer, micro_batch, start)
        self._attention.merge(part)

    def _emit(self, kind: StepKind, lane: Lane, depends_on: Sequence[Dependency] = (), **fields) -> Dependency:
        if len(depends_on) == 1 and depends_on[0][0] is not lane:
            waits = (depends_on[0],)
        else:
            waits = self._latest(depends_on, lane, kind in STREAMING)
        order = self._orders[lane]
        self._orders[lane] = order + 1
        if kind is StepKind.COPY_WEIGHTS:
            self._copies.add(order)
        self._steps.append(Step(kind, lane, order, self._shape.index, waits, **fields))
        return (lane, order)

    def _latest(self, depends_on: Sequence[Dependency], lane: Lane, streams: bool) -> tuple[Dependency, ...]:
        """Of what a step waits for on one queue, the latest stands for all: weights on their way to the device are a
        queue of their own beside the rows."""
        latest: dict[tuple[Lane, bool], int] = {}
        others: list[Dependency] = []
        for dependency in depends_on:
            dependency_lane, earlier = dependency
            if dependency_lane in DISK_LANES:  # where several threads may end a later step first
                others.append(dependency)
                continue
            is_copy = dependency_lane is Lane.H2D and (earlier in self._copies or earlier in self._copies_before)
            if dependency_lane is not lane or is_copy is not streams:  # a queue keeps its own order
                queue = (dependency_lane, is_copy)
                latest[queue] = max(earlier, latest.get(queue, -1))
        return (*((queue[0], earlier) for queue, earlier in latest.items()), *others)


def _placed(shape: PassShape) -> list[tuple[MicroBatchShape, int]]:
    """Micro-batches, each with its first row."""
    rows = itertools.accumulate((micro_batch.query_tokens for micro_batch in shape.micro_batches), initial=0)
    return list(zip(shape.micro_batches, rows))


def cut_rows(row_counts: Sequence[int], most: int) -> list[int]:
    """How many of consecutive micro-batches make each part of at most ``most`` rows.

    As few parts as can be, but an even number of them where one can be split: the last part of a layer and the first of
    the next then take different places, so that one comes while the other is computed.
    """
    parts: list[int] = []
    rows = 0
    for count in row_counts:
        if parts and rows + count <= most:
            parts[-1] += 1
            rows += count
        else:
            parts.append(1)
            rows = count
    longest = max(range(len(parts)), key=parts.__getitem__, default=0)
    if len(parts) % 2 and parts[longest] > 1:
        parts[longest : longest + 1] = [parts[longest] - parts[longest] // 2, parts[longest] // 2]
    return parts


def _stages(units: Sequence[WeightUnit], work: ModelWork, num_layers: int) -> list[_Stage]:
    later: dict[int, list[WeightUnit]] = {}  # of each layer, what runs after its attention
    for unit in units:
        if unit.module not in ("attention", "head"):
            later.setdefault(unit.layer, []).append(unit)
    stages = []
    for layer in range(num_layers):
        stages += [
            _Stage(StepKind.ATTENTION_INPUTS, layer, "attention", work.attention_inputs_flops_per_token),
            _Stage(StepKind.ATTENTION_OUTPUT, layer, "attention", work.attention_output_flops_per_token),
        ]
        for unit in later.get(layer, (None,)):
            if unit is not None and unit.experts:
                flops = (unit.experts - unit.cpu_experts) * work.flops_per_expert_and_token
                stages.append(_Stage(StepKind.EXPERTS, layer, unit.module, flops, unit is later[layer][-1]))
            else:
                module = "mlp" if unit is None else unit.module
                stages.append(_Stage(StepKind.MLP, layer, module, work.mlp_flops_per_token[layer]))
    return stages
