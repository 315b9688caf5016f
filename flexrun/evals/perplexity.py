"""Perplexity of a text under any policy, and of several settings side by side: what fewer bits cost in accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any

from flexrun.compress import can_compress
from flexrun.config import KV_BITS
from flexrun.errors import ConfigError, ExecutionError
from flexrun.llm import LLM
from flexrun.outputs import Score


@dataclass(frozen=True)
class Perplexity:
    """tokens: that were predicted. nats: mean negative natural-log probability of one. matrix_bits: of an element of
    the matrices that can be compressed, scales included."""

    setting: str
    tokens: int
    nats: float
    matrix_bits: float
    seconds: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    def document(self) -> dict:
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class Setting:
    """A name for the table, and the options of an LLM that make it."""

    name: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> Setting:
        """From ``"weight-bits=4 keep=layers.0.*=16,*.down_proj=8"`` or ``"policy=FILE"``; words in any order.

        Raises ConfigError for other words.
        """
        options: dict[str, Any] = {}
        for word in text.split():
            name, _, value = word.partition("=")
            if name == "weight-bits" and value in ("4", "8", "16"):
                options["weight_bits"] = int(value)
            elif name == "weight-group" and value in ("32", "64", "128"):
                options["weight_group"] = int(value)
            elif name == "activation-bits" and value in ("8", "16"):
                options["activation_bits"] = int(value)
            elif name == "kv-bits" and value in map(str, KV_BITS):
                options["kv_bits"] = int(value) if value.isdecimal() else value
            elif name == "keep" and value:
                options["keep"] = value.split(",")
            elif name == "policy" and value:
                options["policy"] = value
            else:
                raise ConfigError(
                    f"cannot read {word!r} in the setting {text!r}",
                    'write for example "weight-bits=4 keep=*.down_proj=8" or "policy=FILE"',
                )
        return cls(text, options)


def windows(token_ids: Sequence[int], context_tokens: int) -> Iterator[list[int]]:
    """``token_ids`` cut to pieces of ``context_tokens``, each beginning with the last token of the one before.

    Predicting each piece after its first token predicts every token of the text but the first once.
    """
    for start in range(0, len(token_ids) - 1, context_tokens - 1):
        yield list(token_ids[start : start + context_tokens])


def score_pieces(llm: LLM, pieces: list[list[int]]) -> list[Score]:
    """Scores of pieces of a text, in their order. Raises ExecutionError where one was not scored."""
    scores = llm.score(pieces, use_tqdm=False)
    for score in scores:
        if score.error is not None:
            raise ExecutionError(f"a piece of the text was not scored: {score.error.message}", score.error.hint)
    return scores


def perplexity(llm: LLM, token_ids: Sequence[int], context_tokens: int, setting: str = "") -> Perplexity:
    """Of a text, each token predicted from at most ``context_tokens`` - 1 before it.

    Raises ConfigError for a text or a context of less than two tokens, ExecutionError where a piece is not scored.
    """
    if min(len(token_ids), context_tokens) < 2:
        raise ConfigError("perplexity needs a text and a context of two tokens at least")
    if context_tokens > llm.max_model_len:
        raise ConfigError(
            f"a context of {context_tokens} tokens is more than the {llm.max_model_len} of the model", "lower --context"
        )
    start_seconds = time.perf_counter()
    scores = score_pieces(llm, list(windows(token_ids, context_tokens)))
    seconds = time.perf_counter() - start_seconds
    tokens = sum(len(score.token_ids) for score in scores)
    nats = -math.fsum(score.logprob for score in scores) / tokens
    return Perplexity(setting, tokens, nats, matrix_bits(llm), seconds)


def matrix_bits(llm: LLM) -> float:
    """Bits of an element of the matrices that can be compressed, as the engine at hand stores them."""
    placed = [each for each in llm.plan.layout.placement.tensors if can_compress(each.tensor)]
    elements = sum(each.tensor.elements for each in placed)
    return 8 * sum(each.nbytes for each in placed) / max(elements, 1)


def compare(
    open_llm: Callable[..., LLM], settings: Iterable[Setting], token_ids: Sequence[int], context_tokens: int
) -> Iterator[Perplexity]:
    """The perplexity of each setting as it is found. open_llm: called with a setting's options; closed here."""
    for setting in settings:
        with closing(open_llm(**setting.options)) as llm:
            yield perplexity(llm, token_ids, context_tokens, setting.name)


def format_table(results: Sequence[Perplexity]) -> str:
    """A row a setting, with the change against the first one."""
    rows = [("setting", "bits", "perplexity", "change", "tokens/s")]
    for result in results:
        change = result.perplexity / results[0].perplexity - 1
        rate = result.tokens / result.seconds if result.seconds else 0.0
        rows.append(
            (
                result.setting or "as stored",
                f"{result.matrix_bits:.2f}",
                f"{result.perplexity:.4f}",
                f"{change:+.2%}" if result is not results[0] else "-",
                f"{rate:.0f}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    )
