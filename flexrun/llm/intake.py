"""Turns what callers give (text, messages, token ids) into groups of sequences, or into one request's error."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy

from flexrun.errors import FlexrunError, RequestError
from flexrun.llm.model_files import ModelFiles
from flexrun.offload.sequence import Group
from flexrun.offload.sequence import Sequence as TextInTheMaking
from flexrun.outputs import Request
from flexrun.prefixes import NONE, Prefixes, shareable_tokens
from flexrun.sampling import SamplingParams, resolve_seed
from flexrun.workload import Workload

Prompt = str | Sequence[int] | Mapping[str, Any]


def as_requests(prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None):
    """Requests, in order, from one prompt or several, in the forms vLLM's ``generate`` takes.

    A prompt is text, a list of token ids, or ``{"prompt": text}`` / ``{"prompt_token_ids": ids}``.
    Raises RequestError where the number of params does not match.
    """
    if isinstance(prompts, (str, Mapping)) or _is_ids(prompts):
        prompts = [prompts]
    return with_params([_as_fields(prompt) for prompt in prompts], params)


def as_chat_requests(messages: Sequence, params: SamplingParams | Sequence[SamplingParams] | None) -> list[Request]:
    """Requests from one conversation or several (a conversation is a list of {"role", "content"} messages)."""
    conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
    return with_params([{"messages": list(conversation)} for conversation in conversations], params)


def with_params(fields: list[dict], params: SamplingParams | Sequence[SamplingParams] | None) -> list[Request]:
    rows = params if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(fields)
    if len(rows) != len(fields):
        raise RequestError(f"{len(rows)} sampling params for {len(fields)} prompts", "give one for all or one for each")
    return [Request(str(number), params=row, **each) for number, (each, row) in enumerate(zip(fields, rows))]


def _is_ids(prompt: object) -> bool:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and all(isinstance(item, int) for item in prompt)


def _as_fields(prompt: Prompt) -> dict:
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt, Mapping):
        unknown = set(prompt) - {"prompt", "prompt_token_ids"}
        if unknown or not prompt:
            raise RequestError(f"prompt with keys {sorted(prompt)}", "use prompt or prompt_token_ids")
        ids = prompt.get("prompt_token_ids")
        return {"prompt": prompt.get("prompt"), "token_ids": None if ids is None else list(ids)}
    if _is_ids(prompt) or prompt == []:  # no ids at all: the request's own error, not the call's
        return {"token_ids": list(prompt)}
    raise RequestError(f"cannot read a prompt of type {type(prompt).__name__}", "give text or a list of token ids")


class Intake:
    """Encodes and checks requests for one model. ``job_seed`` seeds the requests that bring no seed."""

    def __init__(self, files: ModelFiles, job_seed: int):
        self._files = files
        self._job_seed = job_seed

    def encode(self, request: Request) -> list[int]:
        """Token ids of the prompt. Raises RequestError (or TokenizerError) for what cannot be encoded."""
        if request.token_ids is not None:
            ids = list(request.token_ids)
            vocab_size = self._files.spec.vocab_size
            whole = (int, numpy.integer)
            bad = [token for token in ids if not isinstance(token, whole) or not 0 <= token < vocab_size][:1]
            if bad:
                raise RequestError(
                    f"token id {bad[0]!r} is outside the vocabulary of {self._files.spec.vocab_size}",
                    "encode the prompt with this model's tokenizer",
                    "token_out_of_vocabulary",
                )
            return ids
        tokenizer = self._files.tokenizer
        if tokenizer is None:
            raise RequestError(
                f"{self._files.name} has no tokenizer", "give --tokenizer, or prompts as token ids", "no_tokenizer"
            )
        if request.messages is not None:
            return tokenizer.encode_chat(request.messages)
        if request.prompt is None:
            raise RequestError("a request needs a prompt, messages or token ids", "add one of them")
        return tokenizer.encode(request.prompt)

    def max_tokens(self, prompt_tokens: int, params: SamplingParams) -> int:
        """Tokens a sequence may generate: what it asks for, up to the context. Raises RequestError where none."""
        room = self._files.max_model_len - prompt_tokens
        if prompt_tokens < 1:
            raise RequestError("the prompt is empty", "give at least one token", "empty_prompt")
        if room < (1 if params.max_tokens != 0 else -1):  # the last token of what is only scored is not run
            raise RequestError(
                f"the prompt has {prompt_tokens} tokens; with one to generate the limit is {self._files.max_model_len}",
                "shorten the prompt or raise --max-model-len",
                "context_length_exceeded",
            )
        return room if params.max_tokens is None else min(params.max_tokens, max(room, 0))

    def lengths(self, request: Request) -> tuple[list[int] | None, int]:
        """(token ids, longest total) of a request; (None, 0) where it will be refused."""
        try:
            ids = self.encode(request)
            return ids, len(ids) + self.max_tokens(len(ids), request.params or SamplingParams())
        except FlexrunError:
            return None, 0

    def workload(self, requests: list[Request], prefixes: Prefixes | None = None) -> Workload:
        """What the requests ask for, those that will be refused left out. prefixes: those that the requests name."""
        rows, shared = [], []
        for request in requests:
            ids, total = self.lengths(request)
            if ids:
                params = request.params or SamplingParams()
                scored = 0 if params.prompt_logprobs is None else len(ids) - (request.score_start or 1)
                rows += [(len(ids), total - len(ids), scored)] * params.n
                shared += [request.prefix] * params.n
        workload = Workload.of(*zip(*rows)) if rows else Workload.of((), ())
        return workload.sharing(prefixes, shared) if prefixes else workload

    def group(
        self, request: Request, prompt_ids: list[int] | None = None, prefixes: Prefixes | None = None
    ) -> tuple[Group, list[TextInTheMaking]]:
        """A request as its group and those of its n sequences that are to be run.

        prefixes: those that requests name, where they are shared.
        Raises FlexrunError where it cannot be served.
        """
        params = request.params or SamplingParams()
        ids = numpy.array(self.encode(request) if prompt_ids is None else prompt_ids, dtype=numpy.int64)
        vocabulary = range(self._files.spec.vocab_size)
        stops = {*params.stop_token_ids, *(() if params.ignore_eos else self._files.stop_token_ids)}
        stops = {token for token in stops if token in vocabulary}
        if params.min_tokens and len(stops) >= len(vocabulary):
            raise RequestError("stop_token_ids are the whole vocabulary: none is left for min_tokens", "leave one out")
        if params.stop and self._files.tokenizer is None:
            raise RequestError("stop strings need a tokenizer", "use stop_token_ids", "no_tokenizer")
        group = Group(
            request,
            params,
            ids,
            request.prompt,
            frozenset(stops),
            self.max_tokens(len(ids), params),
            unfinished=params.n,
            start_seconds=time.perf_counter(),
        )
        if request.score_start is not None and not 1 <= request.score_start <= len(ids):
            raise RequestError(
                f"score_start={request.score_start} is outside a prompt of {len(ids)} tokens",
                "the first token has nothing before it that could predict it",
            )
        if params.prompt_logprobs is not None:
            group.score_start = request.score_start or 1
        if prefixes and request.prefix != NONE:
            tokens = int(prefixes.depths[request.prefix])
            most = shareable_tokens(len(ids), group.max_tokens, group.score_start)
            if tokens <= most and prefixes.begins(request.prefix, ids):
                group.prefix, group.prefix_tokens = request.prefix, tokens
        seed = resolve_seed(params.seed, self._job_seed, request.request_id)
        sequences = []
        for choice in range(params.n):
            decoder = None
            if self._files.tokenizer is not None:
                decoder = self._files.tokenizer.incremental_decoder(
                    skip_special_tokens=params.skip_special_tokens, prompt_ids=ids[-8:].tolist()
                )
            sequence = TextInTheMaking(group, choice, seed, decoder)
            begun = (request.partial or {}).get(choice, ())
            if any(sequence.append(token, None, None, None) for token in begun):
                continue  # an earlier run ended it
            if not sequence.pending_tokens:  # only scored, and nothing before its only token says how likely that is
                sequence.end()
                continue
            sequences.append(sequence)
        return group, sequences


def check_room(sequence: TextInTheMaking, longest_tokens: int, part_tokens: int) -> None:
    """Raise RequestError for what this run cannot hold. longest_tokens: room of a whole micro-batch of the cache;
    part_tokens: of a pass that runs in parts, else 0."""
    if sequence.group.score_start is not None and part_tokens:
        raise RequestError("prompts are not scored while hidden states wait elsewhere", "set hidden.gpu to 1")
    if sequence.own_kv_tokens > longest_tokens:
        raise RequestError(
            f"the request may take {sequence.own_kv_tokens} tokens of KV cache, this run has room for {longest_tokens}",
            "lower max_tokens, or raise kv_tokens in the policy or --cpu-memory",
            "kv_cache_too_small",
        )


def as_request_error(error: FlexrunError) -> RequestError:
    return error if isinstance(error, RequestError) else RequestError(error.message, error.hint)
