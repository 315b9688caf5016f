"""The kernels under the address and undefined-behaviour sanitizers: built apart, run in a process of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("every_kernel.py")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Environment of a process that loads kernels built with FLEXRUN_SANITIZE=1."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc to build the kernels with sanitizers")
    runtime = subprocess.run(["gcc", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("gcc has no address sanitizer here")
    folder = tmp_path_factory.mktemp("sanitized")
    build = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder, "--build-temp", folder / "objects"]
    environment = os.environ | {"FLEXRUN_SANITIZE": "1", "CC": "gcc"}
    built = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    libraries = list(folder.glob("flexrun/native/_kernels*.so"))
    assert built.returncode == 0 and len(libraries) == 1, built.stdout + built.stderr
    return os.environ | {
        "FLEXRUN_NATIVE": str(libraries[0]),
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(ROOT),
    }


def run(environment, *arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_no_kernel_leaves_its_tensors(sanitized):
    process = run(sanitized)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "portable: passed" in process.stdout and "Sanitizer" not in process.stderr


@pytest.mark.parametrize("tensor", ["keys", "values", "query"])
def test_a_tensor_that_is_too_short_is_noticed(sanitized, tensor):
    process = run(sanitized, tensor)
    assert process.returncode != 0 and "AddressSanitizer: heap-buffer-overflow" in process.stderr, process.stderr
