"""The passes of a job before it runs: what the batcher would put into each, from the lengths of the prompts alone."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy

from flexrun.config import Policy
from flexrun.core import Lane, Tier
from flexrun.placement import KVMicroBatch, part_tokens, room_of_groups
from flexrun.policy.coded_groups import CodedGroups
from flexrun.policy.prefix_room import PrefixRoom
from flexrun.prefixes import NONE
from flexrun.schedule import cut_rows
from flexrun.steps import MicroBatchShape, PassShape, pairs_of
from flexrun.workload import Workload

COLUMNS = (
    "query_tokens",
    "kv_tokens",
    "query_kv_pairs",
    "decode_tokens",
    "decode_kv_tokens",
    "fresh_tokens",
    "fresh_pairs",
    "above_new_tokens",
    "above_kv_tokens",
    "above_pairs",
    "above_decode_tokens",
    "above_decode_kv_tokens",
    "prefix_rows",
    "prefix_kv_tokens",
    "prefix_pairs",
    "there_groups",
    "new_groups",
    "fresh_groups",
)
ABOVE, PREFIX, GROUPS = slice(7, 12), slice(12, 15), slice(15, 18)  # of COLUMNS, those of these names


@dataclass(frozen=True, eq=False)
class Passes:
    """Passes as columns, so that a cost is computed for all of them at once; iterating gives them one by one.

    places: the micro-batches. counts: int64 [passes, micro-batches, COLUMNS], the fields of MicroBatchShape.
    logits_rows: int64 [passes]. last: whether the job ends with the last of them.
    """

    places: Sequence[KVMicroBatch]
    counts: numpy.ndarray
    logits_rows: numpy.ndarray
    last: bool

    @classmethod
    def of(cls, shapes: Sequence[PassShape]) -> Passes:
        """Passes of equal micro-batches as columns."""
        parts = [part for shape in shapes for part in shape.micro_batches]
        places = [KVMicroBatch(part.home, 0, part.attend_lane) for part in parts[: len(parts) // len(shapes)]]
        counts = [[getattr(part, name) for name in COLUMNS] for part in parts]
        rows = numpy.array([shape.logits_rows for shape in shapes])
        return cls(places, numpy.array(counts).reshape(len(shapes), len(places), -1), rows, not shapes[-1].more)

    def __len__(self) -> int:
        return len(self.counts)

    def __iter__(self) -> Iterator[PassShape]:
        return map(self.shape, range(len(self)))

    def chosen(self, numbers: Sequence[int]) -> Passes:
        """Some of the passes."""
        return replace(self, counts=self.counts[numbers], logits_rows=self.logits_rows[numbers])

    def at(self, places: Sequence[KVMicroBatch]) -> Passes:
        """The same passes with their KV cache at other places."""
        return replace(self, places=places)

    def column(self, name: str) -> numpy.ndarray:
        """int64 [passes, micro-batches]."""
        return self.counts[:, :, COLUMNS.index(name)]

    def parts(self, part_tokens: int) -> dict[int, list[tuple[int, int]]]:
        """Of the passes that run in parts, by their numbers: (tokens, decoding ones) of each part; see Scheduler."""
        cut = {}
        for number in numpy.flatnonzero(self.tokens > 2 * part_tokens).tolist():
            rows = [(tokens, decode) for tokens, _, _, decode, *_ in self.counts[number].tolist() if tokens]
            counts = iter(rows)
            taken = [list(islice(counts, count)) for count in cut_rows([tokens for tokens, _ in rows], part_tokens)]
            cut[number] = [tuple(map(sum, zip(*part))) for part in taken]
        return cut

    def halves(self, asked: bool) -> numpy.ndarray:
        """(tokens, decoding ones) of the first half of each pass, 0 where it runs as a whole: see schedule.Scheduler.

        int64 [2, passes]. asked: whether passes are halved at all.
        """
        halves = numpy.zeros((2, len(self)), dtype=numpy.int64)
        if not (asked and len(self) and len(self.places) > 1):
            return halves
        on_cpu = [place.home is not Tier.GPU and place.attend_lane is Lane.CPU for place in self.places]
        cached = self.column("kv_tokens") - self.column("fresh_tokens")
        attended = (cached - self.column("above_kv_tokens")) * on_cpu
        tokens, decode, attended = (
            numpy.cumsum(column, axis=1)
            for column in (self.column("query_tokens"), self.column("decode_tokens"), attended)
        )
        most, total = tokens[:, -1:], numpy.maximum(attended[:, -1:], 1)
        uneven = numpy.abs(2 * tokens / most - 1) + numpy.abs(2 * attended / total - 1)
        uneven[(tokens == 0) | (tokens == most)] = numpy.inf
        cut, rows = uneven.argmin(axis=1), numpy.arange(len(self))
        halved = (attended[:, -1] > 0) & numpy.isfinite(uneven[rows, cut])
        halves[0], halves[1] = halved * tokens[rows, cut], halved * decode[rows, cut]
        return halves

    @property
    def tokens(self) -> numpy.ndarray:
        """int64 [passes]."""
        return self.column("query_tokens").sum(axis=1)

    @property
    def decode_tokens(self) -> numpy.ndarray:
        """int64 [passes]."""
        return self.column("decode_tokens").sum(axis=1)

    def shape(self, number: int) -> PassShape:
        micro_batches = tuple(
            MicroBatchShape(index, *counts[:3], place.home, place.attend_lane, *counts[3:])
            for index, (place, counts) in enumerate(zip(self.places, self.counts[number].tolist()))
            if counts[0]
        )
        tokens = sum(part.query_tokens for part in micro_batches)
        more = not self.last or number < len(self) - 1
        return PassShape(number, tokens, int(self.logits_rows[number]), micro_batches, more)


def job_passes(
    workload: Workload, policy: Policy, micro_batches: Sequence[KVMicroBatch], most: int | None = None
) -> Passes:
    """The passes of a job whose sequences get as long as they are likely to, in the order of the workload's rows.

    Follows offload.batcher: decoding sequences first, then prompts under way, then new ones while there is room in
    the pass, a slot and cache room. Gaps that ragged sequences leave in a slab are not modelled, and borders of KV that
    is split by token may be one token off, for they depend on where in its slab a sequence lies. Rows that no slab
    could hold are left out, as a run refuses them. most: stop after so many passes. Prefixes are shared where the first
    of the micro-batches is theirs.
    """
    return _Job(workload, policy, micro_batches).passes(most)


@dataclass
class _Prompt:
    """A sequence whose prompt is under way: ``cached`` of its ``tokens`` are done. The ``scored`` ones before the last
    take a row of the head each. prefix: one that it begins with, which is not among its tokens. Of a prefix that is run
    for those that share it, ``limit`` is None. room: of the cache, that it is given."""

    tokens: int
    limit: int | None
    room: int
    scored: int
    home: int
    border: int  # what lies above it is on the device, where KV is split by token
    prefix: int = NONE
    cached: int = 0


class _Job:
    """What is in flight: prompts one by one, decoding sequences as sums a micro-batch, for they advance alike."""

    def __init__(self, workload: Workload, policy: Policy, micro_batches: Sequence[KVMicroBatch]):
        self.policy, self.places = policy, micro_batches
        self.most_rows = part_tokens(policy) or policy.tokens_per_pass  # of one micro-batch in a pass
        shared = micro_batches[0].shared
        self.prefixes = (
            PrefixRoom(workload.prefixes, micro_batches[0].capacity_tokens, len(micro_batches)) if shared else None
        )
        workload = workload if shared else workload.apart()
        fits = workload.kv_tokens <= max(place.capacity_tokens for place in micro_batches if not place.shared)
        rows = workload.rows(fits)
        rooms = numpy.maximum(rows.kept_kv_tokens, rows.own_prompt_tokens + rows.likely_tokens - 1)  # no pauses here
        self.groups = CodedGroups(len(micro_batches)) if policy.key_value_bits is not None else None
        rooms = rooms if self.groups is None else room_of_groups(rooms)
        columns = (rows.own_prompt_tokens, rows.likely_tokens, rooms, rows.scored_tokens, rows.prefix)
        self.rows = list(zip(*(column.tolist() for column in columns)))
        self.next_row = self.in_flight = 0
        self.free = [place.capacity_tokens for place in micro_batches]
        self.counts = [0] * len(micro_batches)
        self.admitted: deque[_Prompt] = deque()  # in this pass, to be begun
        self.refused = False  # until a sequence ends, the next row finds no room
        self.prompts: deque[_Prompt] = deque()
        self.decoding = [0] * len(micro_batches)
        self.decoding_kv = [0] * len(micro_batches)  # tokens they attend in the coming pass
        # pass -> (micro-batch, cached, above, prefix, room) of what it ends
        self.ends: dict[int, list[tuple[int, int, int, int, int]]] = {}
        self.splits = any(place.device_share for place in micro_batches)
        self.above = [0] * len(micro_batches)  # decoding sequences that are past their borders in the coming pass
        self.above_kv = [0] * len(micro_batches)
        self.crossings: dict[int, list[int]] = {}  # pass -> micro-batches of sequences that it first takes past them

    def passes(self, most: int | None) -> Passes:
        counts, logits_rows, number = [], [], 0
        while (self.in_flight or self.next_row < len(self.rows)) and number != most:
            pass_counts, rows = self._one(number)
            counts.append(pass_counts)
            logits_rows.append(rows)
            number += 1
        table = numpy.zeros((number, len(COLUMNS), len(self.places)), dtype=numpy.int64)
        if number:  # the last columns are there only where they can be other than 0
            table[:, : len(counts[0])] = counts
        last = not self.in_flight and self.next_row == len(self.rows)
        return Passes(self.places, table.transpose(0, 2, 1), numpy.array(logits_rows, dtype=numpy.int64), last)

    def _one(self, number: int) -> tuple[list[list[int]], int]:
        """COLUMNS of one pass, each by micro-batch, and how many rows the head takes."""
        decoding, decoding_kv = self.decoding, self.decoding_kv
        table = [column[:] for column in (decoding, decoding_kv, decoding_kv, decoding, decoding_kv)]
        nothing = [0] * len(decoding)
        table += [nothing, nothing[:]]
        query, kv, pairs, single, single_kv, fresh, fresh_pairs = table
        for home in self.crossings.pop(number, ()):
            self.above[home] += 1
            self.above_kv[home] += 1
        if self.splits:
            table += [column[:] for column in (self.above, self.above_kv, self.above_kv, self.above, self.above_kv)]
        if self.groups is not None:
            groups = self.groups.columns(number)
        shared, attended = self.prefixes, {}
        if shared is not None:
            table += [nothing[:] for _ in range(12 - len(table))]
            by_home = [counts[:] for counts in shared.decoding]
        logits_rows = sum(decoding)
        room = self.policy.tokens_per_pass - logits_rows
        under_way, self.prompts, done = self.prompts, deque(), []
        if shared is not None:  # first, as others attend them
            under_way = deque(sorted(under_way, key=lambda prompt: prompt.limit is not None))
        while under_way or self.admitted or room > 0:
            prompt = (under_way or self.admitted).popleft() if under_way or self.admitted else self._admit()
            if prompt is None:
                break
            count = max(min(prompt.tokens - prompt.cached, room, self.most_rows - query[prompt.home]), 0)
            if count:
                room -= count
                home, seen = prompt.home, prompt.cached + count
                query[home] += count
                kv[home] += seen
                pairs[home] += count * prompt.cached + count * (count + 1) // 2
                if prompt.limit is None:
                    pass
                elif count == 1:
                    single[home] += 1
                    single_kv[home] += seen
                elif not prompt.cached:
                    fresh[home] += count
                    fresh_pairs[home] += count * (count + 1) // 2
                if prompt.scored:
                    last = prompt.tokens - 1
                    logits_rows += max(min(seen, last) - max(prompt.cached, last - prompt.scored), 0)
                if shared is not None:
                    chain = shared.chain(prompt.prefix)
                    shared.add_chunk(by_home[home], chain, count, attended.setdefault(home, set()))
                if self.groups is not None and prompt.limit is not None:
                    self.groups.add_chunk(groups, home, prompt.cached, seen)
                if self.splits and seen > prompt.border:
                    self._add_above(table[-5:], prompt, count)
                prompt.cached = seen
            if prompt.cached < prompt.tokens:
                self.prompts.append(prompt)
            elif prompt.limit is not None:
                done.append(prompt)
        if shared is not None:
            table += [list(column) for column in zip(*by_home)]
        if self.groups is not None:
            table += [[0] * len(decoding) for _ in range(GROUPS.start - len(table))] + groups
            self.groups.advance(number)
        for home, count in enumerate(decoding):
            decoding_kv[home] += count
            self.above_kv[home] += self.above[home]
        for home, tokens, above, prefix, taken in self.ends.pop(number, ()):
            decoding[home] -= 1
            decoding_kv[home] -= tokens + 1
            if above:
                self.above[home] -= 1
                self.above_kv[home] -= above + 1
            if prefix != NONE:
                shared.attend(home, prefix, -1)
            if self.groups is not None:
                self.groups.decode(home, number, tokens, -1)
            self._release(home, taken, prefix)
        for prompt in done:
            if prompt.limit <= 1:
                self._release(prompt.home, prompt.room, prompt.prefix)
                continue
            if prompt.prefix != NONE:
                shared.attend(prompt.home, prompt.prefix, 1)
            decoding[prompt.home] += 1
            decoding_kv[prompt.home] += prompt.tokens + 1
            if self.groups is not None:
                self.groups.decode(prompt.home, number, prompt.tokens, 1)
            last_tokens = prompt.tokens + prompt.limit - 1
            above = max(last_tokens - prompt.border, 0)
            ending = (prompt.home, last_tokens, above, prompt.prefix, prompt.room)
            self.ends.setdefault(number + prompt.limit - 1, []).append(ending)
            if prompt.tokens >= prompt.border:
                self.above[prompt.home] += 1
                self.above_kv[prompt.home] += prompt.tokens + 1 - prompt.border
            elif above:
                self.crossings.setdefault(number + 1 + prompt.border - prompt.tokens, []).append(prompt.home)
        return table, logits_rows + len(done)

    @staticmethod
    def _add_above(columns: list[list[int]], prompt: _Prompt, count: int) -> None:
        """What the next ``count`` tokens of a prompt have above its border, as the last COLUMNS of its micro-batch."""
        new, kv, pairs, single, single_kv = columns
        home, tokens = prompt.home, prompt.cached + count - prompt.border
        new[home] += min(tokens, count)
        if count > 1 and not prompt.cached:
            return  # fresh: nothing of it is cached
        kv[home] += tokens
        pairs[home] += pairs_of(count, tokens)
        if count == 1:
            single[home] += 1
            single_kv[home] += tokens

    def _admit(self) -> _Prompt | None:
        """The next sequence, or None while it must wait."""
        if self.refused or self.in_flight >= self.policy.sequences_in_flight or self.next_row >= len(self.rows):
            return None
        prompt, limit, room, scored, prefix = self.rows[self.next_row]
        most = self.policy.attention_micro_batch
        fitting = [
            (count, -free, home)
            for home, (count, free) in enumerate(zip(self.counts, self.free))
            if count < most and free >= room and not self.places[home].shared
        ]
        new = self.prefixes.take(prefix) if fitting and prefix != NONE else []
        self.refused = not fitting or new is None
        if self.refused:
            return None
        home = min(fitting)[2]
        self.counts[home] += 1
        self.free[home] -= room
        self.next_row += 1
        self.in_flight += 1
        border = self.places[home].split(0, room)[2] if self.splits else prompt + limit
        admitted = _Prompt(prompt, limit, room, scored, home, border, prefix)
        if not new:
            return admitted
        self.admitted.append(admitted)  # behind what it shares
        links = [_Prompt(length, None, length, 0, 0, length, self.prefixes.parent(link)) for link, length in new]
        self.admitted.extendleft(reversed(links))
        return self.admitted.popleft()

    def _release(self, home: int, tokens: int, prefix: int) -> None:
        if prefix != NONE:
            self.prefixes.release(prefix)
        self.counts[home] -= 1
        self.free[home] += tokens
        self.in_flight -= 1
        self.refused = False
