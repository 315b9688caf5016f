"""Reads a model directory's tokenizer files into one plain record, whichever way they were written."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from flexrun.errors import TokenizerError

SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


@dataclass
class TokenizerParts:
    """What every source of a tokenizer yields.

    backend: encodes and decodes. special: token text by name ("bos_token": "<s>"), as chat templates see it.
    stop_token_ids: ids that end a turn, the end-of-text token first.
    """

    backend: tokenizers.Tokenizer
    special: dict[str, str] = field(default_factory=dict)
    stop_token_ids: list[int] = field(default_factory=list)
    chat_template: str | None = None


def parts_from_directory(path: Path) -> TokenizerParts:
    """From tokenizer.json, or GPT-2's vocab.json and merges.txt, and the files beside them.

    Raises TokenizerError naming the file that is missing or damaged.
    """
    config = _read_json(path / "tokenizer_config.json")
    special = _special_tokens(config, _read_json(path / "special_tokens_map.json"))
    if (path / "tokenizer.json").exists():
        backend = _from_tokenizer_json(path / "tokenizer.json")
    elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
        backend = _from_vocab_and_merges(path, config)
        special = {**dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"), **special}
        special = {name: token for name, token in special.items() if backend.token_to_id(token) is not None}
        _prepend_bos(backend, config, special)
    else:
        hint = "flexrun reads tokenizer.json, vocab.json with merges.txt, or the tokenizer inside a .gguf file"
        if (path / "tokenizer.model").exists():
            hint += "; convert tokenizer.model with transformers' AutoTokenizer(...).save_pretrained"
        raise TokenizerError(f"{path} has no tokenizer files that flexrun reads", hint)
    _add_missing(backend, config, special)
    backend.no_truncation()
    backend.no_padding()
    return TokenizerParts(backend, special, _stop_ids(path, backend, special), _chat_template(path, config))


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{path}: cannot be read as JSON: {error}", "download the file again") from error
    if not isinstance(values, dict):
        raise TokenizerError(f"{path}: expected a JSON object", "download the file again")
    return values


def _from_tokenizer_json(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{path}: {error}", "download the file again") from error


def _from_vocab_and_merges(path: Path, config: dict) -> tokenizers.Tokenizer:
    try:
        vocabulary, merges = BPE.read_file(str(path / "vocab.json"), str(path / "merges.txt"))
        backend = tokenizers.Tokenizer(BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix=""))
    except Exception as error:
        raise TokenizerError(f"{path}: vocab.json or merges.txt: {error}", "download both files again") from error
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _prepend_bos(backend: tokenizers.Tokenizer, config: dict, special: dict[str, str]) -> None:
    """BOS and EOS as tokenizer_config.json says (tokenizer.json has its own post-processor, which counts there)."""
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    pieces = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    known = [(token, backend.token_to_id(token)) for token in {bos, eos} if token]
    if known and all(token_id is not None for _, token_id in known):
        backend.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=known)


def _special_tokens(config: dict, special_map: dict) -> dict[str, str]:
    special = {}
    for name in SPECIAL_NAMES:
        value = config.get(name) or special_map.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            special[name] = value
    return special


def _add_missing(backend: tokenizers.Tokenizer, config: dict, special: dict[str, str]) -> None:
    """Tokens that tokenizer_config.json declares beside the vocabulary, in the order of their ids."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder")
    declared = declared if isinstance(declared, dict) else {}
    by_id = {int(token_id): entry for token_id, entry in declared.items() if token_id.isdecimal()}
    for _, entry in sorted(by_id.items()):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str) or entry["content"] in known:
            continue
        known.add(entry["content"])
        flags = {name: bool(entry.get(name, False)) for name in ("single_word", "lstrip", "rstrip", "special")}
        flags["normalized"] = bool(entry.get("normalized", not flags["special"]))
        backend.add_tokens([AddedToken(entry["content"], **flags)])
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special.values() if token not in known]
    )


def _stop_ids(path: Path, backend: tokenizers.Tokenizer, special: dict[str, str]) -> list[int]:
    """The end-of-text token, then those that generation_config.json and config.json name."""
    ids = [backend.token_to_id(special["eos_token"])] if "eos_token" in special else []
    for name in ("generation_config.json", "config.json"):
        value = _read_json(path / name).get("eos_token_id")
        ids += value if isinstance(value, list) else [value]
        if value is not None and name == "generation_config.json":
            break
    return [token_id for token_id in dict.fromkeys(ids) if isinstance(token_id, int)]


def _chat_template(path: Path, config: dict) -> str | None:
    """chat_template.jinja, else tokenizer_config.json's: one text, or named ones, of which "default" counts."""
    if (path / "chat_template.jinja").exists():
        try:
            return (path / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise TokenizerError(f"{path / 'chat_template.jinja'}: {error}") from error
    template = config.get("chat_template") or _read_json(path / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
