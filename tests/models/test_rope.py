"""Rotary tables against transformers' own modules, at real sizes and far positions."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from flexrun.models.families import spec_from_config
from flexrun.models.rope import rope_tables

SIZES = {
    "vocab_size": 64,
    "hidden_size": 4096,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "intermediate_size": 64,
    "max_position_embeddings": 4096,
}
FAR = 40_000
SCALINGS = {
    "default": {"rope_theta": 1e6},
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
    "yarn, narrow ramp": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 2.0,
            "beta_fast": 1.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 1024,
        }
    },
    "yarn, ramp past the last channel": {
        "rope_theta": 10.0,
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024},
    },
    "yarn, given attention factor": {
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "attention_factor": 0.9,
            "original_max_position_embeddings": 1024,
        }
    },
}


def oracle(module, positions: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = module(torch.zeros(1), torch.tensor([positions]))
    half = cos.shape[-1] // 2
    return cos[0, :, :half], sin[0, :, :half]


def check(tables, positions, expected):
    rotary = tables.gather(torch.tensor(positions))
    torch.testing.assert_close((rotary.cos[0], rotary.sin[0]), expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", SCALINGS)
def test_tables_equal_those_of_transformers(name):
    keys = SCALINGS[name]
    tables = rope_tables(spec_from_config({**SIZES, **keys, "architectures": ["LlamaForCausalLM"]}), FAR)
    module = LlamaRotaryEmbedding(transformers.LlamaConfig(**SIZES, **keys))
    positions = [0, 1, 77, 4095, 4096, FAR - 1]
    check(tables, positions, oracle(module, positions))


def test_dynamic_follows_transformers_while_it_decodes():
    keys = {"rope_scaling": {"type": "dynamic", "factor": 2.0}}
    tables = rope_tables(spec_from_config({**SIZES, **keys, "architectures": ["LlamaForCausalLM"]}), 9000)
    module = LlamaRotaryEmbedding(transformers.LlamaConfig(**SIZES, **keys))
    for positions in ([0, 5, 4095], [4096], [4097], [8999]):
        check(tables, positions, oracle(module, positions))


@pytest.mark.parametrize(("max_positions", "probe"), [(4096, 4095), (4097, 4096)])
def test_longrope_chooses_once_by_the_longest_sequence_of_the_run(max_positions, probe):
    short, long = [1.0 + step / 50 for step in range(64)], [2.0 + step for step in range(64)]
    sizes = {**SIZES, "max_position_embeddings": 32768, "original_max_position_embeddings": 4096}
    keys = {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}
    tables = rope_tables(spec_from_config({**sizes, **keys, "architectures": ["Phi3ForCausalLM"]}), max_positions)
    module = Phi3RotaryEmbedding(transformers.Phi3Config(**sizes, **keys))
    positions = [0, 9, 1000, probe]
    check(tables, positions, oracle(module, positions))


def test_longrope_chooses_for_each_sequence_by_its_own_length():
    short, long = [1.0 + step / 50 for step in range(64)], [2.0 + step for step in range(64)]
    sizes = {**SIZES, "max_position_embeddings": 32768, "original_max_position_embeddings": 4096}
    keys = {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": long}}
    tables = rope_tables(spec_from_config({**sizes, **keys, "architectures": ["Phi3ForCausalLM"]}), 5000)
    module = Phi3RotaryEmbedding(transformers.Phi3Config(**sizes, **keys))
    mixed = tables.gather(torch.tensor([7, 7, 4000, 4999]), torch.tensor([4096, 4097, 4096, 5000]))
    for row, (position, reaches) in enumerate([(7, 4095), (7, 4096), (4000, 4095), (4999, 4999)]):
        cos, _ = oracle(module, [position, reaches])  # the oracle chooses by the last position it is given
        torch.testing.assert_close(mixed.cos[0][row], cos[0], atol=2e-6, rtol=0)


def test_rows_are_views():
    spec = spec_from_config({**SIZES, "architectures": ["LlamaForCausalLM"]})
    rotary = rope_tables(spec, 16).gather(torch.tensor([3, 9, 4, 15]))
    part = rotary.rows(1, 3)
    assert part.cos[0].data_ptr() == rotary.cos[0][1].data_ptr()
    assert torch.equal(part.sin[0], rotary.sin[0][1:3])
