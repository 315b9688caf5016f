"""Turns token ids into text as they arrive: stop strings and streaming need text before a sequence ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not (yet) a character
LONGEST_WAIT_TOKENS = 32  # a character is 4 bytes at most; past this the bytes are simply not UTF-8


class IncrementalDecoder:
    """Text of one sequence, fed one token id at a time; constant work a token.

    Only a window is ever decoded: the tokens of the last emitted piece (context, since the way a token is written may
    depend on its left neighbour) and those not yet emitted. A piece is held back while it ends in an unfinished
    UTF-8 character. After ``finish()``, ``text`` equals decoding all ids at once, save that invalid bytes in a
    SentencePiece vocabulary do not spoil the good ones before them.

    decode: ids -> text, special tokens included.
    is_hidden: ids that leave no trace in the text (special tokens, ids without a token).
    prompt_ids: the ids this sequence continues, so that a leading space survives in SentencePiece vocabularies.
    """

    __slots__ = ("_context", "_context_text", "_decode", "_is_hidden", "_pending", "text")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        is_hidden: Callable[[int], bool] = lambda token_id: False,
        prompt_ids: Sequence[int] = (),
    ):
        self._decode = decode
        self._is_hidden = is_hidden
        tail = [token_id for token_id in prompt_ids[-8:] if not is_hidden(token_id)]
        self._context: list[int] = tail
        self._context_text = decode(tail) if tail else ""
        self._pending: list[int] = []
        self.text = ""

    def feed(self, token_id: int) -> str:
        """Add one token; the text that became final with it, often a word, perhaps empty."""
        if self._is_hidden(token_id):
            return ""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        waits = text.endswith(REPLACEMENT) or len(text) <= len(self._context_text)
        if waits and len(self._pending) < LONGEST_WAIT_TOKENS:
            return ""
        return self._emit(text)

    def finish(self) -> str:
        """The text still held back; call once, when no more tokens follow."""
        return self._emit(self._decode(self._context + self._pending)) if self._pending else ""

    def _emit(self, text: str) -> str:
        piece = text[len(self._context_text) :]
        self._context, self._pending = self._pending, []
        self._context_text = self._decode(self._context)
        self.text += piece
        return piece
