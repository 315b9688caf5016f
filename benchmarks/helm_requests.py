"""HELM's requests a second on flexrun and on HELM's own Hugging Face client, with the same model in the same files.

    python benchmarks/helm_requests.py --entries synthetic_reasoning:mode=pattern_match --instances 40

Wants an environment with crfm-helm, transformers and flexrun, and reaches no hub: the model is SmolLM2-135M-Instruct
from flexrun's catalog, written once as a Hugging Face folder in bfloat16, without its chat template. HELM's client runs
one request at a time, on --threads of HELM at once; the best of them counts. Both are timed from the first request to
the last answer, without loading. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from processes import MachineTimes, outside_use, say

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"


def write_folder(folder: Path) -> None:
    """The catalog's model as Hugging Face's library reads it."""
    import torch
    import transformers

    from flexrun.llm import open_model

    files = open_model(MODEL)
    where = {"pretrained_model_name_or_path": files.path.parent, "gguf_file": files.path.name}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
    config = loaded.config
    del config.quantization_config  # the weights are dense by now, and what was loaded cannot be saved as it is
    fresh = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(folder)
    tokenizer, decode = files.tokenizer, files.tokenizer.decode
    names = {"eos_token": tokenizer.eos_token_id, "bos_token": tokenizer.bos_token_id}
    special = {name: decode([token], skip_special_tokens=False) for name, token in names.items() if token is not None}
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._backend, model_max_length=files.max_model_len, **special
    ).save_pretrained(folder)


def run(words: list, folder: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, words))} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def flexrun_rates(model: Path, entry: str, settings: argparse.Namespace, folder: Path) -> dict:
    words = ["-m", "flexrun", "bench", "helm", entry, "--model", model, "--no-chat", "-o", "json", "--suite", "s"]
    (found,) = json.loads(run([*words, "--max-eval-instances", settings.instances, *settings.flags], folder))
    engine = found["engine"]
    return {
        "requests": engine["requests"],
        "seconds": engine["seconds"],
        "requests_per_second": engine["requests"] / engine["seconds"],
        "metrics": found["metrics"],
        "texts": texts_of(folder),
    }


def huggingface_rates(model: Path, entry: str, threads: int, settings: argparse.Namespace, folder: Path) -> dict:
    words = ["-m", "helm.benchmark.run", "--enable-local-huggingface-models", model, "--suite", "s", "--disable-cache"]
    words += ["--max-eval-instances", settings.instances, "-n", threads]
    run([*words, "--run-entries", f"{entry},model=huggingface/{model.name}"], folder)
    results = [state["result"] for state in states_of(folder)]
    if threads == 1:
        seconds = sum(result["request_time"] for result in results)
    else:  # they overlap; starts are told in whole seconds
        starts = [result["request_datetime"] for result in results]
        ends = [start + result["request_time"] for start, result in zip(starts, results)]
        seconds = max(ends) - min(starts)
    return {
        "requests": len(results),
        "seconds": seconds,
        "requests_per_second": len(results) / seconds,
        "threads": threads,
        "texts": texts_of(folder),
    }


def states_of(folder: Path) -> list[dict]:
    (path,) = folder.glob("benchmark_output/runs/s/*model=*/scenario_state.json")
    return json.loads(path.read_text())["request_states"]


def texts_of(folder: Path) -> list[str]:
    return [state["result"]["completions"][0]["text"] for state in states_of(folder)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", nargs="+", default=["synthetic_reasoning:mode=pattern_match"])
    parser.add_argument("--instances", type=int, default=40)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4], help="of HELM, over its own client")
    parser.add_argument("--folder", type=Path, help="where the model is, or is to be kept (default: a temporary one)")
    parser.add_argument("flags", nargs="*", help="further flags of flexrun bench helm, after --")
    settings = parser.parse_args()
    document = []
    with tempfile.TemporaryDirectory(prefix="helm-") as scratch:
        model = settings.folder or Path(scratch, "smollm2")
        if not (model / "config.json").exists():
            say("writing the model")
            write_folder(model)
        for number, entry in enumerate(settings.entries):
            before, tried = MachineTimes.now(), []
            for threads in settings.threads:
                folder = Path(scratch, f"{number}-hf-{threads}")
                folder.mkdir()
                tried.append(huggingface_rates(model, entry, threads, settings, folder))
                say(f"{entry}: Hugging Face, {threads} threads: {tried[-1]['requests_per_second']:.2f} requests/s")
            folder = Path(scratch, f"{number}-flexrun")
            folder.mkdir()
            ours = flexrun_rates(model, entry, settings, folder)
            best = max(tried, key=lambda each: each["requests_per_second"])
            equal = sum(one == other for one, other in zip(ours.pop("texts"), best["texts"]))
            for each in tried:
                each.pop("texts")
            ratio = ours["requests_per_second"] / best["requests_per_second"]
            print(
                f"{entry}: flexrun {ours['requests_per_second']:.2f} requests/s, HELM's Hugging Face client "
                f"{best['requests_per_second']:.2f} ({best['threads']} threads): {ratio:.1f} times; "
                f"{equal} of {ours['requests']} answers equal"
            )
            use = outside_use(before, MachineTimes.now())
            document.append(
                {"entry": entry, "flexrun": ours, "huggingface": tried, "ratio": ratio, "equal": equal, **use}
            )
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
