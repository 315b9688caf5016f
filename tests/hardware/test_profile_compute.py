"""What is timed is what the engine runs: its layouts, its functions, weights that no cache holds."""

import numpy
import pytest
import torch

from flexrun.attention import attend
from flexrun.hardware import profile_compute
from flexrun.hardware.effort import Bench, Shape
from flexrun.hardware.profile_compute import MODULES, Pool, decode_call, layer_spec, module_call, packer, prefill_call
from flexrun.models.ops import can_pack

CPU = torch.device("cpu")
SHAPE = Shape(128, 4, 2, 256)


@pytest.fixture
def bench(tiny_effort):
    return Bench(tiny_effort)


@pytest.mark.parametrize("module", MODULES)
def test_copies_share_nothing_and_use_up_the_pool(module):
    spec = layer_spec(SHAPE, "float32")
    pool = Pool(1 << 20, torch.float32, CPU)
    copies = pool.module_copies(spec, module, None)
    matrices = [tensor for weights in copies for tensor in weights.values() if tensor.ndim == 2]
    used = sum(matrix.numel() for matrix in matrices)
    assert len({matrix.data_ptr() for matrix in matrices}) == len(matrices)
    assert used == len(copies) * profile_compute.work_of(spec, module).weight_elements
    assert pool.elements - used < profile_compute.work_of(spec, module).weight_elements


def test_resident_matrices_are_packed_where_the_engine_packs_them(bench):
    spec = layer_spec(SHAPE, "bfloat16")
    pack = packer(bench, spec)
    assert (pack is not None) == can_pack(torch.bfloat16) and packer(bench, layer_spec(SHAPE, "float16")) is None
    if pack is not None:
        copies = Pool(1 << 20, torch.bfloat16, CPU).module_copies(spec, "mlp", pack)
        assert copies[0]["down.weight"].is_mkldnn and not copies[0]["mlp_norm.weight"].is_mkldnn


def test_calls_take_the_copies_in_turn(monkeypatch):
    seen = []
    monkeypatch.setattr(
        profile_compute.decoder, "attention_output", lambda spec, layer, weights, attended: seen.append(weights)
    )
    spec = layer_spec(SHAPE, "float32")
    copies = Pool(1 << 18, torch.float32, CPU).module_copies(spec, "attention_output", None)
    call = module_call(spec, "attention_output", copies, 3, CPU)
    for _ in range(len(copies) + 1):
        call()
    assert len(copies) == 4 and [id(each) for each in seen] == [id(each) for each in (*copies, copies[0])]


def test_shapes_that_need_too_much_memory_are_left_out(bench, monkeypatch):
    taken = []

    def fit(readings, overheads, dtype_bytes):
        taken.extend(readings)
        return original(readings, overheads, dtype_bytes)

    original = profile_compute.fit_linear
    monkeypatch.setattr(profile_compute, "fit_linear", fit)
    with torch.inference_mode():
        profile_compute.linear_fit(bench, "float32", 1 << 20)
    assert {reading.work.width for reading in taken if reading.module == "attention_output"} == {128.0}
    assert {reading.module for reading in taken} == set(MODULES) and {reading.rows for reading in taken} == {2, 32}


def captured(monkeypatch, call):
    """The arguments with which a call attends."""
    seen = {}

    def spy(query, keys, values, segments, **settings):
        seen.update(query=query, keys=keys, segments=segments)
        return attend(query, keys, values, segments, **settings)

    monkeypatch.setattr(profile_compute, "attend", spy)
    assert call().isfinite().all()
    return seen


def test_decoding_reads_all_the_kv_it_is_charged_for(monkeypatch):
    pool = Pool(1 << 20, torch.float32, CPU)
    seen = captured(monkeypatch, decode_call(pool, 8, 2, 64, 6, 20))
    assert seen["query"].shape == (6, 8, 64) and seen["keys"].shape == (120, 2, 64)
    assert seen["segments"].kv_len.tolist() == [20] * 6 and seen["segments"].query_len.tolist() == [1] * 6
    assert numpy.diff(seen["segments"].kv_start).tolist() == [20] * 5


def test_prompts_attend_themselves(monkeypatch):
    pool = Pool(1 << 20, torch.float32, CPU)
    seen = captured(monkeypatch, prefill_call(pool, 8, 2, 64, 3, 20))
    assert seen["query"].shape == (60, 8, 64)
    assert seen["segments"].query_len.tolist() == seen["segments"].kv_len.tolist() == [20] * 3
