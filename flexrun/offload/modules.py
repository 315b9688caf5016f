"""The compute steps of a pass, module by module."""

from __future__ import annotations

from collections.abc import Callable

import numpy
from torch import Tensor

from flexrun.attention import Segments, attend, attend_latent, merge
from flexrun.core import Tier
from flexrun.models import decoder
from flexrun.models.spec import ModelSpec
from flexrun.offload.activations import Activations
from flexrun.offload.away_kv import attend_fresh, attend_staged, complete_away
from flexrun.offload.batcher import MicroBatchRows
from flexrun.offload.coded_kv import CodedSlab, attend_shared, slab_name, take_in_and_attend
from flexrun.offload.kv_store import KVStore
from flexrun.offload.pass_rows import PassRows
from flexrun.offload.token_split import SplitRows
from flexrun.offload.weight_store import TOKEN_EMBEDDING, WeightStore
from flexrun.steps import Step, StepKind


class Modules:
    """Runs steps of the compute lane. ``consume(start, logits)``: see ``Executor.run``."""

    def __init__(self, spec: ModelSpec, weights: WeightStore, kv: KVStore, activations: Activations):
        self._spec, self._weights, self._kv = spec, weights, kv
        self._activations = activations
        self.consume: Callable[[int, Tensor], None] | None = None
        self._steps = {
            StepKind.EMBED: self._embed,
            StepKind.ATTENTION_INPUTS: self._attention_inputs,
            StepKind.ATTEND: self._attend,
            StepKind.ATTEND_FRESH: self._attend_fresh,
            StepKind.ATTEND_PREFIX: self._attend_prefix,
            StepKind.MERGE: self._merge,
            StepKind.ATTENTION_OUTPUT: self._attention_output,
            StepKind.MLP: self._mlp,
            StepKind.EXPERTS: lambda step: activations.sparse.run(step, activations.hidden),
            StepKind.KEEP_SAMPLED: self._keep_sampled,
            StepKind.LOGITS: self._logits,
        }

    def run(self, step: Step) -> None:
        self._steps[step.kind](step)

    def _embed(self, step: Step) -> None:
        rows, weights = self._activations, self._weights.embedding
        token_ids = rows.token_ids[step.start : step.stop]
        if rows.unique is not None:
            chosen, token_ids = rows.token_rows(step)
            weights = {**weights, TOKEN_EMBEDDING: self._token_embedding(weights, chosen)}
        for start, stop in rows.chunks(step):
            ids = token_ids[start - step.start : stop - step.start]
            rows.hidden[start:stop] = decoder.embed(self._spec, weights, ids, rows.positions[start:stop])

    def _token_embedding(self, weights: dict[str, Tensor], chosen: Tensor | None) -> Tensor:
        """The rows of the tokens of this pass, on the compute device, from a table on disk or on the host.

        chosen: see Activations.token_rows.
        """
        rows, hidden = self._activations, self._activations.hidden.data
        if rows.embedding_rows is not None:
            table = rows.embedding_rows.view(0, (len(rows.unique), self._spec.embedding_size), hidden.dtype)
            table = table if chosen is None else table.index_select(0, chosen)
        else:
            table = weights[TOKEN_EMBEDDING].index_select(0, rows.unique if chosen is None else rows.unique[chosen])
        return table.to(hidden.device, non_blocking=True)

    def _attention_inputs(self, step: Step) -> None:
        activations, chunks = self._activations, self._activations.chunks(step)
        weights = self._weights.unit_weights(step, len(chunks))
        activations.keep_beside_kv(step.layer, weights)
        whole = len(chunks) == 1 and step.rows == activations.plan.shape.tokens
        for start, stop in chunks:
            query, *new = decoder.attention_inputs(
                self._spec, step.layer, weights, activations.hidden[start:stop], activations.rotary.rows(start, stop)
            )
            if whole and not activations.copies_query:
                activations.query = query  # a view of the projection: no need to copy what is whole
            else:
                activations.query = activations.query_rows
                activations.query[start:stop] = query
            for rows in activations.plan.micro_batches:
                low, high = max(start, rows.start), min(stop, rows.stop)
                if low >= high:
                    continue
                part = slice(low - start, high - start)
                if self._kv.form is None and activations.in_place(rows.index):
                    slab = self._kv.slab(step.layer, rows.index)
                    kv_rows = activations.kv_rows[rows.index][low - rows.start : high - rows.start]
                    store(slab, kv_rows, [rows[part] for rows in new])
                else:
                    for kept, values in zip(activations.new_rows, new):
                        kept[low:high] = values[part]
                    if rows.split is not None:
                        self._part_ways(step.layer, rows, low, high)
        for rows in activations.plan.micro_batches if activations.away_rows else ():
            away = activations.away_rows.get(rows.index)
            if away is not None and step.start <= rows.start < step.stop:
                bounds = (rows.start, rows.fresh_start), (rows.fresh_start, rows.stop)
                cached, fresh = ([kept[start:stop] for kept in activations.new_rows] for start, stop in bounds)
                complete_away(away, self._made(step.layer, rows.index), cached, fresh, slab_name(step.layer))

    def _part_ways(self, layer: int, rows: MicroBatchRows, low: int, high: int) -> None:
        """New rows ``[low, high)`` of the pass, in KV split by token: to the device's slab, or to those that leave."""
        activations, tables = self._activations, self._activations.split_rows[rows.index]
        new = [kept[low:high] for kept in activations.new_rows]
        bounds = low - rows.start, high - rows.start
        first, last = numpy.searchsorted(rows.split.above_rows, bounds).tolist()
        if first < last:
            slab, chosen = self._kv.slab_on_device(layer, rows.index), tables["above"][first:last] - bounds[0]
            store(slab, tables["kv"][first:last], [values.index_select(0, chosen) for values in new])
        first, last = bounds[0] - first, bounds[1] - last
        if first < last:
            chosen = tables["below"][first:last] - bounds[0]
            for leaving, values in zip(activations.leaving_rows, new):
                leaving[rows.start + first : rows.start + last] = values.index_select(0, chosen)

    def _attend(self, step: Step) -> None:
        activations = self._activations
        rows = activations.rows[step.micro_batch]
        segments, beside = rows.segments, activations.beside_kv.get(step.layer)
        if self._kv.form is not None:
            shared = self._kv.micro_batches[step.micro_batch].shared
            (self._attend_shared if shared else self._attend_coded)(step, beside)
            return
        if rows.split is not None:
            self._attend_above(step, rows.split, beside)
            return
        if activations.in_place(rows.index):
            slab = self._kv.slab(step.layer, rows.index)
        else:  # KV that came to a staging slot: add this pass's own rows
            slab = self._kv.staging(step.offset, rows.index)
            if activations.compute_tier is Tier.GPU:
                segments = rows.cached
            own = [rows[step.start : step.stop] for rows in activations.new_rows]
            store(slab, activations.kv_rows[rows.index][: step.rows], own)
        lse = activations.own_lse if rows.prefixes is not None else None
        attend_rows(self._spec, step, segments, slab, beside, activations.query, activations.attended, lse)

    def _attend_prefix(self, step: Step) -> None:
        """Shared prefixes level by level, each joined with what its rows saw before; sinks have had their part."""
        activations, form = self._activations, self._spec.attention_form(step.layer)
        prefixes, slab = activations.rows[step.micro_batch].prefixes, self._kv.slab(step.layer, 0)
        unlimited = not form.window or form.window >= prefixes.reach
        for level in prefixes.levels:
            rows = slice(step.start + level.start, step.start + level.stop)
            found, lse = activations.found_in_prefix[rows].zero_(), activations.prefix_lse[rows].fill_(float("-inf"))
            attend(
                activations.query[rows],
                slab[0],
                slab[1],
                level.together if unlimited else level.each,
                scale=form.scale,
                window=0 if unlimited else form.window,
                softcap=form.softcap,
                out=found,
                lse=lse,
            )
            own, own_lse = activations.attended[rows], activations.own_lse[rows]
            merge(own, own_lse, found, lse, out=own, lse=own_lse)

    def _attend_coded(self, step: Step, beside: Tensor | None) -> None:
        """Take the rows of a micro-batch into its compressed slab, and attend it."""
        activations, slab = self._activations, self._kv.coded(step.layer, step.micro_batch, step.offset)
        own = slice(step.start, step.stop)
        new, form = [kept[own] for kept in activations.new_rows], self._spec.attention_form(step.layer)
        query, out = activations.query[own], activations.attended[own]
        lse = activations.own_lse[own] if activations.rows[step.micro_batch].prefixes is not None else None
        away = activations.away_rows.get(step.micro_batch)
        if away is not None:
            made = self._made(step.layer, step.micro_batch)
            attend_staged(query, away, made, slab, new, form, beside, out, lse)
        else:
            rows = activations.coded_rows[step.micro_batch]
            take_in_and_attend(query, slab, rows, new, form, beside, out, slab_name(step.layer), lse)

    def _attend_shared(self, step: Step, beside: Tensor | None) -> None:
        """Rows of shared prefixes beside a compressed cache."""
        activations, own = self._activations, slice(step.start, step.stop)
        new, form = [kept[own] for kept in activations.new_rows], self._spec.attention_form(step.layer)
        query, out, lse = activations.query[own], activations.attended[own], activations.own_lse[own]
        slab, rows = self._kv.slab(step.layer, step.micro_batch), activations.coded_rows[step.micro_batch]
        found = activations.found_in_prefix[own], activations.prefix_lse[own]
        name = slab_name(step.layer)
        attend_shared(query, slab, rows, new, self._kv.form, form, beside, out, lse, found, name)

    def _made(self, layer: int, micro_batch: int) -> CodedSlab:
        """The new records of a pass, with the recent rows of a micro-batch."""
        return CodedSlab(self._kv.form, self._activations.new_records, self._kv.recent(layer, micro_batch))

    def _attend_above(self, step: Step, split: SplitRows, beside: Tensor | None) -> None:
        """The device's part of sequences whose KV is split; the sinks go with the host's part, where there is one."""
        activations, lse = self._activations, None
        slab = self._kv.slab_on_device(step.layer, step.micro_batch)
        if split.below is not None:
            beside, lse = None, activations.lse_above
        attend_rows(self._spec, step, split.above, slab, beside, activations.query, activations.attended, lse)

    def _merge(self, step: Step) -> None:
        activations = self._activations
        for start, stop in activations.chunks(step):
            part = slice(start, stop)
            above = activations.attended[part]
            below, lse_below = activations.attended_below[part], activations.lse_below[part]
            merge(above, activations.lse_above[part], below, lse_below, out=above)

    def _attend_fresh(self, step: Step) -> None:
        """Prompts that start in this pass attend the rows that ATTENTION_INPUTS has just made."""
        activations = self._activations
        own = [rows[step.start : step.stop] for rows in activations.new_rows]
        rows, beside = activations.rows[step.micro_batch], activations.beside_kv.get(step.layer)
        if self._kv.form is not None:
            query, out = (each[step.start : step.stop] for each in (activations.query, activations.attended))
            away, made = activations.away_rows[step.micro_batch], self._made(step.layer, step.micro_batch)
            lse = activations.own_lse[step.start : step.stop] if rows.prefixes is not None else None
            attend_fresh(query, away, made, own, self._spec.attention_form(step.layer), beside, out, lse)
            return
        lse = activations.own_lse if rows.prefixes is not None else None
        attend_rows(self._spec, step, rows.fresh, own, beside, activations.query, activations.attended, lse)

    def _attention_output(self, step: Step) -> None:
        activations, chunks = self._activations, self._activations.chunks(step)
        weights = self._weights.unit_weights(step, len(chunks))
        activations.branches[step.start] = [
            decoder.attention_output(self._spec, step.layer, weights, activations.attended[start:stop])
            for start, stop in chunks
        ]

    def _mlp(self, step: Step) -> None:
        activations, chunks = self._activations, self._activations.chunks(step)
        branches = activations.branches.pop(step.start)
        if self._spec.is_sparse(step.layer):
            activations.sparse.route(step, activations.hidden, branches, chunks)
            return
        weights = self._weights.unit_weights(step, len(chunks))
        for start, stop in reversed(chunks):  # each branch is freed as it is used
            decoder.mlp(self._spec, step.layer, weights, activations.hidden[start:stop], branches.pop())

    def _keep_sampled(self, step: Step) -> None:
        activations = self._activations
        first, last = numpy.searchsorted(activations.plan.logits_rows, (step.start, step.stop)).tolist()
        rows = activations.logits_rows[first:last] - step.start
        activations.sampled[first:last] = activations.hidden[step.start : step.stop].index_select(0, rows)

    def _logits(self, step: Step) -> None:
        activations, weights = self._activations, self._weights.unit_weights(step)
        rows, most = activations.logits_rows, activations.logits_block_rows
        for start in range(0, len(rows), most):
            block = slice(start, min(start + most, len(rows)))
            if activations.places.in_parts:
                chosen = activations.sampled[block]
            else:
                chosen = activations.hidden.data.index_select(0, rows[block])
            self.consume(start, decoder.logits(self._spec, weights, chosen))


def attend_rows(
    spec: ModelSpec,
    step: Step,
    segments: Segments,
    slab: Tensor | list[Tensor],
    beside_kv: Tensor | None,
    query: PassRows | Tensor,
    attended: PassRows | Tensor,
    lse: PassRows | Tensor | None = None,
) -> None:
    """Attention of a step's rows over the planes of a slab, on their device. beside_kv: see Activations."""
    form, query = spec.attention_form(step.layer), query[step.start : step.stop]
    out = attended[step.start : step.stop]
    lse = None if lse is None else lse[step.start : step.stop]
    if spec.latent is not None:
        attend_latent(query, slab[0], segments, beside_kv, scale=form.scale, out=out)
        return
    attend(
        query,
        slab[0],
        slab[1],
        segments,
        scale=form.scale,
        window=form.window,
        softcap=form.softcap,
        sinks=beside_kv,
        out=out,
        lse=lse,
    )


def store(slab: Tensor, kv_rows: Tensor, new: list[Tensor]) -> None:
    """Write new rows [T, heads, width], one tensor a plane, to rows ``kv_rows`` of a slab."""
    for plane, rows in zip(slab, new):
        plane.index_copy_(0, kv_rows, rows)
