import os
import random

import gguf
import numpy
import pytest
import torch

from flexrun.errors import CheckpointError, FlexrunError
from flexrun.weights.gguf_reader import READABLE
from flexrun.weights.readers import check_tensors, open_checkpoint

MEANT = "model.layers.1.mlp.down_proj.weight"
STORED = "blk.1.ffn_down.weight"


def test_names_and_values_are_those_of_the_original(llama, gguf_file):
    state = llama.state_dict()
    with open_checkpoint(gguf_file(llama)) as reader:
        assert reader.names() == set(state)
        for name, tensor in state.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert torch.equal(reader.read(name, torch.float32), tensor), name
            assert torch.equal(reader.read(name, torch.bfloat16), tensor.bfloat16()), name
        check_tensors(reader, [(name, tuple(tensor.shape)) for name, tensor in state.items()])


def test_the_query_rows_really_were_interleaved(llama, gguf_file):
    """Otherwise the test above would also pass for a reader that does nothing."""
    path = gguf_file(llama)
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    original = llama.state_dict()["model.layers.0.self_attn.q_proj.weight"].numpy()
    assert not numpy.array_equal(stored["blk.0.attn_q.weight"], original)


def test_a_tensor_larger_than_the_staging_buffer_is_read_whole(llama, gguf_file, monkeypatch):
    monkeypatch.setattr("flexrun.weights.gguf_reader.CONVERT_ROWS_BYTES", 1000)  # 5 rows of 48 float32
    with open_checkpoint(gguf_file(llama)) as reader:
        for name, tensor in llama.state_dict().items():
            assert torch.equal(reader.read(name, torch.float32), tensor), name


def _random_blocks(kind: gguf.GGMLQuantizationType, rows: int, columns: int) -> numpy.ndarray:
    """[rows, bytes] uint8: valid quantised rows. The gguf package cannot quantise K-quants, so theirs are random."""
    generator = numpy.random.default_rng(int(kind))
    values = generator.standard_normal((rows, columns)).astype(numpy.float32)
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        raw = generator.integers(0, 256, (rows, columns // block_elements, block_bytes), dtype=numpy.uint8)
        scale = numpy.frombuffer(numpy.float16(0.03).tobytes(), numpy.uint8)
        for at in {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[kind.name]:
            raw[..., at : at + 2] = scale  # the block's own float16 factors; random ones would be NaN at times
        return raw.reshape(rows, -1)


@pytest.mark.parametrize("kind", sorted(READABLE))
def test_quantised_values_equal_those_of_the_gguf_package(kind, raw_gguf):
    kind = gguf.GGMLQuantizationType[kind]
    rows, columns = 6, 512
    plain = kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
    blocks = _random_blocks(kind, rows, columns)
    expected = blocks.astype(numpy.float32) if plain else gguf.quants.dequantize(blocks, kind)

    def build(writer):
        _minimal_llama(writer, hidden=columns, inner=rows)
        writer.add_tensor("blk.0.ffn_gate.weight", blocks, raw_dtype=None if plain else kind)

    with open_checkpoint(raw_gguf(build)) as reader:
        found = reader.read("model.layers.0.mlp.gate_proj.weight", torch.float32)
        assert found.shape == (rows, columns) and numpy.isfinite(expected).all() and expected.std() > 0
        assert numpy.array_equal(found.numpy(), expected)
        half = reader.read("model.layers.0.mlp.gate_proj.weight", torch.bfloat16)
        assert torch.equal(half, torch.from_numpy(expected).bfloat16())


def _minimal_llama(writer, hidden=32, inner=32):
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tensor("token_embd.weight", numpy.ones((7, hidden), numpy.float32))
    writer.add_tensor("blk.0.attn_output.weight", numpy.ones((hidden, hidden), numpy.float32))


def test_quantised_query_rows_are_put_in_order_too(raw_gguf):
    kind = gguf.GGMLQuantizationType.Q8_0
    stored = gguf.quants.quantize(numpy.random.default_rng(0).standard_normal((32, 32)).astype(numpy.float32), kind)

    def build(writer):
        _minimal_llama(writer)
        writer.add_tensor("blk.0.attn_q.weight", stored, raw_dtype=kind)

    values = gguf.quants.dequantize(stored, kind)
    expected = values.reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)  # 4 heads of 8 channels
    with open_checkpoint(raw_gguf(build)) as reader:
        found = reader.read("model.layers.0.self_attn.q_proj.weight", torch.float32).numpy()
    assert numpy.array_equal(found, expected)


def test_another_quantisation_is_refused_by_name_before_any_work(raw_gguf):
    def build(writer):
        _minimal_llama(writer, hidden=256)
        blocks = numpy.zeros((4, 136), numpy.uint8)
        writer.add_tensor("blk.0.ffn_gate.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)

    path = raw_gguf(build)
    name = "model.layers.0.mlp.gate_proj.weight"
    with open_checkpoint(path) as reader:
        with pytest.raises(CheckpointError, match="IQ4_XS") as caught:
            check_tensors(reader, [(name, (4, 256))])
        assert str(path) in str(caught.value) and name in str(caught.value)
        with pytest.raises(CheckpointError, match="IQ4_XS"):
            reader.read(name, torch.float32)


def test_a_truncated_file_names_itself_and_the_tensor(llama, gguf_file):
    path = gguf_file(llama)
    tensors = gguf.GGUFReader(path).tensors
    cut = next(tensor for tensor in tensors if tensor.name == STORED)
    with open(path, "r+b") as file:
        file.truncate(cut.data_offset + cut.n_bytes - 1)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value) and STORED in str(caught.value)


def test_a_file_cut_while_it_is_open_names_itself_and_the_tensor(llama, gguf_file):
    path = gguf_file(llama)
    with open_checkpoint(path) as reader:
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(CheckpointError) as caught:
            for name in sorted(reader.names()):
                reader.read(name, torch.float32)
        assert str(path) in str(caught.value) and "ended" in str(caught.value)


def test_wrong_shapes_and_missing_tensors_are_listed(llama, gguf_file):
    path = gguf_file(llama)
    with open_checkpoint(path) as reader:
        with pytest.raises(CheckpointError) as caught:
            check_tensors(reader, [(MEANT, (48, 81)), ("model.layers.1.mlp.down.weight", (1,))])
        message = str(caught.value)
        assert MEANT in message and "[48, 80]" in message and "[48, 81]" in message and str(path) in message
        assert "'model.layers.1.mlp.down.weight' is missing" in message and "did you mean" in message
        with pytest.raises(CheckpointError, match="missing"):
            reader.read("model.nothing.weight", torch.float32)


def test_rows_that_do_not_divide_into_heads_are_an_error(raw_gguf):
    def build(writer):
        _minimal_llama(writer)
        writer.add_tensor("blk.0.attn_q.weight", numpy.ones((9, 32), numpy.float32))

    with open_checkpoint(raw_gguf(build)) as reader, pytest.raises(CheckpointError, match="q_proj"):
        reader.read("model.layers.0.self_attn.q_proj.weight", torch.float32)


@pytest.mark.parametrize("damage", ["truncate", "flip"])
def test_no_damage_gives_anything_but_our_own_errors(damage, llama, gguf_file):
    path = gguf_file(llama, extra=lambda writer: writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"]))
    whole = path.read_bytes()
    header_bytes = min(tensor.data_offset for tensor in gguf.GGUFReader(path).tensors)
    generator = random.Random(damage)
    refused = 0
    for _ in range(60):
        data = bytearray(whole)
        if damage == "truncate":
            del data[generator.choice([generator.randrange(header_bytes), generator.randrange(len(data))]) :]
        else:
            data[generator.randrange(header_bytes)] ^= 1 << generator.randrange(8)
        path.write_bytes(data)
        try:
            with open_checkpoint(path) as reader:
                for name in reader.names():
                    reader.read(name, torch.float32)
        except FlexrunError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 20


def test_fingerprint_and_digest_follow_the_file(llama, gguf_file):
    path = gguf_file(llama)
    with open_checkpoint(path) as reader:
        first, digest = reader.fingerprint(), reader.digest()
        assert first == reader.fingerprint()
    os.utime(path, (1, 1))
    with open_checkpoint(path) as reader:
        assert reader.digest() == digest and reader.fingerprint() != first
        first = reader.fingerprint()
    with open_checkpoint(path.parent) as reader:  # a directory with one .gguf is that file
        assert reader.fingerprint() == first
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"\0\0\0\1")
    with open_checkpoint(path) as reader:
        assert reader.fingerprint() != first
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes(byte ^ 1 for byte in data[middle:]))
    with open_checkpoint(path) as reader:
        assert reader.digest() != digest
