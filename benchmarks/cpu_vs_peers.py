"""flexrun against every installed peer on the same prompts, in alternating fresh processes, with the machine's bounds.

    python benchmarks/cpu_vs_peers.py --case ram-1b --model-1b DIR
    python benchmarks/cpu_vs_peers.py --case all --peer-python vllm=/opt/vllm/bin/python --output result.json

Cases: ram-1b (1.1 B parameters, bfloat16, all in RAM), ram-smollm2 (SmolLM2-135M from its GGUF file), ram-moe (0.8 B
parameters in 8 layers of 8 experts, as Mixtral's), disk-1b and disk-moe (the same models inside a memory limit smaller
than themselves, the second of half its size; weights from disk, page cache cold). DIR is what make_checkpoint.py
llama-1b (with experts: mixtral-1b) writes; it is made when absent. All engines get the same random token ids, generate
the same number of tokens greedily past any end of sequence, and are timed without loading.

A table goes to stdout; its last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from comparison import compare, judge, print_case
from control_group import ControlGroupError
from processes import HERE, RunFailed, drop_page_cache, end_on_terminate, flags, run_json, say, worker_command

FIRST_PROMPT_TOKEN = 100  # lower ids tend to be special
DEFAULT_CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flexrun-benchmarks"


@dataclass(frozen=True)
class Peer:
    """``module`` must be importable; ``sweeps``: the batch size is the user's to choose, so the best one counts."""

    engine: str
    module: str
    sweeps: bool


PEERS = {
    peer.engine: peer
    for peer in (
        Peer("transformers", "transformers", True),
        Peer("accelerate_disk", "accelerate", True),
        Peer("openvino", "openvino_genai", False),
        Peer("vllm", "vllm", False),
        Peer("llamacpp", "llama_cpp", True),
    )
}


@dataclass(frozen=True)
class Case:
    """memory_limit: bytes of the control group around both engines, None without one; cpu_memory: flexrun's budget."""

    name: str
    peers: tuple[str, ...]
    memory_limit: int | None = None
    cpu_memory: str | None = None
    experts: bool = False

    @property
    def disk(self) -> bool:
        return self.memory_limit is not None


CASES = {
    case.name: case
    for case in (
        Case("ram-1b", ("transformers", "vllm", "llamacpp")),
        Case("ram-smollm2", ("transformers", "openvino", "vllm", "llamacpp")),
        Case("ram-moe", ("transformers",), experts=True),
        Case("disk-1b", ("accelerate_disk",), 2_000_000_000, "1.5GB"),
        Case("disk-moe", ("accelerate_disk",), 790_000_000, "400MB", experts=True),
    )
}


class CaseRunner:
    """Runs one case: bounds, the choice of each peer's batch size, then alternating rounds."""

    def __init__(self, case: Case, settings: argparse.Namespace, scratch: Path):
        self.case, self.settings = case, settings
        self.model = model_path(case, settings)
        self.disk_dir = settings.cache_dir / "packed"
        self.offload_dir = settings.cache_dir / "offload" / self.model.name
        self.prompts = scratch / f"{case.name}-prompts.json"
        self.limit_bytes = case.memory_limit and (settings.memory_limit or case.memory_limit)

    def run(self) -> dict:
        settings = self.settings
        say(f"{self.case.name}: bounds")
        bounds = [self._bounds()]
        write_prompts(self.prompts, settings, bounds[0]["vocab_size"])
        peers, absent = {}, {}
        for name in self.case.peers:
            reason = self._unavailable(PEERS[name])
            if reason:
                absent[name] = reason
                say(f"{self.case.name}: {name} left out, {reason}")
                continue
            try:
                peers[name] = self._best_settings(PEERS[name])
            except RunFailed as error:
                absent[name] = f"failed: {error}"
                say(f"{self.case.name}: {name} failed: {error}")
        own_runs, pairs, failed_runs = [], {name: [] for name in peers}, []
        for number in range(1, settings.rounds + 1):
            for name in peers or [None]:
                say(f"{self.case.name}: round {number} of {settings.rounds}, flexrun against {name or 'nobody'}")
                own_runs.append(self._worker("flexrun", {}))
                try:
                    if name:
                        pairs[name].append((own_runs[-1], self._worker(name, peers[name]["settings"])))
                except RunFailed as error:
                    failed_runs.append({"peer": name, "round": number, "message": str(error)})
                    say(f"  {name} failed: {error}")
        bounds.append(self._bounds())
        middle = sorted(own_runs, key=lambda run: run["seconds"])[len(own_runs) // 2]
        return {
            "case": self.case.name,
            "model": str(self.model),
            "memory_limit_bytes": self.limit_bytes,
            "absent_peers": absent,
            "peers": {name: compare(name, peers[name], pairs[name]) for name in peers if pairs[name]},
            "failed_runs": failed_runs,
            "flexrun_tokens_per_second": statistics.median(run["tokens_per_second"] for run in own_runs),
            "bounds": judge(middle, bounds, self.case.disk),
            "bounds_measured": bounds,
            "flexrun_runs": own_runs,
        }

    def _bounds(self) -> dict:
        settings = self.settings
        given = {
            "model": self.model,
            "sequences": settings.sequences,
            "prompt_tokens": settings.prompt_tokens,
            "output_tokens": settings.output_tokens,
            "disk_dir": self.disk_dir,
        }
        command = worker_command(sys.executable, "bounds.py", *flags(given), *(["--disk"] if self.case.disk else []))
        return run_json(command)

    def _unavailable(self, peer: Peer) -> str | None:
        if self.settings.peers and peer.engine not in self.settings.peers:
            return "not asked for"
        model = self._model_of(peer.engine)
        if peer.engine == "llamacpp" and model.is_dir() and not list(model.glob("*.gguf")):
            return f"it reads GGUF and {model} has no .gguf file; give one with --peer-model llamacpp=FILE"
        python = self.settings.peer_python.get(peer.engine, sys.executable)
        check = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({peer.module!r}) is None)"
        if subprocess.run([python, "-c", check], stderr=subprocess.DEVNULL).returncode:
            return f"{peer.module} is not installed for {python}"
        return None

    def _model_of(self, engine: str) -> Path:
        return Path(self.settings.peer_model.get(engine, self.model))

    def _best_settings(self, peer: Peer) -> dict:
        """The fastest of the batch sizes, measured once each; then, for accelerate, of its two file formats.

        Raises RunFailed where none of them runs.
        """
        sizes = sorted({min(size, self.settings.sequences) for size in self.settings.batch_sizes}, reverse=True)
        if not peer.sweeps:
            return {"settings": {}, "sweep": []}
        candidates = [{"batch_size": size} for size in sizes]
        if peer.engine == "accelerate_disk":
            if not self.case.experts:
                self._write_offload_files()
            formats = (
                ["safetensors"] if self.case.experts else self.settings.offload_formats
            )  # dat knows no merged ones
            candidates = [{"batch_size": size, "offload_format": formats[0]} for size in sizes]
            candidates += [{"batch_size": sizes[0], "offload_format": other} for other in formats[1:]]
        if self.case.experts:  # each size with grouped products, its default, and with a loop over experts
            candidates = [{**each, "expert_loop": way} for each in candidates for way in (0, 1)]
        if len(candidates) == 1:
            return {"settings": candidates[0], "sweep": []}
        sweep = [self._try(peer, candidate) for candidate in candidates]
        best = _fastest(sweep)
        chosen = best["settings"].get("offload_format")
        if chosen and chosen != self.settings.offload_formats[0]:  # this format's own best size is not known yet
            sweep += [self._try(peer, {"batch_size": size, "offload_format": chosen}) for size in sizes[1:]]
            best = _fastest(sweep)
        return {"settings": best["settings"], "sweep": sweep}

    def _write_offload_files(self) -> None:
        """Outside the memory limit, whose subject is the run: dirty pages of a mapped file would exceed it."""
        python = self.settings.peer_python.get("accelerate_disk", sys.executable)
        given = {"model": self.model, "prompts": self.prompts, "offload_dir": self.offload_dir}
        run_json(worker_command(python, "workers.py", "accelerate_disk", *flags(given), "--only-offload"))

    def _try(self, peer: Peer, candidate: dict) -> dict:
        say(f"{self.case.name}: {peer.engine} with {candidate}")
        try:
            return {"settings": candidate, **self._worker(peer.engine, candidate)}
        except RunFailed as error:
            say(f"  failed: {error}")
            return {"settings": candidate, "message": str(error)}

    def _worker(self, engine: str, chosen: dict) -> dict:
        settings = self.settings
        given = {
            "model": self._model_of(engine),
            "prompts": self.prompts,
            "output_tokens": settings.output_tokens,
            **chosen,
        }
        if engine == "flexrun":
            given |= {"disk_dir": self.disk_dir, "policy": settings.policy}
            if self.case.disk:
                given["cpu_memory"] = settings.cpu_memory or self.case.cpu_memory
        elif engine == "accelerate_disk":
            given["offload_dir"] = self.offload_dir
        elif engine in ("openvino", "vllm"):
            given["cache_gigabytes"] = settings.cache_gigabytes
        if self.case.disk:
            drop_page_cache([self.model, self.disk_dir, self.offload_dir])
        python = settings.peer_python.get(engine, sys.executable)
        command = worker_command(python, "workers.py", engine, *flags(given))
        result = run_json(command, limit_bytes=self.limit_bytes, timeout_seconds=settings.timeout_seconds)
        say(
            f"  {engine}: {result['tokens_per_second']:.1f} tokens/s, {result['seconds']:.1f} s, "
            f"outside CPU {result['outside_cpu_share']:.0%}"
        )
        return result


def _fastest(sweep: list[dict]) -> dict:
    ran = [entry for entry in sweep if "tokens_per_second" in entry]
    if not ran:
        raise RunFailed(sweep[0]["message"])
    return max(ran, key=lambda entry: entry["tokens_per_second"])


def model_path(case: Case, settings: argparse.Namespace) -> Path:
    if case.name == "ram-smollm2":
        from flexrun.weights.catalog import resolve_model

        return resolve_model(settings.model_smollm2)
    shape, folder = ("mixtral-1b", settings.model_moe) if case.experts else ("llama-1b", settings.model_1b)
    if not (folder / "config.json").exists():
        from make_checkpoint import make_checkpoint

        say(f"writing {folder}")
        make_checkpoint(shape, folder)
    return folder


def write_prompts(path: Path, settings: argparse.Namespace, vocab_size: int) -> None:
    draw = random.Random(settings.seed)
    prompts = [
        [draw.randrange(FIRST_PROMPT_TOKEN, vocab_size) for _ in range(settings.prompt_tokens)]
        for _ in range(settings.sequences)
    ]
    path.write_text(json.dumps(prompts))


def _of_peer(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if name not in PEERS or not value:
        raise argparse.ArgumentTypeError(f"write NAME=VALUE, with NAME one of {', '.join(PEERS)}")
    return name, value


def size_in_bytes(text: str) -> int:
    from flexrun.core import parse_bytes
    from flexrun.errors import ConfigError

    try:
        return parse_bytes(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", default="all", choices=[*CASES, "all"])
    parser.add_argument("--model-1b", type=Path, default=DEFAULT_CACHE / "llama-1b", metavar="DIR")
    parser.add_argument("--model-moe", type=Path, default=DEFAULT_CACHE / "mixtral-1b", metavar="DIR")
    parser.add_argument("--model-smollm2", default="smollm2-135m-instruct", metavar="NAME", help="name or .gguf file")
    parser.add_argument("--cache-dir", type=Path, default=DEFAULT_CACHE, help="packed and offloaded weights")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the random token ids")
    parser.add_argument("--rounds", type=int, default=3, help="pairs of runs, flexrun and peer in turn")
    parser.add_argument(
        "--batch-sizes", type=int, nargs="+", default=[16, 32, 64], help="tried for peers that need one"
    )
    parser.add_argument(
        "--offload-formats",
        nargs="+",
        choices=["safetensors", "dat"],
        default=["safetensors", "dat"],
        help="disk case: forms of the weights that accelerate is tried with",
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="only these (default: all that are installed)")
    for flag, value, text in (
        ("--peer-python", "PYTHON", "the interpreter that has this peer"),
        ("--peer-model", "PATH", "the same model in the form this peer reads; with a single --case"),
    ):
        parser.add_argument(flag, type=_of_peer, action="append", default=[], metavar=f"NAME={value}", help=text)
    parser.add_argument(
        "--memory-limit", type=size_in_bytes, help="disk cases: both engines (2.0GB, with experts 0.79GB)"
    )
    parser.add_argument("--cpu-memory", help="disk cases: flexrun's budget within the limit (1.5GB, 0.4GB)")
    parser.add_argument("--policy", help="flexrun policy JSON (default: its own choice)")
    parser.add_argument("--cache-gigabytes", type=int, default=2, help="KV cache of openvino and vllm")
    parser.add_argument("--timeout-seconds", type=float, default=7200, help="of one run")
    parser.add_argument("--output", type=Path, help="write the JSON document here as well")
    return parser


def main() -> int:
    settings = build_parser().parse_args()
    settings.peer_python, settings.peer_model = dict(settings.peer_python), dict(settings.peer_model)
    if settings.peer_model and settings.case == "all":
        say("error: --peer-model belongs to one model; name one --case")
        return 2
    if settings.output_tokens < 2 or settings.sequences < 1 or settings.prompt_tokens < 1 or settings.rounds < 1:
        say("error: at least 2 output tokens, 1 prompt token, 1 sequence and 1 round are needed")
        return 2
    end_on_terminate()
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    results, failures = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES if settings.case == "all" else [settings.case]:
            try:
                results.append(CaseRunner(CASES[name], settings, Path(scratch)).run())
            except (RunFailed, ControlGroupError) as error:
                failures[name] = str(error)
                say(f"{name} failed: {error}")
    document = {
        "command": " ".join(["python", str(Path(__file__).relative_to(HERE.parent)), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": {"cores": os.cpu_count(), "system": platform.platform(), "cpu": cpu_name()},
        "work": {
            "sequences": settings.sequences,
            "prompt_tokens": settings.prompt_tokens,
            "output_tokens": settings.output_tokens,
            "seed": settings.seed,
        },
        "cases": results,
        "failed_cases": failures,
    }
    for result in results:
        print_case(result)
    text = json.dumps(document)
    print(text)
    if settings.output:
        settings.output.parent.mkdir(parents=True, exist_ok=True)
        settings.output.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if failures else 0


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
