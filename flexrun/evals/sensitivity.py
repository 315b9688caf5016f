"""Which matrices suffer most from few bits, found by compressing one after the other, and who deserves more of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy

from flexrun.compress import GroupFormat, WeightBits, can_compress
from flexrun.errors import ConfigError
from flexrun.evals.perplexity import score_pieces, windows
from flexrun.llm import LLM
from flexrun.models.spec import ModelSpec, PackedTensor

LEVELS = (4, 8, 16)


@dataclass(frozen=True)
class Sensitivity:
    """change: mean square by which compressing this matrix alone moves the log-probabilities of a text's tokens; about
    twice the divergence of the distributions, and other than a difference of perplexities never negative."""

    layer: int
    tensor: PackedTensor
    change: float

    @property
    def rule(self) -> str:
        """What ``--keep`` calls it."""
        return self.tensor.sources[0].removesuffix(".weight").removeprefix("model.")


def sensitivities(
    llm: LLM, token_ids: Sequence[int], context_tokens: int, form: GroupFormat, on_matrix: Callable[[], None] = int
) -> list[Sensitivity]:
    """Of every matrix that can be compressed, in order of use. The model must be in RAM, in its own dtype.

    Raises ConfigError where a matrix is streamed, ExecutionError where a piece of the text is not scored.
    """
    pieces = list(windows(token_ids, context_tokens))
    plain = _logprobs(llm, pieces)
    found = []
    for layer, tensor in matrices(llm.spec):
        with llm.compressed(layer, tensor.name, form):
            change = _logprobs(llm, pieces) - plain
        found.append(Sensitivity(layer, tensor, float(numpy.square(change).mean())))
        on_matrix()
    return found


def from_changes(spec: ModelSpec, changes: Mapping[str, float]) -> list[Sensitivity]:
    """Of each matrix, as an earlier measurement found it, by rule. Raises KeyError for one that it lacks."""
    found = [Sensitivity(layer, tensor, 0.0) for layer, tensor in matrices(spec)]
    return [replace(each, change=float(changes[each.rule])) for each in found]


def matrices(spec: ModelSpec) -> Iterator[tuple[int, PackedTensor]]:
    """Those that can be compressed, with their layers."""
    return (row for row in spec.tensors_by_layer() if can_compress(row[1]))


def choose(
    found: Sequence[Sensitivity], target_bits: float, low: GroupFormat, high: GroupFormat | None, dtype_bytes: int = 2
) -> tuple[str, ...]:
    """Rules that give ``high`` (None: the dtype) to those who gain most by a byte, the rest being ``low``: at most
    ``target_bits`` an element on average, factors included. Raises ConfigError where ``low`` alone takes more."""
    elements = sum(each.tensor.elements for each in found)
    left = target_bits * elements - 8 * sum(low.nbytes(each.tensor.shape) for each in found)
    if left < 0:
        least = target_bits - left / elements
        raise ConfigError(
            f"a target of {target_bits:g} bits, but {low.bits} bits for all take {least:.2f} with their scales",
            f"give at least {least:.2f}",
        )
    rules = []
    for each in sorted(found, key=lambda each: -each.change / each.tensor.elements):
        wanted = high.nbytes(each.tensor.shape) if high else each.tensor.elements * dtype_bytes
        more = 8 * (wanted - low.nbytes(each.tensor.shape))
        if more <= left:
            left -= more
            rules.append(f"{each.rule}={high.bits if high else 16}")
    return tuple(rules)


def meet(
    llm: LLM,
    token_ids: Sequence[int],
    context_tokens: int,
    found: Sequence[Sensitivity],
    bits: int,
    most_loss: float,
    on_trial: Callable[[], None] = int,
) -> tuple[tuple[str, ...], float]:
    """(rules, loss): as few of the matrices in more than ``bits`` as keep the loss below ``most_loss``.

    Those of the largest change an element are given 8 bits in place of 4, then 16 in place of 8, and all together are
    measured on the text, by halving. loss: by how much its perplexity grows (0.01: 1 %), or would grow on a text of the
    model's own, whichever is more: small changes may go either way on one text. Raises as ``sensitivities``.
    """
    order = sorted(found, key=lambda each: -each.change / each.tensor.elements)
    levels = [level for level in LEVELS if level >= bits]
    pieces = list(windows(token_ids, context_tokens))
    plain = _logprobs(llm, pieces)

    def bits_after(steps: int) -> list[int]:
        level, further = divmod(steps, len(order))
        return [levels[min(level + (place < further), len(levels) - 1)] for place in range(len(order))]

    def loss_after(steps: int) -> float:
        with ExitStack() as stack:
            for each, own in zip(order, bits_after(steps)):
                if own < 16:
                    stack.enter_context(llm.compressed(each.layer, each.tensor.name, GroupFormat(own)))
            change = _logprobs(llm, pieces) - plain
        on_trial()
        return math.expm1(max(-float(change.mean()), float(numpy.square(change).mean()) / 2))

    low, high, loss = -1, len(order) * (len(levels) - 1), 0.0
    while high - low > 1:
        middle = (low + high) // 2
        if (lost := loss_after(middle)) <= most_loss:
            high, loss = middle, lost
        else:
            low = middle
    return tuple(f"{each.rule}={own}" for each, own in zip(order, bits_after(high)) if own != bits), loss


def average_bits(spec: ModelSpec, bits: WeightBits) -> float:
    """Bits of an element of the matrices that can be compressed, factors included."""
    nbytes = elements = 0
    for layer, tensor in matrices(spec):
        form = bits.of(layer, tensor)
        nbytes += tensor.elements * spec.dtype_bytes if form is None else form.nbytes(tensor.shape)
        elements += tensor.elements
    return 8 * nbytes / max(elements, 1)


def _logprobs(llm: LLM, pieces: list[list[int]]) -> numpy.ndarray:
    return numpy.concatenate([score.token_logprobs for score in score_pieces(llm, pieces)])
