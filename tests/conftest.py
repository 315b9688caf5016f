"""Tiny checkpoints on disk and packed, made once a session, for every room that runs a whole model."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from flexrun.openmp import import_torch

if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    # Workers that run beside each other do not take each other's cores: threads that spin would starve the others.
    worker, workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    own_cores = sorted(os.sched_getaffinity(0))[worker::workers]
    if own_cores:
        os.sched_setaffinity(0, own_cores)

import_torch()  # isort: split

import gguf
import pytest
from tiny_families import save_checkpoint

from flexrun.models.families import spec_from_config
from flexrun.placement import weights
from flexrun.weights.packed import open_packed
from flexrun.weights.readers import open_checkpoint


@pytest.fixture(scope="session", autouse=True)
def planned_machine():
    """Plans are made for one machine, whichever the tests run on, and nothing is measured on the way."""
    with pytest.MonkeyPatch.context() as patch:
        document = Path(__file__).parent.parent / "configs" / "hardware" / "laptop-cpu.json"
        patch.setenv("FLEXRUN_HARDWARE", str(document))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(family name) -> folder with config.json and model.safetensors."""
    return cache(lambda name: save_checkpoint(name, tmp_path_factory.mktemp("checkpoint") / name))


@pytest.fixture(scope="session")
def packed_cache(tmp_path_factory):
    """Folder of packed caches that the tests of a session share."""
    return tmp_path_factory.mktemp("packed")


@pytest.fixture(scope="session")
def packed(checkpoint, packed_cache):
    """packed(family name) -> (ModelSpec in float32, PackedWeights)."""

    @cache
    def pack(name: str):
        with open_checkpoint(checkpoint(name)) as reader:
            spec = spec_from_config(reader.config, "float32")
            return spec, open_packed(reader, spec, packed_cache, name=name, progress=False)

    return pack


@pytest.fixture
def matrices_move(monkeypatch):
    """Lets the matrices of a tiny model leave the compute tier, as those of a real one do; norms still stay.

    Experts move one by one, where all of a tiny layer would be one unit.
    """
    monkeypatch.setattr(weights, "SMALL_TENSOR_BYTES", 1024)
    monkeypatch.setattr(weights, "EXPERT_UNIT_BYTES", 1)


@pytest.fixture
def raw_gguf(tmp_path):
    """raw_gguf(build, arch="llama", **options) -> path of a GGUF file that ``build(writer)`` fills."""

    def write(build=lambda writer: None, arch="llama", **options):
        path = tmp_path / "raw.gguf"
        writer = gguf.GGUFWriter(path, arch, **options)
        build(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write
