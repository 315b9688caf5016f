"""The passes of a job before it runs: what the batcher would put into each, from the lengths of the prompts alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy

from flexrun.config import Policy
from flexrun.placement import KVMicroBatch
from flexrun.steps import MicroBatchShape, PassShape
from flexrun.workload import Workload


def job_passes(workload: Workload, policy: Policy, micro_batches: Sequence[KVMicroBatch]) -> Iterator[PassShape]:
    """Every pass of a job whose sequences all run to their last token, in the order of the workload's rows.

    Follows offload.batcher: decoding sequences first, then prompts under way, then new ones while there is room in
    the pass, a slot and cache room. Gaps that ragged sequences leave in a slab are not modelled. Rows that no slab
    could hold are left out, as a run refuses them.
    """
    return _Job(workload, policy, micro_batches).passes()


class _Job:
    """Sequences in flight as columns, in order of admission."""

    def __init__(self, workload: Workload, policy: Policy, micro_batches: Sequence[KVMicroBatch]):
        self.policy, self.places = policy, micro_batches
        fits = workload.kv_tokens <= max(place.capacity_tokens for place in micro_batches)
        self.prompts, self.limits = workload.prompt_tokens[fits].tolist(), workload.max_tokens[fits].tolist()
        self.next_row = 0
        self.free = [place.capacity_tokens for place in micro_batches]
        self.counts = [0] * len(micro_batches)
        empty = numpy.empty(0, dtype=numpy.int64)
        self.prompt, self.limit, self.cached, self.made, self.home = empty, empty, empty, empty, empty

    def passes(self) -> Iterator[PassShape]:
        index = 0
        while len(self.prompt) or self.next_row < len(self.prompts):
            query, sampled = self._fill()
            shape = self._shape(index, query, sampled)
            self.cached = self.cached + query
            self.made = self.made + sampled
            ended = self.made >= self.limit
            if ended.any():
                self._retire(ended)
            index += 1
            yield shape

    def _fill(self) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(query tokens, whether a token is sampled) of each sequence in this pass, new ones included."""
        decoding = self.made > 0
        room = self.policy.tokens_per_pass - int(decoding.sum())
        query = decoding.astype(numpy.int64)
        for place in numpy.flatnonzero(~decoding):
            count = max(min(int(self.prompt[place] - self.cached[place]), room), 0)
            query[place] = count
            room -= count
        new = []
        while room > 0 and (row := self._admit(len(query) + len(new))) is not None:
            count = min(row[0], room)
            new.append((*row, count))
            room -= count
        if new:
            prompt, limit, home, count = numpy.array(new, dtype=numpy.int64).T
            zero = numpy.zeros(len(new), dtype=numpy.int64)
            self.prompt = numpy.concatenate((self.prompt, prompt))
            self.limit = numpy.concatenate((self.limit, limit))
            self.home = numpy.concatenate((self.home, home))
            self.cached = numpy.concatenate((self.cached, zero))
            self.made = numpy.concatenate((self.made, zero))
            query = numpy.concatenate((query, count))
        sampled = (query > 0) & (self.cached + query >= self.prompt)
        return query, sampled.astype(numpy.int64)

    def _admit(self, in_flight: int) -> tuple[int, int, int] | None:
        """(prompt, limit, micro-batch) of the next sequence, or None while it must wait."""
        if in_flight >= self.policy.sequences_in_flight or self.next_row >= len(self.prompts):
            return None
        prompt, limit = self.prompts[self.next_row], self.limits[self.next_row]
        tokens = prompt + limit - 1
        fitting = [
            (count, -free, home)
            for home, (count, free) in enumerate(zip(self.counts, self.free))
            if count < self.policy.attention_micro_batch and free >= tokens
        ]
        if not fitting:
            return None
        home = min(fitting)[2]
        self.counts[home] += 1
        self.free[home] -= tokens
        self.next_row += 1
        return prompt, limit, home

    def _retire(self, ended: numpy.ndarray) -> None:
        for place in numpy.flatnonzero(ended):
            home = self.home[place]
            self.counts[home] -= 1
            self.free[home] += int(self.prompt[place] + self.limit[place] - 1)
        stay = ~ended
        self.prompt, self.limit, self.cached = self.prompt[stay], self.limit[stay], self.cached[stay]
        self.made, self.home = self.made[stay], self.home[stay]

    def _shape(self, index: int, query: numpy.ndarray, sampled: numpy.ndarray) -> PassShape:
        places = len(self.places)
        kv = numpy.where(query > 0, self.cached + query, 0)
        pairs = query * self.cached + query * (query + 1) // 2
        single = query == 1
        columns = numpy.stack((query, kv, pairs, single, numpy.where(single, kv, 0)))
        sums = [numpy.bincount(self.home, column, places).astype(numpy.int64).tolist() for column in columns]
        shapes = tuple(
            MicroBatchShape(number, tokens, kv_tokens, kv_pairs, place.home, place.attend_lane, decode, decode_kv)
            for number, (place, tokens, kv_tokens, kv_pairs, decode, decode_kv) in enumerate(zip(self.places, *sums))
            if tokens
        )
        more = self.next_row < len(self.prompts) or bool(((self.made + sampled) < self.limit).any())
        return PassShape(index, int(query.sum()), int(sampled.sum()), shapes, more)
