"""What is learned of a model before a weight is read, and what is refused then."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from flexrun.llm import open_model

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def checkpoint_of(name: str, folder: Path) -> Path:
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


def test_a_model_that_runs_is_opened_with_its_limits(checkpoint):
    with_files = open_model(checkpoint("llama"), max_model_len=100)
    assert with_files.max_model_len == 100
    assert json.loads((checkpoint("llama") / "config.json").read_text())["eos_token_id"] in with_files.stop_token_ids
    with_files.close()
