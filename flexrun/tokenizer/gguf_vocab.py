"""Builds a tokenizer from the vocabulary inside a GGUF file, which has tokens, merges or scores, but no tokenizer.json.

Two kinds exist: "gpt2" (byte-level BPE with merges) and "llama" (SentencePiece BPE, its merges implied by scores).
"""

from __future__ import annotations

from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, normalizers, processors
from tokenizers.models import BPE

from flexrun.errors import TokenizerError, UnsupportedError
from flexrun.gguf_header import read_gguf_header
from flexrun.tokenizer.files import TokenizerParts
from flexrun.tokenizer.pre_tokenizers import build_pre_tokenizer, find_pre_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # SentencePiece's visible space
# What ends a turn, where a file does not say: counted only if the model's own chat template writes it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_turn|>")


def parts_from_gguf(path: Path) -> TokenizerParts:
    """Raises TokenizerError naming the file and what it lacks, UnsupportedError for a kind that does not run here."""
    vocabulary = _Vocabulary(path)
    if vocabulary.kind == "gpt2":
        backend, add_bos = _byte_level(vocabulary)
    elif vocabulary.kind == "llama":
        backend, add_bos = _sentence_piece(vocabulary), True
    else:
        raise UnsupportedError(
            f"{path}: tokenizer kind {vocabulary.kind!r} does not run here",
            "give the directory of the original model's tokenizer.json as the tokenizer",
        )
    special = vocabulary.special_tokens()
    vocabulary.add_tokens(backend, special)
    bos = special.get("bos_token") if vocabulary.get("add_bos_token", add_bos) else None
    eos = special.get("eos_token") if vocabulary.get("add_eos_token", False) else None
    if bos or eos:
        pieces = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
        ids = [(token, backend.token_to_id(token)) for token in {bos, eos} if token]
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=ids)
    template = vocabulary.metadata.get("tokenizer.chat_template")
    template = template if isinstance(template, str) else None
    return TokenizerParts(backend, special, vocabulary.stop_ids(template), template)


class _Vocabulary:
    """The tokenizer's part of the metadata, checked."""

    def __init__(self, path: Path):
        self.path = path
        self.metadata = read_gguf_header(path).metadata
        self.arch = str(self.metadata.get("general.architecture", ""))
        self.kind = self.get("model")
        self.tokens: list[str] = self._list("tokens", str, None)
        if self.kind is None or not self.tokens:
            raise TokenizerError(f"{path} holds no tokenizer", "give the directory of one as the tokenizer")
        if len(set(self.tokens)) != len(self.tokens):
            raise TokenizerError(f"{path}: a token appears twice in tokenizer.ggml.tokens")
        self.types: list[int] = self._list("token_type", int, len(self.tokens)) or [NORMAL] * len(self.tokens)

    def get(self, name: str, default=None):
        return self.metadata.get(f"tokenizer.ggml.{name}", default)

    def _list(self, name: str, element: type | tuple, length: int | None) -> list:
        values = self.get(name, [])
        good = isinstance(values, list) and all(isinstance(value, element) for value in values)
        if not good or (values and length is not None and len(values) != length):
            raise TokenizerError(f"{self.path}: tokenizer.ggml.{name} is damaged or of the wrong length")
        return values

    def merges(self) -> list[tuple[str, str]]:
        pairs = []
        for merge in self._list("merges", str, None):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise TokenizerError(f"{self.path}: tokenizer.ggml.merges holds {merge!r}, which is no pair")
            pairs.append((merge[:cut], merge[cut + 1 :]))
        if not pairs:
            raise TokenizerError(f"{self.path}: tokenizer.ggml.merges is missing or empty")
        return pairs

    def scores(self) -> list[float]:
        scores = self._list("scores", (int, float), len(self.tokens))
        if not scores:
            raise TokenizerError(f"{self.path}: tokenizer.ggml.scores is missing or empty")
        return scores

    def special_tokens(self) -> dict[str, str]:
        """Token text by name. SentencePiece files that say nothing mean 1, 2 and 0."""
        usual = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        names = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        special = {}
        for key, name in names.items():
            token_id = self.get(f"{key}_token_id", usual.get(key))
            if token_id is None:
                continue
            if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
                raise TokenizerError(f"{self.path}: tokenizer.ggml.{key}_token_id={token_id!r} is no token")
            special[name] = self.tokens[token_id]
        return special

    def add_tokens(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> None:
        """Control tokens (hidden from text) and user-defined ones (visible) are never cut into pieces."""
        # Phi-3 was trained with the white space after its markers removed; the file cannot say so.
        strips = self.arch == "phi3" and self.kind == "llama"
        ends = set(special.values())
        known = backend.get_vocab(with_added_tokens=False)
        control, plain = [], []
        for token, kind in zip(self.tokens, self.types):
            if token not in known:  # respelled, see _sentence_piece
                continue
            if kind == CONTROL or token in ends:
                strip = strips and token not in ends
                control.append(AddedToken(token, normalized=False, special=True, rstrip=strip))
            elif kind == USER_DEFINED:
                plain.append(AddedToken(token, normalized=False, special=False))
        backend.add_special_tokens(control)
        backend.add_tokens(plain)

    def stop_ids(self, template: str | None) -> list[int]:
        ids = [self.get(f"{name}_token_id") for name in ("eos", "eot", "eom")]
        if ids[0] is None and self.kind == "llama":
            ids[0] = 2
        ends = [token for token in TURN_ENDS if template and token in template]
        position = {token: token_id for token_id, token in enumerate(self.tokens)} if ends else {}
        ids += [position[token] for token in ends if token in position]
        return [token_id for token_id in dict.fromkeys(ids) if isinstance(token_id, int)]


def _byte_level(vocabulary: _Vocabulary) -> tuple[tokenizers.Tokenizer, bool]:
    """The backend, and whether it starts texts with BOS unless the file says otherwise."""
    row = find_pre_tokenizer(str(vocabulary.get("pre", "default")))
    ids = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    backend = tokenizers.Tokenizer(_bpe(vocabulary, ids, vocabulary.merges(), ignore_merges=row.ignore_merges))
    backend.pre_tokenizer = build_pre_tokenizer(row)
    backend.decoder = decoders.ByteLevel()
    return backend, row.add_bos


def _sentence_piece(vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    gemma = vocabulary.arch.startswith("gemma")
    # Gemma files store runs of spaces as they are; BPE sees them with spaces made visible.
    tokens = [SPACE * len(token) if gemma and token and not token.strip(" ") else token for token in vocabulary.tokens]
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    # Gemma's scores do not follow the order of its merges, the order of its tokens does.
    ranks = [-token_id for token_id in range(len(tokens))] if gemma else vocabulary.scores()
    unknown = vocabulary.special_tokens().get("unk_token")
    merges = _implied_merges(tokens, vocabulary.types, ranks, ids)
    backend = tokenizers.Tokenizer(_bpe(vocabulary, ids, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown))
    prefix = bool(vocabulary.get("add_space_prefix", True))
    visible = [normalizers.Replace(" ", SPACE)]
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), *visible] if prefix else visible)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _implied_merges(
    tokens: list[str], types: list[int], ranks: list[float], ids: dict[str, int]
) -> list[tuple[str, str]]:
    """Every way to cut a token into two tokens, best token first: what SentencePiece does by score, as BPE merges."""
    found = []
    for token, kind, rank in zip(tokens, types, ranks):
        if kind in (CONTROL, BYTE, UNKNOWN, UNUSED):
            continue
        for cut in range(1, len(token)):
            left, right = ids.get(token[:cut]), ids.get(token[cut:])
            if left is not None and right is not None:
                found.append((-rank, cut, left, right))
    return [(tokens[left], tokens[right]) for *_, left, right in sorted(found)]


def _bpe(vocabulary: _Vocabulary, ids: dict[str, int], merges: list[tuple[str, str]], **options) -> BPE:
    try:
        return BPE(ids, merges, **options)
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{vocabulary.path}: the vocabulary and its merges do not fit: {error}") from error
