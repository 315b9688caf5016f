"""What a request may ask of the sampler, checked once, before any weight is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flexrun.core import nearest_name
from flexrun.errors import RequestError, UnsupportedError

GREEDY_BELOW = 1e-5  # temperatures under this are greedy
MOST_CHOICES = 1 << 14  # of one prompt: each is a sequence of its own in every plan
MOST_WHOLE = (1 << 63) - 1  # what an int64 holds

# Options of the same vocabulary that would change the tokens and that flexrun does not run.
UNSUPPORTED_OPTIONS = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "best_of",
        "guided_choice",
        "guided_grammar",
        "guided_json",
        "guided_regex",
        "length_penalty",
        "logit_bias",
        "logits_processors",
        "response_format",
        "structured_outputs",
        "use_beam_search",
    }
)


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled and when it stops; names, defaults and meanings are vLLM's.

    n: choices generated from the prompt, at most MOST_CHOICES; more than one needs a temperature above 0.
    temperature: divides the logits; below 1e-5 the highest logit wins (greedy).
    top_k: keep the k likeliest tokens; 0 or -1 keeps all.
    top_p: keep the likeliest tokens until their probability reaches top_p, in (0, 1].
    min_p: keep tokens at least min_p times as likely as the likeliest, in [0, 1].
    max_tokens: most tokens to generate; None means up to the model's context.
    min_tokens: end-of-sequence and stop tokens are impossible before this many tokens.
    stop: strings that end the text (one string or several; kept as a tuple).
    stop_token_ids: tokens that end the text, beside the model's own end of sequence.
    ignore_eos: go on past the model's end-of-sequence token.
    seed: makes the draw repeatable by itself; None (or -1) derives one from the job's seed.
    logprobs: number of likeliest alternatives reported a token; 0 reports the chosen token only.
    prompt_logprobs: the same for every prompt token but the first; a prompt with max_tokens=0 is only scored.
    repetition_penalty: divides positive, multiplies negative logits of tokens in the prompt or output.
    presence_penalty, frequency_penalty: subtracted once, or once an occurrence, for tokens in the output.
    skip_special_tokens, include_stop_str_in_output: how the text is written out.

    Raises RequestError that names the field, UnsupportedError for what this version does not run.
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False

    def __post_init__(self):
        self._check_whole("n", 1, MOST_CHOICES)
        self._check_number("temperature", 0.0, 1e6, hint="0 is greedy; 1 samples the model's own distribution")
        self._check_whole("top_k", -1, hint="use a count of tokens, or 0 or -1 to keep every token")
        self._check_number("top_p", 0.0, 1.0, above_lowest=True, hint="1.0 keeps every token")
        self._check_number("min_p", 0.0, 1.0, hint="0.0 keeps every token")
        if self.max_tokens is not None:
            scored = self.prompt_logprobs is not None
            hint = "leave it null to generate up to the model's context; 0 needs prompt_logprobs"
            self._check_whole("max_tokens", 0 if scored else 1, hint=hint)
        self._check_whole("min_tokens", 0)
        self._check_number("repetition_penalty", 1e-6, 1e6, hint="1.0 means no penalty")
        self._check_number("presence_penalty", -2.0, 2.0)
        self._check_number("frequency_penalty", -2.0, 2.0)
        for name in ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output"):
            if not isinstance(getattr(self, name), bool):
                raise self._refusal(name, "must be true or false")
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                self._check_whole(name, 0, hint="give the number of alternatives; 0 reports the token itself only")
        self._settle_seed()
        self._settle_stops()
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise self._refusal("min_tokens", f"is more than max_tokens={self.max_tokens}", "raise max_tokens")
        if self.n > 1 and self.max_tokens == 0:
            raise self._refusal("n", "with max_tokens=0 has nothing to choose", "leave n at 1")
        if self.n > 1 and self.greedy:
            raise self._refusal(
                "n", "with greedy sampling would repeat one text", "set a temperature above 0, or leave n at 1"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @classmethod
    def from_dict(cls, values: Mapping, where: str, defaults: SamplingParams | None = None) -> SamplingParams:
        """Build from JSON ``values`` over ``defaults``; ``where`` names the source in errors ("line 3").

        A null keeps the default, except in ``max_tokens``, ``seed`` and the log-probabilities, where null is a value.
        Raises RequestError for an unknown key (with the nearest name) or a bad value, UnsupportedError for
        options that flexrun does not run.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        nullable = {"max_tokens", "seed", "logprobs", "prompt_logprobs"}
        changes = {}
        for key, value in values.items():
            if key in UNSUPPORTED_OPTIONS:
                raise UnsupportedError(f"{where}: {key} is not run by flexrun", f"leave {key} out")
            if key not in names:
                raise RequestError(f"{where}: unknown sampling option {key!r}", nearest_name(str(key), names))
            if value is not None or key in nullable:
                changes[key] = value
        try:
            return dataclasses.replace(defaults or cls(), **changes)
        except RequestError as error:
            raise RequestError(f"{where}: {error.message}", error.hint, error.code) from None
        except UnsupportedError as error:
            raise UnsupportedError(f"{where}: {error.message}", error.hint) from None

    def _settle_seed(self):
        if self.seed is None:
            return
        if not _is_whole(self.seed) or not -(2**63) <= self.seed < 2**64:
            raise self._refusal("seed", "must be a whole number of at most 64 bits")
        if self.seed == -1:
            object.__setattr__(self, "seed", None)

    def _settle_stops(self):
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        stop = () if stop is None else stop
        if not _is_list(stop) or not all(isinstance(text, str) for text in stop):
            raise self._refusal("stop", "must be a string or a list of strings")
        if "" in stop:
            raise self._refusal("stop", "contains an empty string, which would end every text at once", "remove it")
        object.__setattr__(self, "stop", tuple(stop))
        token_ids = () if self.stop_token_ids is None else self.stop_token_ids
        if not _is_list(token_ids) or not all(_is_whole(token) and 0 <= token <= MOST_WHOLE for token in token_ids):
            raise self._refusal("stop_token_ids", "must be a list of token ids (whole numbers from 0)")
        object.__setattr__(self, "stop_token_ids", tuple(token_ids))

    def _check_whole(self, name: str, lowest: int, highest: int = MOST_WHOLE, hint: str | None = None):
        value = getattr(self, name)
        if not _is_whole(value) or not lowest <= value <= highest:
            end = f", and at most {highest}" if _is_whole(value) and value > highest else ""
            raise self._refusal(name, f"must be a whole number of at least {lowest}{end}", hint)

    def _check_number(self, name: str, lowest: float, highest: float, above_lowest=False, hint: str | None = None):
        value = getattr(self, name)
        fits = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and (lowest < value if above_lowest else lowest <= value)
            and value <= highest
        )
        if not fits:
            start = f"above {lowest:g}" if above_lowest else f"from {lowest:g}"
            raise self._refusal(name, f"must be a number {start} to {highest:g}", hint)

    def _refusal(self, name: str, complaint: str, hint: str | None = None) -> RequestError:
        shown = f"{name}={getattr(self, name)!r:.80}"
        return RequestError(f"{shown} {complaint}", hint or f"see {name} in SamplingParams")


def _is_whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list(value) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
