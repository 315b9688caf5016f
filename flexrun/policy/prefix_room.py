"""Shared prefixes in a job that is only planned: which are at hand and which must be run, as in offload."""

from __future__ import annotations

from collections import Counter

from flexrun.prefixes import NONE, Prefixes


class PrefixRoom:
    """``free`` tokens of room, the prefixes that take the rest, and what decoding sequences attend of them.

    decoding: of each micro-batch (rows, KV tokens, pairs), as the fields of MicroBatchShape that begin with ``prefix``.
    """

    def __init__(self, prefixes: Prefixes, capacity_tokens: int, micro_batches: int):
        self._chains, self._depths = prefixes.chains, prefixes.depths.tolist()
        self._lengths, self._parents = prefixes.lengths.tolist(), prefixes.parents.tolist()
        self._free = capacity_tokens
        self._users: dict[int, int] = {}  # of each one at hand, the longest unused first
        self._children: Counter[int] = Counter()
        self._attending: Counter[tuple[int, int]] = Counter()  # (micro-batch, prefix) -> decoding sequences
        self.decoding = [[0, 0, 0] for _ in range(micro_batches)]

    def tokens(self, prefix: int) -> int:
        return self._depths[prefix] if prefix != NONE else 0

    def parent(self, prefix: int) -> int:
        return self._parents[prefix]

    def chain(self, prefix: int) -> tuple[int, ...]:
        return self._chains[prefix] if prefix != NONE else ()

    def take(self, prefix: int) -> list[tuple[int, int]] | None:
        """(prefix, tokens) of what must be run for a sequence that begins with it; None while there is no room."""
        new: list[tuple[int, int]] = []
        chain = self.chain(prefix)
        for place, link in enumerate(chain):
            if link not in self._users:
                length = self._lengths[link]
                while self._free < length and self._evict():
                    pass
                if self._free < length:
                    for taken in chain[:place]:
                        self._users[taken] -= 1
                    for taken, _ in reversed(new):
                        self._drop(taken)
                    return None
                self._free -= length
                self._users[link] = 0
                if self._parents[link] != NONE:
                    self._children[self._parents[link]] += 1
                new.append((link, length))
            self._users[link] = self._users.pop(link) + 1
        return new

    def release(self, prefix: int) -> None:
        for link in self.chain(prefix):
            self._users[link] -= 1

    def _evict(self) -> bool:
        for link, users in self._users.items():
            if not users and not self._children[link]:
                self._drop(link)
                return True
        return False

    def _drop(self, link: int) -> None:
        del self._users[link]
        self._free += self._lengths[link]
        if self._parents[link] != NONE:
            self._children[self._parents[link]] -= 1

    def attend(self, home: int, prefix: int, sequences: int) -> None:
        """So many sequences more (or fewer) of a micro-batch decode behind a prefix."""
        chain, counts = self.chain(prefix), self.decoding[home]
        counts[0] += sequences * len(chain)
        counts[2] += sequences * self.tokens(prefix)
        for link in chain:
            before = self._attending[home, link]
            self._attending[home, link] = after = before + sequences
            counts[1] += self._lengths[link] * ((after > 0) - (before > 0))

    def add_chunk(self, counts: list[int], chain: tuple[int, ...], tokens: int, seen: set[int]) -> None:
        """A chunk of a prompt that attends ``chain``. seen: prefixes that others of its micro-batch attend already."""
        counts[0] += tokens * len(chain)
        for link in chain:
            counts[2] += tokens * self._lengths[link]
            if link not in seen:
                seen.add(link)
                counts[1] += self._lengths[link]
