"""Which matrices of a model are compressed, and how: bits for all, and patterns for those that keep more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

from flexrun.compress.groupwise import GroupFormat
from flexrun.errors import ConfigError


class Stored(Protocol):
    """What is asked of a packed tensor; see flexrun.models.tensors."""

    name: str
    module: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    dtype: str | None


@dataclass(frozen=True)
class WeightBits:
    """bits: of every matrix that can be compressed (16: the model's dtype). keep: ``"PATTERN=BITS"``, first fit wins.

    A pattern, as of file names, is held against the checkpoint's name of a matrix without ``model.`` and ``.weight``
    (``layers.3.mlp.down_proj``) or with them. Where a packed matrix is made of several, it takes the most bits of them.
    """

    bits: int = 16
    keep: tuple[str, ...] = ()
    group: int = 64

    def of(self, layer: int, tensor: Stored) -> GroupFormat | None:
        """How a tensor is compressed; None: not at all."""
        if not can_compress(tensor):
            return None
        bits = max(self._bits_of(names) for names in _names(layer, tensor))
        return None if bits == 16 else GroupFormat(bits, self.group)

    def check(self, tensors: Iterable[tuple[int, Stored]]) -> None:
        """Raise ConfigError for a pattern that no matrix of the model fits."""
        rules = _rules(self.keep)
        unused = dict(rules)
        for layer, tensor in tensors:
            if unused and can_compress(tensor):
                for names in _names(layer, tensor):
                    for pattern in [each for each in unused if _fits(each, names)]:
                        del unused[pattern]
        for pattern in unused:
            raise ConfigError(
                f"--keep {pattern}={unused[pattern]}: no matrix that can be compressed has such a name",
                "name matrices as the checkpoint does, for example layers.0.*=16 or *.down_proj=8; embeddings, norms "
                "and routers always keep their dtype",
            )

    def _bits_of(self, names: tuple[str, ...]) -> int:
        return next((bits for pattern, bits in _rules(self.keep) if _fits(pattern, names)), self.bits)

    def __str__(self) -> str:
        return ",".join((f"{self.bits}", *self.keep))


def can_compress(tensor: Stored) -> bool:
    """Whether only matmuls ever read it: embeddings are read by rows, routers in float32, kv_b by parts."""
    is_matrix = len(tensor.shape) == 2 and tensor.module != "embedding" and tensor.dtype is None
    return is_matrix and "router" not in tensor.name and tensor.name != "kv_b.weight"


def _names(layer: int, tensor: Stored) -> Iterator[tuple[str, ...]]:
    """Of each part of a packed matrix, the names that patterns may fit."""
    for source in tensor.sources:
        short = source.removesuffix(".weight")
        yield source, short, short.removeprefix("model.")


def _fits(pattern: str, names: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _rules(keep: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    rules = []
    for rule in keep:
        pattern, _, bits = rule.rpartition("=")
        if not pattern or bits not in ("4", "8", "16"):
            raise ConfigError(f"cannot read {rule!r}", "write PATTERN=BITS with 4, 8 or 16 bits, as in *.down_proj=8")
        rules.append((pattern, int(bits)))
    return tuple(rules)
