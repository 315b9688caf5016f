"""A small made-up machine, as a document and as an object."""

import json

import pytest

from flexrun.hardware import Hardware, Processor, Rates, Transfer

RATES = Rates(4e11, 2e10, 1e10, 3e10, 2e11, half_width=100.0, sharpness=3.0)


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
        sources=("made up",),
    )


@pytest.fixture
def document(machine):
    """The same machine as a JSON value that a test may spoil."""
    return json.loads(machine.to_json())
