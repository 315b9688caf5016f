"""One command for a machine with a GPU: are its numbers right, how fast is each lane, how near is a run to its bound?

    python benchmarks/gpu.py --scratch DIR [--gpu-memory 8GiB] [--minutes 10]
    python benchmarks/gpu.py --device cpu --tiny --scratch DIR       # the same code, an emulated accelerator

Numerics against float64 and the same tokens under every policy; the profile of every lane; then random weights in the
shapes of OPT-6.7B, OPT-13B and Llama-8B, offloaded to RAM and to disk, under the planner's own policy, beside FlexGen
and accelerate where they are installed. Results go to benchmarks/results/ and, as one line of JSON, to stdout.
Cases are sized by their forecasts so that all fit into --minutes; what does not is left out in words. DIR wants room
for twice the largest model. Exits with 1 where a check fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
import time
from pathlib import Path

import gpu_checks
import gpu_peers
import gpu_report
import torch
from gpu_offload import Case, Settings, Work, run, sized
from make_checkpoint import config_of, make_checkpoint
from processes import end_on_terminate, say

from flexrun import Hardware
from flexrun.core import format_bytes, parse_bytes
from flexrun.errors import FlexrunError
from flexrun.hardware.summary import format_hardware
from flexrun.machine import available_memory_bytes

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = ("opt-6.7b", "opt-13b", "llama-3.1-8b")
SMALL_MODELS = ("opt-small", "llama-small")
PLACES = ("RAM", "disk")
SHORTEST_SECONDS = 20.0  # left of --minutes, below which no case is begun


class Clock:
    """Time that is left of the whole run."""

    def __init__(self, minutes: float):
        self._start = time.perf_counter()
        self._end = self._start + 60 * minutes

    @property
    def left_seconds(self) -> float:
        return self._end - time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start


def check_numerics(arguments: argparse.Namespace, settings: Settings) -> dict:
    """Attention and decoder against float64, and every policy's tokens against those of the CPU."""
    place = torch.device(arguments.device)
    checks = list(gpu_checks.attention_checks(place))
    small = {name: make_checkpoint(name, arguments.scratch / name, "float32") for name in SMALL_MODELS}
    for folder in small.values():
        checks += gpu_checks.decoder_checks(folder, place)
    for check in checks:
        if not check.passed:
            say(f"FAILED {check.name}: off by {check.error:.2g}, {check.tolerance:.2g} is allowed")
    engine = {"device": arguments.device, "gpu_memory": "1GiB", "hardware": settings.hardware}
    differing, compared = [], 0
    chosen = gpu_checks.policies()[:: arguments.policy_stride]
    for name, folder in small.items():
        for policy, difference in gpu_checks.policy_checks(folder, settings.cache_dir, chosen, **engine):
            compared += 1
            if difference:
                differing.append({"model": name, "policy": dataclasses.asdict(policy), "difference": difference})
                say(f"FAILED {name} under {policy}: {difference}")
    return {
        "comparisons": [dataclasses.asdict(check) | {"passed": check.passed} for check in checks],
        "policies": compared,
        "differing": differing,
        "passed": all(check.passed for check in checks) and not differing,
    }


def offload(arguments: argparse.Namespace, settings: Settings, clock: Clock) -> list[dict]:
    """Every model in every place, and its peers."""
    rows = []
    for number, model in enumerate(arguments.models):
        config = config_of(model)
        dtype = "float16" if config["model_type"] == "opt" and arguments.device == "cuda" else "bfloat16"
        try:
            folder = prepared(arguments, model, dtype, clock)
        except Skipped as why:
            rows += [{"case": f"{model}, {place}", "skipped": str(why)} for place in arguments.places]
            continue
        weight_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for place in arguments.places:
            remaining = len(arguments.places) * (len(arguments.models) - number) - arguments.places.index(place)
            case = Case(
                model,
                place,
                folder,
                dtype,
                int(0.8 * available_memory_bytes()) if place == "RAM" else weight_bytes // 2,
                Work(arguments.sequences, arguments.prompt_tokens, arguments.output_tokens),
            )
            rows.append(one_case(case, arguments, settings, clock, clock.left_seconds / remaining))
            say(gpu_report.case_line(rows[-1]))
        if not arguments.keep:
            shutil.rmtree(folder)
            shutil.rmtree(settings.cache_dir / "packed", ignore_errors=True)
    return rows


class Skipped(Exception):
    """What cannot be done here, and why."""


def prepared(arguments: argparse.Namespace, model: str, dtype: str, clock: Clock) -> Path:
    """The checkpoint of a model, written unless it is there. Raises Skipped."""
    folder = arguments.scratch / f"{model}-{dtype}"
    if clock.left_seconds < SHORTEST_SECONDS:
        raise Skipped("the time was up")
    if not (folder / "config.json").exists():
        config = config_of(model)
        wide, layers = config["hidden_size"], config["num_hidden_layers"]
        inner = config.get("ffn_dim") or config["intermediate_size"]
        nbytes = 2 * (layers * (4 * wide * wide + 3 * wide * inner) + 2 * config["vocab_size"] * wide)
        room = shutil.disk_usage(arguments.scratch).free
        if room < 2 * nbytes:
            raise Skipped(f"{arguments.scratch} has {format_bytes(room)} free, {format_bytes(2 * nbytes)} are wanted")
        say(f"writing {model} in {dtype}")
        make_checkpoint(model, folder, dtype)
    return folder


def one_case(case: Case, arguments: argparse.Namespace, settings: Settings, clock: Clock, seconds: float) -> dict:
    """Our run and those of the peers. seconds: what this case may take, loading and peers included."""
    weight_bytes = sum(file.stat().st_size for file in case.folder.glob("*.safetensors"))
    if clock.left_seconds < SHORTEST_SECONDS:
        return {"case": case.name, "skipped": "the time was up"}
    if case.place == "RAM" and weight_bytes > case.cpu_memory_bytes:
        return {"case": case.name, "skipped": f"{format_bytes(case.cpu_memory_bytes)} of RAM do not hold the weights"}
    begun = clock.seconds
    try:
        case, plan = sized(case, settings, min(arguments.case_seconds, seconds / 3))
        row = run(case, settings, plan)
    except FlexrunError as error:
        return {"case": case.name, "failed": str(error)}
    row["peers"] = []
    for engine in arguments.peers:
        if why := gpu_peers.absent(engine, case.model, arguments.device):
            row["peers"].append({"engine": engine, "skipped": why})
            continue
        left = min(seconds - (clock.seconds - begun), clock.left_seconds)
        if left < SHORTEST_SECONDS and not arguments.tiny:
            row["peers"].append({"engine": engine, "skipped": "the time was up"})
            continue
        row["peers"] += gpu_peers.best_of(engine, case, settings.gpu_memory_bytes, arguments.scratch, left / 2)
    return row


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="checkpoints and caches, on the disk to measure")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: an emulated accelerator")
    parser.add_argument("--tiny", action="store_true", help="models of a few megabytes: does everything run?")
    parser.add_argument("--gpu-memory", type=parse_bytes, help="budget of the GPU; low, so that weights are offloaded")
    parser.add_argument("--minutes", type=float, default=10.0, help="for the whole run")
    parser.add_argument("--case-seconds", type=float, default=25.0, help="most of one measured run of ours")
    parser.add_argument("--models", nargs="+", help="shapes of make_checkpoint.py")
    parser.add_argument("--places", nargs="+", choices=PLACES, default=PLACES)
    parser.add_argument("--peers", nargs="*", choices=gpu_peers.ENGINES, default=tuple(gpu_peers.ENGINES))
    parser.add_argument("--sequences", type=int, default=512, help="at most; the forecast decides")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--policy-stride", type=int, default=1, metavar="N", help="compare every Nth policy only")
    parser.add_argument("--hardware", type=Path, help="profile to use; without it the machine is measured")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and packed weights")
    parser.add_argument("--output", type=Path, help="results file (default: benchmarks/results/DATE-gpu.md)")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU; --device cpu --tiny runs the same code on an emulated accelerator")
    arguments.models = arguments.models or (SMALL_MODELS if arguments.tiny else MODELS)
    arguments.gpu_memory = arguments.gpu_memory or parse_bytes("3MiB" if arguments.tiny else "8GiB")
    return arguments


def main() -> int:
    arguments = parsed()
    end_on_terminate()
    clock = Clock(arguments.minutes)
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    cache_dir = arguments.scratch / "cache"
    cache_dir.mkdir(exist_ok=True)
    say("measuring the lanes")
    if arguments.hardware:
        hardware = Hardware.load(arguments.hardware)
    else:
        hardware = Hardware.measure(cache_dir, quick=arguments.tiny, progress=sys.stderr.isatty())
    say(format_hardware(hardware) + "\n")
    settings = Settings(arguments.device, arguments.gpu_memory, cache_dir, hardware)
    say(f"checking numerics and policies, {clock.seconds:.0f} s after the start")
    checks = check_numerics(arguments, settings)
    say(gpu_report.checks_line(checks))
    cases = offload(arguments, settings, clock)
    results = {
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "torch": torch.__version__,
        "minutes": clock.seconds / 60,
        "hardware": json.loads(hardware.to_json()),
        "checks": checks,
        "cases": cases,
    }
    text = gpu_report.document(results, format_hardware(hardware))
    output = arguments.output
    if output is None and arguments.device == "cuda" and not arguments.tiny:
        output = RESULTS / f"{gpu_report.today()}-gpu.md"
    if output is not None:
        output.write_text(text)
        say(f"written: {output}")
    print(text)
    print(json.dumps(results), flush=True)
    return 0 if checks["passed"] and not any("failed" in row for row in cases) else 1


if __name__ == "__main__":
    sys.exit(main())
