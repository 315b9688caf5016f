"""Tiny checkpoints, made once a session, read back from the files transformers writes."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import make_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """tiny(name) -> (config.json as a dict, checkpoint tensors by name, transformers model)."""

    @cache
    def load(name: str):
        folder = tmp_path_factory.mktemp(name)
        _, model = make_model(name)
        model.save_pretrained(folder)
        return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"), model

    return load
