"""Text to token ids and back, and chats to prompts."""

from flexrun.tokenizer.incremental import IncrementalDecoder
from flexrun.tokenizer.tokenizer import Tokenizer

__all__ = ["IncrementalDecoder", "Tokenizer"]
