import json
import os
import random
import shutil
import struct

import pytest
import torch
from safetensors.torch import save_file

from flexrun.errors import CheckpointError
from flexrun.weights.readers import check_tensors, open_checkpoint
from flexrun.weights.safetensors_reader import INDEX_NAME

FILE = "model.safetensors"
NAME = "layers.0.weight"


def write(folder, tensors, file=FILE):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    save_file(tensors, folder / file, metadata={"format": "pt"})
    return folder


def write_raw(folder, header: dict | bytes, data: bytes = b""):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / FILE).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return folder


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        NAME: torch.randn(7, 5, generator=generator),
        "layers.0.bias": torch.randn(7, generator=generator).bfloat16(),
        "layers.1.weight": torch.randn(3, 2, 4, generator=generator).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "wide": torch.randn(5, 2, generator=generator).double(),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_converted_and_contiguous(tensors, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr("flexrun.weights.safetensors_reader.CONVERT_ROWS_BYTES", 32)  # several pieces a tensor
    with open_checkpoint(write(tmp_path, tensors)) as reader:
        assert reader.names() == set(tensors)
        for name, tensor in tensors.items():
            found = reader.read(name, dtype)
            assert found.is_contiguous() and reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(found, tensor.to(dtype)), name


def shard(folder, tensors):
    names = list(tensors)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, inside in files.items():
        write(folder, {name: tensors[name] for name in inside}, file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder, weight_map


def test_shards_read_as_one(tensors, tmp_path):
    folder, weight_map = shard(tmp_path, tensors)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    with open_checkpoint(folder) as reader:
        assert reader.generation_config == {"eos_token_id": [1, 2]}
        for name, tensor in tensors.items():
            assert torch.equal(
                reader.read(name, tensor.dtype if name != "wide" else torch.float32),
                tensor.to(tensor.dtype if name != "wide" else torch.float32),
            )
            assert reader.file_of(name).name == weight_map[name]


def test_a_missing_shard_names_itself_and_a_tensor(tensors, tmp_path):
    folder, weight_map = shard(tmp_path, tensors)
    (folder / weight_map[NAME]).unlink()
    with pytest.raises(CheckpointError, match="shard is missing") as caught:
        open_checkpoint(folder)
    assert str(folder / weight_map[NAME]) in str(caught.value) and NAME in str(caught.value)


def test_a_tensor_that_only_the_index_knows_is_named(tensors, tmp_path):
    folder, weight_map = shard(tmp_path, tensors)
    weight_map["layers.9.weight"] = weight_map[NAME]
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"layers\.9\.weight.*not in this file"):
        open_checkpoint(folder)


@pytest.mark.parametrize("shard_name", ["../secret.safetensors", "/etc/passwd", 7])
def test_an_index_cannot_point_outside_the_directory(shard_name, tensors, tmp_path):
    folder, weight_map = shard(tmp_path, tensors)
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": {**weight_map, NAME: shard_name}}))
    with pytest.raises(CheckpointError, match="outside the directory"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("header", "data", "complaint"),
    [
        ({NAME: entry()}, bytes(23), "truncated"),
        ({NAME: entry()}, bytes(25), "follow the last tensor"),
        ({NAME: entry(offsets=(0, 20))}, bytes(20), "needs 24"),
        ({NAME: entry(shape=(2, -3))}, bytes(24), "damaged header entry"),
        ({NAME: entry(shape=(True, 6))}, bytes(24), "damaged header entry"),
        ({NAME: {"dtype": "F32"}}, bytes(24), "damaged header entry"),
        ({NAME: 5}, b"", "damaged header entry"),
        ({NAME: entry(dtype="F7")}, bytes(24), "unknown dtype 'F7'"),
        ({"a": entry(), NAME: entry(offsets=(28, 52))}, bytes(52), "gap or overlaps"),
        ({"a": entry(), NAME: entry(offsets=(20, 44))}, bytes(44), "gap or overlaps"),
    ],
)
def test_a_bad_header_entry_names_file_and_tensor(header, data, complaint, tmp_path):
    write_raw(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)
    assert NAME in str(caught.value) or "follow" in complaint


@pytest.mark.parametrize(
    "header",
    [b'{"a"', b"[1]", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 5000],
    ids=["cut", "list", "bytes", "twice", "deep"],
)
def test_a_header_that_is_no_header_names_the_file(header, tmp_path):
    write_raw(tmp_path, header)
    with pytest.raises(CheckpointError, match="damaged header") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / FILE) in str(caught.value)


def test_eight_bit_floats_are_refused_by_name_only_when_they_are_needed(tmp_path):
    write_raw(tmp_path, {NAME: entry("F8_E4M3", (4, 2), (0, 8)), "ok": entry("F32", (1,), (8, 12))}, bytes(12))
    with open_checkpoint(tmp_path) as reader:
        check_tensors(reader, [("ok", (1,))])
        with pytest.raises(CheckpointError, match="F8_E4M3") as caught:
            check_tensors(reader, [(NAME, (4, 2))])
        assert str(tmp_path / FILE) in str(caught.value) and NAME in str(caught.value)
        with pytest.raises(CheckpointError, match="F8_E4M3"):
            reader.read(NAME, torch.float32)


def test_check_tensors_lists_what_is_missing_and_misshapen(tensors, tmp_path):
    with open_checkpoint(write(tmp_path, tensors)) as reader:
        check_tensors(reader, [(name, tuple(tensor.shape)) for name, tensor in tensors.items()])
        with pytest.raises(CheckpointError) as caught:
            check_tensors(reader, [("layers.0.wieght", (7, 5)), (NAME, (5, 7))])
    message = str(caught.value)
    assert "'layers.0.wieght' is missing" in message and f"did you mean '{NAME}'" in message
    assert f"{tmp_path / FILE}: tensor '{NAME}' has shape [7, 5], the config needs [5, 7]" in message


def test_many_complaints_are_counted_not_listed(tensors, tmp_path):
    with open_checkpoint(write(tmp_path, tensors)) as reader, pytest.raises(CheckpointError, match="and 92 more"):
        check_tensors(reader, [(f"layers.{layer}.missing", (1,)) for layer in range(100)])


def test_a_config_is_needed_and_must_be_json(tensors, tmp_path):
    write(tmp_path, tensors)
    (tmp_path / "config.json").write_text("{no")
    with pytest.raises(CheckpointError, match=r"config\.json.*JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_no_damage_gives_anything_but_a_checkpoint_error(damage, tensors, tmp_path):
    path = write(tmp_path, tensors) / FILE
    whole = path.read_bytes()
    header_bytes = 8 + int.from_bytes(whole[:8], "little")
    generator = random.Random(damage)
    refused = 0
    for _ in range(80):
        data = bytearray(whole)
        if damage == "truncate":
            del data[generator.randrange(len(data)) :]
        else:
            data[generator.randrange(header_bytes)] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            with open_checkpoint(tmp_path) as reader:
                for name in reader.names():
                    if reader.refusal(name) is None:
                        reader.read(name, torch.float32)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused == 80 if damage == "truncate" else refused > 30


def test_a_file_cut_while_it_is_open_is_noticed(tensors, tmp_path):
    path = write(tmp_path, tensors) / FILE
    with open_checkpoint(tmp_path) as reader:
        os.truncate(path, path.stat().st_size - 1)
        last = max(tensors, key=lambda name: reader._tensors[name].offset_bytes)
        with pytest.raises(CheckpointError, match="ended 1 bytes early") as caught:
            reader.read(last, torch.float32)
    assert str(path) in str(caught.value) and last in str(caught.value)


def test_the_fingerprint_follows_config_and_files(tensors, tmp_path):
    def fingerprint():
        with open_checkpoint(tmp_path) as reader:
            return reader.fingerprint()

    write(tmp_path, tensors)
    first = fingerprint()
    assert fingerprint() == first
    (tmp_path / "config.json").write_text('{"rope_theta": 5}')
    second = fingerprint()
    status = (tmp_path / FILE).stat()
    os.utime(tmp_path / FILE, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    third = fingerprint()
    os.utime(tmp_path / FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert fingerprint() == second
    assert len({first, second, third}) == 3


def test_the_digest_is_that_of_a_copy_and_not_of_weights_trained_further(tmp_path):
    def digest(tensors, name, **config):
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / FILE)
        (folder / "config.json").write_text(json.dumps(config))
        with open_checkpoint(folder) as reader:
            return reader.digest()

    before = {f"{layer}.weight": torch.full((512, 512), float(layer)) for layer in range(16)}
    after = {**before, "7.weight": before["7.weight"] + 0.25}  # one matrix of 16, and neither names nor sizes
    first = digest(before, "first")
    os.utime(shutil.copytree(tmp_path / "first", tmp_path / "copy") / FILE, (1, 1))
    with open_checkpoint(tmp_path / "copy") as reader:
        assert reader.digest() == first
    others = [digest(after, "after"), digest({**before, "x": torch.ones(1)}, "more"), digest(before, "other", theta=5)]
    assert len({first, *others}) == 4


def test_reading_keeps_little_more_than_the_tensor_in_memory(tmp_path):
    """A mapped file would grow the resident set by all that was read."""
    import psutil

    tensors = {f"layers.{layer}": torch.zeros(1 << 21, dtype=torch.bfloat16) for layer in range(24)}
    write(tmp_path, tensors)
    del tensors
    process = psutil.Process()
    with open_checkpoint(tmp_path) as reader:
        reader.read("layers.0", torch.float32)
        before = process.memory_info().rss
        for layer in range(24):
            reader.read(f"layers.{layer}", torch.float32)
        assert process.memory_info().rss - before < 32 << 20  # the files are 96 MiB


def test_reads_of_many_threads_do_not_mix(tensors, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    folder, _ = shard(tmp_path, tensors)
    names = list(tensors) * 20
    with open_checkpoint(folder) as reader, ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(lambda name: reader.read(name, torch.float32), names)):
            assert torch.equal(found, tensors[name].float())
