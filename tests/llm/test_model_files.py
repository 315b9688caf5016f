"""What is learned of a model before a weight is read, and what is refused then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flexrun.errors import UnsupportedError
from flexrun.llm import LLM, open_model

CONFIGS = Path(__file__).parents[2] / "configs" / "models"


def checkpoint_of(name: str, folder: Path) -> Path:
    (folder / "config.json").write_text((CONFIGS / f"{name}.json").read_text())
    save_file({"model.norm.weight": torch.ones(8)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("mixtral-8x7b", ["MixtralForCausalLM", "mixture of experts"]),
        ("deepseek-r1", ["mixture of experts", "multi-head latent attention", "fp8 checkpoint"]),
        ("gpt-oss-120b", ["mixture of experts", "attention sinks", "mxfp4 checkpoint"]),
    ],
)
@pytest.mark.parametrize("open_it", [open_model, LLM])
def test_a_model_that_can_only_be_planned_is_refused_by_its_reasons(tmp_path, name, reasons, open_it):
    folder = checkpoint_of(name, tmp_path)
    with pytest.raises(UnsupportedError) as caught:
        open_it(folder)
    assert all(reason in caught.value.message for reason in [*reasons, str(folder)])
    assert "flexrun plan" in caught.value.hint
    assert "LlamaForCausalLM" in caught.value.hint and "Mixtral" not in caught.value.hint


def test_a_model_that_runs_is_opened_with_its_limits(checkpoint):
    with_files = open_model(checkpoint("llama"), max_model_len=100)
    assert with_files.max_model_len == 100
    assert json.loads((checkpoint("llama") / "config.json").read_text())["eos_token_id"] in with_files.stop_token_ids
    with_files.close()
