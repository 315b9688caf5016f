"""How text is cut into words before BPE merges, by the name a GGUF file gives it (tokenizer.ggml.pre).

The expressions are those of the models' own tokenizer.json files, checked against llama.cpp's table. A wrong one
still encodes everything, only into tokens the model has never seen; so an unknown name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from tokenizers import Regex, pre_tokenizers

from flexrun.errors import UnsupportedError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + _TAIL
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
)
_SLASH_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """expressions: applied one after the other, each cutting the pieces of the one before.

    ignore_merges: a whole word that is a token is taken as it is. add_bos: BOS unless the file says otherwise.
    """

    expressions: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_STYLE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_GPT2 = PreTokenizer((r"\p{N}", _GPT2))  # every digit a word of its own
_PLAIN_GPT2 = PreTokenizer((_GPT2,))
_DBRX = PreTokenizer((_LLAMA3,))
_PLAIN_QWEN2 = PreTokenizer((_QWEN2,))
_GPT4O = PreTokenizer((_CASED.replace("{0}", _CONTRACTIONS + "?") + r"\p{N}{1,3}|" + _SLASH_TAIL,))
_TEKKEN = PreTokenizer((_CASED.replace("{0}", "") + r"\p{N}|" + _SLASH_TAIL,), ignore_merges=True, add_bos=True)
_DEFAULT = PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _DEFAULT,
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "pixtral", "falcon3"), _LLAMA3_STYLE),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS_GPT2),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling"), _PLAIN_GPT2),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _DBRX),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _PLAIN_QWEN2),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
    "tekken": _TEKKEN,
}


def find_pre_tokenizer(name: str) -> PreTokenizer:
    """Raises UnsupportedError for an unknown name."""
    found = PRE_TOKENIZERS.get(name)
    if found is None:
        raise UnsupportedError(
            f"GGUF pre-tokenizer {name!r} does not run here",
            "give the directory of the original model's tokenizer.json as the tokenizer",
        )
    return found


def build_pre_tokenizer(row: PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """The cuts of ``row``, then bytes spelled as GPT-2's printable characters."""
    splits = [pre_tokenizers.Split(Regex(expression), behavior="isolated") for expression in row.expressions]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
