"""What goes into the engine and what comes out, under vLLM's names, so that scripts written for it port by import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flexrun.errors import RequestError
from flexrun.prefixes import NONE


@dataclass(frozen=True)
class Request:
    """One request, given as ``token_ids``, ``prompt`` or ``messages``; where ids come with a text, the ids count.

    params: the request's SamplingParams; None takes the engine's defaults. score_start: first prompt token whose
    log-probability is wanted where not all are (from 1; None: what params say). partial: tokens that an earlier run
    generated, by choice, which this one goes on from. prefix: number of the shared prefix that the prompt begins with,
    among those of the workload (-1: none). kept_tokens: of its answer, for which cache room is kept where there is not
    enough for the worst case (None: learnt from other answers).
    """

    request_id: str
    token_ids: list[int] | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    params: Any = None
    score_start: int | None = None
    partial: Mapping[int, Sequence[int]] | None = None
    prefix: int = NONE
    kept_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural-log probability of one token; ``rank`` counts from 1, the most likely token of its position."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    """One generated continuation.

    logprobs: for each generated token its {token id: Logprob} (the chosen token and the top ones), None if not asked.
    finish_reason: 'stop', 'length' or 'error'; stop_reason: the stop string or stop token id that ended it, else None.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Score:
    """How likely a text is, given what comes before it.

    logprob: natural-log probability of all its tokens; nan where ``error`` is set. is_greedy: whether each was the
    likeliest at its place. token_logprobs: of each of token_ids.
    """

    logprob: float
    is_greedy: bool
    token_ids: list[int]
    token_logprobs: list[float]
    error: RequestError | None = None


@dataclass
class RequestOutput:
    """All continuations of one request. ``error`` is set, and ``outputs`` empty, where the request was refused.

    prompt_logprobs: one {token id: Logprob} a prompt token (None for the first, and for those not scored), None if not
    asked.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    metrics: dict[str, Any] | None = None
    num_cached_tokens: int = 0
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    error: RequestError | None = None

    @classmethod
    def refused(cls, request: Request, error: RequestError) -> RequestOutput:
        """The output of a request that cannot be served: it carries the error and no continuation."""
        return cls(request.request_id, request.prompt, request.token_ids, error=error)
