"""How likely given texts are: what ``LLM.score`` asks of the engine, and what it makes of the answers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from flexrun.errors import RequestError, TokenizerError
from flexrun.outputs import Request, RequestOutput, Score
from flexrun.sampling import SamplingParams

Text = str | Sequence[int]
SCORED_ONLY = SamplingParams(temperature=0.0, max_tokens=0, prompt_logprobs=0)


def score_requests(
    tokenizer, texts: Text | Iterable[Text], continuations: Text | Iterable[Text] | None
) -> list[Request]:
    """One request a text, whose continuation (or all of it after its first token) is to be scored.

    A text and its continuation are tokenised as one and divided where the text alone would end, so that no token
    straddles them; blanks at the end of a text go to its continuation (as lm-evaluation-harness does). An empty text
    stands for the token that begins a document.
    Raises RequestError where the numbers of texts and continuations differ, or text comes without a tokenizer.
    """
    texts = _as_list(texts)
    if continuations is None:
        return [_request(number, _ids(tokenizer, text), 1) for number, text in enumerate(texts)]
    continuations = _as_list(continuations)
    if len(continuations) != len(texts):
        raise RequestError(
            f"{len(texts)} texts and {len(continuations)} continuations", "give one continuation for each text"
        )
    return [
        _request(number, *_joined(tokenizer, text, continuation))
        for number, (text, continuation) in enumerate(zip(texts, continuations))
    ]


def as_score(request: Request, output: RequestOutput) -> Score:
    """The score that an output holds."""
    if output.error is not None:
        return Score(math.nan, False, [], [], error=output.error)
    token_ids = request.token_ids[request.score_start :]
    entries = [found[token] for token, found in zip(token_ids, output.prompt_logprobs[request.score_start :])]
    logprobs = [entry.logprob for entry in entries]
    return Score(math.fsum(logprobs), all(entry.rank == 1 for entry in entries), token_ids, logprobs)


def _request(number: int, token_ids: list[int], score_start: int) -> Request:
    return Request(str(number), token_ids, params=SCORED_ONLY, score_start=score_start)


def _joined(tokenizer, text: Text, continuation: Text) -> tuple[list[int], int]:
    """Token ids of both, and where the continuation starts."""
    if not isinstance(text, str) or not isinstance(continuation, str):
        first = _ids(tokenizer, text) or _beginning(tokenizer)
        rest = _ids(tokenizer, continuation, special=False)
        return [*first, *rest], len(first)
    kept = text.rstrip()
    if not kept:
        first = _beginning(tokenizer)
        return [*first, *_ids(tokenizer, text + continuation, special=False)], len(first)
    first = _ids(tokenizer, kept)
    whole = _ids(tokenizer, kept + text[len(kept) :] + continuation)
    return whole, len(first)


def _ids(tokenizer, text: Text, special: bool = True) -> list[int]:
    if not isinstance(text, str):
        return list(text)
    if tokenizer is None:
        raise RequestError("scoring text needs a tokenizer", "give --tokenizer, or token ids", "no_tokenizer")
    return tokenizer.encode(text, add_special_tokens=special)


def _beginning(tokenizer) -> list[int]:
    if tokenizer is not None:
        for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token is not None:
                return [token]
    raise TokenizerError("nothing begins a document: the tokenizer has no such token", "give a text that is not empty")


def _as_list(texts: Text | Iterable[Text]) -> list[Text]:
    if isinstance(texts, str):
        return [texts]
    texts = list(texts)
    return [texts] if texts and isinstance(texts[0], int) else texts
