"""The shared prefixes whose keys and values are at hand: those of the sequences in flight, and what others left.

A prefix stays after its last sequence until another needs its room, the longest unused first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy

from flexrun.offload.kv_store import KVStore
from flexrun.prefixes import NONE, Prefixes


@dataclass(eq=False, slots=True)
class PrefixRun:
    """One prefix in the making, or at hand: ``cached_tokens`` of its tokens have been planned into passes.

    position: of its first token in a prompt; start: its first row of the slabs. users: sequences in flight that begin
    with it. children: prefixes at hand that go on from it. used: when a sequence last took it up.
    """

    prefix: int
    tokens: numpy.ndarray
    position: int
    start: int
    before: tuple[PrefixRun, ...]
    cached_tokens: int = 0
    users: int = 0
    children: int = 0
    used: int = 0

    @property
    def pending_tokens(self) -> int:
        return len(self.tokens) - self.cached_tokens


Chain = tuple[PrefixRun, ...]


class PrefixCache:
    """Prefixes by their numbers. ``begin`` with those of another job forgets all that is at hand."""

    def __init__(self, kv_store: KVStore):
        self._kv = kv_store
        self._prefixes = Prefixes()
        self._runs: dict[int, PrefixRun] = {}
        self._clock = 0

    def begin(self, prefixes: Prefixes) -> None:
        while self._evict():
            pass
        self._prefixes = prefixes

    @property
    def pending(self) -> list[PrefixRun]:
        """Those not planned to their ends, in the order of first use."""
        return [run for run in self._runs.values() if run.pending_tokens]

    def take(self, prefix: int, *, alone: bool) -> Chain | None:
        """The parts of a prefix, for a sequence that begins with it, or None while they find no room.

        alone: no sequence is in flight, so that whatever is at hand may go.
        """
        if prefix == NONE:
            return ()
        chain = self._taken(prefix)
        if chain is None and alone:
            while self._evict():
                pass
            chain = self._taken(prefix)
        return chain

    def _taken(self, prefix: int) -> Chain | None:
        chain: Chain = ()
        self._clock += 1
        for link in self._prefixes.chain(prefix):
            run = self._runs.get(link) or self._new(link, chain)
            if run is None:
                self.release(chain)
                for taken in reversed(chain):
                    if not taken.cached_tokens and not taken.users:
                        self._drop(taken)
                return None
            run.users += 1
            run.used = self._clock
            chain = (*chain, run)
        return chain

    def _new(self, prefix: int, before: Chain) -> PrefixRun | None:
        tokens = self._prefixes.tokens[prefix]
        while (start := self._kv.allocate_prefix(len(tokens))) is None:
            if not self._evict():
                return None
        run = PrefixRun(prefix, tokens, before[-1].position + len(before[-1].tokens) if before else 0, start, before)
        if before:
            before[-1].children += 1
        self._runs[prefix] = run
        return run

    def release(self, chain: Chain) -> None:
        for run in chain:
            run.users -= 1

    def _evict(self) -> bool:
        """Forget the one that was not used for longest; False where none can go."""
        unused = [run for run in self._runs.values() if not run.users and not run.children]
        if unused:
            self._drop(min(unused, key=lambda run: run.used))
        return bool(unused)

    def _drop(self, run: PrefixRun) -> None:
        self._kv.release_prefix(run.start, len(run.tokens))
        if run.before:
            run.before[-1].children -= 1
        del self._runs[run.prefix]
