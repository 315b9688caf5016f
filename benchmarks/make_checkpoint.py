"""Writes a checkpoint of random weights in a real model's shape, so that speed and memory are measured without a hub.

    python benchmarks/make_checkpoint.py llama-1b OUT_DIR        # 1.1 billion parameters, bfloat16, 2.2 GB

Memory stays at one tensor; the values are normal with deviation 0.02, the norms are ones.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from pathlib import Path

import torch

SHAPES = {
    "llama-1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


def llama_config(shape: dict, dtype: str) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": dtype,
        **shape,
    }


def llama_tensors(shape: dict) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    tensors = {"model.embed_tokens.weight": (vocab, hidden)}
    for layer in range(shape["num_hidden_layers"]):
        stem = f"model.layers.{layer}"
        tensors |= {
            f"{stem}.input_layernorm.weight": (hidden,),
            f"{stem}.self_attn.q_proj.weight": (hidden, hidden),
            f"{stem}.self_attn.k_proj.weight": (kv, hidden),
            f"{stem}.self_attn.v_proj.weight": (kv, hidden),
            f"{stem}.self_attn.o_proj.weight": (hidden, hidden),
            f"{stem}.post_attention_layernorm.weight": (hidden,),
            f"{stem}.mlp.gate_proj.weight": (inner, hidden),
            f"{stem}.mlp.up_proj.weight": (inner, hidden),
            f"{stem}.mlp.down_proj.weight": (hidden, inner),
        }
    return tensors | {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def write_safetensors(path: Path, tensors: dict[str, tuple[int, ...]], dtype: torch.dtype, seed: int) -> None:
    """Stream random tensors into one safetensors file."""
    names = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
    header, offset = {}, 0
    for name, shape in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    generator = torch.Generator().manual_seed(seed)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in tensors.items():
            value = torch.ones(shape) if "norm" in name else torch.empty(shape).normal_(0, 0.02, generator=generator)
            file.write(value.to(dtype).view(torch.uint8).numpy().data)


def make_checkpoint(name: str, folder: Path, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the checkpoint unless ``folder`` already holds it; returns ``folder``."""
    config = llama_config(SHAPES[name], dtype)
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", llama_tensors(SHAPES[name]), getattr(torch, dtype), seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.shape, arguments.folder, arguments.dtype))
