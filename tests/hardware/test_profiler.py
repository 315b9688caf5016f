"""A measurement covers every lane and dtype, leaves nothing on the disk, and describes this machine plausibly."""

import json
import time

import pytest
import torch

from flexrun.errors import ConfigError
from flexrun.hardware import LANES, Hardware
from flexrun.hardware.identity import fingerprint
from flexrun.hardware.profiler import PAIRS, measure


def test_everything_is_measured(tiny_effort, tmp_path):
    threads = torch.get_num_threads()
    hardware = Hardware.measure(tmp_path / "new", effort=tiny_effort)
    assert list((tmp_path / "new").iterdir()) == []
    assert torch.get_num_threads() == threads
    assert set(hardware.cpu.rates) == {"float32", "bfloat16"}
    assert hardware.cpu.step_overhead_seconds > 0 and hardware.cpu.sample_element_seconds >= 0
    assert hardware.fingerprint == fingerprint() and hardware.measured and hardware.name
    assert hardware.disk_folder == str(tmp_path / "new")
    assert hardware.cpu_memory_bytes > 1 << 20 and hardware.disk_bytes > 0 and 0 < hardware.duplex_share <= 1
    lanes = {"disk_read", "disk_write", "host_copy"}
    kinds = {f"cpu matmul {dtype}" for dtype in hardware.cpu.rates}
    assert lanes | kinds <= set(hardware.misfit)
    assert lanes | kinds | {"other programs", "cpu decode attention float32"} <= set(hardware.noise)
    if hardware.gpu is None:
        for lane, beside in PAIRS:
            assert 0 < hardware.keeps(lane, beside) <= 1 and beside in hardware.contention[lane]
            assert lane in hardware.contention[beside]
    assert set(hardware.contention) <= set(LANES)


def test_a_measurement_survives_its_document(tiny_effort, tmp_path):
    hardware = Hardware.measure(tmp_path, effort=tiny_effort, dtypes=("float32",))
    hardware.save(tmp_path / "hardware.json")
    assert Hardware.load(tmp_path / "hardware.json") == hardware and set(hardware.cpu.rates) == {"float32"}
    speed = json.loads(hardware.to_json())["disk_read"]["bytes_per_second"]
    assert speed == float(f"{speed:.4g}")  # no more digits than a reading has


def test_an_unknown_dtype_is_refused(tiny_effort, tmp_path):
    with pytest.raises(ConfigError, match="float61"):
        Hardware.measure(tmp_path, effort=tiny_effort, dtypes=("float61",))


def test_the_bar_names_the_stages(tiny_effort, tmp_path):
    class Terminal:
        encoding = "utf-8"

        def __init__(self):
            self.text = ""

        def write(self, text):
            self.text += text

        def flush(self):
            pass

    terminal = Terminal()
    measure(tmp_path, tiny_effort, progress=True, dtypes=("float32",), stream=terminal)
    for stage in ("disk read", "host copy", "cpu float32 matmul, width 256", "lanes at once"):
        assert stage in terminal.text


@pytest.mark.timed
@pytest.mark.slow
def test_a_quick_measurement_is_plausible_and_quick(tmp_path):
    start_seconds = time.perf_counter()
    hardware = Hardware.measure(tmp_path, quick=True)
    assert time.perf_counter() - start_seconds < 60  # some 8 s on an idle machine with two cores
    assert 1e9 < hardware.host_copy.bytes_per_second < 1e12
    assert 1e7 < hardware.disk_read.bytes_per_second < 1e11
    for rates in hardware.cpu.rates.values():
        assert 1e9 < rates.matmul_flops_per_second < 1e15
        assert 1e9 < rates.decode_kv_bytes_per_second < 2e12
        assert 1e9 < rates.prefill_attention_flops_per_second < 1e15
    assert 1e-6 < hardware.cpu.step_overhead_seconds < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_and_its_links_are_measured(tiny_effort, tmp_path):
    hardware = Hardware.measure(tmp_path, effort=tiny_effort)
    assert set(hardware.gpu.rates) == {"float32", "bfloat16", "float16"}
    assert hardware.gpu_memory_bytes > 1 << 30
    assert hardware.h2d.bytes_per_second > 1e9 and hardware.d2h.bytes_per_second > 1e9
    assert 0.3 < hardware.duplex_share <= 1
    assert 0 < hardware.keeps("host_attention", "h2d") <= 1
