"""The library is optional, can be switched off, and shares torch's threads."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flexrun import native

OFF = """
import torch
from flexrun import native
from flexrun.attention import Segments, attend
assert not native.available and native.instruction_set == "none"
x = torch.ones(2, 8)
assert not native.rms_norm(x, None, 1e-5, 0.0, x) and not native.gated_activation(x, "silu", torch.ones(2, 4))
assert not native.select("portable") and not native.apply_rope(x[:, None], x, x)
out = attend(torch.ones(1, 2, 16), torch.ones(3, 1, 16), torch.ones(3, 1, 16), Segments([0], [1], [0], [3]), scale=1.0,
             out=torch.zeros(1, 2, 16))
assert torch.allclose(out, torch.ones(1, 2, 16))
"""


def test_switched_off_by_the_environment():
    environment = os.environ | {"FLEXRUN_NATIVE": "0"}
    subprocess.run([sys.executable, "-c", OFF], check=True, env=environment)


def test_a_library_of_another_layout_is_not_used(tmp_path):
    """Sources that were updated without a new build: the structs would be misread."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    library = tmp_path / "library.so"
    for source in ("int flexrun_layout(void) { return 1; }", "int flexrun_select(void) { return 0; }"):
        (tmp_path / "library.c").write_text(source)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "library.c"], check=True)
        code = "from flexrun import native; assert not native.available"
        subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"FLEXRUN_NATIVE": str(library)})


@pytest.mark.skipif(not native.available, reason="the native library is not built")
def test_an_unknown_instruction_set_changes_nothing():
    before = native.instruction_set
    assert not native.select("abacus") and native.instruction_set == before


@pytest.mark.skipif(not native.available or not Path("/proc/self/maps").exists(), reason="needs the library and Linux")
def test_one_openmp_runtime_is_shared_with_torch():
    files = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(files) == 1
