"""What is known of a model before a weight is read: its spec, tokenizer, limits and checkpoint headers."""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from flexrun.errors import ConfigError, TokenizerError
from flexrun.models.families import spec_from_config
from flexrun.models.spec import ModelSpec
from flexrun.moe import with_expert_profile
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

    def weights_digest(self) -> str:
        """See CheckpointReader.digest."""
        return self.reader.digest()

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
    expert_profile: str | Path | None = None,
) -> ModelFiles:
    """Open a model by path or catalog name; reads headers only. expert_profile: see LLM.

    Raises CheckpointError, UnsupportedError, TokenizerError or ConfigError,
    each naming its remedy.
    """
    path = resolve_model(str(model), cache_dir)
    reader = open_checkpoint(path)
    if dtype == "auto" and not {"dtype", "torch_dtype"} & set(reader.config):
        dtype = GGUF_DTYPE
    spec = spec_from_config(reader.config, dtype)
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
    spec = replace(spec, eos_token_ids=tuple(sorted(stops)))
    spec = spec if expert_profile is None else with_expert_profile(spec, expert_profile)
    return ModelFiles(_name(path), path, reader, spec, words, max_model_len or limit, frozenset(stops))


@dataclass(frozen=True)
class ModelPlan:
    """What planning needs of a model: no weights. ``tokenizer`` is None where none lies beside the config.json."""

    name: str
    spec: ModelSpec
    tokenizer: Tokenizer | None
    max_model_len: int

    def close(self) -> None:
        """Nothing is open; a job closes its model whichever it is."""


def read_model_plan(
    model: str | Path,
    *,
    tokenizer: str | Path | None = None,
    dtype: str = "auto",
    max_model_len: int | None = None,
    cache_dir: str | Path | None = None,
    expert_profile: str | Path | None = None,
) -> ModelPlan:
    """Read a model's shapes from its config.json (the file, or its folder), a .gguf file or a catalog name.

    Raises ConfigError, CheckpointError, UnsupportedError or TokenizerError, each naming its remedy.
    """
    path = resolve_model(str(model), cache_dir)
    config_path = path if path.suffix == ".json" else path / "config.json"
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{config_path} is not JSON: {error}", "give a model's config.json") from error
        if not isinstance(config, dict):
            raise ConfigError(f"{config_path} holds no object", "give a model's config.json")
    else:
        with closing(open_checkpoint(path)) as reader:
            config = reader.config
    if dtype == "auto" and not {"dtype", "torch_dtype"} & set(config):
        dtype = GGUF_DTYPE
    spec = spec_from_config(config, dtype)
    spec = spec if expert_profile is None else with_expert_profile(spec, expert_profile)
    source = tokenizer or (path.parent if path.suffix == ".json" else path)
    words = Tokenizer.from_path(source) if tokenizer or _has_tokenizer(Path(source)) else None
    return ModelPlan(_name(path), spec, words, min(max_model_len or 1 << 60, spec.max_position_embeddings))


def _name(path: Path) -> str:
    return path.stem if path.is_file() else path.resolve().name


def cache_stem(files: ModelFiles) -> str:
    """A readable folder name that two models of one name in different places do not share."""
    return f"{files.name}-{hashlib.sha256(str(files.path.resolve()).encode()).hexdigest()[:8]}"


def _has_tokenizer(path: Path) -> bool:
    return path.is_file() or any((path / name).exists() for name in ("tokenizer.json", "vocab.json"))


def _as_set(value: int | list[int] | None) -> set[int]:
    return set() if value is None else {value} if isinstance(value, int) else set(value)
