"""How many tokens went to each expert in an earlier run: tells placement which experts deserve the fastest tiers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy

from flexrun.errors import ConfigError
from flexrun.models.spec import ModelSpec


def write_expert_profile(path: str | Path, counts: numpy.ndarray) -> None:
    """counts: int64 [layers, experts], zeros for dense layers. Raises OSError."""
    document = {"format": "flexrun expert profile", "version": 1, "tokens_by_layer_and_expert": counts.tolist()}
    Path(path).write_text(json.dumps(document) + "\n", encoding="utf-8")


def with_expert_profile(spec: ModelSpec, path: str | Path) -> ModelSpec:
    """The spec with the counts of a file of write_expert_profile.

    Raises ConfigError for a file that cannot be read, is no profile, or is one of another model.
    """
    remedy = "write one with flexrun run --save-expert-profile FILE"
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
        counts = numpy.array(document["tokens_by_layer_and_expert"], dtype=numpy.int64)
    except OSError as error:
        raise ConfigError(f"expert profile {path} cannot be read: {error.strerror}", remedy) from error
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise ConfigError(f"{path} is no expert profile", remedy) from error
    experts = spec.experts.num_experts if spec.experts else 0
    if counts.shape != (spec.num_layers, experts) or counts.min(initial=0) < 0:
        raise ConfigError(
            f"expert profile {path} counts {' x '.join(map(str, counts.shape))} layers and experts, "
            f"the model has {spec.num_layers} x {experts}",
            "use a profile of this model",
        )
    return replace(spec, expert_counts=tuple(map(tuple, counts.tolist())))
