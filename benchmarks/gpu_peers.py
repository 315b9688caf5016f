"""FlexGen and accelerate on the prompts of a case, each in a process of its own, under the same GPU and RAM budgets.

    python benchmarks/gpu_peers.py accelerate --model DIR --prompts FILE --output-tokens 32 --gpu-bytes 8e9 ...

The parent (``measured``) says in one line what could not be compared and why. FlexGen runs OPT only, with weights it
makes up itself: it reads no checkpoint, and the values do not change its speed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BATCH_SIZES = (512, 384, 256, 192, 128, 96, 64, 48, 32, 16, 8, 4, 1)
WEIGHT_SHARE = 0.5  # of the GPU's budget, accelerate: the rest is for KV cache and activations
FLEXGEN_MODELS = ("opt-6.7b", "opt-13b", "opt-30b")
FLEXGEN_SETTINGS = ("cache on the GPU", "cache and attention on the CPU")


def accelerate(settings: argparse.Namespace, prompts: list[list[int]]) -> dict:
    """transformers with accelerate's device map: layers on the GPU, then in RAM, then on disk.

    Weights go through the link once a pass whatever the batch, so the largest batch that fits is the best one.
    """
    import accelerate
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    on_gpu = torch.cuda.is_available()
    memory = {"cpu": settings.cpu_bytes}
    if on_gpu:
        _limit_gpu(settings.gpu_bytes)
        memory = {0: int(WEIGHT_SHARE * settings.gpu_bytes), **memory}
    model = AutoModelForCausalLM.from_pretrained(
        settings.model,
        dtype=getattr(torch, settings.dtype),
        attn_implementation="sdpa",
        device_map="auto",
        max_memory=memory,
        offload_folder=settings.offload_dir,
    ).eval()
    place = torch.device("cuda", 0) if on_gpu else torch.device("cpu")

    def generate(batch: list[list[int]], tokens: int, seconds: float | None = None) -> int:
        ids = torch.tensor(batch, device=place)
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                max_time=seconds,
                do_sample=False,
                use_cache=True,
                pad_token_id=0,
            )
        return output.numel() - ids.numel()

    generate([prompts[0][::-1]], 1)
    for batch_size in (size for size in (len(prompts), *BATCH_SIZES) if size <= len(prompts)):
        try:
            start = time.perf_counter()
            generated = 0
            for first in range(0, len(prompts), batch_size):
                left = settings.seconds - (time.perf_counter() - start)
                if left <= 0:
                    break
                generated += generate(prompts[first : first + batch_size], settings.output_tokens, left)
            return {
                "version": f"{accelerate.__version__} (transformers {transformers.__version__})",
                "setting": f"batch {batch_size}",
                "generated_tokens": generated,
                "seconds": time.perf_counter() - start,
            }
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    raise SystemExit("not even one prompt fits into the GPU's budget")


def flexgen(settings: argparse.Namespace, prompts: list[list[int]]) -> dict:
    import importlib.metadata

    import torch
    from flexgen.compression import CompressionConfig
    from flexgen.flex_opt import OptLM, Policy
    from flexgen.opt_config import get_opt_config
    from flexgen.pytorch_backend import TorchDevice, TorchDisk, TorchMixedDevice
    from flexgen.utils import ExecutionEnv

    _limit_gpu(settings.gpu_bytes)
    config = get_opt_config(settings.name)
    length = len(prompts[0]) + settings.output_tokens
    on_cpu = settings.setting == FLEXGEN_SETTINGS[1]
    micro_batch, count, weights_on_gpu = flexgen_sizes(
        on_cpu, len(prompts), settings.gpu_bytes, config.model_bytes(), config.cache_bytes(1, length)
    )
    weights_in_ram = min(100 - weights_on_gpu, int(80 * settings.cpu_bytes / config.model_bytes()))
    percent = (weights_on_gpu, weights_in_ram, *((0, 100) if on_cpu else (100, 0)), *((0, 100) if on_cpu else (100, 0)))
    devices = TorchDevice("cuda:0"), TorchDevice("cpu"), TorchDisk(settings.offload_dir)
    names = dict(zip(("gpu", "cpu", "disk"), devices))
    environment = ExecutionEnv(**names, mixed=TorchMixedDevice(list(devices)))
    policy = Policy(
        micro_batch,
        count,
        *percent,
        True,  # overlap
        True,  # sep_layer
        weights_in_ram + weights_on_gpu == 100,  # pin_weight: as its own scripts, not where the disk is used
        on_cpu,  # cpu_cache_compute
        1.0,
        False,
        CompressionConfig(num_bits=4, group_size=64, group_dim=0, symmetric=False),
        False,
        CompressionConfig(num_bits=4, group_size=64, group_dim=2, symmetric=False),
    )
    model = OptLM(config, environment, "_DUMMY_", policy)
    rows = prompts[: micro_batch * count]
    try:
        model.generate([row[:32] for row in rows], max_new_tokens=1, verbose=0)
        torch.cuda.synchronize()
        start = time.perf_counter()
        model.generate(rows, max_new_tokens=settings.output_tokens, verbose=0)
        seconds = time.perf_counter() - start
    finally:
        environment.close_copy_threads()
    return {
        "version": importlib.metadata.version("flexgen"),
        "setting": f"{settings.setting}, {micro_batch} x {count}, percent {' '.join(map(str, percent))}",
        "generated_tokens": len(rows) * settings.output_tokens,
        "seconds": seconds,
    }


def flexgen_sizes(
    on_cpu: bool, sequences: int, gpu_bytes: float, weight_bytes: float, kv_bytes: float
) -> tuple[int, int, int]:
    """(sequences a micro-batch, micro-batches, percent of the weights on the GPU), as its authors chose for a T4.

    With the cache on the GPU, as many sequences as half of the budget holds, kv_bytes each, and the weights streamed;
    with it on the CPU, micro-batches of 48 and 40 % of the budget for weights.
    """
    if on_cpu:
        micro_batch = min(48, sequences)
        return micro_batch, max(sequences // micro_batch, 1), min(int(40 * gpu_bytes / weight_bytes), 100)
    fitting = max(min(int(0.5 * gpu_bytes / kv_bytes), sequences), 1)
    micro_batch = min(fitting, 64)
    return micro_batch, max(fitting // micro_batch, 1), 0


def _limit_gpu(nbytes: int) -> None:
    import torch

    torch.cuda.set_per_process_memory_fraction(min(nbytes / torch.cuda.mem_get_info()[1], 1.0))


ENGINES = {"accelerate": accelerate, "flexgen": flexgen}

# The parent's side ----------------------------------------------------------------------------------------


def absent(engine: str, model: str, device: str) -> str | None:
    """Why an engine cannot run here, in words, or None."""
    modules = {"accelerate": ("accelerate", "transformers"), "flexgen": ("flexgen",)}[engine]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        return f"not installed (pip install {' '.join(missing)})"
    if engine == "flexgen" and device != "cuda":
        return "needs a CUDA GPU"
    if engine == "flexgen" and model not in FLEXGEN_MODELS:
        return f"runs OPT only, not {model}"
    return None


def measured(engine: str, case, gpu_bytes: int, scratch: Path, seconds: float, setting: str | None = None) -> dict:
    """Run an engine on the prompts of a case. Raises processes.RunFailed where it ends without a result."""
    from processes import flags, run_json, worker_command

    vocab_size = json.loads((case.folder / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory(prefix="peer-", dir=scratch) as folder:
        prompts = Path(folder, "prompts.json")
        prompts.write_text(json.dumps(case.work.prompts(vocab_size)))
        arguments = {
            "model": case.folder,
            "name": case.model,
            "prompts": prompts,
            "output_tokens": case.work.output_tokens,
            "dtype": case.dtype,
            "gpu_bytes": gpu_bytes,
            "cpu_bytes": case.cpu_memory_bytes,
            "offload_dir": folder,
            "seconds": seconds,
            "setting": setting,
        }
        command = worker_command(sys.executable, "gpu_peers.py", engine, *flags(arguments))
        result = run_json(command, timeout_seconds=2 * seconds + 120)
    return result | {"engine": engine, "tokens_per_second": result["generated_tokens"] / result["seconds"]}


def best_of(engine: str, case, gpu_bytes: int, scratch: Path, seconds: float) -> Iterator[dict]:
    """Every sensible setting of an engine on one case: its measurement, or {"failed": why}."""
    from processes import RunFailed

    for setting in FLEXGEN_SETTINGS if engine == "flexgen" else (None,):
        try:
            yield measured(engine, case, gpu_bytes, scratch, seconds, setting)
        except RunFailed as error:
            yield {"engine": engine, "setting": setting, "failed": str(error)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors")
    parser.add_argument("--name", default="", help="name of its shape, such as opt-6.7b")
    parser.add_argument("--prompts", required=True, help="JSON file: a list of lists of token ids, all of one length")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--gpu-bytes", type=int, required=True)
    parser.add_argument("--cpu-bytes", type=int, required=True)
    parser.add_argument("--offload-dir", required=True, help="folder for what is offloaded to disk")
    parser.add_argument("--seconds", type=float, default=60.0, help="stop then, and count what has come")
    parser.add_argument("--setting", choices=FLEXGEN_SETTINGS, default=FLEXGEN_SETTINGS[0], help="flexgen")
    arguments = parser.parse_args()
    prompts = json.loads(Path(arguments.prompts).read_text())
    print(json.dumps(ENGINES[arguments.engine](arguments, prompts)), flush=True)
    os._exit(0)  # some engines hang in their destructors; the answer is out


if __name__ == "__main__":
    main()
