"""Package metadata and the optional native extension (a failing C build never fails the installation).

``FLEXRUN_SANITIZE=1`` compiles the kernels with the address and undefined-behaviour sanitizers: see CONTRIBUTING.md.
"""

import os
import re
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup

HERE = Path(__file__).parent
version = re.search(r'^__version__ = "([^"]+)"', (HERE / "flexrun/__init__.py").read_text(), re.MULTILINE).group(1)
readme = HERE / "README.md"

compile_arguments = ["-std=gnu11", "-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-g0"]
link_arguments = ["-lm"]
if sys.platform == "linux":
    compile_arguments.append("-fopenmp")
    link_arguments.append("-fopenmp")
if os.environ.get("FLEXRUN_SANITIZE") == "1":
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    compile_arguments += [*sanitizers, "-O1", "-g1", "-fno-omit-frame-pointer"]
    link_arguments += sanitizers

kernels = Extension(
    "flexrun.native._kernels",
    sources=sorted(glob("flexrun/native/*.c")),
    depends=sorted(glob("flexrun/native/*.h")),
    extra_compile_args=compile_arguments,
    extra_link_args=link_arguments,
    optional=True,
)

triton = 'triton; sys_platform == "linux" and platform_machine == "x86_64"'  # whose interpreter runs the GPU's kernel
test = ["pytest", "pytest-xdist", "hypothesis", "transformers", "accelerate", "ruff", "zstandard>=0.19", triton]

setup(
    name="flexrun",
    version=version,
    description="Single-GPU offloading throughput runner for large language models",
    long_description=readme.read_text() if readme.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["flexrun", "flexrun.*"]),
    package_data={"flexrun.native": ["*.c", "*.h"]},
    ext_modules=[kernels],
    install_requires=[
        "torch",
        "numpy",
        "scipy",
        "pulp>=3.3,<4",
        "safetensors",
        "psutil",
        "tqdm",
        "tokenizers",
        "jinja2",
        "gguf",
    ],
    extras_require={
        "test": test,
        "transformers": ["transformers"],
        "ray": ["ray"],
        "helm": ["crfm-helm"],
        "lm-eval": ["lm-eval"],
        "triton": ["triton"],
        "zstd": ["zstandard>=0.19; python_version < '3.14'"],
    },
    entry_points={
        "console_scripts": ["flexrun = flexrun.cli:main"],
        "helm": ["flexrun = flexrun.evals.helm_plugin"],
        "lm_eval.models": ["flexrun = flexrun.evals.lm_eval_adapter:FlexrunLM"],
    },
)
