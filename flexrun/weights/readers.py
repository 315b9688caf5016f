"""Picks the reader for a path, so that callers say *where* a model is and never *in which format*."""

from __future__ import annotations

from pathlib import Path

from flexrun.errors import CheckpointError
from flexrun.weights.checkpoint import CheckpointReader, check_tensors
from flexrun.weights.gguf_reader import GgufReader
from flexrun.weights.safetensors_reader import SafetensorsReader

__all__ = ["CheckpointReader", "check_tensors", "open_checkpoint"]

PICKLE_PATTERNS = ("pytorch_model*.bin", "*.pt", "*.pth")


def open_checkpoint(path: str | Path) -> CheckpointReader:
    """Open a directory of safetensors files, a .gguf file, or a directory that holds one .gguf file.

    Headers are checked here, before any work. Raises CheckpointError naming the file (and tensor) at fault, and
    UnsupportedError for a GGUF file with an architecture, setting or tensor that flexrun does not run.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist", "give the directory of a model, or a .gguf file")
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path}: not a .gguf file", "give the directory that holds config.json and weights")
        return GgufReader(path)
    if any(path.glob("*.safetensors")) or any(path.glob("*.safetensors.index.json")):
        return SafetensorsReader(path)
    found_gguf = sorted(path.glob("*.gguf"))
    if len(found_gguf) > 1:
        names = ", ".join(found.name for found in found_gguf)
        raise CheckpointError(f"{path} holds {len(found_gguf)} .gguf files: {names}", "give the path of one of them")
    if found_gguf:
        return GgufReader(found_gguf[0])
    if any(found for pattern in PICKLE_PATTERNS for found in path.glob(pattern)):
        raise CheckpointError(
            f"{path} holds only pickled PyTorch weights, which can run code when they are loaded",
            "convert them to safetensors first, for example with transformers' save_pretrained",
        )
    raise CheckpointError(f"{path} holds no *.safetensors and no .gguf file", "give the directory of a model")
