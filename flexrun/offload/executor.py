"""Runs the steps of a pass: reads and copies on their lanes' threads, compute on the caller's."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flexrun.attention import attend
from flexrun.config import Policy
from flexrun.core import DTYPES, Event, Lane, Tier
from flexrun.errors import ExecutionError
from flexrun.models import decoder
from flexrun.models.rope import RopeTables, Rotary
from flexrun.models.spec import ModelSpec
from flexrun.offload.batcher import MicroBatchRows, PassPlan
from flexrun.offload.kv_store import KVStore
from flexrun.offload.lanes import LaneWorker, Progress, event_of
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.weight_store import TOKEN_EMBEDDING, WeightStore
from flexrun.placement import LOGITS_ROWS, offloaded_query_bytes, workspace_bytes
from flexrun.schedule import Scheduler
from flexrun.steps import Step, StepKind

READ_THREADS = 3  # enough requests in flight to fill one SSD; each costs little CPU


class Executor:
    """Owns the lanes and the activations of a run.

    ``events`` collects what every step took when ``trace`` is set.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        scheduler: Scheduler,
        weights: WeightStore,
        kv: KVStore,
        rope: RopeTables,
        host: MemoryTier,
        device: MemoryTier | None,
        *,
        trace: bool = False,
    ):
        self._spec, self._policy, self._scheduler = spec, policy, scheduler
        self._weights, self._kv, self._rope = weights, kv, rope
        self._compute_lane = scheduler.compute_lane
        self._compute_tier = Tier.CPU if device is None else Tier.GPU
        self._row_count = min(policy.token_micro_batch, policy.tokens_per_pass)
        memory = host if device is None else device
        self._reserved = [(memory, "workspace", workspace_bytes(spec, policy))]
        dtype, tokens = DTYPES[spec.dtype], policy.tokens_per_pass
        heads = (tokens, spec.num_heads, spec.head_dim)
        kv_heads = (tokens, spec.num_kv_heads, spec.head_dim)
        on_host = [place for place in kv.micro_batches if place.home is Tier.CPU] if device is not None else []
        attends_on_host = any(place.attend_lane is Lane.CPU for place in on_host)
        if attends_on_host:
            self._reserved.append((host, "offloaded_query", offloaded_query_bytes(spec, policy)))
        row_bytes = weights.embedding_rows.row_bytes if weights.embedding_rows else 0
        self._embedding_rows = host.allocate("embedding_rows", tokens * row_bytes) if row_bytes else None
        for tier, kind, nbytes in self._reserved:
            tier.reserve(kind, nbytes)
        self._hidden = torch.empty(tokens, spec.hidden_size, dtype=dtype)
        self._query_rows, self._attended = torch.empty(heads, dtype=dtype), torch.empty(heads, dtype=dtype)
        self._query = self._query_rows
        self._branches: list[Tensor] = []  # the attention branch of each chunk of rows, until the MLP takes it
        if on_host:  # rows that a copy lane carries to the host KV while the compute lane goes on
            self._key, self._value = torch.empty(kv_heads, dtype=dtype), torch.empty(kv_heads, dtype=dtype)
        if attends_on_host:
            self._host_query, self._host_attended = torch.empty(heads, dtype=dtype), torch.empty(heads, dtype=dtype)

        self.events: list[Event] | None = [] if trace else None
        record = self.events.append if trace else None
        self._progress = Progress()
        self._lanes = {Lane.DISK_READ: LaneWorker(Lane.DISK_READ, self._progress, record, READ_THREADS)}
        if device is not None:
            for lane in (Lane.H2D, Lane.D2H, Lane.CPU):
                self._lanes[lane] = LaneWorker(lane, self._progress, record)
        self._compute = {
            StepKind.EMBED: self._embed,
            StepKind.ATTENTION_INPUTS: self._attention_inputs,
            StepKind.ATTEND: self._attend_on_compute_tier,
            StepKind.ATTENTION_OUTPUT: self._attention_output,
            StepKind.MLP: self._mlp,
            StepKind.LOGITS: self._logits,
        }
        self._work = {  # steps of worker lanes: the parts that the lane's threads run
            StepKind.READ_WEIGHTS: lambda step: weights.read_parts(step),
            StepKind.COPY_WEIGHTS: lambda step: weights.copy_parts(step),
            StepKind.READ_ROWS: lambda step: [self._read_rows],
            StepKind.OFFLOAD_QUERY: lambda step: [partial(self._offload_query, step)],
            StepKind.LOAD_KV: lambda step: [partial(self._load_kv, step)],
            StepKind.SAVE_KV: lambda step: [partial(self._save_kv, step)],
            StepKind.ATTEND: lambda step: [partial(self._attend_on_host, step)],
            StepKind.RETURN_ATTENDED: lambda step: [partial(self._return_attended, step)],
        }
        self.compute_busy_seconds = 0.0
        self.compute_flops = 0
        self._plan: PassPlan | None = None
        self._rows: dict[int, MicroBatchRows] = {}
        self._consume: Callable[[int, Tensor], None] | None = None

    # Running a pass -----------------------------------------------------------------------------------

    @torch.inference_mode()
    def run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        """Run one pass. ``consume(start, logits)`` gets float32 [rows, vocab] for ``plan.sampled[start:]``.

        Raises ExecutionError (or the lane's own error) where a lane failed. An error or an interrupt in the middle
        of a pass leaves the lanes with steps of that pass, so no further pass will run: see ``failed``.
        """
        self._progress.check()
        try:
            self._run(plan, consume)
        except BaseException as error:
            self._progress.fail(error)
            raise

    @property
    def failed(self) -> bool:
        return self._progress.failure is not None

    def _run(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        self._begin(plan, consume)
        compute = []
        for step in self._scheduler.pass_steps(plan.shape):
            if step.lane is self._compute_lane:
                compute.append(step)
            else:
                self._lanes[step.lane].submit(step, self._work[step.kind](step))
        for step in compute:
            self._progress.wait(step)
            start_seconds = time.perf_counter()
            self._compute[step.kind](step)
            end_seconds = time.perf_counter()
            self._progress.finish(step.lane, step.order + 1)
            self.compute_busy_seconds += end_seconds - start_seconds
            self.compute_flops += step.flops
            if self.events is not None:
                self.events.append(event_of(step, start_seconds, end_seconds))
        self._progress.check()

    def _begin(self, plan: PassPlan, consume: Callable[[int, Tensor], None]) -> None:
        self._plan, self._consume = plan, consume
        self._rows = {rows.index: rows for rows in plan.micro_batches}
        self._rotary: Rotary = self._rope.gather(torch.from_numpy(plan.positions), torch.from_numpy(plan.lengths))
        self._kv_rows = [torch.from_numpy(rows.kv_rows) for rows in plan.micro_batches]
        tokens = plan.shape.tokens
        self._chunks = [(start, min(start + self._row_count, tokens)) for start in range(0, tokens, self._row_count)]
        token_ids = torch.from_numpy(plan.token_ids)
        self._unique, self._token_ids = (
            torch.unique(token_ids, return_inverse=True) if self._embedding_rows is not None else (None, token_ids)
        )

    def _in_place(self, index: int) -> bool:
        """Whether a micro-batch's slab is in the memory of the compute lane."""
        return self._kv.micro_batches[index].home is self._compute_tier

    # Compute steps ------------------------------------------------------------------------------------

    def _embed(self, step: Step) -> None:
        weights = self._weights.embedding
        if self._unique is not None:
            table = self._embedding_rows.view(0, (len(self._unique), self._spec.embedding_size), self._hidden.dtype)
            weights = {**weights, TOKEN_EMBEDDING: table}
        positions = torch.from_numpy(self._plan.positions)
        for start, stop in self._chunks:
            self._hidden[start:stop] = decoder.embed(
                self._spec, weights, self._token_ids[start:stop], positions[start:stop]
            )

    def _attention_inputs(self, step: Step) -> None:
        weights = self._weights.unit_weights(step)
        for start, stop in self._chunks:
            query, key, value = decoder.attention_inputs(
                self._spec, step.layer, weights, self._hidden[start:stop], self._rotary.rows(start, stop)
            )
            if len(self._chunks) == 1:
                self._query = query  # a view of the projection: no need to copy what is whole
            else:
                self._query = self._query_rows
                self._query[start:stop] = query
            for rows, kv_rows in zip(self._plan.micro_batches, self._kv_rows):
                low, high = max(start, rows.start), min(stop, rows.stop)
                if low >= high:
                    continue
                part = slice(low - start, high - start)
                if self._in_place(rows.index):
                    slab = self._kv.slab(step.layer, rows.index)
                    _store(slab, kv_rows[low - rows.start : high - rows.start], key[part], value[part])
                else:
                    self._key[low:high], self._value[low:high] = key[part], value[part]

    def _attend_on_compute_tier(self, step: Step) -> None:
        rows = self._rows[step.micro_batch]
        if self._in_place(rows.index):
            slab = self._kv.slab(step.layer, rows.index)
        else:  # host-resident KV, copied to a staging slot: add this pass's own rows
            slab = self._kv.staging(step.offset)
            part = slice(rows.start, rows.stop)
            _store(slab, torch.from_numpy(rows.kv_rows), self._key[part], self._value[part])
        self._attend(step.layer, rows, slab, self._query, self._attended)

    def _attend(self, layer: int, rows: MicroBatchRows, slab: Tensor, query: Tensor, attended: Tensor) -> None:
        form = self._spec.attention_form(layer)
        attend(
            query[rows.start : rows.stop],
            slab[0],
            slab[1],
            rows.segments,
            scale=form.scale,
            window=form.window,
            softcap=form.softcap,
            out=attended[rows.start : rows.stop],
        )

    def _attention_output(self, step: Step) -> None:
        weights = self._weights.unit_weights(step)
        self._branches = [
            decoder.attention_output(self._spec, step.layer, weights, self._attended[start:stop])
            for start, stop in self._chunks
        ]

    def _mlp(self, step: Step) -> None:
        weights = self._weights.unit_weights(step)
        for (start, stop), branch in zip(self._chunks, self._branches):
            decoder.mlp(self._spec, step.layer, weights, self._hidden[start:stop], branch)

    def _logits(self, step: Step) -> None:
        weights = self._weights.unit_weights(step)
        rows = torch.from_numpy(self._plan.sampled_rows)
        for start in range(0, len(rows), LOGITS_ROWS):
            chosen = self._hidden.index_select(0, rows[start : start + LOGITS_ROWS])
            self._consume(start, decoder.logits(self._spec, weights, chosen))

    # Steps of the worker lanes ------------------------------------------------------------------------

    def _read_rows(self) -> None:
        row_bytes = self._weights.embedding_rows.row_bytes
        count = len(self._unique)
        target = self._embedding_rows.view(0, (count, row_bytes), torch.uint8)
        self._weights.embedding_rows.read_rows(self._unique.tolist(), target)

    @torch.inference_mode()
    def _offload_query(self, step: Step) -> None:
        rows = self._rows[step.micro_batch]
        self._host_query[rows.start : rows.stop].copy_(self._query[rows.start : rows.stop])
        self._store_to_host(step, rows)

    @torch.inference_mode()
    def _save_kv(self, step: Step) -> None:
        self._store_to_host(step, self._rows[step.micro_batch])

    def _store_to_host(self, step: Step, rows: MicroBatchRows) -> None:
        part = slice(rows.start, rows.stop)
        slab = self._kv.slab(step.layer, rows.index)
        _store(slab, torch.from_numpy(rows.kv_rows), self._key[part], self._value[part])

    @torch.inference_mode()
    def _load_kv(self, step: Step) -> None:
        """Tokens cached before this pass, one copy a run of neighbouring sequences."""
        rows = self._rows[step.micro_batch]
        slab, staging = self._kv.slab(step.layer, rows.index), self._kv.staging(step.offset)
        for _, query_len, kv_start, kv_len in rows.segments.rows:
            part = slice(kv_start, kv_start + kv_len - query_len)
            staging[:, part].copy_(slab[:, part])

    @torch.inference_mode()
    def _attend_on_host(self, step: Step) -> None:
        rows = self._rows[step.micro_batch]
        slab = self._kv.slab(step.layer, rows.index)
        self._attend(step.layer, rows, slab, self._host_query, self._host_attended)

    @torch.inference_mode()
    def _return_attended(self, step: Step) -> None:
        rows = self._rows[step.micro_batch]
        self._attended[rows.start : rows.stop].copy_(self._host_attended[rows.start : rows.stop])

    # --------------------------------------------------------------------------------------------------

    def lane_statistics(self) -> dict[str, dict[str, float]]:
        """Busy seconds, and bytes or FLOPs, of each lane so far."""
        statistics = {
            lane.value: {"busy_seconds": worker.busy_seconds, "bytes": worker.moved_bytes}
            for lane, worker in self._lanes.items()
        }
        statistics[self._compute_lane.value] = {
            "busy_seconds": self.compute_busy_seconds,
            "flops": self.compute_flops,
        }
        return statistics

    def close(self) -> None:
        """Stop the lanes (whatever is queued is dropped) and give the activations back."""
        self._progress.fail(ExecutionError("the executor is closed"))
        for worker in self._lanes.values():
            worker.close()
        while self._reserved:
            tier, kind, nbytes = self._reserved.pop()
            tier.release(kind, nbytes)
        if self._embedding_rows is not None:
            self._embedding_rows.close()


def _store(slab: Tensor, kv_rows: Tensor, key: Tensor, value: Tensor) -> None:
    """Write key and value [T, KV, D] to rows ``kv_rows`` of slab [2, tokens, KV, D]."""
    slab[0].index_copy_(0, kv_rows, key)
    slab[1].index_copy_(0, kv_rows, value)
