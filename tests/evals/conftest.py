"""Environments with a harness in them, and a tiny model over bytes that flexrun and Hugging Face both read."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import tokenizers
import transformers

ROOT = Path(__file__).parents[2]
CONTEXT = 4096


@pytest.fixture(scope="session")
def python_with(tmp_path_factory):
    """python_with(module, requirement) -> an interpreter that imports it: this one, or one made for the test."""
    made: dict[str, str] = {}

    def find(module: str, requirement: str) -> str:
        if importlib.util.find_spec(module):
            return sys.executable
        if os.environ.get("FLEXRUN_TEST_HARNESSES") != "1":
            pytest.skip(f"{requirement} is not installed; FLEXRUN_TEST_HARNESSES=1 lets the test do it, in minutes")
        if module not in made:
            folder = tmp_path_factory.mktemp("harness") / "env"
            venv.create(folder, with_pip=True)
            (site,) = folder.glob("lib/python*/site-packages")
            (site / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
            made[module] = str(folder / "bin" / "python")
            pip = [made[module], "-m", "pip"]
            subprocess.run([*pip, "install", "-q", "-c", str(ROOT / "constraints.txt"), requirement], check=True)
            subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision"], check=True)  # its CPU build breaks torch
        return made[module]

    return find


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory) -> Path:
    """A tiny Llama, a token a byte."""
    folder = tmp_path_factory.mktemp("models") / "bytes-llama"
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0, **{letter: number + 1 for number, letter in enumerate(alphabet)}}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<end>", model_max_length=CONTEXT
    ).save_pretrained(folder)
    transformers.set_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_offline(tmp_path_factory):
    """run_offline(command, folder, settings) -> the finished process, which may reach no hub.

    settings: more of its environment.
    """
    home = tmp_path_factory.mktemp("hf-home")

    def run(command: list[str], folder: Path, settings: dict | None = None) -> subprocess.CompletedProcess:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
            **(settings or {}),
        }
        done = subprocess.run(
            command,
            env={**environment, "HF_HOME": str(home)},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    return run
