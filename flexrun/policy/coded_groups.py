"""Groups of a compressed cache in the passes of a job before it runs: how many each micro-batch has, and completes."""

from __future__ import annotations

from flexrun.compress import GROUP_TOKENS


class CodedGroups:
    """Of decoding sequences sums a micro-batch: a sequence completes a group every 64th pass, so that the number of the
    pass tells whose turn it is."""

    def __init__(self, micro_batches: int):
        self._there = [0] * micro_batches
        self._turns = [[0] * GROUP_TOKENS for _ in range(micro_batches)]

    def columns(self, number: int) -> list[list[int]]:
        """There before pass ``number``, completed by it, and completed by what is fresh, which is nothing yet."""
        return [self._there[:], [turns[number % GROUP_TOKENS] for turns in self._turns], [0] * len(self._there)]

    @staticmethod
    def add_chunk(columns: list[list[int]], home: int, cached: int, seen: int) -> None:
        """Tokens ``[cached, seen)`` of a prompt are in the pass."""
        there, new, fresh = columns
        before, then = cached // GROUP_TOKENS, seen // GROUP_TOKENS
        there[home] += before
        new[home] += then - before
        if not cached and seen > 1:
            fresh[home] += then

    def advance(self, number: int) -> None:
        """Pass ``number`` is over, before sequences begin or end to decode with it."""
        for home, turns in enumerate(self._turns):
            self._there[home] += turns[number % GROUP_TOKENS]

    def decode(self, home: int, number: int, tokens: int, change: int) -> None:
        """With pass ``number`` a sequence of ``tokens`` tokens begins to decode, or ends (-1)."""
        self._there[home] += change * (tokens // GROUP_TOKENS)
        self._turns[home][(number - tokens) % GROUP_TOKENS] += change
