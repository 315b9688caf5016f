"""The nouns of a schedule: what a step is, what a pass carries, what a model asks of each.

A step depends only on steps emitted before it. Each lane runs its steps in the order of emission, except that weights
have an order of their own: they are moved far ahead, and what the rows of a pass need does not wait behind them.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from flexrun.core import Lane, Tier


class StepKind(str, enum.Enum):
    READ_WEIGHTS = "read_weights"  # disk -> host ring
    COPY_WEIGHTS = "copy_weights"  # host -> device ring
    READ_ROWS = "read_rows"  # rows of an embedding table that lives on disk
    EMBED = "embed"
    ATTENTION_INPUTS = "attention_inputs"  # norm, qkv projection, rotary
    OFFLOAD_QUERY = "offload_query"  # device -> host: k, v of a micro-batch, and q of its rows attended on the CPU
    LOAD_KV = "load_kv"  # host -> device: a host-resident micro-batch that is attended on the device
    SAVE_KV = "save_kv"  # device -> host: the new k, v rows of such a micro-batch
    READ_KV = "read_kv"  # disk -> host staging: a disk-resident micro-batch
    WRITE_KV = "write_kv"  # host -> disk: its new rows
    ATTEND = "attend"
    ATTEND_FRESH = "attend_fresh"  # prompts that start in this pass, beside KV kept elsewhere: from their own k, v rows
    RETURN_ATTENDED = "return_attended"  # host -> device
    ATTEND_PREFIX = "attend_prefix"  # of sequences that share prefixes, these, joined with what they have of their own
    MERGE = "merge"  # of sequences with KV in two places, what was attended in either
    LOAD_HIDDEN = "load_hidden"  # host -> device: hidden rows of a part of a pass that the device cannot hold whole
    SAVE_HIDDEN = "save_hidden"  # device -> host: the same after a layer
    KEEP_SAMPLED = "keep_sampled"  # of such a part, after the last layer, the rows that are sampled
    ATTENTION_OUTPUT = "attention_output"
    MLP = "mlp"
    EXPERTS = "experts"  # on the CPU beside a device: all those of a layer that run where they lie
    OFFLOAD_NORMED = "offload_normed"  # device -> host: what such experts work on, and which rows are whose
    RETURN_ROUTED = "return_routed"  # host -> device: what they made of it
    LOGITS = "logits"


ATTENDS = (StepKind.ATTEND, StepKind.ATTEND_FRESH, StepKind.ATTEND_PREFIX)
STREAMING = (StepKind.READ_WEIGHTS, StepKind.COPY_WEIGHTS)  # steps with an order of their own in their lanes

Dependency = tuple[Lane, int]  # the order-th step of a lane
CHOSEN_AT_MOST = 0.9  # share of a layer's experts: where more are expected to be chosen, all are loaded ahead


def chosen_share(share_per_token: float, tokens):
    """Share of a layer's experts that at least one of ``tokens`` tokens (a number or an array) chooses, when each token
    chooses a share of them and all are chosen alike."""
    return 1.0 - (1.0 - share_per_token) ** tokens


def experts_moved_share(share_per_token: float, tokens):
    """Share of the streamed experts that a pass moves: those chosen where few are, and all of them, ahead of the
    router, where waiting for it would spare little."""
    share = chosen_share(share_per_token, tokens)
    return share + (share > CHOSEN_AT_MOST) * (1.0 - share)


def pairs_of(query, kv):
    """(query, KV) pairs of causal attention whose last query row sees all ``kv`` rows (numbers or arrays); where there
    are more query rows, the first see nothing."""
    seeing = query - (query > kv) * (query - kv)
    return seeing * (kv - seeing) + seeing * (seeing + 1) // 2


class Step(NamedTuple):  # millions are made while plans are compared: much cheaper than a frozen dataclass
    """One piece of work on one lane.

    order: position of the step in its lane, counted over the whole run.
    start, stop: token rows of the pass that the step works on.
    unit: index of the weight unit read, copied or used (-1: none). offset: its byte offset in the ring
    that the step fills or uses. source_offset: where a copied unit waits in the host ring.
    Of steps that handle staged KV the offset is a slot: of READ_KV and WRITE_KV one on the host; of OFFLOAD_QUERY,
    SAVE_KV and ATTEND on the CPU the same where the KV lives on disk; of LOAD_KV and ATTEND on the GPU one on the
    device, and source_offset the one on the host that KV from disk is copied out of.
    chosen: of a unit of experts only those that a token of the pass chose are moved, which is known when the step can
    start; its bytes are those to be expected.
    bytes moved and flops done are totals of the step. depends_on: (lane, order) pairs that must be finished.
    """

    kind: StepKind
    lane: Lane
    order: int
    pass_index: int
    depends_on: tuple[Dependency, ...]
    layer: int = -1
    micro_batch: int = -1
    unit: int = -1
    start: int = 0
    stop: int = 0
    offset: int = 0
    source_offset: int = 0
    bytes: int = 0
    flops: int = 0
    chosen: bool = False

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class WeightUnit:
    """The weights one module of one layer needs, and how many of their bytes must move in each pass.

    disk_bytes: read from disk (4 KiB-aligned tensors). host_bytes: copied from host RAM to the device (0 without one).
    experts: routed experts among them; the rest of a sparse layer is in its "attention" and "mlp" units.
    cpu_experts: of those, how many the CPU runs beside a device; their bytes do not move.
    """

    index: int
    layer: int
    module: str
    disk_bytes: int = 0
    host_bytes: int = 0
    experts: int = 0
    cpu_experts: int = 0


@dataclass(frozen=True)
class KVBytes:
    """Bytes of one layer's KV on its ways. token: in the cache. record: of a group of tokens that are compressed (0:
    none are); row: of a token before that. Counts, those of MicroBatchShape, are numbers or arrays."""

    token: int
    row: int
    record: int = 0

    def there(self, query_tokens, kv_tokens, there_groups):
        """What earlier passes left of a cache."""
        if self.record:
            return there_groups * self.record
        return (kv_tokens - query_tokens) * (kv_tokens > query_tokens) * self.token

    def added(self, new_tokens, new_groups):
        """What a pass adds to it."""
        return new_groups * self.record if self.record else new_tokens * self.token

    def to_host(self, new_tokens, fresh_groups):
        """What goes to a host that attends: rows, and of prompts that start the groups that the device compresses."""
        if not self.record:
            return new_tokens * self.token
        spared = self.record // self.token * self.row - self.record
        return new_tokens * self.row - fresh_groups * spared


@dataclass(frozen=True)
class ModelWork:
    """FLOPs of each kind of step, so that a step can say what it costs. Multiply-add counts as two."""

    attention_inputs_flops_per_token: int
    attend_flops_per_pair: int  # a (query token, kv token) pair, all heads
    attention_output_flops_per_token: int
    mlp_flops_per_token: tuple[int, ...]  # one a layer; of a sparse layer without its routed experts
    logits_flops_per_row: int
    kv: KVBytes
    query_bytes_per_token: int  # q of one layer
    hidden_bytes_per_token: int
    embedding_row_bytes: int
    flops_per_expert_and_token: float = 0.0  # of one routed expert, averaged over all tokens of a pass
    experts_share_per_token: float = 1.0  # of a layer's routed experts, those that a token is sent to
    lse_bytes_per_token: int = 0  # log-sum-exp of one layer's attention, which comes back where it is merged
    normed_bytes_per_token: int = 0  # what experts on the CPU beside a device get of a row, with its choices
    routed_bytes_per_token: int = 0  # what comes back

    def moved_share(self, tokens: int) -> float:
        """Share of the streamed experts that a pass of so many tokens moves; see experts_moved_share."""
        return float(experts_moved_share(self.experts_share_per_token, tokens))


@dataclass(frozen=True)
class MicroBatchShape:
    """The sequences of one attention micro-batch in one pass.

    query_tokens rows of the pass attend kv_tokens cached tokens in query_kv_pairs (query, kv) pairs.
    home: tier of the KV slab. attend_lane: where softmax(QK^T)V runs.
    decode_tokens of the query_tokens are single tokens of decoding sequences, over decode_kv_tokens cached ones.
    fresh_tokens of them, the last rows, are prompts (or first chunks of prompts) of more than one token that start in
    this pass, in fresh_pairs: nothing of them is cached.
    above_*: of a micro-batch on the host whose newest tokens live on the device, what lies above the borders of its
    sequences: new rows, fresh ones too; KV tokens and pairs of the rows that are not fresh, and of the decoding ones.
    *_groups: of a compressed cache the groups that earlier passes completed of its sequences, those that this pass
    completes, and of these what is of fresh rows.
    prefix_*: what its rows attend of prefixes that they share, which is in none of the counts above: rows, one for each
    prefix they attend; KV tokens, those of rows that follow each other once; pairs.
    """

    index: int
    query_tokens: int
    kv_tokens: int
    query_kv_pairs: int
    home: Tier
    attend_lane: Lane
    decode_tokens: int = 0
    decode_kv_tokens: int = 0
    fresh_tokens: int = 0
    fresh_pairs: int = 0
    above_new_tokens: int = 0
    above_kv_tokens: int = 0
    above_pairs: int = 0
    above_decode_tokens: int = 0
    above_decode_kv_tokens: int = 0
    prefix_rows: int = 0
    prefix_kv_tokens: int = 0
    prefix_pairs: int = 0
    there_groups: int = 0
    new_groups: int = 0
    fresh_groups: int = 0

    @cached_property
    def cached(self) -> MicroBatchShape:
        """The same without its fresh rows; what lies above the borders is still among it."""
        if not self.fresh_tokens:
            return self
        return replace(
            self,
            query_tokens=self.query_tokens - self.fresh_tokens,
            kv_tokens=self.kv_tokens - self.fresh_tokens,
            query_kv_pairs=self.query_kv_pairs - self.fresh_pairs,
            fresh_tokens=0,
            fresh_pairs=0,
        )

    @cached_property
    def above(self) -> MicroBatchShape:
        """What its rows that are not fresh have above the borders: those of prompts, and decoding ones past theirs."""
        prompts = self.query_tokens - self.fresh_tokens - self.decode_tokens
        tokens = prompts + self.above_decode_tokens if self.above_kv_tokens else 0
        counts = self.above_kv_tokens, self.above_pairs
        decode = self.above_decode_tokens, self.above_decode_kv_tokens
        return MicroBatchShape(self.index, tokens, *counts, self.home, Lane.GPU, *decode)

    @cached_property
    def below(self) -> MicroBatchShape:
        """Its rows that are not fresh, over what lies below the borders: all of it, but in a cache split by token."""
        cached, above = self.cached, self.above
        if not above.query_tokens:
            return cached
        kv_tokens = cached.kv_tokens - above.kv_tokens
        return MicroBatchShape(
            self.index,
            cached.query_tokens if kv_tokens else 0,
            kv_tokens,
            cached.query_kv_pairs - above.query_kv_pairs,
            self.home,
            self.attend_lane,
            cached.decode_tokens if kv_tokens else 0,
            cached.decode_kv_tokens - above.decode_kv_tokens,
        )

    @property
    def fresh(self) -> MicroBatchShape:
        """Its fresh rows alone."""
        tokens, pairs = self.fresh_tokens, self.fresh_pairs
        return MicroBatchShape(self.index, tokens, tokens, pairs, self.home, self.attend_lane, 0, 0, tokens, pairs)


@dataclass(frozen=True)
class PassShape:
    index: int
    tokens: int
    logits_rows: int
    micro_batches: tuple[MicroBatchShape, ...]
    more: bool  # another pass follows: read its first weights ahead
