"""Writes a checkpoint of random weights in a real model's shape, so that speed and memory are measured without a hub.

    python benchmarks/make_checkpoint.py llama-1b OUT_DIR        # 1.1 billion parameters, bfloat16, 2.2 GB
    python benchmarks/make_checkpoint.py opt-6.7b OUT_DIR        # any llama, mixtral or opt of configs/models/

Memory stays at one pool of values, of which every tensor takes a piece; they are normal with deviation 0.02, the norms
are ones and their biases zeros. It writes as fast as the disk.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "models"
POOL_ELEMENTS = 1 << 24
Tensors = dict[str, tuple[int, ...]]

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES = {
    "llama-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
    "mixtral-1b": {
        **_LLAMA,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": 1024,
        "intermediate_size": 3584,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": None,
        "vocab_size": 32000,
    },
    "llama-tiny": {
        **_LLAMA,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "llama-small": {
        **_LLAMA,
        "hidden_size": 256,
        "intermediate_size": 640,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
    "opt-small": {
        "architectures": ["OPTForCausalLM"],
        "model_type": "opt",
        "activation_function": "relu",
        "do_layer_norm_before": True,
        "max_position_embeddings": 2048,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
        "hidden_size": 256,
        "word_embed_proj_dim": 256,
        "ffn_dim": 1024,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "vocab_size": 512,
    },
}


def config_of(name: str) -> dict:
    """The configuration of a shape of this file or of configs/models/."""
    return dict(SHAPES[name]) if name in SHAPES else json.loads((CONFIGS / f"{name}.json").read_text())


def shape_names() -> list[str]:
    known = {path.stem for path in CONFIGS.glob("*.json") if config_of(path.stem)["model_type"] in _TENSORS}
    return sorted(known | set(SHAPES))


def llama_tensors(shape: dict) -> Tensors:
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


def mixtral_tensors(shape: dict) -> Tensors:
    hidden, inner, experts = shape["hidden_size"], shape["intermediate_size"], shape["num_local_experts"]
    tensors = {name: size for name, size in llama_tensors(shape).items() if ".mlp." not in name}
    for layer in range(shape["num_hidden_layers"]):
        stem = f"model.layers.{layer}.block_sparse_moe"
        tensors[f"{stem}.gate.weight"] = (experts, hidden)
        for expert in range(experts):
            for name, size in (("w1", (inner, hidden)), ("w2", (hidden, inner)), ("w3", (inner, hidden))):
                tensors[f"{stem}.experts.{expert}.{name}.weight"] = size
    return tensors


def opt_tensors(shape: dict) -> Tensors:
    hidden, inner, vocab = shape["hidden_size"], shape["ffn_dim"], shape["vocab_size"]
    tensors = {
        "model.decoder.embed_tokens.weight": (vocab, hidden),
        "model.decoder.embed_positions.weight": (shape["max_position_embeddings"] + 2, hidden),
    }
    for layer in range(shape["num_hidden_layers"]):
        stem = f"model.decoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= {f"{stem}.self_attn.{name}.weight": (hidden, hidden), f"{stem}.self_attn.{name}.bias": (hidden,)}
        tensors |= {
            f"{stem}.self_attn_layer_norm.weight": (hidden,),
            f"{stem}.self_attn_layer_norm.bias": (hidden,),
            f"{stem}.fc1.weight": (inner, hidden),
            f"{stem}.fc1.bias": (inner,),
            f"{stem}.fc2.weight": (hidden, inner),
            f"{stem}.fc2.bias": (hidden,),
            f"{stem}.final_layer_norm.weight": (hidden,),
            f"{stem}.final_layer_norm.bias": (hidden,),
        }
    last = "model.decoder.final_layer_norm"
    return tensors | {f"{last}.weight": (hidden,), f"{last}.bias": (hidden,)}


_TENSORS = {"llama": llama_tensors, "mixtral": mixtral_tensors, "opt": opt_tensors}


def write_safetensors(path: Path, tensors: Tensors, dtype: torch.dtype, seed: int) -> None:
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
    elements = min(POOL_ELEMENTS, sum(math.prod(shape) for shape in tensors.values()))
    pool = torch.empty(elements).normal_(0, 0.02, generator=generator).to(dtype)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in tensors.items():
            for piece in _values(name, math.prod(shape), pool, generator):
                file.write(piece.view(torch.uint8).numpy().data)


def _values(name: str, elements: int, pool: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    if "norm" in name:
        yield torch.full((elements,), float(name.endswith("weight")), dtype=pool.dtype)
        return
    start = int(torch.randint(len(pool), (1,), generator=generator))
    while elements:
        piece = pool[start : start + elements]
        yield piece
        elements, start = elements - len(piece), 0


def make_checkpoint(name: str, folder: Path, dtype: str = "bfloat16", seed: int = 0) -> Path:
    """Write the checkpoint unless ``folder`` already holds it; returns ``folder``."""
    config = config_of(name) | {"torch_dtype": dtype}
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _TENSORS[config["model_type"]](config)
    write_safetensors(folder / "model.safetensors", tensors, getattr(torch, dtype), seed)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=shape_names())
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    print(make_checkpoint(arguments.shape, arguments.folder, arguments.dtype))
