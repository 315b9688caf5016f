"""One text in the making: its tokens, its place in the KV cache, and when it ends."""

from __future__ import annotations

from array import array
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Protocol

import numpy

from flexrun.errors import RequestError
from flexrun.offload.kv_store import Region
from flexrun.offload.prefix_cache import Chain
from flexrun.outputs import CompletionOutput, Logprob, Request, RequestOutput
from flexrun.prefixes import NONE
from flexrun.sampling import SamplerRow, SamplingParams, TokenLogprob, UnusableLogits


class TextDecoder(Protocol):
    """What the engine needs of a tokenizer's incremental decoder; see tokenizer.IncrementalDecoder."""

    text: str

    def feed(self, token_id: int) -> str: ...

    def finish(self) -> str: ...


@dataclass(eq=False, slots=True)
class Group:
    """One request in flight: its n sequences, and those that are done. ``stop_ids`` end a sequence.

    prefix: which of the job's shared prefixes the prompt begins with (NONE: none), and its tokens.

    max_tokens: 0 where the prompt is only scored. score_start: the first prompt position whose token is scored, by the
    row before it; None: none is. prompt_logprobs: of the positions from there on, as they come. error: why the request
    fails, whatever becomes of its other sequences.
    """

    request: Request
    params: SamplingParams
    prompt_ids: numpy.ndarray  # int64
    prompt_text: str | None
    stop_ids: frozenset[int]
    max_tokens: int
    unfinished: int = 0
    done: list[CompletionOutput] = field(default_factory=list)
    start_seconds: float = 0.0
    first_token_seconds: float = 0.0
    score_start: int | None = None
    prompt_logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    prefix: int = NONE
    prefix_tokens: int = 0
    error: RequestError | None = None

    def refuse(self, error: UnusableLogits) -> None:
        self.error = RequestError(error.reason, error.hint, "unusable_logits")

    def output(self, now_seconds: float) -> RequestOutput:
        if self.error is not None:
            return RequestOutput.refused(self.request, self.error)
        metrics = {
            "time_to_first_token_seconds": self.first_token_seconds - self.start_seconds,
            "seconds": now_seconds - self.start_seconds,
        }
        outputs = sorted(self.done, key=lambda completion: completion.index)
        scored = None if self.score_start is None else [*[None] * self.score_start, *self.prompt_logprobs]
        return RequestOutput(
            self.request.request_id,
            self.prompt_text,
            self.prompt_ids.tolist(),
            outputs,
            metrics=metrics,
            prompt_logprobs=scored,
        )


class Sequence:
    """One choice of a request.

    cached_tokens: how many of prompt + output are in the KV cache. A sequence prefills until only its
    newest token is not cached, then decodes one token a pass. The last token of a prompt that is only
    scored is not run: nothing is asked of what follows it.
    start_tokens: what counts as cached before it is first run, a shared prefix of its prompt; ``chain`` has the parts
    of it, once there is room. room_tokens: of the cache, with its prefix, as long as it has a region; was_paused: it
    had too little once. failed: it ended without a token of its last pass, see ``fail``.
    """

    __slots__ = (
        "_decoder",
        "_held",
        "cached_tokens",
        "chain",
        "failed",
        "group",
        "logprobs",
        "output_ids",
        "region",
        "room_tokens",
        "row",
        "start_tokens",
        "total_logprob",
        "was_paused",
    )

    def __init__(self, group: Group, choice_index: int, seed: int, decoder: TextDecoder | None):
        self.group = group
        self.start_tokens = self.cached_tokens = group.prefix_tokens
        self.chain: Chain = ()
        self.room_tokens, self.was_paused, self.failed = 0, False, False
        self.region: Region | None = None
        self.output_ids = array("q")
        self.logprobs: list[dict[int, Logprob]] | None = [] if group.params.logprobs is not None else None
        self.total_logprob = 0.0
        self._decoder = decoder
        self._held = max((len(stop) for stop in group.params.stop), default=0)
        self.row = SamplerRow(
            group.params, seed, choice_index, 0, group.prompt_ids, self.output_ids, sorted(group.stop_ids)
        )

    @property
    def kv_tokens(self) -> int:
        """Tokens in the cache at most: its last one is never attended to."""
        return len(self.group.prompt_ids) + self.group.max_tokens - 1

    @property
    def own_kv_tokens(self) -> int:
        """Cache room it needs at most, beside that of its prefix."""
        return self.kv_tokens - self.group.prefix_tokens

    @property
    def own_cached_tokens(self) -> int:
        return self.cached_tokens - self.group.prefix_tokens

    @property
    def known_tokens(self) -> int:
        return len(self.group.prompt_ids) + len(self.output_ids)

    @property
    def pending_tokens(self) -> int:
        """Tokens known, to be run, and not cached: 1 while decoding."""
        return self.known_tokens - self.cached_tokens - (not self.group.max_tokens)

    def tokens(self, count: int) -> SequenceOf[int]:
        """The next ``count`` tokens to run."""
        place = self.cached_tokens - len(self.group.prompt_ids)
        if place >= 0:
            return self.output_ids[place : place + count]
        prompt = self.group.prompt_ids[self.cached_tokens : self.cached_tokens + count]
        if len(prompt) == count:
            return prompt
        return [*prompt, *self.output_ids[: count - len(prompt)]]

    def scored(self, count: int) -> range:
        """Of the next ``count`` tokens, the prompt positions whose rows score the tokens after them."""
        start, group = self.cached_tokens, self.group
        if group.score_start is None or self.row.choice_index:
            return range(0)
        return range(max(start, group.score_start - 1), min(start + count, len(group.prompt_ids) - 1))

    def certainly_ends(self) -> bool:
        """Whether the next token is the last, whatever it is."""
        return len(self.output_ids) + 1 >= self.group.max_tokens

    def append(self, token_id: int, chosen: TokenLogprob | None, top: list[TokenLogprob] | None, name_of) -> bool:
        """Take the newly sampled token; True where the sequence ended, its completion added to the group.

        name_of: token id -> text, for reported log-probabilities (None without a tokenizer).
        """
        params = self.group.params
        self.output_ids.append(token_id)
        self.row.step += 1
        if chosen is not None:
            self.total_logprob += chosen.logprob
            self.logprobs.append(_reported(chosen, top, name_of))
        if token_id in self.group.stop_ids and len(self.output_ids) > params.min_tokens:
            if self._decoder is not None:
                if not params.skip_special_tokens:
                    self._decoder.feed(token_id)
                self._decoder.finish()
            self._finish("stop", token_id if token_id in params.stop_token_ids else None)
            return True
        if self._decoder is not None:
            piece = self._decoder.feed(token_id)
            if piece and params.stop and len(self.output_ids) >= params.min_tokens and self._find_stop(len(piece)):
                return True
        if len(self.output_ids) >= self.group.max_tokens:
            if self._decoder is not None:
                piece = self._decoder.finish()
                if piece and params.stop and self._find_stop(len(piece)):
                    return True
            self._finish("length", None)
            return True
        return False

    def score(self, chosen: TokenLogprob, top: list[TokenLogprob], name_of) -> None:
        """Take the log-probability of the next prompt token that is scored. Arguments as for ``append``."""
        self.group.prompt_logprobs.append(_reported(chosen, top, name_of))

    def end(self) -> None:
        """Of a prompt that is only scored: all of it is."""
        self._finish("length", None)

    def fail(self, error: UnusableLogits) -> None:
        """End here, and the request with this error."""
        self.failed = True
        self.group.refuse(error)
        self.group.unfinished -= 1

    def _find_stop(self, new_characters: int) -> bool:
        """End at the earliest stop string that the newest characters completed."""
        params, text = self.group.params, self._decoder.text
        start = max(len(text) - new_characters - self._held + 1, 0)
        found = [(place, stop) for stop in params.stop if (place := text.find(stop, start)) >= 0]
        if not found:
            return False
        place, stop = min(found)
        end = place + len(stop) if params.include_stop_str_in_output else place
        self._finish("stop", stop, text=text[:end])
        return True

    def _finish(self, reason: str, stop_reason: str | int | None, text: str | None = None) -> None:
        if text is None:
            text = "" if self._decoder is None else self._decoder.text
        self.group.done.append(
            CompletionOutput(
                self.row.choice_index,
                text,
                self.output_ids.tolist(),
                self.total_logprob if self.logprobs is not None else None,
                self.logprobs,
                reason,
                stop_reason,
            )
        )
        self.group.unfinished -= 1


def _reported(chosen: TokenLogprob, top: list[TokenLogprob], name_of) -> dict[int, Logprob]:
    return {
        entry.token_id: Logprob(entry.logprob, entry.rank, name_of(entry.token_id) if name_of else None)
        for entry in [*top, chosen]
    }
