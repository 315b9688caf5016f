"""What is known of a model before a weight is read: its spec, tokenizer, limits and checkpoint headers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

from flexrun.errors import ConfigError, TokenizerError, UnsupportedError
from flexrun.models.families import SUPPORTED_ARCHITECTURES, spec_from_config
from flexrun.models.spec import ModelSpec
from flexrun.tokenizer import Tokenizer
from flexrun.weights.catalog import resolve_model
from flexrun.weights.checkpoint import CheckpointReader
from flexrun.weights.readers import open_checkpoint

GGUF_DTYPE = "bfloat16"  # what quantised tensors are computed in; a GGUF file names no dtype of its own


@dataclass(frozen=True)
class ModelFiles:
    """An opened checkpoint. ``tokenizer`` is None where the checkpoint has none: token ids still run.

    max_model_len: most tokens (prompt and output) of one sequence. stop_token_ids end a text unless ignore_eos.
    """

    name: str
    path: Path
    reader: CheckpointReader
    spec: ModelSpec
    tokenizer: Tokenizer | None
    max_model_len: int
    stop_token_ids: frozenset[int]

    def close(self) -> None:
        self.reader.close()


def open_model(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    cache_dir: str | Path | None = None,
    chat_template: str | None = None,
) -> ModelFiles:
    """Open a model by path or catalog name; reads headers only.

    Raises CheckpointError, UnsupportedError (also for a model that can only be planned), TokenizerError or ConfigError,
    each naming its remedy.
    """
    path = resolve_model(str(model), cache_dir)
    reader = open_checkpoint(path)
    if dtype == "auto" and not {"dtype", "torch_dtype"} & set(reader.config):
        dtype = GGUF_DTYPE
    spec = spec_from_config(reader.config, dtype)
    if spec.unrunnable:
        raise UnsupportedError(
            f"{path}: this version does not run {spec.architecture} ({', '.join(spec.unrunnable)})",
            f"`flexrun plan` plans it; this version runs {', '.join(SUPPORTED_ARCHITECTURES)}",
        )
    try:
        words = Tokenizer.from_path(tokenizer or path, chat_template=chat_template)
    except TokenizerError:
        if tokenizer is not None or chat_template is not None or _has_tokenizer(path):
            raise
        words = None
    stops = set(spec.eos_token_ids) | _as_set(reader.generation_config.get("eos_token_id"))
    if words is not None:
        stops |= set(words.stop_token_ids)
    limit = spec.max_position_embeddings
    if max_model_len is not None and max_model_len > limit:
        raise ConfigError(
            f"--max-model-len {max_model_len} is more than the {limit} positions of the model",
            f"give at most {limit}",
        )
    name = path.stem if path.is_file() else path.resolve().name
    spec = replace(spec, eos_token_ids=tuple(sorted(stops)))
    return ModelFiles(name, path, reader, spec, words, max_model_len or limit, frozenset(stops))


def cache_stem(files: ModelFiles) -> str:
    """A readable folder name that two models of one name in different places do not share."""
    return f"{files.name}-{hashlib.sha256(str(files.path.resolve()).encode()).hexdigest()[:8]}"


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in ("tokenizer.json", "vocab.json"))


def _as_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
