"""The loop of a run: plan a pass, run it, sample, retire what ended, refill, until nothing is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType

import numpy
import torch

from flexrun.config import Policy
from flexrun.core import DTYPES, Event, Lane, Tier, align_up
from flexrun.models.ops import can_pack, pack_matrix
from flexrun.models.rope import rope_table_bytes, rope_tables
from flexrun.models.spec import ModelSpec
from flexrun.offload.batcher import Batcher, PassPlan
from flexrun.offload.device import EmulatedDevice
from flexrun.offload.executor import Executor
from flexrun.offload.kv_store import KVStore
from flexrun.offload.sequence import Group, Sequence
from flexrun.offload.tiers import MemoryTier
from flexrun.offload.weight_store import WeightStore
from flexrun.outputs import RequestOutput
from flexrun.placement import (
    MemoryAccount,
    WeightPlacement,
    build_scheduler,
    kv_format,
    kv_micro_batches,
    micro_batch_sequences,
    rotary_positions,
)
from flexrun.prefixes import Prefixes
from flexrun.sampling import UnusableLogits, sample, score
from flexrun.weights.packed import PackedWeights

HOPELESS_SEQUENCES = 8  # that failed one after the other, and none before them got a token: it is the model


@dataclass
class Totals:
    """Sums over the passes run so far. A pass that mixes phases is split by its token counts.

    prompt_tokens: those that were run; spared_tokens: those that ``prefixes`` shared ones
    made needless to run.
    """

    passes: int = 0
    prompt_tokens: int = 0
    spared_tokens: int = 0
    prefixes: int = 0
    generated_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def add(self, plan: PassPlan, generated_tokens: int, seconds: float) -> None:
        share = plan.prefill_tokens / plan.shape.tokens
        self.passes += 1
        self.prompt_tokens += plan.prefill_tokens
        self.spared_tokens += plan.spared_tokens
        self.prefixes += plan.prefixes
        self.generated_tokens += generated_tokens
        self.prefill_seconds += seconds * share
        self.decode_seconds += seconds * (1 - share)


class Engine:
    """Weights, KV cache and lanes of one model under one policy, ready to run groups of sequences."""

    def __init__(
        self,
        spec: ModelSpec,
        packed: PackedWeights,
        policy: Policy,
        placement: WeightPlacement,
        account: MemoryAccount,
        kv_tokens: int,
        *,
        cpu_budget_bytes: int | None,
        gpu_budget_bytes: int = 0,
        disk_budget_bytes: int | None = None,
        accelerator: EmulatedDevice | None = None,
        bytes_per_second: Mapping[Lane, float] = MappingProxyType({}),
        trace: bool = False,
        direct: bool = True,
        prefix_tokens: int = 0,
    ):
        """``gpu_budget_bytes`` > 0: an accelerator with that much memory beside the host, emulated unless one is given.

        The engine closes the accelerator. disk_budget_bytes: for the packed weights and the KV cache beside them, where
        some of it lives on disk. bytes_per_second: bandwidths that lanes of an emulated one are held to. prefix_tokens:
        room for prefixes that sequences share, beside that of kv_tokens.
        """
        self.spec, self.policy, self.kv_tokens, self.prefix_tokens = spec, policy, kv_tokens, prefix_tokens
        self._accelerator = accelerator or EmulatedDevice()
        self.on_device = on_device = gpu_budget_bytes > 0
        with ExitStack() as undo:  # what is open when an allocation is refused
            undo.callback(self._accelerator.close)
            self.tiers = {Tier.CPU: MemoryTier(Tier.CPU, cpu_budget_bytes, self._accelerator.host_memory)}
            if on_device:
                self.tiers[Tier.GPU] = MemoryTier(Tier.GPU, gpu_budget_bytes, self._accelerator.memory)
            host, device = self.tiers[Tier.CPU], self.tiers.get(Tier.GPU)
            self.kv = self._open_kv(spec, disk_budget_bytes, packed.folder.parent, account, direct)
            undo.callback(self.kv.close)
            pack = pack_matrix if can_pack(DTYPES[spec.dtype]) else None
            self.weights = WeightStore(
                spec,
                packed,
                placement,
                account,
                host,
                device,
                accelerator=self._accelerator,
                direct=direct,
                pack=pack,
                activation_bits=policy.activation_bits,
            )
            undo.callback(self.weights.close)
            self._scheduler = build_scheduler(spec, placement, account, on_device=on_device, policy=policy)
            positions = rotary_positions(self.kv.micro_batches)
            self._rotary_bytes = align_up(rope_table_bytes(spec, positions))
            host.reserve("rotary", self._rotary_bytes)
            rope = rope_tables(spec, positions)
            self._executor = Executor(
                spec,
                policy,
                self._scheduler,
                self.weights,
                self.kv,
                rope,
                host,
                device,
                accelerator=self._accelerator,
                bytes_per_second=bytes_per_second,
                trace=trace,
            )
            self._accelerator.settle()  # lanes of other queues may now use what was allocated and filled on this one
            undo.pop_all()
            self._batcher = Batcher(policy, self.kv)
            self.totals = Totals()
            self._failed_sequences, self._is_sound = 0, False

    def _open_kv(
        self, spec: ModelSpec, disk_budget_bytes: int | None, folder: Path, account: MemoryAccount, direct: bool
    ) -> KVStore:
        """Before the weights are read: a full disk is told at once."""
        host, device = self.tiers[Tier.CPU], self.tiers.get(Tier.GPU)
        on_device, prefix_tokens = device is not None, self.prefix_tokens
        places = kv_micro_batches(self.policy, self.kv_tokens, on_device=on_device, prefix_tokens=prefix_tokens)
        if any(place.home is Tier.DISK for place in places):
            self.tiers[Tier.DISK] = MemoryTier(Tier.DISK, disk_budget_bytes)
            self.tiers[Tier.DISK].reserve("weights", account.bytes_by_kind[Tier.DISK]["weights"])
        return KVStore(
            spec,
            places,
            host,
            device,
            self.tiers.get(Tier.DISK),
            folder,
            max_sequences=micro_batch_sequences(self.policy),
            direct=direct,
            form=kv_format(spec, self.policy),
        )

    @property
    def paused_sequences(self) -> int:
        """How often an answer got longer than the room it was given; see Batcher."""
        return self._batcher.paused

    @property
    def events(self) -> list[Event] | None:
        return self._executor.events

    def run(
        self,
        source: Iterator[tuple[Group, list[Sequence]] | RequestOutput],
        name_of: Callable[[int], str] | None = None,
        on_pass: Callable[[int, int], None] | None = None,
        on_tokens: Callable[[list[tuple[str, int, int]]], None] | None = None,
        prefixes: Prefixes | None = None,
    ) -> Iterator[RequestOutput]:
        """Outputs in completion order, as ``source`` is drawn from whenever a slot is free (see Batcher.feed).

        on_pass: called after each pass with the prompt tokens it brought into the cache, by itself or by a prefix that
        is there, and the tokens it generated. on_tokens: the
        same with (request id, choice, token) of each of these; what it raises ends the run.
        """
        self._batcher.feed(source, prefixes)
        try:
            while True:
                start_seconds = time.perf_counter()
                plan = self._batcher.next_pass()
                finished: list[Sequence] = []
                if plan is not None:  # a planned pass runs before anything is yielded: the scheduler counts on it
                    self._executor.run(plan, partial(self._take, plan, finished, name_of))
                    for sequence in plan.ended:
                        sequence.end()
                        finished.append(sequence)
                    now = time.perf_counter()
                    sampled = [sequence for sequence in plan.sampled if not sequence.failed]
                    self.totals.add(plan, len(sampled), now - start_seconds)
                    if on_pass is not None:
                        on_pass(plan.prefill_tokens + plan.spared_tokens, len(sampled))
                    if on_tokens is not None:
                        on_tokens(
                            [
                                (sequence.group.request.request_id, sequence.row.choice_index, sequence.output_ids[-1])
                                for sequence in sampled
                            ]
                        )
                refused = self._batcher.take_refused()
                if plan is None and not refused:
                    return
                for sequence in finished:
                    self._batcher.retire(sequence)
                yield from refused
                for group in dict.fromkeys(sequence.group for sequence in finished):
                    if not group.unfinished:
                        yield group.output(now)
        finally:
            self._batcher.abandon()

    def _take(self, plan: PassPlan, finished: list[Sequence], name_of, start: int, logits: torch.Tensor) -> None:
        """Logits of ``plan.logits_rows[start:]``: those of sequences, then those of prompt tokens that are scored."""
        sampled = max(min(len(plan.sampled) - start, len(logits)), 0)
        if sampled:
            self._sample(plan.sampled[start : start + sampled], finished, name_of, logits[:sampled])
        if sampled < len(logits):
            first = start + sampled - len(plan.sampled)
            block = slice(first, first + len(logits) - sampled)
            self._score(plan.scored[block], torch.from_numpy(plan.targets[block]), name_of, logits[sampled:])

    def _sample(self, sequences: tuple[Sequence, ...], finished: list[Sequence], name_of, logits: torch.Tensor) -> None:
        """Take the next token of each sequence; those that end with it, or have none, are added to ``finished``.

        Raises UnusableLogits where one sequence after the other has none, so that a broken model does not use up a job.
        """
        try:
            sampled = sample(logits, [sequence.row for sequence in sequences])
        except UnusableLogits as error:
            self._is_sound |= len(error.rows) < len(sequences)
            self._failed_sequences += len(error.rows)
            if self._failed_sequences >= HOPELESS_SEQUENCES and not self._is_sound:
                raise
            for row in error.rows:
                sequences[row].fail(error)
                finished.append(sequences[row])
            if usable := _others(error.rows, len(sequences)):
                self._sample(tuple(sequences[row] for row in usable), finished, name_of, logits[usable])
            return
        self._is_sound = True
        tokens = sampled.token_ids.tolist()
        now = time.perf_counter()
        for sequence, token_id, chosen, top in zip(sequences, tokens, sampled.logprobs, sampled.top):
            if not sequence.group.first_token_seconds:
                sequence.group.first_token_seconds = now
            if sequence.append(token_id, chosen, top, name_of):
                finished.append(sequence)

    def _score(self, sequences: tuple[Sequence, ...], targets: torch.Tensor, name_of, logits: torch.Tensor) -> None:
        """Take the log-probability of each target, the prompt token that comes after a row of ``sequences``."""
        widths = [sequence.group.params.prompt_logprobs or 0 for sequence in sequences]
        try:
            scored = score(logits, targets.to(logits.device), widths)
        except UnusableLogits as error:
            for row in error.rows:
                sequences[row].group.refuse(error)
            if usable := _others(error.rows, len(sequences)):
                self._score(tuple(sequences[row] for row in usable), targets[usable], name_of, logits[usable])
            return
        for sequence, *found in zip(sequences, *scored):
            sequence.score(*found, name_of)

    @property
    def failed(self) -> bool:
        """Whether a pass broke off: such an engine only closes."""
        return self._executor.failed

    @property
    def expert_counts(self) -> numpy.ndarray | None:
        """See Executor.expert_counts."""
        return self._executor.expert_counts

    def lane_statistics(self) -> dict:
        return self._executor.lane_statistics()

    def close(self) -> None:
        self._executor.close()
        self._accelerator.settle()
        self.kv.close()
        self.weights.close()
        if Tier.DISK in self.tiers:
            self.tiers[Tier.DISK].release("weights", self.tiers[Tier.DISK].used_by_kind["weights"])
        self.tiers[Tier.CPU].release("rotary", self._rotary_bytes)
        self._rotary_bytes = 0
        self._accelerator.close()


def _others(rows: list[int], count: int) -> list[int]:
    return sorted(set(range(count)) - set(rows))
