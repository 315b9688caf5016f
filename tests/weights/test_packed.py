"""The packed cache: aligned, checksummed, reused, and never half-valid, whatever interrupts its writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexrun.compress import WeightBits, quantise
from flexrun.core import PAGE_BYTES
from flexrun.errors import BudgetError, CheckpointError, ExecutionError
from flexrun.models.families import spec_from_config
from flexrun.weights import packed as packed_module
from flexrun.weights.packed import MANIFEST, open_packed
from flexrun.weights.readers import open_checkpoint


def pack(folder, cache_dir, name="m", dtype="float32"):
    with open_checkpoint(folder) as reader:
        return open_packed(reader, spec_from_config(reader.config, dtype), cache_dir, name=name, progress=False)


@pytest.fixture
def model(checkpoint, tmp_path):
    """A checkpoint that the test may change."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "model")


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def read(weights, entry) -> bytes:
    with open(weights.path(entry), "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def snapshot(folder) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.iterdir()}


def test_every_tensor_is_aligned_checksummed_and_what_the_checkpoint_holds(model, cache):
    weights = pack(model, cache)
    with open_checkpoint(model) as reader:
        spec = spec_from_config(reader.config, "float32")
        stored = [(-1, tensor) for tensor in spec.embedding_tensors()]
        stored += [(layer, tensor) for layer in range(spec.num_layers) for tensor in spec.layer_tensors(layer)]
        stored += [(spec.num_layers, tensor) for tensor in spec.head_tensors()]
        assert set(weights.entries) == {(layer, tensor.name) for layer, tensor in stored}
        for layer, tensor in stored:
            entry = weights.entry(layer, tensor.name)
            expected = tensor.build([reader.read(source, torch.float32) for source in tensor.sources])
            data = read(weights, entry)
            assert data == expected.numpy().tobytes()
            assert entry.crc32 == zlib.crc32(data)
            assert entry.offset % PAGE_BYTES == 0
            assert entry.shape == tensor.shape
    files = {entry.file for entry in weights.entries.values()}
    assert files == {"embedding.bin", "layer-0000.bin", "layer-0001.bin", "layer-0002.bin", "head.bin"}
    assert all((weights.folder / file).stat().st_size % PAGE_BYTES == 0 for file in files)
    weights.verify()


@pytest.mark.parametrize("after", [0, 2])
def test_a_disk_that_fills_meanwhile_ends_in_words_and_gives_its_room_back(model, cache, monkeypatch, after):
    fsync, count = os.fsync, 0

    def refuse(descriptor):
        nonlocal count
        count += 1
        if count > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(ExecutionError, match=r"packing the weights into .* failed: No space left") as caught:
        pack(model, cache)
    assert "--disk-dir" in caught.value.hint
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.undo()
    pack(model, cache).verify()


def test_a_second_run_reuses_the_cache(model, cache):
    before = snapshot(pack(model, cache).folder)
    assert snapshot(pack(model, cache).folder) == before


def test_each_dtype_has_its_own_folder(model, cache):
    wide, narrow = pack(model, cache), pack(model, cache, dtype="bfloat16")
    assert wide.folder != narrow.folder
    assert wide.folder.exists()
    assert (narrow.dtype, wide.dtype) == ("bfloat16", "float32")
    assert narrow.entry(0, "qkv.weight").nbytes * 2 == wide.entry(0, "qkv.weight").nbytes


def test_a_changed_checkpoint_is_packed_again_and_the_stale_folder_goes(model, cache):
    first = pack(model, cache)
    other = pack(model, cache, name="neighbour")
    path = model / "model.safetensors"
    os.utime(path, ns=(1, 1))
    second = pack(model, cache)
    assert second.folder != first.folder
    assert not first.folder.exists()
    assert other.folder.exists(), "another model's folder stays"
    second.verify()


def test_names_with_wildcards_only_remove_their_own_folders(model, cache):
    stale = pack(model, cache, name="m[1]")
    plain = pack(model, cache, name="m1")
    os.utime(model / "model.safetensors", ns=(1, 1))
    pack(model, cache, name="m[1]").verify()
    assert not stale.folder.exists()
    assert plain.folder.exists()


class Crash(BaseException):
    """Not an Exception, as a kill is none."""


@pytest.mark.parametrize("reads", [0, 1, 7, 20])
def test_a_crash_while_reading_leaves_nothing_valid(model, cache, reads):
    with open_checkpoint(model) as reader:
        spec = spec_from_config(reader.config, "float32")
        whole, left = reader.read, reads

        def failing(name, dtype):
            nonlocal left
            if not left:
                raise Crash
            left -= 1
            return whole(name, dtype)

        reader.read = failing
        with pytest.raises(Crash):
            open_packed(reader, spec, cache, name="m", progress=False)
    assert not list(cache.glob("m-float32-*")), "nothing under the final name"
    weights = pack(model, cache)
    weights.verify()
    assert not list(cache.glob(".*.partial"))


@pytest.mark.parametrize("call", ["rename", "fsync"])
def test_a_crash_before_the_rename_leaves_nothing_valid(model, cache, monkeypatch, call):
    def crash(*_):
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(packed_module.os, call, crash)
        with pytest.raises(Crash):
            pack(model, cache)
    assert not list(cache.glob("m-float32-*"))
    pack(model, cache).verify()


def edit(folder, change):
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / MANIFEST).write_text("{"),
        lambda folder: (folder / MANIFEST).write_bytes(b"\xff\xfe"),
        lambda folder: (folder / MANIFEST).write_text("[]"),
        lambda folder: (folder / MANIFEST).unlink(),
        lambda folder: edit(folder, lambda document: document["body"]["tensors"][0].__setitem__(3, 4096)),
        lambda folder: edit(folder, lambda document: document.pop("sha256")),
        lambda folder: os.truncate(folder / "layer-0001.bin", 4096),
        lambda folder: (folder / "head.bin").unlink(),
        lambda folder: os.truncate(folder / "embedding.bin", (folder / "embedding.bin").stat().st_size + 1),
    ],
    ids=["text", "bytes", "list", "absent", "edited", "unsigned", "truncated", "no-file", "longer"],
)
def test_a_damaged_cache_is_packed_again(model, cache, damage):
    weights = pack(model, cache)
    damage(weights.folder)
    again = pack(model, cache)
    assert again.folder == weights.folder
    again.verify()


def test_verify_names_the_file_and_the_tensor_of_a_flipped_byte(model, cache):
    weights = pack(model, cache)
    entry = weights.entry(1, "down.weight")
    with open(weights.path(entry), "r+b") as file:
        file.seek(entry.offset + 5)
        byte = file.read(1)
        file.seek(entry.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(CheckpointError, match=r"layer-0001\.bin: tensor down\.weight") as error:
        weights.verify()
    assert str(weights.folder) in error.value.hint


def test_verify_notices_a_file_that_ends_early(model, cache):
    weights = pack(model, cache)
    os.truncate(weights.folder / "head.bin", 100)
    with pytest.raises(CheckpointError, match=r"head\.bin"):
        weights.verify()


def test_a_bad_checkpoint_is_refused_before_anything_is_written(model, cache):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": 78}))
    with pytest.raises(CheckpointError, match="gate_proj"):
        pack(model, cache)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_disk_too_small_is_refused_before_anything_is_written(model, cache, monkeypatch):
    monkeypatch.setattr(packed_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 16))
    with pytest.raises(BudgetError, match=r"which has 64\.0 KiB free") as error:
        pack(model, cache)
    assert "--disk-dir" in error.value.hint
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


PACK_AT_ONCE = """
import pathlib, sys, time
from flexrun.models.families import spec_from_config
from flexrun.weights.packed import open_packed
from flexrun.weights.readers import open_checkpoint

model, cache, number = sys.argv[1:]
ready = pathlib.Path(cache).parent / "ready"
ready.mkdir(exist_ok=True)
(ready / number).touch()
while len(list(ready.iterdir())) < 2:
    time.sleep(0.002)
with open_checkpoint(pathlib.Path(model)) as reader:
    weights = open_packed(reader, spec_from_config(reader.config, "float32"), cache, name="m", progress=False)
weights.verify()
print(weights.folder, sorted((path.name, path.stat().st_ino) for path in weights.folder.iterdir()))
"""


def test_two_processes_at_once_share_one_cache(model, cache):
    command = [sys.executable, "-c", PACK_AT_ONCE, str(model), str(cache)]
    root = Path(packed_module.__file__).parents[2]
    workers = [
        subprocess.Popen([*command, str(number)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root)
        for number in range(2)
    ]
    answers = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], answers
    assert answers[0][0] == answers[1][0], "the second waited and reused what the first wrote"
    assert len(list(cache.glob("m-float32-????????????????"))) == 1


# Compressed ----------------------------------------------------------------------------------------------


def pack_compressed(folder, cache_dir, bits):
    with open_checkpoint(folder) as reader:
        spec = spec_from_config(reader.config, "float32")
        return spec, open_packed(reader, spec, cache_dir, name="m", progress=False, bits=bits)


def test_compressed_matrices_are_those_quantised_from_the_checkpoint(model, cache):
    bits = WeightBits(4, ("layers.0.*=8",))
    spec, weights = pack_compressed(model, cache, bits)
    _, again = pack_compressed(model, cache, bits)
    plain = pack(model, cache)
    assert again.folder == weights.folder != plain.folder and plain.folder.exists()
    weights.verify()
    for (layer, name), entry in weights.entries.items():
        before = plain.entry(layer, name)
        tensor = next(each for place, each in spec.tensors_by_layer() if (place, each.name) == (layer, name))
        assert entry.form == bits.of(layer, tensor) and entry.offset % PAGE_BYTES == 0
        data = read(weights, entry)
        if entry.form is None:
            assert data == read(plain, before)
            continue
        assert entry.form.bits == (8 if layer == 0 else 4)
        matrix = torch.frombuffer(bytearray(read(plain, before)), dtype=torch.float32).view(tensor.shape)
        assert data == quantise(matrix, entry.form).numpy().tobytes()


def test_other_bits_are_packed_again(model, cache):
    first = pack_compressed(model, cache, WeightBits(4))[1]
    second = pack_compressed(model, cache, WeightBits(4, ("*.down_proj=8",)))[1]
    assert second.folder != first.folder and not first.folder.exists()
    assert pack_compressed(model, cache, WeightBits(8))[1].folder != second.folder and second.folder.exists()


def test_weights_that_are_no_numbers_are_refused_by_name(model, cache):
    file = next(model.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(each for each in tensors if each.endswith("layers.1.mlp.down_proj.weight"))
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight holds NaN"):
        pack_compressed(model, cache, WeightBits(4))
    assert not list(cache.glob("m-float32-w4-*"))
