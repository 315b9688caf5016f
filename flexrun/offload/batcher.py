"""Fills every pass: which sequences decode, which prompt chunks prefill beside them, and who takes a freed slot."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy

from flexrun.attention import Segments
from flexrun.config import Policy
from flexrun.errors import RequestError
from flexrun.offload.kv_store import KVStore
from flexrun.offload.likely_lengths import LikelyLengths
from flexrun.offload.prefix_cache import PrefixCache, PrefixRun
from flexrun.offload.prefix_rows import PrefixRows, prefix_rows
from flexrun.offload.sequence import Group, Sequence
from flexrun.offload.token_split import SplitRows, split_rows
from flexrun.outputs import RequestOutput
from flexrun.placement import part_tokens
from flexrun.prefixes import Prefixes
from flexrun.steps import MicroBatchShape, PassShape, pairs_of

REFUSED_AT_ONCE = 256  # hand refusals on before drawing further: a pile of them must not pile up here


@dataclass(frozen=True, slots=True)
class MicroBatchRows:
    """Rows ``[start, stop)`` of a pass that belong to one attention micro-batch.

    segments index query rows from ``start`` and KV rows of the slab; kv_rows: slab row of each query row, int64.
    Rows from ``fresh_start`` on are of prompts that start in this pass. cached: segments of the rows before them, None
    where there are none; fresh: theirs, query rows and KV rows both from ``fresh_start``, for attention over the rows'
    own keys and values. split: of a micro-batch whose KV is split by token; it has the slabs' rows, and what is cached.
    prefixes: what the rows attend of shared prefixes besides, None where nothing.
    """

    index: int
    start: int
    stop: int
    segments: Segments
    kv_rows: numpy.ndarray
    fresh_start: int
    cached: Segments | None
    fresh: Segments | None
    split: SplitRows | None = None
    prefixes: PrefixRows | None = None


@dataclass(frozen=True, slots=True)
class PassPlan:
    """One pass: flat token rows, grouped by attention micro-batch, and whose next token comes out of which row.

    logits_rows: int64 [N + M], the rows that the head takes: of N sequences that are sampled, then of M prompt tokens
    that are scored. targets: int64 [M], those tokens; scored: [M] sequences. ended: sequences that end with this pass
    without a token sampled. spared_tokens: prompt tokens that need not be run, for a prefix has them, less those of
    prefixes that are run instead. prefixes: how many of these begin with this pass.
    """

    shape: PassShape
    token_ids: numpy.ndarray  # int64 [T]
    positions: numpy.ndarray  # int64 [T]
    lengths: numpy.ndarray  # int64 [T]: the most tokens that the row's sequence may reach
    micro_batches: tuple[MicroBatchRows, ...]
    logits_rows: numpy.ndarray
    sampled: tuple[Sequence, ...]  # N sequences
    targets: numpy.ndarray
    scored: tuple[Sequence, ...]
    ended: tuple[Sequence, ...]
    decode_tokens: int
    prefill_tokens: int
    spared_tokens: int = 0
    prefixes: int = 0


class Batcher:
    """Holds the sequences in flight, and draws more from its source as slots free up.

    Where the cache has no room for the worst case in every slot, room is kept for the length that answers are likely
    to get. One that gets longer is paused: it gives its room back, waits for all it may need, and is prefilled again
    with what it has generated. paused: how often that happened.
    """

    def __init__(self, policy: Policy, kv_store: KVStore, first_pass_index: int = 0):
        self._lengths = LikelyLengths()
        self.paused = 0
        self._policy = policy
        self._most_rows = part_tokens(policy) or policy.tokens_per_pass  # of one micro-batch
        self._kv = kv_store
        self._prefixes = PrefixCache(kv_store)
        self._unrun_tokens = 0
        self._running: list[Sequence] = []
        self._waiting: deque[Sequence] = deque()
        self._source: Iterator[tuple[Group, list[Sequence]] | RequestOutput] = iter(())
        self._refused: list[RequestOutput] = []
        self._exhausted = True
        self.pass_index = first_pass_index

    def feed(
        self, source: Iterator[tuple[Group, list[Sequence]] | RequestOutput], prefixes: Prefixes | None = None
    ) -> None:
        """Draw from ``source``: groups with their sequences, and the outputs of requests that were refused.

        prefixes: those that the groups name.
        """
        self._source, self._exhausted = source, False
        self._prefixes.begin(prefixes or Prefixes())

    def take_refused(self) -> list[RequestOutput]:
        """Refused requests met while drawing; after ``next_pass`` gave None, anything here means: ask again."""
        refused, self._refused = self._refused, []
        return refused

    def next_pass(self) -> PassPlan | None:
        """The next pass, or None when nothing is left to run."""
        room = self._policy.tokens_per_pass
        rows: Counter[int] = Counter()  # of each micro-batch
        parts: list[tuple[Sequence, int]] = []
        prefilling = []
        self._pause()
        for sequence in self._running:
            if sequence.pending_tokens == 1 and sequence.output_ids:
                parts.append((sequence, 1))
                rows[sequence.region.micro_batch] += 1
                room -= 1
            else:
                prefilling.append(sequence)
        decode_tokens = len(parts)
        starts: list[tuple[PrefixRun, int, int]] = []
        room -= self._add_prefixes(starts, room)
        for sequence in prefilling:
            room -= self._add_chunk(parts, sequence, room, rows)
        while room > 0 and (sequence := self._admit()) is not None:
            room -= self._add_prefixes(starts, room)
            room -= self._add_chunk(parts, sequence, room, rows)
        return self._plan(parts, starts, decode_tokens) if parts or starts else None

    def _add_prefixes(self, starts: list[tuple[PrefixRun, int, int]], room: int) -> int:
        """Chunks (first token, tokens) of prefixes, before the sequences that begin with them: those have their chance
        when nothing of these is left."""
        taken = 0
        for run in self._prefixes.pending:
            count = min(run.pending_tokens, room - taken)
            if count:
                starts.append((run, run.cached_tokens, count))
                run.cached_tokens += count
                taken += count
        return taken

    def _add_chunk(self, parts: list, sequence: Sequence, room: int, rows: Counter[int]) -> int:
        home = sequence.region.micro_batch
        count = max(min(sequence.pending_tokens, room, self._most_rows - rows[home]), 0)
        if count:
            parts.append((sequence, count))
            rows[home] += count
        return count

    def _admit(self) -> Sequence | None:
        """The next waiting sequence, given cache room and a slot; None while it must wait."""
        if len(self._running) >= self._policy.sequences_in_flight:
            return None
        if not self._waiting and not self._fetch():
            return None
        sequence = self._waiting[0]
        spared_tokens = self._spared(sequence)
        own_tokens = sequence.own_kv_tokens - spared_tokens
        region = self._kv.allocate(own_tokens, self._policy.attention_micro_batch)
        chain = self._prefixes.take(sequence.group.prefix, alone=not self._running) if region is not None else None
        if region is not None and chain is None:
            self._kv.release(region)
        if chain is None:
            if not self._running:
                raise RequestError(  # the caller checks lengths first, so this is a fault of ours
                    f"a sequence of {sequence.own_kv_tokens} tokens fits no KV micro-batch",
                    "raise kv_tokens in the policy",
                )
            return None
        self._waiting.popleft()
        sequence.region, sequence.room_tokens = region, sequence.kv_tokens - spared_tokens
        sequence.chain = chain
        self._unrun_tokens += 0 if sequence.was_paused else sequence.group.prefix_tokens
        self._running.append(sequence)
        return sequence

    def _spared(self, sequence: Sequence) -> int:
        """Tokens of cache room that a sequence is not given although it may come to need them."""
        slots = self._policy.sequences_in_flight - len(self._running)
        if slots * sequence.own_kv_tokens <= self._kv.free_tokens or sequence.was_paused:
            return 0
        if sequence.group.score_start is not None or self._kv.form is not None:
            return 0  # a prompt is scored once; and what a compressed cache holds depends on when it was filled
        likely = sequence.group.request.kept_tokens
        if likely is None:
            likely = self._lengths.likely(len(other.output_ids) for other in self._running)
        if likely is None:
            return 0
        return max(sequence.group.max_tokens - max(likely, len(sequence.output_ids) + 1), 0)

    def _pause(self) -> None:
        """Take the room of sequences that would outgrow it in the coming pass; they are the next to get some."""
        short = [each for each in self._running if each.cached_tokens + each.pending_tokens > each.room_tokens]
        for sequence in short:
            self._leave(sequence)
            sequence.cached_tokens = sequence.start_tokens
            sequence.was_paused = True
            self._waiting.appendleft(sequence)
            self.paused += 1

    def _fetch(self) -> bool:
        while not self._exhausted and len(self._refused) < REFUSED_AT_ONCE:
            drawn = next(self._source, None)
            if drawn is None:
                self._exhausted = True
            elif isinstance(drawn, RequestOutput):
                self._refused.append(drawn)
            else:
                self._waiting.extend(drawn[1])
                return True
        return False

    def _plan(
        self, parts: list[tuple[Sequence, int]], starts: list[tuple[PrefixRun, int, int]], decode_tokens: int
    ) -> PassPlan:
        parts.sort(key=_place_in_pass)
        total = sum(count for _, count in parts) + sum(count for *_, count in starts)
        token_ids = numpy.empty(total, dtype=numpy.int64)
        positions, lengths = numpy.empty(total, dtype=numpy.int64), numpy.empty(total, dtype=numpy.int64)
        kv_rows = numpy.empty(total, dtype=numpy.int64)
        table = numpy.empty((len(parts), 5), dtype=numpy.int64)  # query_start, query_len, kv_start, kv_len, capacity
        sampled_rows, sampled, ended = [], [], []
        scored_rows: list[int] = []
        targets: list[int] = []
        scored: list[Sequence] = []
        row, micro_batches, shapes = 0, [], []
        for run, first, count in starts:
            part = slice(row, row + count)
            token_ids[part] = run.tokens[first : first + count]
            positions[part] = numpy.arange(run.position + first, run.position + first + count)
            lengths[part] = positions[part] + 1
            kv_rows[part] = numpy.arange(run.start + first, run.start + first + count)
            row += count
        if starts:
            rows, shape = self._prefix_micro_batch(starts, kv_rows[:row])
            micro_batches.append(rows)
            shapes.append(shape)
        for number, (sequence, count) in enumerate(parts):
            cached, start = sequence.cached_tokens, sequence.region.start - sequence.group.prefix_tokens
            token_ids[row : row + count] = sequence.tokens(count)
            lengths[row : row + count] = sequence.kv_tokens + 1
            if count == 1:
                positions[row] = cached
                kv_rows[row] = start + cached
            else:
                positions[row : row + count] = numpy.arange(cached, cached + count)
                kv_rows[row : row + count] = numpy.arange(start + cached, start + cached + count)
            own = sequence.own_cached_tokens + count
            table[number] = (row, count, sequence.region.start, own, sequence.region.capacity)
            if positions_scored := sequence.scored(count):
                first, last = positions_scored.start, positions_scored.stop
                scored_rows += range(row + first - cached, row + last - cached)
                targets += sequence.group.prompt_ids[first + 1 : last + 1].tolist()
                scored += [sequence] * (last - first)
            if count == sequence.pending_tokens and not sequence.group.max_tokens:
                ended.append(sequence)
            elif count == sequence.pending_tokens:
                sampled_rows.append(row + count - 1)
                sampled.append(sequence)
            row += count
        homes = numpy.array([sequence.region.micro_batch for sequence, _ in parts], dtype=numpy.int64)
        for index in numpy.unique(homes):
            chosen = numpy.flatnonzero(homes == index)
            rows = table[chosen]
            start = int(rows[0, 0])
            stop = int(rows[-1, 0] + rows[-1, 1])
            query, kv = rows[:, 1], rows[:, 3]
            place = self._kv.micro_batches[index]
            pairs = int(pairs_of(query, kv).sum())
            single, fresh = query == 1, (query == kv) & (query > 1)
            new = query[fresh]
            fresh_start = stop - int(new.sum())
            segments = Segments(rows[:, 0] - start, query, rows[:, 2], kv)
            own = rows[fresh, 0] - fresh_start
            split = shared = None
            if self._kv.shares_prefixes:
                shared = prefix_rows(
                    [
                        (first - start, count, int(positions[first]), parts[number][0].chain)
                        for number, (first, count, *_) in zip(chosen.tolist(), rows.tolist())
                    ]
                )
            if place.device_share:
                split = split_rows(place, segments, rows[:, 2], rows[:, 4], positions[start:stop], fresh)
            micro_batches.append(
                MicroBatchRows(
                    int(index),
                    start,
                    stop,
                    segments,
                    kv_rows[start:stop],
                    fresh_start,
                    None if fresh.all() else Segments(*segments.table[:, ~fresh]) if fresh.any() else segments,
                    Segments(own, new, own, new) if fresh.any() else None,
                    split,
                    shared,
                )
            )
            shapes.append(
                MicroBatchShape(
                    int(index),
                    stop - start,
                    int(kv.sum()),
                    pairs,
                    place.home,
                    place.attend_lane,
                    decode_tokens=int(single.sum()),
                    decode_kv_tokens=int(kv[single].sum()),
                    fresh_tokens=int(new.sum()),
                    fresh_pairs=int((new * (new + 1) // 2).sum()),
                    **(split.counts if split else {}),
                    **(shared.counts if shared else {}),
                    **self._kv.group_counts(query, kv, new),
                )
            )
        more = bool(self._waiting) or not self._exhausted or len(sampled) + len(ended) < len(self._running)
        more = more or any(not sequence.certainly_ends() for sequence in sampled)
        shape = PassShape(self.pass_index, total, len(sampled) + len(scored), tuple(shapes), more)
        self.pass_index += 1
        spared_tokens = self._unrun_tokens - sum(count for *_, count in starts)
        self._unrun_tokens = 0
        for sequence, count in parts:
            sequence.cached_tokens += count
        return PassPlan(
            shape,
            token_ids,
            positions,
            lengths,
            tuple(micro_batches),
            numpy.array(sampled_rows + scored_rows, dtype=numpy.int64),
            tuple(sampled),
            numpy.array(targets, dtype=numpy.int64),
            tuple(scored),
            tuple(ended),
            decode_tokens,
            total - decode_tokens,
            spared_tokens,
            sum(first == 0 for _, first, _ in starts),
        )

    def _prefix_micro_batch(
        self, starts: list[tuple[PrefixRun, int, int]], kv_rows: numpy.ndarray
    ) -> tuple[MicroBatchRows, MicroBatchShape]:
        """The first rows of a pass, those of prefixes that are run for all who share them."""
        counts = numpy.array([count for *_, count in starts], dtype=numpy.int64)
        seen = numpy.array([first + count for _, first, count in starts], dtype=numpy.int64)
        rows = numpy.cumsum(counts) - counts
        segments = Segments(rows, counts, numpy.array([run.start for run, *_ in starts]), seen)
        shared = prefix_rows(
            [(row, count, run.position + first, run.before) for row, (run, first, count) in zip(rows.tolist(), starts)]
        )
        total, place = len(kv_rows), self._kv.micro_batches[0]
        pairs = int(pairs_of(counts, seen).sum())
        columns = shared.counts if shared else {}
        return (
            MicroBatchRows(0, 0, total, segments, kv_rows, total, segments, None, None, shared),
            MicroBatchShape(0, total, int(seen.sum()), pairs, place.home, place.attend_lane, **columns),
        )

    def retire(self, sequence: Sequence) -> None:
        """A finished sequence gives its slot and its cache room back at once."""
        if not sequence.failed:
            self._lengths.add(tokens := len(sequence.output_ids), ended=tokens < sequence.group.max_tokens)
        self._leave(sequence)

    def _leave(self, sequence: Sequence) -> None:
        self._kv.release(sequence.region)
        self._prefixes.release(sequence.chain)
        sequence.region, sequence.chain = None, ()
        self._running.remove(sequence)

    def abandon(self) -> None:
        """Forget everything in flight and give its room back (the job was stopped)."""
        for sequence in list(self._running):
            self._leave(sequence)
        self._waiting.clear()
        self._refused.clear()
        self._exhausted = True

    @property
    def in_flight(self) -> int:
        return len(self._running)


def _place_in_pass(part: tuple[Sequence, int]) -> tuple:
    """Decoding sequences first, then prompts under way; what starts in this pass comes last. Each kind as it comes, but
    for those that share prefixes, which lie together."""
    sequence, count = part
    kind = 0 if count == 1 else 1 if sequence.own_cached_tokens else 2
    return sequence.region.micro_batch, kind, tuple([run.prefix for run in sequence.chain])
