"""Upcycle SmolLM2 into a mixture of experts in Mixtral's format, a real model to try experts with:

    python examples/upcycle_smollm2.py OUT [--experts 4] [--noise 0.0]

Every expert is a copy of the dense MLP, and a token's two experts weigh 1 together, so without noise the model says
what SmolLM2 says. With noise the experts differ. The routers are random. --model takes any model of Llama's
architecture.
"""

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from flexrun.errors import FlexrunError, UnsupportedError
from flexrun.tokenizer.gguf_vocab import parts_from_gguf
from flexrun.weights.catalog import resolve_model
from flexrun.weights.readers import CheckpointReader, open_checkpoint

DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16)}
KEPT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_scaling", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
EXPERT_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
Tensor = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]  # name, shape, what makes it when its turn comes


def mixtral_config(dense: dict, experts: int, dtype: str) -> dict:
    biased = dense.get("attention_bias") or dense.get("mlp_bias")
    if dense.get("architectures") != ["LlamaForCausalLM"] or biased:
        raise UnsupportedError(f"{dense.get('architectures')} cannot be upcycled", "give a Llama model without biases")
    kept = {key: dense[key] for key in KEPT if dense.get(key) is not None}
    kept.setdefault("num_key_value_heads", dense["num_attention_heads"])
    routing = {"num_local_experts": experts, "num_experts_per_tok": 2}
    return {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "torch_dtype": dtype, **routing, **kept}


def mixtral_tensors(reader: CheckpointReader, experts: int, noise: float, seed: int) -> Iterator[Tensor]:
    """The tensors in the order of the file; each is read and made when it is written."""
    generator = torch.Generator().manual_seed(seed)
    hidden = reader.config["hidden_size"]

    def read(name: str, noise: float = 0.0) -> torch.Tensor:
        value = reader.read(name, torch.float32)
        return value + noise * value.std() * torch.randn(value.shape, generator=generator) if noise else value

    def router() -> torch.Tensor:
        return torch.randn(experts, hidden, generator=generator) / hidden**0.5

    for name in sorted(reader.names()):
        layer, _, rest = name.partition(".mlp.")
        if not rest:
            yield name, reader.shape(name), lambda name=name: read(name)
            continue
        part = EXPERT_NAMES[rest.removesuffix(".weight")]
        for expert in range(experts):
            target = f"{layer}.block_sparse_moe.experts.{expert}.{part}.weight"
            yield target, reader.shape(name), lambda name=name: read(name, noise)
        if part == "w1":
            yield f"{layer}.block_sparse_moe.gate.weight", (experts, hidden), router


def write_safetensors(path: Path, tensors: list[Tensor], dtype: str) -> None:
    """One file, tensor by tensor."""
    code, torch_dtype = DTYPES[dtype]
    header, end = {}, 0
    for name, shape, _ in tensors:
        start, end = end, end + torch.Size(shape).numel() * torch_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for _, _, make in tensors:
            file.write(make().to(torch_dtype).contiguous().view(torch.uint8).numpy().data)


def copy_tokenizer(source: Path, out: Path) -> None:
    if source.is_dir():
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
            if (source / name).exists():
                (out / name).write_bytes((source / name).read_bytes())
        return
    parts = parts_from_gguf(source)
    parts.backend.save(str(out / "tokenizer.json"))
    settings = {**parts.special, "chat_template": parts.chat_template}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": parts.stop_token_ids}))


def upcycle(
    out: str | Path,
    *,
    model: str | Path = "smollm2-135m-instruct",
    experts: int = 4,
    noise: float = 0.0,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write the model's folder; noise is in standard deviations of each weight matrix. Returns ``out``."""
    if experts < 2:
        raise UnsupportedError(f"{experts} experts", "a token is sent to two: give at least 2")
    source, out = resolve_model(model), Path(out)
    with open_checkpoint(source) as reader:
        config = mixtral_config(reader.config, experts, dtype)
        out.mkdir(parents=True, exist_ok=True)
        write_safetensors(out / "model.safetensors", list(mixtral_tensors(reader, experts, noise, seed)), dtype)
    copy_tokenizer(source, out)
    (out / "config.json").write_text(json.dumps(config, indent=2))  # last: a folder with it is whole
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the new model")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="a name, a folder or a .gguf file")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--noise", type=float, default=0.0, help="in standard deviations of each matrix")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    arguments = parser.parse_args()
    try:
        folder = upcycle(**vars(arguments))
    except FlexrunError as error:
        parser.exit(1, f"error: {error.message}\nhint: {error.hint}\n")
    print(
        f"{folder}: {arguments.experts} experts a layer; flexrun run --model {folder} -i prompts.jsonl -o answers.jsonl"
    )


if __name__ == "__main__":
    main()
