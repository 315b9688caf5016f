"""Turns checked lines into token ids, many at a time, so that lengths are known before any weight is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from flexrun.errors import FlexrunError, RequestError
from flexrun.jobs.jsonl import PromptLine

FEWEST_TOKENS_SHARE = 0.25  # of those that a text has at least: normalisation may have made it shorter first


class PromptEncoder:
    """What validation needs of a model.

    tokenizer: a flexrun Tokenizer, or None where the model has none (then only token-id prompts are served).
    vocab_size: token ids must be below it. max_model_len: most tokens of prompt and answer together.
    """

    def __init__(self, tokenizer, vocab_size: int, max_model_len: int):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.max_model_len = max_model_len
        longest_token = 0 if tokenizer is None else tokenizer.longest_token
        self._most_characters = int(max_model_len * longest_token / FEWEST_TOKENS_SHARE)

    def encode(self, prompts: Sequence[PromptLine]) -> list[list[int] | RequestError]:
        """Token ids of each prompt, or the RequestError that refuses it; never raises one."""
        results: list[list[int] | RequestError] = [[] for _ in prompts]
        plain: dict[int, str] = {}  # position in prompts -> text
        rendered: dict[int, str] = {}  # the same for chats, whose template writes the special tokens itself
        for position, prompt in enumerate(prompts):
            if prompt.token_ids is not None:
                results[position] = prompt.token_ids
            elif self.tokenizer is None:
                results[position] = RequestError(
                    "the model has no tokenizer", "give prompt_token_ids, or name one with --tokenizer", "no_tokenizer"
                )
            elif prompt.prompt is not None:
                plain[position] = prompt.prompt
            else:
                try:
                    rendered[position] = self.tokenizer.apply_chat_template(prompt.messages)
                except FlexrunError as error:
                    results[position] = RequestError(error.message, error.hint, "chat_template")
        self._tokenise(plain, True, results)
        self._tokenise(rendered, False, results)
        return [result if isinstance(result, RequestError) else self._check(result) for result in results]

    def _tokenise(self, texts: dict[int, str], add_special_tokens: bool, results: list) -> None:
        """What is far too long is refused as it is: tokens take a hundred times the memory of their text."""
        for position in [position for position, text in texts.items() if len(text) > self._most_characters]:
            results[position] = self._too_long(f"{len(texts.pop(position)):,} characters")
        if not texts:
            return
        try:
            encoded = self.tokenizer.encode_batch(list(texts.values()), add_special_tokens=add_special_tokens)
        except FlexrunError as error:
            if len(texts) == 1:
                (position,) = texts
                results[position] = RequestError(error.message, error.hint, "tokenizer")
                return
            for position, text in texts.items():  # one bad text fails the batch: find it
                self._tokenise({position: text}, add_special_tokens, results)
            return
        for position, token_ids in zip(texts, encoded):
            results[position] = token_ids

    def _check(self, token_ids: list[int]) -> list[int] | RequestError:
        if not token_ids:
            return RequestError("the prompt has no tokens", code="empty_prompt")
        if len(token_ids) >= self.max_model_len:
            return self._too_long(f"{len(token_ids)} tokens")
        lowest, highest = min(token_ids), max(token_ids)
        if lowest < 0 or highest >= self.vocab_size:
            outside = lowest if lowest < 0 else highest
            return RequestError(
                f"token id {outside} is outside the vocabulary of {self.vocab_size}", code="invalid_token_id"
            )
        return token_ids

    def _too_long(self, length: str) -> RequestError:
        return RequestError(
            f"the prompt has {length} and leaves no room for an answer in a context of {self.max_model_len}",
            "shorten it, or raise --max-model-len where the model allows",
            "context_length_exceeded",
        )
