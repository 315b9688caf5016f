"""Torch imported with threads that spin briefly: seen in processes of their own, for it happens once."""

import os
import subprocess
import sys

import pytest

# GNU's OpenMP shows what it has read when OMP_DISPLAY_ENV=verbose.
SHOWN = "GOMP_SPINCOUNT = "


def spin_rounds(code: str, **environment: str) -> int:
    rest = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    process = subprocess.run(
        [sys.executable, "-c", code + "; import os, torch; assert os.environ.get('GOMP_SPINCOUNT') in (None, '7')"],
        env={**rest, "OMP_DISPLAY_ENV": "verbose", **environment},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    lines = [line for line in process.stderr.splitlines() if SHOWN in line]
    if not lines:
        pytest.skip("torch came with another OpenMP than GNU's")
    return int(lines[0].split(SHOWN)[1].strip("'"))


@pytest.mark.parametrize("code", ["from flexrun import LLM", "from flexrun.openmp import import_torch; import_torch()"])
def test_threads_spin_briefly(code):
    assert spin_rounds(code) == 2000


def test_the_environment_comes_first():
    assert spin_rounds("from flexrun import LLM", GOMP_SPINCOUNT="7") == 7
    assert spin_rounds("from flexrun import LLM", OMP_WAIT_POLICY="passive") == 0


def test_a_torch_that_is_there_is_left_alone():
    assert spin_rounds("import torch; from flexrun import LLM") > 2000
