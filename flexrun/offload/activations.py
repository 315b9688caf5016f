"""The activations of a pass: rows allocated once for the largest pass, and the tables of the pass at hand."""

from __future__ import annotations

import torch
from torch import Tensor

from flexrun.attention import prepare
from flexrun.config import Policy
from flexrun.core import DTYPES, Lane, Tier
from flexrun.models.rope import RopeTables, Rotary
from flexrun.models.spec import ModelSpec
from flexrun.offload.away_kv import AwayRows, away_rows
from flexrun.offload.batcher import MicroBatchRows, PassPlan
from flexrun.offload.coded_kv import CodedRows, SharedRows, coded_rows, reads_codes, shared_rows
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.kv_store import KVStore
from flexrun.offload.pass_rows import PassRows, Places
from flexrun.offload.sparse import SparseLayers
from flexrun.offload.tiers import Buffer, MemoryTier
from flexrun.offload.weight_store import TOKEN_EMBEDDING, WeightStore
from flexrun.placement import (
    attended_on_host,
    coded_kv_of,
    logits_block_rows,
    merge_bytes,
    new_groups_most,
    offloaded_query_bytes,
    part_tokens,
    prefix_row_bytes,
    waiting_hidden_bytes,
    workspace_bytes,
)
from flexrun.steps import Step


class Activations:
    """The rows of one pass, allocated once for the largest pass, and what is known of the pass at hand.

    Tables of the pass (positions, rotary rows, KV rows, token ids) are on the compute device. Its rows are there as a
    whole, or part after part: ``places`` knows where, and hidden, query, attended and new_rows are indexed with the
    numbers that rows have in the pass. host_hidden: [tokens, hidden_size], hidden states of parts that are not there;
    sampled: of rows that the head takes, kept of each part.
    hidden: [tokens, hidden_size]. query: [tokens, heads, head_dim]; attended: [tokens, heads, attended_head_dim].
    new_rows: what the pass adds to the cache, [tokens, heads, width] of each plane, kept for KV that is
    compressed, or lives elsewhere, until a copy lane has carried it there. host_query, host_attended: host copies for
    attention on the CPU; host_new [planes, tokens, heads, width]: of new_rows, where that is compressed. new_records:
    uint8 [groups, record_bytes], what is compressed on the device for a cache elsewhere; see away_kv.
    Where KV is split by token: leaving_rows, of new_rows those for the host, packed to the front of their micro-batch's
    rows; attended_below, what the host has attended; lse_below and lse_above: float32 [tokens, heads], of either side;
    host_lse: the first of them on the host.
    embedding_rows: rows of a table on disk, one for each different token. beside_kv, host_beside_kv: of each layer what
    attention reads beside query and KV: sinks, or the matrix that latents go through. sparse: what experts need.
    """

    def __init__(
        self,
        spec: ModelSpec,
        policy: Policy,
        weights: WeightStore,
        kv: KVStore,
        rope: RopeTables,
        host: MemoryTier,
        device: MemoryTier | None,
        accelerator: EmulatedDevice,
    ):
        self._rope, self._accelerator = rope, accelerator
        self.compute_tier = Tier.CPU if device is None else Tier.GPU
        self._homes = [place.home for place in kv.micro_batches]
        self._row_count = min(policy.token_micro_batch, policy.tokens_per_pass)
        memory = host if device is None else device
        self._reserved = [(memory, "workspace", workspace_bytes(spec, policy))]
        dtype, tokens, place = DTYPES[spec.dtype], policy.tokens_per_pass, accelerator.place
        self.logits_block_rows = logits_block_rows(policy)
        most = part_tokens(policy) if device is not None else 0
        there, self.places = 2 * most or tokens, Places(most)
        heads, attended_heads = (spec.num_heads, spec.head_dim), (spec.num_heads, spec.attended_head_dim)
        away = [each for each in kv.micro_batches if each.home is not self.compute_tier]
        attends_on_host = device is not None and any(each.attend_lane is Lane.CPU for each in away)
        splits = any(each.device_share for each in kv.micro_batches)
        if kv.shares_prefixes:
            self._reserved.append((memory, "prefix_rows", prefix_row_bytes(spec, policy)))
        if splits:
            self._reserved.append((memory, "kv_merge", merge_bytes(spec, policy)[1]))
        row_bytes = weights.embedding_rows.row_bytes if weights.embedding_rows else 0
        self.embedding_rows = host.allocate("embedding_rows", tokens * row_bytes) if row_bytes else None
        self._kv = kv
        beside = coded_kv_of(spec, policy, kv.micro_batches, on_device=device is not None)
        for where, kinds in ((device, beside[Tier.GPU]), (host, beside[Tier.CPU])):
            if "kv_scratch" in kinds:
                self._reserved.append((where, "kv_scratch", kinds["kv_scratch"]))
        for tier, kind, nbytes in self._reserved:
            tier.reserve(kind, nbytes)

        def rows_of(*row: int, dtype: torch.dtype = dtype) -> PassRows:
            return PassRows(torch.empty((there, *row), dtype=dtype, device=place), self.places)

        self.hidden = rows_of(spec.hidden_size)
        self.query_rows, self.attended = rows_of(*heads), rows_of(*attended_heads)
        self.query: PassRows | Tensor = self.query_rows
        self._hidden_rows: Buffer | None = None
        if most:
            self._hidden_rows = host.allocate("hidden", waiting_hidden_bytes(spec, policy))
            self.host_hidden = self._hidden_rows.view(0, (tokens, spec.hidden_size), dtype)
            self.sampled = torch.empty(policy.sequences_in_flight, spec.hidden_size, dtype=dtype, device=place)
        on_device = weights.embedding.get(TOKEN_EMBEDDING, self.hidden.data).device == place
        self.gathers_embedding = bool(row_bytes) or not on_device
        # A copy lane may still read the query when its projection's memory is used again on another stream.
        self.copies_query = attends_on_host and accelerator.is_separate
        self.branches: dict[int, list[Tensor]] = {}  # first row -> attention branch of each chunk, until the MLP
        # rows that a copy lane carries to where the KV lives while the compute lane goes on, or that are compressed
        if away or kv.form is not None:
            planes, *row = spec.kv_planes
            self.new_rows = [rows_of(*row) for _ in range(planes)]
            self.leaving_rows = [rows_of(*row) for _ in range(planes if splits else 0)]
        self.new_records: Tensor | None = None
        self._made: Buffer | None = None
        if "kv_new" in beside[Tier.GPU]:
            self._made = device.allocate("kv_new", beside[Tier.GPU]["kv_new"])
            self.new_records = self._made.view(0, (new_groups_most(policy), kv.form.record_bytes), torch.uint8)
        self.beside_kv: dict[int, Tensor] = {}
        self.host_beside_kv: dict[int, Tensor] = {}
        self._attends_on_host = attends_on_host
        self._host_rows: Buffer | None = None
        self._host_lse: Buffer | None = None
        if splits:
            self.attended_below = rows_of(*attended_heads)
            self.lse_below, self.lse_above = (rows_of(spec.num_heads, dtype=torch.float32) for _ in range(2))
        if kv.shares_prefixes:
            self.found_in_prefix = rows_of(*attended_heads)
            self.own_lse, self.prefix_lse = (rows_of(spec.num_heads, dtype=torch.float32) for _ in range(2))
        if splits or (kv.shares_prefixes and attends_on_host):
            kind = "kv_merge" if splits else "prefix_rows"
            self._host_lse = host.allocate(kind, merge_bytes(spec, policy)[0])
            self.host_lse = self._host_lse.view(0, (tokens, spec.num_heads), torch.float32)
        if attends_on_host:
            self._host_rows = host.allocate("offloaded_query", offloaded_query_bytes(spec, policy))
            self.host_query = self._host_rows.view(0, (tokens, *heads), dtype)
            self.host_attended = self._host_rows.view(self.host_query.nbytes, (tokens, *attended_heads), dtype)
            before, (planes, *row) = self.host_query.nbytes + self.host_attended.nbytes, spec.kv_planes
            self.host_new = self._host_rows.view(before, (planes, tokens, *row), dtype)
        self.sparse = SparseLayers(spec, policy, weights, host, device, accelerator) if spec.experts else None
        self.plan: PassPlan | None = None
        self.rows: dict[int, MicroBatchRows] = {}

    def begin(self, plan: PassPlan, part_starts: list[int]) -> None:
        """Take up a pass: its rows, positions and tokens. part_starts: see Scheduler."""
        self.plan = plan
        self.places.begin(part_starts)
        self.rows = {rows.index: rows for rows in plan.micro_batches}
        positions, token_ids = torch.from_numpy(plan.positions), torch.from_numpy(plan.token_ids)
        rotary = self._rope.gather(positions, torch.from_numpy(plan.lengths))
        upload = self._accelerator.upload
        self.rotary = Rotary(
            tuple(upload(f"cos {kind}", rows) for kind, rows in enumerate(rotary.cos)),
            tuple(upload(f"sin {kind}", rows) for kind, rows in enumerate(rotary.sin)),
        )
        self.positions = upload("positions", positions)
        self.kv_rows, self.split_rows = {}, {}
        self.coded_rows: dict[int, CodedRows | SharedRows] = {}
        self.away_rows: dict[int, AwayRows] = {}
        if self._kv.form is not None:
            self._begin_coded(plan)
        for rows in plan.micro_batches:
            if rows.split is None:
                self.kv_rows[rows.index] = upload(f"kv rows {rows.index}", torch.from_numpy(rows.kv_rows))
                continue
            above = rows.split.above_rows
            tables = {"below": rows.split.below_rows, "above": above, "kv": rows.split.kv_rows[above]}
            self.split_rows[rows.index] = {
                name: upload(f"{name} rows {rows.index}", torch.from_numpy(table)) for name, table in tables.items()
            }
        self.logits_rows = upload("logits rows", torch.from_numpy(plan.logits_rows))
        self.unique = None
        if self.gathers_embedding:
            self.unique, token_ids = torch.unique(token_ids, return_inverse=True)
            self.host_token_ids = token_ids
        self.token_ids = upload("token ids", token_ids)
        if self._accelerator.is_separate and self._kv.form is None:
            for rows in plan.micro_batches:
                attended = {"fresh": rows.fresh, "cached": rows.cached}
                if rows.split is not None:
                    attended["cached"] = rows.split.above
                elif self.in_place(rows.index):
                    attended = {"segments": rows.segments}
                if rows.prefixes is not None:
                    for number, level in enumerate(rows.prefixes.levels):
                        attended |= {f"prefix {number}": level.together, f"prefix {number} each": level.each}
                for part, segments in attended.items():
                    if segments is not None:
                        label = f"{part} {rows.index}"
                        prepare(segments, lambda name, table, label=label: upload(f"{name} {label}", table))

    def _begin_coded(self, plan: PassPlan) -> None:
        """Tables of a compressed cache."""
        codes, place, first = reads_codes(self._kv.form), self._accelerator.place, 0
        for rows in plan.micro_batches:
            if self._kv.micro_batches[rows.index].shared:
                self.coded_rows[rows.index] = shared_rows(rows.segments, torch.from_numpy(rows.kv_rows), place)
                continue
            places = self._kv.places(rows.index, rows.segments.kv_start)
            on_host = attended_on_host(self._kv.micro_batches[rows.index])
            direct = codes and (on_host or not self._accelerator.is_separate)
            if self.compute_tier is Tier.CPU or self.in_place(rows.index):
                self.coded_rows[rows.index] = coded_rows(rows.segments, places, direct, place)
            else:
                self.away_rows[rows.index] = away = away_rows(rows, places, first, on_host, direct, place)
                first = away.made_fresh.stop

    def token_rows(self, step: Step) -> tuple[Tensor | None, Tensor]:
        """For a step that embeds rows out of a table that is gathered: which of ``unique`` to gather (None: all of
        them), on the host; and for each row of the step, where in what was gathered, on the device."""
        if not self.places.in_parts:
            return None, self.token_ids
        chosen, token_ids = torch.unique(self.host_token_ids[step.start : step.stop], return_inverse=True)
        return chosen, self._accelerator.upload(f"token ids of part {self.places.part_of(step.start)}", token_ids)

    def keep_beside_kv(self, layer: int, weights: dict[str, Tensor]) -> None:
        """Take what the attention of a layer reads out of its weights, which stay where they are until its output."""
        if "kv_b.weight" in weights:
            self.beside_kv[layer] = weights["kv_b.weight"]
        elif "sinks" in weights and layer not in self.beside_kv:  # a few numbers, kept for good
            self.beside_kv[layer] = weights["sinks"].to(torch.float32, copy=True)
            if self._attends_on_host:
                self.host_beside_kv[layer] = self.beside_kv[layer].cpu()

    def in_place(self, index: int) -> bool:
        """Whether a micro-batch's slab is in the memory of the compute lane."""
        return self._homes[index] is self.compute_tier

    def chunks(self, step: Step) -> list[tuple[int, int]]:
        """The rows of a step, cut to what one call of a module takes: (start, stop) of each."""
        starts = range(step.start, step.stop, self._row_count)
        return [(start, min(start + self._row_count, step.stop)) for start in starts]

    def close(self) -> None:
        while self._reserved:
            tier, kind, nbytes = self._reserved.pop()
            tier.release(kind, nbytes)
        if self.sparse is not None:
            self.sparse.close()
        for buffer in (self._host_rows, self._host_lse, self._hidden_rows, self.embedding_rows, self._made):
            if buffer is not None:
                buffer.close()
