"""Profiles of experts come back as they were written, and those of another model are refused by name."""

import json

import numpy
import pytest
import transformers

from flexrun.errors import ConfigError
from flexrun.models.families import spec_from_config
from flexrun.moe import with_expert_profile, write_expert_profile

SPEC = spec_from_config(
    transformers.MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    ).to_dict()
    | {"architectures": ["MixtralForCausalLM"]},
    "float32",
)


def test_counts_come_back(tmp_path):
    counts = numpy.array([[5, 0, 7], [1, 1, 1 << 40]])
    write_expert_profile(tmp_path / "profile.json", counts)
    assert with_expert_profile(SPEC, tmp_path / "profile.json").expert_counts == ((5, 0, 7), (1, 1, 1 << 40))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no expert profile"),
        ("[]", "is no expert profile"),
        (json.dumps({"tokens_by_layer_and_expert": [[1, 2], [3]]}), "is no expert profile"),
        (
            json.dumps({"tokens_by_layer_and_expert": [[1, 2, 3]]}),
            "1 x 3 layers and experts, the model has 2 x 3",
        ),
        (json.dumps({"tokens_by_layer_and_expert": [[1, 2, 3], [-1, 2, 3]]}), "counts 2 x 3"),
    ],
)
def test_what_is_no_profile_of_this_model_is_refused(tmp_path, content, words):
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=words):
        with_expert_profile(SPEC, path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.json cannot be read"):
        with_expert_profile(SPEC, tmp_path / "gone.json")
