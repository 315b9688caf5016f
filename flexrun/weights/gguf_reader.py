"""Reads GGUF files as if they were Hugging Face checkpoints: names, row order and values as transformers has them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy
import torch
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from flexrun.core import nearest_name
from flexrun.errors import CheckpointError, UnsupportedError
from flexrun.gguf_header import DAMAGED, GgufHeader, GgufTensor, read_gguf_header
from flexrun.weights.checkpoint import (
    CONVERT_ROWS_BYTES,
    CheckpointReader,
    digest_files,
    fingerprint_files,
    read_exactly,
)
from flexrun.weights.gguf_config import hf_config, hf_generation_config
from flexrun.weights.gguf_names import FAMILIES, SETTINGS, Meaning, meaning

READABLE = frozenset(
    ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)


class GgufReader(CheckpointReader):
    """One .gguf file. ``config`` is built from its metadata, tensors are dequantised as they are read."""

    def __init__(self, path: str | Path):
        """Parse and check the header. Raises CheckpointError for a damaged file, UnsupportedError for one that holds
        an architecture, a setting or a tensor that flexrun does not run."""
        self.path = Path(path)
        self._header = read_gguf_header(self.path)
        self._descriptor = os.open(self.path, os.O_RDONLY)
        try:
            self._open(self._header)
        except BaseException:
            self.close()
            raise

    def _open(self, header: GgufHeader) -> None:
        arch = header.metadata.get("general.architecture")
        if not isinstance(arch, str) or arch not in FAMILIES:
            raise UnsupportedError(
                f"{self.path}: GGUF architecture {arch!r} does not run here", nearest_name(str(arch), FAMILIES)
            )
        family = FAMILIES[arch]
        settings = {name: self._values(header.tensors[name]) for name in SETTINGS & header.tensors.keys()}
        try:
            self.config = hf_config(header, family, settings)
        except (TypeError, ValueError, ArithmeticError) as error:  # a value of another type than the format says
            raise CheckpointError(f"{self.path}: damaged metadata: {error}", DAMAGED) from error
        self.generation_config = hf_generation_config(header.metadata)
        self._tensors: dict[str, tuple[GgufTensor, Meaning]] = {}
        for stored in header.tensors.values():
            if stored.name in SETTINGS:
                continue
            known = meaning(family, stored.name, self.config["num_hidden_layers"])
            if known is None:
                raise UnsupportedError(
                    f"{self.path}: tensor {stored.name!r} does not belong to a plain {arch} model",
                    "this file holds a variant (for example a mixture of experts) that does not run here",
                )
            self._tensors[known.name] = stored, known

    def _stored(self, name: str) -> tuple[GgufTensor, Meaning]:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing") from None

    def names(self) -> set[str]:
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name)[0].shape

    def file_of(self, name: str) -> Path:
        return self.path

    def refusal(self, name: str) -> str | None:
        return _refusal(self._stored(name)[0])

    def fingerprint(self) -> str:
        return fingerprint_files(self.config, {self.path: self._header.digest})

    def digest(self) -> str:
        return digest_files({}, {self.path: self._header.digest})  # the config is made of the header

    def read(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        stored, known = self._stored(name)
        result = torch.empty(stored.shape, dtype=dtype)
        rows = result.view(-1, stored.shape[-1]) if len(stored.shape) > 1 else result.view(-1, 1)
        order = row_order(known.row_order, len(rows), self.config, f"{self.path}: tensor {name!r}")
        row_bytes = stored.size_bytes // max(len(rows), 1)
        step = max(1, CONVERT_ROWS_BYTES // (4 * rows.shape[1]))
        if len(stored.shape) == 1 and stored.kind not in ("F32", "F16", "BF16"):
            step = len(rows)  # one quantised row: its blocks cannot be cut at elements
        for start in range(0, len(rows), step):
            count = min(step, len(rows) - start)
            part = torch.from_numpy(self._values(stored, start * row_bytes, count * row_bytes)).view(count, -1)
            if known.offset:
                part = part + known.offset
            if order is None:
                rows[start : start + count].copy_(part)
            else:
                rows[order[start : start + count]] = part.to(dtype)
        return result

    def _values(self, stored: GgufTensor, skip_bytes: int = 0, count_bytes: int | None = None) -> numpy.ndarray:
        """float32 values of a byte range that covers whole blocks (default: all)."""
        where = f"{self.path}: tensor {stored.name!r}"
        if refusal := _refusal(stored):
            raise CheckpointError(f"{where} {refusal}", "use another quantisation of this model")
        raw = numpy.empty(stored.size_bytes if count_bytes is None else count_bytes, numpy.uint8)
        read_exactly(self._descriptor, memoryview(raw), stored.offset_bytes + skip_bytes, where)
        kind = GGMLQuantizationType[stored.kind]
        if kind == GGMLQuantizationType.F32:
            return raw.view("<f4")
        if kind == GGMLQuantizationType.F16:
            return raw.view("<f2").astype(numpy.float32)
        with numpy.errstate(all="ignore"):  # random or extreme scales overflow quietly, as they do in llama.cpp
            return dequantize(raw, kind)

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _refusal(stored: GgufTensor) -> str | None:
    return None if stored.kind in READABLE else f"is stored as {stored.kind}; readable: {', '.join(sorted(READABLE))}"


def row_order(kind: str | None, rows: int, config: dict, where: str) -> torch.Tensor | None:
    """[rows] int64: the Hugging Face row of each stored row; None where they are the same.

    query_pairs, key_pairs: each head's rows were interleaved from (2, head_dim / 2) to (head_dim / 2, 2), because
        llama.cpp rotates neighbours and transformers rotates halves.
    heads_together: [head][q, k, v] became [q, k, v][head].
    Raises CheckpointError beginning with ``where`` when the rows do not divide into heads.
    """
    if kind is None:
        return None
    heads = config["num_key_value_heads" if kind == "key_pairs" else "num_attention_heads"]
    if rows % (heads * (3 if kind == "heads_together" else 2)):
        raise CheckpointError(f"{where} has {rows} rows, which do not divide into {heads} heads")
    index = torch.arange(rows)
    if kind == "heads_together":
        return index.view(heads, 3, -1).transpose(0, 1).reshape(-1)
    return index.view(heads, 2, -1).transpose(1, 2).reshape(-1)
