"""FP8 and MXFP4 checkpoints: the values of transformers' own conversion, read expert by expert in little memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flexrun.errors import CheckpointError, UnsupportedError
from flexrun.models.quantization import check_quantization
from flexrun.weights import quantized
from flexrun.weights.safetensors_reader import SafetensorsReader

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}


@pytest.fixture
def open_reader(tmp_path):
    """open_reader(quantization_config, tensors) -> SafetensorsReader of a checkpoint that holds them."""
    readers = []

    def build(settings: dict, tensors: dict) -> SafetensorsReader:
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": settings}))
        save_file(tensors, tmp_path / "model.safetensors")
        readers.append(SafetensorsReader(tmp_path))
        return readers[-1]

    yield build
    for reader in readers:
        reader.close()


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fp8(rows: int, columns: int, block=(128, 128), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix of every finite e4m3 value, and factors that differ from block to block."""
    codes = torch.randint(0, 256, (rows, columns), generator=generator(seed), dtype=torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # not a number
    grid = [-(-size // part) for size, part in zip((rows, columns), block)]
    return codes.view(torch.float8_e4m3fn), torch.rand(grid, generator=generator(seed + 1)) + 0.01


def mxfp4(experts: int, outputs: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=generator(seed), dtype=torch.uint8)
    scales = torch.randint(110, 135, (experts, outputs, inputs // 32), generator=generator(seed + 1), dtype=torch.uint8)
    return blocks, scales


def by_definition(weight: torch.Tensor, factors: torch.Tensor, block=(128, 128)) -> torch.Tensor:
    """float64: each weight times the factor of the block it lies in."""
    row = torch.arange(weight.shape[0]) // block[0]
    column = torch.arange(weight.shape[1]) // block[1]
    return weight.float().double() * factors.double()[row[:, None], column]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fp8_is_what_transformers_makes_of_it(open_reader, dtype):
    weight, factors = fp8(384, 256)
    reader = open_reader(FP8, {"a.weight": weight, "a.weight_scale_inv": factors, "b.weight": torch.ones(2, 3)})
    expected = Fp8Dequantize(None)._dequantize_one(weight, factors, dtype)
    assert reader.names() == {"a.weight", "b.weight"}
    assert reader.shape("a.weight") == (384, 256)
    assert reader.refusal("a.weight") is None
    found = reader.read("a.weight", dtype)
    assert found.is_contiguous() and torch.equal(found, expected)
    assert torch.equal(reader.read("b.weight", dtype), torch.ones(2, 3, dtype=dtype))


@pytest.mark.parametrize(
    ("shape", "block"),
    [
        ((130, 257), (128, 128)),
        ((1, 1), (128, 128)),
        ((576, 70), (128, 128)),
        ((40, 90), (16, 32)),
        ((127, 128), (64, 128)),
    ],
    ids=str,
)
@pytest.mark.parametrize("staging_bytes", [1, 5000, 1 << 20])
def test_fp8_blocks_at_the_edges(open_reader, monkeypatch, shape, block, staging_bytes):
    monkeypatch.setattr(quantized, "STAGING_BYTES", staging_bytes)
    weight, factors = fp8(*shape, block)
    reader = open_reader({**FP8, "weight_block_size": list(block)}, {"w": weight, "w_scale_inv": factors})
    expected = by_definition(weight, factors, block)
    assert torch.equal(reader.read("w", torch.float32), expected.float())


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float8_e8m0fnu], ids=str)
def test_fp8_factors_of_other_dtypes(open_reader, scale_dtype):
    weight, factors = fp8(140, 40)
    factors = (factors * 8).to(scale_dtype)
    reader = open_reader(FP8, {"w": weight, "w_scale_inv": factors})
    assert torch.equal(reader.read("w", torch.float32), by_definition(weight, factors.float()).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("staging_bytes", [1, 200, 1 << 20])
def test_mxfp4_is_what_transformers_makes_of_it(open_reader, monkeypatch, dtype, staging_bytes):
    monkeypatch.setattr(quantized, "STAGING_BYTES", staging_bytes)
    blocks, scales = mxfp4(3, 10, 96)
    expected = convert_moe_packed_tensors(blocks, scales, dtype=dtype)
    reader = open_reader(MXFP4, {"gate_up_proj_blocks": blocks, "gate_up_proj_scales": scales, "x": torch.ones(2)})
    assert reader.names() == {"gate_up_proj", "x"}
    assert reader.shape("gate_up_proj") == tuple(expected.shape) == (3, 96, 10)
    whole = reader.read("gate_up_proj", dtype)
    assert whole.is_contiguous() and torch.equal(whole, expected)
    for expert in range(3):
        assert torch.equal(reader.read_part("gate_up_proj", expert, dtype), expected[expert])


def test_every_pair_of_4_bit_values(open_reader):
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 1, 16)
    scales = torch.full((1, 16, 1), 127, dtype=torch.uint8)
    (weights,) = open_reader(MXFP4, {"w_blocks": blocks, "w_scales": scales}).read("w", torch.bfloat16)
    values = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    values += [-value for value in values]
    pairs = weights.t().reshape(256, 2)
    assert pairs.tolist() == [[values[code % 16], values[code // 16]] for code in range(256)]


def test_scales_are_powers_of_two(open_reader):
    blocks = torch.full((1, 254, 1, 16), 0x22, dtype=torch.uint8)  # ones
    scales = torch.arange(254, dtype=torch.uint8).view(1, 254, 1)
    (weights,) = open_reader(MXFP4, {"w_blocks": blocks, "w_scales": scales}).read("w", torch.float32)
    assert weights[0].tolist() == [2.0 ** (code - 127) for code in range(254)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_entry_of_a_plain_stack(open_reader, dtype):
    stack = torch.randn(4, 3, 5, generator=generator())
    reader = open_reader({}, {"w": stack})
    for part in range(4):
        assert torch.equal(reader.read_part("w", part, dtype), stack[part].to(dtype))


def test_one_expert_takes_the_memory_of_one_expert(open_reader):
    """Buffers of torch are not traced, so what is read from the file and what is made of it are counted."""
    experts, outputs, inputs = 16, 256, 1024
    blocks, scales = mxfp4(experts, outputs, inputs)
    reader = open_reader(MXFP4, {"w_blocks": blocks, "w_scales": scales})
    read = []
    plain = reader._bytes
    reader._bytes = lambda name, offset, nbytes: read.append(nbytes) or plain(name, offset, nbytes)
    tracemalloc.start()
    reader.read_part("w", 7, torch.bfloat16)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert sum(read) == outputs * inputs // 2 + outputs * inputs // 32
    assert max(read) <= quantized.STAGING_BYTES


@pytest.mark.parametrize(
    ("settings", "tensors", "named"),
    [
        (FP8, {"w": fp8(4, 4)[0]}, "float8 without 'w_scale_inv'"),
        (FP8, {"w": fp8(129, 4)[0], "w_scale_inv": torch.ones(1, 1)}, "need [2, 1]"),
        (FP8, {"w": fp8(4, 4)[0], "w_scale_inv": torch.ones(1, 1, dtype=torch.int32)}, "scales stored as I32"),
        (FP8, {"w": fp8(4, 4)[0].view(2, 2, 4), "w_scale_inv": torch.ones(1, 1)}, "only matrices"),
        (FP8, {"w": torch.ones(4, 4).to(torch.float8_e5m2)}, "stored as F8_E5M2"),
        ({}, {"w": fp8(4, 4)[0]}, "stored as F8_E4M3"),
        (MXFP4, {"w_blocks": mxfp4(1, 2, 32)[0]}, "without 'w_scales'"),
        (MXFP4, {"w_blocks": mxfp4(1, 2, 32)[0], "w_scales": mxfp4(1, 2, 64)[1]}, "U8 [1, 2, 1] are needed"),
        (MXFP4, {"w_blocks": torch.zeros(1, 2, 1, 8, dtype=torch.uint8)}, "[experts, outputs, groups, 16]"),
    ],
)
def test_parts_that_do_not_fit_are_named(open_reader, settings, tensors, named):
    reader = open_reader(settings, tensors)
    assert named in reader.refusal("w")
    with pytest.raises(CheckpointError) as caught:
        reader.read("w", torch.float32)
    assert named in caught.value.message and "'w'" in caught.value.message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"bits": 4}, "None"),
        ({**FP8, "weight_block_size": None}, "weight_block_size None"),
        ({**FP8, "weight_block_size": [128]}, "weight_block_size [128]"),
        ({**FP8, "weight_block_size": [128, 0]}, "weight_block_size [128, 0]"),
        ({**FP8, "fmt": "e5m2"}, "fmt 'e5m2'"),
        ({**FP8, "activation_scheme": "static"}, "activation_scheme 'static'"),
    ],
)
def test_other_quantisations_are_refused_by_name(open_reader, settings, named):
    for refuses in (check_quantization, lambda given: open_reader(given, {"w": torch.ones(1)})):
        with pytest.raises(UnsupportedError) as caught:
            refuses(settings)
        assert named in caught.value.message
