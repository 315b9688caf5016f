"""Hardware documents survive a round trip, and refuse by name whatever cannot be true."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from flexrun.errors import ConfigError
from flexrun.hardware import LANES, Hardware, LinearWork, Rates, Transfer

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "hardware").glob("*.json"))


def spoil(document, path, value):
    """Set (or with KeyError, delete) the dotted ``path`` of a JSON value."""
    *parents, last = path.split(".")
    for name in parents:
        document = document[name]
    if value is KeyError:
        del document[last]
    else:
        document[last] = value


def write(tmp_path, document):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(document))
    return path


def test_round_trip(machine, tmp_path):
    path = tmp_path / "deep" / "machine.json"
    machine.save(path)
    assert Hardware.load(path) == machine
    assert list(path.parent.iterdir()) == [path]  # nothing half-written is left


def test_a_document_needs_only_what_has_no_default(document, tmp_path):
    needed = ("name", "cpu", "cpu_memory_bytes", "disk_read", "disk_write", "host_copy")
    hardware = Hardware.load(write(tmp_path, {key: document[key] for key in needed}))
    assert hardware.gpu is None and hardware.duplex_share == 1.0 and hardware.sources == ()


@pytest.mark.parametrize(
    "path, value, complaint",
    [
        ("disk_raed", {"bytes_per_second": 1}, "unknown key 'disk_raed'"),
        ("cpu.rates.float32.sharpnes", 3, "cpu.rates.float32: unknown key 'sharpnes'"),
        ("cpu", KeyError, "'cpu' is missing"),
        ("h2d.bytes_per_second", KeyError, "h2d: 'bytes_per_second' is missing"),
        ("disk_read", 2e9, "disk_read: expected an object"),
        ("disk_read.bytes_per_second", "fast", "disk_read.bytes_per_second: expected a number"),
        ("disk_read.bytes_per_second", 0, "disk_read: bytes_per_second = 0"),
        ("disk_read.bytes_per_second", True, "disk_read.bytes_per_second: expected a number"),
        ("disk_read.latency_seconds", -1e-4, "disk_read: latency_seconds = -0.0001"),
        ("cpu.rates.float32.weight_bytes_per_second", float("nan"), "float32: weight_bytes_per_second = nan"),
        ("cpu.rates.float32.matmul_flops_per_second", float("inf"), "float32: matmul_flops_per_second = inf"),
        ("cpu.rates.float32.half_width", -1, "half_width = -1"),
        ("cpu.rates.float32.sharpness", 0.5, "sharpness = 0.5"),
        ("cpu.rates", {}, "cpu: rates is empty"),
        ("cpu.rates.float8", {}, "cpu.rates.float8: 'matmul_flops_per_second' is missing"),
        ("cpu.step_overhead_seconds", -1, "step_overhead_seconds = -1"),
        ("cpu_memory_bytes", 0, "cpu_memory_bytes = 0"),
        ("cpu_memory_bytes", 1.5, "cpu_memory_bytes: expected a whole number"),
        ("cpu_memory_bytes", float("nan"), "cpu_memory_bytes: expected a whole number"),
        ("gpu_memory_bytes", 0, "no gpu_memory_bytes"),
        ("d2h", None, "no d2h"),
        ("duplex_share", 0, "duplex_share = 0"),
        ("duplex_share", 1.1, "duplex_share = 1.1"),
        ("contention.compute.disk", 0.5, "contention of an unknown lane 'disk'"),
        ("contention.gpu", {"compute": 0.5}, "contention of an unknown lane 'gpu'"),
        ("contention.compute.h2d", 1.5, "contention.compute.h2d = 1.5"),
        ("noise.disk_read", -0.1, "noise.disk_read = -0.1"),
        ("sources", "a page", "sources: expected a list"),
        ("sources", [1], "sources[0]: expected a text"),
        ("name", 3, "name: expected a text"),
        ("noise", [], "noise: expected an object"),
    ],
)
def test_mistakes_are_named(document, tmp_path, path, value, complaint):
    spoil(document, path, value)
    file = write(tmp_path, document)
    with pytest.raises(ConfigError) as caught:
        Hardware.load(file)
    assert complaint in caught.value.message and str(file) in caught.value.message and caught.value.hint


def test_the_hint_of_a_misspelt_key_is_the_key(document, tmp_path):
    spoil(document, "disk_raed", None)
    with pytest.raises(ConfigError, match="did you mean 'disk_read'"):
        Hardware.load(write(tmp_path, document))


def test_rates_of_an_unknown_dtype_are_refused(document, tmp_path):
    spoil(document, "cpu.rates.float8", document["cpu"]["rates"]["float32"])
    with pytest.raises(ConfigError, match="unknown dtype 'float8'"):
        Hardware.load(write(tmp_path, document))


@pytest.mark.parametrize("text, complaint", [("{", "is not JSON"), ("[]", "expected an object")])
def test_files_that_are_no_document(tmp_path, text, complaint):
    path = tmp_path / "machine.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Hardware.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path, machine):
    with pytest.raises(ConfigError, match="does not exist"):
        Hardware.load(tmp_path / "none.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        Hardware.load(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        machine.save(tmp_path / "file" / "machine.json")


def test_an_absent_dtype_is_named(machine):
    with pytest.raises(ConfigError, match="no rates for float16"):
        machine.cpu.rates_of("float16")
    assert machine.gpu.rates_of("float16").sharpness == 3.0


def test_keeps(machine):
    assert machine.keeps("compute", "disk_read") == 0.9
    assert machine.keeps("disk_read", "compute") == machine.keeps("h2d", "host_copy") == 1.0
    assert "compute" in LANES


@pytest.mark.parametrize(
    "noise, misfit, disturbed",
    [({"disk_read": 0.9}, {}, False), ({"other programs": 0.4}, {}, True), ({}, {"cpu matmul float32": 0.6}, True)],
)
def test_a_disturbed_measurement_says_so(machine, noise, misfit, disturbed):
    assert replace(machine, noise=noise, misfit=misfit).disturbed is disturbed


def test_transfer_seconds():
    assert Transfer(1e9, 1e-3).seconds(2e9) == pytest.approx(2.001)


def test_linear_seconds_has_the_limits_it_claims():
    rates = Rates(1e12, 1e10, 1e30, 1e10, 1e11, half_width=1024.0, sharpness=4.0)
    work = LinearWork.of([(1024, 1024)])
    assert (work.weight_elements, work.width, work.activation_elements) == (1024**2, 1024.0, 2048)
    few, many = rates.linear_seconds(1, work, 2), rates.linear_seconds(100_000, work, 2)
    assert few == pytest.approx(2 * 1024**2 / 1e10, rel=1e-3)  # reading the weights
    assert many == pytest.approx(2 * 100_000 * 1024**2 / 0.5e12, rel=1e-3)  # half the rate at half_width
    corner = 2 * 1024**2 / 1e10 / (2 * 1024**2 / 0.5e12)
    assert rates.linear_seconds(corner, work, 2) == pytest.approx(few * 2**0.25, rel=1e-3)
    assert rates.linear_seconds(1, work, 2, weight_bytes=4 * 1024**2) == pytest.approx(2 * few, rel=1e-3)
    moving = Rates(1e30, 1e30, 1e9, 1e10, 1e11)
    assert moving.linear_seconds(10, work, 2) == pytest.approx(10 * 2048 * 2 / 1e9)


def test_linear_work_of_two_matrices_weighs_the_larger():
    work = LinearWork.of([(100, 400), (100, 100)])
    assert work.weight_elements == 50_000 and work.activation_elements == 700
    assert work.width == pytest.approx((40_000**1.5 + 10_000**1.5) / 50_000)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_machines_load_and_say_where_their_numbers_come_from(path):
    hardware = Hardware.load(path)
    assert len(hardware.sources) >= 4
    assert {"float32", "bfloat16", "float16"} <= set(hardware.cpu.rates)
    if hardware.gpu is not None:
        assert {"float32", "bfloat16", "float16"} <= set(hardware.gpu.rates)
        half, single = hardware.gpu.rates_of("float16"), hardware.gpu.rates_of("float32")
        assert half.matmul_flops_per_second > single.matmul_flops_per_second
        assert hardware.gpu.rates_of("float16").weight_bytes_per_second > hardware.h2d.bytes_per_second


def test_the_usual_machines_are_shipped():
    machines = {"t4-gcp-208gb", "a5000-512gb", "l4-gcp", "rtx-4090", "a100-80gb", "h200", "laptop-cpu"}
    assert machines <= {path.stem for path in CONFIGS}
