"""Turns a tiny checkpoint into an FP8 or MXFP4 one, and into the plain one that holds the same values.

expected = to_fp8(folder, quantised_folder, plain_folder, block=(16, 16))
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

LARGEST_E4M3 = 448.0


def to_fp8(source: Path, quantised: Path, plain: Path, block: tuple[int, int]) -> None:
    """Every projection of a layer, in blocks; DeepSeek gets a layer for further tokens behind the last one."""
    tensors, stored = load_file(source / "model.safetensors"), {}
    for name, weight in list(tensors.items()):
        if not (name.startswith("model.layers.") and name.endswith("_proj.weight")):
            stored[name] = weight
            continue
        rows, columns = (-(-size // part) for size, part in zip(weight.shape, block))
        factors = torch.empty(rows, columns)
        values, exact = torch.empty_like(weight), torch.empty_like(weight)
        for row in range(rows):
            for column in range(columns):
                part = (
                    slice(row * block[0], (row + 1) * block[0]),
                    slice(column * block[1], (column + 1) * block[1]),
                )
                factors[row, column] = weight[part].abs().max() / LARGEST_E4M3
                values[part] = (weight[part] / factors[row, column]).to(torch.float8_e4m3fn).float()
                exact[part] = values[part] * factors[row, column]
        stored[name], stored[f"{name}_scale_inv"] = values.to(torch.float8_e4m3fn), factors
        tensors[name] = exact
    config = json.loads((source / "config.json").read_text())
    if config["model_type"].startswith("deepseek"):
        further = f"model.layers.{config['num_hidden_layers']}.eh_proj.weight"
        stored[further], stored[f"{further}_scale_inv"] = torch.ones(4, 4).to(torch.float8_e4m3fn), torch.ones(1, 1)
    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    _save(quantised, {**config, "quantization_config": settings}, stored)
    _save(plain, config, tensors)


def to_mxfp4(source: Path, quantised: Path, plain: Path, seed: int = 0) -> None:
    """Experts of random 4-bit values of about the size of the weights they replace."""
    tensors, stored = load_file(source / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(seed)
    for name, weight in list(tensors.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, inputs, outputs = weight.shape
        grid = (experts, outputs, inputs // 32)
        blocks = torch.randint(0, 256, (*grid, 16), generator=generator, dtype=torch.uint8)
        scales = torch.randint(122, 126, grid, generator=generator, dtype=torch.uint8)
        stored[f"{name}_blocks"], stored[f"{name}_scales"] = blocks, scales
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    _save(quantised, {**config, "quantization_config": settings}, stored)
    _save(plain, config, tensors)


def _save(folder: Path, config: dict, tensors: dict) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
