"""A small made-up machine, as a document and as an object; a measurement that takes a second."""

import json

import pytest

from flexrun.hardware import Hardware, Processor, Rates, Transfer, profiler
from flexrun.hardware.effort import KIB, MIB, Effort, Shape

RATES = Rates(4e11, 2e10, 1e10, 3e10, 2e11, half_width=100.0, sharpness=3.0, plain_weight_share=0.5)


@pytest.fixture
def machine():
    return Hardware(
        name="bench",
        cpu=Processor({"float32": RATES, "bfloat16": RATES}, step_overhead_seconds=5e-5),
        cpu_memory_bytes=16 << 30,
        disk_read=Transfer(2e9, 1e-4),
        disk_write=Transfer(1e9, 1e-4),
        host_copy=Transfer(9e9),
        gpu=Processor({"float16": RATES}),
        gpu_memory_bytes=8 << 30,
        h2d=Transfer(12e9, 1e-5),
        d2h=Transfer(11e9, 1e-5),
        duplex_share=0.8,
        cores=4,
        contention={"compute": {"disk_read": 0.9}},
        noise={"disk_read": 0.2},
        misfit={"disk_read": 0.03},
        sources=("made up",),
    )


@pytest.fixture
def document(machine):
    """The same machine as a JSON value that a test may spoil."""
    return json.loads(machine.to_json())


@pytest.fixture
def tiny_effort(monkeypatch):
    """So little that a measurement ends within a second or two: every reading is taken, none is exact."""
    monkeypatch.setattr(profiler, "cpu_cache_bytes", lambda: 0)
    return Effort(
        shapes=(Shape(128, 4, 2, 256), Shape(256, 4, 2, 512)),
        rows=(2, 32),
        pool_bytes=2 * MIB,
        reading_seconds=0.002,
        least_repeats=2,
        contention_seconds=0.015,
        file_bytes=16 * MIB,
        disk_seconds=1.0,
        copy_sizes=(64 * KIB, 16 * MIB),
        disk_sizes=(64 * KIB, 8 * MIB),
        link_sizes=(64 * KIB, 4 * MIB),
        context_tokens=32,
        vocabulary=2048,
        sampled_rows=8,
    )
