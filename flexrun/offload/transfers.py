"""The steps of worker lanes: what moves between tiers, and what the host does, while the compute lane goes on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from flexrun.models.spec import ModelSpec
from flexrun.offload.activations import Activations
from flexrun.offload.batcher import MicroBatchRows
from flexrun.offload.coded_kv import slab_name, take_in_and_attend
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.kv_store import KVStore, pieces
from flexrun.offload.modules import attend_rows, store
from flexrun.offload.weight_store import WeightStore
from flexrun.steps import Step, StepKind


class Transfers:
    """Turns a step of a worker lane into the parts that the lane's threads run."""

    def __init__(
        self,
        spec: ModelSpec,
        weights: WeightStore,
        kv: KVStore,
        activations: Activations,
        accelerator: EmulatedDevice,
    ):
        self._spec, self._weights, self._kv = spec, weights, kv
        self._activations, self._accelerator = activations, accelerator
        self._parts = {
            StepKind.READ_WEIGHTS: lambda step: weights.read_parts(step, self._chosen(step)),
            StepKind.COPY_WEIGHTS: lambda step: weights.copy_parts(step, self._chosen(step)),
            StepKind.READ_KV: lambda step: kv.read_parts(step, activations.rows[step.micro_batch].segments),
            StepKind.WRITE_KV: lambda step: kv.write_parts(step, activations.rows[step.micro_batch].segments),
        }
        self._whole = {
            StepKind.READ_ROWS: self._read_rows,
            StepKind.OFFLOAD_QUERY: self._offload_query,
            StepKind.LOAD_KV: self._load_kv,
            StepKind.SAVE_KV: self._save_kv,
            StepKind.ATTEND: self._attend_on_host,
            StepKind.RETURN_ATTENDED: self._return_attended,
            StepKind.LOAD_HIDDEN: self._load_hidden,
            StepKind.SAVE_HIDDEN: self._save_hidden,
            StepKind.OFFLOAD_NORMED: lambda step: activations.sparse.offload(step),
            StepKind.EXPERTS: lambda step: activations.sparse.on_cpu.run(step),
            StepKind.RETURN_ROUTED: lambda step: activations.sparse.on_cpu.bring_back(step),
        }

    def parts(self, step: Step) -> list[Callable[[], None]]:
        if step.kind in self._parts:
            return self._parts[step.kind](step)
        return [partial(self._run, step)]

    def settle(self, step: Step) -> Step:
        """The step with the bytes it moves, once it is known which experts were chosen."""
        return step._replace(bytes=self._weights.moved_bytes(step, self._chosen(step)))

    def _chosen(self, step: Step) -> list[int] | None:
        """How many tokens chose each expert, where only chosen ones are moved."""
        return self._activations.sparse.counts[step.layer] if step.chosen else None

    @torch.inference_mode()
    def _run(self, step: Step) -> None:
        self._whole[step.kind](step)

    def _read_rows(self, step: Step) -> None:
        activations, table = self._activations, self._weights.embedding_rows
        target = activations.embedding_rows.view(0, (len(activations.unique), table.row_bytes), torch.uint8)
        table.read_rows(activations.unique.tolist(), target)

    def _offload_query(self, step: Step) -> None:
        activations = self._activations
        rows = activations.rows[step.micro_batch]
        part = slice(rows.start, rows.fresh_start)  # what starts in this pass is attended on the device
        self._accelerator.copy(activations.host_query[part], activations.query[part])
        if self._kv.form is None:
            self._store_to_host(step, rows)
            return
        for target, source in zip(activations.host_new, activations.new_rows):
            self._accelerator.copy(target[part], source[part])
        self._carry_home(step)

    def _save_kv(self, step: Step) -> None:
        if self._kv.form is None:
            self._store_to_host(step, self._activations.rows[step.micro_batch])
        else:
            self._carry_home(step)

    def _carry_home(self, step: Step) -> None:
        """What the device has compressed, and what the host keeps of prompts that start. All that the step copies has
        then landed."""
        activations, copy = self._activations, self._accelerator.copy
        away, home = (
            activations.away_rows[step.micro_batch],
            self._kv.on_host(step.layer, step.micro_batch, step.offset),
        )
        for made, record, count in away.homes:
            copy(home[record : record + count], activations.new_records[made : made + count])
        for row, place, count in away.late:
            for plane, source in zip(self._kv.recent(step.layer, step.micro_batch), activations.new_rows):
                copy(plane[place, :count], source[row : row + count])
        self._accelerator.landed()

    def _store_to_host(self, step: Step, rows: MicroBatchRows) -> None:
        """New keys and values to the slab; behind everything else that the step copies, for it waits for its copies."""
        kept, kv_rows = self._activations.new_rows, rows.kv_rows
        if rows.split is not None:
            kept, kv_rows = self._activations.leaving_rows, rows.split.kv_rows[rows.split.below_rows]
        if not len(kv_rows):
            self._accelerator.landed()
            return
        slab, kv_rows = self._kv.on_host(step.layer, rows.index, step.offset), torch.from_numpy(kv_rows)
        new = [rows_of_plane[rows.start : rows.start + len(kv_rows)] for rows_of_plane in kept]
        for arrived, landed in self._accelerator.rows_on_host(*new):
            store(slab, kv_rows[arrived], landed)

    def _load_kv(self, step: Step) -> None:
        """Tokens cached before this pass, runs of neighbouring sequences together."""
        rows = self._activations.rows[step.micro_batch]
        slab = self._kv.on_host(step.layer, rows.index, step.source_offset)
        staging = self._kv.staging(step.offset, rows.index)
        for run in self._kv.cached_runs(rows.index, rows.segments):
            for target, source in zip(pieces(staging, *run), pieces(slab, *run)):
                self._accelerator.copy(target, source)

    def _attend_on_host(self, step: Step) -> None:
        activations = self._activations
        rows = activations.rows[step.micro_batch]
        if self._kv.form is not None:
            self._attend_coded_on_host(step)
            return
        slab = self._kv.on_host(step.layer, rows.index, step.offset)
        beside, segments, lse = activations.host_beside_kv.get(step.layer), rows.cached, None
        if rows.prefixes is not None:
            lse = activations.host_lse
        if rows.split is not None:
            segments = rows.split.below
            lse = None if rows.split.above is None else activations.host_lse
        attend_rows(self._spec, step, segments, slab, beside, activations.host_query, activations.host_attended, lse)

    def _attend_coded_on_host(self, step: Step) -> None:
        activations, own = self._activations, slice(step.start, step.stop)
        slab, away = self._kv.coded(step.layer, step.micro_batch, step.offset), activations.away_rows[step.micro_batch]
        new, form = [plane[own] for plane in activations.host_new], self._spec.attention_form(step.layer)
        query, out = activations.host_query[own], activations.host_attended[own]
        sinks = activations.host_beside_kv.get(step.layer)
        lse = activations.host_lse[own] if activations.rows[step.micro_batch].prefixes is not None else None
        take_in_and_attend(query, slab, away.cached, new, form, sinks, out, slab_name(step.layer), lse)

    def _load_hidden(self, step: Step) -> None:
        activations, part = self._activations, slice(step.start, step.stop)
        self._accelerator.copy(activations.hidden[part], activations.host_hidden[part])

    def _save_hidden(self, step: Step) -> None:
        activations, part = self._activations, slice(step.start, step.stop)
        self._accelerator.copy(activations.host_hidden[part], activations.hidden[part])
        self._accelerator.landed()

    def _return_attended(self, step: Step) -> None:
        activations, part = self._activations, slice(step.start, step.stop)
        rows, target = activations.rows[step.micro_batch], activations.attended
        split = rows.split
        if rows.prefixes is not None:
            self._accelerator.copy(activations.own_lse[part], activations.host_lse[part])
        if split is not None and split.above is not None:  # merged there with what the device found
            target = activations.attended_below
            self._accelerator.copy(activations.lse_below[part], activations.host_lse[part])
        self._accelerator.copy(target[part], activations.host_attended[part])
