"""A job's passes boiled down to a few typical ones: what the linear program weighs against each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from flexrun.core import Lane, Tier
from flexrun.policy.passes import COLUMNS
from flexrun.steps import MicroBatchShape, PassShape


@dataclass(frozen=True)
class PassKind:
    """A typical pass, its sequences taken as one micro-batch, and how many passes of the job are like it."""

    shape: PassShape
    count: float


def pass_kinds(passes: Iterable[PassShape], times: float = 1.0) -> list[PassKind]:
    """At most three: mostly prefill, mixed, decode only; each the mean of its passes.

    times: how often the passes given stand for others of the job.
    """
    groups: dict[str, list[PassShape]] = {}
    for shape in passes:
        groups.setdefault(kind_of(shape), []).append(shape)
    return [PassKind(_mean(shapes), times * len(shapes)) for shapes in groups.values()]


def kind_of(shape: PassShape) -> str:
    """``decode``, ``mixed`` or ``prefill``, by what most of its tokens are."""
    decode = sum(micro_batch.decode_tokens for micro_batch in shape.micro_batches)
    return "decode" if decode == shape.tokens else "mixed" if 2 * decode >= shape.tokens else "prefill"


def _mean(shapes: list[PassShape]) -> PassShape:
    count = len(shapes)

    def mean(name: str) -> int:
        return round(sum(getattr(part, name) for shape in shapes for part in shape.micro_batches) / count)

    tokens = round(sum(shape.tokens for shape in shapes) / count)
    logits_rows = round(sum(shape.logits_rows for shape in shapes) / count)
    counts = [mean(name) for name in COLUMNS]
    whole = MicroBatchShape(0, *counts[:3], Tier.CPU, Lane.CPU, *counts[3:])
    return PassShape(0, tokens, logits_rows, (whole,), True)
