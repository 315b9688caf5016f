"""One engine in one process: load a model, answer the same prompts as the other engines, print one JSON line.

    python benchmarks/workers.py transformers --model DIR --prompts FILE --output-tokens 32 --batch-size 64

Runs under the interpreter of the engine it measures, so nothing but the standard library is imported up here.
Loading and one short warm-up are outside the measured seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

WARM_UP_TOKENS = 2


class Work:
    """What every engine is asked: ``prompts`` (token ids, all of one length), tokens to generate, settings."""

    def __init__(self, arguments: argparse.Namespace):
        self.settings = arguments
        self.model = arguments.model
        self.prompts: list[list[int]] = json.loads(Path(arguments.prompts).read_text())
        self.output_tokens: int = arguments.output_tokens
        self.batch_size = min(arguments.batch_size or len(self.prompts), len(self.prompts))
        self.longest_tokens = len(self.prompts[0]) + self.output_tokens
        # Another prompt than those measured, so that no prefix cache has seen them.
        self.warm_up = [list(reversed(self.prompts[0]))]

    @property
    def batches(self) -> list[list[list[int]]]:
        return [self.prompts[start : start + self.batch_size] for start in range(0, len(self.prompts), self.batch_size)]


Answers = list[list[int]]
Engine = Callable[[Work], tuple[Callable[[list, int], Answers], dict]]


def measure(name: str, load: Engine, work: Work) -> dict:
    """Load, warm up, generate; ``load`` returns (generate(prompts, tokens), facts about the run)."""
    start = time.perf_counter()
    generate, facts = load(work)
    load_seconds = time.perf_counter() - start
    generate(work.warm_up, WARM_UP_TOKENS)
    before_generating = facts.pop("before_generating", None)
    state = before_generating() if before_generating else None
    disk_bytes, start = _disk_bytes(), time.perf_counter()
    answers = generate(work.prompts, work.output_tokens)
    seconds = time.perf_counter() - start
    after_generating = facts.pop("after_generating", None)
    if after_generating:
        facts |= after_generating(state)
    generated = sum(len(answer) for answer in answers)
    if generated != len(work.prompts) * work.output_tokens:
        raise SystemExit(
            f"{name} generated {generated} tokens, {len(work.prompts) * work.output_tokens} were asked for"
        )
    return {
        "engine": name,
        "generated_tokens": generated,
        "seconds": seconds,
        "tokens_per_second": generated / seconds,
        "load_seconds": load_seconds,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "disk_bytes_read": _disk_bytes() - disk_bytes,
        **facts,
        "token_ids": answers[: work.settings.report_tokens],
    }


def _disk_bytes() -> int:
    """Bytes this process made the disks deliver so far: neither page cache hits nor pipes."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["read_bytes"])


# Engines ----------------------------------------------------------------------------------------------


def flexrun(work: Work):
    import flexrun
    from flexrun.llm import LLM
    from flexrun.sampling import SamplingParams
    from flexrun.workload import Workload

    settings = work.settings
    llm = LLM(
        work.model,
        dtype="bfloat16",
        cpu_memory=settings.cpu_memory,
        disk_dir=settings.disk_dir,
        policy=settings.policy,
    )
    llm.prepare(Workload.uniform(len(work.prompts), len(work.prompts[0]), work.output_tokens))

    def generate(prompts, tokens):
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    def after_generating(before):
        return {"summary": _difference(llm.summary(), before)}

    facts = {"version": flexrun.__version__, "before_generating": llm.summary, "after_generating": after_generating}
    return generate, facts


def _difference(after: dict, before: dict) -> dict:
    """The summary without what loading and warm-up put into its lanes, phases and token counts."""
    result = dict(after)
    for key in ("passes", "seconds", "prompt_tokens", "generated_tokens", "prefill_seconds", "decode_seconds"):
        result[key] = after[key] - before[key]
    for rate in ("generated_tokens_per_second", "total_tokens_per_second"):
        del result[rate]
    result["lanes"] = {
        lane: {key: value - before["lanes"][lane][key] for key, value in numbers.items() if key != "utilisation"}
        for lane, numbers in after["lanes"].items()
    }
    return result


def transformers(work: Work):
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    path = Path(work.model)
    place = {"pretrained_model_name_or_path": str(path)}
    if path.suffix == ".gguf":
        place = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    if work.settings.expert_loop:
        place["experts_implementation"] = "eager"
    model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    return _generate_with(model, work), {"version": transformers.__version__, "batch_size": work.batch_size}


def accelerate_disk(work: Work):
    """Weights on disk, one module in RAM at a time, through accelerate's hooks.

    safetensors: the tensors stay in the checkpoint (what from_pretrained does); dat: one memory-mapped file each.
    """
    import accelerate
    import torch
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    torch.set_grad_enabled(False)
    settings = work.settings
    if settings.offload_format == "dat":
        write_offload_files(Path(work.model), Path(settings.offload_dir))
        config = AutoConfig.from_pretrained(work.model, dtype=torch.bfloat16)
        with accelerate.init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        accelerate.disk_offload(model, settings.offload_dir, execution_device=torch.device("cpu"))
    else:
        model = AutoModelForCausalLM.from_pretrained(
            work.model,
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            device_map={"": "disk"},
            offload_folder=settings.offload_dir,
            **({"experts_implementation": "eager"} if settings.expert_loop else {}),
        )
    model.eval()
    left = [name for name, parameter in model.named_parameters() if parameter.device.type != "meta"]
    if left:
        raise SystemExit(f"accelerate keeps {len(left)} parameters in RAM, such as {left[0]}")
    forwards = len(work.batches) * work.output_tokens
    facts = {
        "version": f"{accelerate.__version__} (transformers {transformers.__version__})",
        "batch_size": work.batch_size,
        "offload_format": settings.offload_format,
        "forward_passes": forwards,
        "weight_bytes_per_pass": sum(parameter.numel() * 2 for parameter in model.parameters()),
    }
    return _generate_with(model, work), facts


def write_offload_files(checkpoint: Path, folder: Path) -> None:
    """The checkpoint as accelerate's offload files, tensor by tensor, unless ``folder`` holds them already."""
    if (folder / "index.json").exists():
        return
    from accelerate.utils import offload_weight, save_offload_index
    from safetensors import safe_open

    folder.mkdir(parents=True, exist_ok=True)
    index: dict = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                offload_weight(tensors.get_tensor(name), name, str(folder), index)
    save_offload_index(index, str(folder))


def _generate_with(model, work: Work):
    import torch

    def generate(prompts, tokens):
        answers = []
        for start in range(0, len(prompts), work.batch_size):
            ids = torch.tensor(prompts[start : start + work.batch_size])
            with torch.inference_mode():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    do_sample=False,
                    num_beams=1,
                    use_cache=True,
                    pad_token_id=0,
                )
            answers += output[:, ids.shape[1] :].tolist()
        return answers

    return generate


def openvino(work: Work):
    import openvino
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = work.settings.cache_gigabytes
    scheduler.max_num_seqs = len(work.prompts)
    scheduler.max_num_batched_tokens = max(2048, len(work.prompts))
    scheduler.enable_prefix_caching = False
    pipeline = openvino_genai.ContinuousBatchingPipeline(work.model, scheduler, "CPU")

    def generate(prompts, tokens):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.ignore_eos, config.do_sample = True, False
        inputs = [openvino.Tensor(_int64_row(prompt)) for prompt in prompts]
        results = pipeline.generate(inputs, [config] * len(inputs))
        return [list(result.m_generation_ids[0]) for result in results]

    return generate, {"version": openvino_genai.__version__}


def _int64_row(prompt: list[int]):
    import numpy

    return numpy.array([prompt], dtype=numpy.int64)


def vllm(work: Work):
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(work.settings.cache_gigabytes))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process, so that its CPU and memory are counted
    import vllm

    llm = vllm.LLM(
        model=work.model,
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=work.longest_tokens,
        max_num_seqs=len(work.prompts),
        enable_prefix_caching=False,
    )

    def generate(prompts, tokens):
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False
        )
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return generate, {"version": vllm.__version__}


def llamacpp(work: Work):
    """llama.cpp's parallel decoding: one context, a sequence id a prompt, all of them in each batch."""
    import ctypes

    import llama_cpp
    import numpy

    path = Path(work.model)
    if path.is_dir():
        files = sorted(path.glob("*.gguf"))
        if not files:
            raise SystemExit(f"llama.cpp reads GGUF files, {path} has none")
        path = files[0]
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp cannot load {path}")
    sequences, threads = work.batch_size, len(os.sched_getaffinity(0))
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = sequences * (work.longest_tokens + 32)
    settings.n_batch = max(2048, sequences)
    settings.n_ubatch = 512
    settings.n_seq_max = sequences
    settings.n_threads = settings.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise SystemExit(f"llama.cpp cannot make a context for {sequences} sequences")
    vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch = llama_cpp.llama_batch_init(settings.n_batch, 0, 1)

    def decode(rows) -> list[int]:
        """Run rows of (token, position, sequence, wants logits); greedy tokens of those that want them."""
        for place, (token, position, sequence, wants) in enumerate(rows):
            batch.token[place], batch.pos[place], batch.logits[place] = token, position, wants
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, sequence
        batch.n_tokens = len(rows)
        code = llama_cpp.llama_decode(context, batch)
        if code:
            raise SystemExit(f"llama_decode failed with code {code}")
        logits = (llama_cpp.llama_get_logits_ith(context, place) for place, row in enumerate(rows) if row[3])
        return [int(numpy.ctypeslib.as_array(values, (vocab_size,)).argmax()) for values in logits]

    def generate_batch(prompts, tokens):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        rows = [
            (token, position, sequence, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        last = []
        for start in range(0, len(rows), settings.n_batch):
            last += decode(rows[start : start + settings.n_batch])
        answers = [[token] for token in last]
        for step in range(1, tokens):
            position = len(prompts[0]) + step - 1
            last = decode([(token, position, sequence, True) for sequence, token in enumerate(last)])
            for answer, token in zip(answers, last):
                answer.append(token)
        return answers

    def generate(prompts, tokens):
        groups = (prompts[start : start + sequences] for start in range(0, len(prompts), sequences))
        return [answer for group in groups for answer in generate_batch(group, tokens)]

    return generate, {"version": llama_cpp.__version__, "batch_size": sequences}


ENGINES = {engine.__name__: engine for engine in (flexrun, transformers, accelerate_disk, openvino, vllm, llamacpp)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("--model", required=True, help="folder with config.json and safetensors, or a .gguf file")
    parser.add_argument("--prompts", required=True, help="JSON file: a list of lists of token ids")
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--batch-size", type=int, help="for engines that do not batch by themselves")
    parser.add_argument("--expert-loop", type=int, default=0, help="transformers: experts one by one, not grouped")
    parser.add_argument("--cpu-memory", help="flexrun: its budget")
    parser.add_argument("--disk-dir", help="flexrun: folder of packed weights")
    parser.add_argument("--policy", help="flexrun: policy JSON")
    parser.add_argument("--offload-dir", help="accelerate_disk: folder of offloaded weights")
    parser.add_argument("--offload-format", choices=["safetensors", "dat"], default="safetensors")
    parser.add_argument("--cache-gigabytes", type=int, default=2, help="openvino, vllm: KV cache")
    parser.add_argument("--report-tokens", type=int, default=0, metavar="PROMPTS", help="answers put into the result")
    parser.add_argument("--only-offload", action="store_true", help="accelerate_disk: write the dat files, run nothing")
    arguments = parser.parse_args()
    if arguments.only_offload:
        write_offload_files(Path(arguments.model), Path(arguments.offload_dir))
        print("{}", flush=True)
        return
    result = measure(arguments.engine, ENGINES[arguments.engine], Work(arguments))
    print(json.dumps(result), flush=True)
    # Some engines crash or hang in their destructors; the answer is out.
    os._exit(0)


if __name__ == "__main__":
    main()
