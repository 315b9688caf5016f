"""The one tokenizer face: text to ids and back, chats to prompts, whatever file the vocabulary came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from flexrun.errors import TokenizerError
from flexrun.tokenizer.chat import render_chat
from flexrun.tokenizer.files import TokenizerParts, parts_from_directory
from flexrun.tokenizer.gguf_vocab import parts_from_gguf
from flexrun.tokenizer.incremental import IncrementalDecoder


class Tokenizer:
    """Wraps a ``tokenizers`` backend. Build it with ``from_path``.

    eos_token_id, bos_token_id: None where the model has none. stop_token_ids: every id that ends a sequence.
    chat_template: jinja2 source, None where the model has none. vocab_size: ids are below it. longest_token: characters
    of it, as the vocabulary spells it.
    """

    def __init__(self, parts: TokenizerParts):
        self._backend = parts.backend
        self._special = parts.special
        self.chat_template = parts.chat_template
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")
        if self.eos_token_id is None and parts.stop_token_ids:
            self.eos_token_id = parts.stop_token_ids[0]
        self.stop_token_ids = tuple(parts.stop_token_ids)
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        self.longest_token = max(map(len, vocabulary), default=0)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    @classmethod
    def from_path(cls, path: str | Path, *, chat_template: str | None = None) -> Tokenizer:
        """From a directory with tokenizer.json (or vocab.json and merges.txt), or from a .gguf file.

        ``chat_template`` replaces the model's own. Raises TokenizerError naming the file at fault.
        """
        path = Path(path)
        if not path.exists():
            raise TokenizerError(f"{path} does not exist", "give a model directory or a .gguf file")
        if path.is_dir():
            found = sorted(path.glob("*.gguf"))
            has_files = any((path / name).exists() for name in ("tokenizer.json", "vocab.json"))
            parts = parts_from_gguf(found[0]) if len(found) == 1 and not has_files else parts_from_directory(path)
        elif path.suffix == ".gguf":
            parts = parts_from_gguf(path)
        else:
            raise TokenizerError(f"{path}: not a .gguf file", "give a model directory or a .gguf file")
        if chat_template is not None:
            parts.chat_template = chat_template
        return cls(parts)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; with ``add_special_tokens``, the BOS (and EOS) the model is used to.

        Raises TokenizerError for what is not Unicode text (half of a surrogate pair, say).
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            raise TokenizerError(f"not valid Unicode text: {text!r:.80}", "send the prompt as UTF-8 text") from error

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """``encode`` of many texts at once, on all cores. One bad text fails the batch; TokenizerError shows it."""
        try:
            encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except TypeError:
            return [self.encode(text, add_special_tokens) for text in texts]  # raises at the bad one
        return [encoding.ids for encoding in encoded]

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``token_ids``; ids without a token leave no trace."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def incremental_decoder(
        self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDecoder:
        """A decoder for one sequence that continues ``prompt_ids``."""
        return IncrementalDecoder(
            lambda token_ids: self._backend.decode(token_ids, skip_special_tokens=False),
            lambda token_id: self._is_hidden(token_id, skip_special_tokens),
            prompt_ids,
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The prompt text of a chat; ``variables`` reach the template (for example ``enable_thinking=False``).

        Raises TokenizerError when the model has no template or the template refuses the messages.
        """
        if self.chat_template is None:
            raise TokenizerError(
                "this model has no chat template, so it cannot be given messages",
                "send plain prompts, or pass a chat template",
            )
        return render_chat(self.chat_template, messages, add_generation_prompt, {**self._special, **variables})

    def encode_chat(self, messages: Sequence[Mapping], **variables: object) -> list[int]:
        """Token ids of a chat, ready for the answer. The template writes the special tokens; none are added."""
        return self.encode(self.apply_chat_template(messages, **variables), add_special_tokens=False)

    def _id_of(self, name: str) -> int | None:
        return self._backend.token_to_id(self._special[name]) if name in self._special else None

    def _is_hidden(self, token_id: int, skip_special_tokens: bool) -> bool:
        if skip_special_tokens and token_id in self._special_ids:
            return True
        return token_id >= self.vocab_size or self._backend.id_to_token(token_id) is None
